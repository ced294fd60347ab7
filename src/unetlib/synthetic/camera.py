"""The camera: points to pixels and back."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .geometry import Array


@dataclass(frozen=True)
class Camera:
    """A slightly raised camera that looks at the turntable's middle. World: X right, Y away, Z up, in metres."""

    distance: float
    height: float
    zoom: float  # focal length, in units
    shift: tuple[float, float]  # of the picture's middle, right and down, in units
    size: tuple[int, int]  # of the picture: height, width

    @property
    def unit(self) -> float:
        """Width of the largest 3:2 picture inside this one: scenes are laid out in it, whatever the picture's form."""
        return min(self.size[1], 1.5 * self.size[0])

    def project(self, points: Array) -> tuple[Array, Array]:
        """World points (..., 3) -> places in the picture (..., 2), column and row, and their depths (...)."""
        x, y, z = points[..., 0], points[..., 1] + self.distance, points[..., 2] - self.height
        cos, sin = self._tilt
        depth = y * cos - z * sin
        scale = self.zoom * self.unit / depth
        return np.stack([self._middle[0] + scale * x, self._middle[1] - scale * (y * sin + z * cos)], -1), depth

    def rays(self, columns: Array, rows: Array) -> Array:
        """Places in the picture, (n,) columns and rows -> unit vectors in the world through them, (3, n) float32."""
        focal = self.zoom * self.unit
        right, up = (columns - self._middle[0]) / focal, (self._middle[1] - rows) / focal
        cos, sin = self._tilt
        ray = np.stack([right, cos + up * sin, up * cos - sin]).astype(np.float32)
        ray /= np.sqrt((ray * ray).sum(0))
        return ray

    @property
    def _tilt(self) -> tuple[float, float]:
        angle = math.atan2(self.height - 0.72, self.distance)
        return math.cos(angle), math.sin(angle)

    @property
    def _middle(self) -> tuple[float, float]:
        return self.size[1] / 2 + self.shift[0] * self.unit, self.size[0] / 2 + self.shift[1] * self.unit
