"""A network by OpenVINO, for CPUs: the extra `openvino`, and `int8` for eight bits."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import math
import threading
import warnings
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..arguments import needed
from ..config import UNetConfig
from ..unet import UNet, check_input
from .levels import check_finite

_HINTS = {torch.float32: "f32", torch.bfloat16: "bf16", torch.int8: "f32"}  # what stays a float beside int8
_KEPT = 4  # shapes


class OpenVINO:
    """The forward pass of a network as it is now; compiled for a shape, in some tenths of a second, when that first comes.

    Args:
        model: the network, on the CPU.
        dtype: torch.float32, bfloat16 or int8, to compute in.
        calibration: for int8: batches as the network sees them.

    Raises:
        ImportError: without the extra.
        TypeError: for a calibration of something else than tensors.
        ValueError: for another type or device, and for no batches or ones that the network does not take.
    """

    def __init__(self, model: UNet, dtype: torch.dtype, calibration: Iterable[Tensor] | None = None) -> None:
        device = model.head.weight.device
        if device.type != "cpu" or dtype not in _HINTS:
            raise ValueError(
                f"the backend 'openvino' is for CPUs, in torch.float32, bfloat16 or int8, got {device} and {dtype}"
            )
        openvino = needed("openvino", "the backend 'openvino'", "openvino")
        self._side, self._out_channels = model.config.patch_size, model.config.out_channels
        self._core, self._options = openvino.Core(), {"INFERENCE_PRECISION_HINT": _HINTS[dtype], "PERFORMANCE_HINT": "LATENCY"}
        example = torch.zeros(
            1, model.config.in_channels, 2 * model.config.stride, 2 * model.config.stride, dtype=torch.float32, device="cpu"
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch.jit, which OpenVINO reads networks by
            self._graph = openvino.convert_model(copy.deepcopy(model).float().eval(), example_input=example)
        if calibration is not None:
            batches = [self._whole(_checked(batch, model.config)).numpy() for batch in calibration]
            self._graph = _in_int8(self._graph, batches)
        self._compiled: OrderedDict[tuple[int, ...], Any] = OrderedDict()
        self._lock = threading.Lock()  # what is compiled has one set of maps

    def __call__(self, x: Tensor) -> Tensor:
        """Logits for a batch."""
        if not len(x):  # of which it compiles no graph
            return x.new_empty(0, self._out_channels, *x.shape[-2:])
        whole = self._whole(x)
        with self._lock:
            found = self._compiled_for(tuple(whole.shape))(whole.numpy(), share_inputs=True)
        return torch.from_numpy(found[0])[..., : x.shape[-2], : x.shape[-1]]

    def clear(self) -> None:
        """Give back what is kept for shapes."""
        with self._lock:
            self._compiled.clear()

    def _whole(self, x: Tensor) -> Tensor:
        """The batch as whole patches: the graph is traced, where sides must be multiples of their side."""
        x = x.detach().float().contiguous()
        # A sum shows NaN and infinity, and NumPy takes it in one thread: PyTorch's would contend with OpenVINO's.
        if not math.isfinite(x.numpy().sum()):
            check_finite(x)
        bottom, right = -x.shape[-2] % self._side, -x.shape[-1] % self._side
        return F.pad(x, (0, right, 0, bottom), mode="replicate") if bottom or right else x

    def _compiled_for(self, shape: tuple[int, ...]) -> Any:
        key = (*shape, torch.get_num_threads())
        if key not in self._compiled:
            graph = self._graph.clone()
            graph.reshape(list(shape))
            options = {**self._options, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
            self._compiled[key] = self._core.compile_model(graph, "CPU", options)
            if len(self._compiled) > _KEPT:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(key)
        return self._compiled[key]


def _checked(batch: Any, config: UNetConfig) -> Tensor:
    if not isinstance(batch, Tensor):
        raise TypeError(
            f"calibration must hold batches (N, {config.in_channels}, H, W) as tensors, got {type(batch).__name__}; "
            "give network_inputs(model, pictures) of unetlib.inference"
        )
    check_input(batch, config)
    return batch


def _in_int8(graph: Any, batches: list[Any]) -> Any:
    """The graph with convolutions in 8 bits, by the post-training quantization of NNCF, biases corrected layer by layer."""
    if not batches:
        raise ValueError("calibration holds no batch; give some dozens of pictures like those to come")
    nncf = needed("nncf", "dtype=torch.int8", "int8")
    logger = logging.getLogger("nncf")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # bars
            return nncf.quantize(
                graph,
                nncf.Dataset(batches),
                subset_size=len(batches),
                preset=nncf.QuantizationPreset.MIXED,
                fast_bias_correction=False,
            )
    finally:
        logger.setLevel(level)
