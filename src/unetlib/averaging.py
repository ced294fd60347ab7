"""A moving average of a model's weights, which often scores better than the weights themselves."""

from __future__ import annotations

from itertools import compress

import torch
from torch import nn


@torch.no_grad()
def follow(average: nn.Module, model: nn.Module, decay: float, *, steps: int) -> None:
    """Move an average of weights and statistics towards a model's.

    The average keeps a share of `min(decay, (1 + steps) / (10 + steps))` of what it is, so that it is quick to follow at first
    and short runs have one too. `torch.optim.swa_utils.AveragedModel` averages without that; and it counts steps on the
    device, for which it waits in each.

    Args:
        average: a copy of the model, as by `copy.deepcopy`, on the same device; changed in place.
        model: the model, after a step of its training.
        decay: the share that is kept later on, in [0, 1): 0.99 forgets over some 100 steps.
        steps: how many the average has followed before.

    Raises:
        ValueError: for a decay outside [0, 1), or a negative number of steps.

    Example:
        >>> model, average = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        >>> for layer, weight in ((model, 1.0), (average, 0.0)):
        ...     _ = nn.init.constant_(layer.weight, weight)
        >>> follow(average, model, 0.75, steps=1000)
        >>> average.weight.item()
        0.25
    """
    if not 0 <= decay < 1 or steps < 0:
        raise ValueError(f"decay must be in [0, 1) and steps 0 or more, got decay={decay!r}, steps={steps!r}")
    mine, others = ([*network.parameters(), *network.buffers()] for network in (average, model))  # shared ones once
    floats = [tensor.is_floating_point() for tensor in mine]
    share = 1 - min(decay, (1 + steps) / (10 + steps))
    torch._foreach_lerp_([*compress(mine, floats)], [*compress(others, floats)], share)
    for own, other in zip(mine, others):
        if not own.is_floating_point():  # counts of batches
            own.copy_(other)
