"""The two pieces that a U-Net is made of, and its normalisations and activations by name."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import TypedDict

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Unpack

from .arguments import check_options
from .config import ACTIVATIONS, MATCHES, NORMS, UPSAMPLINGS


class DoubleConv(nn.Sequential):
    """Two 3x3 convolutions with padding 1, each followed by a normalisation and an activation; height and width stay.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        mid_channels: channels between the convolutions; None takes `out_channels`.
        dropout: probability of dropping a channel at the block's end.
        first_norm: False leaves the first convolution with a bias and without a norm.
        options: `norm`, `activation` and others: see `LayerOptions`.

    Shape:
        (N, in_channels, H, W) to (N, out_channels, H, W), any float dtype.

    Raises:
        TypeError: for an option that there is none of.
        ValueError: for an unknown `norm` or `activation`.

    Example:
        >>> DoubleConv(3, 64)(torch.zeros(1, 3, 20, 30)).shape
        torch.Size([1, 64, 20, 30])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        mid_channels: int | None = None,
        *,
        dropout: float = 0.0,
        first_norm: bool = True,
        **options: Unpack[LayerOptions],
    ) -> None:
        super().__init__()
        check_options("DoubleConv", options, ("mid_channels", "dropout", "first_norm", *LayerOptions.__annotations__))
        mid_channels = mid_channels or out_channels
        first: LayerOptions = options if first_norm else {**options, "norm": "none", "bias": True}
        self.conv1, self.norm1, self.act1 = conv_layers(in_channels, mid_channels, **first)
        self.conv2, self.norm2, self.act2 = conv_layers(mid_channels, out_channels, **options)
        if dropout:
            self.dropout = nn.Dropout2d(dropout)


class Up(nn.Module):
    """One decoder level: double the map, bring it to the skip's size, concatenate, convolve twice.

    Args:
        in_channels: channels of the deeper map.
        skip_channels: channels of the skip.
        out_channels: channels of the output; None takes `skip_channels`.
        mid_channels: channels between the two convolutions; None takes `out_channels`.
        up_channels: channels of the doubled map, for an `upsample` with weights; None takes `skip_channels`.
        upsample: "transpose", "bilinear", "nearest" or "nearest_conv", as in `UNetConfig`.
        align_corners: of the bilinear upsampling.
        match: as in `match_size`.
        skip_first: the skip's channels come first in the concatenation.
        dropout: as in `DoubleConv`.
        options: `norm`, `activation` and others: see `LayerOptions`.

    Shape:
        (N, in_channels, h, w) and (N, skip_channels, H, W) to (N, out_channels, H, W).

    Raises:
        TypeError: for an option that there is none of.
        ValueError: for an unknown `upsample`, `match`, `norm` or `activation`.

    Example:
        >>> Up(128, 64)(torch.zeros(1, 128, 10, 15), torch.zeros(1, 64, 20, 31)).shape
        torch.Size([1, 64, 20, 31])
    """

    def __init__(
        self,
        in_channels: int,
        skip_channels: int,
        out_channels: int | None = None,
        *,
        mid_channels: int | None = None,
        up_channels: int | None = None,
        upsample: str = "transpose",
        align_corners: bool = False,
        match: str = "resize",
        skip_first: bool = True,
        dropout: float = 0.0,
        **options: Unpack[LayerOptions],
    ) -> None:
        super().__init__()
        own = ("mid_channels", "up_channels", "upsample", "align_corners", "match", "skip_first", "dropout")
        check_options("Up", options, (*own, *LayerOptions.__annotations__))
        _check_match(match)
        self.match = match
        self.skip_first = skip_first
        up_channels = in_channels if upsample in ("bilinear", "nearest") else up_channels or skip_channels
        self.upsample = make_upsample(upsample, in_channels, up_channels, align_corners=align_corners, **options)
        out_channels = out_channels or skip_channels
        self.conv = DoubleConv(skip_channels + up_channels, out_channels, mid_channels, dropout=dropout, **options)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """Return the level's features at the skip's height and width."""
        x = match_size(self.upsample(x), skip, self.match)  # (N, in, h, w) -> (N, up, H, W)
        x = torch.cat((skip, x) if self.skip_first else (x, skip), dim=1)  # (N, skip + up, H, W)
        x = self.conv(x)  # (N, skip + up, H, W) -> (N, out, H, W)
        return x


def _check_match(match: str) -> None:
    if match not in MATCHES:
        raise ValueError(f"match must be one of {', '.join(MATCHES)}, got {match!r}")


def match_size(x: Tensor, skip: Tensor, match: str = "resize") -> Tensor:
    """Bring `x` to the height and width of `skip`; an exact identity where they agree.

    Odd heights and widths lose a row or column when pooled; this puts it back.

    Args:
        x: (N, C, h, w), a doubled map.
        skip: (N, C', H, W), H and W at least h and w.
        match: "resize" (bilinear, antialiased); "zeros" or "replicate": new rows at the bottom and columns at the right.

    Returns:
        (N, C, H, W).

    Raises:
        ValueError: for an unknown `match`.

    Example:
        >>> match_size(torch.ones(1, 1, 2, 2), torch.zeros(1, 3, 2, 3), "zeros")
        tensor([[[[1., 1., 0.],
                  [1., 1., 0.]]]])
    """
    _check_match(match)
    # In a captured graph the operation is always there: a branch on the sizes would tie an exported program to even ones.
    # Eager mode saves itself the copy.
    captured = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    if not captured and x.shape[-2:] == skip.shape[-2:]:
        return x
    if match == "resize":
        wide = x.to(torch.promote_types(x.dtype, torch.float32))  # on the CPU, torch cannot do this in half precision
        smooth = x.device.type != "mps"  # where torch 2.6 cannot; a map that grows differs by rounding alone
        return F.interpolate(wide, size=skip.shape[-2:], mode="bilinear", align_corners=False, antialias=smooth).to(x.dtype)
    # torch.compile fails in the gradient of F.pad's "replicate". Of a doubled map no more than a row and a column are missing,
    # a bound on sizes for which an exported program would be refused.
    if match == "replicate" and torch.compiler.is_compiling() and not _exported():
        x = torch.cat([x, x[..., -1:, :]], dim=-2).narrow(-2, 0, skip.shape[-2])
        return torch.cat([x, x[..., -1:]], dim=-1).narrow(-1, 0, skip.shape[-1])
    missing = [0, skip.shape[-1] - x.shape[-1], 0, skip.shape[-2] - x.shape[-2]]  # left, right, top, bottom
    return F.pad(x, missing, mode="constant" if match == "zeros" else "replicate")


torch.fx.wrap("match_size")  # a step of its graph, since torch.fx could not follow a comparison of sizes


class InstanceNorm(nn.InstanceNorm2d):
    """`torch.nn.InstanceNorm2d` that also takes a map of one pixel, as the bottleneck of the smallest pictures is."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the normalised map; of one pixel, the bias."""
        cudnn = torch.backends.cudnn.enabled
        return torch.instance_norm(input, self.weight, self.bias, None, None, True, 0.0, self.eps, cudnn)


class LayerOptions(TypedDict, total=False):
    """Keywords of `conv_layers`, which the blocks hand on to it.

    Attributes:
        norm: "batch", the default, "instance", "group" or "none".
        activation: "relu", the default, "leaky_relu", "elu", "gelu" or "silu".
        bias: the convolution has a bias; None, the default: with norm "none" only.
        affine: False takes weight and bias from norm "instance".
        negative_slope: slope of "leaky_relu" below zero, 0.1.
    """

    norm: str
    activation: str
    bias: bool | None
    affine: bool
    negative_slope: float


def conv_layers(
    in_channels: int,
    out_channels: int,
    *,
    norm: str = "batch",
    activation: str = "relu",
    bias: bool | None = None,
    affine: bool = True,
    negative_slope: float = 0.1,
) -> tuple[nn.Conv2d, nn.Module, nn.Module]:
    """A 3x3 convolution with padding 1, its normalisation and its activation; for the options see `LayerOptions`.

    Raises:
        ValueError: for an unknown `norm` or `activation`.

    Example:
        >>> conv, norm, activation = conv_layers(3, 64, norm="none")
        >>> conv.bias.shape
        torch.Size([64])
    """
    bias = norm == "none" if bias is None else bias
    return (
        nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=bias),
        make_norm(norm, out_channels, affine=affine),
        make_activation(activation, negative_slope=negative_slope),
    )


def make_upsample(
    name: str, in_channels: int, out_channels: int, *, align_corners: bool = False, **options: Unpack[LayerOptions]
) -> nn.Module:
    """The layer called `name` that doubles a map's height and width; the options are for "nearest_conv".

    Raises:
        ValueError: for another name than those of `UNetConfig`.

    Example:
        >>> make_upsample("nearest", 1, 1)(torch.tensor([[[[1.0, 2.0]]]]))
        tensor([[[[1., 1., 2., 2.],
                  [1., 1., 2., 2.]]]])
    """
    if name == "transpose":
        return nn.ConvTranspose2d(in_channels, out_channels, kernel_size=2, stride=2)
    if name == "bilinear":
        return nn.Upsample(scale_factor=2, mode="bilinear", align_corners=align_corners)
    if name == "nearest":
        return nn.Upsample(scale_factor=2)
    if name == "nearest_conv":
        conv, norm, act = conv_layers(in_channels, out_channels, **options)
        return nn.Sequential(OrderedDict(resize=nn.Upsample(scale_factor=2), conv=conv, norm=norm, act=act))
    raise ValueError(f"upsample must be one of {', '.join(UPSAMPLINGS)}, got {name!r}")


def make_norm(name: str, channels: int, *, affine: bool = True) -> nn.Module:
    """The normalisation called `name` for maps of `channels` channels.

    Raises:
        ValueError: for another name than those of `UNetConfig`.
    """
    if name == "batch":
        return nn.BatchNorm2d(channels)
    if name == "instance":
        return InstanceNorm(channels, affine=affine)
    if name == "group":  # at least two channels each, and 32 of them at most
        return nn.GroupNorm(max(1, math.gcd(64, channels) // 2), channels)
    if name == "none":
        return nn.Identity()
    raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {name!r}")


def make_activation(name: str, *, negative_slope: float = 0.1) -> nn.Module:
    """The activation called `name`; `negative_slope` is of "leaky_relu".

    Raises:
        ValueError: for another name than those of `UNetConfig`.
    """
    if name == "relu":
        return nn.ReLU(inplace=True)
    if name == "leaky_relu":
        return nn.LeakyReLU(negative_slope, inplace=True)
    if name == "elu":
        return nn.ELU(inplace=True)
    if name == "gelu":
        return nn.GELU()
    if name == "silu":
        return nn.SiLU(inplace=True)
    raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {name!r}")


def split_patches(x: Tensor, side: int) -> Tensor:
    """The pixels of each square as channels of one pixel.

    Args:
        x: (N, C, H, W).
        side: of the squares. Where it does not divide the height or width, the last row or column is repeated; but in a program
            that is exported or traced both must be multiples, of which no graph could make sure.

    Returns:
        (N, C * side ** 2, ceil(H / side), ceil(W / side)), in the order of `torch.nn.PixelUnshuffle`.

    Example:
        >>> split_patches(torch.zeros(1, 3, 5, 8), 2).shape
        torch.Size([1, 12, 3, 4])
    """
    if side == 1:
        return x
    if not _exported() and (x.shape[-2] % side or x.shape[-1] % side):
        x = F.pad(x, (0, -x.shape[-1] % side, 0, -x.shape[-2] % side), mode="replicate")
    return F.pixel_unshuffle(x, side)


def join_patches(x: Tensor, side: int, size: Sequence[int]) -> Tensor:
    """What `split_patches` does, undone.

    Args:
        x: (N, C * side ** 2, h, w).
        side: of the squares.
        size: height and width of the result; what is beyond is left out.

    Returns:
        (N, C, *size).

    Example:
        >>> x = torch.rand(1, 3, 5, 8)
        >>> torch.equal(join_patches(split_patches(x, 2), 2, (5, 8)), x)
        True
    """
    if side == 1:
        return x
    x = F.pixel_shuffle(x, side)
    return x if _exported() else x[..., : size[0], : size[1]]


def _exported() -> bool:
    """Whether a graph is captured for good; torch before 2.7 does not tell that from compiling, which is then taken for it."""
    # What this flag stands behind, `torch.compiler.is_exporting`, is true of all that `torch.compile` traces in PyTorch 2.11.
    exporting: bool = getattr(torch.compiler, "_is_exporting_flag", torch.compiler.is_compiling())
    return exporting or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
