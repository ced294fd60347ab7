"""What the embedded weights promise: small, cheap, right on cars they never saw."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from needs import needs_data
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from unetlib import CarvanaDataset, ImageMaskDataset, UNet, list_pretrained
from unetlib.inference import evaluate
from unetlib.pretrained import ZOO
from unetlib.synthetic import render_scene

SAMPLE = Path(__file__).parents[1] / "examples" / "car.jpg"
SAMPLE_SCENE = {"car": 18, "view": 3, "size": (853, 1280), "seed": 1}  # no scene of the training, which used seed 0


def dice(mask, truth):
    return 2 * (mask & truth).sum() / (mask.sum() + truth.sum())


def test_the_zoo_lists_its_models():
    assert list_pretrained() == ["carvana", "em", "nuclei"]


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
    assert evaluate(model, scenes)["dice"] >= 0.985


def test_carvana_finds_the_sample_car():
    image, truth = render_scene(**SAMPLE_SCENE)
    sample = np.asarray(Image.open(SAMPLE))
    assert np.abs(sample.astype(int) - image).mean() < 4, "run docs/make_images.py: examples/car.jpg is another scene"
    assert dice(UNet.from_pretrained("carvana").predict(SAMPLE), truth) >= 0.97


def test_carvana_finds_cars_in_small_pictures_too():
    scenes = [render_scene(car, 1 + 5 * car % 16, size=(640, 960), seed=99) for car in range(2)]
    assert evaluate(UNet.from_pretrained("carvana"), scenes)["dice"] >= 0.985


def test_microscopy_models_say_what_they_are():
    em, nuclei = UNet.from_pretrained("em"), UNet.from_pretrained("nuclei")
    assert (em.config.in_channels, em.preprocessing.class_names) == (1, ("membrane", "cell"))
    assert (nuclei.config.in_channels, nuclei.preprocessing.class_names) == (3, ("background", "nucleus"))
    assert em.preprocessing.size is nuclei.preprocessing.size is None


def blobs(ground: int, ink: int) -> tuple[np.ndarray, np.ndarray]:
    """Blurred discs of 18 pixels on a noisy ground, as fluorescing nuclei are, and their mask."""
    generator = np.random.default_rng(0)
    y, x = np.mgrid[:256, :256]
    centers = [
        (v + generator.integers(-8, 8), u + generator.integers(-8, 8)) for v in range(32, 256, 64) for u in range(32, 256, 64)
    ]
    distance = np.min([np.hypot(y - v, x - u) for v, u in centers], axis=0)
    light = ground + (ink - ground) / (1 + np.exp(distance - 9)) + generator.normal(0, 2, (256, 256))
    return np.repeat(light.clip(0, 255).astype(np.uint8)[..., None], 3, axis=2), distance < 9


def test_nuclei_finds_discs_of_light():
    picture, truth = blobs(ground=12, ink=110)
    assert dice(UNet.from_pretrained("nuclei").predict(picture).astype(bool), truth) >= 0.85


def test_em_finds_dark_walls_between_cells():
    generator = np.random.default_rng(0)
    y, x = np.mgrid[:256, :256]
    wall = (np.abs((y + 8 * np.sin(x / 30)) % 64 - 32) < 3) | (np.abs((x + 8 * np.sin(y / 25)) % 64 - 32) < 3)
    picture = np.where(wall, 70, 165) + generator.normal(0, 20, (256, 256))
    cells = UNet.from_pretrained("em").predict(picture.clip(0, 255).astype(np.uint8)).astype(bool)
    assert dice(cells, ~wall) >= 0.85
    assert (~cells & wall).sum() >= 0.7 * wall.sum()


@needs_data
def test_nuclei_on_pictures_that_it_was_not_trained_on():
    data = Path(os.environ["UNETLIB_DATA"]) / "nuclei"
    val = ImageMaskDataset(data / "val", data / "val_masks")
    assert evaluate(UNet.from_pretrained("nuclei"), val.subset(range(0, len(val), 5)))["dice"] >= 0.83


@needs_data
def test_em_on_slices_that_it_was_not_trained_on():
    data = Path(os.environ["UNETLIB_DATA"]) / "em"
    slices = ImageMaskDataset(data / "train", data / "train_masks", mode="L")
    held_out = slices.subset(i for i, name in enumerate(slices.images) if name in ("27.png", "28.png", "29.png"))
    assert len(held_out) == 3
    assert evaluate(UNet.from_pretrained("em"), held_out)["dice"] >= 0.92


@needs_data
def test_carvana_on_photographs_of_cars_that_it_was_not_trained_on():
    data = Path(os.environ["UNETLIB_DATA"]) / "carvana"
    val = CarvanaDataset(data / "val", data / "val_masks")
    scores = evaluate(UNet.from_pretrained("carvana"), val.subset(range(0, len(val), 18)))
    assert scores["dice"] >= 0.992
