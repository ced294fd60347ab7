"""unetlib: U-Nets to import, with weights that load by name.

The public names load when first used, so that importing the package costs little.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import (
        datasets as datasets,
        inference as inference,
        synthetic as synthetic,
        transforms as transforms,
        visualize as visualize,
    )
    from .blocks import DoubleConv as DoubleConv
    from .cache import CachedDataset as CachedDataset
    from .config import (
        Preprocessing as Preprocessing,
        UNetConfig as UNetConfig,
    )
    from .convert import export_state_dict as export_state_dict
    from .datasets import (
        CarvanaDataset as CarvanaDataset,
        ImageMaskDataset as ImageMaskDataset,
        rle_decode as rle_decode,
        rle_encode as rle_encode,
        split_by_car as split_by_car,
    )
    from .losses import (
        BCEDiceLoss as BCEDiceLoss,
        CompoundLoss as CompoundLoss,
        CrossEntropyLoss as CrossEntropyLoss,
        DiceLoss as DiceLoss,
        FocalLoss as FocalLoss,
        GeneralizedDiceLoss as GeneralizedDiceLoss,
        JaccardLoss as JaccardLoss,
        LovaszLoss as LovaszLoss,
        MCCLoss as MCCLoss,
        SoftCLDiceLoss as SoftCLDiceLoss,
        TverskyLoss as TverskyLoss,
        bce_dice_loss as bce_dice_loss,
        cross_entropy_loss as cross_entropy_loss,
        dice_loss as dice_loss,
        focal_loss as focal_loss,
        generalized_dice_loss as generalized_dice_loss,
        jaccard_loss as jaccard_loss,
        lovasz_loss as lovasz_loss,
        mcc_loss as mcc_loss,
        soft_cldice_loss as soft_cldice_loss,
        tversky_loss as tversky_loss,
    )
    from .metrics import (
        SegmentationMetrics as SegmentationMetrics,
        boundary_f_score as boundary_f_score,
        boundary_iou as boundary_iou,
        calibration_error as calibration_error,
        confusion_matrix as confusion_matrix,
        dice_score as dice_score,
        fbeta_score as fbeta_score,
        hausdorff_distance as hausdorff_distance,
        iou_score as iou_score,
        pixel_accuracy as pixel_accuracy,
        precision_score as precision_score,
        recall_score as recall_score,
        specificity_score as specificity_score,
    )
    from .objects import (
        ObjectMetrics as ObjectMetrics,
        object_average_precision as object_average_precision,
        rand_f_score as rand_f_score,
    )
    from .pretrained import list_pretrained as list_pretrained, model_info as model_info
    from .unet import UNet as UNet

__version__: str

# The rooms that are public as a whole, and the room of each name.
_MODULES = ("datasets", "inference", "synthetic", "transforms", "visualize")
_NAMES = {
    "blocks": "DoubleConv",
    "cache": "CachedDataset",
    "config": "Preprocessing UNetConfig",
    "convert": "export_state_dict",
    "datasets": "CarvanaDataset ImageMaskDataset rle_decode rle_encode split_by_car",
    "losses": """
        BCEDiceLoss CompoundLoss CrossEntropyLoss DiceLoss FocalLoss GeneralizedDiceLoss JaccardLoss
        LovaszLoss MCCLoss SoftCLDiceLoss TverskyLoss bce_dice_loss cross_entropy_loss dice_loss focal_loss
        generalized_dice_loss jaccard_loss lovasz_loss mcc_loss soft_cldice_loss tversky_loss
    """,
    "metrics": """
        SegmentationMetrics boundary_f_score boundary_iou calibration_error confusion_matrix dice_score
        fbeta_score hausdorff_distance iou_score pixel_accuracy precision_score recall_score
        specificity_score
    """,
    "objects": "ObjectMetrics object_average_precision rand_f_score",
    "pretrained": "list_pretrained model_info",
    "unet": "UNet",
}
_HOME_OF = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = sorted([*_HOME_OF, *_MODULES])  # noqa: PLE0605  # strings, from the tables above


if not TYPE_CHECKING:  # or every misspelt name were one, to type checkers

    def __getattr__(name: str) -> Any:
        if name in _MODULES or name in _NAMES:
            return importlib.import_module(f".{name}", __name__)
        if name == "__version__":
            return importlib.import_module(".version", __name__).installed_version()
        if name not in _HOME_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f".{_HOME_OF[name]}", __name__), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
