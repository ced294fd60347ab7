"""Pictures too large for memory: read from a file by region, results written to one as they come."""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Iterable, Iterator
from itertools import chain
from os import PathLike
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .arguments import needed
from .files import whole_file
from .imaging import to_bytes

_TIFF = (".tif", ".tiff")
_READ_WHOLE = 2**26  # pixels of a TIFF up to which imaging.read_image has it
_TILE = 512  # pixels a side of a tile in TIFF files written here


@runtime_checkable
class Raster(Protocol):
    """What can be read by region: `raster[rows, columns]` with two slices, as of NumPy, zarr and h5py arrays."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(H, W) or (H, W, C)."""

    @property
    def dtype(self) -> Any:
        """A NumPy dtype."""

    def __getitem__(self, region: Any, /) -> Any:
        """The region as an array."""


def open_raster(path: str | PathLike[str]) -> Raster:
    """Open a picture without reading its pixels.

    Args:
        path: a `.npy` file, mapped into memory; or a TIFF file, best a tiled one. Of a TIFF it is the first picture, at its
            full resolution: the label and the smaller copies that a slide has are left out. Its transparency is dropped, and
            16-bit values are scaled from 0..65535 to 0..255, as `read_image` does.

    Returns:
        An object with `shape` (H, W) or (H, W, C), `dtype`, and `[rows, columns]` for slices; uint8 from a TIFF.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: for a TIFF, without the extra `tiff`.
        ValueError: for another suffix, or a file that cannot be read as one picture.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     np.save(Path(folder) / "slide.npy", np.zeros((400, 300, 3), np.uint8))
        ...     open_raster(Path(folder) / "slide.npy")[100:120, 30:40].shape
        (20, 10, 3)
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r}")
    if path.suffix.lower() == ".npy":
        try:
            array: NDArray[Any] = np.lib.format.open_memmap(path, mode="r")
        except OSError as error:  # of the system: the file may be sound
            raise ValueError(f"{path} cannot be opened: {error.strerror}") from error
        except Exception as error:  # a broken header can raise nearly anything
            raise ValueError(f"{path} cannot be read as an array ({error}). Save it again with numpy.save.") from error
        return array
    if path.suffix.lower() in _TIFF:
        return _TiffRaster(path)
    raise ValueError(f"expected a .npy, .tif or .tiff file to read by region, got {str(path)!r}")


def is_huge_tiff(path: str | PathLike[str]) -> bool:
    """Whether a file is a TIFF of more than 2**26 pixels, which `predict` reads by region."""
    path = Path(path)
    if path.suffix.lower() not in _TIFF or not path.is_file():
        return False
    try:
        return _pixels_of_tiff(path) > _READ_WHOLE
    except Image.DecompressionBombError:  # of Pillow's own limit, which is above this one
        return True
    except Exception:  # whatever a broken file raises: that it cannot be read is for read_image to say
        return False


def check_output(path: str | PathLike[str]) -> Path:
    """Check that `write_raster` can write there, before any work is done.

    Raises:
        FileNotFoundError: for a folder that does not exist.
        ImportError: for a TIFF, without the extra `tiff`.
        ValueError: for another suffix than .npy, .tif and .tiff, or a folder.
    """
    path = Path(path)
    if path.suffix.lower() not in (".npy", *_TIFF):
        raise ValueError(f"expected a .npy, .tif or .tiff file to write, got {str(path)!r}")
    if path.is_dir():
        raise ValueError(f"expected a file to write, got the folder {str(path)!r}; name a file in it")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"there is no folder {str(path.parent)!r} to write {path.name} in: make it first")
    if path.suffix.lower() in _TIFF:
        _needed("tifffile")
    return path


def is_read_from(picture: object, path: str | PathLike[str]) -> bool:
    """Whether a picture is this file: its path, or mapped from it, or opened by `open_raster` or Pillow."""
    named = isinstance(picture, (str, PathLike))
    source: Any = picture if named else getattr(picture, "_path", None) or getattr(picture, "filename", None)
    return bool(source) and os.path.exists(source) and os.path.exists(path) and os.path.samefile(source, path)


def write_raster(path: str | PathLike[str], size: tuple[int, int], bands: Iterable[NDArray[Any]]) -> Path:
    """Write an array to a file, band by band from the top; the file appears when it is whole.

    Args:
        path: a `.npy` file, or a `.tif` one: tiled, compressed without loss, BigTIFF from 4 GiB on. One that is there is
            replaced.
        size: height and width of the whole.
        bands: arrays (h, W), or (C, h, W) for `.npy`, of one dtype, whose heights add up to H.

    Returns:
        The path.

    Raises:
        ValueError: for bands that do not add up to `size`, differ in dtype or channels, or have channels and go into a TIFF.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = write_raster(Path(folder) / "mask.npy", (4, 3), [np.zeros((2, 3)), np.ones((2, 3))])
        ...     np.load(path)[:, 0].tolist()
        [0.0, 0.0, 1.0, 1.0]
    """
    path = check_output(path)
    write = _write_npy if path.suffix.lower() == ".npy" else _write_tiff
    waiting = iter(bands)
    first = next(waiting, None)
    if first is None:
        raise ValueError("there are no bands to write")
    counted = _counted(chain([first], waiting), first, size)
    with whole_file(path) as partial:
        write(partial, first, (*first.shape[:-2], *size), counted)
        for _ in counted:  # tifffile asks for no tile beyond the last one, and so not for a band too many
            pass
    return path


class _TiffRaster:
    """The first picture of a TIFF file, as uint8 (H, W) or (H, W, C)."""

    dtype = np.dtype(np.uint8)

    def __init__(self, path: Path) -> None:
        tifffile, zarr = _needed("tifffile"), _needed("zarr")
        try:
            file = tifffile.TiffFile(path)
        except Exception as error:
            raise ValueError(_unreadable(path, error)) from error
        weakref.finalize(self, file.close)
        series = file.series[0]
        page = series.keyframe
        orientation = page.tags.valueof("Orientation", 1)
        colours = [tifffile.PHOTOMETRIC.MINISBLACK, tifffile.PHOTOMETRIC.RGB]
        if page.compression == tifffile.COMPRESSION.JPEG:  # whose decoder makes RGB of it
            colours.append(tifffile.PHOTOMETRIC.YCBCR)
        understood = (
            series.axes in ("YX", "YXS", "SYX", "CYX")
            and page.dtype in (np.uint8, np.uint16)
            and page.photometric in colours
            and orientation == 1
        )
        if not understood:
            raise ValueError(
                f"{path} holds {page.dtype} pixels with axes {series.axes}, photometric {page.photometric.name} and "
                f"orientation {orientation}; save one picture, grey or RGB, of 8 or 16 bits, upright"
            )
        self._path = path
        self._array: Any = zarr.open_array(series.aszarr(level=0), mode="r")
        self._bits = int(page.bitspersample)
        self._channels_first = series.axes in ("SYX", "CYX")
        shape: tuple[int, ...] = self._array.shape
        shape = (*shape[1:], shape[0]) if self._channels_first else shape
        self._colours = math.prod(shape[2:]) - len(page.extrasamples)
        kinds = [0] * self._colours + [*page.extrasamples]  # of each band; 1 and 2 are alpha
        self._kept = [band for band, kind in enumerate(kinds) if kind not in (1, 2)]
        self._alpha = kinds.index(1) if 1 in kinds else None  # by which the colours are multiplied
        self.shape: tuple[int, ...] = (*shape[:2], len(self._kept)) if shape[2:] else shape

    def __getitem__(self, region: tuple[slice, ...]) -> NDArray[np.uint8]:
        region = (slice(None), *region) if self._channels_first else region
        try:
            pixels: NDArray[Any] = self._array[region]
        except Exception as error:  # inside a decoder a broken file can raise nearly anything
            raise ValueError(_unreadable(self._path, error)) from error
        pixels = np.moveaxis(pixels, 0, -1) if self._channels_first else pixels
        if self._bits != 8:
            pixels = to_bytes(pixels, self._bits)
        if pixels.ndim == 2:
            return pixels
        kept = pixels[..., self._kept]
        if self._alpha is not None:
            alpha = np.maximum(pixels[..., self._alpha, None], 1)
            kept[..., : self._colours] = np.minimum(255 * kept[..., : self._colours].astype(np.uint16) // alpha, 255)
        return kept


def _pixels_of_tiff(path: Path) -> int:
    try:
        import tifffile
    except ImportError:
        with Image.open(path) as image:
            return math.prod(image.size)
    with tifffile.TiffFile(path) as file:
        page = file.pages.first
        return int(page.imagelength * page.imagewidth)


def _unreadable(path: Path, error: Exception) -> str:
    return f"{path} cannot be read as a TIFF ({type(error).__name__}: {error}). Replace or remove it."


def _needed(module: str) -> Any:
    return needed(module, "a large TIFF file", "tiff")


def _counted(bands: Iterable[NDArray[Any]], first: NDArray[Any], size: tuple[int, int]) -> Iterator[NDArray[Any]]:
    """The bands, which must be of one kind and add up."""
    height = 0
    for band in bands:
        if band.dtype != first.dtype or band.shape[:-2] != first.shape[:-2]:
            raise ValueError(
                f"a band of {band.dtype} {band.shape} follows one of {first.dtype} {first.shape}; give all bands one dtype "
                "and the same channels"
            )
        height += band.shape[-2]
        if band.shape[-1] != size[1] or height > size[0]:
            raise ValueError(f"a band of shape {band.shape} does not fit into the rest of {size[0]}x{size[1]} pixels")
        yield band
    if height != size[0]:
        raise ValueError(f"the bands have {height} rows in all, and {size[0]} are to be written")


def _write_npy(path: Path, first: NDArray[Any], shape: tuple[int, ...], bands: Iterable[NDArray[Any]]) -> None:
    with open(path, "wb") as file:
        header = {"descr": np.lib.format.dtype_to_descr(first.dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        start, top = file.tell(), 0
        row_bytes = shape[-1] * first.itemsize
        for band in bands:
            for channel, rows in enumerate(band.reshape(-1, *band.shape[-2:])):
                file.seek(start + (channel * shape[-2] + top) * row_bytes)
                file.write(np.ascontiguousarray(rows).data)
            top += band.shape[-2]


def _write_tiff(path: Path, first: NDArray[Any], shape: tuple[int, ...], bands: Iterable[NDArray[Any]]) -> None:
    if first.ndim != 2:
        raise ValueError(f"a TIFF takes one value a pixel, got bands of shape {first.shape}; write a .npy file")
    size = math.prod(shape) * first.itemsize
    with _needed("tifffile").TiffWriter(path, bigtiff=size >= 2**32 - 2**25) as file:
        file.write(
            _tiles(bands), shape=shape, dtype=first.dtype, tile=(_TILE, _TILE), compression="zlib", photometric="minisblack",
            metadata=None, maxworkers=1,
        )  # fmt: skip


def _tiles(bands: Iterable[NDArray[Any]]) -> Iterator[NDArray[Any]]:
    """Bands of any heights as the tiles of a TIFF file, those at the right and bottom edges smaller."""
    rows: NDArray[Any] | None = None
    for band in bands:
        rows = band if rows is None else np.concatenate([rows, band])
        whole = len(rows) // _TILE * _TILE
        for top in range(0, whole, _TILE):
            yield from _split(rows[top : top + _TILE])
        rows = rows[whole:]
    if rows is not None and len(rows):
        yield from _split(rows)


def _split(rows: NDArray[Any]) -> Iterator[NDArray[Any]]:
    for left in range(0, rows.shape[1], _TILE):
        yield np.ascontiguousarray(rows[:, left : left + _TILE])
