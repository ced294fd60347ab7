"""The two pieces that a U-Net is made of, and its normalisations and activations by name."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import ACTIVATIONS, NORMS


class DoubleConv(nn.Sequential):
    """Two 3x3 convolutions with padding 1, each followed by a normalisation and an activation; height and width stay.

    Args:
        in_channels: channels of the input.
        out_channels: channels of both convolutions' outputs.
        norm: "batch", "instance", "group" or "none"; with "none" the convolutions have biases, else not.
        activation: "relu", "leaky_relu", "elu", "gelu" or "silu".
        dropout: probability of dropping a channel at the block's end.

    Shape:
        (N, in_channels, H, W) to (N, out_channels, H, W), any float dtype.

    Raises:
        ValueError: for an unknown `norm` or `activation`.

    Example:
        >>> DoubleConv(3, 64)(torch.zeros(1, 3, 20, 30)).shape
        torch.Size([1, 64, 20, 30])
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, norm: str = "batch", activation: str = "relu", dropout: float = 0.0
    ) -> None:
        super().__init__()
        bias = norm == "none"
        for number, width in ((1, in_channels), (2, out_channels)):
            self.add_module(f"conv{number}", nn.Conv2d(width, out_channels, kernel_size=3, padding=1, bias=bias))
            self.add_module(f"norm{number}", make_norm(norm, out_channels))
            self.add_module(f"act{number}", make_activation(activation))
        if dropout:
            self.add_module("dropout", nn.Dropout2d(dropout))


class Up(nn.Module):
    """One decoder level: double the map, bring it to the skip's size, concatenate (skip first), convolve twice.

    Args:
        in_channels: channels of the deeper map.
        skip_channels: channels of the skip, of the doubled map and of the output.
        norm: as in `DoubleConv`.
        activation: as in `DoubleConv`.
        dropout: as in `DoubleConv`.

    Shape:
        (N, in_channels, h, w) and (N, skip_channels, H, W) to (N, skip_channels, H, W).

    Example:
        >>> Up(128, 64)(torch.zeros(1, 128, 10, 15), torch.zeros(1, 64, 20, 31)).shape
        torch.Size([1, 64, 20, 31])
    """

    def __init__(
        self, in_channels: int, skip_channels: int, *, norm: str = "batch", activation: str = "relu", dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.upsample = nn.ConvTranspose2d(in_channels, skip_channels, kernel_size=2, stride=2)
        self.conv = DoubleConv(2 * skip_channels, skip_channels, norm=norm, activation=activation, dropout=dropout)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """Return the level's features at the skip's height and width."""
        x = match_size(self.upsample(x), skip)  # (N, in, h, w) -> (N, skip, H, W)
        x = self.conv(torch.cat((skip, x), dim=1))  # (N, 2 * skip, H, W) -> (N, skip, H, W)
        return x


def match_size(x: Tensor, skip: Tensor) -> Tensor:
    """Resize `x` to the height and width of `skip` (bilinear, antialiased); an exact identity where they agree.

    Odd heights and widths lose a row or column when pooled; this puts it back.
    """
    # In a captured graph the resize is always there: a branch on the sizes would tie an exported program to even ones.
    # Eager mode saves itself the copy.
    captured = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    if captured or x.shape[-2:] != skip.shape[-2:]:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))  # on the CPU, torch cannot do this in half precision
        x = F.interpolate(wide, size=skip.shape[-2:], mode="bilinear", align_corners=False, antialias=True).to(x.dtype)
    return x


class InstanceNorm(nn.InstanceNorm2d):
    """`torch.nn.InstanceNorm2d` that also takes a map of one pixel, as the bottleneck of the smallest pictures is."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the normalised map; of one pixel, the bias."""
        cudnn = torch.backends.cudnn.enabled
        return torch.instance_norm(input, self.weight, self.bias, None, None, True, 0.0, self.eps, cudnn)


def make_norm(name: str, channels: int) -> nn.Module:
    """The normalisation called `name` for maps of `channels` channels."""
    if name == "batch":
        return nn.BatchNorm2d(channels)
    if name == "instance":
        return InstanceNorm(channels, affine=True)
    if name == "group":  # 32 groups, fewer where a group would have less than two channels
        return nn.GroupNorm(max(1, math.gcd(64, channels) // 2), channels)
    if name == "none":
        return nn.Identity()
    raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {name!r}")


def make_activation(name: str) -> nn.Module:
    """The activation called `name`."""
    if name == "relu":
        return nn.ReLU(inplace=True)
    if name == "leaky_relu":
        return nn.LeakyReLU(0.1, inplace=True)
    if name == "elu":
        return nn.ELU(inplace=True)
    if name == "gelu":
        return nn.GELU()
    if name == "silu":
        return nn.SiLU(inplace=True)
    raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {name!r}")
