"""Metrics for segmentation: functions for one batch, and an accumulator for a data set.

Metrics take **logits**, never probabilities, and the masks that losses take; [`unetlib.targets`][] says what both look
like. Predictions are the largest class of a softmax, or the sigmoids above ``threshold``. Counts are exact integers.

The rule for empty masks: where a class is absent from picture and prediction (TP = FP = FN = 0) there is nothing to
score, so it takes the value ``empty`` and, that being nan, stays out of every mean. It neither raises the score nor
hides anything: a single false positive makes the class count, with Dice 0. ``empty=1.0`` is Kaggle's rule. Any other
0 / 0, such as the precision of a class that is present and never predicted, is 0.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Unpack

from . import counts
from .arguments import at_least, check_options, is_number, needed, whole
from .boundary import edge_distances
from .counts import SCORES, Cells, one_against_rest
from .distributed import shared
from .targets import Reading, check_ignore_index, check_threshold, read

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy.typing import NDArray
    from torch.distributed import ProcessGroup

_BITS = 32  # scores are summed as two whole numbers, of 2^-32 and of 2^-64, so that no order of adding changes a bit


class PictureOptions(TypedDict, total=False):
    """The keywords that all scores share.

    Attributes:
        threshold: probability above which a sigmoid is a yes, 0.5.
        include_background: keep class 0 of a softmax in the mean, True.
        empty: score of a class that is absent from picture and prediction; nan, the default, leaves it out.
        ignore_index: the mask value whose pixels count for nothing, None.
        multilabel: one sigmoid a channel instead of one softmax, False.
        reduction: "mean", the default: over the classes of each picture, then over pictures; or "none": all scores,
            (N, C), or (C,) with ``batch=True``.
    """

    threshold: float
    include_background: bool
    empty: float
    ignore_index: int | None
    multilabel: bool
    reduction: str


class ScoreOptions(PictureOptions, total=False):
    """The keywords of `PictureOptions`, and one that all scores made of counts share.

    Attributes:
        batch: pool the counts over the batch, instead of a score for each picture, False.
    """

    batch: bool


def confusion_matrix(
    logits: Tensor,
    target: Tensor,
    *,
    threshold: float = 0.5,
    ignore_index: int | None = None,
    multilabel: bool = False,
) -> Tensor:
    """Count the pixels of each picture by true class (rows) and predicted class (columns).

    Args:
        logits: (N, C, *spatial).
        target: a mask, (N, *spatial) or (N, 1 or C, *spatial): class indices or values from 0 to 1; see [`unetlib.targets`][];
            soft masks are cut at 0.5, or by their largest class.
        threshold: probability above which a sigmoid is a yes.
        ignore_index: the mask value whose pixels count for nothing.
        multilabel: one sigmoid a channel instead of one softmax.

    Returns:
        int64 (N, C, C) for a softmax; (N, C, 2, 2), a matrix of no and yes for each channel, for sigmoids.

    Raises:
        TypeError: for logits or a mask of the wrong type, an unknown keyword, or one that is no integer where it should be.
        ValueError: for logits that are NaN or do not fit the mask, a mask value without a class, or a keyword out of range.

    Example:
        >>> confusion_matrix(torch.tensor([[[9.0, -9.0, 9.0]]]), torch.tensor([[1, 0, 0]])).tolist()
        [[[[1, 1], [0, 1]]]]
    """
    return counts.confusion(read(logits, target, multilabel=multilabel, ignore_index=ignore_index), threshold)


def pixel_accuracy(
    logits: Tensor,
    target: Tensor,
    *,
    threshold: float = 0.5,
    ignore_index: int | None = None,
    multilabel: bool = False,
) -> Tensor:
    """Share of the batch's pixels (of all channels, if multilabel) whose decision is right; nan if none counts.

    Args:
        logits: (N, C, *spatial).
        target: a mask, (N, *spatial) or (N, 1 or C, *spatial): class indices or values from 0 to 1; see [`unetlib.targets`][].
        threshold: probability above which a sigmoid is a yes.
        ignore_index: the mask value whose pixels count for nothing.
        multilabel: one sigmoid a channel instead of one softmax.

    Returns:
        float64 scalar.

    Raises:
        TypeError: for logits or a mask of the wrong type, an unknown keyword, or one that is no integer where it should be.
        ValueError: for logits that are NaN or do not fit the mask, a mask value without a class, or a keyword out of range.

    Example:
        >>> pixel_accuracy(torch.tensor([[[9.0, -9.0, 9.0, 9.0]]]), torch.tensor([[1, 0, 0, 1]])).item()
        0.75
    """
    table = confusion_matrix(logits, target, threshold=threshold, ignore_index=ignore_index, multilabel=multilabel)
    return table.diagonal(dim1=-2, dim2=-1).sum().double() / table.sum()


def dice_score(logits: Tensor, target: Tensor, **options: Unpack[ScoreOptions]) -> Tensor:
    """Dice, 2 TP / (2 TP + FP + FN): the mean over the pictures of the batch.

    Args:
        logits: (N, C, *spatial).
        target: a mask, (N, *spatial) or (N, 1 or C, *spatial): class indices or values from 0 to 1; see [`unetlib.targets`][].
        **options: threshold, include_background, empty, batch, ignore_index, multilabel, reduction; see `ScoreOptions`.

    Returns:
        float64 scalar; (N, C) or (C,) scores with ``reduction="none"``.

    Raises:
        TypeError: for logits or a mask of the wrong type, an unknown keyword, or one that is no integer where it should be.
        ValueError: for logits that are NaN or do not fit the mask, a mask value without a class, or a keyword out of range.

    Example:
        >>> dice_score(torch.tensor([[[9.0, -9.0, 9.0, 9.0]]]), torch.tensor([[1, 0, 0, 1]])).item()
        0.8
        >>> logits = torch.tensor([[[9.0, 0.0, 0.0], [0.0, 9.0, 9.0], [0.0, 0.0, 0.0]]])
        >>> dice_score(logits, torch.tensor([[0, 1, 1]]), reduction="none").tolist()  # the last class is in neither mask
        [[1.0, 1.0, nan]]
        >>> dice_score(logits, torch.tensor([[0, 1, 0]]), include_background=False).item()
        0.6666666666666666
    """
    return _score(counts.dice, logits, target, **options)


def fbeta_score(logits: Tensor, target: Tensor, *, beta: float = 1.0, **options: Unpack[ScoreOptions]) -> Tensor:
    """F-beta, (1 + beta^2) TP / ((1 + beta^2) TP + beta^2 FN + FP): recall counts beta times as much as precision.

    Args:
        logits: (N, C, *spatial).
        target: a mask, (N, *spatial) or (N, 1 or C, *spatial): class indices or values from 0 to 1; see [`unetlib.targets`][].
        beta: 1 is Dice.
        **options: threshold, include_background, empty, batch, ignore_index, multilabel, reduction; see `ScoreOptions`.

    Returns:
        float64 scalar; (N, C) or (C,) scores with ``reduction="none"``.

    Raises:
        TypeError: for logits or a mask of the wrong type, an unknown keyword, or one that is no integer where it should be.
        ValueError: for logits that are NaN or do not fit the mask, a mask value without a class, or a keyword out of range.

    Example:
        >>> fbeta_score(torch.tensor([[[9.0, -9.0, 9.0, 9.0]]]), torch.tensor([[1, 0, 0, 1]]), beta=0).item()
        0.6666666666666666
    """
    at_least("beta", beta, 0, 1e6)
    return _score(functools.partial(counts.fbeta, beta=beta), logits, target, **options)


def iou_score(logits: Tensor, target: Tensor, **options: Unpack[ScoreOptions]) -> Tensor:
    """Intersection over union (Jaccard), TP / (TP + FP + FN): the mean over the pictures of the batch.

    Args:
        logits: (N, C, *spatial).
        target: a mask, (N, *spatial) or (N, 1 or C, *spatial): class indices or values from 0 to 1; see [`unetlib.targets`][].
        **options: threshold, include_background, empty, batch, ignore_index, multilabel, reduction; see `ScoreOptions`.

    Returns:
        float64 scalar; (N, C) or (C,) scores with ``reduction="none"``.

    Raises:
        TypeError: for logits or a mask of the wrong type, an unknown keyword, or one that is no integer where it should be.
        ValueError: for logits that are NaN or do not fit the mask, a mask value without a class, or a keyword out of range.

    Example:
        >>> iou_score(torch.tensor([[[9.0, -9.0, 9.0, 9.0]]]), torch.tensor([[1, 0, 0, 1]])).item()
        0.6666666666666666
    """
    return _score(counts.iou, logits, target, **options)


def precision_score(logits: Tensor, target: Tensor, **options: Unpack[ScoreOptions]) -> Tensor:
    """Precision, TP / (TP + FP): the mean over the pictures of the batch.

    Args:
        logits: (N, C, *spatial).
        target: a mask, (N, *spatial) or (N, 1 or C, *spatial): class indices or values from 0 to 1; see [`unetlib.targets`][].
        **options: threshold, include_background, empty, batch, ignore_index, multilabel, reduction; see `ScoreOptions`.

    Returns:
        float64 scalar; (N, C) or (C,) scores with ``reduction="none"``.

    Raises:
        TypeError: for logits or a mask of the wrong type, an unknown keyword, or one that is no integer where it should be.
        ValueError: for logits that are NaN or do not fit the mask, a mask value without a class, or a keyword out of range.

    Example:
        >>> precision_score(torch.tensor([[[9.0, -9.0, 9.0, -9.0]]]), torch.tensor([[1, 0, 0, 0]])).item()
        0.5
    """
    return _score(counts.precision, logits, target, **options)


def recall_score(logits: Tensor, target: Tensor, **options: Unpack[ScoreOptions]) -> Tensor:
    """Recall (sensitivity), TP / (TP + FN): the mean over the pictures of the batch.

    Args:
        logits: (N, C, *spatial).
        target: a mask, (N, *spatial) or (N, 1 or C, *spatial): class indices or values from 0 to 1; see [`unetlib.targets`][].
        **options: threshold, include_background, empty, batch, ignore_index, multilabel, reduction; see `ScoreOptions`.

    Returns:
        float64 scalar; (N, C) or (C,) scores with ``reduction="none"``.

    Raises:
        TypeError: for logits or a mask of the wrong type, an unknown keyword, or one that is no integer where it should be.
        ValueError: for logits that are NaN or do not fit the mask, a mask value without a class, or a keyword out of range.

    Example:
        >>> recall_score(torch.tensor([[[9.0, -9.0, 9.0, -9.0]]]), torch.tensor([[1, 0, 0, 0]])).item()
        1.0
    """
    return _score(counts.recall, logits, target, **options)


def specificity_score(logits: Tensor, target: Tensor, **options: Unpack[ScoreOptions]) -> Tensor:
    """Specificity, TN / (TN + FP): the recall of what is outside a class.

    It is `empty` where nothing is outside in picture and prediction, and 0 where only the prediction has an outside.

    Args:
        logits: (N, C, *spatial).
        target: a mask, (N, *spatial) or (N, 1 or C, *spatial): class indices or values from 0 to 1; see [`unetlib.targets`][].
        **options: threshold, include_background, empty, batch, ignore_index, multilabel, reduction; see `ScoreOptions`.

    Returns:
        float64 scalar; (N, C) or (C,) scores with ``reduction="none"``.

    Raises:
        TypeError: for logits or a mask of the wrong type, an unknown keyword, or one that is no integer where it should be.
        ValueError: for logits that are NaN or do not fit the mask, a mask value without a class, or a keyword out of range.

    Example:
        >>> specificity_score(torch.tensor([[[9.0, -9.0, 9.0]]]), torch.tensor([[1, 0, 0]])).item()
        0.5
    """
    return _score(counts.specificity, logits, target, **options)


def boundary_iou(logits: Tensor, target: Tensor, *, distance: int | None = None, **options: Unpack[ScoreOptions]) -> Tensor:
    """IoU of the bands inside the two masks' boundaries, which large masks cannot win by their bulk.

    From Cheng et al., "Boundary IoU", 2021. The picture's rim counts as boundary.

    Args:
        logits: (N, C, *spatial).
        target: a mask, (N, *spatial) or (N, 1 or C, *spatial): class indices or values from 0 to 1; see [`unetlib.targets`][].
        distance: width of the bands in pixels; by default 2% of the picture's diagonal, as in the paper.
        **options: threshold, include_background, empty, batch (pools the bands' counts), ignore_index, multilabel,
            reduction; see `ScoreOptions`.

    Returns:
        float64 scalar; (N, C) or (C,) scores with ``reduction="none"``.

    Raises:
        TypeError: for logits or a mask of the wrong type, an unknown keyword, or one that is no integer where it should be.
        ValueError: for logits that are NaN or do not fit the mask, a mask value without a class, or a keyword out of range.

    Example:
        >>> square = torch.zeros(1, 6, 6)
        >>> square[:, 1:5, 1:5] = 1
        >>> boundary_iou(20 * square.roll(1, -1)[:, None] - 10, square, distance=1).item()
        0.3333333333333333
    """
    if distance is not None:
        distance = whole("distance", distance, 1)

    def cells(reading: Reading, threshold: float) -> Cells:
        width = distance or max(1, round(0.02 * math.hypot(*reading.logits.shape[2:])))
        return counts.band_cells(reading, threshold, width=width)

    return _score(counts.iou, logits, target, cells=cells, **options)


def boundary_f_score(logits: Tensor, target: Tensor, *, tolerance: float = 2.0, **options: Unpack[PictureOptions]) -> Tensor:
    """F-score of the edges: a pixel of one edge is right within `tolerance` pixels (Euclidean) of the other edge.

    2 A B / (A + B), with A the share of the predicted edge that is right and B that of the true one (Csurka et al.,
    2013). 0 where a class is in the picture or the prediction alone. Needs scipy, on the CPU.

    Args:
        logits: (N, C, *spatial).
        target: a mask, (N, *spatial) or (N, 1 or C, *spatial): class indices or values from 0 to 1; see [`unetlib.targets`][].
        tolerance: in pixels.
        **options: threshold, include_background, empty, ignore_index, multilabel, reduction; see `PictureOptions`.

    Returns:
        float64 scalar; (N, C) scores with ``reduction="none"``.

    Raises:
        TypeError: for logits or a mask of the wrong type, an unknown keyword, or one that is no integer where it should be.
        ValueError: for logits that are NaN or do not fit the mask, a mask value without a class, or a keyword out of range.
        ImportError: without scipy.

    Example:
        >>> square = torch.zeros(1, 6, 6)
        >>> square[:, 1:5, 1:5] = 1
        >>> boundary_f_score(20 * square.roll(1, -1)[:, None] - 10, square, tolerance=1).item()
        1.0
    """
    at_least("tolerance", tolerance, 0)
    tolerance = float(tolerance)  # a tensor is no number to NumPy

    def score(to_true: NDArray[np.float64], to_predicted: NDArray[np.float64]) -> float:
        right = (to_true <= tolerance).mean(), (to_predicted <= tolerance).mean()
        return float(2 * right[0] * right[1] / max(sum(right), 1e-300))

    return _mean_distance(score, 0.0, None, logits, target, **options)


def hausdorff_distance(
    logits: Tensor,
    target: Tensor,
    *,
    percentile: float = 100.0,
    spacing: Sequence[float] | None = None,
    **options: Unpack[PictureOptions],
) -> Tensor:
    """Hausdorff distance between the edges of the masks: the largest distance from one edge to the other, either way.

    Infinite where a class is in the picture or the prediction alone. Needs scipy, on the CPU.

    Args:
        logits: (N, C, *spatial).
        target: a mask, (N, *spatial) or (N, 1 or C, *spatial): class indices or values from 0 to 1; see [`unetlib.targets`][].
        percentile: 95 gives HD95: that percentile of the distances in place of the largest, the larger of both ways.
        spacing: size of a pixel along each axis, by default 1.
        **options: threshold, include_background, empty, ignore_index, multilabel, reduction; see `PictureOptions`.

    Returns:
        float64 scalar; (N, C) distances with ``reduction="none"``.

    Raises:
        TypeError: for logits or a mask of the wrong type, an unknown keyword, or one that is no integer where it should be.
        ValueError: for logits that are NaN or do not fit the mask, a mask value without a class, or a keyword out of range.
        ImportError: without scipy.

    Example:
        >>> square = torch.zeros(1, 6, 6)
        >>> square[:, 1:5, 1:5] = 1
        >>> hausdorff_distance(20 * square.roll(1, -1)[:, None] - 10, square).item()
        1.0
    """
    at_least("percentile", percentile, 0, 100)

    def score(to_true: NDArray[np.float64], to_predicted: NDArray[np.float64]) -> float:
        return max(float(np.percentile(to_true, percentile)), float(np.percentile(to_predicted, percentile)))

    return _mean_distance(score, math.inf, spacing, logits, target, **options)


@torch.no_grad()
def calibration_error(
    logits: Tensor, target: Tensor, *, bins: int = 15, ignore_index: int | None = None, multilabel: bool = False
) -> Tensor:
    """Expected calibration error: how far confidence and truth are apart, sum over bins of n_b / n |conf_b - acc_b|.

    For sigmoids conf is the probability and acc the share of pixels that are in the class; for a softmax conf is the
    probability of the predicted class and acc the share that is right. From Guo et al., 2017.

    Args:
        logits: (N, C, *spatial).
        target: a mask, (N, *spatial) or (N, 1 or C, *spatial): class indices or values from 0 to 1; see [`unetlib.targets`][].
        bins: number of equal bins from 0 to 1.
        ignore_index: the mask value whose pixels count for nothing.
        multilabel: one sigmoid a channel instead of one softmax.

    Returns:
        float64 scalar, from 0 to 1; nan if no pixel counts.

    Raises:
        TypeError: for logits or a mask of the wrong type, an unknown keyword, or one that is no integer where it should be.
        ValueError: for logits that are NaN or do not fit the mask, a mask value without a class, or a keyword out of range.

    Example:
        >>> calibration_error(torch.zeros(1, 1, 4), torch.tensor([[1, 0, 0, 0]])).item()
        0.25
    """
    bins = whole("bins", bins, 1)
    reading = read(logits, target, multilabel=multilabel, ignore_index=ignore_index)
    predicted, true = reading.decisions()
    confidence, right = reading.probabilities(), true
    if not reading.sigmoid:
        confidence, right = confidence.amax(dim=1, keepdim=True), (predicted == true).unsqueeze(1)
    pixels: Tensor | int = confidence.numel()
    if reading.valid is not None:  # an ignored pixel adds 0 to its bin
        confidence, right = confidence.masked_fill(~reading.valid, 0), right & reading.valid
        pixels = counts.off_mps(reading.valid.sum())
    confidence, right = (counts.off_mps(part.flatten()).double() for part in (confidence, right))
    box = (confidence * bins).long().clamp(0, bins - 1)  # the nan of an infinite logit is no number of a bin
    gap = confidence.new_zeros(bins).scatter_add_(0, box, confidence - right)
    return gap.abs().sum() / pixels


class SegmentationMetrics:
    """Dice, IoU, precision, recall, specificity and accuracy of a data set, streamed.

    Memory is constant: integer counts of pixels, and for each score the sum over pictures, kept in whole numbers of
    2^-64. So the result does not depend, to the last bit, on the order of the pictures, on how they are split into
    batches, or on how the batches are split over processes.

    Args:
        num_classes: the model's output channels: 1 is binary.
        threshold: probability above which a sigmoid is a yes.
        include_background: keep class 0 of a softmax in the means over classes.
        empty: score of a class that is absent from picture and prediction; nan leaves it out of the means.
        keep_pictures: keep the scores of each picture, for `per_picture` and the histogram of `plot`.
        ignore_index: the mask value whose pixels count for nothing.
        multilabel: one sigmoid a channel instead of one softmax.

    Raises:
        TypeError: `num_classes` or `ignore_index` is no integer.
        ValueError: `num_classes`, `threshold` or `empty` is out of its range.

    Attributes:
        confusion: int64 counts by true class (rows) and predicted class, (K, K); K is 2 for one channel, and for
            multilabel the shape is (C, 2, 2).
        pictures: how many pictures have been counted.

    Example:
        >>> metrics = SegmentationMetrics()
        >>> metrics.update(torch.tensor([[[9.0, -9.0, 9.0, 9.0]]]), torch.tensor([[1, 0, 0, 1]]))
        >>> metrics.compute()["dice"], metrics.compute()["accuracy"], metrics.confusion.tolist()
        (0.8, 0.75, [[1, 1], [0, 2]])
    """

    def __init__(
        self,
        num_classes: int = 1,
        *,
        threshold: float = 0.5,
        include_background: bool = True,
        empty: float = math.nan,
        keep_pictures: bool = False,
        ignore_index: int | None = None,
        multilabel: bool = False,
    ) -> None:
        """Start with nothing counted."""
        self.num_classes = whole("num_classes", num_classes, 1)
        check_threshold(threshold)
        self.threshold = float(threshold)
        self.include_background = include_background
        self.empty = float(_checked_empty(empty))
        self.keep_pictures = keep_pictures
        check_ignore_index(ignore_index)
        self.ignore_index = None if ignore_index is None else int(ignore_index)
        self.multilabel = multilabel
        self.reset()

    def reset(self) -> None:
        """Forget everything counted."""
        k = self.num_classes
        self._table = torch.zeros((k, 2, 2) if self._sigmoid else (k, k), dtype=torch.int64)
        # For each score, each class and the mean over classes: the sum over pictures, and the number of pictures.
        self._sums = torch.zeros(len(SCORES), k + 1, 2, dtype=torch.int64)
        self._scored = torch.zeros(len(SCORES), k + 1, dtype=torch.int64)
        self._kept: list[Tensor] = []
        self.pictures = 0

    @torch.no_grad()
    def update(self, logits: Tensor, target: Tensor) -> None:
        """Count a batch; nothing waits for the device.

        Args:
            logits: (N, num_classes, *spatial); pictures may differ in size from batch to batch.
            target: a mask, (N, *spatial) or (N, 1 or C, *spatial): class indices or values from 0 to 1; see
                [`unetlib.targets`][].

        Raises:
            TypeError: as `confusion_matrix`.
            ValueError: for another number of channels, and as `confusion_matrix`.
        """
        reading = read(logits, target, multilabel=self.multilabel, ignore_index=self.ignore_index)
        if logits.shape[1] != self.num_classes:
            raise ValueError(
                f"logits of shape {tuple(logits.shape)} do not have num_classes={self.num_classes} channels; "
                "make SegmentationMetrics with the model's number of output channels"
            )
        table = counts.confusion(reading, self.threshold)
        cells = one_against_rest(table, self._sigmoid)
        scores = torch.stack([score(cells, self.empty) for score in SCORES.values()])  # (S, N, C)
        of_mean = scores[..., self._first :]
        classes = (~of_mean.isnan()).sum(-1, keepdim=True)
        mean = _from_fixed_point(_fixed_point(of_mean).sum(-2, keepdim=True)) / classes  # nan for no class
        scores = torch.cat([scores, mean], dim=-1)  # (S, N, C + 1)
        self._add(table.sum(0), _fixed_point(scores).sum(1), (~scores.isnan()).sum(1), len(logits))
        if self.keep_pictures:
            self._kept.append(mean[..., 0])

    def __call__(self, logits: Tensor, target: Tensor) -> dict[str, float]:
        """Count a batch and return that batch's own scores."""
        batch = self._empty_copy()
        batch.update(logits, target)
        self.merge(batch)
        return batch.compute()

    def merge(self, other: SegmentationMetrics) -> None:
        """Add what another accumulator with the same options has counted.

        Raises:
            TypeError: if it is no `SegmentationMetrics`.
            ValueError: if its options differ.

        Example:
            >>> metrics, other = SegmentationMetrics(keep_pictures=True), SegmentationMetrics(keep_pictures=True)
            >>> metrics.update(torch.tensor([[[9.0, -9.0]]]), torch.tensor([[1, 0]]))
            >>> other.update(torch.tensor([[[9.0, 9.0, 9.0]]]), torch.tensor([[1, 0, 0]]))
            >>> metrics.merge(other)
            >>> metrics.per_picture()["dice"], metrics.per_class()["dice"], metrics.per_class()["dice_pooled"]
            ([1.0, 0.5], [0.75], [0.6666666666666666])
        """
        if not isinstance(other, SegmentationMetrics):
            raise TypeError(f"merge takes one SegmentationMetrics, got {type(other).__name__}; merge several one by one")
        mine, theirs = self._options(), other._options()
        if str(mine) != str(theirs):  # as text, for nan is not equal to itself
            raise ValueError(f"cannot merge metrics with different options: {mine} and {theirs}")
        self._add(other._table, other._sums, other._scored, other.pictures)
        self._kept += other._kept

    def all_gather(self, group: ProcessGroup | None = None) -> SegmentationMetrics:
        """Sum over the processes of `torch.distributed`, the same on each; every process has to call it.

        This accumulator keeps its own counts, which are the sum where there is one process. Pictures that a sampler
        repeats to even out the processes count twice, so give `DistributedSampler` a data set whose length the number
        of processes divides, or a sampler of your own.
        """
        total = self._empty_copy()
        for part in shared(self._on_cpu(), group):
            total.merge(part)
        return total

    def compute(self) -> dict[str, float]:
        """The scores so far, as a flat dictionary; nan where nothing was scored.

        Returns:
            ``dice``, ``iou``, ``precision``, ``recall`` and ``specificity``: the mean over pictures of each picture's mean
            over its classes; ``dice_pooled``, ``iou_pooled``, ``precision_pooled``, ``recall_pooled`` and
            ``specificity_pooled``: the mean over classes of the score of all pixels together; and ``accuracy``: the share
            of all pixels that are right.
        """
        result = {}
        for name, means, pooled in self._scores():
            result[name] = means[-1]
            defined = [score for score in pooled[self._first :] if not math.isnan(score)]
            result[f"{name}_pooled"] = _quotient(math.fsum(defined), len(defined))
        right = self._table.diagonal(dim1=-2, dim2=-1).sum().item()
        result["accuracy"] = _quotient(right, self._table.sum().item())
        return result

    def per_class(self) -> dict[str, list[float]]:
        """Each score of `compute` but accuracy, for every class, background included."""
        result = {}
        for name, means, pooled in self._scores():
            result[name], result[f"{name}_pooled"] = means[:-1], pooled
        return result

    def per_picture(self) -> dict[str, list[float]]:
        """Each score of every picture (its mean over classes), in the order counted; nan where nothing was scored.

        Raises:
            ValueError: if made without ``keep_pictures=True``.
        """
        if not self.keep_pictures:
            raise ValueError("scores of single pictures were not kept; use SegmentationMetrics(keep_pictures=True)")
        kept = torch.cat([scores.cpu() for scores in self._kept], dim=1) if self._kept else torch.empty(len(SCORES), 0)
        return dict(zip(SCORES, kept.tolist(), strict=True))

    def plot(self, class_names: Sequence[str] | None = None) -> Figure:
        """Draw the confusion matrix as shares of each true class, and the pictures' Dice where they were kept.

        Each class of a multilabel task has a row of its own: the shares of TN, FP, FN and TP of all pixels.

        Args:
            class_names: by default 0, 1, ...

        Raises:
            ValueError: `class_names` does not name every class.
            ImportError: without matplotlib.
        """
        table = self.confusion.cpu()
        names = list(map(str, range(len(table))) if class_names is None else class_names)
        if len(names) != len(table):
            raise ValueError(f"class_names must name {len(table)} classes, got {len(names)}: {names}")
        columns, rows, title = names, "true class", "share of the true class's pixels"
        if table.ndim == 3:  # one row for each class of a multilabel task
            table, columns, rows, title = table.flatten(1), ["TN", "FP", "FN", "TP"], "class", "share of all pixels"
        shares = table / table.sum(1, keepdim=True)
        size = (10, 4.5) if self._kept else (5.5, 4.5)
        figure: Figure = needed("matplotlib.figure", "a plot", "metrics").Figure(figsize=size, layout="constrained")
        axes = figure.subplots(1, 2 if self._kept else 1, squeeze=False)[0]
        axes[0].imshow(shares.numpy(), vmin=0, vmax=1, cmap="Blues", aspect="auto")
        axes[0].set_xticks(range(len(columns)), columns)
        axes[0].set_yticks(range(len(names)), names)
        axes[0].set(xlabel="predicted", ylabel=rows, title=title)
        if len(names) <= 12:
            for (row, column), share in np.ndenumerate(shares.numpy()):
                color = "white" if share > 0.5 else "black"
                axes[0].text(column, row, f"{share:.3f}", ha="center", va="center", color=color)
        if self._kept:
            axes[1].hist([score for score in self.per_picture()["dice"] if not math.isnan(score)], bins=40)
            axes[1].set(xlabel="Dice of a picture", ylabel="pictures", title=f"mean {self.compute()['dice']:.4f}")
        return figure

    def __repr__(self) -> str:
        """Its options, and how much has been counted."""
        options = ", ".join(f"{name}={value!r}" for name, value in self._options().items())
        return f"<{type(self).__name__}({options}) of {self.pictures} pictures>"

    @property
    def confusion(self) -> Tensor:
        """Pooled counts, see the class."""
        return self._table[0] if self._sigmoid and not self.multilabel else self._table

    @property
    def _sigmoid(self) -> bool:
        return self.multilabel or self.num_classes == 1

    @property
    def _first(self) -> int:
        """First class of the means."""
        return 0 if self._sigmoid or self.include_background else 1

    def _options(self) -> dict[str, object]:
        return {name: value for name, value in vars(self).items() if not name.startswith("_") and name != "pictures"}

    def _empty_copy(self) -> SegmentationMetrics:
        empty = copy.copy(self)
        empty.reset()
        return empty

    def _on_cpu(self) -> SegmentationMetrics:
        moved = copy.copy(self)
        moved._table, moved._sums, moved._scored = self._table.cpu(), self._sums.cpu(), self._scored.cpu()
        moved._kept = [scores.cpu() for scores in self._kept]
        return moved

    def _add(self, table: Tensor, sums: Tensor, scored: Tensor, pictures: int) -> None:
        if self.pictures:  # else there is nothing to add to, and copying the zeros to a GPU would wait for it
            table = self._table.to(table.device) + table
            sums = self._sums.to(sums.device) + sums
            scored = self._scored.to(scored.device) + scored
        self._table, self._sums, self._scored = table, sums, scored
        self.pictures += pictures

    def _scores(self) -> Iterator[tuple[str, list[float], list[float]]]:
        """Name of each score; its means over pictures, of every class and last of their means; every class's of all pixels."""
        cells = one_against_rest(self._table, self._sigmoid)
        for (name, score), sums, scored in zip(SCORES.items(), self._sums.tolist(), self._scored.tolist(), strict=True):
            means = [_quotient((high << _BITS) + low, n << 2 * _BITS) for (high, low), n in zip(sums, scored, strict=True)]
            yield name, means, score(cells, self.empty).tolist()


def _fixed_point(scores: Tensor) -> Tensor:
    """Scores as whole numbers of 2^-32 and, the rest, of 2^-64, int64 (..., 2); nan is 0."""
    scaled = scores.nan_to_num() * 2.0**_BITS
    high = scaled.floor()
    return torch.stack([high, ((scaled - high) * 2.0**_BITS).round()], dim=-1).long()


def _from_fixed_point(numbers: Tensor) -> Tensor:
    """The opposite of `_fixed_point`."""
    return numbers[..., 0].double() / 2.0**_BITS + numbers[..., 1].double() / 2.0 ** (2 * _BITS)


def _score(
    score: Callable[[Cells, float], Tensor],
    logits: Tensor,
    target: Tensor,
    *,
    cells: Callable[[Reading, float], Cells] = counts.pixel_cells,
    threshold: float = 0.5,
    include_background: bool = True,
    empty: float = math.nan,
    batch: bool = False,
    ignore_index: int | None = None,
    multilabel: bool = False,
    reduction: str = "mean",
    **others: Any,
) -> Tensor:
    """A score made of counts, under the options of `ScoreOptions`."""
    check_options("a score", others, ScoreOptions.__annotations__)
    reading = read(logits, target, multilabel=multilabel, ignore_index=ignore_index)
    counted = cells(reading, threshold)
    if batch:
        counted = Cells(*(cell.sum(0) for cell in counted))
    return _mean(score(counted, _checked_empty(empty)), reading.sigmoid or include_background, reduction)


def _mean_distance(
    score: Callable[[NDArray[np.float64], NDArray[np.float64]], float],
    alone: float,
    spacing: Sequence[float] | None,
    logits: Tensor,
    target: Tensor,
    *,
    threshold: float = 0.5,
    include_background: bool = True,
    empty: float = math.nan,
    ignore_index: int | None = None,
    multilabel: bool = False,
    reduction: str = "mean",
    **others: Any,
) -> Tensor:
    """A score made of edge distances, `alone` where only one of the masks has an edge, under `PictureOptions`."""
    check_options("a score of edges", others, PictureOptions.__annotations__)
    reading = read(logits, target, multilabel=multilabel, ignore_index=ignore_index)
    axes = len(reading.spatial)
    sizes = [1.0] * axes if spacing is None else spacing
    if np.shape(sizes) != (axes,) or not all(is_number(size) and 0 < size < math.inf for size in sizes):
        raise ValueError(f"spacing must hold the size of a pixel along each axis, {axes} numbers above 0, not {spacing!r}")
    empty = _checked_empty(empty, most=max(alone, 1.0))  # a distance may be any number
    predicted, true = (mask.flatten(0, 1).cpu().numpy() for mask in reading.masks(threshold))
    scores = [
        score(*edge_distances(p, t, spacing)) if p.any() and t.any() else alone if p.any() or t.any() else empty
        for p, t in zip(predicted, true, strict=True)
    ]
    table = torch.tensor(scores, dtype=torch.float64, device="cpu").view(reading.logits.shape[:2])
    if reading.valid is not None:
        table = table.masked_fill(~reading.valid.flatten(2).any(-1).cpu(), math.nan)
    return _mean(table, reading.sigmoid or include_background, reduction)


def _checked_empty(empty: float, most: float = 1.0) -> float:
    if not is_number(empty) or not (math.isnan(empty) or 0 <= empty <= most):
        allowed = "0 or more" if most == math.inf else f"from 0 to {most:g}"
        raise ValueError(f"empty is the score of a class that is absent: nan, or {allowed}, got {empty!r}")
    return empty


def _mean(scores: Tensor, include_background: bool, reduction: str) -> Tensor:
    """Mean over classes, then over pictures, without the nan."""
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction must be 'mean' or 'none', got {reduction!r}")
    if reduction == "none":
        return scores
    return (scores if include_background else scores[..., 1:]).nanmean(-1).nanmean()


def _quotient(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else math.nan
