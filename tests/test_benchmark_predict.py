from __future__ import annotations

import json
import time

import numpy as np
import predict
import pytest
import torch
from peers import load_network
from PIL import Image
from torch import nn

from unetlib import Preprocessing, UNet
from unetlib.synthetic import render_scene


@pytest.fixture
def picture(tmp_path):
    image, _ = render_scene(7, view=4, size=(160, 240))
    Image.fromarray(image).save(tmp_path / "scene.jpg")
    return tmp_path / "scene.jpg"


@pytest.fixture
def model(tmp_path):
    """A tiny network that finds car everywhere, however its picture was resized."""
    network = UNet(features=(4, 8))
    torch.nn.init.constant_(network.head.bias, 100.0)
    network.preprocessing = Preprocessing(size=(16, 24))
    return str(network.save_pretrained(tmp_path / "model"))


def test_table_and_json(picture, model, tmp_path, capsys):
    options = ["--device", "cpu", "--model", model, "--picture", str(picture), "--rounds", "2"]
    predict.main([*options, "--json", str(tmp_path / "figures.json")])
    results = json.loads((tmp_path / "figures.json").read_text())
    assert results["picture"] == [240, 160]
    assert [row["way"] for row in results["rows"]] == ["study", "milesial", "unetlib"]
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    lines = {line[0]: line for line in printed if line and line[0] in ("study", "milesial", "unetlib")}
    ours = results["rows"][-1]
    for row in results["rows"]:
        assert len(row["seconds"]) == 2
        assert row["ratio"] == pytest.approx([a / b for a, b in zip(row["seconds"], ours["seconds"])])
        assert row["different"] == 0
        stages = np.array([row["stages"][stage] for stage in predict.STAGES])
        assert stages.shape == (4, 2)
        assert (stages > 0).all()
        assert (stages.sum(0) <= row["seconds"]).all()
        assert float(lines[row["way"]][1]) == pytest.approx(1e3 * np.median(row["seconds"]), abs=0.06)


def test_stages_are_told_apart(picture, monkeypatch):
    """A way that sleeps as long as nothing else takes; the clock is the real one."""
    module = nn.Identity()

    def way(path):
        image = Image.open(path)
        image.load()
        time.sleep(0.05)
        module(torch.zeros(1))
        time.sleep(0.1)

    module.register_forward_hook(lambda *_: time.sleep(0.2))
    stages = predict.staged(module, way, picture, "cpu")
    assert list(stages) == ["decode", "resize", "forward", "back"]
    assert stages["decode"] > 0
    assert stages["resize"] >= 0.05
    assert stages["back"] >= 0.1
    assert stages["forward"] >= 0.2
    assert not module._forward_pre_hooks
    assert len(module._forward_hooks) == 1  # ours is gone


def test_nothing_is_timed_when_masks_differ(picture, model, monkeypatch):
    ways = predict.ways

    def wrong(*arguments):
        found = ways(*arguments)
        module, way = found["milesial"]
        return {**found, "milesial": (module, lambda path: 1 - way(path))}

    monkeypatch.setattr(predict, "ways", wrong)
    monkeypatch.setattr(predict, "time_turns", lambda *_, **__: pytest.fail("timed"))
    with pytest.raises(SystemExit, match="the masks are not those of one network"):
        predict.main(["--device", "cpu", "--model", model, "--picture", str(picture)])


def test_a_picture_that_is_none_is_one_line(tmp_path, model):
    (tmp_path / "notes.txt").write_text("none")
    for name in "notes.txt", "none.jpg":
        with pytest.raises(SystemExit, match=name):
            predict.main(["--device", "cpu", "--model", model, "--picture", str(tmp_path / name)])


def test_each_way_gives_a_mask_of_the_pictures_size(picture, model):
    for _, way in predict.ways(load_network(model), (16, 24), "cpu").values():
        mask = way(picture)
        assert mask.shape == (160, 240)
        assert mask.dtype == np.uint8
        assert (mask == 1).all()


def test_milesials_way_is_left_out_where_its_layout_cannot_hold_the_weights(tmp_path):
    network = UNet(features=(4, 8), patch_size=2).save_pretrained(tmp_path / "model")
    assert list(predict.ways(load_network(str(network)), (16, 24), "cpu")) == ["study", "unetlib"]


def test_a_picture_is_found(monkeypatch, tmp_path):
    monkeypatch.delenv("UNETLIB_DATA", raising=False)
    monkeypatch.setattr(predict, "render_scene", lambda *_, **__: render_scene(7, view=4, size=(16, 24)))
    assert Image.open(predict.find_picture(None, tmp_path)).size == (24, 16)
    for split in ("train", "val"):
        (tmp_path / "carvana" / split).mkdir(parents=True)
    photograph = tmp_path / "carvana" / "val" / "a.jpg"
    photograph.write_bytes(b"")
    monkeypatch.setenv("UNETLIB_DATA", str(tmp_path))
    assert predict.find_picture(None, tmp_path) == photograph
    assert predict.find_picture(tmp_path / "mine.jpg", tmp_path) == tmp_path / "mine.jpg"


def test_a_model_without_a_size_is_refused(tmp_path, capsys):
    folder = UNet(features=(4,)).save_pretrained(tmp_path / "model")
    with pytest.raises(SystemExit):
        predict.main(["--device", "cpu", "--model", str(folder)])
    assert "needs a model with a size" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="Did you mean 'carvana'"):
        predict.main(["--device", "cpu", "--model", "carvanna"])
