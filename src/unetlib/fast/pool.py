"""Memory for maps: on huge pages, and used again.

The system hands out fresh memory page by page as it is first written to, which for a large map takes longer than the work on
it. So a forward pass takes its maps from a pool; for those of PyTorch's own operations there is `unetlib.memory.keep_freed`.
"""

from __future__ import annotations

import ctypes
import functools
import math
import mmap
import operator
import sys
import threading
import weakref
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_HUGE_PAGE = 2**21  # bytes
_MOST_SPARE = 2  # how many times too large a block may be: else a small tensor would occupy what the next large map needs
_numbers = operator.itemgetter(0)  # of a block and the numbers in it
_local = threading.local()
_pools: weakref.WeakSet[Pool] = weakref.WeakSet()
_counted = threading.Lock()  # held while a pool joins them, or they are gone through


class Pool:
    """Blocks that come back when the tensor that was made of them is gone, and are handed out again; for one thread."""

    def __init__(self) -> None:
        self._free: list[tuple[int, Tensor]] = []  # numbers in a block, and the block; the smallest first
        with _counted:
            _pools.add(self)

    @property
    def free_bytes(self) -> int:
        """What is there to be handed out again."""
        return sum(4 * numbers for numbers, _ in self._free)

    def empty(self, *shape: int, channels_last: bool = False) -> Tensor:
        """An uninitialised float32 tensor of this shape, contiguous, or (N, C, H, W) in channels_last."""
        numbers = math.prod(shape)
        best = bisect_left(self._free, numbers, key=_numbers)
        fits = best < len(self._free) and self._free[best][0] <= _MOST_SPARE * numbers
        held, block = self._free.pop(best) if fits else (numbers, _fresh(numbers))
        tensor = _shaped(block[:numbers], shape, channels_last)
        weakref.finalize(tensor, self._take_back, (held, block)).atexit = False
        return tensor

    def _take_back(self, block: tuple[int, Tensor]) -> None:
        insort(self._free, block, key=_numbers)


def kept_in_all() -> int:
    """Bytes that all pools, of all threads, have to hand out again.

    Example:
        >>> pool, before = Pool(), kept_in_all()
        >>> pool.empty(2**20).shape  # gone at once
        torch.Size([1048576])
        >>> kept_in_all() - before
        4194304
    """
    with _counted:
        return sum(pool.free_bytes for pool in _pools)


@contextmanager
def pooled(pool: Pool, *, least: int = _HUGE_PAGE) -> Iterator[None]:
    """Within it, `empty` takes from the pool in this thread, from so many bytes on: PyTorch has smaller tensors sooner.

    Example:
        >>> with pooled(Pool(), least=0):
        ...     place = empty(1, 8, 4, 4).data_ptr()  # gone at once, and its block is handed out again
        ...     empty(1, 8, 4, 4).data_ptr() == place
        True
    """
    outer, _local.pool = getattr(_local, "pool", None), (pool, least)
    try:
        yield
    finally:
        _local.pool = outer


def empty(*shape: int, channels_last: bool = False) -> Tensor:
    """An uninitialised float32 tensor on the CPU, from the pool where there is one; (N, C, H, W) may be in channels_last.

    A tensor of a pool must outlive its views.

    Example:
        >>> empty(1, 8, 4, 4, channels_last=True).stride()
        (128, 1, 32, 8)
    """
    current: tuple[Pool | None, int] = getattr(_local, "pool", None) or (None, _HUGE_PAGE)
    pool, least = current
    numbers = math.prod(shape)
    if 4 * numbers < least:
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        return torch.empty(shape, dtype=torch.float32, memory_format=memory_format, device="cpu")
    if pool is None:
        return _shaped(_fresh(numbers), shape, channels_last)
    return pool.empty(*shape, channels_last=channels_last)


def _shaped(block: Tensor, shape: Sequence[int], channels_last: bool) -> Tensor:
    if not channels_last:
        return block.view(shape)
    pictures, channels, height, width = shape
    return block.view(pictures, height, width, channels).permute(0, 3, 1, 2)


def _fresh(numbers: int) -> Tensor:
    block = torch.empty(numbers, dtype=torch.float32, device="cpu")  # at a multiple of 64 bytes, as NNPACK needs it
    start = -(-block.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE
    whole = (block.data_ptr() + block.nbytes - start) // _HUGE_PAGE * _HUGE_PAGE
    if whole > 0 and sys.platform == "linux":
        _madvise()(start, whole, mmap.MADV_HUGEPAGE)
    return block


@functools.cache
def _madvise() -> Callable[..., Any]:
    function = ctypes.CDLL(None).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function
