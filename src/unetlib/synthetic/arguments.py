"""Checks of what the callers give."""

from __future__ import annotations

import operator
from typing import Any


def whole(name: str, value: Any, low: int, high: int | None = None) -> int:
    """Read an integer, Python's or NumPy's, from `low` to `high`."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}={value!r} must be an integer, such as {name}={low}") from None
    if number < low or (high is not None and number > high):
        allowed = f"{low} or more" if high is None else f"from {low} to {high}"
        raise ValueError(f"{name}={number} must be {allowed}")
    return number


def height_and_width(size: Any) -> tuple[int, int]:
    """Read a picture's size."""
    if not isinstance(size, (tuple, list)) or len(size) != 2:
        raise TypeError(f"size={size!r} must be a pair (height, width), such as size=(320, 480)")
    return whole("size", size[0], 1), whole("size", size[1], 1)
