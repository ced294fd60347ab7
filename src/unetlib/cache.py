"""Pictures and masks decoded once and kept, as bytes and bits that all workers of a `DataLoader` share.

Decoding is most of what a data set costs: a full-size Carvana pair takes some 20 ms, a random transform at 160x240 1 ms.
"""

from __future__ import annotations

import ctypes
import logging
import math
import os
import shutil
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset, Subset
from torchvision import tv_tensors

from .arguments import at_least
from .datasets import ImageMaskDataset, apply_transform, check_transform, refuse_slice, size_clash
from .imaging import class_of_value, image_size, label_dtype, read_image, read_labels, to_tensor
from .memory import available_memory
from .transforms import Resize

logger = logging.getLogger("unetlib")

_TOKEN, _SHAPE = 16, 8  # bytes at the head of a store: what it is known by; then the height and width in each slot


class CachedDataset(Dataset[tuple[Any, Any]]):
    """An `ImageMaskDataset` whose pictures and masks are decoded once, reduced or not, and kept within a budget.

    They are kept in a temporary file that is mapped into memory, so that the processes of a `DataLoader` share it, each
    finds what another has decoded, and the system may write it to disk where memory is short. Where the folder is itself
    memory, as `/tmp` is on many Linux systems, it takes half of what is free there at most. On Linux the file has no name
    and is gone with the last process, however that ends. Masks come first, since they are the smallest; what no longer
    fits is decoded each time. The result is the same either way.

    What is kept of a binary mask: at its own size its bits; reduced, the covered share of each pixel in steps of 1/255,
    which is within 1/510 of what `Resize` gives. Class masks keep their classes, reduced by the middle pixel. A JPEG
    picture is decoded at 1/2, 1/4 or 1/8 of its size where `size` is that small, which changes a photograph by less
    than a level of 255 on average against decoding all of it.

    Args:
        dataset: Where the pairs are; without a transform.
        size: (H, W) that all are reduced to, or `None` to keep each one's own.
        transform: Called on each pair afresh, in one of the two ways of `ImageMaskDataset`: an `unetlib.transforms` preset
            with `size=None`, an albumentations pipeline, or `None`.
        budget_gib: What may be kept, in GiB (2**30 bytes). Reduced to 160x240, a Carvana pair takes 150 KiB, at full size
            7.3 MiB.
        folder: Where the temporary file lies: `None` for the system's folder for such, `"/dev/shm"` for memory alone.

    Raises:
        ValueError: `dataset` has a transform, or `size` or `budget_gib` is out of its range.
        TypeError: `dataset` is no `ImageMaskDataset`, `transform` is not callable or does not take a picture and its mask, or
            `size` no pair of integers.
        FileNotFoundError: There is no such `folder`.
        OSError: `folder` does not take that much: a quota, or a limit on the size of files.

    Example:
        >>> from PIL import Image
        >>> folder = Path(tempfile.mkdtemp())
        >>> Image.new("RGB", (96, 64)).save(folder / "cat.jpg")
        >>> Image.new("L", (96, 64), 255).save(folder / "cat_mask.png")
        >>> dataset = CachedDataset(ImageMaskDataset(folder, folder, mask_suffix="_mask"), size=(16, 24))
        >>> image, mask = dataset[0]
        >>> image.shape, image.dtype, mask.shape, mask.dtype
        (torch.Size([3, 16, 24]), torch.uint8, torch.Size([16, 24]), torch.float32)
        >>> dataset
        CachedDataset of 1 pairs at 16x24; room for 1 pictures and 1 masks
    """

    def __init__(
        self,
        dataset: ImageMaskDataset,
        size: tuple[int, int] | None = None,
        *,
        transform: Callable[..., Any] | None = None,
        budget_gib: float = 8.0,
        folder: str | PathLike[str] | None = None,
    ) -> None:
        """Make room; nothing is decoded yet."""
        if not isinstance(dataset, ImageMaskDataset):
            hint = "; take dataset.subset(indices) for a part of one" if isinstance(dataset, Subset) else ""
            raise TypeError(f"dataset must be an ImageMaskDataset, not a {type(dataset).__name__}{hint}")
        if dataset.transform is not None:
            raise ValueError("dataset has a transform, whose chances would be kept; give CachedDataset(transform=...) instead")
        check_transform(transform)
        at_least("budget_gib", budget_gib, 0, endless=True)
        self.dataset = dataset
        self.transform = transform
        self._resize = None if size is None else Resize(size)
        classes = class_of_value(dataset.mask_values)
        self._binary = classes is None
        # Bits, which the store packs, or shares of 255; or class indices as `read_labels` gives them.
        self._mask_dtype = np.dtype(np.uint8 if size else np.bool_) if classes is None else label_dtype(classes)
        self._store = _Store(self._slot_sizes(), budget_gib * 2**30, folder)
        logger.info("%r", self)

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        """The picture and mask number `index`, transformed.

        Returns:
            Without a transform `tv_tensors.Image` (C, H, W), uint8, and `tv_tensors.Mask` (H, W): float32 shares of 0 to 1
            for a binary mask that was reduced, bool for one of its own size, and uint8 class indices (int64 where one is
            above 255). With one, what it gives, of which class indices are int64 where it takes arrays by keyword.

        Raises:
            TypeError: for a slice.
            ValueError: A file cannot be read, the sizes differ, or the mask holds values other than expected.
        """
        refuse_slice(index)
        index = range(len(self))[index]
        kept = torch.from_numpy(self._keep(index, self._mask_dtype, self._read_mask)[..., 0])
        mask = kept.float().div_(255) if self._binary and self._resize else kept
        image = self._keep(len(self) + index, np.dtype(np.uint8), self._read_image)
        if self.transform is None:
            return tv_tensors.Image(to_tensor(image), device="cpu"), tv_tensors.Mask(mask, device="cpu")
        return apply_transform(self.transform, image, mask.numpy())

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        """The pairs in order; an `IndexError` of a transform is raised, where Python's own loop would take it for the end."""
        return (self[index] for index in range(len(self)))

    def __repr__(self) -> str:
        """One line with the count, the size and how much can be kept."""
        pairs, fits = len(self), self._store.fits
        size = "{}x{}".format(*self._resize.size) if self._resize else "their own sizes"
        return (
            f"CachedDataset of {pairs} pairs at {size}; room for {max(0, fits - pairs)} pictures and {min(fits, pairs)} masks"
        )

    def _keep(self, slot: int, dtype: np.dtype[Any], read: Callable[[int], NDArray[Any]]) -> NDArray[Any]:
        """What a slot holds, (H, W, channels); read and put there where it is empty."""
        found = self._store.get(slot, dtype)
        if found is None:
            found = read(slot % len(self))
            self._store.put(slot, found)
        return found

    def _read_image(self, index: int) -> NDArray[Any]:
        path, mode = self.dataset.paths(index)[0], self.dataset.mode
        if self._resize is None:
            return read_image(path, mode)
        height, width = self._resize.size
        image = tv_tensors.Image(to_tensor(read_image(path, mode, min_size=(height, width))), device="cpu")
        return np.ascontiguousarray(self._resize(image).permute(1, 2, 0).numpy())

    def _read_mask(self, index: int) -> NDArray[Any]:
        image_path, mask_path = self.dataset.paths(index)
        labels = read_labels(mask_path, self.dataset.mask_values)
        size = image_size(image_path)
        if size != labels.shape:
            raise ValueError(size_clash(image_path, size, mask_path, labels.shape))
        if self._resize is not None:
            mask = self._resize(tv_tensors.Mask(torch.from_numpy(labels), device="cpu")).as_subclass(torch.Tensor)
            labels = (mask.mul(255).round_() if self._binary else mask).numpy()
        return labels.astype(self._mask_dtype, copy=False)[..., None]

    def _slot_sizes(self) -> list[int]:
        """Bytes of each mask, then of each picture."""
        if self._resize is not None:
            areas = [math.prod(self._resize.size)] * len(self)
        else:
            areas = [math.prod(image_size(self.dataset.paths(index)[0], upright=False)) for index in range(len(self))]
        mask_bits = 1 if self._mask_dtype == np.bool_ else 8 * self._mask_dtype.itemsize
        channels = 3 if self.dataset.mode == "RGB" else 1
        return [-(-area * mask_bits // 8) for area in areas] + [area * channels for area in areas]


class _Store:
    """Slots for arrays (H, W, channels) in a temporary file, which every process that has this object maps, by fork or pickle.

    Two processes may fill a slot at the same time: they write the same. Its shape is written last, and says that it is full.
    """

    def __init__(self, sizes: Sequence[int], budget: float, folder: str | PathLike[str] | None) -> None:
        """Reserve the first slots, as many as budget and disk have room for."""
        folder = tempfile.gettempdir() if folder is None else folder
        if not Path(folder).is_dir():
            raise FileNotFoundError(f"there is no folder {str(folder)!r} to keep decoded pictures in: make it first")
        ends = np.cumsum(sizes, dtype=np.int64)
        free = shutil.disk_usage(folder).free * 9 // 10  # the rest is for others
        if _is_memory(folder):
            free = min(free, available_memory() // 2)
        if free < min(budget, sum(sizes)):
            logger.warning("%s has room for %.2f GiB of decoded pictures; the rest is decoded each time", folder, free / 2**30)
        self.fits = int(np.searchsorted(ends, min(budget, free), side="right"))
        head = _TOKEN + _SHAPE * self.fits
        self._ends = head + ends[: self.fits]
        self._starts = self._ends - np.asarray(sizes[: self.fits], np.int64)
        # On Linux the file has no name, but others of the same user can open it as long as this process lives.
        named = sys.platform != "linux"
        self._file = (tempfile.NamedTemporaryFile if named else tempfile.TemporaryFile)(prefix="unetlib-", dir=folder)
        weakref.finalize(self, self._file.close)  # or Python warns of a file left open
        self._path = self._file.name if named else f"/proc/{os.getpid()}/fd/{self._file.fileno()}"
        _reserve(self._file.fileno(), int(self._ends[-1]) if self.fits else head, folder)
        self._map(self._file)
        self._token = os.urandom(_TOKEN)
        self._bytes[:_TOKEN] = np.frombuffer(self._token, np.uint8)

    def get(self, slot: int, dtype: np.dtype[Any]) -> NDArray[Any] | None:
        """A copy of what is in a slot; None if that is empty or none."""
        if slot >= self.fits or not self._shapes[slot, 0]:
            return None
        height, width = self._shapes[slot].tolist()
        kept = self._bytes[self._starts[slot] : self._ends[slot]]
        if dtype == np.bool_:
            return np.unpackbits(kept, count=height * width).view(np.bool_).reshape(height, width, 1)
        return np.array(kept).view(dtype).reshape(height, width, -1)

    def put(self, slot: int, array: NDArray[Any]) -> None:
        """Fill a slot, if it is one, and as large: a file may have changed since."""
        if slot >= self.fits:
            return
        kept = self._bytes[self._starts[slot] : self._ends[slot]]
        flat = np.packbits(array) if array.dtype == np.bool_ else array.reshape(-1).view(np.uint8)
        if len(flat) == len(kept):
            kept[:] = flat
            self._shapes[slot, 1] = array.shape[1]
            self._shapes[slot, 0] = array.shape[0]  # the one that `get` looks at

    def _map(self, file: Any) -> None:
        self._bytes = np.memmap(file, np.uint8, "r+")
        self._shapes = self._bytes[_TOKEN : _TOKEN + _SHAPE * self.fits].view(np.int32).reshape(-1, 2)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_file", "_bytes", "_shapes")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        try:
            self._map(self._path)
            found = self._bytes[:_TOKEN].tobytes() == self._token
        except (OSError, ValueError):
            found = False
        if not found:  # on another machine, or after its maker has ended
            logger.warning("the decoded pictures of another process are out of reach here: each is decoded each time")
            self.fits = 0


def _is_memory(folder: str | PathLike[str]) -> bool:
    """Whether files there are in memory: Linux's tmpfs."""
    if sys.platform != "linux":
        return False
    found = ctypes.create_string_buffer(256)  # more than a `struct statfs`, which begins with the kind
    ctypes.CDLL(None).statfs(os.fsencode(folder), found)
    return ctypes.c_long.from_buffer(found).value == 0x01021994


def _reserve(descriptor: int, size: int, folder: str | PathLike[str]) -> None:
    """Give a file its size, and the room on the disk where the system can: a full disk is an error here, not a crash later."""
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, size)
        else:
            os.truncate(descriptor, size)
    except OSError as error:
        raise OSError(
            f"no room for {size / 2**30:.2f} GiB of decoded pictures in {folder} ({error}); give folder= on another disk, or a "
            "smaller budget_gib (--cache-gib)"
        ) from error
