"""Pixels counted, and the scores that the counts give."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .boundary import inner_band
from .targets import Reading


class Cells(NamedTuple):
    """Pixels of each class against the rest, int64 (..., C)."""

    tp: Tensor
    fp: Tensor
    fn: Tensor
    tn: Tensor


def confusion(reading: Reading, threshold: float) -> Tensor:
    """Pixels of each picture by (true, predicted) class, int64 (N, C, C); (N, C, 2, 2) for sigmoids."""
    predicted, true = reading.decisions(threshold)
    if reading.sigmoid:
        return _confusion_of_masks(reading, predicted, true)
    n, channels = reading.logits.shape[:2]
    cell = (true * channels + predicted).flatten(1)
    ones = cell.new_ones(1).expand_as(cell) if reading.valid is None else reading.valid.flatten(1).long()
    return off_mps(cell.new_zeros(n, channels**2).scatter_add_(1, cell, ones).view(n, channels, channels))


def one_against_rest(table: Tensor, sigmoid: bool) -> Cells:
    """Cells of a confusion table, (..., C, C), or (..., C, 2, 2) for sigmoids."""
    if sigmoid:
        tn, fp, fn, tp = table.flatten(-2).unbind(-1)
        return Cells(tp, fp, fn, tn)
    tp = table.diagonal(dim1=-2, dim2=-1)
    fp, fn = table.sum(-2) - tp, table.sum(-1) - tp
    return Cells(tp, fp, fn, table.sum((-2, -1)).unsqueeze(-1) - tp - fp - fn)


def pixel_cells(reading: Reading, threshold: float) -> Cells:
    """Cells of each picture, (N, C)."""
    return one_against_rest(confusion(reading, threshold), reading.sigmoid)


def band_cells(reading: Reading, threshold: float, *, width: int) -> Cells:
    """Cells of the masks' inner bands, (N, C)."""
    predicted, true = (inner_band(mask, width) for mask in reading.masks(threshold))
    return one_against_rest(_confusion_of_masks(reading, predicted, true), sigmoid=True)


def _confusion_of_masks(reading: Reading, predicted: Tensor, true: Tensor) -> Tensor:
    """Pixels by truth and prediction, int64 (N, C, 2, 2), of masks that are bool (N, C, *spatial) and false where ignored."""
    pixels = math.prod(reading.logits.shape[2:]) if reading.valid is None else count(reading.valid)
    tp, p, t = count(predicted & true), count(predicted), count(true)
    return off_mps(torch.stack([pixels - p - t + tp, p - tp, t - tp, tp], dim=-1).view(*tp.shape, 2, 2))


def count(mask: Tensor) -> Tensor:
    """Number of set pixels, int64 (N, C); summed in bytes first, which a CPU does ten times as fast as bools."""
    flat = mask.flatten(2)
    blocks = F.pad(flat, (0, -flat.shape[-1] % 128)).view(torch.uint8).reshape(*flat.shape[:2], -1, 128)
    return blocks.sum(-1, dtype=torch.uint8).sum(-1)


def off_mps(x: Tensor) -> Tensor:
    """The tensor, on the CPU if it is on MPS, which has no float64 to divide in."""
    return x.cpu() if x.device.type == "mps" else x


def _divide(numerator: Tensor, denominator: Tensor, cells: Cells, empty: float) -> Tensor:
    """The quotient in float64 under the rule for empty masks; nan where no pixel counts at all."""
    absent = cells.tp + cells.fp + cells.fn == 0
    score = (numerator.double() / denominator).nan_to_num(0.0)
    return score.masked_fill(absent, empty).masked_fill(absent & (cells.tn == 0), math.nan)


def dice(cells: Cells, empty: float) -> Tensor:
    """2 TP / (2 TP + FP + FN)."""
    return _divide(2 * cells.tp, 2 * cells.tp + cells.fp + cells.fn, cells, empty)


def fbeta(cells: Cells, empty: float, *, beta: float) -> Tensor:
    """(1 + beta^2) TP / ((1 + beta^2) TP + beta^2 FN + FP)."""
    hits = (1 + beta**2) * cells.tp.double()
    return _divide(hits, hits + beta**2 * cells.fn.double() + cells.fp, cells, empty)


def iou(cells: Cells, empty: float) -> Tensor:
    """TP / (TP + FP + FN)."""
    return _divide(cells.tp, cells.tp + cells.fp + cells.fn, cells, empty)


def precision(cells: Cells, empty: float) -> Tensor:
    """TP / (TP + FP)."""
    return _divide(cells.tp, cells.tp + cells.fp, cells, empty)


def recall(cells: Cells, empty: float) -> Tensor:
    """TP / (TP + FN)."""
    return _divide(cells.tp, cells.tp + cells.fn, cells, empty)


def specificity(cells: Cells, empty: float) -> Tensor:
    """TN / (TN + FP): the recall of all that is outside the class."""
    return recall(Cells(tp=cells.tn, fp=cells.fn, fn=cells.fp, tn=cells.tp), empty)


SCORES: dict[str, Callable[[Cells, float], Tensor]] = {
    "dice": dice,
    "iou": iou,
    "precision": precision,
    "recall": recall,
    "specificity": specificity,
}
