"""This library's own operations on the CPU, on float32 in channels_last; `native_kernels.cpp` carries them out.

Winograd's method pays for narrow maps too where nothing between its steps goes to memory, and no library does that. The
relative error of a convolution is about 1e-6, where a direct one has a few 1e-7. With products in bfloat16 it is 1e-2, where a
direct one of maps in bfloat16 has 2e-3; but here maps are not rounded.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import math
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ctypes import Structure, byref, c_int64, c_void_p
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..blocks import join_patches, split_patches
from . import native_library
from .pool import empty

_SMALL = 144  # pixels of a map: below it, reading the transformed weights takes longer than they save
_PLACES = 36  # of Winograd's method
_ROOT = math.sqrt(2)
_WEIGHTS = (  # of Winograd's method, by which a row of a kernel is transformed
    (1, 0, 0),
    (-2 / 3, -_ROOT / 3, -1 / 3),
    (-2 / 3, _ROOT / 3, -1 / 3),
    (1 / 6, _ROOT / 6, 1 / 3),
    (1 / 6, -_ROOT / 6, 1 / 3),
    (0, 0, 1),
)
logger = logging.getLogger("unetlib")
_local = threading.local()


class NativeConv:
    """A 3x3 convolution with padding 1, of one map or of two as if concatenated: by Winograd's method, of small maps direct.

    Args:
        weight: (out, in, 3, 3), both channels multiples of `lanes()`.
        bias: (out,).
        relu: apply a ReLU to the result.
        halves: multiply numbers of bfloat16, and sum in float32, which takes `has_halves()`.

    Example:
        >>> if available():
        ...     conv = NativeConv(torch.ones(16, 32, 3, 3), torch.zeros(16), relu=True)
        ...     map = torch.ones(1, 16, 9, 9).to(memory_format=torch.channels_last)
        ...     assert torch.allclose(conv(map, map)[..., 4, 4], torch.tensor(288.0))
    """

    def __init__(self, weight: Tensor, bias: Tensor, *, relu: bool, halves: bool = False) -> None:
        self.out_channels, self.in_channels = weight.shape[:2]
        self.weight, self.bias, self.relu, self.halves = weight, bias.float().contiguous(), relu, halves

    @functools.cached_property
    def transformed(self) -> Tensor:
        """The weights for Winograd's method."""
        row = torch.tensor(_WEIGHTS, dtype=torch.float64, device="cpu")
        return _packed(torch.einsum("ia,ocab,jb->ijoc", row, self.weight.double(), row).flatten(0, 1), halves=self.halves)

    @functools.cached_property
    def direct(self) -> Tensor:
        """The weights for small maps."""
        return _packed(self.weight.permute(0, 2, 3, 1).flatten(1)[None], halves=self.halves)

    @property
    def transformed_bytes(self) -> int:
        """What the weights take that have been made."""
        return sum(vars(self)[name].nbytes for name in ("transformed", "direct") if name in vars(self))

    def __call__(self, first: Tensor, second: Tensor | None = None, *, pooled: Tensor | None = None) -> Tensor:
        """Convolve.

        Args:
            first: (N, C, H, W) float32, contiguous in channels_last, C a multiple of `lanes()`.
            second: (N, in - C, H, W), likewise; None where the first has all channels.
            pooled: (N, out, H // 2, W // 2), likewise, in which the result's `max_pool2d(_, 2)` is put.

        Returns:
            (N, out, H, W), in channels_last.
        """
        pictures, channels, height, width = first.shape
        operation, size = self._operation(pictures, height, width)
        weights = self.direct if operation == "convolve_directly" else self.transformed
        out, workspace = empty(pictures, self.out_channels, height, width, channels_last=True), empty(size)
        _run(operation, _Convolution(
            *map(_address, (first, second, weights, self.bias, out, pooled, workspace)),
            pictures, height, width, channels, self.in_channels - channels, self.out_channels, self.relu, self.halves,
        ), weights, self.bias)  # fmt: skip
        return out

    def _operation(self, pictures: int, height: int, width: int) -> tuple[str, int]:
        """What suits maps of this size, and the numbers in its workspace."""
        if height * width < _SMALL:
            return "convolve_directly", pictures * height * width * 9 * self.in_channels
        tiles, threads = pictures * -(-height // 4) * -(-width // 4), torch.get_num_threads()
        a_tile = _PLACES * (self.in_channels + self.out_channels)
        if 2 * tiles * a_tile < (threads - 1) * _PLACES * self.in_channels * self.out_channels:  # written and read, or weights
            return "convolve_in_stages", tiles * a_tile
        return "convolve", threads * native_library.load().tiles() * a_tile


class NativeDoubling:
    """A transposed convolution of 2x2 windows with stride 2.

    Args:
        weight: (in, out, 2, 2), `out` a multiple of `lanes()`.
        bias: (out,).
        halves: multiply numbers of bfloat16, as `NativeConv`; `in` is a multiple of `lanes()` too, then.
    """

    def __init__(self, weight: Tensor, bias: Tensor, *, halves: bool = False) -> None:
        self.out_channels, self.halves = weight.shape[1], halves
        self.weights = _packed(weight.permute(2, 3, 1, 0).flatten(0, 1), halves=halves)
        self.bias = bias.float().contiguous()

    def __call__(self, x: Tensor, height: int, width: int, *, replicate: bool = False) -> Tensor:
        """Double a map.

        Args:
            x: (N, in, h, w) float32, contiguous in channels_last.
            height: of the result, at least 2 * h.
            width: likewise.
            replicate: the last row and column go on in what is beyond; else it is zeros.

        Returns:
            (N, out, height, width), in channels_last.
        """
        out = empty(len(x), self.out_channels, height, width, channels_last=True)
        workspace = empty(torch.get_num_threads() * x.shape[-1] * x.shape[1] // 2) if self.halves else None
        _run("double_map", _Doubling(
            *map(_address, (x, self.weights, self.bias, out, workspace)),
            len(x), *x.shape[-2:], x.shape[1], height, width, self.out_channels, replicate, self.halves,
        ), self.weights, self.bias)  # fmt: skip
        return out


def split_picture(x: Tensor, side: int, channels: int) -> Tensor:
    """As `unetlib.blocks.split_patches`, with channels of zeros at the end, or as many as fit.

    Args:
        x: (N, C, H, W) float32, in any layout.
        side: of the squares.
        channels: of the result.

    Returns:
        (N, channels, ceil(H / side), ceil(W / side)), in channels_last.
    """
    out = empty(len(x), channels, -(-x.shape[-2] // side), -(-x.shape[-1] // side), channels_last=True)
    _run("split_picture", _Splitting(
        _address(x), _address(out), *x.stride(), *x.shape, side, *out.shape[-2:], channels,
    ))  # fmt: skip
    return out


class NativeHead:
    """A 1x1 convolution, and `unetlib.blocks.join_patches` of its result.

    Args:
        weight: (C * side ** 2, in, 1, 1).
        bias: (C * side ** 2,).
        side: of the squares.
    """

    def __init__(self, weight: Tensor, bias: Tensor, side: int) -> None:
        missing = -len(weight) % lanes()
        self.out_channels, self.side = len(weight) // side**2, side
        self.weights = _packed(F.pad(weight[..., 0, 0], (0, 0, 0, missing))[None])
        self.bias = F.pad(bias.float(), (0, missing))

    def __call__(self, x: Tensor, size: Sequence[int]) -> Tensor:
        """Logits.

        Args:
            x: (N, in, h, w) float32, contiguous in channels_last.
            size: height and width of the result, at most `side` times those of the map.

        Returns:
            (N, C, *size), contiguous, in memory of its own.
        """
        out = torch.empty(len(x), self.out_channels, *size, dtype=torch.float32, device="cpu")
        _run("apply_head", _Head(
            *map(_address, (x, self.weights, self.bias, out)),
            len(x), *x.shape[-2:], x.shape[1], self.side, *size, self.out_channels,
        ), self.weights, self.bias)  # fmt: skip
        return out


@functools.cache
def available() -> bool:
    """Whether the code could be compiled for this CPU, and agrees with PyTorch's own operations."""
    try:
        with native_library.one_at_a_time, torch.device("cpu"):
            return _agrees()
    except (OSError, AttributeError, KeyError, ValueError, subprocess.SubprocessError) as reason:  # ValueError: of a `CXX`
        said = (getattr(reason, "stderr", None) or b"").decode(errors="replace")
        logger.info("no native operations: %s: %s %s", type(reason).__name__, reason, said)
        return False


@functools.cache
def lanes() -> int:
    """Channels in a vector of this CPU."""
    return int(native_library.load().lanes())


@functools.cache
def has_halves() -> bool:
    """Whether this CPU multiplies numbers of bfloat16."""
    return bool(native_library.load().has_halves())


@torch.inference_mode()
def _agrees() -> bool:
    few, many = lanes(), 2 * lanes()
    drawn = functools.partial(torch.rand, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    x = drawn(2, many, 9, 70).to(memory_format=torch.channels_last)
    weight, corners = drawn(few, many, 3, 3), drawn(many, few, 2, 2)
    point, bias = weight[..., 1:2, 1:2], torch.linspace(-9 * few, 0, few, dtype=torch.float32)
    maps = x.new_empty(2, few, 4, 35), x[..., :7], x[..., :1, :1]
    pooled, small, pixel = (map.contiguous(memory_format=torch.channels_last) for map in maps)
    result = F.conv2d(x, weight, bias, padding=1).relu()
    convs = [NativeConv(weight, bias, relu=True, halves=halves) for halves in (False, has_halves())]
    exact = (
        (convs[0](x, pooled=pooled), result),
        (pooled, F.max_pool2d(result, 2)),
        (convs[0](small), F.conv2d(small, weight, bias, padding=1).relu()),
        (convs[0](pixel), F.conv2d(pixel, weight, bias, padding=1).relu()),
        (NativeDoubling(corners, bias)(x, 18, 140), doubled := F.conv_transpose2d(x, corners, bias, stride=2)),
        (split_picture(x, 3, 9 * many + few), F.pad(split_patches(x, 3), (0, 0, 0, 0, 0, few))),
        (NativeHead(point, bias, 2)(x, (18, 139)), join_patches(F.conv2d(x, point, bias), 2, (18, 139))),
    )
    doubling = NativeDoubling(corners, bias, halves=has_halves())
    rounded = ((convs[1](x), result), (convs[1](small), exact[2][1]), (doubling(x, 18, 140), doubled))
    agree = [torch.allclose(found, expected, rtol=1e-4, atol=1e-3) for found, expected in exact]
    return all(agree) and all(torch.allclose(found, expected, rtol=0.05, atol=1) for found, expected in rounded)


def _packed(weights: Tensor, *, halves: bool = False) -> Tensor:
    """(places, out, in) as (places, out / lanes, in, lanes); halves as (places, out / lanes, in / 2, lanes, 2)."""
    places, out_channels, in_channels = weights.shape
    together = 2 if halves else 1
    packed = weights.view(places, out_channels // lanes(), lanes(), in_channels // together, together).transpose(2, 3)
    return packed.to(torch.bfloat16 if halves else torch.float32, memory_format=torch.contiguous_format).contiguous()


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _structure(addresses: str, numbers: str = "") -> type[Structure]:
    """A structure of `native_kernels.cpp`."""
    fields: list[tuple[str, Any]] = [(name, c_void_p) for name in addresses.split()]
    fields += [(name, c_int64) for name in numbers.split()]
    return type("_Structure", (Structure,), {"_fields_": fields})


_Convolution = _structure(
    "first second weights bias out pooled workspace",
    "pictures height width first_channels second_channels out_channels relu halves",
)
_Doubling = _structure(
    "map weights bias out workspace", "pictures height width channels out_height out_width out_channels replicate halves"
)
_Splitting = _structure(
    "picture out",
    "step_pictures step_channels step_height step_width pictures channels height width side out_height out_width out_channels",
)
_Head = _structure("map weights bias out", "pictures height width channels side out_height out_width out_channels")
_Threads = _structure("parallel wait size number", "count")
_Call = _structure("operation arguments")


def _run(operation: str, arguments: Structure, *weights: Tensor) -> None:
    call = _Call(_address_of(operation), ctypes.addressof(arguments))
    native_library.load().run(byref(call), 1, byref(_threads()))
    if (recording := getattr(_local, "recording", None)) is not None:
        recording.append(call, arguments, weights)


class Recording:
    """Operations that were made, to be made again."""

    def __init__(self) -> None:
        self._made: list[tuple[Structure, Structure, Sequence[Tensor]]] = []  # the weights are there to be kept
        self._threads = _threads()

    def append(self, call: Structure, arguments: Structure, weights: Sequence[Tensor]) -> None:
        """One more operation."""
        self._made.append((call, arguments, weights))

    def places(self, tensor: Tensor) -> list[tuple[Structure, str]]:
        """The addresses of a tensor among the arguments, each as a structure and the name of its field."""
        fields = ((arguments, *field[:2]) for _, arguments, _ in self._made for field in arguments._fields_)
        addresses = ((arguments, name) for arguments, name, kind in fields if kind is c_void_p)
        return [place for place in addresses if getattr(*place) == tensor.data_ptr()]

    def play(self) -> None:
        """Make all operations, in one call of the compiled code, by as many threads as the first time."""
        native_library.load().run(self._calls, len(self._calls), byref(self._threads))

    @functools.cached_property
    def _calls(self) -> Any:
        return (_Call * len(self._made))(*(call for call, *_ in self._made))


@contextmanager
def recorded() -> Iterator[Recording]:
    """Within it, this thread's operations are recorded."""
    _local.recording = recording = Recording()
    try:
        yield recording
    finally:
        _local.recording = None


def _threads() -> Structure:
    """PyTorch's own threads: others beside them would take the cores from each other."""
    return _Threads(*native_library.openmp(), torch.get_num_threads())


@functools.cache
def _address_of(operation: str) -> int | None:
    return ctypes.cast(getattr(native_library.load(), operation), c_void_p).value
