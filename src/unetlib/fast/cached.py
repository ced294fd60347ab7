"""The fast copy that `predict` makes by itself, kept as long as the network and its weights stay as they are."""

from __future__ import annotations

import zlib
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn

from ..structure import difference
from ..unet import UNet
from .network import FastUNet, optimize_for_inference

_MOST_KEPT = 2**28  # bytes for maps, in all: taking them anew is a third of a call with a small picture, and more
_ROW = 4095 * 8  # bytes: sums over columns stay in a core's first cache; an even number of words would hide changed signs


class _Kept(NamedTuple):
    copy: FastUNet
    state: tuple[Any, ...]
    contents: int


_copies: WeakKeyDictionary[nn.Module, _Kept] = WeakKeyDictionary()


def fast_copy(model: nn.Module, *, look_closely: bool = False) -> FastUNet | None:
    """The copy of a network as its weights are now, made where there is none yet; None where a copy may not stand for it.

    That weights were changed is seen in their version counters, which every operation of PyTorch moves on, except those on
    `.data`; for these the contents are compared, on request, since that reads all of them.

    Args:
        model: the network.
        look_closely: compare the contents too.
    """
    if torch.is_autocast_enabled("cpu"):  # the caller's wish, for now
        return None
    # On CUDA only on request, as its kernels are for half precision.
    if not isinstance(model, UNet) or next(model.parameters()).device.type != "cpu" or difference(model):
        _copies.pop(model, None)  # of one that has moved or changed since: for a long time, most likely
        return None
    kept, state = _copies.get(model), _state(model)
    if kept is not None and kept.state == state and not (look_closely and kept.contents != _contents(model)):
        return kept.copy
    try:
        copy = optimize_for_inference(model)
    except ValueError:  # a type that this device has no fast convolutions for, or weights that are not finite
        _copies.pop(model, None)  # of weights before these, which the counters alone would not tell
        return None
    _copies[model] = _Kept(copy, state, _contents(model))
    return copy


def free_memory(model: nn.Module) -> None:
    """Give back the memory for maps that the network's copy holds in this thread, where all copies hold much."""
    if (kept := _copies.get(model)) is not None:
        kept.copy.free_memory(most=_MOST_KEPT)


def _state(model: UNet) -> tuple[Any, ...]:
    tensors = (*model.parameters(), *model.buffers())
    versions = (None if tensor.is_inference() else tensor._version for tensor in tensors)
    of_tensors = ((tensor.data_ptr(), version, tensor.dtype, tensor.device) for tensor, version in zip(tensors, versions))
    return (model.config, *of_tensors)


def _contents(model: UNet) -> int:
    """A checksum of the weights; of large ones by the sums over rows and columns of their words, in half of the time."""
    checksum = 0
    for tensor in (*model.parameters(), *model.buffers()):
        content = tensor.resolve_neg().flatten().contiguous().view(torch.uint8).numpy()
        whole = len(content) // _ROW * _ROW
        if whole:
            table = content[:whole].view(np.uint64).reshape(-1, _ROW // 8)
            checksum = zlib.crc32(table.sum(axis=1).data, zlib.crc32(table.sum(axis=0).data, checksum))
        checksum = zlib.crc32(content[whole:].data, checksum)
    return checksum
