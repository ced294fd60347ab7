"""The fast copy that `predict` makes by itself, kept as long as the network and its weights stay as they are."""

from __future__ import annotations

from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ..blocks import DoubleConv, InstanceNorm, Up
from ..unet import UNet
from .network import FastUNet, optimize_for_inference

_KNOWN = frozenset({
    DoubleConv, Up, InstanceNorm, nn.Sequential, nn.ModuleList, nn.Conv2d, nn.ConvTranspose2d, nn.Upsample, nn.Identity,
    nn.BatchNorm2d, nn.GroupNorm, nn.Dropout2d, nn.ReLU, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU,
})  # fmt: skip


class _Kept(NamedTuple):
    copy: FastUNet
    state: tuple[Any, ...]
    contents: int


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_copies: WeakKeyDictionary[nn.Module, _Kept] = WeakKeyDictionary()


def fast_copy(model: UNet, *, look_closely: bool = False) -> FastUNet | None:
    """The copy of a network as its weights are now, made where there is none yet; None where a copy may not stand for it.

    That weights were changed is seen in their version counters, which every operation of PyTorch moves on, except those on
    `.data`; for these the contents are compared, on request, since that reads all of them.

    Args:
        model: the network.
        look_closely: compare the contents too.
    """
    if not _may_stand_for(model):
        return None
    kept, state = _copies.get(model), _state(model)
    if kept is not None and kept.state == state and not (look_closely and kept.contents != _contents(model)):
        return kept.copy
    try:
        copy = optimize_for_inference(model)
    except ValueError:  # a type that this device has no fast convolutions for
        return None
    _copies[model] = _Kept(copy, state, _contents(model))
    return copy


def free_memory(model: nn.Module) -> None:
    """Give back the memory for maps that the network's copy holds in this thread, where there is a copy."""
    if (kept := _copies.get(model)) is not None:
        kept.copy.free_memory()


def _may_stand_for(model: nn.Module) -> bool:
    """Whether the network is what its class says: nobody's subclass, without hooks, other modules, or an autocast around it."""
    return (
        type(model) is UNet
        and next(model.parameters()).device.type == "cpu"  # on CUDA only on request: its kernels are for half precision
        and not torch.is_autocast_enabled("cpu")
        and all(_is_plain(module) for module in model.modules() if module is not model)
        and not _is_changed(model)
    )


def _is_plain(module: nn.Module) -> bool:
    return type(module) in _KNOWN and not _is_changed(module)


def _is_changed(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _state(model: nn.Module) -> tuple[Any, ...]:
    tensors = (*model.parameters(), *model.buffers())
    versions = (None if tensor.is_inference() else tensor._version for tensor in tensors)
    return tuple((tensor.data_ptr(), version, tensor.dtype, tensor.device) for tensor, version in zip(tensors, versions))


@torch.inference_mode()
def _contents(model: nn.Module) -> int:
    """A number that changes with the weights: made of the sum of each tensor's bits."""
    sums = []
    for tensor in (*model.parameters(), *model.buffers()):
        bits = tensor.detach().flatten().contiguous().view(_BITS[tensor.dtype.itemsize])
        sums.append(bits.sum(dtype=torch.int64))
    return hash(tuple(torch.stack(sums).tolist()))
