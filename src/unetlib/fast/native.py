"""A level on the CPU by this library's own operations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .folding import Layer, Parts
from .levels import Ends, Level, Step, chain, matched
from .native_kernels import NativeConv, NativeDoubling, NativeHead, has_halves, lanes, split_picture
from .onednn import OnednnLevel, max_pool_channels_last
from .pool import empty


class NativeLevel(OnednnLevel):
    """Winograd's method in channels_last: pooled on the way down, of two maps as if concatenated on the way up.

    A layer whose channels are no whole vectors is oneDNN's.

    Args:
        parts: what the level computes.
        dtype: of the network; the maps are float32 all the same. In bfloat16 convolutions multiply in it, where the CPU can.
    """

    def __init__(self, parts: Parts, dtype: torch.dtype) -> None:
        self.halves = dtype == torch.bfloat16 and has_halves()
        whole = len(parts.convs[0].weight) % lanes() == 0
        self.channels = parts.channels + (-parts.channels % lanes() if whole else 0)  # by zeros, as those of a picture
        super().__init__(parts.widened(self.channels), torch.float32)
        self.hides_nan = not all(isinstance(step, _NativeStep) for step in (*self.convs, *self.up_convs))
        self.doubling: NativeDoubling | None = None
        if parts.upsample and isinstance(module := parts.upsample[0], nn.ConvTranspose2d) and _is_whole(module.weight):
            assert module.bias is not None
            self.doubling = NativeDoubling(module.weight.detach(), module.bias.detach(), halves=self.halves)

    def step(self, layer: Layer) -> Step:
        """A layer as a function of its map."""
        return _NativeStep(layer, self.halves) if _is_whole(layer.weight) else super().step(layer)

    def prepare_merge(self, parts: Parts) -> None:
        """Halve the first convolution on the way up, if this library's own cannot take both maps."""
        if parts.width % lanes() or not _is_whole(parts.up_convs[0].weight):
            super().prepare_merge(parts)

    def convolve(self, x: Tensor) -> Tensor:
        """The double convolution alone."""
        return chain(self.convs, self.widened(x))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Convolve and pool."""
        first, second = self.convs
        if isinstance(second, _NativeStep):
            return second.and_pool(first(self.widened(x)))
        return super().encode(x)

    def decode(self, deeper: Tensor, skip: Tensor) -> Tensor:
        """Upsample, concatenate and convolve."""
        if self.doubling is None:
            return super().decode(deeper, skip)
        x = _laid_out(self.enter(deeper))
        if self.match == "resize":
            x = matched(self.doubling(x, *(2 * side for side in x.shape[-2:])), skip, self.match)
        else:  # it goes on to the skip's size by itself
            x = self.doubling(x, *skip.shape[-2:], replicate=self.match == "replicate")
        return self.merge(x, skip)

    def merge(self, x: Tensor, skip: Tensor) -> Tensor:
        """Convolve the upsampled map and the skip."""
        first, second = self.up_convs
        if not isinstance(first, _NativeStep):
            return super().merge(x, skip)
        return second(first(skip, x) if self.skip_first else first(x, skip))

    def ends(self, head: nn.Conv2d, side: int) -> Ends:
        """What comes before and after."""
        return NativeEnds(head, side, self.channels)

    def widened(self, x: Tensor) -> Tensor:
        """A map with as many channels as the first convolution takes, in this level's type and layout."""
        return self.enter(x) if x.shape[1] == self.channels else split_picture(x.float(), 1, self.channels)


class _NativeStep:
    """A layer by this library's own code."""

    def __init__(self, layer: Layer, halves: bool) -> None:
        self.conv = NativeConv(layer.weight, layer.bias, relu=layer.relu, halves=halves)
        self.after = layer.rest(torch.float32)

    def __call__(self, x: Tensor, beside: Tensor | None = None) -> Tensor:
        """Convolve, two maps as if concatenated."""
        return chain(self.after, self.conv(_laid_out(x), None if beside is None else _laid_out(beside)))

    def and_pool(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Convolve, and pool the result."""
        if self.after:
            result = self(x)
            return result, max_pool_channels_last(result)
        pooled = empty(len(x), self.conv.out_channels, x.shape[-2] // 2, x.shape[-1] // 2, channels_last=True)
        return self.conv(_laid_out(x), pooled=pooled), pooled


class NativeEnds:
    """Patches straight into the first level's layout, and logits straight from the last level's.

    Args:
        head: the last convolution.
        side: of the patches.
        channels: that the first level takes.
    """

    def __init__(self, head: nn.Conv2d, side: int, channels: int) -> None:
        assert head.bias is not None
        self.side, self.channels = side, channels
        self.apply_head = NativeHead(head.weight.detach(), head.bias.detach(), side)

    def split(self, x: Tensor) -> Tensor:
        """A picture's patches as pixels, (N, C, H, W) to (N, channels, h, w)."""
        return split_picture(x.float(), self.side, self.channels)

    def finish(self, first: Level, deeper: Tensor, skip: Tensor, size: Sequence[int]) -> Tensor:
        """Logits (N, C, *size) from what the first level decodes."""
        return self.apply_head(_laid_out(first.decode(deeper, skip)), size)


def _is_whole(weight: Tensor) -> bool:
    return all(channels % lanes() == 0 for channels in weight.shape[:2])


def _laid_out(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)
