"""A network by OpenVINO, for CPUs: the extra `openvino`."""

from __future__ import annotations

import dataclasses
import threading
import warnings
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

from ..blocks import join_patches, split_patches
from ..unet import UNet

_HINTS = {torch.float32: "f32", torch.bfloat16: "bf16"}
_KEPT = 4  # shapes


class OpenVINO:
    """The forward pass of a network as it is now; compiled for a shape, in some tenths of a second, when that first comes.

    Args:
        model: the network, on the CPU.
        dtype: torch.float32 or bfloat16, to compute in.

    Raises:
        ImportError: without the extra `openvino`.
        ValueError: for another type or device.
    """

    def __init__(self, model: UNet, dtype: torch.dtype) -> None:
        device = model.head.weight.device
        if device.type != "cpu" or dtype not in _HINTS:
            raise ValueError(f"the backend 'openvino' is for CPUs, in torch.float32 or bfloat16, got {device} and {dtype}")
        try:
            import openvino
        except ImportError as error:
            raise ImportError("the backend 'openvino' needs the extra: pip install 'unetlib[openvino]'") from error
        self.side = model.config.patch_size
        self._core, self._options = openvino.Core(), {"INFERENCE_PRECISION_HINT": _HINTS[dtype], "PERFORMANCE_HINT": "LATENCY"}
        inner = _without_patches(model)
        example = torch.zeros(1, inner.config.in_channels, 2 * inner.config.stride, 2 * inner.config.stride)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch.jit, which OpenVINO reads networks by
            self._graph = openvino.convert_model(inner, example_input=example)
        self._compiled: OrderedDict[tuple[int, ...], Any] = OrderedDict()
        self._lock = threading.Lock()  # what is compiled has one set of maps

    def __call__(self, x: Tensor) -> Tensor:
        """Logits for a batch."""
        size = x.shape[-2:]
        patches = split_patches(x.float(), self.side).contiguous()
        with self._lock:
            found = self._compiled_for(tuple(patches.shape))(patches.numpy(), share_inputs=True)
        return join_patches(torch.from_numpy(found[0]), self.side, size)

    def clear(self) -> None:
        """Give back what is kept for shapes."""
        self._compiled.clear()

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


def _without_patches(model: UNet) -> UNet:
    """What the network is between the split of the picture into patches and their joining, in float32."""
    config, pixels = model.config, model.config.patch_size**2
    channels, classes = pixels * config.in_channels, pixels * config.out_channels
    inner = UNet.from_config(dataclasses.replace(config, in_channels=channels, out_channels=classes, patch_size=1))
    inner.load_state_dict(model.state_dict())
    return inner.eval().requires_grad_(False)
