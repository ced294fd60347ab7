"""Geometry of binary masks: inner bands, edges, and distances from one mask's edge to another's."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .arguments import needed


def inner_band(mask: Tensor, width: int) -> Tensor:
    """Pixels of the mask within `width` steps, diagonal ones too, of its outside; the picture's rim counts as outside.

    Args:
        mask: bool (N, C, *spatial).
        width: in pixels, at least 1.
    """
    inside = mask
    for axis in range(2, mask.ndim):  # a square window fits where a line fits along each axis in turn
        inside = window_sums(inside, width, axis, dtype=torch.int32) == 2 * width + 1
    return mask & ~inside


def window_sums(values: Tensor, reach: int, axis: int, *, dtype: torch.dtype | None = None) -> Tensor:
    """Sum from `reach` before to `reach` after each place along an axis, with nothing beyond the ends.

    A difference of running sums: as fast whatever the reach, and exact where the sums are whole numbers.
    """
    length = values.shape[axis]
    around = [0, 0] * (values.ndim - 1 - axis) + [reach + 1, reach]
    total = F.pad(values, around).cumsum(axis, dtype=dtype)
    return total.narrow(axis, 2 * reach + 1, length) - total.narrow(axis, 0, length)


def edge_distances(predicted: Any, true: Any, spacing: Any) -> tuple[Any, Any]:
    """Distance of each edge pixel of one mask to the nearest edge pixel of the other, both ways.

    An edge pixel is one of the mask's with a neighbour outside, diagonals apart; the picture's rim counts as outside.

    Args:
        predicted: bool array, *spatial, not empty.
        true: the same.
        spacing: size of a pixel along each axis, or None for 1.

    Returns:
        Two float64 arrays: from the prediction's edge to the truth's, and back.

    Raises:
        ImportError: without scipy.
    """
    ndimage = needed("scipy.ndimage", "a distance between edges", "metrics")
    box = ndimage.find_objects((predicted | true).view("uint8"))[0]  # outside of it there is nothing to find
    edges = [mask & ~ndimage.binary_erosion(mask) for mask in (predicted[box], true[box])]
    to_predicted, to_true = (ndimage.distance_transform_edt(~edge, sampling=spacing) for edge in edges)
    return to_true[edges[0]], to_predicted[edges[1]]
