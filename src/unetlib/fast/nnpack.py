"""A level on the CPU by Winograd convolutions of NNPACK."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .folding import Layer, Parts
from .levels import Ends, PlainEnds, chain, matched, places
from .nnpack_kernels import NnpackConv, nnpack_threads
from .pool import empty


class NnpackLevel:
    """Winograd convolutions on the CPU: float32, contiguous layout, skip and upsampled map written where they are concatenated.

    Args:
        parts: what the level computes.
        dtype: of the network; the maps are float32 all the same.
    """

    hides_nan = False

    def __init__(self, parts: Parts, dtype: torch.dtype) -> None:
        self.dtype, self.skip_first = dtype, parts.skip_first
        self.convs = [_NnpackStep(layer) for layer in parts.convs]
        self.up_convs = [_NnpackStep(layer) for layer in parts.up_convs]
        self.width = parts.width
        self.total = self.up_convs[0].conv.in_channels if parts.up_convs else self.width
        self.upsample = _upsampling(*parts.upsample, match=parts.match) if parts.upsample else None

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
        self.upsample(self.enter(deeper), places(skip, self.width, self.skip_first)[1])
        with nnpack_threads():
            return chain(self.up_convs, skip)

    def ends(self, head: nn.Conv2d, side: int) -> Ends:
        """What comes before and after, in the network's type."""
        return PlainEnds(head, side, self.dtype)


class _NnpackStep:
    """A layer by Winograd's method."""

    def __init__(self, layer: Layer) -> None:
        self.conv = NnpackConv(layer.weight.float(), layer.bias.float(), relu=layer.relu)
        self.after = layer.rest(torch.float32)

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        found = chain(self.after, self.conv(x, out))
        return found if out is None or found is out else out.copy_(found)


def _upsampling(*parts: nn.Module | Layer, match: str) -> Callable[[Tensor, Tensor], None]:
    """A function of a contiguous map, and of the place for it doubled and brought to its size."""
    if isinstance(parts[0], nn.ConvTranspose2d):
        return _transposed(parts[0], match)
    steps = [_NnpackStep(part) if isinstance(part, Layer) else part.float() for part in parts]

    def upsample(x: Tensor, place: Tensor) -> None:
        place.copy_(matched(chain(steps, x), place, match))

    return upsample


def _transposed(module: nn.ConvTranspose2d, match: str) -> Callable[[Tensor, Tensor], None]:
    """The same by a transposed convolution whose windows do not overlap: one matrix product, and an order of its results."""
    assert module.bias is not None
    weight = module.weight.detach().float().permute(2, 3, 1, 0).flatten(0, 2).contiguous()  # (2 * 2 * out, in)
    bias = module.bias.detach().float().clone().view(-1, 1, 1)

    def upsample(x: Tensor, place: Tensor) -> None:
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
