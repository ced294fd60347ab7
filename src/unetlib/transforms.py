"""Presets for training and evaluation over `torchvision.transforms.v2`: a picture and its mask move together.

They take what `ImageMaskDataset` gives a v2 transform, `tv_tensors.Image` and `tv_tensors.Mask`. The mean and standard
deviation of a model belong to its `Preprocessing`; set them here only where no model does it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F


class Resize(v2.Transform):  # type: ignore[misc]
    """Resize a picture and its mask to one size, so that the mask stays where the picture is.

    torchvision's own `Resize` takes masks by the `nearest` rule, which reads the upper left pixel of each cell instead
    of the middle one: reduced k times, a mask lies up to (k - 1) / 2 pixels of the large picture off. Here a
    floating-point mask becomes the covered part of each pixel (antialiased bilinear, soft edges within the range of the
    input), and a mask of integers takes the middle pixel (`nearest-exact`).

    Args:
        size: (H, W) of the result.

    Raises:
        ValueError: `size` is not two positive whole numbers.

    Example:
        >>> image = tv_tensors.Image(torch.zeros(3, 8, 8, dtype=torch.uint8))
        >>> mask = tv_tensors.Mask(torch.eye(8))
        >>> image, mask = Resize((4, 4))(image, mask)
        >>> image.shape, mask.shape, mask.dtype
        (torch.Size([3, 4, 4]), torch.Size([4, 4]), torch.float32)
    """

    def __init__(self, size: Sequence[int]) -> None:
        """Keep the size."""
        super().__init__()
        if len(size) != 2 or not all(isinstance(side, int) and side > 0 for side in size):
            raise ValueError(f"size must be (height, width) in whole pixels, not {size!r}")
        self.size = list(size)

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Resize one picture or mask; torchvision calls this for each."""
        if not isinstance(inpt, tv_tensors.Mask):
            return F.resize(inpt, self.size, antialias=True)
        # As a picture of one channel, since torchvision resizes masks by `nearest` alone.
        mask = inpt.as_subclass(torch.Tensor)[None]
        if mask.is_floating_point():
            resized = F.resize_image(mask, self.size, antialias=True)
            resized = resized.clamp(mask.amin(), mask.amax())  # rounding leaves the range by 1e-7
        else:
            resized = F.resize_image(mask, self.size, interpolation=v2.InterpolationMode.NEAREST_EXACT)
        return tv_tensors.wrap(resized[0], like=inpt)


def train_transform(
    size: Sequence[int] | None = (160, 240),
    *,
    rotation: float = 35.0,
    horizontal_flip: float = 0.5,
    vertical_flip: float = 0.1,
    color_jitter: float = 0.0,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> v2.Compose:
    """Random augmentation for training; the defaults are those of the study.

    Args:
        size: (H, W) of the result, or `None` to keep each picture's size.
        rotation: Turn by up to this many degrees either way; corners become black, and background in the mask.
        horizontal_flip: Probability of a left-right flip.
        vertical_flip: Probability of an upside-down flip.
        color_jitter: Strength of random brightness, contrast and saturation, 0 to 1 (0.2: factors between 0.8 and 1.2).
        mean: Subtracted from each channel, on the scale of 0 to 1; goes with `std`.
        std: Divides each channel after that.

    Returns:
        A transform from (`tv_tensors.Image` uint8 CxHxW, `tv_tensors.Mask` HxW) to tensors: float32 CxHxW in [0, 1]
        before `mean` and `std`, and the mask HxW in its own dtype.

    Raises:
        ValueError: Only one of `mean` and `std` is given, `size` is not (H, W), or a number is out of its range.

    Example:
        >>> transform = train_transform((16, 24), rotation=10, color_jitter=0.2)
        >>> image = tv_tensors.Image(torch.zeros(3, 32, 48, dtype=torch.uint8))
        >>> image, mask = transform(image, tv_tensors.Mask(torch.ones(32, 48)))
        >>> image.shape, image.dtype, mask.shape
        (torch.Size([3, 16, 24]), torch.float32, torch.Size([16, 24]))
    """
    steps: list[v2.Transform] = [] if size is None else [Resize(size)]
    if rotation:
        steps.append(v2.RandomRotation(rotation, interpolation=v2.InterpolationMode.BILINEAR))
    if horizontal_flip:
        steps.append(v2.RandomHorizontalFlip(horizontal_flip))
    if vertical_flip:
        steps.append(v2.RandomVerticalFlip(vertical_flip))
    if color_jitter:
        steps.append(v2.ColorJitter(color_jitter, color_jitter, color_jitter))
    return v2.Compose([*steps, *_to_tensor(mean, std)])


def eval_transform(
    size: Sequence[int] | None = (160, 240), *, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> v2.Compose:
    """Resize and scale to [0, 1], without chance.

    Args:
        size: (H, W) of the result, or `None` to keep each picture's size.
        mean: Subtracted from each channel, on the scale of 0 to 1; goes with `std`.
        std: Divides each channel after that.

    Returns:
        A transform as `train_transform` gives.

    Raises:
        ValueError: Only one of `mean` and `std` is given, or `size` is not (H, W).

    Example:
        >>> image = tv_tensors.Image(torch.full((3, 32, 48), 255, dtype=torch.uint8))
        >>> image, mask = eval_transform((16, 24))(image, tv_tensors.Mask(torch.ones(32, 48)))
        >>> image.shape, image.max(), mask.shape
        (torch.Size([3, 16, 24]), tensor(1.), torch.Size([16, 24]))
    """
    steps: list[v2.Transform] = [] if size is None else [Resize(size)]
    return v2.Compose([*steps, *_to_tensor(mean, std)])


def _to_tensor(mean: Sequence[float] | None, std: Sequence[float] | None) -> list[v2.Transform]:
    if (mean is None) != (std is None):
        raise ValueError(f"mean and std go together, but mean={mean!r} and std={std!r}")
    steps: list[v2.Transform] = [v2.ToDtype(torch.float32, scale=True)]
    if mean is not None and std is not None:
        steps.append(v2.Normalize(list(mean), list(std)))
    return [*steps, v2.ToPureTensor()]
