"""Reading pictures and masks from files into arrays: the one place where file formats are understood.

A picture becomes a uint8 array of one known shape whatever its file holds (grey, RGBA, palette, CMYK, 1-bit, 16-bit,
turned by EXIF), and a mask becomes the class of each pixel. What has no single right reading is an error that says what
to do, never a guess or a clipped value.
"""

from __future__ import annotations

import struct
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from os import PathLike
from pathlib import Path
from typing import IO, Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile
from torch import Tensor

from .arguments import height_and_width

Source: TypeAlias = str | PathLike[str] | IO[bytes] | Image.Image
Color: TypeAlias = tuple[int, int, int]
Classes: TypeAlias = dict[int | Color, int]
MaskValues: TypeAlias = Literal["nonzero"] | Sequence[int] | Sequence[Color] | Mapping[int, int] | Mapping[Color, int] | None

# Tags of EXIF and of TIFF.
_ORIENTATION, _WIDTH, _BITS, _COMPRESSION, _PHOTOMETRIC = 0x0112, 256, 258, 259, 262
_SAMPLES, _PLANAR, _SOFTWARE, _EXTRA, _SAMPLE_FORMAT = 277, 284, 305, 338, 339
_TURNS = {  # upright, by orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_image(
    source: Source, mode: Literal["RGB", "L"] = "RGB", *, min_size: tuple[int, int] | None = None
) -> NDArray[np.uint8]:
    """Read a picture as 8-bit colour or grey.

    EXIF orientation is applied. Transparency is dropped, as `PIL.Image.convert("RGB")` does: the colour stored under it
    stays. 16-bit grey is scaled from 0..65535 to 0..255 with rounding, never clipped, and so is a TIFF's of 12 bits; of
    16-bit colour, and of 16-bit grey with transparency, Pillow keeps the high byte. A warning says so where 12 of the 16
    bits hold all values, since such a picture becomes nearly black. Grey is repeated for `"RGB"`; colour becomes ITU-R 601
    luma for `"L"`.

    Args:
        source: Path of a picture, a file opened in binary mode (`io.BytesIO` of its bytes too), or an open PIL picture (left
            unchanged).
        mode: `"RGB"` or `"L"` (grey).
        min_size: (height, width) that is enough. A JPEG file is then decoded at 1/2, 1/4 or 1/8 of its sides where both
            stay that long, which takes less time than all of it, and resized to `min_size`. Other pictures are the caller's to
            resize.

    Returns:
        uint8 array (H, W, 3), or (H, W, 1) for `"L"`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file cannot be read, holds several frames or bands beside grey, colour and alpha, 16-bit colour in
            planes, or signed or 32-bit numbers, whose range is unknown.
        MemoryError: There is too little memory for it.
        TypeError: `source` is none of these, or `min_size` no pair of integers.

    Example:
        >>> read_image(Image.new("RGBA", (4, 2), (255, 128, 0, 10))).shape
        (2, 4, 3)
        >>> read_image(Image.new("I;16", (1, 1), 65535), mode="L").tolist()
        [[[255]]]
    """
    if mode not in ("RGB", "L"):
        raise ValueError(f'mode must be "RGB" or "L", not {mode!r}')
    image, bits = _load(source, min_size if min_size is None else height_and_width(min_size, "min_size"))
    if image.mode.startswith("I;16"):
        levels = np.asarray(image)
        if bits == 16:
            _warn_if_dark(levels, 2**12)
        image = Image.fromarray(to_bytes(levels, bits))
    elif image.mode.startswith(("I", "F")):
        kind = "signed or 32-bit integers" if image.mode == "I" else "floating-point numbers"
        raise ValueError(
            f"{_name(source)} holds {kind}, whose range is unknown. Scale it to 0..255 (uint8) or 0..65535 (uint16) "
            "and save it again."
        )
    elif bits == 16:  # of which Pillow has kept the high byte
        _warn_if_dark(np.asarray(image.convert("RGB")), 2**4)
    return np.array(_convert(image, mode, source)).reshape(image.height, image.width, -1)


def image_size(source: Source, *, upright: bool = True) -> tuple[int, int]:
    """Height and width of a picture, without decoding it where its format allows that.

    Args:
        source: As for `read_image`.
        upright: As `read_image` turns it; a PNG file may say last how that is, so that all of it is read. `False`: as the
            file stores it.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file cannot be opened, or is no picture.
        TypeError: `source` is none of these.

    Example:
        >>> image_size(Image.new("RGB", (48, 32)))
        (32, 48)
    """
    with opened(source) as image:
        width, height = image.size
        return (width, height) if upright and _lies_on_its_side(image) else (height, width)


def read_mask(source: Source, mask_values: MaskValues = None) -> NDArray[Any]:
    """Read a mask as 0. and 1., or as class indices.

    Without `mask_values` a mask is binary: 0 (black) is background and one other value is foreground, whatever that
    value is (1, 2, 255, a colour). A palette mask counts by what its colours look like, black or not: encoders may
    reorder a palette, so an index alone means nothing. (Only if all used entries share one colour, the index counts.) A
    mask with a third value, as a lossy or an anti-aliased one has, is an error and not a guess.

    With `mask_values` the values are classes. A palette mask then counts by index for integers, and by colour for
    colours.

    EXIF orientation is applied and transparency dropped, as in `read_image`; a mask with a shape in that alone is an error.

    Args:
        source: Path of a mask, a file opened in binary mode, or an open PIL picture (left unchanged).
        mask_values: `None`: binary, as above.
            `"nonzero"`: binary, where any number of values may be foreground (numbered instances, anti-aliased edges).
            A sequence of integers, or of (r, g, b) colours: value number k is class k.
            A mapping of value to class index, so that one can be set aside: `{0: 0, 1: 1, 255: 255}` with
            `ignore_index=255` in the loss.

    Returns:
        float32 array (H, W) of 0. and 1. for a binary mask, int64 array (H, W) of class indices otherwise.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file cannot be read, or holds values other than expected; or as `class_of_value`.
        TypeError: `source` is none of these; or as `class_of_value`.

    Example:
        >>> mask = Image.new("L", (2, 1), 0)
        >>> mask.putpixel((1, 0), 255)
        >>> read_mask(mask).tolist()
        [[0.0, 1.0]]
        >>> read_mask(mask, mask_values=(0, 128, 255)).tolist()
        [[0, 2]]
    """
    labels = read_labels(source, mask_values)
    return labels.astype(np.float32 if labels.dtype == np.bool_ else np.int64)


def read_labels(source: Source, mask_values: MaskValues = None) -> NDArray[Any]:
    """Read a mask as `read_mask` does, in one byte a pixel: a quarter or an eighth of the memory.

    Args:
        source: As in `read_mask`.
        mask_values: As in `read_mask`.

    Returns:
        bool array (H, W) for a binary mask; otherwise class indices (H, W), uint8, or int64 where one is above 255.

    Raises:
        FileNotFoundError, ValueError, TypeError: As `read_mask`.

    Example:
        >>> read_labels(Image.new("L", (2, 1), 255)).tolist()
        [[True, True]]
        >>> read_labels(Image.new("L", (2, 1), 128), mask_values=(0, 128, 255)).dtype
        dtype('uint8')
    """
    image, _ = _load(source, exact=True)
    _check_alpha(image, source)
    if image.mode == "PA":
        image = image.convert("P")  # what counts of a palette counts beside transparency too
    classes = class_of_value(mask_values)
    if classes is None:
        return _foreground(image, source, any_values=mask_values is not None)
    by_color = isinstance(next(iter(classes)), tuple)
    if by_color and image.mode.startswith(("I", "F")):
        raise ValueError(f"{_name(source)} holds numbers, but mask_values names colours. Name the numbers instead.")
    in_palette = by_color and image.mode == "P"
    pixels = _colors(image, source) if by_color and not in_palette else _stored_values(image, source)
    # Masks are areas of one value, so that it is looked up once for each run of pixels, which is far quicker.
    flat = pixels.reshape(-1)
    starts = np.flatnonzero(np.concatenate(([True], flat[1:] != flat[:-1])))
    values = _palette(image)[flat[starts]] if in_palette else flat[starts]
    keys = _color_codes(np.array([*classes])) if by_color else np.array([*classes])
    labels, named = _look_up(values, keys, np.array([*classes.values()], label_dtype(classes)))
    if not named.all():
        raise ValueError(
            f"{_name(source)} holds {_describe(values[~named], by_color)}, which mask_values={mask_values!r} "
            "does not name. Name it too, or mend the mask (--mask-values; --ignore if it does not count)."
        )
    return np.repeat(labels, np.diff(starts, append=flat.size)).reshape(pixels.shape)


def to_bytes(levels: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    """Levels from 0 to 2**bits - 1 as levels from 0 to 255, rounded.

    Example:
        >>> to_bytes(np.array([0, 2048, 4095], np.uint16), bits=12).tolist()
        [0, 128, 255]
    """
    white = 2**bits - 1
    scaled: NDArray[np.uint8] = ((levels.astype(np.uint32) * 255 + white // 2) // white).astype(np.uint8)
    return scaled


def to_tensor(array: NDArray[Any]) -> Tensor:
    """An array of pixels with its channels first, as PyTorch has them.

    Args:
        array: (H, W) or (H, W, C); copied only where read-only or not contiguous, such as `numpy.asarray` of a PIL picture.

    Returns:
        (C, H, W), with C = 1 for (H, W), in the array's type.

    Example:
        >>> to_tensor(np.zeros((4, 6, 3), np.uint8)).shape
        torch.Size([3, 4, 6])
    """
    channels_last = array[..., None] if array.ndim == 2 else array
    return torch.from_numpy(np.require(channels_last, requirements=("C", "W"))).permute(2, 0, 1)


def is_binary(mask_values: MaskValues) -> bool:
    """Whether masks of these values are read as background and foreground.

    Example:
        >>> is_binary(None), is_binary("nonzero"), is_binary((0, 255))
        (True, True, False)
    """
    return mask_values is None or (isinstance(mask_values, str) and mask_values == "nonzero")


def class_of_value(mask_values: MaskValues) -> Classes | None:
    """Check the `mask_values` of `read_mask` and write them as value -> class index; None for those of binary masks.

    Raises:
        ValueError: There are fewer than two values, one twice, integers and colours mixed, or a class that is no index.
        TypeError: A value is neither an integer nor an (r, g, b) colour.

    Example:
        >>> class_of_value((0, 128, 255))
        {0: 0, 128: 1, 255: 2}
    """
    if is_binary(mask_values):
        return None
    if isinstance(mask_values, Mapping):
        pairs: list[tuple[Any, int]] = list(mask_values.items())
    elif isinstance(mask_values, (Sequence, np.ndarray)) and not isinstance(mask_values, str):
        mask_values = mask_values.tolist() if isinstance(mask_values, np.ndarray) else mask_values
        pairs = [(tuple(value) if isinstance(value, list) else value, k) for k, value in enumerate(mask_values)]
    else:
        raise TypeError(f'mask_values must be None, "nonzero", a sequence or a mapping, not {mask_values!r}')
    for value, index in pairs:
        is_color = isinstance(value, tuple) and len(value) == 3 and all(part in range(256) for part in value)
        if not is_color and not isinstance(value, (int, np.integer)):
            raise TypeError(f"mask_values must hold integers or (r, g, b) colours of 0..255, not {value!r}")
        if not isinstance(index, (int, np.integer)) or index < 0:
            raise ValueError(f"mask_values gives {value!r} the class {index!r}; classes are 0, 1, 2, ...")
    classes: Classes = {value: int(index) for value, index in pairs}
    if len(classes) < len(pairs):
        raise ValueError(f"mask_values={mask_values!r} names a value twice")
    if len(classes) < 2 or len({isinstance(value, tuple) for value in classes}) > 1:
        raise ValueError(f"mask_values={mask_values!r} must name two or more values, all integers or all colours")
    return classes


def label_dtype(classes: Classes) -> np.dtype[Any]:
    """The type of labels of these classes: bytes, unless one is above 255.

    Example:
        >>> label_dtype({0: 0, 128: 1, 255: 2})
        dtype('uint8')
    """
    return np.dtype(np.uint8 if max(classes.values()) < 256 else np.int64)


def _name(source: Source) -> str:
    if isinstance(source, Image.Image):
        return str(getattr(source, "filename", "")) or "the given picture"
    return str(source) if isinstance(source, (str, PathLike)) else "the given file"


@contextmanager
def opened(source: Source) -> Iterator[Image.Image]:
    """The picture, not yet decoded, with one error for all that can be wrong with a file while it is in use.

    Args:
        source: As `read_image`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It cannot be read as a picture, or has more pixels than Pillow opens.
        MemoryError: There is too little memory for it.
        TypeError: `source` is none of these.

    Example:
        >>> with opened(Image.new("P", (2, 1))) as image:
        ...     image.mode
        'P'
    """
    if not isinstance(source, (str, PathLike, Image.Image)) and not hasattr(source, "read"):
        is_bytes = isinstance(source, (bytes, bytearray, memoryview))
        advice = "of a file's bytes: io.BytesIO(them)" if is_bytes else "of an array: PIL.Image.fromarray(array)"
        raise TypeError(f"expected a path, an open file or a PIL picture, not a {type(source).__name__}; {advice}")
    try:
        with nullcontext(source) if isinstance(source, Image.Image) else Image.open(source) as image:
            yield image
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {str(source)!r}") from None
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"{_name(source)} has more pixels than Pillow opens by itself ({error}). If you trust it, set "
            "PIL.Image.MAX_IMAGE_PIXELS = None first."
        ) from error
    except MemoryError as error:
        raise MemoryError(f"there is too little memory for {_name(source)}; free some, or reduce the picture") from error
    except Exception as error:  # inside a decoder a broken file can raise nearly anything
        if isinstance(error, OSError) and error.errno is not None:  # of the system, not of a decoder: the file may be sound
            if isinstance(source, (str, PathLike)) and Path(source).is_dir():
                raise ValueError(
                    f"{source} is a folder; give a file in it (`predict` takes lists, examples/predict_folder.py folders)"
                ) from error
            raise ValueError(f"{_name(source)} cannot be opened: {error.strerror}") from error
        advice = "Replace or remove it."
        if isinstance(error, UnidentifiedImageError) and _name(source).lower().endswith((".tif", ".tiff")):
            advice += " If it holds integers of 64 bits, as NumPy makes them, save array.astype(numpy.uint16) instead."
        raise ValueError(f"{_name(source)} cannot be read as a picture ({type(error).__name__}: {error}). {advice}") from error


def _load(source: Source, min_size: tuple[int, int] | None = None, *, exact: bool = False) -> tuple[Image.Image, int]:
    """A decoded picture, upright, and the `_bits` its file had.

    `exact`: refuse what Pillow rounds.
    """
    with opened(source) as image:
        bits, refusal = _bits(image), _refusal(image, source, exact)
        if refusal is None:
            return _decoded(image, None if image is source else min_size), bits  # the caller's stays at its size
    raise ValueError(f"{_name(source)} {refusal}")


def _decoded(image: Image.Image, min_size: tuple[int, int] | None) -> Image.Image:
    """Decode, reduced where that is enough; turn upright, and mend what Pillow misreads."""
    if isinstance(image, TiffImageFile):
        _load_unmapped(image)
    upright = image if min_size is None else _reduced(image, min_size)
    upright.load()
    # Not by ImageOps.exif_transpose, which writes EXIF anew and fails at a tag of an odd type.
    if (orientation := _orientation(upright)) in _TURNS:
        upright = upright.transpose(_TURNS[orientation])
    return _mended(upright, image)


def _mended(image: Image.Image, file: Image.Image) -> Image.Image:
    """A decoded picture with the numbers that its file holds, where Pillow has others."""
    if image.mode == "I" and file.format in ("PNG", "PPM"):  # of 16 bits; PNG in older versions alone
        return Image.fromarray(np.asarray(image).astype(np.uint16))
    if image.mode.startswith("I;16") and _tags(file).get(_PHOTOMETRIC) == 0:  # 0 is white, seen to in 8 bits alone
        return Image.fromarray(65535 - np.asarray(image))
    if image.mode == "L" and _tags(file).get(_SAMPLE_FORMAT) == (2,):  # signed
        return Image.fromarray(np.asarray(image).view(np.int8).astype(np.int32))
    return image


def _reduced(image: Image.Image, min_size: tuple[int, int]) -> Image.Image:
    """A picture, not yet decoded and not yet upright, at (height, width) if it is a JPEG of at least twice that size."""
    stored = image.size
    wanted = min_size if _lies_on_its_side(image) else min_size[::-1]  # width, height
    _, box = image.draft(None, wanted) or (None, None)  # only JPEG decoders take this in
    if image.size == stored:
        return image
    # Where 8 does not divide a side, the last column or row reaches beyond the picture, which `box` leaves out.
    return image.resize(wanted, Image.Resampling.BILINEAR, box=box)


def _load_unmapped(image: TiffImageFile) -> None:
    """Decode without a map of the file, which Pillow makes by its name and then turns wrongly."""
    name, image.filename = image.filename, ""
    try:
        image.load()
    finally:
        image.filename = name


def _tags(image: Image.Image) -> Mapping[int, Any]:
    """A TIFF's tags; none of another format."""
    tags: Mapping[int, Any] = getattr(image, "tag_v2", {})
    return tags


def _bits(image: Image.Image) -> int:
    """Bits of a level in the file of a picture that is not yet decoded, where there may be more than 8."""
    deep = image.mode.startswith("I") or any(";16" in str(part) for part in getattr(image, "tile", ()))
    bits: int = _tags(image).get(_BITS, (16 if deep else 8,))[0]
    return bits


def _warn_if_dark(levels: NDArray[Any], limit: int) -> None:
    """Say of a 16-bit picture whose levels lie below `limit` that it uses too few of its bits."""
    if 0 < levels.max(initial=0) < limit:
        warnings.warn(
            "a 16-bit picture has no value above 4095: it uses 12 or fewer of its 16 bits and becomes nearly black. If 4095 is "
            "its white, save picture * 16 instead, or give predict a tensor: of a grey picture "
            "torch.from_numpy(picture / 4095).float()[None]",
            stacklevel=3,
        )


def _refusal(image: Image.Image, source: Source, exact: bool) -> str | None:
    """Why a picture is not read, though Pillow would give something."""
    # A phone's JPEG (MPO) has previews behind the picture, and an open picture is at the frame its owner chose.
    frames = 1 if image is source or image.format == "MPO" else getattr(image, "n_frames", 1)
    if frames > 1:
        return (
            f"holds {frames} frames; save each as a file of its own, or give predict the list "
            "[unetlib.imaging.read_image(frame) for frame in PIL.ImageSequence.Iterator(PIL.Image.open(path))]"
        )
    tags = _tags(image)
    if _bits(image) == 16 and len(image.getbands()) > 1:
        if exact:
            return "has 16-bit colour, of which Pillow reads 8. Save the mask as 16-bit grey."
        if tags.get(_PLANAR) == 2 and tags.get(_COMPRESSION, 1) == 1:
            return "has 16-bit colour in planes, which Pillow mixes up. Save it with the colours of each pixel together."
    if exact and image.mode == "1" and tags.get(_PHOTOMETRIC) == 0 and "tifffile" in str(tags.get(_SOFTWARE)):
        return "holds bools of tifffile, which calls 0 white: True would be background. Save mask.astype(numpy.uint8)."
    if 0 in tags.get(_EXTRA, ()):  # neither of the two kinds of alpha: a band of its own, which Pillow drops
        return f"has {tags.get(_SAMPLES)} bands, of which not all would be read. Save it as grey or RGB."
    return None


def _lies_on_its_side(image: Image.Image) -> bool:
    """Whether the size that Pillow gives is the other way round; newer versions give that of a TIFF as it will be turned."""
    if image.format == "TIFF" and image.size[0] != _tags(image).get(_WIDTH, image.size[0]):
        return False
    return _orientation(image) in (5, 6, 7, 8)


def _orientation(image: Image.Image) -> Any:
    """As EXIF says; where that is broken 1, upright, as all programs show such a picture."""
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except (SyntaxError, struct.error):
        return 1


def _convert(image: Image.Image, mode: Literal["RGB", "L"], source: Source) -> Image.Image:
    try:
        if image.mode in ("P", "PA"):  # by way of RGBA, since Pillow warns about transparent palettes otherwise
            image = image.convert("RGBA").convert("RGB")
        elif image.mode == "La":
            image = image.convert("LA")
        return image if image.mode == mode else image.convert(mode)
    except ValueError as error:
        raise ValueError(
            f"{_name(source)} has the mode {image.mode!r}, which cannot become {mode}. Save it as an RGB or grey PNG."
        ) from error


def _check_alpha(image: Image.Image, source: Source) -> None:
    """Refuse a mask that would be lost with its transparency."""
    if image.mode not in ("LA", "PA", "RGBA"):
        return
    *colors, alpha = image.split()
    if not _is_flat(alpha) and all(map(_is_flat, colors)):
        raise ValueError(
            f"{_name(source)} has its shape in its transparency alone, which is dropped, and one colour under it. Save its "
            "alpha channel as the mask: Image.open(path).getchannel('A')"
        )


def _is_flat(band: Image.Image) -> bool:
    low, high = band.getextrema()
    return bool(low == high)


def _is_grey(image: Image.Image) -> bool:
    return image.mode in ("1", "L", "LA") or image.mode.startswith(("I", "F"))


def _foreground(image: Image.Image, source: Source, any_values: bool) -> NDArray[np.bool_]:
    """Where a mask does not look black; more than one other value is an error unless `any_values`."""
    if image.mode in ("L", "P"):
        return _foreground_of_bytes(image, source, any_values)
    are_colors = not _is_grey(image)
    values = _colors(image, source) if are_colors else _stored_values(image, source)
    foreground: NDArray[np.bool_] = values != 0
    if not any_values and (foreground & (values != values.flat[foreground.argmax()])).any():
        raise _several_values(values, are_colors, source)
    return foreground


def _foreground_of_bytes(image: Image.Image, source: Source, any_values: bool) -> NDArray[np.bool_]:
    """The same by the few values that bytes have, which is far quicker than to look at each pixel."""
    # Most masks have two, the least and the greatest, often with none between; where there are more, all are counted.
    pixels = np.asarray(image)
    low, high = int(pixels.min()), int(pixels.max())
    two = high - low <= 1 or ((pixels == low) | (pixels == high)).all()
    used = np.unique([low, high]) if two else np.flatnonzero(image.histogram())
    looks, are_colors = used, False
    if image.mode == "P":
        colors = _palette(image)[used]
        if len(used) == 1 or len(set(colors)) > 1:
            looks, are_colors = colors, True
    if not any_values and len(set(looks) - {0}) > 1:
        raise _several_values(looks, are_colors, source)
    found = used[looks != 0]
    # A Python int, since NumPy compares bytes with an int64 of its own as int64, which takes seven times as long.
    return pixels == int(found[0]) if len(found) == 1 else np.isin(pixels, found.astype(np.uint8))


def _several_values(values: NDArray[Any], are_colors: bool, source: Source) -> ValueError:
    # The option takes numbers, as palettes have them beside their colours.
    zero, option = ("(0, 0, 0)", "--mask-values, of numbers alone") if are_colors else ("0", "--mask-values")
    return ValueError(
        f"{_name(source)} holds {_describe(values, are_colors)}, but a binary mask holds {zero} and one other. "
        f"If these are classes, name them: mask_values=({zero}, ...) ({option}). If all but {zero} is foreground: "
        'mask_values="nonzero" (--nonzero). If a lossy format (JPEG) made them, draw or save the mask again as PNG.'
    )


def _stored_values(image: Image.Image, source: Source) -> NDArray[Any]:
    """The number a file stores for each pixel: the index in a palette mask, 0 and 1 in a 1-bit one."""
    if image.mode == "LA":
        return np.asarray(image.getchannel(0))
    if _is_grey(image) or image.mode == "P":
        return np.asarray(image, dtype=np.uint8 if image.mode == "1" else None)
    red, green, blue = map(np.asarray, _convert(image, "RGB", source).split())
    if (red != green).any() or (red != blue).any():
        raise ValueError(
            f"{_name(source)} holds {_describe(_colors(image, source), are_colors=True)}, but mask_values names integers. "
            "Name the colours: mask_values=((0, 0, 0), ...)."
        )
    return red


def _look_up(values: NDArray[Any], keys: NDArray[Any], labels: NDArray[Any]) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """The label of each value, and whether it is one of the keys."""
    if values.dtype == np.uint8:  # each byte once, for masks without areas
        of_byte, is_key = _look_up(np.arange(256), keys, labels)
        return of_byte[values], is_key[values]
    order = np.argsort(keys)
    keys, labels = keys[order], labels[order]
    nearest = np.minimum(np.searchsorted(keys, values), len(keys) - 1)
    return labels[nearest], keys[nearest] == values


def _colors(image: Image.Image, source: Source) -> NDArray[np.int32]:
    """The `_color_codes` of a picture."""
    blue_first = _convert(image, "RGB", source).tobytes("raw", "BGRX")  # X is 0
    return np.frombuffer(blue_first, "<i4").reshape(image.height, image.width)


def _palette(image: Image.Image) -> NDArray[np.int32]:
    """The `_color_codes` of a palette."""
    colors = (image.getpalette("RGB") or []) + [0] * 768  # those that the file leaves out are black
    return _color_codes(np.array(colors).reshape(-1, 3))


def _color_codes(rgb: NDArray[np.integer[Any]]) -> NDArray[np.int32]:
    """0xRRGGBB for each colour, (..., 3) to (...)."""
    channels = rgb.astype(np.int32)
    return channels[..., 0] << 16 | channels[..., 1] << 8 | channels[..., 2]


def _describe(values: NDArray[Any], are_colors: bool) -> str:
    found = np.unique(values).tolist()
    names = [str((v >> 16, v >> 8 & 255, v & 255)) if are_colors else str(v) for v in found[:6]]
    noun = ("colour" if are_colors else "value") + "s" * (len(found) > 1)
    return f"the {noun} {', '.join(names)}" + f", ... ({len(found)} in all)" * (len(found) > 6)
