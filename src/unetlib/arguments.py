"""Checks of what callers give, with one error for each mistake."""

from __future__ import annotations

import importlib
import math
import operator
from collections.abc import Iterable, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, SupportsFloat

if TYPE_CHECKING:
    from torch import Tensor


def whole(name: str, value: Any, low: int, high: int | None = None, *, hint: str | None = None) -> int:
    """Read an integer, Python's or NumPy's, from `low` to `high`; the hint says what to give where `low` is no good example."""
    try:
        if isinstance(value, bool):  # to Python 1 and 0
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}={value!r} must be an integer, {hint or f'such as {name}={low}'}") from None
    if number < low or (high is not None and number > high):
        allowed = f"{low} or more" if high is None else f"from {low} to {high}"
        raise ValueError(f"{name}={number} must be {allowed}")
    return number


def height_and_width(size: Any, name: str = "size") -> tuple[int, int]:
    """Read a picture's size."""
    if not isinstance(size, Sequence) or isinstance(size, str) or len(size) != 2:
        raise TypeError(f"{name}={size!r} must be a pair (height, width), such as {name}=(320, 480)")
    return whole(name, size[0], 1), whole(name, size[1], 1)


def check_options(what: str, options: Iterable[str], known: Iterable[str]) -> None:
    """Refuse keywords that there are none of."""
    known = [*known]
    if unknown := sorted({*options}.difference(known)):
        raise TypeError(f"{what} has no option {', '.join(unknown)}; it has {', '.join(known)}")


def not_a_unet(model: object) -> TypeError:
    """The error for something that is no network, or is one in a wrapper."""
    wrapper = next((name for name in ("module", "_orig_mod") if hasattr(model, name)), None)
    hint = f"; take it out of its wrapper, as in model.{wrapper}" if wrapper else ""
    if isinstance(model, (str, PathLike)):
        hint = f"; give UNet.from_pretrained({str(model)!r})"
    name = type(model).__name__
    if name.lower() == "unet":  # another library's
        name += f" of {type(model).__module__.partition('.')[0]}"
    return TypeError(f"expected a UNet, got a {name}{hint}")


def check_unet(model: object) -> None:
    """Refuse what is no network, or is one in a wrapper; that of `torch.compile` has its attributes, but not its class."""
    if not hasattr(type(model), "from_config"):
        raise not_a_unet(model)


def check_device(name: Any, *, here: bool = True) -> None:
    """Refuse a device that PyTorch does not know, or that is not in this machine."""
    import torch  # here, since pictures are rendered without it

    try:
        device = torch.device(name)
        if here and device.type not in ("cpu", "cuda"):
            torch.empty(0, device=device)
        there = device.type != "cuda" or not here or (device.index or 0) < torch.cuda.device_count()
    except (RuntimeError, AssertionError, TypeError):
        there = False
    if not there:
        raise ValueError(f"device {name} is not to be had here; give cpu, or cuda where PyTorch finds a GPU")


def is_number(value: object) -> bool:
    """Whether a value is one number, Python's, NumPy's or PyTorch's, and no array of several."""
    if isinstance(value, (int, float)):  # asked first, for torch.compile has numbers of its own, without attributes
        return True
    return isinstance(value, SupportsFloat) and getattr(value, "ndim", 0) == 0


def rising(name: str, pair: Any, low: float, high: float = math.inf) -> tuple[float, float]:
    """Read a (least, largest) pair of numbers, above `low` and up to `high`."""
    numbers = isinstance(pair, Sequence) and len(pair) == 2 and all(map(is_number, pair))
    if not numbers or not low < pair[0] <= pair[1] <= high or pair[1] == math.inf:
        below = " < inf" if high == math.inf else f" <= {high:g}"
        raise ValueError(f"{name} must be (least, largest), {low:g} < least <= largest{below}, not {pair!r}")
    return pair[0], pair[1]


def at_least(name: str, value: float, low: float, high: float = math.inf, *, endless: bool = False) -> None:
    """Refuse a number that is below `low` or above `high`, or none; infinity too, unless it may be `endless`."""
    if not is_number(value) or not low <= value <= high:
        allowed = f"{low:g} or more" if high == math.inf else f"from {low:g} to {high:g}"
        raise ValueError(f"{name} must be {allowed}, not {value!r}")
    if value == math.inf and not endless:
        raise ValueError(f"{name} must be finite, not {value!r}")


def check_range(picture: Tensor) -> None:
    """Refuse a picture whose floats are outside [0, 1], but for what rounding adds where it was resized."""
    low, high = map(float, picture.aminmax()) if picture.numel() else (0.0, 1.0)
    if not (low >= -1e-3 and high <= 1 + 1e-3):  # nor NaN
        raise ValueError(
            f"a picture of floats must lie in [0, 1], got {low:.9g} to {high:.9g}; bring it there as in training (uint8: / "
            "255, uint16: / 65535), and leave mean and std to the model's preprocessing"
        )


def needed(module: str, what: str, extra: str) -> Any:
    """Import a module of an extra, which `what` needs."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(f"{package} is not installed; {what} needs it: pip install 'unetlib[{extra}]'") from error
