"""What a level of a network computes in evaluation mode: tensors, with batch norm folded into the convolution before it."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..blocks import DoubleConv, Up


@dataclass(frozen=True)
class Layer:
    """A convolution and what follows it.

    Args:
        weight: of the convolution, (out, in, 3, 3).
        bias: (out,).
        after: what is left to do with the result: a norm that cannot be folded, and the activation.
    """

    weight: Tensor
    bias: Tensor
    after: tuple[nn.Module, ...]

    @property
    def relu(self) -> bool:
        """Whether a ReLU, and nothing else, follows."""
        return len(self.after) == 1 and isinstance(self.after[0], nn.ReLU)

    def rest(self, dtype: torch.dtype) -> list[nn.Module]:
        """Copies, in this type, of what is left to do after a convolution that has a ReLU built in."""
        return [] if self.relu else [copied(module, dtype) for module in self.after]


@dataclass(frozen=True)
class Parts:
    """A level of the network: an encoder block, or the bottleneck, with the decoder's block at the same size.

    Args:
        convs: the two convolutions on the way down.
        up_convs: the two on the way up, of the concatenated maps; none for the bottleneck.
        upsample: the modules that double the deeper map.
        match: the rule that brings it to the skip's size.
        skip_first: the skip comes first in the concatenation.
    """

    convs: tuple[Layer, ...]
    up_convs: tuple[Layer, ...] = ()
    upsample: tuple[nn.Module | Layer, ...] = ()
    match: str = "resize"
    skip_first: bool = True

    @property
    def channels(self) -> int:
        """Channels of the map that comes in from above."""
        return self.convs[0].weight.shape[1]

    @property
    def width(self) -> int:
        """Channels of the skip."""
        return len(self.convs[-1].weight)

    def widened(self, channels: int) -> Parts:
        """The same for a map with this many channels, of which the last, beyond those of now, are zeros."""
        first, *others = self.convs
        weight = F.pad(first.weight, (0, 0, 0, 0, 0, channels - self.channels))
        return replace(self, convs=(replace(first, weight=weight), *others))

    @classmethod
    def of(cls, block: DoubleConv, up: Up | None = None) -> Parts:
        """A copy of what the modules of a level hold now; they may change afterwards."""
        convs = tuple(layers(block))
        if up is None:
            return cls(convs)
        upsample: tuple[nn.Module | Layer, ...] = (copy.deepcopy(up.upsample).eval(),)
        if isinstance(up.upsample, nn.Sequential):  # "nearest_conv"
            upsample = (up.upsample[0], *layers(up.upsample))
        return cls(convs, tuple(layers(up.conv)), upsample, up.match, up.skip_first)


def layers(block: DoubleConv | nn.Sequential) -> list[Layer]:
    """The convolutions of a block, each with its batch norm folded in.

    `bn(conv(x)) = (conv(x) + b - mean) * g + beta` with `g = gamma / sqrt(variance + eps)` is a convolution with the weights
    `w * g` and the bias `(b - mean) * g + beta`; the arithmetic is in float64. Dropout does nothing in evaluation mode and is
    left out, as are identities.

    Args:
        block: a `DoubleConv`, or any sequence of convolutions, norms and activations.

    Example:
        >>> first, second = layers(DoubleConv(3, 8))
        >>> first.weight.shape, first.relu
        (torch.Size([8, 3, 3, 3]), True)
    """
    modules = [module for module in block if not isinstance(module, (nn.Identity, nn.Dropout2d, nn.Upsample))]
    starts = [place for place, module in enumerate(modules) if isinstance(module, nn.Conv2d)]
    return [_layer(*modules[start:end]) for start, end in pairwise([*starts, len(modules)])]


def copied(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy in this type, with weights in channels_last.

    Example:
        >>> copied(nn.Conv2d(8, 8, 3), torch.bfloat16).weight.dtype
        torch.bfloat16
    """
    return copy.deepcopy(module).requires_grad_(False).to(dtype).to(memory_format=torch.channels_last)


def _layer(conv: nn.Module, *after: nn.Module) -> Layer:
    assert isinstance(conv, nn.Conv2d)
    weight = conv.weight.detach()
    bias = torch.zeros_like(weight[:, 0, 0, 0]) if conv.bias is None else conv.bias.detach()
    if after and isinstance(norm := after[0], (nn.BatchNorm2d, nn.SyncBatchNorm)):
        assert norm.running_mean is not None
        assert norm.running_var is not None
        after = after[1:]
        scale = _wide(norm.weight) / (_wide(norm.running_var) + norm.eps).sqrt()
        shift = (_wide(bias) - _wide(norm.running_mean)) * scale + _wide(norm.bias)
        weight, bias = (_wide(weight) * scale.view(-1, 1, 1, 1)).to(weight), shift.to(bias)
    return Layer(weight.clone(), bias.clone(), tuple(copy.deepcopy(module).eval() for module in after))


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.detach().cpu().double()  # on the CPU, as MPS has no float64
