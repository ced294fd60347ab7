"""The fast copy: the U-Net's own forward pass over levels, each run in the way that `planner` picks for it."""

from __future__ import annotations

import copy
import functools
import sys
import threading
import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from ..arguments import not_a_unet
from ..memory import available_memory, keep_freed, release_freed
from ..structure import difference
from ..unet import UNet, check_input
from . import planner
from .folding import Parts
from .levels import Ends, Level, PlainLevel, check_finite
from .native import NativeLevel
from .native_replay import NativeReplay, NotNative
from .openvino import OpenVINO
from .planner import Way
from .pool import Pool, kept_in_all, pooled
from .replays import Replays

_Args = ParamSpec("_Args")
_Result = TypeVar("_Result")

_MOST_REPLAYED = 2**19  # pixels of a batch: with more, Python takes a share that does not count, and a replay keeps much memory


def optimize_for_inference(
    model: UNet,
    *,
    dtype: torch.dtype | None = None,
    compile: bool = False,
    backend: str | None = None,
    calibration: Iterable[Tensor] | None = None,
) -> FastUNet:
    """A copy of a network that computes the same logits faster, for prediction only.

    Batch norm is folded into the convolutions. On a CPU each level then takes, by a short trial on the machine, direct
    convolutions of oneDNN, or Winograd's: by code of this library's own, which the machine's C++ compiler makes when it is
    first needed (`unetlib.fast.native_kernels`), or in float32 by NNPACK (`unetlib.fast.nnpack`). On CUDA in half precision a
    convolution, its bias and its ReLU are one kernel, of cuDNN or of Triton, whichever a trial on the device finds faster.
    Small batches are recorded at the second call with a shape and replayed from then on: on CUDA as a graph, on a CPU as one
    call of this library's own code. The copy does not follow later changes of the model, and stays on its device.

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
        gradients, which cannot be traced or exported. In float32 the norm of the difference from the model's logits is some
        1e-5 of their norm or less; on CUDA some 1e-3, as long as convolutions may be in TF32, PyTorch's default there.

    Raises:
        ImportError: for a backend whose extra is not installed.
        TypeError: for something else than a `UNet`.
        ValueError: for a network that is not what its config says: with modules, settings, hooks or a `forward` of somebody's;
            for weights that are not finite; for a type that the device, or the backend, has no fast convolutions for; for an
            unknown backend, or one beside `compile`; for int8 without calibration, and calibration without int8.

    Example:
        >>> from unetlib import UNet
        >>> model, x = UNet(features=(8, 16)).eval(), torch.rand(1, 3, 40, 56)
        >>> torch.allclose(optimize_for_inference(model)(x), model(x), atol=1e-4)
        True
    """
    if not isinstance(model, UNet):
        raise not_a_unet(model)
    if otherwise := difference(model):
        raise ValueError(f"a fast copy would compute something else: {otherwise}; unetlib.inference.predict runs it as it is")
    for name, tensor in model.state_dict().items():
        if tensor.is_meta:
            raise ValueError(f"{name} is on the device meta, where there are no values; load the weights first")
        if not tensor.isfinite().all():  # of NaN a convolution with a ReLU in it makes 0
            raise ValueError(f"{name} holds NaN or infinity, which a fast copy may hide; load weights that are finite")
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


def _check_dtype(dtype: torch.dtype, device: torch.device) -> None:
    known = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    if dtype not in known:
        hint = "; torch.int8 is for backend='openvino'" if dtype == torch.int8 else ""
        raise ValueError(f"dtype must be one of {', '.join(map(str, known))}, got {dtype!r}{hint}")
    query = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}.get(dtype)
    if device.type == "cpu" and query and not getattr(torch.ops.mkldnn, query, lambda: False)():
        raise ValueError(f"this CPU has no fast convolutions in {dtype}; leave dtype out, or take torch.float32")
    # PyTorch takes bfloat16 there as well, but not to cuDNN.
    if device.type == "cuda" and dtype == torch.bfloat16 and torch.cuda.get_device_capability(device) < (8, 0):
        raise ValueError(f"{device} has no fast convolutions in {dtype}; take torch.float16 or torch.float32")


def untraced(function: Callable[_Args, _Result]) -> Callable[_Args, _Result]:
    """A function that a `torch.compile` around it leaves alone: traced, native code would get addresses of memory that is gone.

    That is `torch.compiler.disable`, which loads the compiler and so takes a second, at the first call that finds it loaded.
    """
    alone: list[Callable[_Args, _Result]] = []  # no cache of functools, of which the compiler would warn

    @functools.wraps(function)
    def run(*args: _Args.args, **options: _Args.kwargs) -> _Result:
        if "torch._dynamo" not in sys.modules:
            return function(*args, **options)
        if not alone:
            alone.append(torch.compiler.disable(function))  # type: ignore[no-untyped-call]
        return alone[0](*args, **options)

    return run


class FastUNet(nn.Module):
    """What `optimize_for_inference` returns; `unetlib.inference.predict` takes it as it takes a `UNet`.

    Attributes:
        config: of the network.
        preprocessing: of the network; assign another to change it, as there.
        device: of the weights.
        dtype: that it computes in.
    """

    preprocessing: Any = UNet.preprocessing  # the property, with its check

    def __init__(self, model: UNet, dtype: torch.dtype, other: OpenVINO | None = None, *, compile: bool = False) -> None:
        super().__init__()
        self.config, self.preprocessing = model.config, model.preprocessing
        self.dtype, self.device = dtype, model.head.weight.device
        # `predict` makes its input in this one's type, and counts on maps of it: on a CPU they may be float32 whatever `dtype`.
        maps = dtype if self.device.type == "cuda" else torch.promote_types(model.head.weight.dtype, torch.float32)
        self._head = copy.deepcopy(model.head).requires_grad_(False).to(maps)
        self._memory = threading.local()  # a pool and replays for each thread
        self._release: weakref.finalize[..., Any] | None = None  # gives freed memory back, which this copy has had kept
        self._run: Callable[[Tensor], Tensor] | None = None  # where it is not `_logits`, or a replay of it
        self._parts: list[Parts] = []
        self._levels: dict[tuple[int, Way], Level] = {}
        self._ends: dict[type[Level], Ends] = {}
        if other:
            self._run = other
            return
        blocks, ups = (*model.encoder, model.bottleneck), (*reversed(model.decoder), None)
        self._parts = [Parts.of(block, up) for block, up in zip(blocks, ups)]  # type: ignore[arg-type]
        self._way = (lambda *_: PlainLevel) if compile else planner.plan(self.device, dtype)
        if compile or self.device.type == "cuda":
            # Weights are there before any call: made in one stream or capture, another could read them unwritten, and a
            # compiler would be stopped by how they are made.
            self._ends_for(self._levels_for(torch.Size([2**10, 2**10]))[0])
        if compile:
            self._run = _compiled(self._logits, self.device)
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
            this = weakref.proxy(self)  # else it is a cycle, as with `compile`, and graphs wait for the collector
            self._run = Replays(self._run or (lambda x: this._logits(x)))

    if TYPE_CHECKING:  # nn.Module's gives Any

        def __call__(self, x: Tensor) -> Tensor:
            """Logits for a batch of pictures: `forward`, and hooks."""

    @untraced
    def forward(self, x: Tensor) -> Tensor:
        """Logits for a batch of pictures, as `UNet.forward`.

        Raises:
            TypeError: within a trace or an export; for a tensor that lies nowhere in memory.
            ValueError: as `UNet.forward`; for pictures on another device, and on a CPU for NaN or infinity that it hides.
        """
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or get_proxy_mode():  # type: ignore[attr-defined, no-untyped-call]
            raise TypeError("a fast copy cannot be traced or exported, as most of its work is in no graph; take the UNet")
        check_input(x, self.config)
        if x.device != self.device:
            raise ValueError(f"expected pictures on {self.device}, where this copy is, got {x.device}; pass x.to(fast.device)")
        if not _lies_in_memory(x):
            raise TypeError(
                "a fast copy takes tensors that lie in memory, no sparse, fake, vmapped or distributed ones; take the UNet"
            )
        if not hasattr(self._memory, "replays"):  # the last to be there, where an interrupt came between
            self._take_memory()
        if x.shape != getattr(self._memory, "shape", None):
            if (kept := self.kept_bytes) and kept > available_memory():  # blocks of other sizes may be of no use here
                self.free_memory()
            self._memory.shape = x.shape
        if self.device.type == "cpu" and keep_freed():
            self._release = weakref.finalize(self, release_freed)
            self._release.atexit = False
        here, own = torch.cuda.device_of(x), torch.autocast(self.device.type, enabled=False)  # type: ignore[no-untyped-call]
        with torch.inference_mode(), pooled(self._memory.pool), here, own:
            logits = (self._run or self._memory.replays)(x.resolve_neg()).to(x.dtype)
        # Outside inference mode a tensor that may be changed, and that losses of other networks may be derived from.
        return logits if torch.is_inference_mode_enabled() else logits.clone()

    def _logits(self, x: Tensor) -> Tensor:
        """The pass itself, as in `UNet.forward`."""
        size, skips = x.shape[-2:], []
        *levels, bottom = self._levels_for(size)
        if any(level.hides_nan for level in (*levels, bottom)):
            check_finite(x)
        ends = self._ends_for(levels[0])
        x = ends.split(x)
        for level in levels:
            skip, x = level.encode(x)
            skips.append(skip)
        x = bottom.convolve(x)
        for level, skip in zip(reversed(levels[1:]), reversed(skips[1:])):
            x = level.decode(x, skip)
        return ends.finish(levels[0], x, skips[0], size)

    def _levels_for(self, size: torch.Size) -> list[Level]:
        """The levels for pictures of a size, each in the way that suits its map; made when first wanted, and kept."""
        found, (height, width) = [], (-(-side // self.config.patch_size) for side in size)
        for depth, parts in enumerate(self._parts):
            way = self._way(parts.width, height >> depth, width >> depth)
            if (depth, way) not in self._levels:
                self._levels.setdefault((depth, way), way(parts, self.dtype))  # another thread may have been first
            found.append(self._levels[depth, way])
        return found

    def _ends_for(self, first: Level) -> Ends:
        """The ends that suit the first level, made when first wanted, and kept."""
        way = type(first)
        if way not in self._ends:
            self._ends.setdefault(way, first.ends(self._head, self.config.patch_size))
        return self._ends[way]

    @property
    def held_bytes(self) -> int:
        """What Winograd's method may yet take beside the maps of a pass, at most: transformed weights, and a workspace."""
        if self._run:  # another engine, or a GPU
            return 0
        most = planner.winograd_bytes(self._parts, self.device, self.dtype)
        return max(0, most - sum(map(_transformed_bytes, tuple(self._levels.values()))))  # other threads may add some

    @property
    def kept_bytes(self) -> int:
        """What the calls of this thread have kept for the maps of the next one, beside what glibc keeps for all."""
        return self._memory.pool.free_bytes if hasattr(self._memory, "pool") else 0

    def free_memory(self, *, most: int = 0) -> None:
        """Give back what the calls of this thread have kept for their maps; the next call takes it anew.

        Args:
            most: bytes; while all copies in all threads keep less, these maps' memory stays.
        """
        if kept_in_all() >= most:
            self._take_memory()
        if self._release:  # by this copy, and not by a training run around it
            self._release()
        if isinstance(self._run, (Replays, OpenVINO)):
            self._run.clear()

    def _take_memory(self) -> None:
        """A pool for this thread, and replays of passes that are native from end to end."""
        self._memory.pool = pool = Pool()
        this = weakref.proxy(self)  # else it would be a cycle

        def replay(function: Callable[[Tensor], Tensor], x: Tensor, _: Any) -> NativeReplay:
            if not all(isinstance(level, NativeLevel) for level in this._levels_for(x.shape[-2:])):
                raise NotNative("a level goes another way")
            return NativeReplay(function, x, pool)

        self._memory.replays = Replays(
            lambda x: this._logits(x),
            replay,
            key=lambda x: (x.shape, x.dtype, x.stride(), torch.get_num_threads()),
            most_pixels=_MOST_REPLAYED,
        )

    def _apply(self, function: Any, recurse: bool = True) -> FastUNet:
        """What `to`, `half` and `cuda` call: of this copy they would change the head alone."""
        weight = self._head.weight
        changed = function(weight)
        if (changed.device, changed.dtype) != (weight.device, weight.dtype):
            raise TypeError("a fast copy stays on its device and in its type; call optimize_for_inference on the UNet there")
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        """It holds code and memory of this process."""
        raise TypeError("a fast copy cannot be copied or pickled; take the UNet, and call optimize_for_inference there")


def _compiled(function: Callable[[Tensor], Tensor], device: torch.device) -> Callable[[Tensor], Tensor]:
    """The function by `torch.compile`; on CUDA tuned, without graphs, which `Replays` makes.

    There convolutions stay with cuDNN, as Inductor's own kernel for them gives wrong results in some versions.
    """
    if device.type != "cuda":
        return torch.compile(function, dynamic=False)
    from torch._inductor import list_mode_options

    options = {**list_mode_options("max-autotune-no-cudagraphs"), "max_autotune_conv_backends": "ATEN"}
    return torch.compile(function, dynamic=False, options=options)


def _lies_in_memory(x: Tensor) -> bool:
    """Whether native code finds numbers at a tensor's address."""
    try:  # the storage of a fake one is on meta, that of one around others at no address, as a distributed one's
        return x.untyped_storage().device == x.device and (x.data_ptr() != 0 or not x.numel())
    except RuntimeError:  # there is no storage
        return False


def _transformed_bytes(level: Any) -> int:
    """What a level has taken for transformed weights."""
    return sum(step.conv.transformed_bytes for step in (*level.convs, *level.up_convs) if hasattr(step, "conv"))
