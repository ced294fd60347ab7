"""Losses for segmentation: each a pure function, and a thin module with the same keywords.

Losses take **logits**, never probabilities; the two cannot be told apart, so nothing warns. [`unetlib.targets`][] says what
logits and masks look like. Everything is computed in float32, whatever type the logits have and whatever autocast does
(float64 stays float64). The common keywords mean the same everywhere:

- ``smooth``: imaginary pixels, all of them right, added to the sums of each class. They make Dice and Jaccard of a class
  that is absent from the picture smooth / (P + smooth) for P predicted pixels: 1 when nothing is predicted, falling with
  every false positive. With 0, absent from both scores 1, and false positives alone score 0, without a gradient.
- ``batch``: pool the sums over the batch, instead of a score for each picture.
- ``weight``: a factor for each class, shape (C,); the mean is then the weighted mean.
- ``ignore_index``: the mask value whose pixels count for nothing; their logits, if finite, get a gradient of exactly zero.
  Unless the mask holds class indices, it lies outside 0 to 1.
- ``multilabel``: one sigmoid a channel instead of one softmax.
- ``reduction``: ``"mean"``, ``"sum"`` or ``"none"``. A loss on pixels has the terms (N, *spatial) for a softmax and
  (N, C, *spatial) for sigmoids, and its mean is over the pixels that count. A loss on regions has a term for each
  picture and class, (N, C), or (C,) with ``batch=True``.

In the formulas TP, P and T are sums over the pixels of a class: of p t, of p and of t, for probability p and mask t.
Masks get no gradient.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, SupportsFloat

import torch
from torch import Tensor, nn

from .arguments import at_least, check_options, whole
from .gradients import EPS, Focal, Lovasz
from .targets import read
from .terms import (
    as_factors,
    border_map,
    cross_entropy,
    pixel_weight,
    rare_sums,
    ratio,
    reduce_pixels,
    reduce_regions,
    soft_skeleton,
    sums,
)


def cross_entropy_loss(
    logits: Tensor,
    target: Tensor,
    *,
    pos_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
    ignore_index: int | None = None,
    multilabel: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy, -sum_c t_c log p_c; for a sigmoid the binary one, -t log p - (1 - t) log(1 - p).

    Args:
        logits: (N, C, *spatial).
        target: a mask, (N, *spatial) or (N, 1 or C, *spatial): class indices or values from 0 to 1; see [`unetlib.targets`][].
        pos_weight: factor on the t log p of a sigmoid, shape (C,); above 1 it favours recall.
        label_smoothing: the share of each mask value that is spread evenly over the outcomes.
        weight: a factor for each class, (C,).
        ignore_index: the mask value whose pixels count for nothing.
        multilabel: one sigmoid a channel instead of one softmax.
        reduction: "mean", "sum" or "none".

    Returns:
        The loss in float32 (float64 of float64 logits): a number, or with ``reduction="none"`` its terms.

    Raises:
        TypeError: for logits or a mask of the wrong type, an unknown keyword, or one that is no integer where it should be.
        ValueError: for logits and a mask that do not fit each other, a mask value without a class, or a keyword out of range.

    Example:
        >>> cross_entropy_loss(torch.zeros(1, 1, 2), torch.tensor([[0, 1]]))
        tensor(0.6931)
        >>> cross_entropy_loss(torch.zeros(1, 3, 2), torch.tensor([[2, 255]]), ignore_index=255, reduction="none")
        tensor([[1.0986, 0.0000]])
    """
    reading = read(logits, target, multilabel=multilabel, ignore_index=ignore_index, soft=True)
    pixels = cross_entropy(reading, weight, pos_weight, label_smoothing)
    return reduce_pixels(pixels, reading, pixel_weight(reading, weight), reduction)


def focal_loss(
    logits: Tensor,
    target: Tensor,
    *,
    gamma: float = 2.0,
    alpha: float | None = None,
    weight: Tensor | None = None,
    ignore_index: int | None = None,
    multilabel: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """Focal loss, (1 - e^-CE)^gamma CE, for the cross-entropy CE of a pixel; e^-CE is the true class's probability.

    From Lin et al., "Focal loss for dense object detection", 2017.

    Args:
        logits: (N, C, *spatial).
        target: a mask, (N, *spatial) or (N, 1 or C, *spatial): class indices or values from 0 to 1; see [`unetlib.targets`][].
        gamma: how much well classified pixels are played down; 0 is cross-entropy.
        alpha: for sigmoids: factor on the positive pixels, 1 - alpha on the others. For a softmax use ``weight``.
        weight: a factor for each class, (C,).
        ignore_index: the mask value whose pixels count for nothing.
        multilabel: one sigmoid a channel instead of one softmax.
        reduction: "mean", "sum" or "none".

    Returns:
        The loss in float32 (float64 of float64 logits): a number, or with ``reduction="none"`` its terms.

    Raises:
        TypeError: for logits or a mask of the wrong type, an unknown keyword, or one that is no integer where it should be.
        ValueError: for logits and a mask that do not fit each other, a mask value without a class, or a keyword out of range.

    Example:
        >>> focal_loss(torch.zeros(1, 1, 2), torch.tensor([[0, 1]]))
        tensor(0.1733)
    """
    reading = read(logits, target, multilabel=multilabel, ignore_index=ignore_index, soft=True)
    at_least("gamma", gamma, 0)
    pixels = Focal.apply(cross_entropy(reading), gamma)[0]
    if alpha is not None:
        at_least("alpha", alpha, 0, 1)
        if not reading.sigmoid:
            raise ValueError(f"alpha={alpha} weighs the two outcomes of a sigmoid; for a softmax use weight=")
        pixels = pixels * (alpha * reading.target + (1 - alpha) * (1 - reading.target))
    factor = pixel_weight(reading, weight)
    return reduce_pixels(pixels if factor is None else pixels * factor, reading, factor, reduction)


def dice_loss(
    logits: Tensor,
    target: Tensor,
    *,
    squared: bool = False,
    log: bool = False,
    smooth: float = 1.0,
    batch: bool = False,
    weight: Tensor | None = None,
    ignore_index: int | None = None,
    multilabel: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """Soft Dice loss, 1 - (2 TP + smooth) / (P + T + smooth).

    Args:
        logits: (N, C, *spatial).
        target: a mask, (N, *spatial) or (N, 1 or C, *spatial): class indices or values from 0 to 1; see [`unetlib.targets`][].
        squared: sum p^2 and t^2 in the denominator (Milletari et al., "V-Net", 2016).
        log: -log(score) in place of 1 - score.
        smooth: imaginary right pixels added to the sums of each class.
        batch: pool the sums over the batch, instead of a score for each picture.
        weight: a factor for each class, (C,).
        ignore_index: the mask value whose pixels count for nothing.
        multilabel: one sigmoid a channel instead of one softmax.
        reduction: "mean", "sum" or "none".

    Returns:
        The loss in float32 (float64 of float64 logits): a number, or with ``reduction="none"`` its terms.

    Raises:
        TypeError: for logits or a mask of the wrong type, an unknown keyword, or one that is no integer where it should be.
        ValueError: for logits and a mask that do not fit each other, a mask value without a class, or a keyword out of range.

    Example:
        >>> dice_loss(torch.tensor([[[9.0, -9.0, 0.0]]]), torch.tensor([[1, 0, 1]]), smooth=0)
        tensor(0.1429)
    """
    reading = read(logits, target, multilabel=multilabel, ignore_index=ignore_index, soft=True)
    tp, p, t = sums(reading, batch, squared=squared)
    return reduce_regions(ratio(2 * tp, p + t, smooth), reading, weight, reduction, log=log)


def jaccard_loss(
    logits: Tensor,
    target: Tensor,
    *,
    log: bool = False,
    smooth: float = 1.0,
    batch: bool = False,
    weight: Tensor | None = None,
    ignore_index: int | None = None,
    multilabel: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """Soft Jaccard (IoU) loss, 1 - (TP + smooth) / (P + T - TP + smooth).

    Args:
        logits: (N, C, *spatial).
        target: a mask, (N, *spatial) or (N, 1 or C, *spatial): class indices or values from 0 to 1; see [`unetlib.targets`][].
        log: -log(score) in place of 1 - score.
        smooth: imaginary right pixels added to the sums of each class.
        batch: pool the sums over the batch, instead of a score for each picture.
        weight: a factor for each class, (C,).
        ignore_index: the mask value whose pixels count for nothing.
        multilabel: one sigmoid a channel instead of one softmax.
        reduction: "mean", "sum" or "none".

    Returns:
        The loss in float32 (float64 of float64 logits): a number, or with ``reduction="none"`` its terms.

    Raises:
        TypeError: for logits or a mask of the wrong type, an unknown keyword, or one that is no integer where it should be.
        ValueError: for logits and a mask that do not fit each other, a mask value without a class, or a keyword out of range.

    Example:
        >>> jaccard_loss(torch.tensor([[[9.0, -9.0, 0.0]]]), torch.tensor([[1, 0, 1]]), smooth=0)
        tensor(0.2501)
    """
    reading = read(logits, target, multilabel=multilabel, ignore_index=ignore_index, soft=True)
    tp, p, t = sums(reading, batch)
    return reduce_regions(ratio(tp, p + t - tp, smooth), reading, weight, reduction, log=log)


def tversky_loss(
    logits: Tensor,
    target: Tensor,
    *,
    alpha: float = 0.5,
    beta: float = 0.5,
    gamma: float = 1.0,
    smooth: float = 1.0,
    batch: bool = False,
    weight: Tensor | None = None,
    ignore_index: int | None = None,
    multilabel: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """Tversky loss, (1 - (TP + smooth) / (TP + alpha (P - TP) + beta (T - TP) + smooth))^gamma.

    From Salehi et al., 2017; with ``gamma`` the focal Tversky loss of Abraham and Khan, 2019 (who write 1/gamma).
    ``alpha=beta=1`` is Jaccard; ``alpha=beta=0.5`` is Dice, with a smooth of twice the size there.

    Args:
        logits: (N, C, *spatial).
        target: a mask, (N, *spatial) or (N, 1 or C, *spatial): class indices or values from 0 to 1; see [`unetlib.targets`][].
        alpha: weight of false positives.
        beta: weight of false negatives; above `alpha` it favours recall.
        gamma: exponent; below 1 it raises the gradient of classes that are nearly right.
        smooth: imaginary right pixels added to the sums of each class.
        batch: pool the sums over the batch, instead of a score for each picture.
        weight: a factor for each class, (C,).
        ignore_index: the mask value whose pixels count for nothing.
        multilabel: one sigmoid a channel instead of one softmax.
        reduction: "mean", "sum" or "none".

    Returns:
        The loss in float32 (float64 of float64 logits): a number, or with ``reduction="none"`` its terms.

    Raises:
        TypeError: for logits or a mask of the wrong type, an unknown keyword, or one that is no integer where it should be.
        ValueError: for logits and a mask that do not fit each other, a mask value without a class, or a keyword out of range.

    Example:
        >>> tversky_loss(torch.tensor([[[9.0, -9.0, 0.0]]]), torch.tensor([[1, 0, 1]]), alpha=1, beta=1, smooth=0)
        tensor(0.2501)
    """
    reading = read(logits, target, multilabel=multilabel, ignore_index=ignore_index, soft=True)
    for name, value in (("alpha", alpha), ("beta", beta), ("gamma", gamma)):
        at_least(name, value, 0)
    tp, p, t = sums(reading, batch)
    score = ratio(tp, tp + alpha * (p - tp) + beta * (t - tp), smooth)
    if gamma != 1:
        wrong = 1 - score
        score = 1 - (wrong.clamp_min(EPS) ** gamma).masked_fill(wrong <= EPS, 0)
    return reduce_regions(score, reading, weight, reduction)


def generalized_dice_loss(
    logits: Tensor,
    target: Tensor,
    *,
    smooth: float = 1.0,
    batch: bool = False,
    ignore_index: int | None = None,
    multilabel: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """Generalized Dice loss, 1 - (2 sum_c w_c TP_c + smooth) / (sum_c w_c (P_c + T_c) + smooth), w_c = 1 / T_c^2.

    From Sudre et al., 2017. The weights are taken relative to the rarest class of the picture, which keeps ``smooth``
    in pixels; a class absent from the picture weighs as much as the rarest, so that its false positives are not free.

    Args:
        logits: (N, C, *spatial).
        target: a mask, (N, *spatial) or (N, 1 or C, *spatial): class indices or values from 0 to 1; see [`unetlib.targets`][].
        smooth: imaginary right pixels added to the sums of each class.
        batch: pool the sums over the batch, instead of a score for each picture.
        ignore_index: the mask value whose pixels count for nothing.
        multilabel: one sigmoid a channel instead of one softmax.
        reduction: "mean", "sum" or "none": a term for each picture, (N,), or one in all with ``batch=True``.

    Returns:
        The loss in float32 (float64 of float64 logits): a number, or with ``reduction="none"`` its terms.

    Raises:
        TypeError: for logits or a mask of the wrong type, an unknown keyword, or one that is no integer where it should be.
        ValueError: for logits and a mask that do not fit each other, a mask value without a class, or a keyword out of range.

    Example:
        >>> generalized_dice_loss(torch.zeros(1, 2, 4), torch.tensor([[0, 0, 0, 1]]), smooth=0)
        tensor(0.6250)
    """
    reading = read(logits, target, multilabel=multilabel, ignore_index=ignore_index, soft=True)
    tp, p, t = sums(reading, batch)
    rarest = torch.where(t > 0, t, torch.inf).amin(dim=-1, keepdim=True)
    w = torch.where(t > 0, rarest / t.clamp_min(EPS), 1) ** 2
    score = ratio(2 * (w * tp).sum(-1), (w * (p + t)).sum(-1), smooth)
    return reduce_regions(score, reading, None, reduction)


def mcc_loss(
    logits: Tensor,
    target: Tensor,
    *,
    smooth: float = 1.0,
    batch: bool = False,
    weight: Tensor | None = None,
    ignore_index: int | None = None,
    multilabel: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """1 - Matthews' correlation coefficient, (TP TN - FP FN) / sqrt((TP + FP) (TP + FN) (TN + FP) (TN + FN)).

    From Abhishek and Hamarneh, 2021. ``smooth`` pixels are added to TP and to TN, so that the coefficient is defined,
    and false positives cost, when a class fills nothing or everything of a picture; with 0 its loss is then 1,
    without a gradient.

    Args:
        logits: (N, C, *spatial).
        target: a mask, (N, *spatial) or (N, 1 or C, *spatial): class indices or values from 0 to 1; see [`unetlib.targets`][].
        smooth: imaginary right pixels added to the sums of each class.
        batch: pool the sums over the batch, instead of a score for each picture.
        weight: a factor for each class, (C,).
        ignore_index: the mask value whose pixels count for nothing.
        multilabel: one sigmoid a channel instead of one softmax.
        reduction: "mean", "sum" or "none".

    Returns:
        The loss in float32 (float64 of float64 logits): a number, or with ``reduction="none"`` its terms.

    Raises:
        TypeError: for logits or a mask of the wrong type, an unknown keyword, or one that is no integer where it should be.
        ValueError: for logits and a mask that do not fit each other, a mask value without a class, or a keyword out of range.

    Example:
        >>> mcc_loss(torch.tensor([[[9.0, -9.0, -9.0, 9.0]]]), torch.tensor([[1, 0, 1, 0]]), smooth=0)
        tensor(1.)
    """
    reading = read(logits, target, multilabel=multilabel, ignore_index=ignore_index, soft=True)
    at_least("smooth", smooth, 0)
    *counts, pixels = rare_sums(reading, batch)  # MCC is the same for a class and for all outside it
    total = pixels + 2 * smooth
    tp, p, t = ((count + smooth) / total for count in counts)  # shares keep the products within float32, and MCC the same
    variance = p * (1 - p) * t * (1 - t)
    undefined = variance <= 1e-30  # not where it is NaN, which the loss has to show
    score = torch.where(undefined, 0, (tp - p * t) / torch.where(undefined, 1, variance).sqrt())
    return reduce_regions(score, reading, weight, reduction)


def lovasz_loss(
    logits: Tensor,
    target: Tensor,
    *,
    batch: bool = False,
    weight: Tensor | None = None,
    ignore_index: int | None = None,
    multilabel: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """Lovász loss, the convex surrogate of the Jaccard index: hinge for sigmoids, softmax for classes.

    From Berman et al., 2018. A class absent from the picture stays in the mean, with its largest error as its term
    (the paper's code leaves it out, which makes its false positives free). Soft masks are cut at 0.5, class
    probabilities at their largest class.

    Args:
        logits: (N, C, *spatial).
        target: a mask, (N, *spatial) or (N, 1 or C, *spatial): class indices or values from 0 to 1; see [`unetlib.targets`][].
        batch: pool the sums over the batch, instead of a score for each picture.
        weight: a factor for each class, (C,).
        ignore_index: the mask value whose pixels count for nothing.
        multilabel: one sigmoid a channel instead of one softmax.
        reduction: "mean", "sum" or "none".

    Returns:
        The loss in float32 (float64 of float64 logits): a number, or with ``reduction="none"`` its terms.

    Raises:
        TypeError: for logits or a mask of the wrong type, an unknown keyword, or one that is no integer where it should be.
        ValueError: for logits and a mask that do not fit each other, a mask value without a class, or a keyword out of range.

    Example:
        >>> lovasz_loss(torch.tensor([[[2.0, -2.0, 0.0]]]), torch.tensor([[1, 0, 1]]))
        tensor(0.5000)
    """
    reading = read(logits, target, multilabel=multilabel, ignore_index=ignore_index)

    def rows(value: Tensor) -> Tensor:
        """Pixels of each picture and class in a row; with ``batch``, of each class."""
        return value.transpose(0, 1).flatten(1) if batch else value.flatten(2)

    predicted = reading.logits if reading.sigmoid else reading.probabilities()
    mask = reading.cut().one_hot()
    valid = None if reading.valid is None else rows(reading.valid.expand_as(mask))
    score = 1 - Lovasz.apply(rows(predicted), rows(mask), valid, reading.sigmoid)[0]
    return reduce_regions(score, reading, weight, reduction)


def soft_cldice_loss(
    logits: Tensor,
    target: Tensor,
    *,
    iterations: int = 3,
    smooth: float = 1.0,
    batch: bool = False,
    weight: Tensor | None = None,
    ignore_index: int | None = None,
    multilabel: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """Soft clDice loss for thin structures: Dice between each mask's skeleton and the other mask.

    1 - 2 A B / (A + B), with A the share of the predicted skeleton that lies in the mask, B the share of the mask's
    skeleton that is predicted. From Shit et al., "clDice", 2021, who add it to Dice: ``DiceLoss() + SoftCLDiceLoss()``.

    Args:
        logits: (N, C, *spatial).
        target: a mask, (N, *spatial) or (N, 1 or C, *spatial): class indices or values from 0 to 1; see [`unetlib.targets`][].
        iterations: erosions of the skeleton; at least half the width of the thickest structure in pixels.
        smooth: imaginary right pixels added to the sums of each class.
        batch: pool the sums over the batch, instead of a score for each picture.
        weight: a factor for each class, (C,).
        ignore_index: the mask value whose pixels count for nothing.
        multilabel: one sigmoid a channel instead of one softmax.
        reduction: "mean", "sum" or "none".

    Returns:
        The loss in float32 (float64 of float64 logits): a number, or with ``reduction="none"`` its terms.

    Raises:
        TypeError: for logits or a mask of the wrong type, an unknown keyword, or one that is no integer where it should be.
        ValueError: for logits and a mask that do not fit each other, a mask value without a class, or a keyword out of range.

    Example:
        >>> line = torch.zeros(1, 5, 5)
        >>> line[:, 2] = 1
        >>> soft_cldice_loss(20 * line[:, None] - 10, line).round(decimals=3)
        tensor(0.)
    """
    reading = read(logits, target, multilabel=multilabel, ignore_index=ignore_index, soft=True)
    iterations = whole("iterations", iterations, 0)
    p, t = reading.probabilities(), reading.one_hot().to(reading.logits.dtype)
    if reading.valid is not None:
        p, t = p * reading.valid, t * reading.valid
    dims = [0, *reading.spatial] if batch else reading.spatial
    skeleton_p, skeleton_t = soft_skeleton(p, iterations), soft_skeleton(t, iterations)
    precision = ratio((skeleton_p * t).sum(dims), skeleton_p.sum(dims), smooth)
    recall = ratio((skeleton_t * p).sum(dims), skeleton_t.sum(dims), smooth)
    score = ratio(2 * precision * recall, precision + recall, 0.0, empty=0.0)
    return reduce_regions(score, reading, weight, reduction)


def bce_dice_loss(
    logits: Tensor,
    target: Tensor,
    *,
    border_weight: float = 1.0,
    border_size: int = 41,
    smooth: float = 1.0,
    batch: bool = False,
    ignore_index: int | None = None,
    multilabel: bool = False,
) -> Tensor:
    """Cross-entropy (binary for sigmoids) plus Dice, both with more weight on the pixels at mask borders.

    The loss of the Carvana challenge's winners, who took 3 and a window of 41 at 1024 x 1024. A pixel is at the border
    where a class fills between 1% and 99% of the pixels that count in the window around it. The weights make a weighted
    mean of the cross-entropy, and multiply each pixel's share of Dice's sums.

    Args:
        logits: (N, C, *spatial).
        target: a mask, (N, *spatial) or (N, 1 or C, *spatial): class indices or values from 0 to 1; see [`unetlib.targets`][].
        border_weight: weight of the pixels at a border; the others weigh 1.
        border_size: side of the window in pixels, odd.
        smooth: imaginary right pixels added to the sums of each class.
        batch: pool the sums over the batch, instead of a score for each picture.
        ignore_index: the mask value whose pixels count for nothing.
        multilabel: one sigmoid a channel instead of one softmax.

    Returns:
        The loss in float32 (float64 of float64 logits): a number.

    Raises:
        TypeError: for logits or a mask of the wrong type, an unknown keyword, or one that is no integer where it should be.
        ValueError: for logits and a mask that do not fit each other, a mask value without a class, or a keyword out of range.

    Example:
        >>> mask = torch.tensor([[[0, 0, 0, 1, 1, 1]]])
        >>> bce_dice_loss(torch.zeros(1, 1, 1, 6), mask, smooth=0, border_weight=3, border_size=3)
        tensor(1.1931)
    """
    reading = read(logits, target, multilabel=multilabel, ignore_index=ignore_index, soft=True)
    at_least("border_weight", border_weight, 0)
    if whole("border_size", border_size, 1) % 2 == 0:
        raise ValueError(f"border_size={border_size} must be odd, such as border_size={border_size + 1}")
    pixels = cross_entropy(reading)
    weight = factor = None
    if border_weight != 1:
        weight = torch.where(border_map(reading, border_size), border_weight, 1.0).to(pixels.dtype)  # (N, 1, *spatial)
        factor = weight if reading.sigmoid else weight.squeeze(1)
        pixels = pixels * factor
    entropy = reduce_pixels(pixels, reading, factor, "mean")
    del pixels  # frees its memory before Dice takes some
    tp, p, t = sums(reading, batch, weight=weight)
    return entropy + reduce_regions(ratio(2 * tp, p + t, smooth), reading)


_KEPT = dict.fromkeys(("weight", "pos_weight"), Tensor | Sequence[float] | None)  # as buffers


class Loss(nn.Module):
    """A loss function with its options kept: ``DiceLoss(smooth=0)(x, y)`` is ``dice_loss(x, y, smooth=0)``.

    A subclass names its function, and has that function's keywords. ``weight`` and ``pos_weight``, tensors or lists,
    are buffers and move with the module. Losses scale and add up: ``CrossEntropyLoss() + 0.5 * DiceLoss()``.
    """

    function: ClassVar[Callable[..., Tensor]]
    _keywords: ClassVar[dict[str, inspect.Parameter]] = {}

    def __init_subclass__(cls) -> None:
        """Show the function's keywords as the constructor's, where programs that build objects from files look for them."""
        if "function" not in vars(cls):
            return
        _logits, _target, *keywords = inspect.signature(cls.function).parameters.values()
        keywords = [word.replace(annotation=_KEPT.get(word.name, word.annotation)) for word in keywords]
        cls._keywords = {word.name: word for word in keywords}
        if cls.__init__.__qualname__ != Loss.__init__.__qualname__:  # one with options of its own
            return

        @functools.wraps(Loss.__init__)
        def init(self: Loss, *unnamed: Any, **options: Any) -> None:
            Loss.__init__(self, *unnamed, **options)

        own, *_ = inspect.signature(init).parameters.values()
        init.__signature__ = inspect.Signature([own, *keywords])  # type: ignore[attr-defined]
        init.__annotations__ = {word.name: word.annotation for word in keywords} | {"return": None}
        # Where the names of types are looked up.
        init.__wrapped__, init.__module__ = cls.function, cls.function.__module__  # type: ignore[assignment]
        cls.__init__ = init  # type: ignore[method-assign]

    def __init__(self, *unnamed: Any, **options: Any) -> None:
        """Keep the options.

        Raises:
            TypeError: for a keyword that the function does not have, an option without its keyword, and factors that are no
                numbers.
        """
        super().__init__()
        if unnamed:
            one, names = type(unnamed[0]).__name__, ", ".join(f"{name}=" for name in self._keywords)
            raise TypeError(f"{type(self).__name__} takes keywords alone, got {one}; say which of them it is: {names}")
        check_options(type(self).__name__, options, self._keywords)
        for name in _KEPT:
            if options.get(name) is not None:
                self.register_buffer(name, as_factors(name, options.pop(name), torch.float32))
        self.options = options

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the loss of logits, (N, C, *spatial), and a mask as [`unetlib.targets`][] describes it."""
        return type(self).function(logits, target, **self.options, **dict(self.named_buffers()))

    if TYPE_CHECKING:  # nn.Module's gives Any

        def __call__(self, logits: Tensor, target: Tensor) -> Tensor:
            """The loss: `forward`, and hooks."""

    def extra_repr(self) -> str:
        """Return the options for `repr`."""
        return ", ".join(f"{name}={value}" for name, value in {**self.options, **dict(self.named_buffers())}.items())

    def terms(self) -> list[tuple[float, nn.Module]]:
        """Return the weighted losses that this one sums up: itself, once."""
        return [(1.0, self)]

    def __add__(self, other: nn.Module) -> CompoundLoss:
        """Return the sum of two losses, of which the other may be any module that takes (logits, target)."""
        if not isinstance(other, nn.Module):
            return NotImplemented
        return CompoundLoss(*self.terms(), *(other.terms() if isinstance(other, Loss) else [(1.0, other)]))

    def __radd__(self, other: Any) -> Loss:
        """Return the sum with a module of another kind, or with the 0 that `sum` starts from."""
        return self if other == 0 else self.__add__(other)

    def __rmul__(self, factor: float) -> CompoundLoss:
        """Return the loss times a number."""
        return CompoundLoss(*((factor * inner, loss) for inner, loss in self.terms()))

    __mul__ = __rmul__


class CompoundLoss(Loss):
    """Weighted sum of losses, given as pairs of a factor and any module that takes (logits, target).

    Example:
        >>> loss = CrossEntropyLoss() + 0.5 * DiceLoss(batch=True)  # CompoundLoss((1, ...), (0.5, ...))
        >>> loss(torch.zeros(1, 1, 2), torch.tensor([[0, 1]]))
        tensor(0.8598)
    """

    def __init__(self, *terms: tuple[float, nn.Module]) -> None:
        """Keep the terms.

        Raises:
            TypeError: for a term that is not a pair of a number and a module.
            ValueError: if there are none.
        """
        super().__init__()
        if not terms:
            raise ValueError("CompoundLoss needs at least one (factor, loss), for example (0.5, DiceLoss())")
        for term in terms:
            if not _is_term(term):
                raise TypeError(f"CompoundLoss takes pairs (factor, loss), for example (0.5, DiceLoss()), not {term!r}")
        self.factors = [float(factor) for factor, _ in terms]
        self.losses = nn.ModuleList(loss for _, loss in terms)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the weighted sum."""
        values = [factor * loss(logits, target) for factor, loss in self.terms()]
        if len({value.shape for value in values}) > 1:
            shapes = " and ".join(str(tuple(value.shape)) for value in values)
            raise ValueError(f"the losses have the shapes {shapes}, which do not add up; use reduction='mean' or 'sum' in each")
        return torch.stack(values).sum(0)

    def terms(self) -> list[tuple[float, nn.Module]]:
        """Return the weighted losses."""
        return list(zip(self.factors, self.losses, strict=True))

    def extra_repr(self) -> str:
        """Return the factors for `repr`."""
        return f"factors={self.factors}"


def _is_term(term: Any) -> bool:
    pair = isinstance(term, (tuple, list)) and len(term) == 2
    return pair and isinstance(term[0], SupportsFloat) and isinstance(term[1], nn.Module)


class CrossEntropyLoss(Loss):
    """`cross_entropy_loss` as a module, made of its keywords and called with logits (N, C, *spatial) and a mask.

    Example:
        >>> CrossEntropyLoss(pos_weight=[2.0])(torch.tensor([[[2.0, -1.0, 0.5]]]), torch.tensor([[1, 0, 0]]))
        tensor(0.5137)
    """

    function = staticmethod(cross_entropy_loss)


class FocalLoss(Loss):
    """`focal_loss` as a module, made of its keywords and called with logits (N, C, *spatial) and a mask.

    Example:
        >>> FocalLoss(gamma=3.0)(torch.tensor([[[2.0, -1.0, 0.5]]]), torch.tensor([[1, 0, 0]]))
        tensor(0.0804)
    """

    function = staticmethod(focal_loss)


class DiceLoss(Loss):
    """`dice_loss` as a module, made of its keywords and called with logits (N, C, *spatial) and a mask.

    Example:
        >>> DiceLoss(smooth=0.0)(torch.tensor([[[2.0, -1.0, 0.5]]]), torch.tensor([[1, 0, 0]]))
        tensor(0.3645)
    """

    function = staticmethod(dice_loss)


class JaccardLoss(Loss):
    """`jaccard_loss` as a module, made of its keywords and called with logits (N, C, *spatial) and a mask.

    Example:
        >>> JaccardLoss(log=True)(torch.tensor([[[2.0, -1.0, 0.5]]]), torch.tensor([[1, 0, 0]]))
        tensor(0.4300)
    """

    function = staticmethod(jaccard_loss)


class TverskyLoss(Loss):
    """`tversky_loss` as a module, made of its keywords and called with logits (N, C, *spatial) and a mask.

    Example:
        >>> TverskyLoss(beta=0.7)(torch.tensor([[[2.0, -1.0, 0.5]]]), torch.tensor([[1, 0, 0]]))
        tensor(0.2196)
    """

    function = staticmethod(tversky_loss)


class GeneralizedDiceLoss(Loss):
    """`generalized_dice_loss` as a module, made of its keywords and called with logits (N, C, *spatial) and a mask.

    Example:
        >>> GeneralizedDiceLoss(smooth=0.0)(torch.tensor([[[2.0, -1.0, 0.5]]]), torch.tensor([[1, 0, 0]]))
        tensor(0.3645)
    """

    function = staticmethod(generalized_dice_loss)


class MCCLoss(Loss):
    """`mcc_loss` as a module, made of its keywords and called with logits (N, C, *spatial) and a mask.

    Example:
        >>> MCCLoss(batch=True)(torch.tensor([[[2.0, -1.0, 0.5]]]), torch.tensor([[1, 0, 0]]))
        tensor(0.3660)
    """

    function = staticmethod(mcc_loss)


class LovaszLoss(Loss):
    """`lovasz_loss` as a module, made of its keywords and called with logits (N, C, *spatial) and a mask.

    Example:
        >>> LovaszLoss(batch=True)(torch.tensor([[[2.0, -1.0, 0.5]]]), torch.tensor([[1, 0, 0]]))
        tensor(0.7500)
    """

    function = staticmethod(lovasz_loss)


class SoftCLDiceLoss(Loss):
    """`soft_cldice_loss` as a module, made of its keywords and called with logits (N, C, *spatial) and a mask.

    Example:
        >>> SoftCLDiceLoss(smooth=0.0)(torch.tensor([[[[2.0, -1.0, 0.5]]]]), torch.tensor([[[1, 0, 0]]]))
        tensor(0.2628)
    """

    function = staticmethod(soft_cldice_loss)


class BCEDiceLoss(Loss):
    """`bce_dice_loss` as a module, made of its keywords and called with logits (N, C, *spatial) and a mask.

    Example:
        >>> BCEDiceLoss(border_weight=3.0)(torch.tensor([[[[2.0, -1.0, 0.5]]]]), torch.tensor([[[1, 0, 0]]]))
        tensor(0.7968)
    """

    function = staticmethod(bce_dice_loss)
