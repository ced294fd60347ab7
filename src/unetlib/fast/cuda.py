"""A level on CUDA in half precision, each layer by the route that a trial on the device finds right and fastest.

PyTorch's own `conv2d` makes two or three kernels of a convolution, its bias and its ReLU; one of cuDNN or of Triton
(`cuda_kernels`) writes each map once. A route that fails or disagrees with PyTorch's own operations in the trial is left out,
so that it can cost speed only. What was tried is logged at level DEBUG.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .folding import Layer, Parts, copied
from .levels import Ends, Level, PlainEnds, PlainLevel, Step, chain, matched, places
from .replays import captures

Route = Callable[..., Tensor]  # of a map, and of the place for the result where it is not in memory of its own
Maker = Callable[[Any, torch.dtype], Route]  # of a layer

_ALIGNED = 8  # channels: 16 bytes, of which the kernels of tensor cores read whole ones
_MOST_RESULTS = 16  # of a pixel, up to which the head is a small part of the layer before it
_WIDEST = 128  # channels, up to which the bytes of a layer count as much as its arithmetic, which cuDNN does best
logger = logging.getLogger("unetlib")


class CudaLevel(PlainLevel):
    """Half precision on CUDA: skip and upsampled map are written where they are concatenated.

    Args:
        parts: what the level computes.
        dtype: of weights and maps.
    """

    def __init__(self, parts: Parts, dtype: torch.dtype) -> None:
        self.channels = parts.channels + -parts.channels % _ALIGNED
        super().__init__(parts.widened(self.channels), dtype)
        self.width = parts.width
        self.total = parts.up_convs[0].weight.shape[1] if parts.up_convs else self.width
        self.last = parts.up_convs[1] if parts.up_convs else None
        self.up_conv: _Fastest | None = None
        if parts.upsample and isinstance(module := parts.upsample[0], nn.ConvTranspose2d):
            assert module.bias is not None
            layer = Layer(module.weight.detach(), module.bias.detach(), ())
            self.up_conv = _Fastest(layer, dtype, (_PlainUp, _ProductUp, _KernelUp))

    def step(self, layer: Layer) -> Step:
        """A layer as a function of its map, and of the place for the result."""
        if not layer.relu:
            return _Fastest(layer, self.dtype, (_Plain,))
        own = (_Kernel,) if _is_narrow(layer) else ()
        return _Fastest(layer, self.dtype, (_Plain, _Cudnn, *own), (_Plain, _Cudnn, _CudnnPlaced, *own))

    def convolve(self, x: Tensor) -> Tensor:
        """The double convolution alone."""
        return chain(self.convs, self._aligned(x))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Convolve into the skip's place in the concatenation, and pool."""
        first, second = self.convs
        x = first(self._aligned(x))
        both = _empty(x, self.total, x.shape[-2:])
        return both, second(x, places(both, self.width, self.skip_first)[0])  # type: ignore[call-arg]

    def decode(self, deeper: Tensor, skip: Tensor) -> Tensor:
        """Upsample into the place beside the skip, and convolve."""
        return self.up_convs[1](self.begin(deeper, skip))

    def begin(self, deeper: Tensor, skip: Tensor) -> Tensor:
        """The same but for the last convolution."""
        self.fill(places(skip, self.width, self.skip_first)[1], self.enter(deeper))
        return self.up_convs[0](skip)

    def fill(self, place: Tensor, x: Tensor) -> None:
        """Upsample a map into its place, which may have a row or a column more."""
        height, width = 2 * x.shape[-2], 2 * x.shape[-1]
        if self.up_conv is None:
            place.copy_(matched(chain(self.upsample, x), place, self.match))
        elif self.match == "resize" and place.shape[-2:] != (height, width):
            doubled = _empty(x, place.shape[1], (height, width))
            self.up_conv(x, doubled)
            place.copy_(matched(doubled, place, self.match))
        else:
            self.up_conv(x, place[..., :height, :width])
            for dim, side in ((-2, height), (-1, width)):
                if place.shape[dim] > side:
                    beyond = place.narrow(dim, side, 1)
                    if self.match == "replicate":
                        beyond.copy_(place.narrow(dim, side - 1, 1))
                    else:
                        beyond.zero_()

    def ends(self, head: nn.Conv2d, side: int) -> Ends:
        """What comes before and after."""
        assert self.last is not None
        return CudaEnds(head, side, self.dtype, self.channels, self.last)

    def _aligned(self, x: Tensor) -> Tensor:
        """A map in this level's type and layout, with channels of zeros up to the next multiple of 8."""
        if x.shape[1] == self.channels:
            return self.enter(x)
        whole = _empty(x, self.channels, x.shape[-2:], self.dtype)
        whole[:, : x.shape[1]] = x
        whole[:, x.shape[1] :] = 0
        return whole


class CudaEnds(PlainEnds):
    """Splits pictures in one kernel of Triton, and makes logits in one or two, where that is right.

    Args:
        head: the last convolution.
        side: of the patches.
        dtype: of the maps.
        channels: of the first level.
        last: the layer before the head.
    """

    def __init__(self, head: nn.Conv2d, side: int, dtype: torch.dtype, channels: int, last: Layer) -> None:
        super().__init__(head, side, dtype)
        self.channels = channels
        assert head.bias is not None
        both = _WithHead(last.weight, last.bias, last.after, Layer(head.weight.detach(), head.bias.detach(), ()))
        self.last = _Fastest(both, dtype, _lasts(side, last.relu, _is_narrow(last), len(head.weight)))
        self._kernel_is_right: dict[torch.dtype, bool] = {}  # for each type of pictures

    def split(self, x: Tensor) -> Tensor:
        """A picture's patches as pixels, (N, C, H, W) to (N, C * side ** 2 or more, h, w)."""
        if x.dtype not in self._kernel_is_right and not captures(x):
            self._kernel_is_right[x.dtype] = self._compare(x)
        return self._split(x) if self._kernel_is_right.get(x.dtype) else super().split(x)

    def _split(self, x: Tensor) -> Tensor:
        from .cuda_kernels import split_patches

        out = _empty(x, self.channels, [-(-side // self.side) for side in x.shape[-2:]], self.dtype)
        split_patches(x, out, self.side)
        return out

    def _compare(self, x: Tensor) -> bool:
        """Whether the kernel gives what PyTorch's operations do, and zeros."""
        expected = super().split(x).to(self.dtype)
        try:
            found = self._split(x)
            same = torch.allclose(found[:, : expected.shape[1]], expected, rtol=0, atol=0, equal_nan=True)
            return same and not found[:, expected.shape[1] :].any()
        except Exception as error:  # whatever it is, there is the plain way
            logger.debug("no kernel splits %s: %r", tuple(x.shape), error)
            return False

    def finish(self, first: Level, deeper: Tensor, skip: Tensor, size: Sequence[int]) -> Tensor:
        """Logits (N, C, *size), float32, from what the first level decodes."""
        assert isinstance(first, CudaLevel)
        return self.last(first.begin(deeper, skip))[..., : size[0], : size[1]]


@dataclass(frozen=True)
class _WithHead(Layer):
    """The layer before the head, and the head."""

    head: Layer


def _is_narrow(layer: Layer) -> bool:
    return max(layer.weight.shape[:2]) <= _WIDEST


# --- routes: of a layer with a ReLU; with a place they fill it, and give the map pooled


class _Plain:
    """PyTorch's own operations, by which the others are judged."""

    def __init__(self, layer: Layer, dtype: torch.dtype) -> None:
        self.weight, self.bias = layer.weight.to(dtype, memory_format=torch.channels_last), layer.bias.to(dtype)
        self.after = [copied(module, dtype) for module in layer.after]

    def __call__(self, x: Tensor, place: Tensor | None = None) -> Tensor:
        y = self.convolve(x)
        return y if place is None else self.put(y, place)

    def convolve(self, x: Tensor) -> Tensor:
        return chain(self.after, F.conv2d(x, self.weight, self.bias, padding=1))

    def put(self, y: Tensor, place: Tensor) -> Tensor:
        place.copy_(y)
        return F.max_pool2d(y, 2)


class _Cudnn(_Plain):
    """Convolution, bias and ReLU as one kernel of cuDNN."""

    def convolve(self, x: Tensor) -> Tensor:
        return torch.cudnn_convolution_relu(x, self.weight, self.bias, [1, 1], [1, 1], [1, 1], 1)


class _CudnnPlaced(_Cudnn):
    """The same, then the copy and the pooling as one kernel of Triton."""

    def put(self, y: Tensor, place: Tensor) -> Tensor:
        from .cuda_kernels import place_and_pool

        pooled = _empty(y, y.shape[1], _halved(y))
        place_and_pool(y, place, pooled)
        return pooled


class _Kernel:
    """All in one kernel of Triton."""

    def __init__(self, layer: Layer, dtype: torch.dtype) -> None:
        from .cuda_kernels import Conv3x3

        self.conv = Conv3x3(layer.weight.to(dtype), layer.bias)

    def __call__(self, x: Tensor, place: Tensor | None = None) -> Tensor:
        if place is None:
            out = _empty(x, self.conv.out_channels, x.shape[-2:])
            self.conv(x, out)
            return out
        pooled = _empty(x, self.conv.out_channels, _halved(x))
        self.conv(x, place, pooled)
        return pooled


# --- routes: of a transposed convolution; they fill the place


class _PlainUp:
    """PyTorch's own operation, and a copy."""

    def __init__(self, layer: Layer, dtype: torch.dtype) -> None:
        self.weight, self.bias = layer.weight.to(dtype, memory_format=torch.channels_last), layer.bias.to(dtype)

    def __call__(self, x: Tensor, place: Tensor) -> Tensor:
        return place.copy_(F.conv_transpose2d(x, self.weight, self.bias, stride=2))


class _ProductUp:
    """A matrix product, and a copy in the order of the pixels."""

    def __init__(self, layer: Layer, dtype: torch.dtype) -> None:
        self.weight = layer.weight.to(dtype).permute(0, 2, 3, 1).flatten(1)  # (in, 2 * 2 * out)
        self.bias = layer.bias.to(dtype).repeat(4)

    def __call__(self, x: Tensor, place: Tensor) -> Tensor:
        count, channels, height, width = x.shape
        product = torch.addmm(self.bias, x.permute(0, 2, 3, 1).reshape(-1, channels), self.weight)
        product = product.view(count, height, width, 2, 2, -1).transpose(2, 3)
        place.permute(0, 2, 3, 1).view(count, height, 2, width, 2, -1).copy_(product)
        return place


class _KernelUp:
    """The product with its results stored in place, in one kernel of Triton."""

    def __init__(self, layer: Layer, dtype: torch.dtype) -> None:
        from .cuda_kernels import UpConv2x2

        self.conv = UpConv2x2(layer.weight.to(dtype), layer.bias)

    def __call__(self, x: Tensor, place: Tensor) -> Tensor:
        self.conv(x, place)
        return place


# --- routes: of the last layer and the head; to float32 logits of the picture's pixels


class _PlainHead:
    """PyTorch's own operations."""

    def __init__(self, layer: Layer, dtype: torch.dtype, *, side: int) -> None:
        self.weight, self.bias = layer.weight.to(dtype, memory_format=torch.channels_last), layer.bias.to(dtype)
        self.side = side

    def __call__(self, x: Tensor) -> Tensor:
        return F.pixel_shuffle(F.conv2d(x, self.weight, self.bias).float(), self.side)


class _KernelHead:
    """The head in one kernel of Triton."""

    def __init__(self, layer: Layer, dtype: torch.dtype, *, side: int) -> None:
        from .cuda_kernels import Head

        self.convolve = Head(layer.weight.to(dtype), layer.bias, side)

    def __call__(self, x: Tensor) -> Tensor:
        return self.convolve(x)


class _Last:
    """The layer by one route, and the head by another."""

    def __init__(
        self, layer: _WithHead, dtype: torch.dtype, *, side: int, conv: Callable[..., Route], head: Callable[..., Route]
    ) -> None:
        self.conv, self.head = conv(layer, dtype), head(layer.head, dtype, side=side)

    def __call__(self, x: Tensor, place: None = None) -> Tensor:
        return self.head(self.conv(x))


class _KernelLast:
    """Both in one kernel of Triton."""

    def __init__(self, layer: _WithHead, dtype: torch.dtype, *, side: int) -> None:
        from .cuda_kernels import Conv3x3Head

        self.convolve = Conv3x3Head(layer.weight.to(dtype), layer.bias, layer.head.weight, layer.head.bias, side)

    def __call__(self, x: Tensor, place: None = None) -> Tensor:
        return self.convolve(x)


@cache
def _lasts(side: int, relu: bool, narrow: bool, results: int) -> tuple[Maker, ...]:
    """Always the same objects, by which trials are known."""
    convs: list[Callable[..., Route]] = [_Plain, *([_Cudnn] if relu else []), *([_Kernel] if relu and narrow else [])]
    apart = [partial(_Last, side=side, conv=conv, head=_KernelHead) for conv in convs]
    fused = [partial(_KernelLast, side=side)] if relu and narrow and results <= _MOST_RESULTS else []
    return partial(_Last, side=side, conv=_Plain, head=_PlainHead), *apart, *fused


# --- the trial


class _Fastest:
    """A layer by the fastest of its routes, for each shape of map.

    Args:
        layer: the layer.
        dtype: of weights and maps.
        routes: the plain one first.
        placing: those with a place for the result, where they are others.
    """

    def __init__(
        self, layer: Layer, dtype: torch.dtype, routes: tuple[Maker, ...], placing: tuple[Maker, ...] | None = None
    ) -> None:
        self.layer, self.dtype, self.routes, self.placing = layer, dtype, routes, placing or routes
        self._made: dict[Maker, Route] = {}

    def __call__(self, x: Tensor, place: Tensor | None = None) -> Tensor:
        maker = fastest(self.routes if place is None else self.placing, self.layer, x, place)
        route = self._made.get(maker)
        if route is None:
            route = maker(self.layer, self.dtype)
            if not captures(x):  # what a capture makes is written when it is replayed
                if x.is_cuda:
                    torch.cuda.current_stream(x.device).synchronize()  # before another stream finds it
                self._made[maker] = route
        return route(x, place)


_KEPT = 4096  # shapes
_trials = threading.Lock()  # they set a switch of cuDNN's, and would time each other
_winners: dict[tuple[Any, ...], Maker] = {}  # for each shape
_leaders: dict[tuple[Any, ...], Maker] = {}  # for each size, by powers of two
_untried: set[tuple[Any, ...]] = set()  # sizes for which a trial came to nothing, most likely for want of memory


def fastest(makers: tuple[Maker, ...], layer: Layer, x: Tensor, place: Tensor | None) -> Maker:
    """The fastest of the routes that are right, by a trial at the first call in a process with these shapes and strides.

    Of shapes of about one size the first has a trial of all routes, the others of its winner only: pictures may come in many.
    """
    if len(makers) == 1:
        return makers[0]
    kind = (makers, layer.weight.shape, x.dtype, x.device)
    shape = (x.shape, x.stride(), None if place is None else (place.stride(), place.storage_offset()))
    winner = _winners.get((kind, shape))
    if winner is None:
        if captures(x):
            return makers[0]  # no trial can run within a capture
        with _trials:
            winner = _winners.get((kind, shape))
            if winner is None:
                size = (kind, len(x), x.numel().bit_length(), place is None)
                tried = (makers[0], _leaders[size]) if size in _leaders else makers
                found = _trial(tried, layer, x, place, tune=size not in _leaders)
                if found:
                    _leaders.setdefault(size, found)
                elif size not in _untried:
                    _untried.add(size)
                    return makers[0]  # for now: memory may be short for a moment, or always, so that one more trial is enough
                winner = _winners[kind, shape] = found or makers[0]
                if len(_winners) > _KEPT:
                    _winners.pop(next(iter(_winners)))
    return winner


def _trial(makers: tuple[Maker, ...], layer: Layer, x: Tensor, place: Tensor | None, tune: bool) -> Maker | None:
    """The fastest that is right; None where none could be tried."""
    if len(set(makers)) == 1:
        return makers[0]
    times: dict[Maker, float] = {}
    tuned = torch.backends.cudnn.benchmark
    # So cuDNN looks for its fastest plan now, and keeps it. By the function beneath, for a program may have frozen the flags.
    torch._C._set_cudnn_benchmark(tuned or tune)
    try:
        case = _Case(layer, x, place)
        expected = case.run(makers[0](case.layer, x.dtype))
        for maker in makers:
            try:
                route = maker(case.layer, x.dtype)
                if case.agree(case.run(route, expected), expected):
                    times[maker] = _milliseconds(partial(route, *case.maps))
            except Exception as error:  # whatever it is, there is the plain route
                logger.debug("%s cannot do %s: %r", maker, tuple(x.shape), error)
    except Exception as error:  # no memory for a trial, most likely
        logger.debug("no trial with %s: %r", tuple(x.shape), error)
    finally:
        torch._C._set_cudnn_benchmark(tuned)
    logger.debug("ms of %s for %s: %s", tuple(layer.weight.shape), tuple(x.shape), times)
    return min(times, key=times.__getitem__, default=None)


class _Case:
    """Drawn weights and maps of the shapes and strides of some others.

    Where there is a place, it is one in a map of NaN, so that what is written beside it is seen, and what is left out too.
    """

    def __init__(self, layer: Layer, x: Tensor, place: Tensor | None) -> None:
        generator = torch.Generator(x.device).manual_seed(0)
        self.layer = _drawn(layer, generator)
        self.maps = [torch.empty_like(x).normal_(generator=generator)]
        self.whole: Tensor | None = None
        if place is not None:
            total, (_, channels, height, width) = place.stride(3), place.shape
            first = place.storage_offset() % total
            self.whole = _empty(place, total, (place.stride(0) // place.stride(2), place.stride(2) // total))
            self.maps.append(self.whole[:, first : first + channels, :height, :width])

    def run(self, route: Route, expected: tuple[Tensor, ...] = ()) -> tuple[Tensor, ...]:
        """What the route gives, and the whole map with its place in it, in memory that held NaN before."""
        if self.whole is not None:
            self.whole.fill_(torch.nan)
        poison = [torch.full_like(tensor, torch.nan) for tensor in (*expected, *self.maps)]
        del poison  # the next tensors of these sizes get this memory
        result = route(*self.maps)
        return (result.clone(),) if self.whole is None else (result.clone(), self.whole.clone())

    def agree(self, found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
        """Whether results agree to a few roundings, of numbers about 1."""
        near = partial(
            torch.allclose, rtol=(error := 1e-5 + 4 * torch.finfo(self.maps[0].dtype).eps), atol=error, equal_nan=True
        )
        return all(near(*pair) for results in zip(found, expected) for pair in zip(*results))  # picture by picture: less memory


def _drawn(layer: Layer, generator: torch.Generator) -> Layer:
    """The layer with other weights and biases, which make numbers about 1 of such numbers; so its head, if it has one."""
    weight, bias = (torch.empty_like(part).normal_(generator=generator) for part in (layer.weight, layer.bias))
    layer = replace(layer, weight=weight / (weight.numel() / len(bias)) ** 0.5, bias=bias)
    return replace(layer, head=_drawn(layer.head, generator)) if isinstance(layer, _WithHead) else layer


def _milliseconds(function: Callable[[], Tensor]) -> float:
    """The least of five times on the device.

    A short busy wait is queued before each, so that the call is wholly queued when the device comes to it and Python's time is
    not measured.
    """
    times: list[float] = []
    for _ in range(5):
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        torch.cuda._sleep(500_000)  # type: ignore[no-untyped-call]  # cycles
        began.record()
        function()
        ended.record()
        ended.synchronize()
        times.append(began.elapsed_time(ended))
    return min(times)


def _empty(like: Tensor, channels: int, size: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised map in channels_last."""
    shape = (len(like), channels, *size)
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device, memory_format=torch.channels_last)


def _halved(x: Tensor) -> tuple[int, int]:
    return x.shape[-2] // 2, x.shape[-1] // 2
