"""One level of a U-Net's encoder and decoder, in the ways in which devices run it fast.

Every way has the same calls; it takes maps of any float type and layout, and gives them in its own, so that levels of
different ways fit together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..blocks import join_patches, match_size, split_patches
from .folding import Layer, Parts, copied
from .pool import empty
from .winograd import WinogradConv, nnpack_threads

Step = Callable[[Tensor], Tensor]
_ONES = [1, 1]  # padding, stride and dilation


class Level(Protocol):
    """A level of the network: an encoder block with the decoder's at the same size, or the bottleneck."""

    def enter(self, x: Tensor) -> Tensor:
        """A map in this level's type and layout."""

    def convolve(self, x: Tensor) -> Tensor:
        """The encoder's double convolution alone, (N, in, h, w) to (N, width, h, w)."""

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Convolve and pool, (N, in, h, w) to what `decode` wants and (N, width, h // 2, w // 2)."""

    def decode(self, deeper: Tensor, skip: Tensor) -> Tensor:
        """Upsample, concatenate and convolve, (N, deeper, h // 2, w // 2) to (N, decoder width, h, w)."""


class PlainLevel:
    """Folded convolutions by PyTorch's own operations in channels_last: for every device and type, and to compile.

    Args:
        parts: what the level computes.
        dtype: of weights and maps.
    """

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


class Ends(Protocol):
    """What comes before the first level and after the last."""

    def split(self, x: Tensor) -> Tensor:
        """A picture's patches as pixels, (N, C, H, W) to (N, C * side ** 2 or more, h, w)."""

    def head(self, x: Tensor, size: Sequence[int]) -> Tensor:
        """Logits of this size from the last map, (N, width, h, w) to (N, C, *size)."""


class PlainEnds:
    """What comes before the first level and after the last, by PyTorch's own operations.

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

    def head(self, x: Tensor, size: Sequence[int]) -> Tensor:
        """Logits of this size from the last map, (N, width, h, w) to (N, C, *size)."""
        return join_patches(self.convolve(x.to(self.dtype)), self.side, size)


class PrepackedLevel(PlainLevel):
    """Direct convolutions of oneDNN on the CPU: weights in its own layout, ReLU inside, sums instead of concatenations."""

    def __init__(self, parts: Parts, dtype: torch.dtype) -> None:
        super().__init__(parts, dtype)
        if parts.up_convs:
            self.prepare_merge(parts)

    def prepare_merge(self, parts: Parts) -> None:
        """Halve the first convolution on the way up: conv(cat(skip, x)) = conv_a(skip) + conv_b(x), and nothing is copied."""
        first = parts.up_convs[0]
        beside = first.weight.shape[1] - parts.width
        halves = torch.split(first.weight, [parts.width, beside] if parts.skip_first else [beside, parts.width], dim=1)
        of_skip, of_up = halves if parts.skip_first else reversed(halves)
        self.skip_conv = _PackedStep(Layer(of_skip, torch.zeros_like(first.bias), ()), self.dtype)
        self.up_convs[0] = _PackedStep(replace(first, weight=of_up), self.dtype)

    def step(self, layer: Layer) -> Step:
        """A layer as a function of its map."""
        return _PackedStep(layer, self.dtype)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Convolve and pool."""
        skip = self.convolve(x)
        return skip, max_pool_channels_last(skip)

    def decode(self, deeper: Tensor, skip: Tensor) -> Tensor:
        """Upsample, concatenate and convolve."""
        return self.merge(matched(chain(self.upsample, self.enter(deeper)), skip, self.match), skip)

    def merge(self, x: Tensor, skip: Tensor) -> Tensor:
        """Convolve the upsampled map and the skip."""
        first, second = self.up_convs
        return second(first(x, self.skip_conv(skip)))  # type: ignore[call-arg]


class _PackedStep:
    """A layer by oneDNN, with weights in the layout that it wants for the map's size."""

    def __init__(self, layer: Layer, dtype: torch.dtype) -> None:
        self.weight = layer.weight.to(dtype).contiguous()
        self.bias = layer.bias.to(dtype)
        self.relu = layer.relu
        self.after = layer.rest(dtype)
        self._packed: tuple[torch.Size | None, Tensor] = None, self.weight  # in one, which threads may not see half changed

    def __call__(self, x: Tensor, onto: Tensor | None = None) -> Tensor:
        """Convolve; with `onto`, add that first, and overwrite it."""
        shape, weight = self._packed
        if x.shape != shape:  # another layout would be a slow one: for maps of a few pixels by a factor of 70
            weight = torch.ops.mkldnn._reorder_convolution_weight(self.weight, _ONES, _ONES, _ONES, 1, list(x.shape))
            self._packed = x.shape, weight
        convolution = (weight, self.bias, _ONES, _ONES, _ONES, 1)
        relu = "relu" if self.relu else None
        if onto is None:
            found = torch.ops.mkldnn._convolution_pointwise.default(x, *convolution, relu or "none", [], "")
        else:
            found = torch.ops.mkldnn._convolution_pointwise_.binary(onto, x, *convolution, "add", 1.0, relu, [], None)
        return chain(self.after, found)


class WinogradLevel:
    """Winograd convolutions on the CPU: float32, contiguous layout, skip and upsampled map written where they are concatenated.

    Args:
        parts: what the level computes.
        dtype: of the network; the maps are float32 all the same.
    """

    def __init__(self, parts: Parts, dtype: torch.dtype) -> None:
        self.match, self.skip_first = parts.match, parts.skip_first
        self.convs = [_WinogradStep(layer) for layer in parts.convs]
        self.up_convs = [_WinogradStep(layer) for layer in parts.up_convs]
        self.width = parts.width
        self.total = self.up_convs[0].conv.in_channels if parts.up_convs else self.width
        self.upsample = _upsampling(*parts.upsample) if parts.upsample else None

    def enter(self, x: Tensor) -> Tensor:
        """A map in this level's type and layout."""
        return x.to(torch.float32, memory_format=torch.contiguous_format).contiguous()

    def convolve(self, x: Tensor) -> Tensor:
        """The double convolution alone."""
        x = self.enter(x)
        with nnpack_threads():
            return chain(self.convs, x)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Convolve into the skip's place in the concatenation, and pool."""
        first, second = self.convs
        x = self.enter(x)
        both = empty(len(x), self.total, *x.shape[-2:])
        with nnpack_threads():
            skip = second(first(x), places(both, self.width, self.skip_first)[0])
        return both, _max_pool(skip)

    def decode(self, deeper: Tensor, skip: Tensor) -> Tensor:
        """Upsample into the place beside the skip, and convolve."""
        assert self.upsample is not None
        self.upsample(self.enter(deeper), places(skip, self.width, self.skip_first)[1], self.match)
        with nnpack_threads():
            return chain(self.up_convs, skip)


class _WinogradStep:
    """A layer by Winograd's method."""

    def __init__(self, layer: Layer) -> None:
        self.conv = WinogradConv(layer.weight.float(), layer.bias.float(), relu=layer.relu)
        self.after = layer.rest(torch.float32)

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        found = chain(self.after, self.conv(x, out))
        return found if out is None or found is out else out.copy_(found)


def _upsampling(*parts: nn.Module | Layer) -> Callable[[Tensor, Tensor, str], None]:
    """A function of a contiguous map, the place for it doubled, and the rule by which it is brought to the place's size."""
    if isinstance(parts[0], nn.ConvTranspose2d):
        return _transposed(parts[0])
    steps = [_WinogradStep(part) if isinstance(part, Layer) else part.float() for part in parts]

    def upsample(x: Tensor, place: Tensor, match: str) -> None:
        place.copy_(matched(chain(steps, x), place, match))

    return upsample


def _transposed(module: nn.ConvTranspose2d) -> Callable[[Tensor, Tensor, str], None]:
    """A transposed convolution whose windows do not overlap: one matrix product, and an order of its results."""
    assert module.bias is not None
    weight = module.weight.detach().float().permute(2, 3, 1, 0).flatten(0, 2).contiguous()  # (2 * 2 * out, in)
    bias = module.bias.detach().float().clone().view(-1, 1, 1)

    def upsample(x: Tensor, place: Tensor, match: str) -> None:
        channels, height, width = len(bias), *x.shape[-2:]
        fits = place.shape[-2:] == (2 * height, 2 * width)
        doubled = place if fits else empty(len(x), channels, 2 * height, 2 * width)
        for picture, result in zip(x, doubled):
            product = torch.mm(weight, picture.flatten(1), out=empty(4 * channels, height * width))
            windows = product.view(2, 2, channels, height, width).add_(bias)
            result.view(channels, height, 2, width, 2).copy_(windows.permute(2, 3, 0, 4, 1))
        if not fits:
            place.copy_(matched(doubled, place, match))

    return upsample


def _max_pool(x: Tensor) -> Tensor:
    """`max_pool2d(x, 2)` by whole rows, which in the contiguous layout is ten times as fast."""
    height, width = (side // 2 * 2 for side in x.shape[-2:])
    rows = empty(*x.shape[:2], height // 2, width)
    torch.maximum(x[..., 0:height:2, :width], x[..., 1:height:2, :width], out=rows)
    return torch.maximum(rows[..., 0::2], rows[..., 1::2], out=empty(*x.shape[:2], height // 2, width // 2))


def max_pool_channels_last(x: Tensor) -> Tensor:
    """`max_pool2d(x, 2)` in channels_last, where PyTorch's own is slow for narrow maps.

    Example:
        >>> x = torch.rand(1, 8, 6, 7).to(memory_format=torch.channels_last)
        >>> torch.equal(max_pool_channels_last(x), F.max_pool2d(x, 2))
        True
    """
    height, width = (side // 2 * 2 for side in x.shape[-2:])
    pixels = x.permute(0, 2, 3, 1)[:, :height, :width]  # (N, H, W, C)
    rows = torch.maximum(pixels[:, 0::2], pixels[:, 1::2])
    return torch.maximum(rows[:, :, 0::2], rows[:, :, 1::2]).permute(0, 3, 1, 2)


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
