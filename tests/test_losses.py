"""Losses against float64 NumPy loops, other libraries and numerical derivatives, and the promises of the policy."""

from __future__ import annotations

import functools
import importlib
import inspect
import math
import pickle
import re
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any, Literal, get_type_hints

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import unetlib
from unetlib import losses, targets
from unetlib.gradients import RegionSums
from unetlib.losses import (
    BCEDiceLoss,
    CompoundLoss,
    CrossEntropyLoss,
    DiceLoss,
    Loss,
    TverskyLoss,
    bce_dice_loss,
    cross_entropy_loss,
    dice_loss,
    focal_loss,
    generalized_dice_loss,
    jaccard_loss,
    lovasz_loss,
    mcc_loss,
    soft_cldice_loss,
    tversky_loss,
)
from unetlib.terms import border_map

KINDS = ("binary", "multiclass", "multilabel")
SHAPES = ((24,), (5, 6), (3, 4, 5))
ALL = {
    "cross_entropy": (cross_entropy_loss, {}),
    "focal": (focal_loss, {"gamma": 1.5}),
    "dice": (dice_loss, {}),
    "dice log": (dice_loss, {"log": True}),
    "dice squared": (dice_loss, {"squared": True}),
    "dice batch": (dice_loss, {"batch": True}),
    "dice smooth 0": (dice_loss, {"smooth": 0.0}),
    "jaccard": (jaccard_loss, {}),
    "tversky": (tversky_loss, {"alpha": 0.3, "beta": 0.7}),
    "focal tversky": (tversky_loss, {"gamma": 0.75}),
    "generalized dice": (generalized_dice_loss, {}),
    "mcc": (mcc_loss, {}),
    "mcc smooth 0": (mcc_loss, {"smooth": 0.0}),
    "lovasz": (lovasz_loss, {}),
    "cldice": (soft_cldice_loss, {"iterations": 1}),
    "bce dice": (bce_dice_loss, {"border_weight": 3.0, "border_size": 3}),
}


def library(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError:
        pytest.skip(f"{name} is not installed; it comes with the test extra: pip install 'unetlib[test]'")


def case(kind: str, shape: tuple[int, ...], seed: int = 0, n: int = 2) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Float64 logits, a hard mask, and the keywords of the kind."""
    generator = torch.Generator().manual_seed(seed)
    channels = 1 if kind == "binary" else 3
    logits = 2 * torch.randn(n, channels, *shape, generator=generator, dtype=torch.float64)
    if kind == "multiclass":
        return logits, torch.randint(0, channels, (n, *shape), generator=generator), {}
    target = torch.randint(0, 2, (n, channels, *shape), generator=generator)
    return logits, target, {"multilabel": True} if kind == "multilabel" else {}


class Numpy:
    """Each loss once more, in loops over pictures and classes: terms as (N, C) or, per picture, (N,)."""

    def __init__(self, logits: torch.Tensor, target: torch.Tensor, kind: str, ignore_index: int | None = None) -> None:
        x = logits.numpy().reshape(*logits.shape[:2], -1)
        self.shape = logits.shape[2:]
        self.kind, (self.n, self.c, _) = kind, x.shape
        mask = target.numpy().reshape(self.n, -1, x.shape[2])
        if kind == "multiclass":
            self.p = np.exp(x) / np.exp(x).sum(1, keepdims=True)
            self.t = np.concatenate([mask == c for c in range(self.c)], axis=1).astype(float)
        else:
            self.p, self.t = 1 / (1 + np.exp(-x)), (mask == 1).astype(float)
        self.x, self.valid = x, np.broadcast_to(mask != ignore_index, x.shape)

    def each(self, term: Any, batch: bool) -> np.ndarray:
        """Apply `term(p, t, x)` to the pixels that count of each picture and class."""

        def pixels(values: np.ndarray, i: int | slice, c: int) -> np.ndarray:
            return values[i, c][self.valid[i, c]]

        pictures: list[Any] = [slice(None)] if batch else list(range(self.n))
        terms = [[term(*(pixels(v, i, c) for v in (self.p, self.t, self.x))) for c in range(self.c)] for i in pictures]
        return np.array(terms[0] if batch else terms)

    def dice(self, smooth: float = 1.0, squared: bool = False, log: bool = False, batch: bool = False) -> np.ndarray:
        def term(p: np.ndarray, t: np.ndarray, _: np.ndarray) -> float:
            power = 2 if squared else 1
            score = (2 * sum(p * t) + smooth) / (sum(p**power) + sum(t**power) + smooth)
            return -math.log(score) if log else 1 - score

        return self.each(term, batch)

    def jaccard(self, smooth: float = 1.0, log: bool = False, batch: bool = False) -> np.ndarray:
        def term(p: np.ndarray, t: np.ndarray, _: np.ndarray) -> float:
            score = (sum(p * t) + smooth) / (sum(p + t - p * t) + smooth)
            return -math.log(score) if log else 1 - score

        return self.each(term, batch)

    def tversky(self, alpha: float, beta: float, gamma: float = 1.0, smooth: float = 1.0, batch: bool = False) -> np.ndarray:
        def term(p: np.ndarray, t: np.ndarray, _: np.ndarray) -> float:
            tp, fp, fn = sum(p * t), sum(p * (1 - t)), sum((1 - p) * t)
            return (1 - (tp + smooth) / (tp + alpha * fp + beta * fn + smooth)) ** gamma

        return self.each(term, batch)

    def mcc(self, smooth: float = 1.0, batch: bool = False) -> np.ndarray:
        def term(p: np.ndarray, t: np.ndarray, _: np.ndarray) -> float:
            tp, tn = sum(p * t) + smooth, sum((1 - p) * (1 - t)) + smooth
            fp, fn = sum(p * (1 - t)), sum((1 - p) * t)
            root = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
            return 1 - (tp * tn - fp * fn) / root if root else 1.0

        return self.each(term, batch)

    def generalized_dice(self, smooth: float = 1.0) -> np.ndarray:
        terms = []
        for p, t, valid in zip(self.p, self.t, self.valid, strict=True):
            size = (t * valid).sum(1)
            w = 1 / size**2 * size.min() ** 2
            tp, total = (p * t * valid).sum(1), ((p + t) * valid).sum(1)
            terms.append(1 - (2 * w @ tp + smooth) / (w @ total + smooth))
        return np.array(terms)

    def lovasz(self, batch: bool = False) -> np.ndarray:
        def jaccard(wrong: list[int], mask: np.ndarray) -> float:
            """Jaccard loss of the prediction that is wrong at these pixels alone."""
            predicted = mask.astype(bool).copy()
            predicted[wrong] ^= True
            union = (predicted | mask.astype(bool)).sum()
            return 1 - (predicted & mask.astype(bool)).sum() / union if union else 0.0

        def term(p: np.ndarray, t: np.ndarray, x: np.ndarray) -> float:
            errors = abs(t - p) if self.kind == "multiclass" else 1 - x * (2 * t - 1)
            order = list(np.argsort(-errors))
            steps = (jaccard(order[: k + 1], t) - jaccard(order[:k], t) for k in range(len(order)))
            return sum(max(errors[i], 0) * step for i, step in zip(order, steps, strict=True))

        return self.each(term, batch)

    def cldice(self, iterations: int, smooth: float = 1.0) -> np.ndarray:
        ndimage = library("scipy.ndimage")
        cross = ndimage.generate_binary_structure(len(self.shape), 1)
        box = np.ones([3] * len(self.shape))

        def erode(image: np.ndarray) -> np.ndarray:
            return ndimage.grey_erosion(image, footprint=cross, mode="constant", cval=np.inf)

        def residue(image: np.ndarray) -> np.ndarray:
            return np.maximum(image - ndimage.grey_dilation(erode(image), footprint=box, mode="constant", cval=-np.inf), 0)

        def skeleton(flat: np.ndarray) -> np.ndarray:
            image = flat.reshape(self.shape)
            result = residue(image)
            for _ in range(iterations):
                image = erode(image)
                result = result + np.maximum(residue(image) * (1 - result), 0)
            return result.ravel()

        def term(p: np.ndarray, t: np.ndarray) -> float:
            a = (sum(skeleton(p) * t) + smooth) / (sum(skeleton(p)) + smooth)
            b = (sum(skeleton(t) * p) + smooth) / (sum(skeleton(t)) + smooth)
            return 1 - 2 * a * b / (a + b)

        p, t = self.p * self.valid, self.t * self.valid
        return np.array([[term(p[i, c], t[i, c]) for c in range(self.c)] for i in range(self.n)])

    def cross_entropy(self) -> np.ndarray:
        """A term for each pixel that counts."""
        if self.kind == "multiclass":
            return -np.log((self.p * self.t).sum(1)[self.valid[:, 0]])
        return -np.log(np.where(self.t == 1, self.p, 1 - self.p))[self.valid]

    def border(self, size: int) -> np.ndarray:
        """Whether a window's pixels that count are mixed for some class, (N, pixels)."""
        t, valid = (values.reshape(self.n, self.c, *self.shape) for values in (self.t, self.valid))
        result = np.zeros((self.n, *self.shape), bool)
        for index in np.ndindex(result.shape):
            window = tuple(slice(max(0, i - size // 2), i + size // 2 + 1) for i in index[1:])
            shares = [t[index[0], c][window][valid[index[0], c][window]] for c in range(self.c)]
            result[index] = any(len(share) and 0.01 < share.mean() < 0.99 for share in shares)
        return result.reshape(self.n, -1)


def with_ignored(target: torch.Tensor, seed: int = 5) -> torch.Tensor:
    drop = torch.rand(target.shape, generator=torch.Generator().manual_seed(seed)) < 0.25
    return target.masked_fill(drop, 255)


# Against NumPy


@pytest.mark.parametrize("ignore_index", [None, 255])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_region_losses_equal_loops(kind: str, shape: tuple[int, ...], ignore_index: int | None) -> None:
    logits, target, options = case(kind, shape)
    if ignore_index is not None:
        target = with_ignored(target)
    loops = Numpy(logits, target, kind, ignore_index)
    options |= {"reduction": "none", "ignore_index": ignore_index}
    for batch in (False, True):
        pooled = options | {"batch": batch}
        pairs = [
            (dice_loss(logits, target, **pooled), loops.dice(batch=batch)),
            (dice_loss(logits, target, smooth=0, **pooled), loops.dice(0, batch=batch)),
            (dice_loss(logits, target, squared=True, **pooled), loops.dice(squared=True, batch=batch)),
            (dice_loss(logits, target, log=True, **pooled), loops.dice(log=True, batch=batch)),
            (jaccard_loss(logits, target, **pooled), loops.jaccard(batch=batch)),
            (jaccard_loss(logits, target, log=True, smooth=3, **pooled), loops.jaccard(3, log=True, batch=batch)),
            (tversky_loss(logits, target, alpha=0.3, beta=0.7, **pooled), loops.tversky(0.3, 0.7, batch=batch)),
            (tversky_loss(logits, target, gamma=0.75, **pooled), loops.tversky(0.5, 0.5, 0.75, batch=batch)),
            (mcc_loss(logits, target, **pooled), loops.mcc(batch=batch)),
            (mcc_loss(logits, target, smooth=0, **pooled), loops.mcc(0, batch=batch)),
            (lovasz_loss(logits, target, **pooled), loops.lovasz(batch=batch)),
        ]
        for ours, reference in pairs:
            np.testing.assert_allclose(ours.numpy(), reference, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(generalized_dice_loss(logits, target, **options), loops.generalized_dice(), rtol=1e-9)
    np.testing.assert_allclose(soft_cldice_loss(logits, target, iterations=2, **options), loops.cldice(2), rtol=1e-9)


@pytest.mark.parametrize("ignore_index", [None, 255])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_pixel_losses_equal_loops(kind: str, shape: tuple[int, ...], ignore_index: int | None) -> None:
    logits, target, options = case(kind, shape)
    if ignore_index is not None:
        target = with_ignored(target)
    options |= {"ignore_index": ignore_index}
    loops = Numpy(logits, target, kind, ignore_index)
    entropy = loops.cross_entropy()
    assert cross_entropy_loss(logits, target, **options).item() == pytest.approx(entropy.mean(), rel=1e-9)
    assert cross_entropy_loss(logits, target, reduction="sum", **options).item() == pytest.approx(entropy.sum(), rel=1e-9)
    focal = (1 - np.exp(-entropy)) ** 1.5 * entropy
    assert focal_loss(logits, target, gamma=1.5, **options).item() == pytest.approx(focal.mean(), rel=1e-9)


@pytest.mark.parametrize("ignore_index", [None, 255])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [3, 5])
def test_border_weights_equal_loops(kind: str, shape: tuple[int, ...], ignore_index: int | None, size: int) -> None:
    logits, target, options = case(kind, shape)
    target = target * 0
    target[..., : shape[-1] // 2] = 1  # half the picture, so that some windows are pure
    if ignore_index is not None:
        target = with_ignored(target)
    options |= {"ignore_index": ignore_index}
    loops = Numpy(logits, target, kind, ignore_index)
    border = loops.border(size)
    assert border.any()
    assert not border.all()
    for weight in (4.0, 0.0):
        w = np.broadcast_to(np.where(border, weight, 1.0)[:, None], loops.valid.shape) * loops.valid
        tp, p, t = ((w * v).sum(2) for v in (loops.p * loops.t, loops.p, loops.t))
        w = w[:, 0][loops.valid[:, 0]] if kind == "multiclass" else w[loops.valid]
        reference = (w * loops.cross_entropy()).sum() / w.sum() + (1 - (2 * tp + 1) / (p + t + 1)).mean()
        value = bce_dice_loss(logits, target, border_weight=weight, border_size=size, **options)
        assert value.item() == pytest.approx(reference)
    plain = cross_entropy_loss(logits, target, **options) + dice_loss(logits, target, **options)
    assert bce_dice_loss(logits, target, **options).item() == pytest.approx(plain.item())


@pytest.mark.parametrize("kind", KINDS)
def test_ignored_pixels_make_no_border(kind: str) -> None:
    logits, target, options = case(kind, (5, 6))
    target = target * 0 + 1
    target[..., 1, 3] = 0  # one corner of what is left
    options |= {"border_weight": 3.0, "border_size": 3}
    cut = bce_dice_loss(logits[..., 1:5, 3:], target[..., 1:5, 3:], **options)
    frame = torch.full_like(target, 255)
    frame[..., 1:5, 3:] = target[..., 1:5, 3:]
    torch.testing.assert_close(bce_dice_loss(logits, frame, ignore_index=255, **options), cut)
    if kind == "multiclass":
        one_hot = torch.where((frame == 255).unsqueeze(1), 255, F.one_hot(target, 3).movedim(-1, 1))
        torch.testing.assert_close(bce_dice_loss(logits, one_hot, ignore_index=255, **options), cut)


def test_border_weights_in_half_precision_find_the_same_border():
    target = torch.zeros(1, 1, 64, 700)
    target[..., 300:] = 1
    losses = [
        bce_dice_loss(torch.zeros(1, 1, 64, 700, dtype=dtype), target, border_weight=3, border_size=25).item()
        for dtype in (torch.float32, torch.bfloat16)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=5e-3)


# Against other libraries


def test_cross_entropy_equals_torch() -> None:
    logits, target, _ = case("multiclass", (8, 9))
    weight = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)
    for mask in (target, with_ignored(target)):
        ours = cross_entropy_loss(logits, mask, weight=weight, label_smoothing=0.1, ignore_index=255)
        theirs = F.cross_entropy(logits, mask, weight, label_smoothing=0.1, ignore_index=255)
        torch.testing.assert_close(ours, theirs)
    soft = torch.softmax(torch.randn(2, 3, 8, 9, dtype=torch.float64), dim=1)
    torch.testing.assert_close(cross_entropy_loss(logits, soft), F.cross_entropy(logits, soft))
    logits, target, options = case("multilabel", (8, 9))
    ours = cross_entropy_loss(logits, target, pos_weight=weight, reduction="none", **options)
    theirs = F.binary_cross_entropy_with_logits(logits, target.double(), pos_weight=weight.view(3, 1, 1), reduction="none")
    torch.testing.assert_close(ours, theirs)


def test_focal_equals_torchvision() -> None:
    ops = library("torchvision.ops")
    logits, target, _ = case("binary", (8, 9))
    for alpha, gamma in ((None, 2.0), (0.25, 2.0), (0.7, 0.5)):
        theirs = ops.sigmoid_focal_loss(logits, target.double(), -1 if alpha is None else alpha, gamma, reduction="mean")
        torch.testing.assert_close(focal_loss(logits, target, alpha=alpha, gamma=gamma), theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_region_losses_equal_smp(kind: str) -> None:
    smp = library("segmentation_models_pytorch.losses")
    logits, target, options = case(kind, (8, 9))
    options |= {"batch": True, "smooth": 0.0}
    pairs = [
        (dice_loss, {}, smp.DiceLoss(kind)),
        (dice_loss, {"log": True}, smp.DiceLoss(kind, log_loss=True)),
        (jaccard_loss, {}, smp.JaccardLoss(kind)),
        (tversky_loss, {"alpha": 0.3, "beta": 0.7}, smp.TverskyLoss(kind, alpha=0.3, beta=0.7)),
    ]
    for ours, extra, theirs in pairs:
        torch.testing.assert_close(ours(logits, target, **options, **extra), theirs(logits, target))
    ours = dice_loss(logits, with_ignored(target), ignore_index=255, **options)
    torch.testing.assert_close(ours, smp.DiceLoss(kind, ignore_index=255)(logits, with_ignored(target)))
    ours = dice_loss(logits, target, **options | {"smooth": 2.0})
    torch.testing.assert_close(ours, smp.DiceLoss(kind, smooth=1.0)(logits, target))


def test_other_losses_equal_smp() -> None:
    smp = library("segmentation_models_pytorch.losses")
    logits, target, _ = case("binary", (8, 9))
    logits = logits.float()  # smp's Lovász loss knows no other type
    torch.testing.assert_close(focal_loss(logits, target), smp.FocalLoss("binary", gamma=2)(logits, target))
    torch.testing.assert_close(lovasz_loss(logits, target, batch=True), smp.LovaszLoss("binary")(logits, target))
    torch.testing.assert_close(lovasz_loss(logits, target), smp.LovaszLoss("binary", per_image=True)(logits, target))
    torch.testing.assert_close(mcc_loss(logits, target, smooth=0, batch=True), smp.MCCLoss(eps=0)(logits.sigmoid(), target))
    torch.testing.assert_close(
        tversky_loss(logits, target, gamma=1.3, smooth=0, batch=True),
        smp.TverskyLoss("binary", gamma=1.3)(logits, target),
    )
    torch.testing.assert_close(
        cross_entropy_loss(logits, target), smp.SoftBCEWithLogitsLoss(ignore_index=None)(logits, target.float())
    )
    logits, target, _ = case("multiclass", (8, 9))
    logits = logits.float()
    torch.testing.assert_close(lovasz_loss(logits, target, batch=True), smp.LovaszLoss("multiclass")(logits, target))
    torch.testing.assert_close(cross_entropy_loss(logits, target), smp.SoftCrossEntropyLoss(smooth_factor=0)(logits, target))


@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_region_losses_equal_monai(kind: str, batch: bool) -> None:
    monai = library("monai.losses")
    logits, target, options = case(kind, (8, 9))
    options |= {"batch": batch}
    theirs = {"softmax": True, "to_onehot_y": True} if kind == "multiclass" else {"sigmoid": True}
    theirs |= {"batch": batch}
    mask = target.unsqueeze(1) if kind == "multiclass" else target.double()
    pairs = [
        (dice_loss, {"smooth": 1.0}, monai.DiceLoss(smooth_nr=1.0, smooth_dr=1.0, **theirs)),
        (
            dice_loss,
            {"smooth": 1.0, "squared": True},
            monai.DiceLoss(squared_pred=True, smooth_nr=1, smooth_dr=1, **theirs),
        ),
        (jaccard_loss, {"smooth": 0.0}, monai.DiceLoss(jaccard=True, smooth_nr=0, smooth_dr=0, **theirs)),
        (
            tversky_loss,
            {"alpha": 0.3, "beta": 0.7},
            monai.TverskyLoss(alpha=0.3, beta=0.7, smooth_nr=1, smooth_dr=1, **theirs),
        ),
        (mcc_loss, {"smooth": 0.0}, monai.MCCLoss(smooth_dr=0, **theirs)),
    ]
    for ours, extra, other in pairs:
        torch.testing.assert_close(ours(logits, target, **options, **extra), other(logits, mask))


def test_other_losses_equal_monai() -> None:
    monai = library("monai.losses")
    logits, target, _ = case("multiclass", (8, 9))
    mask = target.unsqueeze(1)
    softmax = {"softmax": True, "to_onehot_y": True}
    torch.testing.assert_close(
        generalized_dice_loss(logits, target, smooth=0),
        monai.GeneralizedDiceLoss(smooth_nr=0, smooth_dr=0, **softmax)(logits, mask),
    )
    each = monai.FocalLoss(to_onehot_y=True, use_softmax=True, reduction="none")(logits, mask)
    torch.testing.assert_close(focal_loss(logits.float(), target, reduction="none"), each.sum(1))
    torch.testing.assert_close(
        bce_dice_loss(logits, target), monai.DiceCELoss(smooth_nr=1, smooth_dr=1, **softmax)(logits, mask)
    )
    logits, target, _ = case("binary", (8, 9))
    # MONAI pools the classes of a picture; one channel is what both define. Its own constant, 1e-4, is made to vanish.
    torch.testing.assert_close(
        soft_cldice_loss(logits, target), monai.SoftclDiceLoss(sigmoid=True, smooth=1e-12)(logits, target.double())
    )


# The keywords


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ALL)
def test_forms_and_types_of_a_mask_are_one(name: str, kind: str) -> None:
    loss, extra = ALL[name]
    logits, target, options = case(kind, (5, 6))
    value = loss(logits, target, **options, **extra)
    forms = [target.to(dtype) for dtype in (torch.uint8, torch.int16, torch.int32, torch.uint16, torch.float16, torch.float32)]
    if kind == "binary":
        forms += [target[:, 0], target.bool()]
        torch.testing.assert_close(loss(logits, target[:, 0], multilabel=True, **extra), value)  # one channel is one sigmoid
    if kind == "multiclass":
        one_hot = F.one_hot(target, 3).movedim(-1, 1)
        forms += [target.unsqueeze(1), target.unsqueeze(1).float(), one_hot, one_hot.bool(), one_hot.double()]
    for form in forms:
        torch.testing.assert_close(loss(logits, form, **options, **extra), value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loss", [dice_loss, jaccard_loss, tversky_loss, mcc_loss, lovasz_loss, soft_cldice_loss])
def test_reduction_and_class_weights(loss: Any, kind: str) -> None:
    logits, target, options = case(kind, (5, 6))
    terms = loss(logits, target, reduction="none", **options)
    assert terms.shape == logits.shape[:2]
    assert loss(logits, target, batch=True, reduction="none", **options).shape == logits.shape[1:2]
    torch.testing.assert_close(loss(logits, target, **options), terms.mean())
    torch.testing.assert_close(loss(logits, target, reduction="sum", **options), terms.sum())
    weight = torch.tensor([0.0, 1.0, 3.0][-logits.shape[1] :])
    torch.testing.assert_close(
        loss(logits, target, weight=weight, **options), (terms * weight).sum() / (2 * weight.sum()), check_dtype=False
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loss", [cross_entropy_loss, focal_loss])
def test_pixel_reduction_and_class_weights(loss: Any, kind: str) -> None:
    logits, target, options = case(kind, (5, 6))
    weight = torch.tensor([0.0, 1.0, 3.0][-logits.shape[1] :], dtype=torch.float64)
    factor = weight[target] if kind == "multiclass" else weight.view(-1, 1, 1).expand_as(logits)
    terms = loss(logits, target, reduction="none", **options)
    weighted = loss(logits, target, weight=weight, reduction="none", **options)
    torch.testing.assert_close(weighted, terms * factor)
    torch.testing.assert_close(loss(logits, target, weight=weight, **options), weighted.sum() / factor.sum())
    if kind == "multiclass":
        one_hot = F.one_hot(target, 3).movedim(-1, 1)
        torch.testing.assert_close(loss(logits, one_hot, weight=weight), loss(logits, target, weight=weight))


@pytest.mark.parametrize("scale", [1e-9, 1e-30])
def test_class_weights_may_be_one_over_large_counts(scale: float) -> None:
    logits, target, _ = case("multiclass", (5, 6))
    weight = torch.tensor([1.0, 2.0, 3.0])
    for loss in (cross_entropy_loss, focal_loss, dice_loss):
        value = loss(logits.float(), target, weight=weight)
        torch.testing.assert_close(loss(logits.float(), target, weight=scale * weight), value)


def test_pixels_that_weigh_nothing_are_no_pixels() -> None:
    logits = torch.randn(1, 2, 5, 6, requires_grad=True)
    target, weight = torch.zeros(1, 5, 6, dtype=torch.long), torch.tensor([0.0, 1.0])
    loss = cross_entropy_loss(logits, target, weight=weight, label_smoothing=0.1)  # whose terms are above 0
    loss.backward()
    assert loss == 0
    assert torch.all(logits.grad == 0)


def test_label_smoothing_of_a_sigmoid() -> None:
    logits, target, _ = case("binary", (5, 6))
    ours = cross_entropy_loss(logits, target, label_smoothing=0.2)
    torch.testing.assert_close(ours, F.binary_cross_entropy_with_logits(logits, target.double() * 0.8 + 0.1))


def soft_case(kind: str, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """`case` with a mask of values, or of class probabilities, between 0 and 1."""
    logits, _, options = case(kind, shape)
    values = case(kind, shape, seed=1)[0]
    return logits, values.softmax(1) if kind == "multiclass" else values.sigmoid(), options


@pytest.mark.parametrize("ignore_index", [None, 255])
@pytest.mark.parametrize("kind", KINDS)
def test_soft_masks(kind: str, ignore_index: int | None) -> None:
    logits, soft, options = soft_case(kind, (5, 6))
    hard = case(kind, (5, 6))[1]
    if ignore_index is not None:
        hard = with_ignored(hard)
        soft = soft.masked_fill((hard.unsqueeze(1) if kind == "multiclass" else hard) == 255, 255)
    loops = Numpy(logits, hard, kind, ignore_index)
    loops.t = soft.numpy().reshape(loops.x.shape)
    options |= {"ignore_index": ignore_index}
    for ours, reference in (
        (dice_loss(logits, soft, reduction="none", **options), loops.dice()),
        (dice_loss(logits, soft, squared=True, reduction="none", **options), loops.dice(squared=True)),
        (jaccard_loss(logits, soft, reduction="none", **options), loops.jaccard()),
        (tversky_loss(logits, soft, alpha=0.3, beta=0.7, reduction="none", **options), loops.tversky(0.3, 0.7)),
        (mcc_loss(logits, soft, reduction="none", **options), loops.mcc()),
        (generalized_dice_loss(logits, soft, reduction="none", **options), loops.generalized_dice()),
        (soft_cldice_loss(logits, soft, iterations=2, reduction="none", **options), loops.cldice(2)),
    ):
        np.testing.assert_allclose(ours.numpy(), reference, rtol=1e-9, atol=1e-12)
    if kind == "multiclass":
        entropy = -(np.log(loops.p) * loops.t).sum(1)[loops.valid[:, 0]]
    else:
        entropy = -(np.log(loops.p) * loops.t + np.log(1 - loops.p) * (1 - loops.t))[loops.valid]
        focal = 0.25 * loops.t[loops.valid] + 0.75 * (1 - loops.t[loops.valid])
        focal = focal * (1 - np.exp(-entropy)) ** 2 * entropy
        assert focal_loss(logits, soft, alpha=0.25, **options).item() == pytest.approx(focal.mean(), rel=1e-9)
    assert cross_entropy_loss(logits, soft, **options).item() == pytest.approx(entropy.mean(), rel=1e-9)


def test_lovasz_cuts_class_probabilities_at_their_largest_class() -> None:
    logits, target, _ = case("multiclass", (5, 6))
    soft = F.one_hot(target, 3).movedim(-1, 1) * 0.1 + 0.3  # 0.4 of the true class, 0.3 of the others
    torch.testing.assert_close(lovasz_loss(logits, soft), lovasz_loss(logits, target))


def test_class_probabilities_sum_to_1_within_a_hundredth() -> None:
    logits, target, _ = case("multiclass", (5, 6))
    shares = F.one_hot(target, 3).movedim(-1, 1) * 0.7 + 0.1
    dice_loss(logits, shares * 0.995)
    with pytest.raises(ValueError, match=r"sum to 1 at every pixel, found 0\.98"):
        dice_loss(logits, shares * 0.98)


def test_a_pixel_that_one_class_ignores_does_not_count() -> None:
    logits, target, _ = case("multiclass", (5, 6))
    one_hot = F.one_hot(target, 3).movedim(-1, 1)
    one_hot[0, 1, 2, 3], target[0, 2, 3] = 255, 255
    for loss in (cross_entropy_loss, dice_loss):
        torch.testing.assert_close(loss(logits, one_hot, ignore_index=255), loss(logits, target, ignore_index=255))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ALL)
def test_soft_masks_may_be_a_rounding_outside(name: str, kind: str) -> None:
    loss, extra = ALL[name]
    logits, target, options = case(kind, (5, 6))
    hard = F.one_hot(target, 3).movedim(-1, 1).float() if kind == "multiclass" else target.float()
    rounded = hard * (1 + 2.4e-7) - (1 - hard) * 1e-8
    assert rounded.max() > 1
    assert torch.equal(loss(logits, rounded, **options, **extra), loss(logits, hard, **options, **extra))
    with pytest.raises(ValueError, match=r"values from 0 to 1, found 1\.00002"):
        loss(logits, hard * (1 + 2e-5), **options, **extra)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ALL)
def test_masks_get_no_gradient(name: str, kind: str) -> None:
    loss, extra = ALL[name]
    logits, soft, options = soft_case(kind, (5, 6))
    x, y = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    learned = soft.clone().requires_grad_()
    loss(x, learned, **options, **extra).backward()
    loss(y, soft, **options, **extra).backward()
    assert learned.grad is None
    assert torch.equal(x.grad, y.grad)


def test_tversky_is_dice_and_jaccard() -> None:
    logits, target, _ = case("multiclass", (5, 6))
    torch.testing.assert_close(tversky_loss(logits, target, smooth=0.5), dice_loss(logits, target, smooth=1.0))
    torch.testing.assert_close(tversky_loss(logits, target, alpha=1, beta=1), jaccard_loss(logits, target))


# The numerical policy


def of_whole_and_ignored(name: str, kind: str, shape: tuple[int, int]) -> Iterator[tuple[functools.partial, torch.Tensor]]:
    """A loss as a function of its logits, and logits, with a mask that counts everywhere and one that does not."""
    loss, extra = ALL[name]
    logits, target, options = case(kind, shape)
    for mask, keywords in ((target, {}), (with_ignored(target), {"ignore_index": 255})):
        yield functools.partial(loss, target=mask, **options, **keywords, **extra), logits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ALL)
def test_gradients_are_the_derivatives(name: str, kind: str) -> None:
    for of_logits, logits in of_whole_and_ignored(name, kind, (2, 3)):
        assert torch.autograd.gradcheck(of_logits, logits.clone().requires_grad_())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ALL)
def test_second_derivatives_are_right(name: str, kind: str) -> None:
    for of_logits, logits in of_whole_and_ignored(name, kind, (2, 2)):
        assert torch.autograd.gradgradcheck(of_logits, logits.clone().requires_grad_())
        x = logits.clone().requires_grad_()
        of_a_graph, plain = (torch.autograd.grad(of_logits(x), x, create_graph=kept)[0] for kept in (True, False))
        torch.testing.assert_close(of_a_graph, plain)  # gradgradcheck compares the former with itself


@pytest.mark.filterwarnings("error:There is a performance drop")  # where vmap falls back to a loop
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ALL)
def test_gradients_of_each_picture_by_torch_func_are_those_of_a_loop(name: str, kind: str) -> None:
    loss, extra = ALL[name]
    logits, target, options = case(kind, (5, 6))
    for mask, keywords in ((target, {}), (with_ignored(target), {"ignore_index": 255})):

        def of_picture(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return loss(x[None], y[None], **options, **keywords, **extra)  # noqa: B023

        gradients, values = torch.func.vmap(torch.func.grad_and_value(of_picture))(logits, mask)
        for x, y, gradient, value in zip(logits, mask, gradients, values, strict=True):
            x.requires_grad_()
            expected = of_picture(x, y)
            torch.testing.assert_close(value, expected.detach())
            torch.testing.assert_close(gradient, *torch.autograd.grad(expected, x))


@pytest.mark.parametrize("name", ALL)
def test_hessians_by_torch_func_are_those_of_autograd(name: str) -> None:
    for of_logits, logits in of_whole_and_ignored(name, "multiclass", (2, 2)):
        hessian = torch.func.jacrev(torch.func.jacrev(of_logits))(logits)
        torch.testing.assert_close(hessian, torch.autograd.functional.hessian(of_logits, logits))


def test_masks_are_checked_inside_of_torch_func() -> None:
    logits, mask = torch.zeros(2, 2, 1, 3, 4, 4), torch.zeros(2, 2, 1, 4, 4)
    gradient = torch.func.grad(dice_loss)
    of_each = torch.func.vmap(torch.func.vmap(gradient))
    for value, expected in ((3, "class indices from 0 to 2"), (0.5, "whole class indices")):
        mask[1, 0, 0, 0, 0] = value
        for wrong in (lambda: gradient(logits[1, 0], mask[1, 0]), lambda: of_each(logits, mask)):
            with pytest.raises(RuntimeError, match=f"target must hold {expected}; "):
                wrong()


def test_the_derivative_leaves_the_gradient_it_is_given_alone() -> None:
    p, given_tp, given_p = torch.rand(2, 3, 1, requires_grad=True), torch.rand(2, 3), torch.rand(2, 3)
    tp, pred, _ = RegionSums.apply(p, torch.tensor([[0], [2]]), None)
    before = given_p.clone()
    torch.autograd.grad((tp, pred), p, (given_tp, given_p))
    assert torch.equal(given_p, before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ALL)
def test_ignored_pixels_have_no_gradient_and_no_say(name: str, kind: str) -> None:
    loss, extra = ALL[name]
    logits, target, options = case(kind, (5, 6))
    mask = with_ignored(target)
    ignored = (mask == 255).unsqueeze(1) if kind == "multiclass" else mask == 255
    x = logits.clone().requires_grad_()
    value = loss(x, mask, ignore_index=255, **options, **extra)
    value.backward()
    assert torch.all(x.grad[ignored.expand_as(x)] == 0)
    assert torch.any(x.grad != 0)
    changed = torch.where(ignored, 50 * torch.randn_like(logits), logits)
    torch.testing.assert_close(loss(changed, mask, ignore_index=255, **options, **extra), value.detach())
    x = logits.clone().requires_grad_()
    nothing = loss(x, torch.full_like(target, 255), ignore_index=255, **options, **extra)
    nothing.backward()
    assert nothing.item() == pytest.approx(float(name == "mcc smooth 0"), abs=1e-12)  # the value for no pixels at all
    assert torch.all(x.grad == 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ALL)
def test_extremes_are_finite(name: str, kind: str, dtype: torch.dtype) -> None:
    loss, extra = ALL[name]
    channels = 1 if kind == "binary" else 3
    options = {"multilabel": True} if kind == "multilabel" else {}
    for shape in ((1, 1), (4, 5)):
        for logit in (-1e4, 0.0, 1e4):
            for value in (0, 1):
                x = torch.full((2, channels, *shape), logit, dtype=dtype)
                x[:, channels // 2] = -logit if channels > 1 else logit
                x.requires_grad_()
                target = torch.full((2, *shape) if kind == "multiclass" else x.shape, value)
                result = loss(x, target, **options, **extra)
                result.backward()
                assert result.dtype == torch.float32
                assert torch.isfinite(result), (shape, logit, value)
                assert torch.isfinite(x.grad).all(), (shape, logit, value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ALL)
def test_nan_shows_in_the_loss(name: str, kind: str) -> None:
    loss, extra = ALL[name]
    logits, target, options = case(kind, (5, 6))
    logits[0, -1, 2, 3] = math.nan
    assert loss(logits, target, **options, **extra).isnan()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ALL)
def test_autocast_changes_nothing(name: str, kind: str) -> None:
    loss, extra = ALL[name]
    logits, target, options = case(kind, (5, 6))
    logits = logits.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        inside = loss(logits, target, **options, **extra)
    assert torch.equal(inside, loss(logits.float(), target, **options, **extra))


def test_a_large_batch_loses_no_digits() -> None:
    """1.25 * 2^24 pixels: adding ones one by one in float32 stops at 2^24."""
    logits = torch.tensor([9.0, -9.0]).view(1, 2, 1, 1).expand(1, 2, 1280, 2**14)
    value = dice_loss(logits, torch.zeros(1, 1280, 2**14, dtype=torch.uint8), smooth=0, reduction="none")
    p = torch.tensor(18.0, dtype=torch.float64).sigmoid().item()
    torch.testing.assert_close(value, torch.tensor([[1 - 2 * p / (1 + p), 1.0]]), rtol=0, atol=2e-7)


@pytest.mark.parametrize("shape", [(2**20,), (2**20 + 3,), (2, 2**19 + 1)], ids=str)
def test_a_long_row_loses_no_digits(shape: tuple[int, ...]) -> None:
    logits, target, _ = case("multiclass", shape, n=1)
    for mask, options in ((target, {}), (with_ignored(target), {"ignore_index": 255})):
        value = dice_loss(logits.float(), mask, reduction="none", **options)
        reference = Numpy(logits, mask, "multiclass", 255)
        tp, p, t = (
            torch.from_numpy((v * reference.valid).sum(2)) for v in (reference.p * reference.t, reference.p, reference.t)
        )
        torch.testing.assert_close(value.double(), 1 - (2 * tp + 1) / (p + t + 1), rtol=0, atol=2e-7)


@pytest.mark.parametrize("ignore_index", [None, 255])
@pytest.mark.parametrize("kind", KINDS)
def test_mcc_of_a_class_that_fills_nearly_everything_keeps_its_digits(kind: str, ignore_index: int | None) -> None:
    channels = 1 if kind == "binary" else 2
    logits = 5 + torch.randn(1, 1, 2**20, generator=torch.Generator().manual_seed(0))
    target = torch.ones(1, channels, 2**20, dtype=torch.long)
    logits[..., :4], target[..., :4] = -1, 0
    target[..., -9:] = 255 if ignore_index else 1
    if kind == "multiclass":
        logits, target = torch.cat([-logits / 2, logits / 2], 1), target[:, 0]
    logits = logits.expand(1, channels, -1)
    x, y = logits.clone().requires_grad_(), logits.double().requires_grad_()
    options = {"multilabel": kind == "multilabel", "ignore_index": ignore_index}
    value = mcc_loss(x, target, smooth=0, **options)
    p = y.softmax(1)[:, 1] if kind == "multiclass" else y.sigmoid()[:, 0]
    t, p = (v[..., : -9 if ignore_index else None] for v in (target.reshape(1, -1, 2**20)[:, 0], p))
    tp, tn, fp, fn = (p * t).sum(), ((1 - p) * (1 - t)).sum(), (p * (1 - t)).sum(), ((1 - p) * t).sum()
    reference = 1 - (tp * tn - fp * fn) / ((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)).sqrt()
    value.backward()
    reference.backward()
    torch.testing.assert_close(value.double(), reference, rtol=0, atol=5e-6)
    gradient = y.grad if kind != "multilabel" else (y.grad[:, :1] / 2).expand(1, 2, -1)
    assert (x.grad - gradient).norm() < 1e-5 * gradient.norm()


@pytest.mark.parametrize("gamma", [0.0, 0.5])
def test_the_focal_loss_of_sure_pixels_is_finite_for_small_gamma(gamma: float) -> None:
    logits = torch.tensor([[[1e4, -1e4, 1e4]]], requires_grad=True)
    value = focal_loss(logits, torch.tensor([[1, 0, 0]]), gamma=gamma)
    value.backward()
    assert value.item() == pytest.approx(1e4 / 3)
    torch.testing.assert_close(logits.grad, torch.tensor([[[0, 0, 1 / 3]]]))


def test_mcc_of_one_pixel_in_a_million_is_defined() -> None:
    logits, target = torch.full((1, 1, 2**20), -100.0), torch.zeros(1, 2**20)
    logits[..., 7], target[..., 7] = 100.0, 1
    assert mcc_loss(logits, target, smooth=0).item() == pytest.approx(0, abs=1e-5)


def test_skeletons_that_nowhere_meet_cost_all() -> None:
    lines = torch.zeros(1, 9, 9)
    lines[:, 2] = 1
    assert soft_cldice_loss(400 * lines[:, None] - 200, lines.roll(4, 1), smooth=0) == 1


@pytest.mark.parametrize("smooth", [0.5, 1.0])
def test_an_absent_class_costs_its_false_positives(smooth: float) -> None:
    """The rule for empty masks: score smooth / (P + smooth)."""
    empty = torch.zeros(1, 4, 5)
    losses_at = []
    for logit in (-30.0, -3.0, 0.0, 3.0):
        logits = torch.full((1, 1, 4, 5), logit, requires_grad=True)
        value = dice_loss(logits, empty, smooth=smooth)
        value.backward()
        predicted = logits.detach().sigmoid().sum()
        torch.testing.assert_close(value.detach(), predicted / (predicted + smooth))
        assert torch.all(logits.grad > 0)  # every false positive is pushed down
        losses_at.append(value.item())
    assert losses_at[0] < 1e-10 < losses_at[1] < losses_at[2] < losses_at[3]
    for loss in (jaccard_loss, tversky_loss, mcc_loss, generalized_dice_loss, lovasz_loss):
        assert loss(torch.full((1, 1, 4, 5), 3.0), empty) > 0.25
        assert loss(torch.full((1, 1, 4, 5), -30.0), empty) < 1e-6


def test_generalized_dice_weighs_an_absent_class_as_the_rarest() -> None:
    value = generalized_dice_loss(torch.zeros(1, 3, 4), torch.tensor([[0, 0, 0, 1]]), smooth=0)  # p is 1/3 everywhere
    score = 2 * (1 / 9 + 1 / 3) / ((4 / 3 + 3) / 9 + (4 / 3 + 1) + 4 / 3)
    assert value.item() == pytest.approx(1 - score)


@pytest.mark.parametrize("loss", [dice_loss, jaccard_loss])
def test_the_log_of_no_overlap_is_finite(loss: Any) -> None:
    logits = torch.full((1, 1, 4, 5), 3.0, requires_grad=True)
    value = loss(logits, torch.zeros(1, 4, 5), smooth=0, log=True)
    value.backward()
    assert value.item() == pytest.approx(-math.log(1e-7))
    assert torch.all(logits.grad == 0)


def test_smp_lets_false_positives_on_empty_pictures_go_free() -> None:
    smp = library("segmentation_models_pytorch.losses")
    everywhere, empty = torch.full((1, 1, 8, 8), 9.0), torch.zeros(1, 1, 8, 8)
    assert smp.DiceLoss("binary")(everywhere, empty).item() == 0
    assert dice_loss(everywhere, empty).item() == pytest.approx(64 / 65, abs=1e-4)


# Properties

small = settings(max_examples=25)


@small
@given(st.integers(0, 10**6), st.sampled_from(KINDS))
def test_the_order_of_pixels_and_pictures_does_not_matter(seed: int, kind: str) -> None:
    logits, target, options = case(kind, (6,), seed, n=3)
    pixels, pictures = torch.randperm(6), torch.randperm(3)
    for loss in (cross_entropy_loss, focal_loss, dice_loss, jaccard_loss, mcc_loss, lovasz_loss, generalized_dice_loss):
        value = loss(logits, target, **options)
        torch.testing.assert_close(loss(logits[..., pixels], target[..., pixels], **options), value)
        torch.testing.assert_close(loss(logits[pictures], target[pictures], **options), value)
        if loss not in (cross_entropy_loss, focal_loss):
            pooled = loss(logits, target, batch=True, **options)
            torch.testing.assert_close(loss(logits[pictures], target[pictures], batch=True, **options), pooled)


@small
@given(st.integers(0, 10**6), st.sampled_from(KINDS), st.floats(0.0, 5.0), st.booleans())
def test_region_losses_have_bounds(seed: int, kind: str, smooth: float, batch: bool) -> None:
    logits, target, options = case(kind, (6,), seed)
    options |= {"batch": batch, "reduction": "none", "smooth": smooth}
    for loss in (dice_loss, jaccard_loss, tversky_loss, soft_cldice_loss):
        values = loss(10 * logits, target, **options)
        assert torch.all((values >= -1e-12) & (values <= 1 + 1e-12))
    assert torch.all(jaccard_loss(logits, target, **options) >= dice_loss(logits, target, **options) - 1e-12)
    values = mcc_loss(10 * logits, target, **options)
    assert torch.all((values >= -1e-12) & (values <= 2 + 1e-12))


@small
@given(st.integers(0, 10**6), st.integers(0, 5), st.floats(0.1, 10))
def test_a_better_pixel_is_a_lower_loss(seed: int, pixel: int, step: float) -> None:
    logits, target, _ = case("binary", (6,), seed, n=1)
    better = logits.clone()
    better[0, 0, pixel] += step if target[0, 0, pixel] else -step
    for loss in (cross_entropy_loss, dice_loss, jaccard_loss, tversky_loss, mcc_loss, lovasz_loss):
        assert loss(better, target) <= loss(logits, target) + 1e-12


@small
@given(st.integers(0, 10**6))
def test_swapping_foreground_and_background_keeps_symmetric_losses(seed: int) -> None:
    logits, target, _ = case("binary", (6,), seed)
    for loss in (cross_entropy_loss, focal_loss, mcc_loss):
        torch.testing.assert_close(loss(-logits, 1 - target), loss(logits, target))


@small
@given(st.integers(0, 10**6))
def test_hard_predictions_give_the_index_itself(seed: int) -> None:
    """Where predictions are sure, soft Dice and Jaccard and the Lovász softmax are the indices of sets."""
    _, target, _ = case("multiclass", (6,), seed)
    guess = torch.randint(0, 3, target.shape)
    logits = 200 * F.one_hot(guess, 3).movedim(-1, 1).double()
    for c in range(3):
        p, t = guess == c, target == c
        union = (p | t).sum((1,))
        index = torch.where(union > 0, (p & t).sum(1) / union.clamp_min(1), 1.0).double()
        torch.testing.assert_close(jaccard_loss(logits, target, smooth=0, reduction="none")[:, c], 1 - index)
        torch.testing.assert_close(lovasz_loss(logits, target, reduction="none")[:, c], 1 - index)
        torch.testing.assert_close(dice_loss(logits, target, smooth=0, reduction="none")[:, c], 1 - 2 * index / (1 + index))


# Bad input


@pytest.mark.parametrize(
    ("logits", "target", "options", "message"),
    [
        (torch.zeros(2, 1, 4, 4), torch.full((2, 4, 4), 255), {}, r"values from 0 to 1, found 255.*mask > 0"),
        (torch.zeros(2, 1, 4, 4), torch.full((2, 4, 4), math.nan), {}, r"found nan"),
        (torch.zeros(2, 1, 4, 4), torch.full((2, 4, 4), -0.5), {}, r"found -0\.5"),
        (torch.zeros(1, 3, 2, 2), torch.arange(4).view(1, 2, 2), {}, r"class indices from 0 to 2, found 3.*ignore_index"),
        (torch.zeros(2, 3, 4, 4), torch.full((2, 4, 4), -1), {}, r"found -1"),
        (torch.zeros(2, 3, 4, 4), torch.full((2, 4, 4), 0.5), {}, r"whole class indices, found 0\.5"),
        (torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4), {}, r"sum to 1.*found 3; .*multilabel=True"),
        (torch.zeros(2, 3, 4, 4), torch.zeros(2, 2, 4, 4), {}, r"\(2, 2, 4, 4\) does not fit 3-class logits"),
        (torch.zeros(2, 3, 4, 4), torch.zeros(2, 4, 4), {"multilabel": True}, r"expected \(2, 3, 4, 4\)"),
        (torch.zeros(2, 1, 4, 4), torch.zeros(2, 4, 5), {}, r"expected \(2, 4, 4\) or \(2, 1, 4, 4\)"),
        (torch.zeros(4, 4), torch.zeros(4, 4), {}, r"logits\[None\]"),
        (torch.zeros(2, 4, 4), torch.ones(2, 4, 4), {}, r"sum to 1.*multilabel=True.*keep their channel.*without squeeze\(1\)"),
        (torch.zeros(2, 4, 4), torch.ones(2, 1, 4, 4), {}, r"does not fit 4-class logits.*without squeeze\(1\)"),
        (torch.zeros(0, 1, 4, 4), torch.zeros(0, 4, 4), {}, r"none of them empty, got \(0, 1, 4, 4\)$"),
        *(
            (
                torch.zeros(1, channels, 2, 2),
                mask,
                {"ignore_index": value} | options,
                f"^ignore_index={value} .*{left_out}.* 255{hint}$",
            )
            for channels, mask, options, left_out, hint in (
                (1, torch.eye(2)[None], {}, "a sigmoid's two answers", ""),
                (1, torch.eye(2)[None].bool(), {}, "a sigmoid's two answers", ""),
                (2, torch.eye(2).expand(1, 2, 2, 2), {"multilabel": True}, "a sigmoid's two answers", ""),
                (2, torch.stack([torch.eye(2), 1 - torch.eye(2)])[None], {}, "every pixel", ", or pass class indices"),
            )
            for value in (0, 1)
        ),
        (torch.zeros(2, 1, 4, 4), torch.zeros(2, 4, 4), {"reduction": "avg"}, r"'mean', 'sum' or 'none', got 'avg'"),
        (torch.zeros(2, 1, 4, 4), torch.zeros(2, 4, 4), {"weight": torch.ones(2)}, r"shape \(1,\), got \(2,\)"),
        (torch.zeros(2, 1, 4, 4), torch.zeros(2, 4, 4), {"weight": 2.0}, r"weight must .* shape \(1,\), got \(\)"),
        (torch.zeros(2, 1, 4, 4), torch.zeros(2, 4, 4), {"weight": torch.ones(1).to("meta")}, "weight is on meta, .* on cpu"),
        *(
            (
                torch.zeros(2, 2, 4, 4),
                torch.zeros(2, 4, 4),
                {"weight": torch.tensor([0.0, factor])},
                f"above 0, found {factor:g};",
            )
            for factor in (0, -1, math.nan, math.inf)
        ),
    ],
)
def test_bad_input_is_named(logits: torch.Tensor, target: torch.Tensor, options: dict[str, Any], message: str) -> None:
    for loss in (cross_entropy_loss, dice_loss, lovasz_loss):
        with pytest.raises(ValueError, match=message):
            loss(logits, target, **options)


def test_bad_types_and_options_are_named() -> None:
    logits, target = torch.zeros(1, 1, 4, 4), torch.zeros(1, 4, 4)
    with pytest.raises(TypeError, match=r"target must be a torch\.Tensor, got ndarray"):
        dice_loss(logits, target.numpy())
    for wrong, expected in (
        ({"out": logits, "aux": logits}, "dict; pass one of its tensors: logits['out'] or logits['aux']"),
        ([logits, logits], "list; pass one of its tensors, such as logits[0]"),
        ([0.0], "list; use torch.as_tensor"),
    ):
        with pytest.raises(TypeError, match=re.escape(f"logits must be a torch.Tensor, got {expected}")):
            dice_loss(wrong, target)
    with pytest.raises(TypeError, match=r"logits must be floating point, got torch\.int64; pass the model's output as it is"):
        dice_loss(logits.long(), target)
    with pytest.raises(TypeError, match="complex"):
        dice_loss(logits, target.cfloat())
    with pytest.raises(ValueError, match="border_size=4 must be odd, such as border_size=5"):
        bce_dice_loss(logits, target, border_size=4)
    with pytest.raises(TypeError, match=r"border_size=41\.0 must be an integer"):
        bce_dice_loss(logits, target, border_size=41.0)
    with pytest.raises(ValueError, match=r"alpha=0\.25 .* softmax use weight="):
        focal_loss(torch.zeros(1, 2, 4, 4), target, alpha=0.25)
    with pytest.raises(ValueError, match="pos_weight belongs to sigmoids"):
        cross_entropy_loss(torch.zeros(1, 2, 4, 4), target, pos_weight=torch.ones(2))
    for almost, found in ((1 + 1e-6, r"1\.00000095"), (-1e-6, r"-9\.99"), (2 + 1e-6, r"2\.00000095")):
        with pytest.raises(ValueError, match=f"whole class indices, found {found}"):
            dice_loss(torch.zeros(1, 3, 4, 4), torch.full((1, 4, 4), almost))
    with pytest.raises(ValueError, match="target on meta"):
        dice_loss(logits, target.to("meta"))
    for value in ("255", 0.5, True):
        with pytest.raises(TypeError, match=f"ignore_index={value!r} must be an integer, such as ignore_index=255, or None"):
            dice_loss(logits, target, ignore_index=value)


@pytest.mark.parametrize(
    ("loss", "options", "message"),
    [
        (cross_entropy_loss, {"label_smoothing": 2}, "label_smoothing must be from 0 to 1, not 2"),
        (focal_loss, {"alpha": -1}, "alpha must be from 0 to 1, not -1"),
        (focal_loss, {"gamma": -1}, "gamma must be 0 or more, not -1"),
        (tversky_loss, {"alpha": -1}, "alpha must be 0 or more, not -1"),
        (tversky_loss, {"beta": -1}, "beta must be 0 or more, not -1"),
        (tversky_loss, {"gamma": -1}, "gamma must be 0 or more, not -1"),
        (bce_dice_loss, {"border_weight": -1}, "border_weight must be 0 or more, not -1"),
        (bce_dice_loss, {"border_size": -1}, "border_size=-1 must be 1 or more"),
        (soft_cldice_loss, {"iterations": -1}, "iterations=-1 must be 0 or more"),
        *(
            (loss, {"smooth": -1}, "smooth must be 0 or more, not -1")
            for loss in (
                dice_loss,
                jaccard_loss,
                tversky_loss,
                generalized_dice_loss,
                mcc_loss,
                soft_cldice_loss,
                bce_dice_loss,
            )
        ),
    ],
)
def test_keywords_out_of_range_are_named(loss: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loss(torch.zeros(1, 1, 4, 4), torch.zeros(1, 4, 4), **options)


def test_an_ignored_value_outside_the_type_ignores_nothing() -> None:
    """-100 wraps round to 156 in uint8, and 255 to True in bool."""
    logits = torch.randn(1, 1, 2, 2)
    with pytest.raises(ValueError, match="found 156"):
        dice_loss(logits, torch.full((1, 2, 2), 156, dtype=torch.uint8), ignore_index=-100)
    mask = torch.ones(1, 2, 2, dtype=torch.bool)
    assert torch.equal(dice_loss(logits, mask, ignore_index=255), dice_loss(logits, mask))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
def test_narrow_masks_of_many_classes_pass_where_no_value_is_read(dtype: torch.dtype) -> None:
    """The highest class, 299, is no number of the mask's own type."""
    logits, target = torch.randn(1, 300, 2, 2), torch.full((1, 2, 2), 120, dtype=dtype)
    for loss in (cross_entropy_loss, dice_loss):
        gradient, value = torch.func.grad_and_value(loss)(logits, target)
        assert torch.equal(value, loss(logits, target.long()))
        assert gradient.any()


# Modules


MODULES = [module for module in Loss.__subclasses__() if module is not CompoundLoss]


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_modules_are_their_functions(module: type[Loss]) -> None:
    logits, target, _ = case("multiclass", (5, 6))
    value = module.function(logits, target, ignore_index=0)
    loss = pickle.loads(pickle.dumps(module(ignore_index=0)))
    assert torch.equal(loss(logits, target), value)
    assert "ignore_index=0" in repr(loss)
    with pytest.raises(TypeError, match=rf"{module.__name__} has no option smoth; it has .*ignore_index"):
        module(smoth=1)
    with pytest.raises(TypeError, match=rf"{module.__name__} takes keywords alone, got Tensor; .* ignore_index="):
        module(torch.ones(3))


@pytest.mark.parametrize(
    "keyword", ["logits", "target", "smooth", "batch", "weight", "ignore_index", "multilabel", "reduction"]
)
def test_a_keyword_is_described_in_the_same_words_wherever_it_is(keyword: str) -> None:
    """Each function describes all of its keywords, for help() and editors show one docstring; so they repeat each other."""
    functions = [getattr(unetlib, name) for name in dir(unetlib) if name.endswith(("_loss", "_score", "accuracy", "_error"))]
    described = [re.search(rf"^ +{keyword}: ([^.;:]+)", function.__doc__ or "", re.MULTILINE) for function in functions]
    words = [found[1] for found in described if found]
    assert len(words) > 1
    assert len(set(words)) == 1


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_programs_that_read_constructors_see_the_keywords_of_modules(module: type[Loss]) -> None:
    """Such as Lightning's command line, which reads the constructor itself."""
    own, *keywords = inspect.signature(module.__init__).parameters.values()
    expected = list(inspect.signature(module.function).parameters.values())[2:]
    assert own.name == "self"
    assert [(word.name, word.kind, word.default) for word in keywords] == [(a.name, a.kind, a.default) for a in expected]
    types, others = get_type_hints(module.__init__), get_type_hints(module.function)
    for word in expected:
        kept = word.name in ("weight", "pos_weight")
        assert types[word.name] == (Tensor | Sequence[float] | None if kept else others[word.name])


def test_a_subclass_may_have_options_of_its_own() -> None:
    class Half(DiceLoss):
        def __init__(self, factor: float = 0.5, **options: bool) -> None:
            super().__init__(**options)
            self.factor = factor

        def forward(self, logits: Tensor, target: Tensor) -> Tensor:
            return self.factor * super().forward(logits, target)

    logits, target, _ = case("binary", (5, 6))
    assert torch.equal(Half(batch=True)(logits, target), 0.5 * dice_loss(logits, target, batch=True))
    assert "factor" in inspect.signature(Half).parameters


Side = Literal["inside", "outside"]


def side_loss(logits: Tensor, target: Tensor, *, side: Side = "inside") -> Tensor:
    return (logits if side == "inside" else -logits).mean()


class SideLoss(Loss):
    function = side_loss


class ScaledSideLoss(Loss):
    function = side_loss

    def __init__(self, factor: float, *, side: Side) -> None:
        super().__init__(side=side)
        self.factor = factor

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return self.factor * super().forward(logits, target)


def test_a_loss_of_another_module_keeps_its_types_and_its_own_constructor() -> None:
    logits, target, _ = case("binary", (5, 6))
    assert torch.equal(SideLoss(side="outside")(logits, target), -logits.mean())
    assert get_type_hints(SideLoss.__init__)["side"] == Side
    assert vars(importlib.import_module(SideLoss.__init__.__module__))["Side"] == Side  # where jsonargparse looks
    for loss in (scaled := ScaledSideLoss(3.0, side="outside"), pickle.loads(pickle.dumps(scaled))):
        assert torch.equal(loss(logits, target), -3 * logits.mean())
    assert [*inspect.signature(ScaledSideLoss).parameters] == ["factor", "side"]

    class ScaledOtherLoss(ScaledSideLoss):
        function = functools.partial(side_loss)

    assert torch.equal(ScaledOtherLoss(3.0, side="inside")(logits, target), 3 * logits.mean())
    with pytest.raises(TypeError, match=r"SideLoss has no option smooth; it has side$"):
        SideLoss(smooth=1.0)


def test_every_loss_function_has_its_module() -> None:
    functions = {name for name in vars(losses) if name.endswith("_loss")}
    assert functions == {module.function.__name__ for module in MODULES}


def test_class_weights_move_with_the_module() -> None:
    loss = TverskyLoss(weight=[0, 1, 2], alpha=0.3)
    assert list(loss.state_dict()) == ["weight"]
    logits, target, _ = case("multiclass", (5, 6))
    value = tversky_loss(logits, target, weight=torch.tensor([0, 1, 2]), alpha=0.3)
    assert torch.equal(loss.double()(logits, target), value)
    assert torch.equal(tversky_loss(logits, target, weight=[0, 1, 2], alpha=0.3), value)


@pytest.mark.parametrize("wrong", ["balanced", {0: 1.0}, ["1", "2"], [[1.0], [1.0, 2.0]]])
def test_factors_that_are_no_numbers_are_named(wrong: Any) -> None:
    logits, target, _ = case("binary", (5, 6))
    for loss in (lambda: CrossEntropyLoss(pos_weight=wrong), lambda: cross_entropy_loss(logits, target, pos_weight=wrong)):
        with pytest.raises(TypeError, match=re.escape(f"such as [1.0, 2.0], got {wrong!r} (")):
            loss()


def test_losses_add_up() -> None:
    logits, target, _ = case("binary", (5, 6))
    loss = CrossEntropyLoss() + 0.5 * (DiceLoss() + BCEDiceLoss(border_weight=2, border_size=3) * 2)
    parts = cross_entropy_loss(logits, target) + 0.5 * dice_loss(logits, target)
    parts = parts + bce_dice_loss(logits, target, border_weight=2, border_size=3)
    torch.testing.assert_close(loss(logits, target), parts)
    assert loss.factors == [1.0, 0.5, 1.0]
    mixed = CompoundLoss((2.0, torch.nn.BCEWithLogitsLoss()))
    torch.testing.assert_close(mixed(logits, target.double()), 2 * cross_entropy_loss(logits, target))
    for plain in (CrossEntropyLoss() + torch.nn.BCEWithLogitsLoss(), torch.nn.BCEWithLogitsLoss() + CrossEntropyLoss()):
        torch.testing.assert_close(plain(logits, target.double()), 2 * cross_entropy_loss(logits, target))
    torch.testing.assert_close(sum([loss, loss])(logits, target), 2 * parts)
    with pytest.raises(ValueError, match="at least one"):
        CompoundLoss()


def test_what_does_not_add_up_is_named() -> None:
    loss = DiceLoss()
    for terms in ((loss, loss), ([(1, loss), (1, loss)],), ((loss, 1),), (("1", loss),), ((1, loss, 2),)):
        with pytest.raises(TypeError, match=r"pairs \(factor, loss\), for example \(0\.5, DiceLoss\(\)\), not .*DiceLoss"):
            CompoundLoss(*terms)
    for wrong in (lambda: loss + 1, lambda: 1 + loss):
        with pytest.raises(TypeError, match="unsupported operand"):
            wrong()
    with pytest.raises(TypeError, match="pairs"):
        loss * loss
    each = CrossEntropyLoss(reduction="none") + DiceLoss(reduction="none")
    logits, target, _ = case("binary", (5, 6))
    with pytest.raises(ValueError, match=r"\(2, 1, 5, 6\) and \(2, 1\), which do not add up; use reduction="):
        each(logits, target)


# Beyond the CPU


class OneDevice(TorchDispatchMode):
    """Raises where tensors of two devices meet, for a copy from one to the other waits for the device.

    Around fake CUDA tensors, or meta tensors, which raise by themselves where a value or a size that depends on one is read.
    """

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        devices = {leaf.device.type for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)}
        assert len(devices) < 2, f"{function} has tensors on {' and '.join(sorted(devices))}"
        return result


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x * torch.tensor([1.0, 2.0], device="cuda"),
        lambda x: x + torch.zeros(2).to(x.device),
        lambda x: x[torch.tensor([0])],
        lambda x: x.cpu(),
        lambda x: x.sum().item(),
        lambda x: x[x > 0],
    ],
)
def test_one_device_finds_what_waits(wait: Any) -> None:
    with FakeTensorMode():
        x = torch.empty(2, device="cuda")
        with OneDevice(), pytest.raises((AssertionError, RuntimeError), match=r"cpu and cuda|_local_scalar_dense|nonzero"):
            wait(x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ALL)
def test_no_loss_reads_a_value_from_the_device(name: str, kind: str) -> None:
    loss, extra = ALL[name]
    channels = 1 if kind == "binary" else 3
    options = {"multilabel": True} if kind == "multilabel" else {}
    with FakeTensorMode():
        x = torch.empty(2, channels, 5, 6, device="cuda")
        forms = [torch.empty(2, 5, 6, device="cuda"), torch.empty(2, 5, 6, device="cuda", dtype=torch.uint8)]
        if kind != "binary":
            forms = [torch.empty(2, channels, 5, 6, device="cuda")] + (forms if kind == "multiclass" else [])
        with OneDevice():
            for target in forms:
                assert loss(x, target, ignore_index=255, **options, **extra).is_cuda


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ALL)
def test_no_derivative_reads_a_value_from_the_device(name: str, kind: str) -> None:
    """On meta tensors, for without CUDA fake CUDA tensors have no backward pass."""
    loss, extra = ALL[name]
    logits, target, options = case(kind, (5, 6))
    x, mask = logits.to("meta").requires_grad_(), target.to("meta")
    with OneDevice():
        for ignore_index in (None, 255):
            loss(x, mask, ignore_index=ignore_index, **options, **extra).backward()
    assert x.grad.is_meta


COMPILED = (
    "cross_entropy",
    "focal",
    "dice squared",
    "focal tversky",
    "generalized dice",
    "mcc",
    "lovasz",
    "cldice",
    "bce dice",
)


@pytest.mark.parametrize(
    ("name", "kind"), [*((name, "multiclass") for name in COMPILED), ("dice", "binary"), ("lovasz", "binary")]
)
def test_losses_compile_without_a_break(name: str, kind: str) -> None:
    loss, extra = ALL[name]
    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    logits, target, _ = case(kind, (5, 6))
    x, y = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    value, reference = compiled(x, target, **extra), loss(y, target, **extra)
    value.backward()
    reference.backward()
    torch.testing.assert_close(value, reference)
    torch.testing.assert_close(x.grad, y.grad)


@pytest.mark.parametrize("name", COMPILED)
def test_losses_compile_for_pictures_of_any_size(name: str) -> None:
    """With dynamic=True the compiler has unknown numbers, not only for sizes but for options too."""
    loss, extra = ALL[name]
    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="eager")
    for shape in ((5, 6), (9, 7)):
        logits, target, _ = case("multiclass", shape)
        torch.testing.assert_close(compiled(logits, target, **extra), loss(logits, target, **extra))


def test_compiled_modules_still_check_values() -> None:
    torch.compiler.reset()
    compiled = torch.compile(DiceLoss(), fullgraph=True, backend="aot_eager")
    logits = torch.zeros(1, 1, 4, 4)
    assert compiled(logits, torch.ones(1, 4, 4)) == dice_loss(logits, torch.ones(1, 4, 4))
    with pytest.raises(RuntimeError, match="values from 0 to 1"):
        compiled(logits, torch.full((1, 4, 4), 255.0))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ALL)
def test_cuda_equals_cpu_without_a_synchronisation(name: str, kind: str) -> None:
    loss, extra = ALL[name]
    logits, target, options = case(kind, (5, 6))
    x, y = logits.cuda().requires_grad_(), logits.clone().requires_grad_()
    mask = target.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        value = loss(x, mask, **options, **extra)
        value.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    reference = loss(y, target, **options, **extra)
    reference.backward()
    torch.testing.assert_close(value.cpu(), reference)
    torch.testing.assert_close(x.grad.cpu(), y.grad)
    with torch.autocast("cuda", torch.float16):
        half = loss(logits.cuda().half(), mask, **options, **extra)
    torch.testing.assert_close(half, loss(logits.cuda().half().float(), mask, **options, **extra))


@pytest.mark.parametrize("flip", [False, True])
def test_less_than_one_percent_is_no_border(flip: bool) -> None:
    target = torch.zeros(1, 1, 21, 21)
    target[0, 0, 10, 9:12] = 1  # 3 of 441 pixels around the middle
    target = 1 - target if flip else target
    border = border_map(targets.read(torch.zeros(1, 1, 21, 21), target, soft=True), 21)
    assert not border[0, 0, 10, 10]
    assert border[0, 0, 0, 10]


def test_mcc_stays_double_beside_ignored_pixels() -> None:
    torch.manual_seed(0)
    logits, mask = torch.randn(2, 1, 5, 6, dtype=torch.float64), torch.randint(2, (2, 5, 6))
    plain = mcc_loss(logits, mask, smooth=0.1)  # which with the number of pixels is no number of float32
    torch.testing.assert_close(mcc_loss(logits, mask, smooth=0.1, ignore_index=255), plain, rtol=1e-14, atol=0)
