"""What counts as a picture, and how it is read: whole or by region, in as many channels as the network takes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from .arguments import check_range
from .imaging import read_image, to_tensor
from .rasters import Raster, is_huge_tiff, open_raster

Picture: TypeAlias = "str | PathLike[str] | Image.Image | NDArray[np.uint8] | Tensor | Raster"


class Source(NamedTuple):
    """A picture that can be read by region."""

    size: tuple[int, int]
    dtype: torch.dtype  # uint8, or a floating point one for numbers in [0, 1]
    read: Callable[[slice, slice], Tensor]  # rows and columns to (C, h, w), of as many channels as the network takes

    def whole(self) -> Tensor:
        """All of it."""
        return self.read(slice(None), slice(None))


def open_picture(picture: Picture, channels: int) -> Source:
    """The picture, in memory or to be read by region."""
    if isinstance(picture, (str, PathLike)):
        path = os.fspath(picture)
        if is_huge_tiff(path):
            return _by_region(open_raster(path), channels, f"{path}, transparency aside,")
        if Path(path).suffix.lower() == ".npy":
            return _by_region(open_raster(path), channels, path)
        return in_memory(_match_channels(_decoded(path, channels), channels, path))
    name = "the picture"
    if isinstance(picture, Image.Image):
        return in_memory(_match_channels(_decoded(picture, channels), channels, name))
    if isinstance(picture, Tensor):
        return in_memory(_match_channels(_checked(picture), channels, name))
    if isinstance(picture, Raster):
        return _by_region(picture, channels, name)
    hint = "; give list(pictures), or take iter_logits" if isinstance(picture, Iterator) else ""
    hint = "; give its path, or unetlib.imaging.read_image(file)" if hasattr(picture, "read") else hint
    hint = "; give unetlib.imaging.read_image(io.BytesIO(data))" if isinstance(picture, (bytes, bytearray)) else hint
    raise TypeError(f"expected a path, PIL picture, array or tensor, or a list of them, got {type(picture).__name__}{hint}")


def in_memory(picture: Tensor) -> Source:
    """A tensor (C, H, W) as a picture that can be read by region."""
    return Source((picture.shape[1], picture.shape[2]), picture.dtype, lambda rows, columns: picture[:, rows, columns])


def check_several(images: Iterable[Picture]) -> None:
    """Refuse one picture, which would be taken for several by its rows or letters, or one that stands for all its frames."""
    if isinstance(images, (str, PathLike, Image.Image)) or (isinstance(images, Raster) and len(images.shape) in (2, 3)):
        raise ValueError(f"expected several pictures, got one {type(images).__name__}; give a list, such as [picture]")
    seen: set[int] = set()
    for image in images if isinstance(images, (list, tuple)) else ():
        if id(image) in seen and getattr(image, "n_frames", 1) > 1:
            raise ValueError(
                f"the list holds one PIL picture of {image.n_frames} frames several times, and only the frame it is at can be "
                "read; pass [unetlib.imaging.read_image(frame) for frame in ImageSequence.Iterator(picture)]"
            )
        seen.add(id(image))


def resize(picture: Tensor, size: Sequence[int]) -> Tensor:
    """(C, H, W) at another height and width: bilinear, antialiased; uint8 stays uint8."""
    if tuple(picture.shape[-2:]) == tuple(size):
        return picture
    from torchvision.transforms.v2.functional import resize_image

    source = picture.cpu() if picture.device.type == "mps" else picture  # torch 2.6 cannot do this on MPS
    resized: Tensor = resize_image(source, list(size), antialias=True)
    return resized.to(picture.device)


def _decoded(picture: str | Image.Image, channels: int) -> Tensor:
    """What Pillow reads, uint8 (1, H, W) for a network of one channel, otherwise (3, H, W)."""
    if channels not in (1, 3) and (isinstance(picture, Image.Image) or Path(picture).is_file()):
        is_path = isinstance(picture, str)
        name, array = (picture, "tifffile.imread(path)") if is_path else ("the picture", "numpy.asarray(picture)")
        raise ValueError(
            f"{name} would be read as grey or RGB, but the network takes {channels} channels; pass an array, such as "
            f"{array}, uint8 (H, W, {channels})"
        )
    return to_tensor(read_image(picture, "L" if channels == 1 else "RGB"))


def _checked(picture: Tensor) -> Tensor:
    """A tensor (C, H, W), uint8 or float in [0, 1], without its gradient."""
    tensor = picture.detach()
    if tensor.ndim != 3 or not (tensor.dtype == torch.uint8 or tensor.is_floating_point()):
        raise ValueError(
            f"a picture as a tensor must be (C, H, W), uint8 or floating point, got {tensor.dtype} {tuple(tensor.shape)}"
            + ("; pass a batch as list(batch)" if tensor.ndim == 4 else "")
        )
    if tensor.is_floating_point():
        tensor = tensor.float() if tensor.element_size() < 4 else tensor  # half precision is too coarse to resize in
        check_range(tensor)
    if 0 in tensor.shape:
        raise ValueError(f"the picture is empty: its shape is {tuple(tensor.shape)}")
    return tensor


def _by_region(raster: Raster, channels: int, name: str) -> Source:
    if raster.dtype != np.uint8 or len(raster.shape) not in (2, 3):
        hint = (
            "pass a batch as list(batch)"
            if len(raster.shape) == 4
            else "scale other numbers to 0..255 (of a huge array by region, as docs/huge-pictures.md shows), or pass a "
            "tensor (C, H, W) of floats in [0, 1]"
        )
        raise ValueError(
            f"{name}, as an array, must be uint8 of shape (H, W) or (H, W, C), got {raster.dtype} {tuple(raster.shape)}; {hint}"
        )
    if 0 in raster.shape:
        raise ValueError(f"{name} is empty: its shape is {tuple(raster.shape)}")

    def read(rows: slice, columns: slice) -> Tensor:
        return _match_channels(to_tensor(np.asarray(raster[rows, columns])), channels, name)

    return Source((raster.shape[0], raster.shape[1]), torch.uint8, read)


def _match_channels(picture: Tensor, channels: int, name: str) -> Tensor:
    found = picture.shape[0]
    if found == channels:
        return picture
    if found == 1 and channels == 3:
        return picture.expand(3, -1, -1)
    if found == 3 and channels == 1:
        return _grey(picture)
    raise ValueError(
        f"{name} has {found} channels, but the network takes {channels}; expected (H, W, {channels}) as an array or "
        f"({channels}, H, W) as a tensor"
    )


def _grey(picture: Tensor) -> Tensor:
    """ITU-R 601 luma as Pillow computes it for mode L, so that a picture's form makes no difference: (3, H, W) to (1, H, W)."""
    weights = torch.tensor([19595, 38470, 7471], device=picture.device).view(3, 1, 1)  # they sum to 2**16
    if picture.is_floating_point():
        return (picture * (weights / 2**16)).sum(0, keepdim=True)
    luma = (picture.int() * weights.int()).sum(0, keepdim=True, dtype=torch.int32)
    return (luma + 2**15 >> 16).to(torch.uint8)
