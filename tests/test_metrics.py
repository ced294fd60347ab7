"""Metrics against loops and other libraries, and the accumulator's promise of the same bits however it is fed."""

from __future__ import annotations

import itertools
import math
import os
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from pretended_mps import OnMps
from test_losses import KINDS, OneDevice, library, with_ignored
from torch._subclasses.fake_tensor import FakeTensorMode

from unetlib.metrics import (
    SegmentationMetrics,
    boundary_f_score,
    boundary_iou,
    calibration_error,
    confusion_matrix,
    dice_score,
    fbeta_score,
    hausdorff_distance,
    iou_score,
    pixel_accuracy,
    precision_score,
    recall_score,
    specificity_score,
)

SHAPES = ((30,), (5, 6), (3, 4, 5))
SCORES = {
    "dice": dice_score,
    "iou": iou_score,
    "precision": precision_score,
    "recall": recall_score,
    "specificity": specificity_score,
}


def case(kind: str, shape: tuple[int, ...], seed: int = 0, n: int = 3) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    channels = 1 if kind == "binary" else 3
    logits = torch.randn(n, channels, *shape, generator=generator)
    if kind == "multiclass":
        return logits, torch.randint(0, channels, (n, *shape), generator=generator, dtype=torch.uint8), {}
    target = torch.randint(0, 2, (n, channels, *shape), generator=generator, dtype=torch.uint8)
    return logits, target, {"multilabel": True} if kind == "multilabel" else {}


def blob(seed: int, shape: tuple[int, ...] = (20, 23), n: int = 3) -> torch.Tensor:
    """Random masks with some size to them, bool (n, 1, *shape)."""
    noise = torch.randn(n, 1, *shape, generator=torch.Generator().manual_seed(seed))
    pool = {2: F.avg_pool2d, 3: F.avg_pool3d}[len(shape)]
    return pool(noise, 5, stride=1, padding=2) > 0.05


def as_logits(mask: torch.Tensor) -> torch.Tensor:
    return 20 * mask.float() - 10


def loop_cells(logits: torch.Tensor, target: torch.Tensor, kind: str) -> np.ndarray:
    """(tp, fp, fn, tn) of each picture and class, pixel by pixel; 255 is ignored."""
    x = logits.numpy().reshape(*logits.shape[:2], -1)
    mask = target.numpy().reshape(len(x), -1, x.shape[2])
    result = np.zeros((*x.shape[:2], 4), int)
    for i, c, k in np.ndindex(x.shape):
        true = mask[i, 0, k] if kind == "multiclass" else mask[i, c, k]
        if true == 255:
            continue
        yes, right = (x[i, :, k].argmax() == c, true == c) if kind == "multiclass" else (x[i, c, k] > 0, true == 1)
        result[i, c, (0 if right else 1) if yes else (2 if right else 3)] += 1
    return result


def formula(name: str, tp: int, fp: int, fn: int, tn: int, empty: float = math.nan) -> float:
    if name == "specificity":
        tp, fp, fn, name = tn, fn, fp, "recall"
    if tp + fp + fn == 0:
        return empty
    above, below = {
        "dice": (2 * tp, 2 * tp + fp + fn),
        "iou": (tp, tp + fp + fn),
        "precision": (tp, tp + fp),
        "recall": (tp, tp + fn),
    }[name]
    return above / below if below else 0.0


# Counts and scores of a batch


@pytest.mark.parametrize("ignore", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_scores_equal_loops(kind: str, shape: tuple[int, ...], ignore: bool) -> None:
    logits, target, options = case(kind, shape)
    if ignore:
        target, options = with_ignored(target), options | {"ignore_index": 255}
    target[0] = 0  # classes 1 and 2 are absent from the first picture's mask
    cells = loop_cells(logits, target, kind)
    for name, score in SCORES.items():
        per_picture = np.array([[formula(name, *cell) for cell in row] for row in cells])
        pooled = np.array([formula(name, *cell) for cell in cells.sum(0)])
        np.testing.assert_array_equal(score(logits, target, reduction="none", **options), per_picture)
        np.testing.assert_array_equal(score(logits, target, reduction="none", batch=True, **options), pooled)
        mean = np.nanmean(np.nanmean(per_picture, axis=1))
        assert score(logits, target, **options).item() == pytest.approx(mean, rel=1e-12)
    if kind != "multiclass":
        table = confusion_matrix(logits, target, **options).flatten(2).numpy()
        np.testing.assert_array_equal(table[..., [3, 1, 2, 0]], cells)
        right = cells[..., [0, 3]].sum() / cells.sum()
    else:
        valid = target != 255
        predicted = logits.argmax(1)
        for i, true, guess in itertools.product(range(3), range(3), range(3)):
            here = valid[i] & (target[i] == true) & (predicted[i] == guess)
            assert confusion_matrix(logits, target, **options)[i, true, guess] == here.sum()
        right = (predicted == target)[valid].double().mean().item()
    assert pixel_accuracy(logits, target, **options).item() == pytest.approx(right)


@pytest.mark.parametrize("shape", [(1000,), (64, 128), (200, 300), (7, 37, 41)], ids=str)
def test_pixels_beyond_what_a_byte_counts_are_counted(shape: tuple[int, ...]) -> None:
    logits, target, _ = case("binary", shape)
    logits += 1  # most are set
    predicted, true = (logits > 0).flatten(1).numpy(), target.flatten(1).numpy() == 1
    cells = [[(t & p).sum() for t in (~true[i], true[i]) for p in (~predicted[i], predicted[i])] for i in range(3)]
    assert confusion_matrix(logits, target).flatten(1).tolist() == cells


@pytest.mark.parametrize("kind", KINDS)
def test_scores_equal_smp(kind: str) -> None:
    smp = library("segmentation_models_pytorch.metrics")
    logits, target, options = case(kind, (8, 9))
    if kind == "multiclass":
        stats = smp.get_stats(logits.argmax(1), target.long(), mode=kind, num_classes=3)
    else:
        stats = smp.get_stats(logits.sigmoid(), target.long(), mode=kind, threshold=0.5)
    names = {
        "dice": "f1_score",
        "iou": "iou_score",
        "precision": "precision",
        "recall": "recall",
        "specificity": "specificity",
    }
    for name, theirs in names.items():
        ours = SCORES[name](logits, target, reduction="none", **options)
        torch.testing.assert_close(ours.float(), getattr(smp, theirs)(*stats, reduction="none"))
        pooled = SCORES[name](logits, target, batch=True, **options)
        torch.testing.assert_close(pooled.float(), getattr(smp, theirs)(*stats, reduction="macro"))
    fbeta = fbeta_score(logits, target, beta=0.5, reduction="none", **options)
    torch.testing.assert_close(fbeta.float(), smp.fbeta_score(*stats, beta=0.5, reduction="none"))


def test_fbeta_is_computed_in_float64() -> None:
    target = torch.ones(1, 10)
    logits = torch.tensor([[[9.0] * 3 + [-9.0] * 7]])
    exact = 1.09 * 3 / (1.09 * 3 + 0.09 * 7)
    assert fbeta_score(logits, target, beta=0.3).item() == pytest.approx(exact, rel=1e-15)
    assert fbeta_score(logits, target, beta=1.0).item() == dice_score(logits, target).item()


def test_scores_equal_torchmetrics() -> None:
    tm = library("torchmetrics.functional.classification")
    logits, target, _ = case("multiclass", (8, 9))
    target = with_ignored(target)
    args = {"num_classes": 3, "ignore_index": 255}
    mask = target.long()
    options: dict[str, Any] = {"ignore_index": 255, "batch": True, "reduction": "none"}
    pairs = [
        (dice_score, tm.multiclass_f1_score),
        (iou_score, tm.multiclass_jaccard_index),
        (precision_score, tm.multiclass_precision),
        (recall_score, tm.multiclass_recall),
        (specificity_score, tm.multiclass_specificity),
    ]
    for ours, theirs in pairs:
        reference = theirs(logits, mask, average="none", **args)
        torch.testing.assert_close(ours(logits, target, **options).float(), reference)
    table = confusion_matrix(logits, target, ignore_index=255).sum(0)
    assert torch.equal(table, tm.multiclass_confusion_matrix(logits, mask, **args))
    accuracy = tm.multiclass_accuracy(logits, mask, average="micro", **args)
    torch.testing.assert_close(pixel_accuracy(logits, target, ignore_index=255).float(), accuracy)
    logits, target, _ = case("binary", (8, 9))
    theirs = tm.binary_fbeta_score(logits.sigmoid(), target, beta=2.0, threshold=0.3)
    torch.testing.assert_close(fbeta_score(logits, target, beta=2, threshold=0.3, batch=True).float(), theirs)


@pytest.mark.parametrize("include_background", [True, False])
def test_scores_equal_monai(include_background: bool) -> None:
    monai = library("monai.metrics")
    logits, target, _ = case("multiclass", (8, 9))
    predicted, true = (F.one_hot(mask.long(), 3).movedim(-1, 1) for mask in (logits.argmax(1), target))
    pairs = [
        (dice_score, monai.compute_dice(predicted, true, include_background)),
        (iou_score, monai.compute_iou(predicted, true, include_background)),
    ]
    for ours, theirs in pairs:
        torch.testing.assert_close(
            ours(logits, target, include_background=include_background).float(), theirs.nanmean(1).nanmean()
        )


def test_the_rule_for_empty_masks() -> None:
    empty, full = torch.zeros(1, 4, 4), torch.ones(1, 4, 4)
    nothing, one = as_logits(empty)[:, None], as_logits(empty)[:, None].clone()
    one[..., 0, 0] = 10
    for score in (dice_score, iou_score, precision_score, recall_score):
        assert score(nothing, empty).isnan()
        assert score(nothing, empty, empty=1.0) == 1
        assert score(one, empty) == 0  # one false positive is enough to count
        assert score(one, empty, empty=1.0) == 0
        assert score(nothing, full) == 0
    assert specificity_score(nothing, empty) == 1
    assert specificity_score(as_logits(full)[:, None], full).isnan()
    assert specificity_score(nothing, full) == 0  # only the prediction has an outside
    ignored = torch.full((1, 4, 4), 255)
    for score in (dice_score, boundary_iou, boundary_f_score, hausdorff_distance):
        assert score(one, ignored, ignore_index=255, empty=1.0).isnan()  # no pixel, no score, whatever `empty` is
    assert pixel_accuracy(one, ignored, ignore_index=255).isnan()
    # A class that is absent leaves the mean of the others alone.
    logits, target, _ = case("multiclass", (5, 6))
    target = target.clamp_max(1)
    logits[:, 2] = -99
    two = dice_score(logits[:, :2], target)
    assert dice_score(logits, target).item() == pytest.approx(two.item(), rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_forms_and_types_are_one(kind: str) -> None:
    logits, target, options = case(kind, (5, 6))
    logits = logits.bfloat16()
    value = dice_score(logits, target, **options)
    forms = [target.to(dtype) for dtype in (torch.int16, torch.int64, torch.uint16, torch.float16, torch.float64)]
    if kind == "binary":
        forms += [target[:, 0], target.bool(), target * 0.2 + 0.4]  # soft masks are cut at 0.5
    if kind == "multiclass":
        one_hot = F.one_hot(target.long(), 3).movedim(-1, 1)
        forms += [target.unsqueeze(1), one_hot, one_hot * 0.4 + 0.2]
    for form in forms:
        assert torch.equal(dice_score(logits, form, **options), value)
    for same in (logits.float(), logits.double(), logits.to(memory_format=torch.channels_last)):
        assert torch.equal(dice_score(same, target, **options), value)


def test_half_is_no_in_masks_as_in_predictions() -> None:
    half = torch.full((1, 4), 0.5)
    assert confusion_matrix(half.logit()[:, None], half).tolist() == [[[[4, 0], [0, 0]]]]


def test_threshold_is_a_probability() -> None:
    logits = torch.tensor([[[0.2, 0.4, 0.6, 0.8]]]).logit()
    target = torch.tensor([[0, 1, 1, 1]])
    assert recall_score(logits, target, threshold=0.3) == 1
    assert recall_score(logits, target, threshold=0.7).item() == pytest.approx(1 / 3)
    assert pixel_accuracy(logits, target, threshold=0.3) == 1
    assert pixel_accuracy(logits, target, threshold=0.7) == 0.5
    with pytest.raises(ValueError, match=r"between 0 and 1, got 0\.0; for logits > 0 it is 0\.5"):
        recall_score(logits, target, threshold=0.0)


# Boundaries and distances


@pytest.mark.parametrize("shape", [(12, 13), (6, 7, 8)], ids=str)
@pytest.mark.parametrize("distance", [1, 2])
def test_boundary_iou_equals_loops(shape: tuple[int, ...], distance: int) -> None:
    predicted, true = blob(0, shape), blob(1, shape)

    def band(mask: np.ndarray) -> np.ndarray:
        padded = np.pad(mask, distance)
        result = np.zeros_like(mask)
        for index in np.ndindex(mask.shape):
            window = padded[tuple(slice(i, i + 2 * distance + 1) for i in index)]
            result[index] = mask[index] and not window.all()
        return result

    for i in range(3):
        p, t = band(predicted[i, 0].numpy()), band(true[i, 0].numpy())
        ours = boundary_iou(as_logits(predicted[i : i + 1]), true[i : i + 1], distance=distance)
        assert ours.item() == pytest.approx((p & t).sum() / (p | t).sum())


def test_boundary_iou_by_default_takes_2_percent_of_the_diagonal() -> None:
    for shape, distance in (((60, 80), 2), ((78, 104), 3), ((6, 8), 1)):
        predicted, true = blob(0, shape), blob(1, shape)
        given = boundary_iou(as_logits(predicted), true, distance=distance)
        assert torch.equal(boundary_iou(as_logits(predicted), true), given)
    with pytest.raises(ValueError, match="distance=0 must be 1 or more"):
        boundary_iou(as_logits(predicted), true, distance=0)
    with pytest.raises(TypeError, match=r"distance=2\.0 must be an integer"):
        boundary_iou(as_logits(predicted), true, distance=2.0)


def edge_points(mask: torch.Tensor) -> np.ndarray:
    """Coordinates of the mask's pixels with one of their 2 d neighbours outside."""
    padded = np.pad(mask.numpy(), 1)
    points = []
    for index in np.argwhere(padded):
        neighbours = [index + sign * step for step in np.eye(padded.ndim, dtype=int) for sign in (1, -1)]
        if not all(padded[tuple(neighbour)] for neighbour in neighbours):
            points.append(index)
    return np.array(points)


def nearest(points: np.ndarray, others: np.ndarray) -> np.ndarray:
    return np.sqrt(((points[:, None] - others[None]) ** 2).sum(-1)).min(1)


def test_edge_scores_equal_loops() -> None:
    library("scipy.ndimage")
    predicted, true = blob(0), blob(1)
    for i in range(3):
        p, t = edge_points(predicted[i, 0]), edge_points(true[i, 0])
        there, back = nearest(p, t), nearest(t, p)
        pair = as_logits(predicted[i : i + 1]), true[i : i + 1]
        assert hausdorff_distance(*pair).item() == pytest.approx(max(there.max(), back.max()))
        p95 = max(np.percentile(there, 95), np.percentile(back, 95))
        assert hausdorff_distance(*pair, percentile=95).item() == pytest.approx(p95)
        a, b = (there <= 1.5).mean(), (back <= 1.5).mean()
        for tolerance in (1.5, torch.tensor(1.5)):
            assert boundary_f_score(*pair, tolerance=tolerance).item() == pytest.approx(2 * a * b / (a + b))


@pytest.mark.parametrize("corner", [(0, 0), (20, 31), (54, 67)])
def test_distances_are_looked_for_where_the_masks_are(corner: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    ndimage = library("scipy.ndimage")
    transform, shapes = ndimage.distance_transform_edt, []

    def noted(image: np.ndarray, **options: Any) -> np.ndarray:
        shapes.append(image.shape)
        return transform(image, **options)

    monkeypatch.setattr(ndimage, "distance_transform_edt", noted)
    (top, left), masks = corner, torch.zeros(2, 1, 60, 73)
    masks[0, 0, top : top + 6, left : left + 4] = 1
    masks[1, 0, top : top + 3, left + 2 : left + 6] = 1
    ours = hausdorff_distance(as_logits(masks[:1]), masks[1:])
    there, back = (nearest(*map(edge_points, pair)) for pair in (masks[:, 0], masks[:, 0].flip(0)))
    assert ours.item() == pytest.approx(max(there.max(), back.max()))
    assert shapes == [(6, 6), (6, 6)]


def test_hausdorff_equals_monai() -> None:
    library("scipy.ndimage")
    monai = library("monai.metrics")
    predicted, true = blob(0), blob(1)
    for percentile, spacing in ((100, None), (95, None), (95, (0.5, 2.0))):
        ours = hausdorff_distance(as_logits(predicted), true, percentile=percentile, spacing=spacing, reduction="none")
        theirs = monai.compute_hausdorff_distance(
            predicted, true, include_background=True, percentile=percentile, spacing=spacing
        )
        torch.testing.assert_close(ours, theirs.double(), rtol=1e-6, atol=1e-6)


def test_boundaries_of_absent_classes() -> None:
    library("scipy.ndimage")
    empty, square = torch.zeros(1, 1, 9, 9), torch.zeros(1, 1, 9, 9)
    square[..., 2:6, 3:7] = 1
    for score, alone, same in ((hausdorff_distance, math.inf, 0), (boundary_f_score, 0, 1), (boundary_iou, 0, 1)):
        assert score(as_logits(empty), empty).isnan()
        assert score(as_logits(empty), empty, empty=1.0) == 1
        assert score(as_logits(square), empty) == alone
        assert score(as_logits(empty), square) == alone
        assert score(as_logits(square), square) == same
    ignored = square * 255  # nothing to be found in what is left
    assert boundary_iou(as_logits(square), ignored, ignore_index=255).isnan()
    assert boundary_iou(as_logits(square), ignored, ignore_index=255, empty=1.0) == 1
    pictures = torch.cat([ignored, torch.full_like(ignored, 255)])  # of the second no pixel counts
    for score in (hausdorff_distance, boundary_f_score, boundary_iou):
        scores = score(as_logits(square.expand(2, -1, -1, -1)), pictures, ignore_index=255, empty=1.0, reduction="none")
        assert scores[:, 0].tolist() == pytest.approx([1, math.nan], nan_ok=True)
        classes = as_logits(torch.cat([1 - square, square], 1)).expand(2, -1, -1, -1)
        scores = score(classes, pictures, ignore_index=255, empty=1.0, reduction="none")
        assert scores.isnan().tolist() == [[False, False], [True, True]]
    assert hausdorff_distance(as_logits(square), ignored, ignore_index=255).isnan()
    with pytest.raises(TypeError, match="batch"):
        hausdorff_distance(as_logits(square), square, batch=True)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"a score has no option average; it has .*reduction"):
        dice_score(as_logits(square), square, average="macro")  # type: ignore[call-arg]


def test_boundary_scores_of_many_classes() -> None:
    library("scipy.ndimage")
    _, target, _ = case("multiclass", (7, 8))
    logits, _, _ = case("multiclass", (7, 8), seed=1)
    for score in (boundary_iou, boundary_f_score, hausdorff_distance):
        table = score(logits, target, reduction="none")
        assert table.shape == (3, 3)
        for c in range(3):
            alone = score(as_logits(logits.argmax(1, keepdim=True) == c), target == c, reduction="none")
            assert torch.equal(table[:, c], alone[:, 0])
        assert score(logits, target).item() == pytest.approx(table.mean().item())
        means = score(logits, target, include_background=False)
        assert means.item() == pytest.approx(table[:, 1:].mean().item())
        binary = logits[:, :1], target == 0  # whose one channel is no background
        assert torch.equal(score(*binary, include_background=False), score(*binary))


# Calibration


@pytest.mark.parametrize("ignore", [False, True])
def test_calibration_equals_torchmetrics(ignore: bool) -> None:
    tm = library("torchmetrics.functional.classification")
    options = {"ignore_index": 255} if ignore else {}
    logits, target, _ = case("binary", (20, 20))
    mask = with_ignored(target) if ignore else target
    theirs = tm.binary_calibration_error(logits.sigmoid(), mask.long(), n_bins=10, **options)
    torch.testing.assert_close(calibration_error(logits, mask, bins=10, **options).float(), theirs)
    logits, target, _ = case("multiclass", (20, 20))
    mask = with_ignored(target) if ignore else target
    theirs = tm.multiclass_calibration_error(logits.softmax(1), mask.long(), num_classes=3, n_bins=15, **options)
    torch.testing.assert_close(calibration_error(logits, mask, **options).float(), theirs)


def test_calibration_of_known_probabilities() -> None:
    logits = torch.tensor([0.25, 0.25, 0.25, 0.25, 1 - 1e-9, 1e-9], dtype=torch.float64).logit().view(1, 1, 6)
    target = torch.tensor([[0, 0, 0, 1, 0, 0]])
    assert calibration_error(logits, target).item() == pytest.approx(1 / 6)  # one sure pixel of six is wrong
    logits, target, options = case("multilabel", (5, 6))
    swapped = calibration_error(logits.transpose(0, 1), target.transpose(0, 1), **options)
    torch.testing.assert_close(calibration_error(logits, target, **options), swapped)


def test_calibration_of_infinite_logits() -> None:
    logits = torch.tensor([[[math.inf, -math.inf]]])
    assert calibration_error(logits, torch.tensor([[1, 1]])) == 0.5
    assert calibration_error(torch.cat([logits, logits], 1), torch.tensor([[1, 0]])).isnan()  # as its softmax is


def test_no_score_keeps_the_graph_of_a_training_step() -> None:
    logits, target = torch.randn(2, 1, 4, 4, requires_grad=True), torch.ones(2, 4, 4)
    for score in (calibration_error, dice_score, boundary_iou, pixel_accuracy):
        assert not score(logits, target).requires_grad


@pytest.mark.parametrize(
    "score", [pixel_accuracy, dice_score, boundary_iou, boundary_f_score, hausdorff_distance, calibration_error]
)
@pytest.mark.parametrize("kind", KINDS)
def test_nan_is_refused_where_pixels_count(kind: str, score: Any) -> None:
    logits, target, options = case(kind, (5, 6))
    target[0, ..., 2, 3] = 255
    expected = score(logits, target, ignore_index=255, **options)
    logits[0, -1, 2, 3] = math.nan
    assert score(logits, target, ignore_index=255, **options) == expected
    target[0, ..., 2, 3] = 0
    for ignore_index in (None, 255):
        with pytest.raises(ValueError, match=r"logits must hold numbers, found nan; the network diverged, .* learning rate"):
            score(logits, target, ignore_index=ignore_index, **options)


# Other devices


@pytest.mark.parametrize("score", [calibration_error, boundary_iou, dice_score])
def test_mps_has_no_float64(score: Any) -> None:
    logits, target, _ = case("binary", (20, 20))
    assert score(logits.as_subclass(OnMps), target.as_subclass(OnMps)) == score(logits, target)


def test_distances_are_on_the_cpu_whatever_the_default_device() -> None:
    logits, target, _ = case("binary", (20, 20))
    expected = hausdorff_distance(logits, target)
    with torch.device("meta"):
        assert hausdorff_distance(logits, target).item() == expected.item()


# Keywords


@pytest.mark.parametrize(
    ("score", "options", "message"),
    [
        (calibration_error, {"bins": 0}, "bins=0 must be 1 or more"),
        (fbeta_score, {"beta": -1}, r"beta must be from 0 to 1e\+06, not -1"),
        (fbeta_score, {"beta": math.inf}, r"beta must be from 0 to 1e\+06, not inf"),
        (boundary_f_score, {"tolerance": -1}, "tolerance must be 0 or more, not -1"),
        (hausdorff_distance, {"percentile": 101}, "percentile must be from 0 to 100, not 101"),
        (hausdorff_distance, {"spacing": (1.0, 0.0)}, r"spacing .* 2 numbers above 0, not \(1\.0, 0\.0\)"),
        (hausdorff_distance, {"spacing": (1.0, 1.0, 1.0)}, r"2 numbers above 0, not \(1\.0, 1\.0, 1\.0\)"),
        (hausdorff_distance, {"spacing": 0.5}, r"2 numbers above 0, not 0\.5"),
        (hausdorff_distance, {"spacing": (1.0, math.inf)}, r"2 numbers above 0, not \(1\.0, inf\)"),
        (hausdorff_distance, {"spacing": (1.0, None)}, r"2 numbers above 0, not \(1\.0, None\)"),
    ],
)
def test_keywords_out_of_range_are_named(score: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score(torch.ones(1, 1, 4, 4), torch.ones(1, 4, 4), **options)


# The accumulator


def fill(metrics: SegmentationMetrics, logits: torch.Tensor, target: torch.Tensor, sizes: list[int]) -> SegmentationMetrics:
    for x, y in zip(logits.split(sizes), target.split(sizes), strict=True):
        metrics.update(x, y)
    return metrics


def accumulator(kind: str, **options: Any) -> SegmentationMetrics:
    return SegmentationMetrics(1 if kind == "binary" else 3, multilabel=kind == "multilabel", **options)


@pytest.mark.parametrize("include_background", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_streamed_scores_are_those_of_the_functions(kind: str, include_background: bool) -> None:
    logits, target, options = case(kind, (5, 6), n=7)
    target[0] = 0
    target = with_ignored(target)
    metrics = accumulator(kind, ignore_index=255, include_background=include_background, keep_pictures=True)
    fill(metrics, logits, target, [3, 1, 3])
    result, per_class, per_picture = metrics.compute(), metrics.per_class(), metrics.per_picture()
    options |= {"ignore_index": 255, "include_background": include_background}
    for name, score in SCORES.items():
        assert result[name] == pytest.approx(score(logits, target, **options).item(), rel=1e-12)
        assert result[f"{name}_pooled"] == pytest.approx(score(logits, target, batch=True, **options).item(), rel=1e-12)
        table = score(logits, target, reduction="none", **options)
        np.testing.assert_allclose(per_class[name], table.nanmean(0), rtol=1e-12)
        pooled = score(logits, target, batch=True, reduction="none", **options)
        np.testing.assert_array_equal(per_class[f"{name}_pooled"], pooled)
        first = 0 if include_background or kind != "multiclass" else 1
        np.testing.assert_allclose(per_picture[name], table[:, first:].nanmean(1), rtol=1e-12)
    accuracy = pixel_accuracy(logits, target, **{k: v for k, v in options.items() if k != "include_background"})
    assert result["accuracy"] == accuracy.item()
    assert list(result) == [f"{name}{end}" for name in SCORES for end in ("", "_pooled")] + ["accuracy"]
    assert metrics.pictures == 7
    table = confusion_matrix(logits, target, ignore_index=255, multilabel=kind == "multilabel").sum(0)
    assert torch.equal(metrics.confusion, table[0] if kind == "binary" else table)


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.sampled_from(KINDS), st.lists(st.integers(1, 4), min_size=1, max_size=5), st.data())
def test_batches_order_and_merging_change_no_bit(seed: int, kind: str, sizes: list[int], data: st.DataObject) -> None:
    logits, target, _ = case(kind, (7,), seed, n=sum(sizes))
    whole = fill(accumulator(kind), logits, target, [sum(sizes)])
    order = torch.tensor(data.draw(st.permutations(range(sum(sizes)))))
    split = fill(accumulator(kind), logits[order], target[order], sizes)
    cut = data.draw(st.integers(0, sum(sizes)))
    left, right = accumulator(kind), accumulator(kind)
    if cut:
        left.update(logits[:cut], target[:cut])
    if cut < sum(sizes):
        right.update(logits[cut:], target[cut:])
    left.merge(right)
    expected = repr((whole.compute(), whole.per_class(), whole.confusion.tolist(), whole.pictures))
    for other in (split, left):
        assert repr((other.compute(), other.per_class(), other.confusion.tolist(), other.pictures)) == expected


def test_the_mean_over_pictures_is_exact() -> None:
    metrics = SegmentationMetrics(keep_pictures=True)
    logits, target, _ = case("binary", (5, 6), n=200)
    metrics.update(logits, target)
    scores = metrics.per_picture()["dice"]
    assert metrics.compute()["dice"] == float(sum(map(Fraction, scores)) / 200)


def test_memory_is_constant_unless_pictures_are_kept() -> None:
    def tensors(metrics: SegmentationMetrics) -> int:
        flat = [v for value in vars(metrics).values() for v in (value if isinstance(value, list) else [value])]
        return sum(v.numel() for v in flat if isinstance(v, torch.Tensor))

    for keep, growth in ((False, 0), (True, 4 * 5)):
        metrics = SegmentationMetrics(keep_pictures=keep)
        before = tensors(metrics)
        for size in ((4, 4), (5, 7)):  # pictures may differ in size
            metrics.update(torch.zeros(2, 1, *size), torch.zeros(2, *size))
        assert tensors(metrics) - before == growth


def test_a_call_returns_the_batchs_own_scores() -> None:
    metrics, mask = SegmentationMetrics(), torch.ones(1, 4, 4)
    assert metrics(as_logits(mask)[:, None], mask)["dice"] == 1
    assert metrics(as_logits(1 - mask)[:, None], mask)["dice"] == 0
    assert metrics.compute()["dice"] == 0.5


def test_repr_has_the_options_and_the_pictures() -> None:
    logits, target, _ = case("multiclass", (5, 6))
    metrics = fill(SegmentationMetrics(3, ignore_index=255), logits, target, [3])
    shown = repr(metrics)
    assert shown.startswith("<SegmentationMetrics(num_classes=3, threshold=0.5, ")
    assert shown.endswith(", ignore_index=255, multilabel=False) of 3 pictures>")


def test_two_masks_are_scored_as_logits() -> None:
    logits, target, _ = case("multiclass", (5, 6))
    predicted = logits.argmax(1)
    for mask in (target.long(), target.bool()):
        with pytest.raises(TypeError, match=r"Metrics take a mask .* mask\[:, None\]\.float\(\) if binary, else as .*one_hot"):
            dice_score(mask, target)
    assert dice_score(F.one_hot(predicted, 3).movedim(-1, 1).float(), target) == dice_score(logits, target)
    binary = logits[:, :1]
    assert dice_score((binary[:, 0] > 0)[:, None].float(), target > 0) == dice_score(binary, target > 0)


def test_reset_and_empty_accumulators() -> None:
    metrics = SegmentationMetrics(3)
    assert all(math.isnan(value) for value in metrics.compute().values())
    assert SegmentationMetrics(keep_pictures=True).per_picture() == {name: [] for name in SCORES}
    logits, target, _ = case("multiclass", (5, 6))
    first = metrics(logits, target)  # torchmetrics' style: counts, and returns the batch's own scores
    assert first == metrics.compute()
    second = metrics(logits.flip(0), target)
    assert second != first
    assert metrics.pictures == 6
    metrics.reset()
    assert metrics.pictures == 0
    assert metrics(logits, target) == first


def test_empty_pictures_in_a_data_set() -> None:
    square, empty = torch.zeros(1, 4, 4), torch.zeros(1, 4, 4)
    square[:, :2] = 1
    left_out, kaggle = SegmentationMetrics(), SegmentationMetrics(empty=1.0)
    for metrics in (left_out, kaggle):
        metrics.update(as_logits(square)[:, None], torch.ones(1, 4, 4))  # Dice 2/3
        metrics.update(as_logits(empty)[:, None], empty)
    assert left_out.compute()["dice"] == pytest.approx(2 / 3)
    assert kaggle.compute()["dice"] == pytest.approx((2 / 3 + 1) / 2)
    for metrics in (left_out, kaggle):
        metrics.update(as_logits(square)[:, None], empty)  # false positives score 0 under both rules
    assert left_out.compute()["dice"] == pytest.approx(2 / 3 / 2)
    assert kaggle.compute()["dice"] == pytest.approx((2 / 3 + 1) / 3)


@pytest.mark.parametrize("value", ["255", True, 255.0])
def test_an_ignored_value_that_is_no_integer_is_refused_before_anything_is_counted(value):
    with pytest.raises(TypeError, match=f"ignore_index={value!r} must be an integer, such as ignore_index=255, or None"):
        SegmentationMetrics(3, ignore_index=value)


def test_accumulator_names_bad_input() -> None:
    with pytest.raises(ValueError, match="num_classes=0 must be 1 or more"):
        SegmentationMetrics(0)
    for threshold in (5, "0.5"):
        with pytest.raises(ValueError, match=f"threshold is a probability between 0 and 1, got {threshold!r}"):
            SegmentationMetrics(threshold=threshold)
    with pytest.raises(ValueError, match=r"\(2, 3, 4, 4\) do not have num_classes=1 channels"):
        SegmentationMetrics().update(torch.zeros(2, 3, 4, 4), torch.zeros(2, 4, 4))
    for score in (SegmentationMetrics().update, boundary_iou):
        with pytest.raises(TypeError, match="logits"):
            score([[[0.0, 1.0]]], torch.zeros(1, 2))
    with pytest.raises(ValueError, match="found 255"):
        SegmentationMetrics().update(torch.zeros(2, 1, 4, 4), torch.full((2, 4, 4), 255))
    same = SegmentationMetrics(threshold=np.float64(0.5), empty=np.float32(1.0), ignore_index=np.int64(255))
    SegmentationMetrics(empty=1, ignore_index=255).merge(same)
    with pytest.raises(ValueError, match=r"different options: .*'threshold': 0\.5.*'threshold': 0\.4"):
        SegmentationMetrics().merge(SegmentationMetrics(threshold=0.4))
    with pytest.raises(TypeError, match="merge takes one SegmentationMetrics, got list; merge several one by one"):
        SegmentationMetrics().merge([SegmentationMetrics()])
    with pytest.raises(ValueError, match="keep_pictures=True"):
        SegmentationMetrics().per_picture()
    with pytest.raises(ValueError, match="'mean' or 'none', got 'sum'"):
        dice_score(torch.zeros(2, 1, 4, 4), torch.zeros(2, 4, 4), reduction="sum")


PROCESS = """
import sys, torch
from unetlib.metrics import SegmentationMetrics
rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
logits, target = torch.load(f"{folder}/data.pt")
metrics = SegmentationMetrics(3, keep_pictures=True)
share = slice(0, 2) if rank == 0 else slice(2, None)
metrics.update(logits[share], target[share])
total = metrics.all_gather()
assert metrics.pictures == (2 if rank == 0 else 5)
torch.save((total.compute(), total.per_class(), total.per_picture(), total.confusion), f"{folder}/{rank}.pt")
torch.distributed.destroy_process_group()
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_two_processes_equal_one_to_the_last_bit(tmp_path: Path) -> None:
    logits, target, _ = case("multiclass", (5, 6), n=7)
    torch.save((logits, target), tmp_path / "data.pt")
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[1] / "src"), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-c", PROCESS]
    processes = [
        subprocess.Popen([*command, str(rank), str(tmp_path)], env=os.environ | {"PYTHONPATH": path}) for rank in (0, 1)
    ]
    assert [process.wait(timeout=600) for process in processes] == [0, 0]
    one = SegmentationMetrics(3, keep_pictures=True)
    one.update(logits, target)
    expected = (one.compute(), one.per_class(), one.per_picture(), one.confusion)
    for rank in (0, 1):
        assert repr(torch.load(tmp_path / f"{rank}.pt")) == repr(expected)


def test_alone_what_is_gathered_is_the_same() -> None:
    logits, target, _ = case("multiclass", (5, 6))
    metrics = SegmentationMetrics(3, keep_pictures=True)
    metrics.update(logits, target)
    total = metrics.all_gather()
    assert (total.compute(), total.per_picture()) == (metrics.compute(), metrics.per_picture())
    total.update(logits, target)
    assert metrics.pictures == 3


def test_update_reads_no_value_from_the_device() -> None:
    for kind in KINDS:
        with FakeTensorMode():
            metrics = accumulator(kind, ignore_index=255, keep_pictures=True)
            channels = metrics.num_classes
            shape = (2, 5, 6) if kind == "multiclass" else (2, channels, 5, 6)
            for dtype in (torch.uint8, torch.float32):
                target = torch.empty(shape, device="cuda", dtype=dtype)
                logits = torch.empty(2, channels, 5, 6, device="cuda")
                with OneDevice():
                    metrics.update(logits, target)


def test_plot_draws_the_confusion_and_the_pictures() -> None:
    library("matplotlib")
    for kind in KINDS:
        logits, target, _ = case(kind, (5, 6))
        metrics = fill(accumulator(kind, keep_pictures=True), logits, target, [3])
        names = ["background", "car"] if kind == "binary" else ["a", "b", "c"]
        figure = metrics.plot(np.array(names))
        matrix, histogram = figure.axes
        assert [label.get_text() for label in matrix.get_yticklabels()] == names
        shares = matrix.images[0].get_array()
        np.testing.assert_allclose(shares.sum(1), 1)
        for text, share in zip(matrix.texts, shares.flat, strict=True):
            assert (text.get_text(), text.get_color()) == (f"{share:.3f}", "white" if share > 0.5 else "black")
        table = metrics.confusion.double()
        table = table.flatten(1) if kind == "multilabel" else table
        np.testing.assert_allclose(shares, table / table.sum(1, keepdim=True), rtol=1e-6)
        assert matrix.get_title() == ("share of all pixels" if kind == "multilabel" else "share of the true class's pixels")
        assert sum(bar.get_height() for bar in histogram.patches) == 3
        with pytest.raises(ValueError, match="class_names must name"):
            metrics.plot(["a"])
    assert len(SegmentationMetrics().plot().axes) == 1
    for classes, written in ((12, 144), (13, 0)):
        assert len(SegmentationMetrics(classes).plot().axes[0].texts) == written


def test_plot_without_matplotlib_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"a plot needs it: pip install 'unetlib\[metrics\]'"):
        SegmentationMetrics().plot()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("kind", KINDS)
def test_cuda_counts_equal_cpu_counts(kind: str) -> None:
    logits, target, _ = case(kind, (5, 6))
    cpu, cuda = accumulator(kind), accumulator(kind)
    cpu.update(logits, target)
    x, y = logits.cuda(), target.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        cuda.update(x, y)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert cuda.compute() == cpu.compute()
    cpu.merge(cuda)
    assert cpu.pictures == 6


def test_one_hot_masks_may_be_bools() -> None:
    torch.manual_seed(0)
    logits, mask = torch.randn(2, 3, 4, 4), torch.randint(3, (2, 4, 4))
    one_hot = F.one_hot(mask, 3).movedim(-1, 1).bool()
    torch.testing.assert_close(dice_score(logits, one_hot), dice_score(logits, mask))


@pytest.mark.parametrize("empty", [math.inf, -0.5, 1e12, "x"])
def test_the_score_of_an_absent_class_is_nan_or_a_share(empty: Any) -> None:
    nothing = torch.zeros(1, 1, 4, 4), torch.zeros(1, 4, 4)
    with pytest.raises(ValueError, match=re.escape(f"nan, or from 0 to 1, got {empty!r}")):
        SegmentationMetrics(empty=empty)
    for score in dice_score, boundary_f_score:
        with pytest.raises(ValueError, match=re.escape(f"nan, or from 0 to 1, got {empty!r}")):
            score(*nothing, empty=empty)


def test_the_distance_of_an_absent_class_is_nan_or_any_number_from_0() -> None:
    nothing = torch.full((1, 1, 4, 4), -9.0), torch.zeros(1, 4, 4)
    assert hausdorff_distance(*nothing, empty=5.7) == 5.7
    assert hausdorff_distance(*nothing, empty=math.inf) == math.inf
    with pytest.raises(ValueError, match=re.escape("nan, or 0 or more, got -1")):
        hausdorff_distance(*nothing, empty=-1)


def test_options_that_scores_of_edges_do_not_have_are_named() -> None:
    with pytest.raises(TypeError, match="a score of edges has no option bach"):
        hausdorff_distance(torch.zeros(1, 1, 4, 4), torch.zeros(1, 4, 4), bach=True)
