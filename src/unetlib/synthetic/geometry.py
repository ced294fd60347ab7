"""Lines and turns."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def arc_length(line: Array) -> Array:
    """How far along a line each of its points (n, 2) lies."""
    return np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(line, axis=0).T))])


def smooth(line: Array, count: int) -> Array:
    """Cut a line's corners (Chaikin 1974), ends kept, and place `count` points evenly along the result."""
    for _ in range(3):
        a, b = line[:-1], line[1:]
        cut = np.stack([0.8 * a + 0.2 * b, 0.2 * a + 0.8 * b], 1).reshape(-1, 2)
        line = np.concatenate([line[:1], cut[1:-1], line[-1:]])
    arc = arc_length(line)
    even = np.linspace(0, arc[-1], count)
    return np.stack([np.interp(even, arc, line[:, k]) for k in (0, 1)], 1)


def turn(points: Array, angle: float) -> Array:
    """Turn points (..., 3) about the vertical."""
    cos, sin = math.cos(angle), math.sin(angle)
    x, y, z = points[..., 0], points[..., 1], points[..., 2]
    return np.stack([x * cos - y * sin, x * sin + y * cos, z], -1)
