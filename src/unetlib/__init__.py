"""unetlib: U-Nets to import, with weights that load by name.

The public names load when first used, so that importing the package costs little.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import datasets, inference, synthetic, transforms, visualize
    from .blocks import DoubleConv
    from .config import Preprocessing, UNetConfig
    from .datasets import CarvanaDataset, ImageMaskDataset, rle_decode, rle_encode, split_by_car
    from .losses import BCEDiceLoss, DiceLoss, bce_dice_loss, dice_loss
    from .metrics import SegmentationMetrics, dice_score, iou_score, pixel_accuracy
    from .pretrained import list_pretrained
    from .unet import UNet

_HOMES = {
    "blocks": ("DoubleConv",),
    "config": ("Preprocessing", "UNetConfig"),
    "datasets": ("CarvanaDataset", "ImageMaskDataset", "rle_decode", "rle_encode", "split_by_car"),
    "losses": ("BCEDiceLoss", "DiceLoss", "bce_dice_loss", "dice_loss"),
    "metrics": ("SegmentationMetrics", "dice_score", "iou_score", "pixel_accuracy"),
    "pretrained": ("list_pretrained",),
    "unet": ("UNet",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}
_MODULES = ("datasets", "inference", "synthetic", "transforms", "visualize")

__all__ = [*_HOME_OF, *_MODULES]  # noqa: PLE0604  # strings, from the table above


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
