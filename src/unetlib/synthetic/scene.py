"""A scene: a car in a studio, and its mask."""

from __future__ import annotations

import functools
import math

import numpy as np
from numpy.typing import NDArray
from PIL import ImageFilter

from ..arguments import height_and_width, whole
from .backdrop import paint_studio
from .car import Car, design_car
from .drawing import draw_car
from .geometry import Array
from .painting import paint_car
from .studio import design_studio
from .surfaces import Surface, build_surfaces

VIEWS = 16  # of each car, an even turn between them: 1 the front, 5 and 13 the sides, 9 the rear


def render_scene(
    car: int, view: int = 1, *, size: tuple[int, int] = (1280, 1918), seed: int = 0
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Render one view of one car in a photo studio, with its exact mask.

    The car's number and the seed decide body, paint, wheels, studio and light; the view turns the turntable. The
    scene is a pure function of the arguments (with the same NumPy and Pillow), and the same at every size but for
    the pixel grid and the grain. Shadows, floor and lettering are not car.

    Args:
        car: The car's number, 0 or more.
        view: 1 to 16, 22.5 degrees apart: 1 shows the front, 5 and 13 the sides, 9 the rear.
        size: Height and width in pixels; Kaggle's by default.
        seed: Another seed, 0 or more, gives other cars.

    Returns:
        The picture, uint8 (H, W, 3) RGB, and the mask, uint8 (H, W): 1 where at least half of a pixel is car, else 0.

    Raises:
        TypeError: An argument is no integer, or `size` no pair of them.
        ValueError: An argument is out of its range.

    Example:
        >>> image, mask = render_scene(7, view=4, size=(160, 240))
        >>> image.shape, mask.shape, mask.max().item()
        ((160, 240, 3), (160, 240), 1)
        >>> bool(0.05 < mask.mean() < 0.5)
        True
    """
    car, seed, view = whole("car", car, 0), whole("seed", seed, 0), whole("view", view, 1, VIEWS)
    size = height_and_width(size)
    plan, drawing, surfaces = build_car(car, seed)
    studio = design_studio(np.random.default_rng([2, seed, car]), size)
    rng = np.random.default_rng([3, seed, car, view])
    angle = math.pi / 2 - (view - 1) * 2 * math.pi / VIEWS + float(rng.uniform(-0.04, 0.04))

    image = paint_studio(studio, plan, angle)
    layer, (left, top) = paint_car(surfaces, drawing, studio, angle)
    share = layer.getchannel("A")
    image.paste(layer, (left, top), share)
    mask = np.zeros(size, np.uint8)
    mask[top : top + layer.height, left : left + layer.width] = np.asarray(share) >= 128

    image = image.filter(ImageFilter.GaussianBlur(0.0004 * studio.camera.unit))  # the lens
    grain = rng.standard_normal(size, np.float32) * np.float32(studio.noise)
    return np.clip(np.asarray(image) + grain[..., None], 0, 255).astype(np.uint8), mask


@functools.lru_cache(maxsize=4)
def build_car(number: int, seed: int) -> tuple[Car, Array, list[Surface]]:
    """Build what all views of a car share: the car, its drawing and its surfaces."""
    car = design_car(np.random.default_rng([1, seed, number]))
    return car, draw_car(car), build_surfaces(car)
