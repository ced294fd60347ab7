from __future__ import annotations

import math
import sys
import warnings
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from unetlib import objects
from unetlib.objects import (
    THRESHOLDS,
    ObjectMetrics,
    label_objects,
    object_average_precision,
    object_counts,
    rand_f_score,
)

EMPTY = np.zeros((4, 4), bool)


def blobs(seed: int, size: tuple[int, int] = (40, 56)) -> np.ndarray:
    """A mask of random rectangles."""
    rng = np.random.default_rng(seed)
    mask = np.zeros(size, bool)
    for _ in range(12):
        top, left = rng.integers(0, size[0] - 6), rng.integers(0, size[1] - 6)
        mask[top : top + rng.integers(2, 8), left : left + rng.integers(2, 8)] = True
    return mask


def shifted(mask: np.ndarray) -> np.ndarray:
    moved = np.roll(mask, 1, axis=1)
    moved[:, :20] = mask[:, :20]
    return moved


# ---- independent readings: pixel sets and plain loops -------------------------------------------------------------------


def components(mask: np.ndarray) -> list[frozenset[tuple[int, int]]]:
    """Flood fill over the four neighbours."""
    left = {(int(y), int(x)) for y, x in zip(*np.nonzero(mask))}
    found = []
    while left:
        pending, part = [left.pop()], set()
        while pending:
            y, x = pending.pop()
            part.add((y, x))
            for neighbour in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):
                if neighbour in left:
                    left.remove(neighbour)
                    pending.append(neighbour)
        found.append(frozenset(part))
    return found


def naive_counts(predicted: np.ndarray, true: np.ndarray, threshold: float) -> tuple[int, int, int]:
    ours, theirs = components(predicted), components(true)
    tp = sum(len(a & b) / len(a | b) > threshold for a in ours for b in theirs)
    return tp, len(ours) - tp, len(theirs) - tp


def naive_rand(predicted: np.ndarray, true: np.ndarray) -> float:
    """Pairs of pixels (each with itself too) in one object of either kind; borders join the nearest object."""
    ours, theirs = components(predicted), components(true)
    pixels = sorted(set().union(*theirs))

    def nearest(y: int, x: int) -> int:
        near = sorted((min((y - a) ** 2 + (x - b) ** 2 for a, b in part), k) for k, part in enumerate(ours))
        assert len(near) == 1 or near[0][0] < near[1][0], "a pixel half-way may join either object: take another seed"
        return near[0][1]

    mine = [nearest(*pixel) for pixel in pixels]
    its = [next(k for k, part in enumerate(theirs) if pixel in part) for pixel in pixels]
    both = own = other = len(pixels)
    for i, j in combinations(range(len(pixels)), 2):
        own += 2 * (mine[i] == mine[j])
        other += 2 * (its[i] == its[j])
        both += 2 * (mine[i] == mine[j] and its[i] == its[j])
    return 2 * both / (own + other)


@pytest.mark.parametrize("seed", range(5))
def test_counts_and_precision_equal_the_naive_reading(seed):
    true = blobs(seed)
    predicted = shifted(true) ^ (blobs(seed + 50) & blobs(seed + 90))
    expected = [naive_counts(predicted, true, t) for t in THRESHOLDS]
    assert len({tp for tp, _, _ in expected}) > 1, "the thresholds should matter"
    np.testing.assert_array_equal(np.transpose(object_counts(predicted, true)), expected)
    precision = np.mean([tp / (tp + fp + fn) for tp, fp, fn in expected])
    assert object_average_precision(predicted, true) == pytest.approx(precision, abs=1e-12)


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("joined", [False, True])
def test_rand_equals_the_naive_reading(seed, joined):
    true = blobs(seed, (16, 20))
    predicted = true.copy()
    predicted[:, 9:11] = joined  # joins all that it crosses, or cuts it
    assert rand_f_score(predicted, true) == pytest.approx(naive_rand(predicted, true), abs=1e-12)


# ---- by hand ------------------------------------------------------------------------------------------------------------


def test_objects_meet_at_their_sides_not_at_corners():
    assert label_objects(np.array([[1, 0], [0, 1]], bool)).tolist() == [[1, 0], [0, 2]]
    assert label_objects(np.array([[255, 255], [0, 255]], np.uint8)).tolist() == [[1, 1], [0, 1]]


def test_numbered_objects_keep_apart_where_they_touch():
    numbered = np.array([[7, 7, 3, 3]])
    assert label_objects(numbered).tolist() == [[2, 2, 1, 1]]
    assert label_objects(np.array([[0, 9, 9, 4]], np.uint16)).tolist() == [[0, 2, 2, 1]]
    assert label_objects(np.array([[2**40, 5], [5, 0]])).tolist() == [[2, 1], [1, 0]]
    assert object_counts(numbered, numbered, thresholds=(0.9,)).tp.tolist() == [2]
    assert object_counts(numbered > 0, numbered, thresholds=(0.5,)) == ([0], [1], [2])  # an IoU of 0.5 is not above 0.5


@pytest.mark.parametrize("dtype", [np.uint16, np.int64])
def test_foreground_of_a_wider_type_is_warned_of(dtype):
    mask = np.array([[1, 1, 0, 1]], dtype)
    with pytest.warns(UserWarning, match=rf"of {np.dtype(dtype)} numbers its objects, .*several parts; .*pass mask > 0"):
        assert label_objects(mask).tolist() == [[1, 1, 0, 1]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for plain in (mask[:, :3], np.array([[1, 1, 0, 2]], dtype), np.zeros((2, 2), dtype), mask > 0):
            label_objects(plain)


def test_an_iou_at_a_threshold_is_not_above_it():
    true, predicted = np.ones((1, 20), bool), np.ones((1, 20), bool)
    for count in range(11, 20):  # IoU 0.55, 0.6, ...: every threshold but the first
        predicted[0, count:] = False
        assert object_counts(predicted, true).tp.sum() == count - 10
        predicted[0] = True


def test_precision_of_split_merged_missed_and_invented_objects():
    true = np.zeros((5, 20), bool)
    true[1:4, 1:5] = true[1:4, 8:12] = True
    merged = true.copy()
    merged[2, 5:8] = True
    invented = true.copy()
    invented[1:4, 15:18] = True
    missed = true.copy()
    missed[:, :6] = False
    assert object_average_precision(true, true) == 1
    assert object_average_precision(merged, true) == 0
    assert object_average_precision(invented, true) == pytest.approx(2 / 3)
    assert object_average_precision(missed, true) == 1 / 2
    assert object_average_precision(np.zeros_like(true), true) == 0


def test_rand_forgives_the_width_of_borders_and_punishes_merges_and_splits():
    true = np.ones((12, 21), bool)
    true[:, 10] = False
    thick = true.copy()
    thick[:, 7:14] = False
    holed, split = true.copy(), true.copy()
    holed[5, 10] = True
    split[6, :10] = False
    assert rand_f_score(true, true) == rand_f_score(thick, true) == 1
    assert rand_f_score(holed, true) == pytest.approx(2 / 3)  # both cells in one: p = (1/2, 1/2), s = 1
    assert 0.7 < rand_f_score(split, true) < 1
    assert rand_f_score(np.zeros_like(true), true) == 0


def test_without_objects_there_is_nothing_to_score():
    assert math.isnan(object_average_precision(EMPTY, EMPTY))
    assert object_average_precision(~EMPTY, EMPTY) == 0
    assert math.isnan(rand_f_score(~EMPTY, EMPTY))
    metrics = ObjectMetrics()
    assert all(math.isnan(score) for score in metrics.compute().values())
    metrics.update(EMPTY, EMPTY)
    assert all(math.isnan(score) for score in metrics.compute().values())
    metrics.update(~EMPTY, ~EMPTY)
    assert set(metrics.compute().values()) == {1.0}


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int64])
def test_nothing_to_score_is_no_warning_and_a_mask_may_be_empty(dtype):
    for nothing in (EMPTY.astype(dtype), np.zeros((0, 4), dtype)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert label_objects(nothing).shape == nothing.shape
            assert object_counts(nothing, nothing, thresholds=(0.5,)) == ([0], [0], [0])
            assert math.isnan(object_average_precision(nothing, nothing))
            assert math.isnan(rand_f_score(nothing, nothing))


def test_precision_is_the_mean_over_the_thresholds_asked_for():
    true = np.ones((1, 20), bool)
    predicted = true.copy()
    predicted[0, 13:] = False  # an IoU of 0.65
    assert object_average_precision(predicted, true, thresholds=(0.6,)) == 1
    assert object_average_precision(predicted, true, thresholds=(0.6, 0.7)) == 0.5


# ---- the accumulator ----------------------------------------------------------------------------------------------------


def test_a_picture_that_cannot_be_scored_is_not_counted_half(monkeypatch):
    def without_scipy(*_):
        raise ImportError("scipy")

    metrics = ObjectMetrics()
    monkeypatch.setattr(objects, "_rand", without_scipy)
    with pytest.raises(ImportError, match="scipy"):
        metrics.update(blobs(1), blobs(1))
    monkeypatch.undo()
    metrics.update(~blobs(1), blobs(1))
    assert metrics.pictures == 1
    assert metrics.compute()["ap"] == metrics.compute()["ap_pooled"] < 1


def test_the_objects_of_a_picture_are_numbered_once():
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        ObjectMetrics().update(np.array([[1, 1, 0, 1]], np.int64), np.array([[1, 1, 0, 2]], np.int64))
    assert len(said) == 1


def test_a_data_sets_scores_are_means_over_pictures_and_pooled_counts():
    pairs = [(shifted(blobs(seed)), blobs(seed)) for seed in range(4)] + [(blobs(8) & blobs(9), blobs(8))]
    first, second = ObjectMetrics(), ObjectMetrics()
    for k, pair in enumerate(pairs):
        (second if k > 2 else first).update(*pair)
    first.merge(second)
    scores = first.compute()
    assert first.pictures == 5
    at = [np.array([naive_counts(p, t, threshold) for p, t in pairs]) for threshold in THRESHOLDS]
    per_picture = np.array([counts[:, 0] / counts.sum(1) for counts in at])
    pooled = np.array([counts[:, 0].sum() / counts.sum() for counts in at])
    assert scores["ap"] == pytest.approx(per_picture.mean())
    assert scores["ap50"] == pytest.approx(per_picture[0].mean())
    assert scores["ap75"] == pytest.approx(per_picture[5].mean())
    assert scores["ap_pooled"] == pytest.approx(pooled.mean())
    assert scores["ap50_pooled"] == pytest.approx(pooled[0])
    assert scores["ap75_pooled"] == pytest.approx(pooled[5])
    assert scores["rand"] == pytest.approx(np.mean([rand_f_score(p, t) for p, t in pairs]))
    first.reset()
    assert first.pictures == 0


def test_what_cannot_be_merged_is_named():
    with pytest.raises(TypeError, match="merge takes one ObjectMetrics, got list; merge several one by one"):
        ObjectMetrics().merge([ObjectMetrics()])


# ---- what is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (np.zeros((1, 4, 4), bool), ValueError, r"\(H, W\), got \(1, 4, 4\)"),
        (np.zeros((4, 4), np.float32), TypeError, "float32; pass mask > 0.5"),
        (np.array([[0, 1, 2]], np.uint8), ValueError, r"one value besides 0, got \[0, 1, 2\].*mask == k"),
        (np.array([[-1, 1]]), ValueError, "numbered from 1, got -1"),
        ("mask.png", TypeError, r"array of shape \(H, W\), got 'mask\.png'; read it with unetlib\.imaging\.read_labels$"),
        (Path("mask.png"), TypeError, r"got \w+Path\('mask\.png'\); read it"),
    ],
)
def test_masks_that_could_be_misread_are_refused(mask, error, message):
    with pytest.raises(error, match=message):
        label_objects(mask)


@pytest.mark.parametrize("score", [object_counts, rand_f_score])
def test_masks_of_different_shape_are_refused(score):
    with pytest.raises(ValueError, match=r"one shape, got \(4, 4\) predicted and \(4, 5\) true"):
        score(~EMPTY, np.ones((4, 5), bool))


@pytest.mark.parametrize("thresholds", [(), (0.4,), (0.5, 1.0), 0.5, [[0.5]]])
def test_thresholds_that_allow_two_matches_are_refused(thresholds):
    with pytest.raises(ValueError, match=r"IoUs in \[0.5, 1\)"):
        object_counts(EMPTY, EMPTY, thresholds=thresholds)


def test_without_scipy_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.ndimage", None)
    numbered = np.ones((4, 4), np.int64)
    for score in (lambda: label_objects(EMPTY), lambda: rand_f_score(numbered, numbered)):
        with pytest.raises(ImportError, match=r"scipy is not installed; .*pip install 'unetlib\[metrics\]'"):
            score()
