from __future__ import annotations

import json
import sys
from pathlib import Path

import folder
import numpy as np
import pytest
import torch
from PIL import Image

from unetlib import UNet


@pytest.fixture
def options(tmp_path) -> list[str]:
    for i in range(5):
        noise = np.random.default_rng(i).integers(0, 256, (20 + i % 2, 30, 3), dtype=np.uint8)
        (tmp_path / "pictures").mkdir(exist_ok=True)
        Image.fromarray(noise).save(tmp_path / "pictures" / f"{i}.png")
    model = UNet(features=(4,)).save_pretrained(tmp_path / "model")
    return ["--pictures", str(tmp_path / "pictures"), "--model", str(model), "--device", "cpu", "--files", "4"]


def test_ratio_and_json(options, tmp_path, capsys):
    folder.main([*options, "--rounds", "3", "--json", str(tmp_path / "figures.json")])
    results = json.loads((tmp_path / "figures.json").read_text())
    assert results["files"] == 4
    assert results["machine"]["threads"] == torch.get_num_threads()
    assert results["command"].startswith(f"python benchmarks/{Path(sys.argv[0]).name} --pictures {tmp_path / 'pictures'} ")
    assert results["ratio"] == [seconds["loop"] / seconds["predict_folder.py"] for seconds in results["seconds"]]
    printed = capsys.readouterr().out
    assert "4 pictures, 3 rounds" in printed
    assert f"{sorted(results['ratio'])[1]:8.2f} " in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["figures.json", "model", "pictures"]


def test_pictures_in_subfolders(options, tmp_path, capsys):
    (tmp_path / "pictures" / "a" / "b").mkdir(parents=True)
    for i in range(5):
        (tmp_path / "pictures" / f"{i}.png").rename(tmp_path / "pictures" / "a" / "b" / f"{i}.png")
    folder.main([*options, "--rounds", "1"])
    assert "4 pictures, 1 rounds" in capsys.readouterr().out


def test_nothing_is_compared_where_the_masks_differ(options, monkeypatch):
    write = folder.predict_folder.write
    monkeypatch.setattr(folder.predict_folder, "write", lambda masks, classes, item: write(masks, 1, (item[0], 1 - item[1])))
    with pytest.raises(SystemExit, match=r"of the pixels of 0\.png have another mask"):
        folder.main(options)


def test_rendered_scenes_where_there_is_no_data(options, monkeypatch, tmp_path):
    monkeypatch.delenv("UNETLIB_DATA", raising=False)
    rendered = []
    monkeypatch.setattr(folder, "write_carvana", lambda root, **_: rendered.append((root / "val").mkdir()))
    with pytest.raises(SystemExit, match="there is no picture in"):
        folder.main(options[2:])
    monkeypatch.setenv("UNETLIB_DATA", str(tmp_path))  # which has no carvana/
    with pytest.raises(SystemExit, match="there is no picture in"):
        folder.main(options[2:])
    assert len(rendered) == 2


def test_a_model_that_is_not_there_is_one_clear_error(options):
    with pytest.raises(SystemExit, match="Did you mean 'carvana'"):
        folder.main([*options, "--model", "carvanna"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["--files", "0"], "--files must be at least 1, got 0"),
        (["--json", "no/such/a.json"], "there is no folder 'no/such'"),
    ],
)
def test_bad_options(arguments, message, capsys):
    with pytest.raises(SystemExit):
        folder.main(arguments)
    assert message in capsys.readouterr().err
