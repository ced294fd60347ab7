"""What the embedded weights promise: small, cheap, right on cars they never saw."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from unetlib import CarvanaDataset, UNet, list_pretrained
from unetlib.inference import evaluate
from unetlib.pretrained import ZOO
from unetlib.synthetic import render_scene

SAMPLE = Path(__file__).parents[1] / "examples" / "car.jpg"
SAMPLE_SCENE = {"car": 18, "view": 3, "size": (853, 1280), "seed": 1}  # no scene of the training, which used seed 0


def dice(mask, truth):
    return 2 * (mask & truth).sum() / (mask.sum() + truth.sum())


def test_the_zoo_lists_its_models():
    assert list_pretrained() == ["carvana"]


@pytest.mark.parametrize("name", list_pretrained())
def test_models_are_small_and_have_a_card(name):
    files = {path.name: path.stat().st_size for path in (ZOO / name).iterdir()}
    assert set(files) == {"config.json", "model.safetensors", "README.md"}
    assert files["model.safetensors"] <= 8 * 2**20
    card = (ZOO / name / "README.md").read_text()
    for heading in ("## Data", "## Recipe", "## Results", "## Licence"):
        assert heading in card


def test_carvana_stays_within_its_arithmetic():
    model = UNet.from_pretrained("carvana").to("meta")
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, 1280, 1918, device="meta"))
    assert counter.get_total_flops() <= 250e9


def test_carvana_finds_cars_in_scenes_that_it_was_not_trained_on():
    model = UNet.from_pretrained("carvana")
    scenes = [render_scene(car, 1 + 5 * car % 16, size=(1280, 1918), seed=99) for car in range(4)]
    assert evaluate(model, scenes)["dice"] >= 0.97


def test_carvana_finds_the_sample_car():
    image, truth = render_scene(**SAMPLE_SCENE)
    sample = np.asarray(Image.open(SAMPLE))
    assert np.abs(sample.astype(int) - image).mean() < 4, "run docs/make_images.py: examples/car.jpg is another scene"
    assert dice(UNet.from_pretrained("carvana").predict(SAMPLE), truth) >= 0.97


@pytest.mark.skipif("UNETLIB_DATA" not in os.environ, reason="UNETLIB_DATA names no folder with real data")
def test_carvana_on_photographs_of_cars_that_it_was_not_trained_on():
    data = Path(os.environ["UNETLIB_DATA"]) / "carvana"
    val = CarvanaDataset(data / "val", data / "val_masks")
    scores = evaluate(UNet.from_pretrained("carvana"), val.subset(range(0, len(val), 18)))
    assert scores["dice"] >= 0.989
