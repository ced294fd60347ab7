"""Memory for maps: on huge pages, and used again.

The system hands out fresh memory page by page as it is first written to, which for a large map takes longer than the work on
it. So a forward pass takes its maps from a pool; for those of PyTorch's own operations there is `unetlib.memory.keep_freed`.
"""

from __future__ import annotations

import ctypes
import functools
import math
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_HUGE_PAGE = 2**21  # bytes
_MADV_HUGEPAGE = 14
_ALIGNMENT = 64  # bytes: what NNPACK needs
_local = threading.local()


class Pool:
    """Blocks that come back when the tensor that was made of them is gone, and are handed out again; for one thread."""

    def __init__(self) -> None:
        self._free: list[Tensor] = []

    def empty(self, *shape: int) -> Tensor:
        """An uninitialised float32 tensor of this shape, contiguous."""
        numbers = math.prod(shape)
        fitting = [place for place, block in enumerate(self._free) if len(block) >= numbers]
        best = min(fitting, key=lambda place: len(self._free[place]), default=None)
        block = _fresh(numbers) if best is None else self._free.pop(best)
        tensor = block[:numbers].view(shape)
        weakref.finalize(tensor, self._free.append, block).atexit = False
        return tensor


@contextmanager
def pooled(pool: Pool) -> Iterator[None]:
    """Within it, `empty` takes from the pool in this thread."""
    outer, _local.pool = getattr(_local, "pool", None), pool
    try:
        yield
    finally:
        _local.pool = outer


def empty(*shape: int) -> Tensor:
    """An uninitialised float32 tensor on the CPU, from the pool where there is one.

    A tensor of a pool must outlive its views.
    """
    pool: Pool | None = getattr(_local, "pool", None)
    return _fresh(math.prod(shape)).view(shape) if pool is None else pool.empty(*shape)


def _fresh(numbers: int) -> Tensor:
    block = torch.empty(numbers + _ALIGNMENT // 4)
    block = block[-block.data_ptr() % _ALIGNMENT // 4 :][:numbers]
    start = -(-block.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE
    whole = (block.data_ptr() + block.nbytes - start) // _HUGE_PAGE * _HUGE_PAGE
    if whole > 0 and sys.platform == "linux":
        _madvise()(start, whole, _MADV_HUGEPAGE)
    return block


@functools.cache
def _madvise() -> Callable[..., Any]:
    function = ctypes.CDLL(None).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function
