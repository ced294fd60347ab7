"""Other numbers of channels, or one more level, for a trained network: the first convolution adapted, the head replaced.

The rule for the input is that of timm (Wightman, "PyTorch Image Models"): one channel takes the sum of the weights, so that a
grey picture gives what it gave as three equal channels; other numbers repeat the weights in turn, scaled by old / new.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .config import Preprocessing, UNetConfig

if TYPE_CHECKING:
    from .unet import UNet

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


@torch.no_grad()
def deepen(model: UNet, pictures: Tensor, width: int | None = None) -> UNet:
    """A network with one more level on top, in which the trained one sees its pictures at half their size.

    The new level hands the picture down, and the trained network's last map up, both unchanged but for the pooling; what else
    it could do is fresh. So a network that was trained on small pictures goes on with large ones without losing what it knows.

    Args:
        model: the trained network, with norm "batch", upsample "transpose" and activation "relu". It stays as it is.
        pictures: a batch (N, in_channels, H, W) of twice the trained size, as the network sees them, none of them negative: the
            new norms take their statistics from it.
        width: of the new level, at least the numbers of input channels and of the last map's channels; None takes the latter,
            where that is enough.

    Returns:
        The deeper network, in evaluation mode, with the trained one's preprocessing.

    Raises:
        ValueError: for a network of other options, or too small a width.

    Example:
        >>> from unetlib import UNet
        >>> deepen(UNet(features=(8, 16)), torch.rand(1, 3, 32, 48)).config.features
        (8, 8, 16)
    """
    old = model.config
    carried = old.decoder_features[0]
    width = max(carried, old.in_channels) if width is None else width
    if (old.norm, old.upsample, old.activation) != ("batch", "transpose", "relu"):
        raise ValueError(
            "only a network with norm 'batch', upsample 'transpose' and activation 'relu' can be deepened, "
            f"got {old.norm!r}, {old.upsample!r} and {old.activation!r}"
        )
    if width < max(carried, old.in_channels):
        raise ValueError(f"width must be at least {max(carried, old.in_channels)}, what the new level hands on, got {width!r}")
    widths: dict[str, Any] = {
        name: (width, *getattr(old, name)) for name in ("features", "up_features", "mid_features", "decoder_features")
    }
    deeper = type(model).from_config(dataclasses.replace(old, **widths)).eval()
    deeper.preprocessing = model.preprocessing
    for mine, theirs in zip(deeper.encoder[1:], model.encoder):
        mine.load_state_dict(_widened(theirs.state_dict(), mine.state_dict()))
    deeper.bottleneck.load_state_dict(model.bottleneck.state_dict())
    for mine, theirs in zip(deeper.decoder, model.decoder):
        mine.load_state_dict(theirs.state_dict())
    deeper.head.load_state_dict(_widened(model.head.state_dict(), deeper.head.state_dict()))

    first: Any = deeper.encoder[0]
    last: Any = deeper.decoder[-1]
    _hand_on(first.conv1, old.in_channels)
    _hand_on(first.conv2, old.in_channels)
    _hand_on(last.upsample, carried)
    _hand_on(last.conv.conv1, carried, start=width if old.skip_first else 0)
    _hand_on(last.conv.conv2, carried)
    norms = (first.norm1, first.norm2, last.conv.norm1, last.conv.norm2)
    hooks = [norm.register_forward_pre_hook(_change_nothing) for norm in norms]
    deeper(pictures)
    for hook in hooks:
        hook.remove()
    return deeper


def _widened(tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights whose input channels beyond the given ones are zero, where `like` has more of them."""
    wide = {name: torch.zeros_like(tensor) for name, tensor in like.items()}
    for name, tensor in tensors.items():
        if tensor.ndim == 4:
            wide[name][:, : tensor.shape[1]] = tensor
        else:
            wide[name] = tensor
    return wide


def _hand_on(conv: nn.Conv2d | nn.ConvTranspose2d, channels: int, start: int = 0) -> None:
    """Make the first output channels of a convolution those of the input from `start` on."""
    if isinstance(conv, nn.ConvTranspose2d):
        conv.weight[:, :channels] = torch.eye(channels)[:, :, None, None]
    else:
        conv.weight[:channels] = 0
        conv.weight[:channels, start : start + channels, 1, 1] = torch.eye(channels)
    if conv.bias is not None:
        conv.bias[:channels] = 0


def _change_nothing(norm: nn.BatchNorm2d, inputs: tuple[Tensor]) -> None:
    """Statistics of the input, and weights that undo the norm."""
    variance, mean = torch.var_mean(inputs[0], dim=(0, 2, 3), correction=0)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(variance)
    norm.weight.copy_((variance + norm.eps).sqrt())
    norm.bias.copy_(mean)


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
