"""Configuration as plain data: what a network is, and how pictures become its input and its output a mask.

Both dataclasses are frozen, checked when made, and go to and from JSON. They import nothing but the standard library, so that a
config can be read without loading torch.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

NORMS = ("batch", "instance", "group", "none")
ACTIVATIONS = ("relu", "leaky_relu", "elu", "gelu", "silu")

_Config = TypeVar("_Config", bound="_JSONConfig")


class _JSONConfig:
    """To and from JSON for a dataclass of numbers, strings and tuples."""

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON types: tuples become lists."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # type: ignore[arg-type]
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

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
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(
                f"{cls.__name__} does not know {unknown}; its fields are {known}. "
                "If a newer unetlib wrote this config, upgrade with `pip install -U unetlib`."
            )
        return cls(**values)

    @classmethod
    def from_json(cls: type[_Config], text: str) -> _Config:
        """Build from `to_json`'s text."""
        return cls.from_dict(json.loads(text))


@dataclass(frozen=True)
class UNetConfig(_JSONConfig):
    """Everything that decides a `UNet`'s architecture.

    Args:
        in_channels: channels of the input picture, 3 for RGB.
        out_channels: channels of the logits: 1 is one sigmoid (binary), 2 and more is a softmax, background included.
        features: width of each encoder level, the full-size level first; its length is the network's depth.
        bottleneck: width of the deepest block; None takes twice the last of `features`.
        norm: "batch", "instance" (affine), "group" (32 groups, fewer where a group would have less than two channels) or "none"
            (the convolutions then have biases).
        activation: "relu", "leaky_relu" (slope 0.1), "elu", "gelu" or "silu".
        dropout: probability of dropping a channel at the end of each double convolution, in [0, 1).

    Raises:
        ValueError: naming the field, its value and what was expected.

    Example:
        >>> UNetConfig(features=[16, 32]).bottleneck
        64
        >>> UNetConfig.from_json(UNetConfig(norm="group").to_json()) == UNetConfig(norm="group")
        True
    """

    in_channels: int = 3
    out_channels: int = 1
    features: tuple[int, ...] = (64, 128, 256, 512)
    bottleneck: int = None  # type: ignore[assignment]  # an int from __post_init__ on
    norm: str = "batch"
    activation: str = "relu"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        """Check every field, and fill in the bottleneck."""
        if not _is_sequence(self.features):
            raise ValueError(f"features must be a sequence of widths such as (64, 128, 256, 512), got {self.features!r}")
        object.__setattr__(self, "features", tuple(self.features))
        if not self.features:
            raise ValueError("features must hold at least one width, such as (64, 128, 256, 512), got none")
        if self.bottleneck is None:
            last = self.features[-1]
            object.__setattr__(self, "bottleneck", 2 * last if isinstance(last, int) else last)
        widths = {f"features[{level}]": width for level, width in enumerate(self.features)}
        for name in ("in_channels", "out_channels", "bottleneck"):
            widths[name] = getattr(self, name)
        for name, width in widths.items():
            if isinstance(width, bool) or not isinstance(width, int) or width < 1:
                raise ValueError(f"{name} must be a positive integer, got {width!r}")
        if self.norm not in NORMS:
            raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {self.norm!r}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {self.activation!r}")
        if not _is_number(self.dropout) or not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be a probability in [0, 1), got {self.dropout!r}")

    @property
    def depth(self) -> int:
        """Number of poolings; pictures need at least `2 ** depth` pixels a side."""
        return len(self.features)


@dataclass(frozen=True)
class Preprocessing(_JSONConfig):
    """How a picture becomes the network's input, and its logits a mask; saved beside the weights.

    Pixels are scaled to [0, 1], resized (bilinear, antialiased), then `(x - mean) / std` for each channel. Logits are resized
    back to the picture's own size (bilinear) before the decision: `sigmoid(logit) >= threshold` for one output channel, the
    largest logit for several.

    Args:
        size: (height, width) every picture is resized to; None leaves that to `scale`.
        scale: factor on the picture's own height and width; with neither `size` nor `scale` the picture keeps its size.
        mean: one number for each input channel, in units of [0, 1] pixels; one number alone serves every channel.
        std: as `mean`, positive.
        threshold: probability from which a pixel is foreground, in (0, 1); for one output channel.
        class_names: a name for each class in the mask, background first; None where there are none.

    Raises:
        ValueError: naming the field, its value and what was expected.

    Example:
        >>> Preprocessing(size=(640, 960), class_names=("background", "car")).size
        (640, 960)
    """

    size: tuple[int, int] | None = None
    scale: float | None = None
    mean: tuple[float, ...] = field(default=(0.0,))
    std: tuple[float, ...] = field(default=(1.0,))
    threshold: float = 0.5
    class_names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        """Check every field."""
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
        if min(self.std) <= 0:
            raise ValueError(f"std must be positive, got {self.std!r}")
        if not _is_number(self.threshold) or not 0.0 < self.threshold < 1.0:
            raise ValueError(f"threshold must be a probability in (0, 1), got {self.threshold!r}")
        if self.class_names is not None:
            names = self.class_names
            if not _is_sequence(names) or not all(isinstance(name, str) for name in names):
                raise ValueError(f"class_names must be a sequence of strings, background first, got {names!r}")
            object.__setattr__(self, "class_names", tuple(names))

    def check_channels(self, in_channels: int, out_channels: int) -> None:
        """Check that the numbers of means, stds and class names fit a network.

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
        classes = max(out_channels, 2)
        if self.class_names is not None and len(self.class_names) != classes:
            raise ValueError(
                f"class_names has {len(self.class_names)} names, but {out_channels} output channels make {classes} classes "
                f"(background included); give {classes} names or None"
            )


def _is_sequence(value: object) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, (str, bytes, Mapping))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
