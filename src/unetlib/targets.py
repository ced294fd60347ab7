"""One reading of logits and masks, shared by every loss and metric.

The number of channels says what logits mean: one channel is a sigmoid (binary), two and more are a softmax over
classes, background included; ``multilabel=True`` makes every channel a sigmoid of its own. Masks come in three forms:

- binary: (N, *spatial) or (N, 1, *spatial), any integer, bool or float type, values from 0 to 1;
- multiclass: class indices (N, *spatial) or (N, 1, *spatial), any integer, bool or float type holding whole numbers,
  or class probabilities (N, C, *spatial) that sum to 1, one-hot being the common case;
- multilabel: (N, C, *spatial), values from 0 to 1.

A wrong shape raises on every device. Wrong values (an index out of range, 255, NaN) raise a `ValueError` that names
the value. Metrics refuse logits of NaN too; losses give NaN for them. On CUDA, and inside `torch.compile`, reading a value
would make the program wait for the device, so there the same check is an assertion that the device makes by itself: the
next synchronisation (``loss.item()``) raises. `torch.func` lets no value be read either: on a CPU the assertion raises at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from numbers import Integral
from typing import NamedTuple

import torch
from torch import Tensor

from .arguments import is_number

_WIDE_UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)  # torch stores these but cannot compute with them
_ROUNDING = 1e-5  # how far from 0 to 1 a soft mask may lie, for resizing leaves values such as 1 + 2.4e-7
_SQUEEZED = ". Three dimensions are (N, C, length): logits of pictures keep their channel, (N, 1, H, W), without squeeze(1)"


class Reading(NamedTuple):
    """Logits and mask in one form.

    Attributes:
        logits: (N, C, *spatial), float32, or float64 where they came so.
        target: class indices, int64 (N, *spatial), or values in the mask's own type (N, C, *spatial); ignored pixels
            hold 0.
        valid: the pixels that count, bool (N, 1, *spatial), for multilabel (N, C, *spatial); None where all count.
        sigmoid: each channel is a sigmoid of its own (binary, multilabel), else all channels are one softmax.
    """

    logits: Tensor
    target: Tensor
    valid: Tensor | None
    sigmoid: bool

    @property
    def spatial(self) -> list[int]:
        """The spatial dimensions of `logits`."""
        return list(range(2, self.logits.ndim))

    def probabilities(self) -> Tensor:
        """Sigmoid or softmax of the logits, (N, C, *spatial)."""
        return self.logits.sigmoid() if self.sigmoid else self.logits.softmax(dim=1)

    def has_indices(self) -> bool:
        """Whether `target` holds class indices."""
        return self.target.ndim < self.logits.ndim

    def one_hot(self) -> Tensor:
        """The mask as (N, C, *spatial): bool where it holds class indices, else as it is."""
        if not self.has_indices():
            return self.target
        return self._one_hot(self.target)

    def cut(self) -> Reading:
        """The same with a hard mask: bool for sigmoids, soft ones cut at 0.5; class indices, of the largest class."""
        if self.sigmoid:
            return self._replace(target=self.target > 0.5 if self.target.is_floating_point() else self.target.bool())
        if self.has_indices():
            return self
        return self._replace(target=self.target.max(dim=1).indices)  # a tenth of argmax's time on a CPU

    def decisions(self, threshold: float = 0.5) -> tuple[Tensor, Tensor]:
        """What is predicted and what is true, soft masks cut at 0.5 or by their largest class.

        Bool (N, C, *spatial), false where ignored, for sigmoids; int64 class indices (N, *spatial) for a softmax.

        Raises:
            ValueError: for a logit of NaN where pixels count, and a `threshold` that is no probability.
        """
        true = self.cut().target
        if not self.sigmoid:
            largest, predicted = self.logits.max(dim=1, keepdim=True)  # a third of argmax's time on a CPU
            self._check_numbers(largest)
            return predicted.squeeze(1), true
        check_threshold(threshold)
        self._check_numbers(self.logits)
        predicted = self.logits > math.log(threshold / (1 - threshold))
        if self.valid is not None:  # the mask is false there already
            predicted = predicted & self.valid
        return predicted, true

    def masks(self, threshold: float = 0.5) -> tuple[Tensor, Tensor]:
        """`decisions` as two masks, bool (N, C, *spatial), false where ignored."""
        predicted, true = self.decisions(threshold)
        if not self.sigmoid:
            predicted, true = self._one_hot(predicted), self._one_hot(true)
            if self.valid is not None:
                predicted, true = predicted & self.valid, true & self.valid
        return predicted, true

    def _check_numbers(self, logits: Tensor) -> None:
        """Refuse NaN where pixels count, for it is above no threshold and below none."""
        # One NaN makes the least value NaN, which a CPU finds ten times as fast as by isnan.
        found = logits.amin().isnan()
        if self.valid is not None and (_waits(logits) or found):
            found = (logits.isnan() & self.valid).any()
        require(
            "logits",
            ~found,
            "numbers",
            lambda: math.nan,
            "the network diverged, or overflowed in half precision: train it with a lower learning rate, run it in bfloat16 "
            "or float32",
        )

    def _one_hot(self, indices: Tensor) -> Tensor:
        classes = torch.arange(self.logits.shape[1], device=indices.device)
        return indices.unsqueeze(1) == classes.view(-1, *[1] * len(self.spatial))


def check_ignore_index(ignore_index: int | None) -> None:
    """Refuse what is no mask value and not None."""
    if ignore_index is not None and (isinstance(ignore_index, bool) or not isinstance(ignore_index, Integral)):
        raise TypeError(f"ignore_index={ignore_index!r} must be an integer, such as ignore_index=255, or None")


def read(
    logits: Tensor, target: Tensor, *, multilabel: bool = False, ignore_index: int | None = None, soft: bool = False
) -> Reading:
    """Bring logits and a mask of any allowed form into one form, or raise; the mask gets no gradient.

    Args:
        logits: (N, C, *spatial), any floating point type, one to three spatial dimensions.
        target: a mask in one of the forms named at the top of this module.
        multilabel: one sigmoid a channel.
        ignore_index: the mask value whose pixels count for nothing.
        soft: bring a mask that does not hold class indices to the type of the logits.

    Raises:
        TypeError: if an argument is no tensor, or of a type that cannot hold what it should, or `ignore_index` no integer.
        ValueError: for shapes that do not fit each other, for values that no mask holds, and for an `ignore_index` that
            means something in a mask of values from 0 to 1.

    Example:
        >>> import torch
        >>> reading = read(torch.zeros(1, 3, 2, 2), torch.tensor([[[0, 1], [2, 255]]]), ignore_index=255)
        >>> reading.target.tolist(), reading.valid.tolist()
        ([[[0, 1], [2, 0]]], [[[[True, True], [True, False]]]])
    """
    _check_form(logits, target, multilabel)
    check_ignore_index(ignore_index)
    target = target.detach()
    channels = logits.shape[1]
    if logits.dtype != torch.float64:
        logits = logits.float()
    if target.dtype in _WIDE_UNSIGNED:
        target = target.long()
    if target.ndim < logits.ndim:
        target = target.unsqueeze(1)
    sigmoid = multilabel or channels == 1
    indices = not sigmoid and target.shape[1] == 1
    shares = not sigmoid and not indices
    if ignore_index in (0, 1) and not indices:
        left_out = "one of a sigmoid's two answers" if sigmoid else "every pixel of a one-hot mask"
        raise ValueError(
            f"ignore_index={ignore_index} would leave out {left_out}; mark pixels that do not count by a value outside 0 to 1, "
            "such as 255" + ("" if sigmoid else ", or pass class indices")
        )
    valid = None
    if ignore_index is not None and _holds(target.dtype, ignore_index):
        valid = target != ignore_index
        if shares:
            valid = valid.all(dim=1, keepdim=True)
        target = target * valid  # masked_fill takes a CPU several times as long
    _check_values(target, valid, channels - 1 if indices else 1, indices=indices, shares=shares)
    if indices:
        target = target.squeeze(1).long()
    elif soft:
        target = (target.clamp(0, 1) if target.is_floating_point() else target).to(logits.dtype)
    return Reading(logits, target, valid, sigmoid)


def check_threshold(threshold: float) -> None:
    """Refuse what is no probability between 0 and 1."""
    if not is_number(threshold) or not 0 < threshold < 1:
        raise ValueError(f"threshold is a probability between 0 and 1, got {threshold!r}; for logits > 0 it is 0.5")


def _holds(dtype: torch.dtype, value: int) -> bool:
    """Whether a mask of this type can hold the value; comparing uint8 with -100 would wrap round to 156."""
    if dtype == torch.bool:
        return value in (0, 1)
    return dtype.is_floating_point or torch.iinfo(dtype).min <= value <= torch.iinfo(dtype).max


def _check_form(logits: Tensor, target: Tensor, multilabel: bool) -> None:
    for name, value in (("logits", logits), ("target", target)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}; {_tensor_of(name, value)}")
    if not logits.is_floating_point():
        raise TypeError(
            f"logits must be floating point, got {logits.dtype}; pass the model's output as it is. Metrics take a mask for it "
            "as mask[:, None].float() if binary, else as torch.nn.functional.one_hot(mask.long(), classes)"
            ".movedim(-1, 1).float()"
        )
    if target.is_complex():
        raise TypeError(f"target must hold integers, bools or floats, got {target.dtype}")
    if not 3 <= logits.ndim <= 5 or logits.numel() == 0:
        hint = "; add the batch dimension with logits[None]" if logits.ndim < 3 else ""
        raise ValueError(
            f"logits must have the shape (N, C, *spatial) with one to three spatial dimensions, none of them empty, "
            f"got {tuple(logits.shape)}{hint}"
        )
    if logits.device != target.device:
        raise ValueError(f"logits are on {logits.device}, target on {target.device}; use target.to(logits.device)")
    n, channels, *spatial = logits.shape
    full, forms = (n, channels, *spatial), [(n, *spatial), (n, 1, *spatial), (n, channels, *spatial)]
    if multilabel and channels > 1:
        forms = [full]
    if tuple(target.shape) not in forms:
        kind = "multilabel" if multilabel else "binary" if channels == 1 else f"{channels}-class"
        expected = " or ".join(str(form) for form in dict.fromkeys(forms))
        raise ValueError(
            f"a target of shape {tuple(target.shape)} does not fit {kind} logits of shape {full}: expected {expected}. "
            "One logit channel is binary, two and more are one softmax; for one sigmoid a channel say multilabel=True"
            + (_SQUEEZED if logits.ndim == 3 else "")
        )


def _tensor_of(name: str, value: object) -> str:
    """What to type for the tensor that is wanted."""
    if isinstance(value, Mapping):
        return f"pass one of its tensors: {' or '.join(f'{name}[{key!r}]' for key in value)}"
    if isinstance(value, (list, tuple)) and any(isinstance(part, Tensor) for part in value):
        return f"pass one of its tensors, such as {name}[0]"
    return "use torch.as_tensor"


def _check_values(target: Tensor, valid: Tensor | None, highest: int, *, indices: bool, shares: bool) -> None:
    if target.dtype != torch.bool:
        # One NaN makes both NaN. Not in the mask's own type, in which the highest of 300 classes would wrap round.
        low, high = (value.float() if _waits(value) else value.item() for value in target.aminmax())
        require(  # class indices that are a rounding off are refused below
            "target",
            (low >= -_ROUNDING) & (high <= highest + _ROUNDING),
            f"{'class indices' if indices else 'values'} from 0 to {highest}",
            lambda: high if low >= -_ROUNDING else low,
            "map the mask's values first (0 and 255: mask > 0), or leave a value out with ignore_index=",
        )
    if indices and target.is_floating_point():
        whole = target == target.round()
        require("target", whole.all(), "whole class indices", lambda: target[~whole][0], "round it, or resize masks by nearest")
    if shares:
        excess = target.float().sum(dim=1, keepdim=True) - 1
        if valid is not None:
            excess = excess * valid
        require(
            "target",
            excess.abs().amax() < 0.01,
            "class probabilities that sum to 1 at every pixel",
            lambda: 1 + excess.flatten()[excess.abs().argmax()],
            "for classes that overlap say multilabel=True" + (_SQUEEZED if target.ndim == 3 else ""),
        )


def _waits(value: Tensor) -> bool:
    """Whether the value cannot be read, or not without waiting for the device or breaking a compiled graph."""
    return value.is_cuda or value.is_meta or torch.compiler.is_compiling() or _is_wrapped(value)


def _is_wrapped(value: Tensor) -> bool:
    """Whether the tensor is one of `torch.func`'s, whose value cannot be read."""
    return not torch.compiler.is_compiling() and torch._C._functorch.is_functorch_wrapped_tensor(value)


def require(name: str, good: Tensor | bool, expected: str, found: Callable[[], Tensor | float], fix: str) -> None:
    """Refuse values of a tensor, without waiting for its device."""
    if isinstance(good, Tensor) and _waits(good):
        while _is_wrapped(good):  # torch.func.vmap knows no assertions; the tensor of all that it maps over does
            good = torch._C._functorch.get_unwrapped(good)
        torch._assert_async(good.all() if good.ndim else good, f"{name} must hold {expected}; {fix}")
    elif not good:
        raise ValueError(f"{name} must hold {expected}, found {float(found()):.10g}; {fix}")
