"""Configuration as plain data: what a network is, and how pictures become its input and its output a mask.

Both dataclasses are frozen, checked when made, and go to and from JSON. They import nothing but the standard library, so that a
config can be read without loading torch.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

NORMS = ("batch", "instance", "group", "none")
ACTIVATIONS = ("relu", "leaky_relu", "elu", "gelu", "silu")
UPSAMPLINGS = ("transpose", "bilinear", "nearest", "nearest_conv")
MATCHES = ("resize", "zeros", "replicate")

_Config = TypeVar("_Config", bound="_JSONConfig")


class _JSONConfig:
    """To and from JSON for a dataclass of numbers, strings and tuples."""

    def _make_plain(self) -> None:
        for name, value in [*vars(self).items()]:
            object.__setattr__(self, name, _plain(value))

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON types: tuples become lists."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}

    def to_json(self) -> str:
        """All fields as JSON text, indented by two spaces."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_dict(cls: type[_Config], values: Mapping[str, Any]) -> _Config:
        """Build from `to_dict`'s result; fields left out take their defaults.

        Raises:
            ValueError: for an unknown field, or a value that the class refuses.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"{cls.__name__} expects a JSON object, got {type(values).__name__}")
        known = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
        if unknown := sorted(set(values) - set(known)):
            raise ValueError(
                f"{cls.__name__} does not know {unknown}; its fields are {known}. "
                "If a newer unetlib wrote this config, install a newer version of it."
            )
        return cls(**values)

    @classmethod
    def from_json(cls: type[_Config], text: str) -> _Config:
        """Build from `to_json`'s text."""
        return cls.from_dict(json.loads(text))


@dataclass(frozen=True)
class UNetConfig(_JSONConfig):
    """Everything that decides a `UNet`'s architecture.

    The options of `PeerOptions` are there for networks of other projects (`unetlib.convert`); each names those that need it.
    Tuples hold one number for each level, the full-size level first. Numbers and arrays of NumPy and PyTorch are taken too.
    What None takes is filled in, and stays in `dataclasses.replace`: to follow other `features` it must be None there again.

    Args:
        in_channels: channels of the input picture, 3 for RGB.
        out_channels: channels of the logits: 1 is one sigmoid (binary), 2 and more is a softmax, background included, or a
            sigmoid for each class (`Preprocessing.multilabel`).
        features: width of each encoder level, the full-size level first; its length is the network's depth.
        bottleneck: width of the deepest block; None takes twice the last of `features`.
        norm: "batch", "instance" (affine), "group" (half as many groups as the largest power of two, up to 64, that divides
            the width: 32 for 64, 16 for 96) or "none" (the convolutions then have biases).
        activation: "relu", "leaky_relu", "elu", "gelu" or "silu".
        dropout: probability of dropping a channel at the end of each double convolution, in [0, 1).
        upsample: how the decoder doubles a map: "transpose" (a 2x2 transposed convolution), "bilinear" (milesial with
            `bilinear=True`, usuyama), "nearest" (fepegar) or "nearest_conv" (nearest, then a 3x3 convolution with norm and
            activation: LeeJunHyun).
        align_corners: for "bilinear": the corner pixels of both maps are the same points (milesial, usuyama).
        match: how a doubled map that lacks a row or column is brought to its skip's size: "resize" (bilinear, antialiased),
            "zeros" (milesial) or "replicate" (MONAI) at the bottom and right.
        skip_first: the skip's channels come before the doubled map's; False for mateuszbuda, usuyama and jaxony.
        up_features: widths of the doubled maps; None takes the skips' (fepegar keeps the deeper map's). Without a convolution
            ("bilinear", "nearest") it is always the deeper map's.
        mid_features: widths between the two convolutions of the decoder's levels (milesial with `bilinear=True`); None takes
            `decoder_features`.
        decoder_features: widths of the decoder's levels (MONAI, milesial with `bilinear=True`); None takes `features`.
        conv_bias: the 3x3 convolutions have biases (milesial's versions 1 and 2, MONAI); None: with norm "none" only.
        first_norm: False leaves the very first convolution with a bias and without a norm (fepegar).
        affine: False takes weight and bias from norm "instance" (MONAI with `norm="instance"`).
        negative_slope: slope of "leaky_relu" below zero (0.1 in MONAI's default, 0.01 in PyTorch's).
        patch_size: side of the squares of pixels that are one pixel of the first level's maps: a square's pixels become
            channels on the way in, and channels become its pixels on the way out (sub-pixel convolution: Shi et al., CVPR 2016,
            arXiv:1609.05158). 2 sees full detail at little more than the cost of half the size.

    Raises:
        ValueError: naming the field, its value and what was expected.

    Example:
        >>> UNetConfig(features=[16, 32]).bottleneck
        64
        >>> UNetConfig.from_json(UNetConfig(norm="group").to_json()) == UNetConfig(norm="group")
        True
        >>> UNetConfig(features=(16, 32), upsample="bilinear").up_features
        (32, 64)
        >>> dataclasses.replace(UNetConfig(features=(16, 32)), features=(8, 16), bottleneck=None).bottleneck
        32
    """

    in_channels: int = 3
    out_channels: int = 1
    features: tuple[int, ...] = (64, 128, 256, 512)
    bottleneck: int = None  # type: ignore[assignment]  # an int from __post_init__ on
    norm: str = "batch"
    activation: str = "relu"
    dropout: float = 0.0
    upsample: str = "transpose"
    align_corners: bool = False
    match: str = "resize"
    skip_first: bool = True
    up_features: tuple[int, ...] = None  # type: ignore[assignment]  # these three are tuples from __post_init__ on
    mid_features: tuple[int, ...] = None  # type: ignore[assignment]
    decoder_features: tuple[int, ...] = None  # type: ignore[assignment]
    conv_bias: bool = None  # type: ignore[assignment]  # a bool from __post_init__ on
    first_norm: bool = True
    affine: bool = True
    negative_slope: float = 0.1
    patch_size: int = 1

    if TYPE_CHECKING:  # what it takes; fields have the types of what it makes of that

        def __init__(
            self,
            in_channels: int = 3,
            out_channels: int = 1,
            features: Sequence[int] = (64, 128, 256, 512),
            bottleneck: int | None = None,
            norm: str = "batch",
            activation: str = "relu",
            dropout: float = 0.0,
            upsample: str = "transpose",
            align_corners: bool = False,
            match: str = "resize",
            skip_first: bool = True,
            up_features: Sequence[int] | None = None,
            mid_features: Sequence[int] | None = None,
            decoder_features: Sequence[int] | None = None,
            conv_bias: bool | None = None,
            first_norm: bool = True,
            affine: bool = True,
            negative_slope: float = 0.1,
            patch_size: int = 1,
        ) -> None: ...

    def __post_init__(self) -> None:
        """Check every field, and fill in those that follow from others."""
        self._make_plain()
        for name, known in (("norm", NORMS), ("activation", ACTIVATIONS), ("upsample", UPSAMPLINGS), ("match", MATCHES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        self._set_default("conv_bias", self.norm == "none")
        for name in ("align_corners", "skip_first", "conv_bias", "first_norm", "affine"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if not _is_number(self.dropout) or not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be a probability in [0, 1), got {self.dropout!r}")
        if not _is_number(self.negative_slope) or self.negative_slope < 0:
            raise ValueError(f"negative_slope must be 0 or more, such as 0.1, got {self.negative_slope!r}")
        self._set_widths()
        # An option that would do nothing is a mistake, and would make equal networks unequal configs.
        for misused, option, needed in (
            (self.align_corners and self.upsample != "bilinear", "align_corners=True", "upsample='bilinear'"),
            (not self.first_norm and self.norm == "none", "first_norm=False", "a norm other than 'none'"),
            (not self.affine and self.norm != "instance", "affine=False", "norm='instance'"),
            (
                self.negative_slope != 0.1 and self.activation != "leaky_relu",
                f"negative_slope={self.negative_slope!r}",
                "activation='leaky_relu'",
            ),
        ):
            if misused:
                raise ValueError(f"{option} is for {needed}; leave it out, or give that too")

    def _set_default(self, name: str, value: Any) -> None:
        if getattr(self, name) is None:
            object.__setattr__(self, name, value)

    def _set_widths(self) -> None:
        """Check the widths, make them tuples, and fill in those left out."""
        self._set_tuple("features", like=(64, 128, 256, 512))
        last = self.features[-1]
        self._set_default("bottleneck", 2 * last)
        for name in ("in_channels", "out_channels", "bottleneck", "patch_size"):
            _check_width(name, getattr(self, name))
        self._set_default("decoder_features", self.features)
        self._set_tuple("decoder_features", like=self.features)
        self._set_default("mid_features", self.decoder_features)
        self._set_tuple("mid_features", like=self.features)
        deeper = (*self.decoder_features[1:], self.bottleneck)
        without_weights = self.upsample in ("bilinear", "nearest")
        self._set_default("up_features", deeper if without_weights else self.features)
        self._set_tuple("up_features", like=self.features)
        if without_weights and self.up_features != deeper:
            raise ValueError(
                f"up_features must be the deeper maps' widths {deeper} with upsample={self.upsample!r}, which has no weights, "
                f"got {self.up_features!r}"
            )

    def _set_tuple(self, name: str, like: tuple[int, ...]) -> None:
        widths = getattr(self, name)
        if not _is_sequence(widths):
            raise ValueError(f"{name} must be a sequence of widths such as {like}, got {widths!r}")
        widths = tuple(widths)
        if not widths:
            raise ValueError(f"{name} must hold at least one width, such as {like}, got none")
        if name != "features" and len(widths) != len(self.features):
            raise ValueError(f"{name} must hold {len(self.features)} widths, one for each of features, got {widths!r}")
        for level, width in enumerate(widths):
            _check_width(f"{name}[{level}]", width)
        object.__setattr__(self, name, widths)

    @property
    def depth(self) -> int:
        """Number of poolings."""
        return len(self.features)

    @property
    def stride(self) -> int:
        """Side in pixels of what is one pixel at the bottleneck, `patch_size * 2 ** depth`; pictures are at least as large."""
        return self.patch_size << self.depth


class PeerOptions(TypedDict, total=False):
    """The fields of `UNetConfig` that networks of other projects need, as further keywords of `UNet`."""

    upsample: str
    align_corners: bool
    match: str
    skip_first: bool
    up_features: Sequence[int] | None
    mid_features: Sequence[int] | None
    decoder_features: Sequence[int] | None
    conv_bias: bool | None
    first_norm: bool
    affine: bool
    negative_slope: float


@dataclass(frozen=True)
class Preprocessing(_JSONConfig):
    """How a picture becomes the network's input, and its logits a mask; saved beside the weights.

    Pixels are resized (bilinear, antialiased; bytes as bytes, rounded), scaled to [0, 1], then `(x - mean) / std` for each
    channel. Logits are resized back to the picture's own size (bilinear) before the decision: `sigmoid(logit) > threshold`
    for one output channel, the largest logit for several; with `multilabel`, `sigmoid(logit) > threshold` in each channel.

    Args:
        size: (height, width) every picture is resized to; None leaves that to `scale`.
        scale: factor on the picture's own height and width; with neither `size` nor `scale` the picture keeps its size. A side
            that is then shorter than the network's `stride` is enlarged to it.
        mean: one number from 0 to 1 for each input channel, of pixels in [0, 1]; one number alone serves every channel.
        std: as `mean`, of the same pixels, positive.
        threshold: probability above which a pixel is foreground, in (0, 1); for sigmoids.
        class_names: a name for each class in the mask, background first; with `multilabel` for each output channel; None
            where there are none.
        multilabel: each of several output channels is a sigmoid of its own, not all of them one softmax, so that classes may
            overlap, and none is the background.

    Raises:
        ValueError: naming the field, its value and what was expected.

    Example:
        >>> Preprocessing(size=(640, 960), class_names=("background", "car")).size
        (640, 960)
    """

    size: tuple[int, int] | None = None
    scale: float | None = None
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    threshold: float = 0.5
    class_names: tuple[str, ...] | None = None
    multilabel: bool = False

    if TYPE_CHECKING:  # what it takes

        def __init__(
            self,
            size: Sequence[int] | None = None,
            scale: float | None = None,
            mean: float | Sequence[float] = (0.0,),
            std: float | Sequence[float] = (1.0,),
            threshold: float = 0.5,
            class_names: Sequence[str] | None = None,
            multilabel: bool = False,
        ) -> None: ...

    def __post_init__(self) -> None:
        """Check every field."""
        self._make_plain()
        if self.size is not None:
            size = tuple(self.size) if _is_sequence(self.size) else (self.size,)
            if len(size) != 2 or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in size):
                raise ValueError(f"size must be (height, width) in pixels, two positive integers, got {self.size!r}")
            object.__setattr__(self, "size", size)
        if self.scale is not None:
            if self.size is not None:
                raise ValueError(f"give size or scale, not both: got size={self.size!r} and scale={self.scale!r}")
            if not _is_number(self.scale) or not self.scale > 0:
                raise ValueError(f"scale must be a positive number, got {self.scale!r}")
        for name in ("mean", "std"):
            values = getattr(self, name)
            values = tuple(values) if _is_sequence(values) else (values,)
            if not values or not all(_is_number(v) for v in values):
                raise ValueError(f"{name} must be one finite number for each input channel, got {getattr(self, name)!r}")
            object.__setattr__(self, name, values)
        if min(self.mean) < 0 or max(self.mean) > 1:
            raise ValueError(
                f"mean must be of pixels from 0 to 1, got {self.mean!r}; for pixels up to 255, divide mean and std by 255"
            )
        if min(self.std) <= 0:
            raise ValueError(f"std must be positive, got {self.std!r}")
        if not _is_number(self.threshold) or not 0.0 < self.threshold < 1.0:
            raise ValueError(f"threshold must be a probability in (0, 1), got {self.threshold!r}")
        if self.class_names is not None:
            names = tuple(self.class_names) if _is_sequence(self.class_names) else (None,)
            if not all(isinstance(name, str) for name in names):
                raise ValueError(f"class_names must be a sequence of strings, background first, got {self.class_names!r}")
            object.__setattr__(self, "class_names", names)
        if not isinstance(self.multilabel, bool):
            raise ValueError(f"multilabel must be True or False, got {self.multilabel!r}")

    def check_channels(self, in_channels: int, out_channels: int) -> None:
        """Check that the numbers of means, stds and class names fit a network, and `multilabel` its outputs.

        Args:
            in_channels: the network's input channels.
            out_channels: the network's output channels.

        Raises:
            ValueError: naming the field, its length and what was expected.
        """
        for name in ("mean", "std"):
            if len(getattr(self, name)) not in (1, in_channels):
                raise ValueError(
                    f"{name} has {len(getattr(self, name))} numbers, but the network has {in_channels} input channels; "
                    f"give 1 or {in_channels}"
                )
        if self.multilabel and out_channels == 1:
            raise ValueError("multilabel is for two output channels and more; one is a sigmoid in any case, so leave it out")
        background = "none of them the background" if self.multilabel else "background included"
        classes = max(out_channels, 2)
        if self.class_names is not None and len(self.class_names) != classes:
            raise ValueError(
                f"class_names has {len(self.class_names)} names, but {out_channels} output channels make {classes} classes "
                f"({background}); give {classes} names or None"
            )


def _plain(value: Any) -> Any:
    """Numbers and arrays of NumPy or PyTorch as Python's own, in lists and tuples too."""
    if isinstance(value, (list, tuple)):
        return (tuple if isinstance(value, tuple) else list)(map(_plain, value))
    return value.tolist() if hasattr(value, "tolist") else value


def _check_width(name: str, width: object) -> None:
    if isinstance(width, bool) or not isinstance(width, int) or width < 1:
        raise ValueError(f"{name} must be a positive integer, got {width!r}")


def _is_sequence(value: object) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, (str, bytes, Mapping, Set))  # sets have no order


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
