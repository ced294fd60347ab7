"""The fast copy: the U-Net's own forward pass over levels that are picked for the device."""

from __future__ import annotations

import copy
import functools
import itertools
import math
import threading
import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from ..blocks import DoubleConv, join_patches, split_patches
from ..memory import keep_freed, release_freed
from ..unet import UNet, check_input
from .cuda import CudaLevel, compiled
from .folding import Parts
from .graphs import Graphs
from .levels import Level, PlainLevel, PrepackedLevel, WinogradLevel
from .openvino import OpenVINO
from .pool import Pool, pooled
from .winograd import MOST_WORKSPACE, available

Way = Callable[[Parts, torch.dtype], Level]

_WIDTHS = (32, 64, 128, 256)  # of levels, at which the ways of the CPU are compared
_LEAST_MAP = 1300  # bytes of a channel: for smaller ones, reading the transformed weights takes longer than it saves
_LEAST_WORK = 5e8  # floating-point operations of a convolution: less is over before other threads have taken over
_GAIN = 1.15  # by which Winograd must win on a small map: on large ones it waits for memory more


def optimize_for_inference(
    model: UNet,
    *,
    dtype: torch.dtype | None = None,
    compile: bool = False,
    backend: str | None = None,
    calibration: Iterable[Tensor] | None = None,
) -> FastUNet:
    """A copy of a network that computes the same logits faster, for prediction only.

    Batch norm is folded into the convolutions. On a CPU each level then takes direct convolutions of oneDNN, or, where a short
    trial on the machine finds them faster, Winograd's in float32 (`unetlib.fast.winograd`); also with `dtype` bfloat16, where
    they are more exact too. On CUDA in half precision a convolution, its bias and its ReLU are one kernel, of cuDNN or of
    Triton, whichever a trial on the device finds faster; from the second call with a shape on, small batches run as a CUDA
    graph. The copy does not follow later changes of the model, and stays on its device.

    Args:
        model: the network, in training or evaluation mode; it stays as it is.
        dtype: torch.float32, float64, bfloat16 or float16 to compute in, or int8 with "openvino"; None for that of the weights.
        compile: by `torch.compile`, for each input shape anew, instead; needs what that needs, a C++ compiler for one.
        backend: "openvino" computes by OpenVINO instead, on a CPU, in float32, bfloat16 or int8; needs the extra `openvino`,
            and for int8 the extra `int8`.
        calibration: for int8: batches as the network sees them (`unetlib.inference.network_inputs`), some dozens of pictures
            like those to come, from which the ranges of the maps are taken.

    Returns:
        A module from (N, in_channels, H, W) of any float type to logits (N, out_channels, H, W) of the same type, without
        gradients. In float32 the norm of the difference from the model's logits is some 1e-5 of their norm or less.

    Raises:
        ImportError: for a backend whose extra is not installed.
        TypeError: for something else than a `UNet`.
        ValueError: for a type that the device, or the backend, has no fast convolutions for; for an unknown backend, or one
            beside `compile`; for int8 without calibration, and calibration without int8.

    Example:
        >>> from unetlib import UNet
        >>> model, x = UNet(features=(8, 16)).eval(), torch.rand(1, 3, 40, 56)
        >>> torch.allclose(optimize_for_inference(model)(x), model(x), atol=1e-4)
        True
    """
    if not isinstance(model, UNet):
        raise TypeError(f"expected a UNet, got {type(model).__name__}; take it out of its wrapper, as in model.module")
    if backend not in (None, "openvino"):
        raise ValueError(f"backend must be 'openvino' or None, got {backend!r}")
    if backend and compile:
        raise ValueError(f"give compile=True or backend={backend!r}, not both")
    dtype = dtype or model.head.weight.dtype
    if (dtype == torch.int8) != (calibration is not None):
        which = "without" if calibration is None else "with"
        raise ValueError(
            f"dtype=torch.int8 and calibration= go together, got {dtype} {which} calibration; "
            "give both, with calibration=network_inputs(model, pictures) of unetlib.inference, or neither"
        )
    if backend:
        return FastUNet(model, dtype, OpenVINO(model, dtype, calibration)).eval()
    _check_dtype(dtype, model.head.weight.device)
    return FastUNet(model, dtype, compile=compile).eval()


class FastUNet(nn.Module):
    """What `optimize_for_inference` returns; `unetlib.inference.predict` takes it as it takes a `UNet`.

    Attributes:
        config: of the network.
        preprocessing: of the network.
        device: of the weights.
        dtype: that it computes in.
    """

    def __init__(self, model: UNet, dtype: torch.dtype, other: OpenVINO | None = None, *, compile: bool = False) -> None:
        super().__init__()
        self.config, self.preprocessing = model.config, model.preprocessing
        self.dtype, self.device = dtype, model.head.weight.device
        self._head = copy.deepcopy(model.head).to(torch.float32 if other else dtype).requires_grad_(False)
        self._memory = threading.local()  # a pool for each thread
        self._keeps_freed = False
        self._run: Callable[[Tensor], Tensor]
        self._parts: list[Parts] = []
        if other:
            self._run = other
            return
        blocks, ups = (*model.encoder, model.bottleneck), (*reversed(model.decoder), None)
        self._parts = [Parts.of(block, up) for block, up in zip(blocks, ups)]  # type: ignore[arg-type]
        self._way = (lambda *_: PlainLevel) if compile else _way(self.device, dtype)
        self._levels: dict[tuple[int, Way], Level] = {}
        self._run = compiled(self._logits, self.device) if compile else self._logits
        if self.device.type == "cuda":
            self._run = Graphs(self._run)

    @torch.inference_mode()
    def forward(self, x: Tensor) -> Tensor:
        """Logits for a batch of pictures, as `UNet.forward`."""
        check_input(x, self.config)
        if not hasattr(self._memory, "pool"):
            self._memory.pool = Pool()
        if self.device.type == "cpu" and keep_freed():
            self._keeps_freed = True
        with pooled(self._memory.pool), torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
            return self._run(x).to(x.dtype)

    @property
    def held_bytes(self) -> int:
        """What Winograd's method may hold beside the maps of a pass, at most: transformed weights, and a workspace."""
        if self.device.type != "cpu" or not self._parts or not available():
            return 0
        wide = [parts for parts in self._parts if parts.width >= _WIDTHS[0]]
        weights = sum(layer.weight.numel() for parts in wide for layer in (*parts.convs, *parts.up_convs))
        return weights * 4 * 64 // 9 + MOST_WORKSPACE if wide else 0

    def free_memory(self) -> None:
        """Give back what the calls of this thread have kept for their maps; the next call takes it anew."""
        self._memory.pool = Pool()
        if self._keeps_freed:  # by this copy, and not by a training run around it
            release_freed()
            self._keeps_freed = False
        if isinstance(self._run, (Graphs, OpenVINO)):
            self._run.clear()

    def _logits(self, x: Tensor) -> Tensor:
        size, skips = x.shape[-2:], []
        if self.config.patch_size > 1:  # in this layout the split takes half as long, and the first level most likely wants it
            x = split_patches(x.to(self.dtype, memory_format=torch.channels_last), self.config.patch_size)
        *levels, bottom = self._levels_for(*x.shape[-2:])
        for level in levels:
            skip, x = level.encode(x)
            skips.append(skip)
        x = bottom.convolve(x)
        for level, skip in zip(reversed(levels), reversed(skips)):
            x = level.decode(x, skip)
        return join_patches(self._head(x.to(self.dtype)), self.config.patch_size, size)

    def _levels_for(self, height: int, width: int) -> list[Level]:
        """The levels, each in the way that suits its map's size; made when first wanted, and kept."""
        found = []
        for depth, parts in enumerate(self._parts):
            way = self._way(parts.width, height >> depth, width >> depth)
            if (depth, way) not in self._levels:
                self._levels[depth, way] = way(parts, self.dtype)
            found.append(self._levels[depth, way])
        return found


def _check_dtype(dtype: torch.dtype, device: torch.device) -> None:
    known = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    if dtype not in known:
        hint = "; torch.int8 is for backend='openvino'" if dtype == torch.int8 else ""
        raise ValueError(f"dtype must be one of {', '.join(map(str, known))}, got {dtype!r}{hint}")
    query = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}.get(dtype)
    if device.type == "cpu" and query and not getattr(torch.ops.mkldnn, query)():
        raise ValueError(f"this CPU has no fast convolutions in {dtype}; leave dtype out, or take torch.float32")


def _way(device: torch.device, dtype: torch.dtype) -> Callable[[int, int, int], Way]:
    """A function from a level's channels, height and width to the way in which the device runs it fastest."""
    if device.type == "cuda" and dtype in (torch.float16, torch.bfloat16):
        return lambda *_: CudaLevel
    if device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16) or not _has_onednn():
        return lambda *_: PlainLevel

    def way(channels: int, height: int, width: int) -> Way:
        much = 18 * channels**2 * height * width >= _LEAST_WORK and height * width * dtype.itemsize >= _LEAST_MAP
        return WinogradLevel if much and channels >= narrowest_winograd(dtype) else PrepackedLevel

    return way


def _has_onednn() -> bool:
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return available and hasattr(torch.ops.mkldnn, "_convolution_pointwise")


@functools.cache
def narrowest_winograd(dtype: torch.dtype) -> float:
    """The least width of a level at which this CPU is faster by Winograd's method than by direct convolutions in `dtype`.

    Found once in a process, on small maps, in some tenths of a second; infinite where there is no such width.
    """
    winning = itertools.takewhile(lambda width: _winograd_wins(width, dtype), reversed(_WIDTHS)) if available() else ()
    return min(winning, default=math.inf)


@torch.inference_mode()
def _winograd_wins(width: int, dtype: torch.dtype) -> bool:
    """Whether it does at this width: by the least of a few times, taken in turn, since other work only makes them longer."""
    x, parts = torch.rand(1, width, 36, 36), Parts.of(DoubleConv(width, width).eval())
    ways: tuple[Level, ...] = (WinogradLevel(parts, dtype), PrepackedLevel(parts, dtype))
    inputs = [level.enter(x) for level in ways]
    times: list[list[float]] = [[], []]
    with pooled(Pool()):
        for _ in range(7):
            for level, own, seconds in zip(ways, inputs, times):
                began = time.perf_counter()
                level.convolve(own)
                seconds.append(time.perf_counter() - began)
    winograd, direct = (min(seconds[2:]) for seconds in times)  # the first calls take memory and transform weights
    return _GAIN * winograd < direct
