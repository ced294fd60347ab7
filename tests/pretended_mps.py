"""Tensors for tests of what differs on Apple's MPS, on machines without it."""

from __future__ import annotations

from typing import Any

import torch


class OnMps(torch.Tensor):
    """A tensor that says it is on MPS, and refuses what cannot be done there in PyTorch 2.6."""

    @property
    def device(self) -> torch.device:
        return torch.device("mps", 0)

    def cpu(self) -> torch.Tensor:
        return self.as_subclass(torch.Tensor)

    def double(self) -> torch.Tensor:
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64.")

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if kwargs and kwargs.get("antialias"):
            raise NotImplementedError("The operator 'aten::_upsample_bilinear2d_aa.out' is not currently implemented for MPS")
        return super().__torch_function__(function, types, args, kwargs or {})
