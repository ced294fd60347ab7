"""Other numbers of channels, or a larger size, for a trained network.

The rule for the input is that of timm (Wightman, "PyTorch Image Models"): one channel takes the sum of the weights, so that a
grey picture gives what it gave as three equal channels, if these have one mean and one standard deviation; other numbers
repeat the weights in turn, scaled by old / new.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .arguments import check_unet, whole
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

    Example:
        >>> from unetlib import UNet
        >>> model = UNet(features=(8,))
        >>> config, tensors, _ = adapt(model.config, model.state_dict(), model.preprocessing, in_channels=1)
        >>> config.in_channels, tensors["encoder.0.conv1.weight"].shape
        (1, torch.Size([8, 1, 3, 3]))
    """
    tensors = dict(state_dict)
    before = config
    if in_channels is not None and in_channels != before.in_channels:
        config = dataclasses.replace(config, in_channels=in_channels)
        weight = torch.unflatten(tensors[FIRST], 1, (before.in_channels, -1))  # a channel's pixels in a patch are side by side
        tensors[FIRST] = adapt_input(weight, in_channels).flatten(1, 2)
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
        width, channels = before.decoder_features[0], out_channels * before.patch_size**2
        head = torch.nn.Conv2d(width, channels, kernel_size=1, device="cpu", dtype=torch.float32)  # whatever the defaults are
        tensors |= head.state_dict(prefix=f"{HEAD}.")
        multilabel = preprocessing.multilabel and out_channels > 1
        preprocessing = dataclasses.replace(preprocessing, class_names=None, multilabel=multilabel)
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

    Raises:
        TypeError: for a number that is no integer.
        ValueError: for one below 1.

    Example:
        >>> adapt_input(torch.ones(4, 3, 3, 3), 1)[0, 0, 0, 0]
        tensor(3.)
        >>> adapt_input(torch.ones(4, 3, 3, 3), 6).shape
        torch.Size([4, 6, 3, 3])
    """
    whole("in_channels", in_channels, 1)
    wide = weight.float()  # a sum of half-precision numbers would be rounded
    if in_channels == 1:
        return wide.sum(dim=1, keepdim=True)
    old = weight.shape[1]
    turns = [channel % old for channel in range(in_channels)]
    return wide[:, turns] * (old / in_channels)


@torch.no_grad()
def grow(
    model: UNet,
    *,
    features: Sequence[int] | None = None,
    bottleneck: int | None = None,
    patch_size: int | None = None,
    match: str | None = None,
) -> UNet:
    """A larger network that starts out as the same function: of wider levels, or for pictures of several times the size.

    New channels have fresh random weights, and what reads them starts with zeros. Chen, Goodfellow and Shlens, "Net2Net", ICLR
    2016 (arXiv:1511.05641), widen networks by copies instead.

    Args:
        model: the trained network, which stays as it is; with norm "group" it cannot be widened, since its groups would change.
        features: width of each level, no less than it is, nor than its width in the decoder, which becomes the same. None keeps
            them all.
        bottleneck: width of the deepest block, no less than it is; None keeps it.
        patch_size: as in `UNetConfig`, for a network that has 1: its pictures are then as many times as high and wide, and it
            begins with the logits of the reduced picture. None keeps it.
        match: as in `UNetConfig`; None keeps it.

    Returns:
        The larger network, in the trained one's mode, with its preprocessing; a `size` or `scale` grows with the patches.

    Raises:
        TypeError: for a network in a wrapper, such as `DataParallel`.
        ValueError: for a network, widths or a size of patches that cannot be grown.

    Example:
        >>> from unetlib import UNet
        >>> model, x = UNet(features=(8, 16)).eval(), torch.rand(1, 3, 32, 48)
        >>> torch.allclose(grow(model, features=(12, 16))(x), model(x), atol=1e-5)
        True
        >>> grow(model, patch_size=2)(torch.rand(1, 3, 64, 96)).shape
        torch.Size([1, 1, 64, 96])
    """
    check_unet(model)
    old = model.config
    if patch_size not in (None, old.patch_size) and old.patch_size != 1:
        raise ValueError(
            f"patch_size can be grown from 1, not from the network's {old.patch_size} to {patch_size}; leave it out"
        )
    given = {"features": features, "bottleneck": bottleneck, "patch_size": patch_size, "match": match}
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if features is not None:
        changes |= {"mid_features": features, "decoder_features": features}
    if features is not None or old.upsample in ("bilinear", "nearest"):
        changes["up_features"] = None  # what follows from the others
    new = dataclasses.replace(old, **changes)
    for name in ("features", "mid_features", "decoder_features", "up_features"):
        before, after = (*getattr(old, name), old.bottleneck), (*getattr(new, name), new.bottleneck)
        if len(before) != len(after) or any(wide < narrow for narrow, wide in zip(before, after)):
            wanted = "features" if features is not None else name  # the others follow from these
            raise ValueError(f"{wanted} and bottleneck must be {before} or more, level by level, got {after}")
        if old.norm == "group" and after != before:
            raise ValueError("a network with norm 'group' cannot be widened: the groups of its channels would change")

    grown = type(model).from_config(new).train(model.training)
    grown.to(model.head.weight)
    factor, how = new.patch_size // old.patch_size, model.preprocessing
    grown.preprocessing = dataclasses.replace(
        how,
        size=None if how.size is None else (factor * how.size[0], factor * how.size[1]),
        scale=None if how.scale is None else factor * how.scale,
    )
    trained = model.state_dict()
    if new.patch_size != old.patch_size:
        pixels = new.patch_size**2
        trained[FIRST] = trained[FIRST].repeat_interleave(pixels, dim=1) / pixels
        for name in (f"{HEAD}.weight", f"{HEAD}.bias"):
            trained[name] = trained[name].repeat_interleave(pixels, dim=0)
    for name, tensor in grown.state_dict().items():
        _place(trained[name], tensor, name, old, new)
    return grown


def _place(small: Tensor, large: Tensor, name: str, old: UNetConfig, new: UNetConfig) -> None:
    """Put the values of a trained layer among those of a grown one, and zeros where it would read new channels."""
    if small.ndim == 0:  # the number of batches that a norm has seen
        large.copy_(small)
        return
    if small.ndim == 1:
        large[: len(small)] = small
        return
    if name.endswith(".upsample.weight"):  # of a transposed convolution: (in, out, 2, 2)
        small, large = small.transpose(0, 1), large.transpose(0, 1)
    inputs = list(range(small.shape[1]))
    if name.endswith(".conv.conv1.weight"):  # reads two maps, each of which has grown
        level = old.depth - 1 - int(name.split(".")[1])
        first = "features" if old.skip_first else "up_features"
        before, after = getattr(old, first)[level], getattr(new, first)[level]
        inputs = [place if place < before else place + after - before for place in inputs]
    large[: len(small)] = 0
    large[: len(small), inputs] = small


def _adapt_statistics(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    if len(values) == 1:
        return values
    if channels == 1:
        return (math.fsum(values) / len(values),)
    return tuple(values[channel % len(values)] for channel in range(channels))
