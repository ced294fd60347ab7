"""Other numbers of channels for a trained network: the first convolution adapted, the head replaced.

The rule for the input is that of timm (Wightman, "PyTorch Image Models"): one channel takes the sum of the weights, so that a
grey picture gives what it gave as three equal channels; other numbers repeat the weights in turn, scaled by old / new.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from .config import Preprocessing, UNetConfig

logger = logging.getLogger("unetlib")

FIRST, HEAD = "encoder.0.conv1.weight", "head"


def adapt(
    config: UNetConfig,
    state_dict: Mapping[str, Tensor],
    preprocessing: Preprocessing,
    *,
    in_channels: int | None = None,
    out_channels: int | None = None,
) -> tuple[UNetConfig, dict[str, Tensor], Preprocessing]:
    """A network's config, tensors and preprocessing for other numbers of channels.

    What changes is logged. Means and standard deviations go the way of the weights: averaged for one channel, else repeated in
    turn. A new head has fresh random weights, so the network must be trained before its masks mean anything; class names of the
    old head are dropped.

    Args:
        config: of the trained network.
        state_dict: its tensors.
        preprocessing: its preprocessing.
        in_channels: channels of the pictures; None keeps the number.
        out_channels: channels of the logits; None keeps the number, and the same number keeps the head.

    Raises:
        ValueError: for a number of channels that `UNetConfig` refuses.
    """
    tensors = dict(state_dict)
    before = config
    if in_channels is not None and in_channels != before.in_channels:
        config = dataclasses.replace(config, in_channels=in_channels)
        tensors[FIRST] = adapt_input(tensors[FIRST], in_channels)
        mean, std = (_adapt_statistics(values, in_channels) for values in (preprocessing.mean, preprocessing.std))
        preprocessing = dataclasses.replace(preprocessing, mean=mean, std=std)
        logger.info(
            "the first convolution takes %d channels instead of %d: its weights are %s",
            in_channels,
            before.in_channels,
            "summed" if in_channels == 1 else f"repeated and scaled by {before.in_channels}/{in_channels}",
        )
    if out_channels is not None and out_channels != before.out_channels:
        config = dataclasses.replace(config, out_channels=out_channels)
        tensors.update(_new_head(tensors, out_channels))
        preprocessing = dataclasses.replace(preprocessing, class_names=None)
        logger.warning(
            "the head gives %d channels instead of %d: its weights are new and random, train them before you predict",
            out_channels,
            before.out_channels,
        )
    return config, tensors, preprocessing


def adapt_input(weight: Tensor, in_channels: int) -> Tensor:
    """The weights of a convolution for another number of input channels.

    Args:
        weight: (out, old, ...), of any floating point type.
        in_channels: the new number.

    Returns:
        (out, in_channels, ...): for one channel `sum_c weight[:, c]`; else `weight[:, c % old] * old / in_channels`, which
        gives the same output for pictures whose channels are all equal, where the new number is a multiple of the old one.

    Example:
        >>> adapt_input(torch.ones(4, 3, 3, 3), 1)[0, 0, 0, 0]
        tensor(3.)
        >>> adapt_input(torch.ones(4, 3, 3, 3), 6).shape
        torch.Size([4, 6, 3, 3])
    """
    wide = weight.float()  # a sum of half-precision numbers would be rounded
    if in_channels == 1:
        return wide.sum(dim=1, keepdim=True)
    old = weight.shape[1]
    turns = [channel % old for channel in range(in_channels)]
    return wide[:, turns] * (old / in_channels)


def _adapt_statistics(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    if len(values) == 1:
        return values
    if channels == 1:
        return (math.fsum(values) / len(values),)
    return tuple(values[channel % len(values)] for channel in range(channels))


def _new_head(tensors: Mapping[str, Tensor], out_channels: int) -> dict[str, Tensor]:
    """Weights as a fresh convolution has them."""
    old = tensors[f"{HEAD}.weight"]
    weight = torch.empty(out_channels, *old.shape[1:])
    torch.nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
    new = {f"{HEAD}.weight": weight}
    if f"{HEAD}.bias" in tensors:
        bound = 1 / math.sqrt(weight[0].numel())
        new[f"{HEAD}.bias"] = torch.empty(out_channels).uniform_(-bound, bound)
    return new
