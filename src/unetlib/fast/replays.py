"""The work of a call captured once and made again as a whole, which spares small pictures the calls; on CUDA by graphs."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

_MOST_PIXELS = 2**22  # in a batch: with more, a GPU is slower than the launches, and a capture keeps gigabytes
_KEPT = 4  # shapes
Function = Callable[[Tensor], Tensor]
logger = logging.getLogger("unetlib")


class CudaReplay:
    """A call as a CUDA graph, with memory of its own for the input and the result.

    Args:
        function: of a tensor on CUDA; it must not read values, and has been called with this shape before.
        x: an input.
        beside: another capture, whose memory for what lies between this one uses too; the two never run at once.
    """

    def __init__(self, function: Function, x: Tensor, beside: CudaReplay | None = None) -> None:
        self._x = x.clone()
        self._done: Any = torch.cuda.Event() if beside is None else beside._done  # type: ignore[no-untyped-call]
        self._graph = torch.cuda.CUDAGraph()
        # One stream for all, since libraries keep memory for each.
        self._stream: Any = torch.cuda.Stream() if beside is None else beside._stream  # type: ignore[no-untyped-call]
        stream = self._stream
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            function(self._x)  # a first call in this stream, so that libraries take their memory for it before the capture
        torch.cuda.current_stream().wait_stream(stream)
        pool = None if beside is None else beside._graph.pool()
        with torch.cuda.graph(self._graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            self._result = function(self._x)

    def __call__(self, x: Tensor) -> Tensor:
        """The result for x, cloned; calls from several streams follow one another."""
        stream = torch.cuda.current_stream()
        stream.wait_event(self._done)
        self._x.record_stream(stream)
        self._x.copy_(x)
        self._graph.replay()
        result = self._result.clone()
        self._done.record(stream)
        return result


class Replays:
    """A function of batches of pictures, captured for each shape at the second call with it, and replayed from then on.

    The last few shapes are kept. Large batches, and calls within another capture or in `torch.compile`, go to the function, as
    do those with a shape whose capture failed.

    Args:
        function: from (N, C, H, W) to a tensor of its own.
        capture: makes a replay of the function, an input, and another replay or None.
        key: of an input, in what those that share a capture are the same.
        most_pixels: of a batch that is captured.

    Example:
        >>> double = Replays(lambda x: 2 * x, capture=lambda function, x, beside: function)
        >>> [float(double(torch.ones(1, 1, 1, 1))) for _ in range(3)]
        [2.0, 2.0, 2.0]
    """

    def __init__(
        self,
        function: Function,
        capture: Callable[[Function, Tensor, Any], Function] = CudaReplay,
        *,
        key: Callable[[Tensor], Hashable] = lambda x: (x.shape, x.dtype),
        most_pixels: int = _MOST_PIXELS,
    ) -> None:
        self._function, self._capture, self._key, self._most_pixels = function, capture, key, most_pixels
        self._replays: OrderedDict[Hashable, Function | None] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, x: Tensor) -> Tensor:
        """The function's result."""
        if len(x) * x.shape[-2] * x.shape[-1] > self._most_pixels or torch.compiler.is_compiling() or captures(x):
            return self._function(x)
        key = self._key(x)
        with self._lock:
            if key in self._replays:
                self._replays.move_to_end(key)
                replay = self._replays[key] = self._replays[key] or self._captured(x)
                return replay(x)  # with the lock, as the input and the result of a capture are there once
            self._replays[key] = None
            if len(self._replays) > _KEPT:
                self._replays.popitem(last=False)
        return self._function(x)

    def clear(self) -> None:
        """Drop the captures and their memory."""
        with self._lock:
            self._replays.clear()

    def _captured(self, x: Tensor) -> Function:
        beside = next((replay for replay in self._replays.values() if replay not in (None, self._function)), None)
        try:
            return self._capture(self._function, x, beside)
        except Exception as error:  # whatever it is, the function itself is right
            logger.debug("no capture for %s: %r", tuple(x.shape), error)
            return self._function


def captures(x: Tensor) -> bool:
    """Whether what is done with a tensor now goes into a CUDA graph.

    Example:
        >>> captures(torch.zeros(1))
        False
    """
    return x.is_cuda and torch.cuda.is_current_stream_capturing()
