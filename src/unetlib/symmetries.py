"""Test-time augmentation: a network's mean opinion of a picture, turned and mirrored."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Flips = tuple[tuple[int, ...], ...]

MIRROR: Flips = ((), (-1,))  # dimensions that are reversed
FLIPS: Flips = ((), (-1,), (-2,), (-2, -1))


def average_symmetries(
    forward: Callable[[Tensor], Tensor],
    batch: Tensor,
    *,
    flips: Flips = FLIPS,
    turns: bool = True,
    multilabel: bool = False,
) -> Tensor:
    """Logits of the mean probability over a picture's symmetries.

    The picture as it is, mirrored left to right, mirrored top to bottom and both; with `turns` the same four of the transposed
    picture, so that these are the four quarter turns and their mirror images. Each answer is turned back before the mean.

    Args:
        forward: the network: (N, C, h, w) to logits (N, K, h, w), K = 1 for one sigmoid, more for a softmax. It is given all
            flips of each picture at once.
        batch: (N, C, h, w).
        flips: `FLIPS`, or `MIRROR` for the first two alone.
        turns: those of the transposed picture too.
        multilabel: each channel of several is a sigmoid, too.

    Returns:
        (N, K, h, w): logits whose sigmoid or softmax is the mean of the views'.

    Example:
        >>> picture = torch.rand(1, 3, 20, 30)
        >>> torch.allclose(average_symmetries(lambda views: views[:, :1], picture), picture[:, :1], atol=1e-6)
        True
    """
    # Sums of probabilities as sums of exponentials, so that no probability is rounded to 0 or 1.
    sums: list[Tensor] = []
    for turned in (False, True) if turns else (False,):
        views = _transpose(batch, turned)
        answers = forward(torch.cat([views.flip(dims) for dims in flips]))
        # By the same name, so that those of many classes, which are large, are not held twice.
        answers = torch.stack([_transpose(part.flip(dims), turned) for part, dims in zip(answers.chunk(len(flips)), flips)])
        sigmoid = multilabel or answers.shape[2] == 1
        sums.append(_log_probabilities(answers, sigmoid).logsumexp(dim=0))
    log_sum = torch.stack(sums).logsumexp(dim=0)
    if sigmoid:
        foreground, background = log_sum.chunk(2, dim=1)
        return foreground - background
    return log_sum - math.log(len(flips) * len(sums))


def _transpose(maps: Tensor, turned: bool) -> Tensor:
    return maps.transpose(-2, -1) if turned else maps


def _log_probabilities(logits: Tensor, sigmoid: bool) -> Tensor:
    """Along the channels, dimension 2 of (views, N, K, h, w): K classes', or K sigmoids' and then those of their opposites."""
    if sigmoid:
        return torch.cat([F.logsigmoid(logits), F.logsigmoid(-logits)], dim=2)
    return F.log_softmax(logits, dim=2)
