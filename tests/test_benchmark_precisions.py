from __future__ import annotations

import functools
import json

import numpy as np
import precisions
import pytest

from unetlib import CarvanaDataset, Preprocessing, UNet
from unetlib.synthetic import write_carvana

for package in ("openvino", "nncf"):
    pytest.importorskip(package, reason="needs the extra int8")


@pytest.fixture
def options(tmp_path) -> list[str]:
    write_carvana(tmp_path / "data", cars=1, views=3, size=(32, 48))
    write_carvana(tmp_path / "data", cars=[1], views=4, size=(32, 48), split="val")
    model = UNet(features=(8, 16))
    model.preprocessing = Preprocessing(size=(32, 48))
    folder = model.save_pretrained(tmp_path / "model")
    return ["--data", str(tmp_path / "data"), "--model", str(folder), "--rounds", "2", "--calibrate", "2"]


def test_table_and_json(options, tmp_path, capsys):
    precisions.main([*options, "--every", "2", "--json", str(tmp_path / "figures.json")])
    results = json.loads((tmp_path / "figures.json").read_text())
    assert results["pictures"] == 2
    assert results["shape"] == [1, 3, 32, 48]
    rows = {row["way"]: row for row in results["rows"]}
    assert {"float32", "openvino float32", "openvino int8"} <= set(rows)
    base = rows["float32"]
    assert rows["openvino float32"]["dice"] == pytest.approx(base["dice"], abs=1e-3)
    for row in rows.values():
        assert row["speedup"] == pytest.approx(np.divide(base["seconds"], row["seconds"]))
    printed = capsys.readouterr().out
    assert "2 pictures scored, 2 for the ranges of int8" in printed
    assert f"{base['dice']:.5f}" in printed


def test_pictures_from_all_over_the_data_set(options):
    data = CarvanaDataset(f"{options[1]}/val", f"{options[1]}/val_masks")
    assert precisions.spaced(data, 2).images == data.images[::2]
    assert precisions.spaced(data, 100).images == data.images
    assert len(precisions.spaced(data, 3)) == 2


def test_without_data_scenes_are_rendered(options, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("UNETLIB_DATA", str(tmp_path / "empty"))
    monkeypatch.setattr(precisions, "write_carvana", functools.partial(write_carvana, size=(32, 48)))
    precisions.main([*options[2:], "--rounds", "1"])
    assert "8 pictures scored, 2 for the ranges of int8" in capsys.readouterr().out


def test_a_model_that_is_not_there_is_one_line(options):
    with pytest.raises(SystemExit, match="Did you mean 'carvana'"):
        precisions.main([*options, "--model", "carvanna"])


@pytest.mark.parametrize("option", ["--calibrate", "--every", "--rounds"])
def test_bad_options(options, option, capsys):
    with pytest.raises(SystemExit):
        precisions.main([*options, option, "0"])
    assert f"{option} must be at least 1, got 0" in capsys.readouterr().err
