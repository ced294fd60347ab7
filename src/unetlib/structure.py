"""Whether a network is still what its config says: what is made from the config alone must not stand for another one."""

from __future__ import annotations

import functools
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import nn

from .config import UNetConfig
from .unet import UNet

_SAME: dict[type[nn.Module], type[nn.Module]] = {nn.SyncBatchNorm: nn.BatchNorm2d}  # in evaluation mode
_METHODS = ("forward", "_conv_forward")  # that a program puts in their place, the latter for another padding
_OURS = ("torch", "unetlib")  # packages whose modules are known
_IDLE = {"training", "momentum", "inplace", "p", "checkpoint_gradients"}  # settings that change no result there


class Part(NamedTuple):
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
    if other := changed_module(model, _parts_of_unet(model.config)):
        return other
    kinds: set[type[nn.Module]] = set()
    for name, module in model.named_modules():
        kinds.add(type(module))
        if module._forward_hooks or module._forward_pre_hooks or not vars(module).keys().isdisjoint(_METHODS):
            return f"its module {name!r} has hooks, or a forward of its own"
    for kind in kinds:
        if any(_is_patched(getattr(kind, method, None)) for method in _METHODS):
            return f"the class {kind.__name__} has a forward that was put into it"
    return None


def changed_module(model: nn.Module, parts: tuple[Part, ...]) -> str | None:
    """The first module of a network that another one, of these parts, has not, or the other way round.

    Example:
        >>> model, parts = UNet(features=(8,)), parts_of(UNet(features=(8,)))
        >>> model.bottleneck.act2 = nn.Mish()
        >>> changed_module(model, parts)
        "its module 'bottleneck.act2' is not that of a UNet of its config"
    """
    for named, part in zip_longest(model.named_modules(), parts):
        name, module = named or (part.name, None)
        if module is None or part is None or not _is_like(module, part) or name != part.name:
            return f"its module {name!r} is not that of a UNet of its config"
    return None


def parts_of(model: nn.Module) -> tuple[Part, ...]:
    """What a network consists of, without its weights.

    Example:
        >>> [part.name for part in parts_of(UNet(features=(8,)))][:3]
        ['', 'encoder', 'encoder.0']
    """
    return tuple(Part(name, type(module), _settings(module), _shapes(module)) for name, module in model.named_modules())


@functools.lru_cache
def _parts_of_unet(config: UNetConfig) -> tuple[Part, ...]:
    with torch.device("meta"):
        return parts_of(UNet.from_config(config))


def _is_patched(method: Any) -> bool:
    """Whether what a class of PyTorch's or of ours computes by was written elsewhere, whatever it calls itself."""
    home = getattr(method, "__globals__", {}).get("__name__", "")
    return method is not None and home.partition(".")[0] not in _OURS


def _is_like(module: nn.Module, part: Part) -> bool:
    kind = type(module)
    return (
        (kind is part.kind or _SAME.get(kind) is part.kind or not part.name)  # its own class may be one that adds methods
        and part.settings.items() <= vars(module).items()
        and _shapes(module) == part.shapes
    )


def _settings(module: nn.Module) -> dict[str, Any]:
    if type(module).__module__.partition(".")[0] not in _OURS:  # what others keep in theirs may change
        return {}
    return {key: value for key, value in vars(module).items() if not key.startswith("_") and key not in _IDLE}


def _shapes(module: nn.Module) -> dict[str, torch.Size | None]:
    tensors = {**module._parameters, **module._buffers}  # in any order: what has pruned a weight puts it back as the last one
    return {name: None if tensor is None else tensor.shape for name, tensor in tensors.items()}
