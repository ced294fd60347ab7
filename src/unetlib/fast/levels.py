"""One level of a U-Net, and a U-Net's two ends: what every way to run them offers, and the plain way.

A level takes maps of any float type and layout, and gives them in its own, so that levels of different ways fit together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..blocks import join_patches, match_size, split_patches
from .folding import Layer, Parts, copied

Step = Callable[[Tensor], Tensor]


class Level(Protocol):
    """A level of the network: an encoder block with the decoder's at the same size, or the bottleneck.

    Attributes:
        hides_nan: NaN that comes in may not come out, as where a ReLU inside a convolution makes 0 of it; so it is looked for
            before. On CUDA it is not, though cuDNN need not keep it: looking waits for the device.
    """

    hides_nan: bool

    def enter(self, x: Tensor) -> Tensor:
        """A map in this level's type and layout."""

    def convolve(self, x: Tensor) -> Tensor:
        """The encoder's double convolution alone, (N, in, h, w) to (N, width, h, w)."""

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Convolve and pool, (N, in, h, w) to what `decode` wants and (N, width, h // 2, w // 2)."""

    def decode(self, deeper: Tensor, skip: Tensor) -> Tensor:
        """Upsample, concatenate and convolve, (N, deeper, h // 2, w // 2) to (N, decoder width, h, w)."""

    def ends(self, head: nn.Conv2d, side: int) -> Ends:
        """What suits a network that begins with this level: its last convolution, and the side of its patches."""


class Ends(Protocol):
    """What comes before the first level's encoder, and after its decoder."""

    def split(self, x: Tensor) -> Tensor:
        """A picture's patches as pixels, (N, C, H, W) to (N, C * side ** 2 or more, h, w)."""

    def finish(self, first: Level, deeper: Tensor, skip: Tensor, size: Sequence[int]) -> Tensor:
        """Logits (N, C, *size) from what the first level decodes."""


class PlainLevel:
    """Folded convolutions by PyTorch's own operations in channels_last: for every device and type, and to compile.

    Args:
        parts: what the level computes.
        dtype: of weights and maps.
    """

    hides_nan = False

    def __init__(self, parts: Parts, dtype: torch.dtype) -> None:
        self.dtype, self.match, self.skip_first = dtype, parts.match, parts.skip_first
        self.convs = [self.step(layer) for layer in parts.convs]
        self.up_convs = [self.step(layer) for layer in parts.up_convs]
        self.upsample = [self.step(part) if isinstance(part, Layer) else copied(part, dtype) for part in parts.upsample]

    def step(self, layer: Layer) -> Step:
        """A layer as a function of its map."""
        weight, bias = layer.weight.to(self.dtype, memory_format=torch.channels_last), layer.bias.to(self.dtype)
        after = [copied(module, self.dtype) for module in layer.after]
        return lambda x: chain(after, F.conv2d(x, weight, bias, padding=1))

    def enter(self, x: Tensor) -> Tensor:
        """A map in this level's type and layout."""
        return x.to(self.dtype, memory_format=torch.channels_last)

    def convolve(self, x: Tensor) -> Tensor:
        """The double convolution alone."""
        return chain(self.convs, self.enter(x))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Convolve and pool."""
        skip = self.convolve(x)
        return skip, F.max_pool2d(skip, kernel_size=2)

    def decode(self, deeper: Tensor, skip: Tensor) -> Tensor:
        """Upsample, concatenate and convolve."""
        x = matched(chain(self.upsample, self.enter(deeper)), skip, self.match)
        return chain(self.up_convs, torch.cat((skip, x) if self.skip_first else (x, skip), dim=1))

    def ends(self, head: nn.Conv2d, side: int) -> Ends:
        """What comes before and after."""
        return PlainEnds(head, side, self.dtype)


class PlainEnds:
    """What comes before the first level's encoder, and after its decoder, by PyTorch's own operations.

    Args:
        head: the last convolution.
        side: of the patches.
        dtype: of the maps.
    """

    def __init__(self, head: nn.Conv2d, side: int, dtype: torch.dtype) -> None:
        self.convolve, self.side, self.dtype = copied(head, dtype), side, dtype

    def split(self, x: Tensor) -> Tensor:
        """A picture's patches as pixels, (N, C, H, W) to (N, C * side ** 2, h, w)."""
        if self.side > 1:  # in this layout the split takes half as long, and the first level most likely wants it
            x = x.to(self.dtype, memory_format=torch.channels_last)
        return split_patches(x, self.side)

    def finish(self, first: Level, deeper: Tensor, skip: Tensor, size: Sequence[int]) -> Tensor:
        """Logits (N, C, *size) from what the first level decodes."""
        return join_patches(self.convolve(first.decode(deeper, skip).to(self.dtype)), self.side, size)


def check_finite(x: Tensor) -> None:
    """Refuse pictures with NaN, for what would make 0 of it.

    Example:
        >>> check_finite(torch.ones(1, 3, 4, 4))
    """
    if x.numel() and not all(map(math.isfinite, x.float().aminmax())):
        raise ValueError(
            "the pictures hold NaN or infinity, of which this copy makes logits that look right; mend them, or take the UNet"
        )


def places(both: Tensor, width: int, skip_first: bool) -> tuple[Tensor, Tensor]:
    """The channels of the skip, which is `width` wide, and those of the upsampled map.

    Example:
        >>> [part.shape[1] for part in places(torch.zeros(1, 24, 4, 4), 8, skip_first=False)]
        [8, 16]
    """
    if skip_first:
        return both[:, :width], both[:, width:]
    return both[:, -width:], both[:, :-width]


def matched(x: Tensor, skip: Tensor, match: str) -> Tensor:
    """`match_size` for prediction, faster where it resizes: antialiasing changes nothing but the rounding where a map grows.

    Example:
        >>> matched(torch.zeros(1, 8, 4, 6), torch.zeros(1, 8, 5, 7), "resize").shape
        torch.Size([1, 8, 5, 7])
    """
    too_many = len(x) * x.shape[1] * skip.shape[-2] * skip.shape[-1] >= 2**31 - 1  # CUDA counts in 32 bits there
    if match != "resize" or x.shape[-2:] == skip.shape[-2:] or too_many:
        return match_size(x, skip, match)
    return F.interpolate(x, size=skip.shape[-2:], mode="bilinear", align_corners=False)


def chain(steps: Sequence[Step], x: Tensor) -> Tensor:
    """One step after the other.

    Example:
        >>> chain([torch.neg, torch.relu], torch.ones(1))
        tensor([0.])
    """
    for step in steps:
        x = step(x)
    return x
