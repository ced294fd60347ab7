"""A pass of this library's own operations on the CPU, made again as one call of the compiled code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .native_kernels import recorded
from .pool import Pool, pooled


class NativeReplay:
    """A function of native operations alone, made again without Python between them, which counts where maps are small.

    Args:
        function: of a tensor on the CPU; it has been called with this shape before, so that nothing is left to prepare.
        x: an input, float32; others are to have its shape, type and strides.
        pool: of the memory for what lies between; all that use it are to run one after the other.

    Raises:
        NotNative: for a function that has PyTorch do anything but make views and memory.

    Example:
        >>> from unetlib.fast.native_kernels import available, split_picture
        >>> if available():
        ...     split = NativeReplay(lambda x: split_picture(x, 2, 16), torch.rand(1, 3, 8, 8), Pool())
        ...     assert split(torch.ones(1, 3, 8, 8)).sum() == 3 * 8 * 8
    """

    def __init__(self, function: Callable[[Tensor], Tensor], x: Tensor, pool: Pool) -> None:
        self._pool = pool  # whose blocks stay as long as it does
        with pooled(pool, least=0), recorded() as self._recording, _NativeOnly():
            result = function(x)
        self._inputs, self._results = self._recording.places(x), self._recording.places(result)
        if not (self._inputs and self._results):
            raise NotNative("the input is not read, or the result not made, by a native operation")
        self._layout = result.shape, result.stride()

    def __call__(self, x: Tensor) -> Tensor:
        """The function's result for x, in memory of its own."""
        result = torch.empty_strided(*self._layout, dtype=torch.float32, device="cpu")
        for places, tensor in ((self._inputs, x), (self._results, result)):
            for arguments, name in places:
                setattr(arguments, name, tensor.data_ptr())
        self._recording.play()
        return result


class NotNative(Exception):
    """PyTorch was to compute something."""


class _NativeOnly(TorchDispatchMode):
    """Within it, PyTorch only makes views, and memory."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """PyTorch asks, and would load the compiler: a second, and 120 MB. A copy is `untraced` as a whole."""
        return False

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation of PyTorch's."""
        result = function(*args, **(kwargs or {}))
        if function is not torch.ops.aten.empty.memory_format and not _is_view(function, result, args):
            raise NotNative(f"{function} is not native")
        return result


def _is_view(function: Any, result: Any, args: Any) -> bool:
    """Whether an operation gave the memory that it got; in inference mode those that may copy, as `to`, are views by name."""
    if not function.is_view:
        return False
    given = {tensor.untyped_storage().data_ptr() for tensor in args if isinstance(tensor, Tensor)}
    results = (result,) if isinstance(result, Tensor) else result
    return all(tensor.untyped_storage().data_ptr() in given for tensor in results)
