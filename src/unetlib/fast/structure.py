"""Whether a network is still what its config says: a copy made from the config's parts must not stand for another one."""

from __future__ import annotations

import functools
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import nn

from ..config import UNetConfig
from ..unet import UNet

_SAME: dict[type[nn.Module], type[nn.Module]] = {nn.SyncBatchNorm: nn.BatchNorm2d}  # in evaluation mode
_IDLE = {"training", "momentum", "inplace", "p", "checkpoint_gradients"}  # settings that change no result there


class _Part(NamedTuple):
    """What a module of a network is."""

    name: str
    kind: type[nn.Module]
    settings: dict[str, Any]
    shapes: dict[str, torch.Size | None]


def difference(model: UNet) -> str | None:
    """What a network has that a `UNet` of its config has not, or the other way round; None where there is nothing.

    Example:
        >>> model = UNet(features=(8,))
        >>> difference(model)
        >>> model.head.padding_mode = "circular"
        >>> difference(model)
        "its module 'head' is not that of a UNet of its config"
    """
    if type(model).forward is not UNet.forward:
        return f"{type(model).__name__} has a forward of its own"
    if any(getattr(nn.modules.module, hooks, None) for hooks in ("_global_forward_hooks", "_global_forward_pre_hooks")):
        return "there are hooks for all modules"
    for named, part in zip_longest(model.named_modules(), _parts(model.config)):
        name, module = named or (part.name, None)
        if module is None or part is None or not _is_like(module, part) or name != part.name:
            return f"its module {name!r} is not that of a UNet of its config"
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            return f"its module {name!r} has hooks, or a forward of its own"
    return None


@functools.lru_cache
def _parts(config: UNetConfig) -> tuple[_Part, ...]:
    with torch.device("meta"):
        model = UNet.from_config(config)
    return tuple(
        _Part(
            name,
            type(module),
            {key: value for key, value in vars(module).items() if not key.startswith("_") and key not in _IDLE},
            _shapes(module),
        )
        for name, module in model.named_modules()
    )


def _is_like(module: nn.Module, part: _Part) -> bool:
    kind = type(module)
    return (
        (kind is part.kind or _SAME.get(kind) is part.kind or not part.name)  # its own class may be one that adds methods
        and part.settings.items() <= vars(module).items()
        and _shapes(module) == part.shapes
    )


def _shapes(module: nn.Module) -> dict[str, torch.Size | None]:
    tensors = {**module._parameters, **module._buffers}  # in any order: what has pruned a weight puts it back as the last one
    return {name: None if tensor is None else tensor.shape for name, tensor in tensors.items()}
