"""Make the pictures of these pages, scenes of `unetlib.synthetic`, again: `python docs/make_images.py`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from unetlib import UNet
from unetlib.imaging import read_image
from unetlib.synthetic import render_scene
from unetlib.visualize import grid, mask_to_image, overlay

IMAGES = Path(__file__).parent / "images"
SAMPLE = Path(__file__).parents[1] / "examples" / "car.jpg"


def scene() -> NDArray[np.uint8]:
    """A scene, its mask, and the mask over the scene."""
    image, mask = render_scene(7, view=4, size=(320, 480))
    return grid([image, mask_to_image(mask), overlay(image, mask)], columns=3)


def views() -> NDArray[np.uint8]:
    """One car from eight sides."""
    return grid([render_scene(3, view, size=(160, 240))[0] for view in range(1, 17, 2)], columns=4)


def cars() -> NDArray[np.uint8]:
    """Eight cars from one side."""
    return grid([render_scene(car, view=15, size=(160, 240))[0] for car in range(20, 28)], columns=4)


def readme() -> NDArray[np.uint8]:
    """The sample picture, and what the model finds in it."""
    tiles = (read_image(SAMPLE), overlay(read_image(SAMPLE), UNet.from_pretrained("carvana").predict(SAMPLE)))
    return grid([np.asarray(Image.fromarray(tile).resize((600, 400))) for tile in tiles], columns=2)


PICTURES: dict[str, Callable[[], NDArray[np.uint8]]] = {
    "scene.jpg": scene,
    "views.jpg": views,
    "cars.jpg": cars,
    "readme.jpg": readme,
}


if __name__ == "__main__":
    Image.fromarray(render_scene(18, view=3, size=(853, 1280), seed=1)[0]).save(SAMPLE, quality=88)
    for name, make in PICTURES.items():
        Image.fromarray(make()).save(IMAGES / name, quality=82, optimize=True)
