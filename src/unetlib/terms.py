"""What the losses are made of: terms for pixels and for regions, and how they are reduced."""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .arguments import at_least
from .boundary import window_sums
from .gradients import EPS, RegionSums
from .targets import Reading, require


def cross_entropy(
    reading: Reading, weight: Tensor | None = None, pos_weight: Tensor | None = None, label_smoothing: float = 0.0
) -> Tensor:
    """Weighted cross-entropy of every pixel: (N, *spatial) for a softmax, (N, C, *spatial) for sigmoids."""
    target = reading.target
    weight = _per_class("weight", weight, reading, column=reading.sigmoid)
    pos_weight = _per_class("pos_weight", pos_weight, reading, column=reading.sigmoid)
    at_least("label_smoothing", label_smoothing, 0, 1)
    if reading.sigmoid:
        if label_smoothing:
            target = target * (1 - label_smoothing) + label_smoothing / 2
        return F.binary_cross_entropy_with_logits(reading.logits, target, weight, pos_weight=pos_weight, reduction="none")
    if pos_weight is not None:
        raise ValueError("pos_weight belongs to sigmoids; for a softmax use weight=, a factor for each class")
    return F.cross_entropy(reading.logits, target, weight, label_smoothing=label_smoothing, reduction="none")


def pixel_weight(reading: Reading, weight: Tensor | None) -> Tensor | None:
    """The class weight at each pixel: of its class for a softmax, of its channel for sigmoids."""
    weight = _per_class("weight", weight, reading, column=not reading.has_indices())
    if weight is None:
        return None
    if reading.has_indices():
        return weight[reading.target]
    return weight if reading.sigmoid else (reading.target * weight).sum(1)


def reduce_pixels(pixels: Tensor, reading: Reading, weight: Tensor | None, reduction: str) -> Tensor:
    """Reduce terms that hold their weight already; the mean divides by the weights of the pixels that count."""
    if reading.valid is not None:
        valid = reading.valid if reading.sigmoid else reading.valid.squeeze(1)
        pixels = pixels.masked_fill(~valid, 0)
        weight = valid.to(pixels.dtype) if weight is None else weight * valid
    if weight is None or reduction != "mean":
        return _reduce(pixels, reduction)
    total = weight.expand_as(pixels).sum()
    return pixels.sum() / torch.where(total > 0, total, torch.inf)  # 0 where nothing counts


def sums(
    reading: Reading, batch: bool, *, p: Tensor | None = None, weight: Tensor | None = None, squared: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """TP, P and T of each picture and class, (N, C), or (C,) of the whole batch.

    Args:
        reading: logits and mask.
        batch: pool over the pictures.
        p: what to sum in place of the probabilities.
        weight: factor for each pixel, (N, 1, *spatial).
        squared: sum p^2 and t^2 for P and T.
    """
    p = reading.probabilities() if p is None else p
    mask = reading.target
    if weight is not None and not reading.has_indices():
        mask = mask * weight
    if reading.valid is not None:  # the mask is 0 there already
        weight = reading.valid.to(p.dtype) if weight is None else weight * reading.valid
    tp, pred, true = RegionSums.apply(p, mask, weight)
    if squared:
        pred = (p * p if weight is None else p * p * weight).sum(reading.spatial)
        if not reading.has_indices():  # t^2 is t for the others
            true = (mask * reading.target).sum(reading.spatial)
    return (tp.sum(0), pred.sum(0), true.sum(0)) if batch else (tp, pred, true)


def rare_sums(reading: Reading, batch: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | int]:
    """TP, P and T as `sums` gives them, and the number of pixels (at least 1).

    For a class that fills more than half of the pixels they are those of its complement: for the few pixels outside it, the
    difference of two large sums would have few digits.
    """
    p = reading.probabilities()
    tp, pred, true = sums(reading, batch, p=p)
    with torch.no_grad():
        fn, rest, _ = sums(reading, batch, p=1 - p)
    fn, rest = fn + (tp.detach() - tp), rest + (pred.detach() - pred)  # adds 0, and the derivatives without a pass
    pixels: Tensor | int = p.numel() // pred.numel()
    if reading.valid is not None:
        pixels = reading.valid.sum([0, *reading.spatial] if batch else reading.spatial).clamp_min(1).to(p.dtype)
    most = true > pixels / 2
    tp, pred = torch.where(most, rest - fn, tp), torch.where(most, rest, pred)
    return tp, pred, torch.where(most, pixels - true, true), pixels


def ratio(numerator: Tensor, denominator: Tensor, smooth: float, empty: float = 1.0) -> Tensor:
    """(numerator + smooth) / (denominator + smooth), or `empty` for 0 / 0; of finite numbers finite in value and gradient."""
    at_least("smooth", smooth, 0)
    if smooth > EPS:
        return (numerator + smooth) / (denominator + smooth)
    nothing = denominator <= EPS  # not where it is NaN, which the loss has to show
    return torch.where(nothing, empty, numerator / torch.where(nothing, 1, denominator))


def reduce_regions(
    score: Tensor, reading: Reading, weight: Tensor | None = None, reduction: str = "mean", *, log: bool = False
) -> Tensor:
    """Turn scores into losses, 1 - score or -log(score), and reduce them; `weight` fits scores of (N, C) or (C,)."""
    terms = -score.clamp_min(EPS).log() if log else 1 - score
    weight = _per_class("weight", weight, reading)
    if weight is None:
        return _reduce(terms, reduction)
    terms = terms * weight
    return terms.sum() / weight.expand_as(terms).sum() if reduction == "mean" else _reduce(terms, reduction)


def border_map(reading: Reading, size: int) -> Tensor:
    """Pixels, bool (N, 1, *spatial), with between 1% and 99% of some class in the window of that side around them.

    Of a window only the pixels that count are looked at; one without such pixels is no border.
    """
    mask = reading.one_hot().to(reading.logits.dtype)
    pixels = mask.new_ones(1)
    if reading.valid is not None:
        pixels = reading.valid.to(mask.dtype)
        mask = mask * pixels
    for axis in range(2, mask.ndim):  # the sum over a window is the sum along each axis in turn
        mask = window_sums(mask, size // 2, axis)
        if reading.valid is not None:
            pixels = window_sums(pixels, size // 2, axis)
        else:  # as many as the window's sides have within the picture
            line = mask.new_ones([side if other == axis else 1 for other, side in enumerate(mask.shape)])
            pixels = pixels * window_sums(line, size // 2, axis)
    share = mask / pixels  # 0 / 0 is nan, which is neither above nor below a number
    return ((share > 0.01) & (share < 0.99)).any(dim=1, keepdim=True)


def soft_skeleton(image: Tensor, iterations: int) -> Tensor:
    """Skeleton of a grey image (N, C, *spatial): what an opening removes, gathered over repeated erosions."""
    axes = image.ndim - 2
    pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[axes - 1]
    windows = [[3 if other == axis else 1 for other in range(axes)] for axis in range(axes)]
    skeleton = torch.zeros_like(image)
    for _ in range(iterations + 1):
        lines = (pool(-image, window, stride=1, padding=[side // 2 for side in window]) for window in windows)
        eroded = -reduce(torch.maximum, lines)
        residue = (image - pool(eroded, 3, stride=1, padding=1)).relu()
        skeleton = skeleton + (residue - skeleton * residue).relu()
        image = eroded
    return skeleton


def as_factors(name: str, value: Any, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """Read factors, a tensor, which stays on its device, or numbers."""
    try:
        return torch.as_tensor(value, dtype=dtype, device=None if isinstance(value, Tensor) else device)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must hold a factor for each class, such as [1.0, 2.0], got {value!r} ({error})") from error


def _per_class(name: str, value: Tensor | None, reading: Reading, *, column: bool = False) -> Tensor | None:
    """Check factors of the classes, (C,); as a column, (C, 1, ...), they multiply (N, C, *spatial)."""
    if value is None:
        return None
    channels, device = reading.logits.shape[1], reading.logits.device
    value = as_factors(name, value, reading.logits.dtype, device)
    if tuple(value.shape) != (channels,):
        raise ValueError(f"{name} must hold a factor for each channel, shape ({channels},), got {tuple(value.shape)}")
    if value.device != device:
        raise ValueError(f"{name} is on {value.device}, logits on {device}; use {name}.to(logits.device)")
    low, high = value.detach().aminmax()  # one NaN makes both NaN
    require(
        name,
        (low >= 0) & (high > 0) & (high < torch.inf),
        "finite factors of 0 or more, and one above 0",
        lambda: high if low >= 0 else low,
        "a class that weighs nothing has 0; leave the factors out where all weigh the same",
    )
    return value.view(-1, *[1] * len(reading.spatial)) if column else value


def _reduce(terms: Tensor, reduction: str) -> Tensor:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    if reduction == "none":
        return terms
    return terms.sum() / (terms.numel() if reduction == "mean" else 1)  # mean()'s own derivative fills a tensor
