"""Scores of objects instead of pixels: nuclei found and missed, cells split and merged.

Masks are NumPy arrays (H, W), one picture at a time. A bool or uint8 mask, such as `UNet.predict` gives, is foreground
and background, and its objects are the connected parts of the foreground (pixels meet at their sides, not at corners).
An array of a wider integer type holds numbered objects, 0 where there is none: objects that touch then stay apart.

Needs scipy, which the `metrics` extra installs.
"""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Sequence
from os import PathLike
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .arguments import needed

THRESHOLDS = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)


class ObjectCounts(NamedTuple):
    """Objects found, invented and missed, int64, one number for each threshold."""

    tp: NDArray[np.int64]
    fp: NDArray[np.int64]
    fn: NDArray[np.int64]


def label_objects(mask: ArrayLike) -> NDArray[np.int32]:
    """Number the objects of a mask 1, 2, ...; 0 is background.

    Args:
        mask: (H, W), bool or uint8 with one value besides 0, or numbered objects of a wider integer type. Of these a single
            object in several parts is a warning, since it may be foreground that became wider.

    Returns:
        int32 (H, W).

    Raises:
        ValueError: for another shape, uint8 of several values besides 0, or negative numbers.
        TypeError: for an array that is neither bool nor integer, and for a path.
        ImportError: without scipy.

    Example:
        >>> label_objects(np.array([[1, 0, 1], [1, 0, 1]], np.uint8)).tolist()
        [[1, 0, 2], [1, 0, 2]]
    """
    if isinstance(mask, (str, PathLike)):
        raise TypeError(f"mask must be an array of shape (H, W), got {mask!r}; read it with unetlib.imaging.read_labels")
    pixels = np.asarray(mask)
    if pixels.ndim != 2:
        raise ValueError(f"mask must be one picture's, of shape (H, W), got {pixels.shape}")
    if pixels.dtype.kind not in "bui":
        raise TypeError(f"mask must be bool, uint8 or numbered objects, got {pixels.dtype}; pass mask > 0.5")
    if pixels.size and pixels.min() < 0:
        raise ValueError(f"objects are numbered from 1, got {pixels.min()}")
    if pixels.dtype != bool and pixels.dtype != np.uint8:
        values = np.unique(pixels)
        if np.count_nonzero(values) == 1 and _ndimage().label(pixels)[1] > 1:
            warnings.warn(
                f"a mask of {pixels.dtype} numbers its objects, and this one has a single object in several parts; if it is "
                "foreground and background, pass mask > 0",
                stacklevel=2,
            )
        # Looked up, for `return_inverse` sorts all pixels, which takes ten times as long.
        return np.asarray(np.searchsorted(values, pixels) + (0 not in values), np.int32)
    foreground = pixels[pixels > 0]
    if (foreground != foreground.max(initial=0)).any():
        raise ValueError(
            f"a uint8 mask must have one value besides 0, got {np.unique(pixels)[:8].tolist()}; "
            "pass mask.astype(int) if they number objects, or mask == k for the objects of class k"
        )
    labels: NDArray[np.int32] = _ndimage().label(pixels)[0]
    return labels


def object_counts(predicted: ArrayLike, true: ArrayLike, *, thresholds: Sequence[float] = THRESHOLDS) -> ObjectCounts:
    """Count the objects that are found: those whose IoU with a predicted one is above a threshold.

    At 0.5 and above no object can match two others, so no matching has to be chosen.

    Args:
        predicted: mask or numbered objects (H, W), see `label_objects`.
        true: the same.
        thresholds: IoU above which two objects match, each in [0.5, 1).

    Returns:
        tp, fp and fn, int64 (len(thresholds),).

    Raises:
        ValueError: for masks of different shape, or a threshold outside [0.5, 1); and as `label_objects`.
        TypeError: as `label_objects`.
        ImportError: without scipy.

    Example:
        >>> object_counts(np.array([[1, 1, 1, 0, 1]], bool), np.array([[1, 1, 0, 0, 0]], bool), thresholds=(0.5, 0.7))
        ObjectCounts(tp=array([1, 0]), fp=array([1, 2]), fn=array([0, 1]))
    """
    limits = np.asarray(thresholds, np.float64)
    if limits.ndim != 1 or not limits.size or not ((limits >= 0.5) & (limits < 1)).all():
        raise ValueError(f"thresholds must be IoUs in [0.5, 1), such as (0.5, 0.75), got {thresholds!r}")
    return _counts(label_objects(predicted), label_objects(true), limits)


def object_average_precision(predicted: ArrayLike, true: ArrayLike, *, thresholds: Sequence[float] = THRESHOLDS) -> float:
    """Average precision of one picture's objects: the mean over IoU thresholds of TP / (TP + FP + FN).

    The score of the 2018 Data Science Bowl (Caicedo et al. 2019, https://doi.org/10.1038/s41592-019-0612-7), whose
    thresholds are 0.5, 0.55, ..., 0.95.

    Args:
        predicted: mask or numbered objects (H, W), see `label_objects`.
        true: the same.
        thresholds: IoU above which two objects match, each in [0.5, 1).

    Returns:
        0 to 1; nan where neither mask has an object, for there is nothing to score.

    Raises:
        ValueError: as `object_counts`.
        TypeError: as `object_counts`.
        ImportError: as `object_counts`.

    Example:
        >>> true = np.array([[1, 1, 1, 1, 0, 1]], bool)
        >>> object_average_precision(np.array([[1, 1, 1, 0, 0, 1]], bool), true)  # IoUs 0.75 and 1
        0.6666666666666666
    """
    return float(_precision(object_counts(predicted, true, thresholds=thresholds)).mean())


def rand_f_score(predicted: ArrayLike, true: ArrayLike) -> float:
    """How well two pixels of one true object share a predicted object, and the reverse: splits and merges lower it.

    V^Rand of Arganda-Carreras et al. 2015 (https://doi.org/10.3389/fnana.2015.00142), the score of the ISBI 2012
    challenge: 2 sum_ij p_ij^2 / (sum_i s_i^2 + sum_j t_j^2), where p_ij is the share of pixels in predicted object i
    and true object j, and s_i, t_j are its sums. Only pixels of true objects count, and predicted borders are thinned
    to nothing: each of their pixels joins the nearest predicted object, so that the width of a membrane does not matter.

    Args:
        predicted: mask or numbered objects (H, W), see `label_objects`.
        true: the same.

    Returns:
        0 to 1; 0 where no object is predicted, nan where there is no true one.

    Raises:
        ValueError: for masks of different shape; and as `label_objects`.
        TypeError: as `label_objects`.
        ImportError: without scipy.

    Example:
        >>> true = np.array([[1, 1, 1, 0, 1, 1, 1]], bool)
        >>> rand_f_score(np.array([[1, 1, 0, 0, 0, 1, 1]], bool), true)  # two objects, however wide the gap
        1.0
        >>> rand_f_score(np.array([[1, 1, 1, 1, 1, 1, 1]], bool), true)  # one: they are merged
        0.6666666666666666
    """
    return _rand(label_objects(predicted), label_objects(true))


class ObjectMetrics:
    """Scores of the objects of a data set, streamed: average precision over pictures and pooled, and V^Rand.

    Example:
        >>> metrics = ObjectMetrics()
        >>> metrics.update(np.array([[1, 1, 0, 1]], bool), np.array([[1, 1, 0, 1]], bool))
        >>> metrics.update(np.array([[0, 0, 0, 1]], bool), np.array([[1, 1, 0, 1]], bool))
        >>> metrics.compute()["ap50"], metrics.pictures
        (0.75, 2)
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything counted."""
        self._precisions: list[NDArray[np.float64]] = []
        self._rand: list[float] = []
        self._counts = np.zeros((3, len(THRESHOLDS)), np.int64)

    @property
    def pictures(self) -> int:
        """How many pictures have been counted."""
        return len(self._rand)

    def update(self, predicted: ArrayLike, true: ArrayLike) -> None:
        """Count one picture.

        Args:
            predicted: mask or numbered objects (H, W), see `label_objects`.
            true: the same.

        Raises:
            ValueError: as `object_counts`.
            TypeError: as `object_counts`.
            ImportError: as `object_counts`.
        """
        numbered = label_objects(predicted), label_objects(true)
        counts, rand = _counts(*numbered, np.asarray(THRESHOLDS)), _rand(*numbered)
        self._counts += counts
        self._precisions.append(_precision(counts))
        self._rand.append(rand)

    def merge(self, other: ObjectMetrics) -> None:
        """Add what another accumulator has counted.

        Raises:
            TypeError: if it is no `ObjectMetrics`.
        """
        if not isinstance(other, ObjectMetrics):
            raise TypeError(f"merge takes one ObjectMetrics, got {type(other).__name__}; merge several one by one")
        self._counts += other._counts
        self._precisions += other._precisions
        self._rand += other._rand

    def compute(self) -> dict[str, float]:
        """The scores so far, as a flat dictionary; nan where nothing was scored.

        Returns:
            ``ap``, the mean over pictures of `object_average_precision`; ``ap50`` and ``ap75``, the same at one
            threshold; each with ``_pooled`` from the objects of all pictures together; and ``rand``, the mean over
            pictures of `rand_f_score`. A picture without objects in either mask counts for nothing.
        """
        scored = [precision for precision in self._precisions if not np.isnan(precision).any()]
        precisions = {
            "": np.mean(scored, axis=0) if scored else np.full(len(THRESHOLDS), math.nan),
            "_pooled": _precision(ObjectCounts(*self._counts)),
        }
        result: dict[str, float] = {}
        for suffix, precision in precisions.items():
            result[f"ap{suffix}"] = float(precision.mean())
            result[f"ap50{suffix}"] = float(precision[THRESHOLDS.index(0.5)])
            result[f"ap75{suffix}"] = float(precision[THRESHOLDS.index(0.75)])
        rand = [score for score in self._rand if not math.isnan(score)]
        result["rand"] = statistics.fmean(rand) if rand else math.nan
        return result


def _counts(predicted: NDArray[np.int32], true: NDArray[np.int32], limits: NDArray[np.float64]) -> ObjectCounts:
    """`object_counts` of numbered objects."""
    table = _overlaps(predicted, true)
    areas = table.predicted_area[table.predicted] + table.true_area[table.true]
    found = np.count_nonzero(table.pixels / (areas - table.pixels) > limits[:, None], axis=1)
    return ObjectCounts(found, len(table.predicted_area) - 1 - found, len(table.true_area) - 1 - found)


def _rand(predicted: NDArray[np.int32], true: NDArray[np.int32]) -> float:
    """`rand_f_score` of numbered objects."""
    _check_shapes(predicted, true)
    if not true.any():
        return math.nan
    if not predicted.any():
        return 0.0
    nearest = _ndimage().distance_transform_edt(predicted == 0, return_distances=False, return_indices=True)
    table = _overlaps(np.where(true > 0, predicted[tuple(nearest)], 0), true)
    return float(2 * _squares(table.pixels) / (_squares(table.predicted_area[1:]) + _squares(table.true_area[1:])))


class _Overlaps(NamedTuple):
    """Pairs of objects that share pixels: their numbers and how many; and every object's area, background's first."""

    predicted: NDArray[np.int64]
    true: NDArray[np.int64]
    pixels: NDArray[np.int64]
    predicted_area: NDArray[np.int64]
    true_area: NDArray[np.int64]


def _overlaps(predicted: NDArray[np.int32], true: NDArray[np.int32]) -> _Overlaps:
    _check_shapes(predicted, true)
    base = int(predicted.max(initial=0)) + 1
    both = (predicted > 0) & (true > 0)
    pairs, pixels = np.unique(true[both].astype(np.int64) * base + predicted[both], return_counts=True)
    areas = (np.bincount(labels.ravel(), minlength=1) for labels in (predicted, true))
    return _Overlaps(pairs % base, pairs // base, pixels, *areas)


def _check_shapes(predicted: NDArray[Any], true: NDArray[Any]) -> None:
    if predicted.shape != true.shape:
        raise ValueError(f"the masks must have one shape, got {predicted.shape} predicted and {true.shape} true")


def _precision(counts: ObjectCounts) -> NDArray[np.float64]:
    """TP / (TP + FP + FN) at each threshold; nan where there is no object."""
    precision = np.full(len(counts.tp), math.nan)
    total = counts.tp + counts.fp + counts.fn
    np.divide(counts.tp, total, out=precision, where=total > 0)
    return precision


def _squares(areas: NDArray[np.int64]) -> float:
    return float(np.square(areas.astype(np.float64)).sum())


def _ndimage() -> Any:
    return needed("scipy.ndimage", "a score of objects", "metrics")
