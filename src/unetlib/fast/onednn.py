"""A level on the CPU by direct convolutions of oneDNN."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .folding import Layer, Parts
from .levels import PlainLevel, Step, chain, matched

_ONES = [1, 1]  # padding, stride and dilation


class OnednnLevel(PlainLevel):
    """Direct convolutions of oneDNN on the CPU: weights in its own layout, ReLU inside, sums instead of concatenations."""

    hides_nan = True

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


def max_pool_channels_last(x: Tensor) -> Tensor:
    """`max_pool2d(x, 2)` in channels_last, where PyTorch's own is slow for narrow maps.

    Example:
        >>> import torch.nn.functional as F
        >>> x = torch.rand(1, 8, 6, 7).to(memory_format=torch.channels_last)
        >>> torch.equal(max_pool_channels_last(x), F.max_pool2d(x, 2))
        True
    """
    height, width = (side // 2 * 2 for side in x.shape[-2:])
    pixels = x.permute(0, 2, 3, 1)[:, :height, :width]  # (N, H, W, C)
    rows = torch.maximum(pixels[:, 0::2], pixels[:, 1::2])
    return torch.maximum(rows[:, :, 0::2], rows[:, :, 1::2]).permute(0, 3, 1, 2)
