"""Which way a device runs each level of a network fastest: by its kind and type, and on a CPU by a short trial."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Sequence

import torch

from ..blocks import DoubleConv
from . import native_kernels, native_library, nnpack_kernels
from .cuda import CudaLevel
from .folding import Parts
from .levels import Level, PlainLevel
from .native import NativeLevel
from .nnpack import NnpackLevel
from .onednn import OnednnLevel
from .pool import Pool, pooled

Way = Callable[[Parts, torch.dtype], Level]  # a class of levels

_TRIALS = {16: 288, 32: 72, 64: 48, 128: 36, 256: 24}  # width of a level: side of the map on which ways are compared
# What is not in the trials leaves this share of the native way's time: pooling and concatenation inside, and, where all levels
# are native, a replay, in which threads are woken once instead of at each convolution.
_NATIVE_SPARES = 0.6
_NNPACK_WAITS = 1.15  # how much longer NNPACK takes on large maps than on those of the trials, for want of memory's speed
_NARROW = 16  # channels, for which NNPACK is not tried
_LEAST_MAP = 1300  # bytes of a channel: on smaller maps NNPACK reads transformed weights for longer than it saves
_LEAST_WORK = 5e8  # floating-point operations of a convolution: less is over before NNPACK's threads have taken over


def plan(device: torch.device, dtype: torch.dtype) -> Callable[[int, int, int], Way]:
    """A function from a level's channels, height and width to the way in which the device runs it fastest."""
    if device.type == "cuda" and dtype in (torch.float16, torch.bfloat16):
        return lambda *_: CudaLevel
    if not _has_a_choice(device, dtype):
        return lambda *_: PlainLevel

    def way(channels: int, height: int, width: int) -> Way:
        pixels = height * width
        much = 18 * channels**2 * pixels >= _LEAST_WORK and pixels * dtype.itemsize >= _LEAST_MAP
        return next(way for way in fastest_ways(_like(channels), dtype) if much or way is not NnpackLevel)

    return way


def winograd_bytes(levels: Sequence[Parts], device: torch.device, dtype: torch.dtype) -> int:
    """What Winograd's method may take for these levels, at most: transformed weights, and a workspace."""
    if not _has_a_choice(device, dtype):
        return 0
    most = 0
    if native_kernels.available():
        most += (36 + 9) * 4 * sum(_kernels(parts) for parts in levels)  # for large maps, and for small ones
    if by_nnpack := [parts for parts in levels if fastest_ways(_like(parts.width), dtype)[0] is NnpackLevel]:
        most += 64 * 4 * sum(_kernels(parts) for parts in by_nnpack) + nnpack_kernels.MOST_WORKSPACE
    return most


def _kernels(parts: Parts) -> int:
    """3x3 kernels of a level: one for each pair of channels."""
    return sum(layer.weight.shape[0] * layer.weight.shape[1] for layer in (*parts.convs, *parts.up_convs))


def _has_a_choice(device: torch.device, dtype: torch.dtype) -> bool:
    return device.type == "cpu" and dtype in (torch.float32, torch.bfloat16) and _has_onednn()


def _has_onednn() -> bool:
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return available and hasattr(torch.ops.mkldnn, "_convolution_pointwise")


def _like(channels: int) -> int:
    """The width of the trials that stands for this one."""
    return min((width for width in _TRIALS if width >= channels), default=max(_TRIALS))


def fastest_ways(channels: int, dtype: torch.dtype) -> tuple[Way, ...]:
    """The ways to run a level of one of the widths of the trials on this CPU, the fastest first.

    Found once in a process, in a few tenths of a second for all widths.
    """
    with native_library.one_at_a_time:  # trials of several threads would time each other
        return _found_by_trial(channels, dtype)


@functools.cache
def _found_by_trial(channels: int, dtype: torch.dtype) -> tuple[Way, ...]:
    handicaps: dict[Way, float] = {OnednnLevel: 1}
    if native_kernels.available():
        handicaps[NativeLevel] = _NATIVE_SPARES
    if channels > _NARROW and nnpack_kernels.available():
        handicaps[NnpackLevel] = _NNPACK_WAITS
    if len(handicaps) == 1:
        return (OnednnLevel,)
    seconds = _trial(channels, dtype, tuple(handicaps))
    return tuple(sorted(handicaps, key=lambda way: handicaps[way] * seconds[way]))


@torch.inference_mode()
def _trial(channels: int, dtype: torch.dtype, ways: Iterable[Way]) -> dict[Way, float]:
    """Seconds that each way takes for a double convolution: the least of a few turns, as other work only makes them longer."""
    side = _TRIALS[channels]
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):  # a seed fixes what a program draws, with or without a trial
        block, x = DoubleConv(channels, channels).eval().float(), torch.rand(1, channels, side, side, dtype=torch.float32)
    parts = Parts.of(block)
    levels = {way: way(parts, dtype) for way in ways}
    inputs = {way: level.enter(x) for way, level in levels.items()}
    times: dict[Way, list[float]] = {way: [] for way in ways}
    with pooled(Pool()):
        for _ in range(8):
            for way, level in levels.items():
                began = time.perf_counter()
                level.convolve(inputs[way])
                times[way].append(time.perf_counter() - began)
    return {way: min(seconds[2:]) for way, seconds in times.items()}  # the first calls take memory and transform weights
