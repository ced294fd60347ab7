"""Winograd convolutions on the CPU without a compiler, by the NNPACK that lies in PyTorch's own library.

A direct 3x3 convolution takes 9 multiplications for each output; F(6x6, 3x3) of Lavin and Gray, "Fast Algorithms for
Convolutional Neural Networks", CVPR 2016 (arXiv:1509.09308), takes 64/36, and some additions. PyTorch ships an implementation
(Dukhan's NNPACK) and hardly ever uses it. Called directly, it also keeps transformed weights, applies the ReLU, and writes
into a slice of a larger map. The relative error is a few 1e-6, where a direct convolution has a few 1e-7.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import POINTER, Structure, byref, c_int, c_size_t, c_uint32, c_void_p
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .pool import empty

_F6X6_3X3 = 3  # nnp_convolution_algorithm_wt8x8
_COMPUTE, _PRECOMPUTE, _REUSE = 1, 2, 3  # nnp_convolution_transform_strategy
_IDENTITY, _RELU = 0, 1  # nnp_activation
_YIELD_WORKERS = 2  # a flag of pthreadpool
_OMP_PAUSE_SOFT = 1
_ALIGNED = 16  # numbers: NNPACK's buffers begin at multiples of 64 bytes
_FEW_TILES = 512  # of 6x6 pixels: with fewer, transforming the weights is a good part of the work
MOST_WORKSPACE = 2**29  # bytes: maps that need more are taken in strips of rows


class NnpackConv:
    """A 3x3 convolution with padding 1 and a bias, of float32 maps in the contiguous layout.

    From its second call on small maps it keeps the transformed weights, which take 64/9 of the memory of the weights.

    Args:
        weight: (out, in, 3, 3) float32.
        bias: (out,) float32.
        relu: apply a ReLU to the result.

    Example:
        >>> conv = NnpackConv(torch.ones(8, 4, 3, 3), torch.zeros(8), relu=True)
        >>> torch.allclose(conv(torch.ones(1, 4, 9, 9))[..., 4, 4], torch.tensor(36.0)) if available() else True
        True
    """

    def __init__(self, weight: Tensor, bias: Tensor, *, relu: bool) -> None:
        self.weight, self.bias = weight.contiguous(), bias.contiguous()
        self.out_channels, self.in_channels = weight.shape[:2]
        self.activation = _RELU if relu else _IDENTITY
        self._seen_small = False
        self._transformed: Tensor | None = None

    @property
    def transformed_bytes(self) -> int:
        """What the transformed weights take, where there are some."""
        return 0 if self._transformed is None else self._transformed.nbytes

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Convolve.

        Args:
            x: (N, in, H, W) float32, each picture contiguous.
            out: where the result goes, each picture contiguous, as a slice of a map's channels is; None for a new tensor.

        Returns:
            (N, out, H, W) float32: `out`, where that is given.
        """
        height, width = x.shape[-2:]
        if out is None:
            out = empty(len(x), self.out_channels, height, width)
        strategy, kernel = self._kernel(height, width)
        needed = self._workspace_size(strategy, kernel, height, width)
        for picture, result in zip(x, out):
            if needed <= MOST_WORKSPACE:
                self._run(strategy, kernel, picture, result, _Padding(1, 1, 1, 1))
            else:
                self._run_in_strips(strategy, kernel, picture, result, parts=-(-needed // MOST_WORKSPACE))
        return out

    def _kernel(self, height: int, width: int) -> tuple[int, Tensor]:
        """The strategy and the weights it wants."""
        if -(-height // 6) * -(-width // 6) >= _FEW_TILES:
            return _COMPUTE, self.weight
        if self._transformed is None and self._seen_small:
            self._transformed = self._transform()
        self._seen_small = True
        return (_COMPUTE, self.weight) if self._transformed is None else (_REUSE, self._transformed)

    def _run(self, strategy: int, kernel: Tensor, x: Tensor, out: Tensor, padding: _Padding) -> None:
        height, width = x.shape[-2:]
        needed = c_size_t(self._workspace_size(strategy, kernel, height, width, padding))
        self._call(strategy, height, width, padding, x, kernel, out, empty(-(-needed.value // 4)), needed)

    def _run_in_strips(self, strategy: int, kernel: Tensor, x: Tensor, out: Tensor, parts: int) -> None:
        height = x.shape[-2]
        rows = -(-height // parts // 6) * 6  # whole tiles
        for top in range(0, height, rows):
            bottom = min(height, top + rows)
            above, below = int(top > 0), int(bottom < height)
            result = empty(self.out_channels, bottom - top, x.shape[-1])
            strip = x[:, top - above : bottom + below].contiguous()
            self._run(strategy, kernel, strip, result, _Padding(1 - above, 1, 1 - below, 1))
            out[:, top:bottom] = result

    def _transform(self) -> Tensor:
        padding, size = _Padding(1, 1, 1, 1), c_size_t(0)
        self._call(_PRECOMPUTE, 6, 6, padding, None, self.weight, None, None, size)
        transformed = torch.empty(size.value // 4 + _ALIGNED, dtype=torch.float32, device="cpu")
        transformed = transformed[-transformed.data_ptr() % (4 * _ALIGNED) // 4 :]
        self._call(_PRECOMPUTE, 6, 6, padding, None, self.weight, None, transformed, size)
        return transformed

    def _workspace_size(self, strategy: int, kernel: Tensor, height: int, width: int, padding: _Padding | None = None) -> int:
        size = c_size_t(0)
        self._call(strategy, height, width, padding or _Padding(1, 1, 1, 1), None, kernel, None, None, size)
        return size.value

    def _call(
        self,
        strategy: int,
        height: int,
        width: int,
        padding: _Padding,
        x: Tensor | None,
        kernel: Tensor,
        out: Tensor | None,
        workspace: Tensor | None,
        workspace_size: c_size_t,
    ) -> None:
        """One call of NNPACK; without a workspace it only says how large that must be."""
        pointers = (None if tensor is None else tensor.data_ptr() for tensor in (x, kernel, self.bias, out, workspace))
        status = _nnpack().nnp_convolution_inference(
            _F6X6_3X3, strategy, self.in_channels, self.out_channels, _Size(width, height), padding, _Size(3, 3), _Size(1, 1),
            *pointers, byref(workspace_size), self.activation, None, _thread_pool(torch.get_num_threads()), None,
        )  # fmt: skip
        if status != 0:
            raise RuntimeError(f"NNPACK refused a convolution of {height}x{width} pixels with status {status}")


@functools.cache
def available() -> bool:
    """Whether this PyTorch has NNPACK, this CPU can run it, and it agrees with `conv2d`."""
    try:
        drawn = functools.partial(torch.rand, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
        with torch.device("cpu"):
            x, weight, bias = drawn(2, 5, 13, 17), drawn(7, 5, 3, 3), torch.linspace(-40, 0, 7, dtype=torch.float32)
        conv, expected = NnpackConv(weight, bias, relu=True), F.conv2d(x, weight, bias, padding=1).relu()
        return all(torch.allclose(conv(x), expected, rtol=1e-4, atol=1e-4) for _ in range(3))
    except (OSError, AttributeError, RuntimeError):
        return False


class _Size(Structure):
    _fields_ = (("width", c_size_t), ("height", c_size_t))


class _Padding(Structure):
    _fields_ = (("top", c_size_t), ("right", c_size_t), ("bottom", c_size_t), ("left", c_size_t))


@functools.cache
def _nnpack() -> ctypes.CDLL:
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    library.nnp_convolution_inference.argtypes = [
        c_int, c_int, c_size_t, c_size_t, _Size, _Padding, _Size, _Size,
        c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, POINTER(c_size_t), c_int, c_void_p, c_void_p, c_void_p,
    ]  # fmt: skip
    library.pthreadpool_create.argtypes = [c_size_t]
    library.pthreadpool_create.restype = c_void_p
    library.pthreadpool_parallelize_1d.argtypes = [c_void_p, c_void_p, c_void_p, c_size_t, c_uint32]
    library.nnp_initialize()  # where the CPU is not one of its own, the first call of a function says so
    return library


@functools.cache
def _openmp() -> ctypes.CDLL | None:
    """The OpenMP that PyTorch uses, where it can give up its threads."""
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libgomp.so.1"))
        return library if hasattr(library, "omp_pause_resource_all") else None
    except OSError:
        return None


@functools.cache
def _thread_pool(threads: int) -> int | None:
    """NNPACK's threads, made once for each number of them; None computes in the thread that calls."""
    made: int | None = _nnpack().pthreadpool_create(threads) if threads > 1 else None
    return made


@contextmanager
def nnpack_threads() -> Iterator[None]:
    """Within it NNPACK's threads have the cores, and after it PyTorch's: for a few convolutions in a row.

    Both kinds go on spinning for a while when they have nothing to do, which takes a third of the speed from the other kind.
    OpenMP lets its threads go when asked to; NNPACK's go to sleep after a piece of work that allows it, here of no content.
    """
    threads = _thread_pool(torch.get_num_threads())
    if threads is None:
        yield
        return
    if (openmp := _openmp()) is not None:
        openmp.omp_pause_resource_all(_OMP_PAUSE_SOFT)
    yield
    nothing = ctypes.cast(ctypes.CDLL(None).labs, c_void_p)
    _nnpack().pthreadpool_parallelize_1d(threads, nothing, None, torch.get_num_threads(), _YIELD_WORKERS)


if hasattr(os, "register_at_fork"):  # threads do not live on in a forked process
    os.register_at_fork(after_in_child=_thread_pool.cache_clear)
