"""Three steps of the losses with their derivatives by hand, for fewer passes over memory than autograd would make."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-7
_ROW = 1024


class RegionSums(torch.autograd.Function):
    """TP, P and T of probabilities p (N, C, *spatial): sums over space of w p t, w p and w t, each (N, C).

    The mask is w t, (N, C, *spatial) like p, or the class indices of t, (N, *spatial); the weight w, (N, 1 or C, *spatial),
    may be None.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(p: Tensor, mask: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return TP, P and T; T has no gradient."""
        space = list(range(2, p.ndim))
        if mask.ndim < p.ndim:
            # Row by row, the true class's probability is added to the sum of its class: there is no one-hot mask, and
            # no chain of additions long enough to lose digits.
            true = p.gather(1, mask.unsqueeze(1)).squeeze(1)
            ones = p.new_ones(1).expand_as(true)
            if weight is not None:
                ones = weight.squeeze(1)
                true *= ones
            classes = _rows(mask)
            rows = p.new_zeros(*classes.shape[:-1], p.shape[1])
            tp, t = (rows.scatter_add(-1, classes, _rows(value)).flatten(1, -2).sum(1) for value in (true, ones))
        else:
            tp, t = (p * mask).sum(space), mask.sum(space)
        return tp, (p if weight is None else p * weight).sum(space), t

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: tuple[Tensor, Tensor, Tensor]) -> None:
        """Keep mask and weight."""
        p, mask, weight = inputs
        ctx.shape = p.shape
        ctx.save_for_backward(mask, weight)
        ctx.mark_non_differentiable(output[2])

    @staticmethod
    def backward(ctx: Any, grad_tp: Tensor, grad_p: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        """Return w (grad_p + t grad_tp)."""
        mask, weight = ctx.saved_tensors
        column = (*ctx.shape[:2], *[1] * (len(ctx.shape) - 2))
        grad = grad_p.view(column).expand(ctx.shape)
        if mask.ndim == len(ctx.shape):
            return torch.addcmul(grad if weight is None else grad * weight, mask, grad_tp.view(column)), None, None
        true = grad_tp.gather(1, mask.flatten(1)).view(mask.shape).unsqueeze(1)
        grad = grad.scatter_add(1, mask.unsqueeze(1), true)  # not in place, for this is still the memory of grad_p
        return grad if weight is None else grad.mul_(weight), None, None


def _rows(values: Tensor) -> Tensor:
    """Rows (..., n) cut into equal ones of at most 1024 values, filled up with zeros: (..., rows, values)."""
    length = values.shape[-1]
    rows = -(-length // _ROW)
    missing = -length % rows
    filled = F.pad(values, (0, missing)) if missing else values
    return filled.reshape(*values.shape[:-1], rows, -1)


class Focal(torch.autograd.Function):
    """(1 - e^-CE)^gamma CE of each cross-entropy CE."""

    generate_vmap_rule = True

    @staticmethod
    def forward(entropy: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
        """Return the focal loss of each value, and its slope, w^gamma + gamma w^(gamma - 1) (1 - w) CE, with w = 1 - e^-CE."""
        # 1 - e^-CE = 2 tanh(CE / 2) / (1 + tanh(CE / 2)), with as many digits as by expm1, which takes a CPU twice as long.
        half = (entropy / 2).tanh_()
        wrong = half.div_(1 + half).mul_(2).clamp_min_(EPS)  # 0 to a power below 0 is infinite
        power = wrong ** (gamma - 1)
        slope = torch.addcmul(wrong, 1 - wrong, entropy, value=gamma).mul_(power)
        # Not in place, or torch.compile of PyTorch 2.11 gives it a gradient of zero.
        return power.mul_(wrong) * entropy, slope

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: tuple[Tensor, Tensor]) -> None:
        """Keep the slope, and what it is made of."""
        entropy, ctx.gamma = inputs
        ctx.save_for_backward(entropy, output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None]:
        """Return grad times the slope."""
        entropy, slope = ctx.saved_tensors
        if torch.is_grad_enabled():  # for a second derivative the slope is made once more, by steps that have one
            wrong = (-torch.expm1(-entropy)).clamp_min(EPS)
            slope = (wrong + ctx.gamma * (1 - wrong) * entropy) * wrong ** (ctx.gamma - 1)
        return grad * slope, None


class Lovasz(torch.autograd.Function):
    """Lovász extension of the Jaccard loss along the last axis, for predictions and a bool mask of one shape (..., n).

    The error of a probability is its distance from the mask, that of a logit the hinge max(0, 1 - logit), with the
    logit's sign turned outside the mask. The errors are sorted from the largest; each is weighted by how much the
    Jaccard loss rises when its pixel joins those that are wrong. With I pixels of the mask left and a union of U after
    that, it is 1 / U for a pixel of the mask and I / (U (U - 1)) for another, which needs no difference of nearly equal
    numbers. A pixel that is not valid has no error, and is not in the mask.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(predicted: Tensor, mask: Tensor, valid: Tensor | None, hinge: bool) -> tuple[Tensor, Tensor]:
        """Return the extension, (...), and its slope at each pixel, which has no gradient."""
        turn = mask.to(predicted.dtype).mul_(-2).add_(1)  # -1 in the mask, 1 outside
        errors = (predicted * turn).add_(1 if hinge else mask).relu_()
        if valid is not None:
            errors.masked_fill_(~valid, 0)
            mask = mask & valid
        errors, order = errors.sort(dim=-1, descending=True)
        mask = mask.gather(-1, order)
        left = mask.cumsum(-1, dtype=torch.int32)
        left = left[..., -1:] - left
        union = torch.arange(1, mask.shape[-1] + 1, device=mask.device, dtype=torch.int32).add(left).to(errors.dtype)
        rise = left / (union - 1).clamp_min_(1)
        rise.masked_fill_(mask | (union == 1), 1).div_(union)
        result = (errors * rise).sum(-1)
        rise *= errors > 0
        return result, rise.scatter(-1, order, rise).mul_(turn)  # each to its own place, which leaves none as it was

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None, bool], output: tuple[Tensor, Tensor]) -> None:
        """Keep the slope."""
        ctx.save_for_backward(output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
        """Return grad times each pixel's weight, below zero in the mask."""
        (slope,) = ctx.saved_tensors
        return slope * grad.unsqueeze(-1), None, None, None
