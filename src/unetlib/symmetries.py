"""Test-time augmentation: a network's mean opinion of a picture, turned and mirrored."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import reduce

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
    log_sum: Tensor = reduce(torch.logaddexp, _opinions(forward, batch, flips, turns, multilabel))
    if log_sum.ndim > batch.ndim:
        return log_sum[0] - log_sum[1]  # foreground and background
    return log_sum  # a softmax takes the sum for the mean


def _opinions(
    forward: Callable[[Tensor], Tensor], batch: Tensor, flips: Flips, turns: bool, multilabel: bool
) -> Iterator[Tensor]:
    """The log-probabilities of each view, turned back; one by one, since those of many classes are large."""
    for turned in (False, True) if turns else (False,):
        seen = batch.mT if turned else batch
        for answer, dims in zip(forward(torch.cat([seen.flip(dims) for dims in flips])).chunk(len(flips)), flips):
            upright = _log_probabilities(answer, multilabel).flip(dims)
            yield upright.mT if turned else upright
        del answer  # the last to hold what `forward` gave


def _log_probabilities(logits: Tensor, multilabel: bool) -> Tensor:
    """(N, K, h, w) of a softmax; (2, N, K, h, w) of sigmoids, and of their opposites."""
    if multilabel or logits.shape[1] == 1:
        return torch.stack([F.logsigmoid(logits), F.logsigmoid(-logits)])
    return F.log_softmax(logits, dim=1)
