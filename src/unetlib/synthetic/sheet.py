"""The flat sheet that takes a car's drawing: its panels and its pen.

The sheet has three panels: the side, the strip, which is the top line unrolled from the front lip over the roof to the
rear lip, and the wheel. Two swatches serve the parts that have no drawing.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image, ImageDraw

from .car import BLACK, Color
from .geometry import Array

SCALE = 200  # pixels in a metre
SIZE = (10.0, 4.6)  # metres
SWATCHES = {"paint": (9.2, 0.2), "black": (9.2, 0.6)}

Panel = Callable[[ArrayLike, ArrayLike], Array]  # a panel's own coordinates -> places on the sheet (..., 2), in metres


def on_side(x: ArrayLike, z: ArrayLike) -> Array:
    """The side: x and z as the car has them."""
    return np.stack(np.broadcast_arrays(np.asarray(x) + 3.2, 2.2 - np.asarray(z)), -1)


def on_strip(s: ArrayLike, y: ArrayLike) -> Array:
    """The strip: `s` metres along the top line from the front lip, `y` metres off the middle."""
    return np.stack(np.broadcast_arrays(np.asarray(s) + 0.1, np.asarray(y) + 3.45), -1)


def on_wheel(x: ArrayLike, z: ArrayLike) -> Array:
    """The wheel: x and z from the hub."""
    return np.stack(np.broadcast_arrays(np.asarray(x) + 7.6, 1 - np.asarray(z)), -1)


class Sheet:
    """A sheet in the car's paint, and the pen."""

    def __init__(self, paint: Color) -> None:
        self.image = Image.new("RGBA", (int(SIZE[0] * SCALE), int(SIZE[1] * SCALE)), paint)
        self._pen = ImageDraw.Draw(self.image)
        self.fill(np.array(SWATCHES["black"]) + 0.2 * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]), BLACK)

    def fill(self, places: Array, color: Color) -> None:
        """Fill the polygon through places on the sheet (n, 2)."""
        self._pen.polygon((places * SCALE).ravel().tolist(), color)

    def stroke(self, places: Array, color: Color, thickness: float) -> None:
        """Draw a line through places on the sheet (n, 2)."""
        self._pen.line((places * SCALE).ravel().tolist(), color, round(thickness * SCALE))

    def box(self, on: Panel, a: float, b: float, c: float, d: float, color: Color, cut: float = 0.0) -> None:
        """Fill a box from (a, b) to (c, d) on a panel, its corners cut off."""
        u = np.array([a, a + cut, c - cut, c, c, c - cut, a + cut, a])
        v = np.array([b + cut, b, b, b + cut, d - cut, d, d, d - cut])
        self.fill(on(u, v), color)

    def circle(self, on: Panel, u: float, v: float, radius: float, color: Color) -> None:
        """Fill a circle about (u, v) on a panel."""
        around = np.linspace(0, 2 * math.pi, 48)
        self.fill(on(u + radius * np.cos(around), v + radius * np.sin(around)), color)
