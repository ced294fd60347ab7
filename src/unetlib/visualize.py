"""Pictures to look at: masks as grey levels, overlays, grids, and the curves of a training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .arguments import at_least, needed, whole

# The "bright" scheme of Paul Tol, which colour-blind people tell apart too; class 1 is the first.
PALETTE = ((238, 102, 119), (68, 119, 170), (34, 136, 51), (204, 187, 68), (102, 204, 238), (170, 51, 119), (187, 187, 187))


def mask_to_image(mask: NDArray[Any], classes: int = 2) -> NDArray[np.uint8]:
    """A mask as a grey picture: class 0 black, the last class white, the others evenly between.

    Args:
        mask: (H, W), classes 0 to `classes` - 1, of any type.
        classes: number of classes, 2 or more.

    Returns:
        uint8 (H, W).

    Raises:
        TypeError: for a mask that is no array, or `classes` that is no integer.
        ValueError: for another shape, or a class that is out of range or a fraction.

    Example:
        >>> mask_to_image(np.array([[0, 1, 2]]), classes=3).tolist()
        [[0, 127, 255]]
    """
    mask = _check_mask(mask)
    classes = whole("classes", classes, 2)
    if mask.size and mask.max() >= classes:
        raise ValueError(f"the mask holds class {mask.max()}, but classes={classes} makes {classes - 1} the last")
    greys = (np.arange(classes) * 255 // (classes - 1)).astype(np.uint8)
    picture = np.empty(mask.shape, np.uint8)
    for part, numbers in _bands(picture, mask):
        part[:] = greys[numbers.astype(np.int64)]
    return picture


def overlay(
    image: NDArray[np.uint8],
    mask: NDArray[Any],
    *,
    alpha: float = 0.5,
    colors: Sequence[tuple[int, int, int]] = PALETTE,
) -> NDArray[np.uint8]:
    """A picture with each class of its mask in a colour of its own; class 0 stays as it is.

    Args:
        image: uint8 (H, W, 3), or (H, W) or (H, W, 1) for a grey one.
        mask: (H, W), of any type: the class of each pixel.
        alpha: opacity of the colours, 0 to 1.
        colors: RGB for class 1, 2, ...; taken from the start again when there are more classes.

    Returns:
        uint8 (H, W, 3).

    Raises:
        TypeError: for a picture or mask that is no array.
        ValueError: where picture and mask differ in size, or `image` is no uint8 picture; for a class below 0 or a fraction,
            and for `alpha` or `colors` out of range.

    Example:
        >>> overlay(np.zeros((4, 6, 3), np.uint8), np.ones((4, 6), np.uint8), alpha=1.0)[0, 0].tolist()
        [238, 102, 119]
    """
    mask = _check_pair(image, mask)
    at_least("alpha", alpha, 0, 1)
    tones, picture = _tones(colors), np.empty((*mask.shape, 3), np.uint8)
    picture[:] = image if image.ndim == 3 else image[..., None]
    for part, classes in _bands(picture, mask):
        coloured = classes > 0
        tone = tones[(classes[coloured].astype(np.int64) - 1) % len(tones)]
        part[coloured] = ((1 - alpha) * part[coloured].astype(np.float32) + alpha * tone).round()
    return picture


def grid(pictures: Sequence[NDArray[np.uint8]], columns: int = 4, *, gap: int = 4) -> NDArray[np.uint8]:
    """Pictures of one size side by side, in rows, on white.

    Args:
        pictures: uint8 (H, W, 3), or (H, W) or (H, W, 1) for grey ones; all of one height and width.
        columns: pictures in a row.
        gap: pixels between pictures and around them.

    Returns:
        uint8 (rows of them, columns of them, 3).

    Raises:
        TypeError: for a picture that is no array, or `columns` or `gap` that is no integer.
        ValueError: for no picture, pictures of several sizes or no colours, less than one column or a gap below 0.

    Example:
        >>> grid([np.zeros((10, 20), np.uint8)] * 5, columns=3, gap=2).shape
        (26, 68, 3)
    """
    sizes = sorted({_check_picture(picture).shape[:2] for picture in pictures})
    if len(sizes) != 1:
        raise ValueError(f"a grid needs pictures of one height and width, got {sizes or 'none'}; resize them first")
    (height, width), columns = sizes[0], min(whole("columns", columns, 1), len(pictures))
    gap = whole("gap", gap, 0)
    sheet = np.full((gap + -(-len(pictures) // columns) * (height + gap), gap + columns * (width + gap), 3), 255, np.uint8)
    for number, picture in enumerate(pictures):
        top, left = gap + number // columns * (height + gap), gap + number % columns * (width + gap)
        sheet[top : top + height, left : left + width] = picture.reshape(height, width, -1)
    return sheet


def comparison(
    images: Sequence[NDArray[np.uint8]],
    masks: Sequence[NDArray[Any]],
    predicted: Sequence[NDArray[Any]],
    *,
    classes: int = 2,
    columns: int = 8,
    height: int = 160,
) -> NDArray[np.uint8]:
    """Pictures in rows, below each row their true masks, and below these the predicted ones.

    Args:
        images: uint8 (H, W, 3), or (H, W) or (H, W, 1) for grey ones; of any sizes.
        masks: (H, W) of classes, of any type, each of its picture's size.
        predicted: likewise, as `UNet.predict` gives them.
        classes: number of classes, 2 or more.
        columns: pictures in a row, at most.
        height: of each tile in pixels; all have the shape of the first picture.

    Returns:
        uint8 (H, W, 3), a `grid` of three tiles for each picture, and white ones that fill the last of several rows.

    Raises:
        TypeError: for a picture or mask that is no array, or `classes`, `columns` or `height` that is no integer.
        ValueError: for no picture, or one that is not uint8 or of another shape; for unlike numbers or sizes of pictures and
            masks; for a class that is out of range or a fraction; for `classes`, `columns` or `height` out of range.

    Example:
        >>> image, mask = np.zeros((20, 30, 3), np.uint8), np.ones((20, 30), np.uint8)
        >>> comparison([image] * 3, [mask] * 3, [mask] * 3, columns=2, height=20).shape
        (148, 72, 3)
    """
    if not len(images) == len(masks) == len(predicted) > 0:
        raise ValueError(
            f"a comparison needs as many masks as pictures, and one at least, got {len(images)} pictures, {len(masks)} masks "
            f"and {len(predicted)} predicted ones"
        )
    for image, *both in zip(images, masks, predicted):
        for mask in both:
            _check_pair(image, mask)
    columns, height = min(whole("columns", columns, 1), len(images)), whole("height", height, 1)
    size = (max(1, height * images[0].shape[1] // images[0].shape[0]), height)

    def tile(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
        grey = picture.shape[2:] == (1,)
        return np.asarray(Image.fromarray(picture[..., 0] if grey else picture).convert("RGB").resize(size))

    kinds = [images, *([mask_to_image(mask, classes) for mask in kind] for kind in (masks, predicted))]
    tiles: list[NDArray[np.uint8]] = []
    for start in range(0, len(images), columns):
        for kind in kinds:
            row = [tile(picture) for picture in kind[start : start + columns]]
            tiles += [*row, *[np.full_like(row[0], 255)] * (columns - len(row))]
    return grid(tiles, columns)


def learning_curves(loss: Sequence[float], scores: Sequence[Mapping[str, float]], path: str | PathLike[str]) -> None:
    """Draw the loss of each training step, and the validation scores after each epoch, as a PNG.

    Args:
        loss: of each step, in turn.
        scores: of each epoch, in turn: "dice", "iou" and "accuracy", where it was validated; other keys are passed over.
        path: the file.

    Raises:
        ValueError: for no step.
        TypeError: for scores that are no dictionaries.
        ImportError: without matplotlib, of the extra `examples`.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     learning_curves([0.9, 0.5, 0.4, 0.3], [{"dice": 0.7}, {"dice": 0.8}], f"{folder}/curves.png")
    """
    if not len(loss):
        raise ValueError("loss must hold a number for each step, such as [0.9, 0.5], and holds none")
    if unfit := [entry for entry in scores if not isinstance(entry, Mapping)]:
        raise TypeError(f'scores must hold a dictionary for each epoch, such as {{"dice": 0.9}}, not {unfit[0]!r}')
    figure = needed("matplotlib.figure", "a plot", "examples").Figure(figsize=(10, 4), layout="constrained")
    steps, epochs = figure.subplots(1, 2)
    steps.plot(range(1, len(loss) + 1), loss, linewidth=0.5, alpha=0.4, color="tab:blue")
    window = max(1, len(loss) // 50)
    smooth = np.convolve(loss, np.ones(window) / window, mode="valid")
    steps.plot(range(window, len(loss) + 1), smooth, color="tab:blue")
    steps.set(xlabel="step", ylabel="training loss", yscale="log")
    for key in ("dice", "iou", "accuracy"):
        if known := [(epoch, entry[key]) for epoch, entry in enumerate(scores, 1) if key in entry]:
            epochs.plot(*zip(*known), marker="o", label=f"{key} {known[-1][1]:.4f}")
    epochs.set(xlabel="epoch", ylabel="validation score")
    epochs.xaxis.get_major_locator().set_params(integer=True)
    if epochs.lines:  # the legend stands above the axes, where no curve is
        epochs.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, frameon=False)
    figure.savefig(path, dpi=100, format="png")


def _bands(*arrays: NDArray[Any]) -> Iterator[list[NDArray[Any]]]:
    """Some rows of each array after the other: wider numbers of these take little memory, however large the picture is."""
    height, width = arrays[0].shape[:2]
    rows = max(1, 2**16 // max(1, width))
    for top in range(0, height, rows):
        yield [array[top : top + rows] for array in arrays]


def _check_array(name: str, value: Any) -> None:
    if not isinstance(value, np.ndarray):
        read = "unetlib.imaging.read_mask" if "mask" in name else "unetlib.imaging.read_image"
        advice = f"read the file with {read}" if isinstance(value, (str, PathLike)) else "use np.asarray(...)"
        raise TypeError(f"{name} must be a NumPy array, got {type(value).__name__}; {advice}")


def _check_picture(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    _check_array("a picture", image)
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.shape[2:] not in ((), (1,), (3,)):
        raise ValueError(f"a picture must be uint8 of shape (H, W, 3), (H, W, 1) or (H, W), got {image.dtype} {image.shape}")
    return image


def _check_pair(image: NDArray[np.uint8], mask: NDArray[Any]) -> NDArray[Any]:
    _check_picture(image)
    mask = _check_mask(mask)
    if image.shape[:2] != mask.shape:
        raise ValueError(f"the picture is {image.shape[:2]} and its mask {mask.shape}; they must have one height and width")
    return mask


def _tones(colors: Sequence[tuple[int, int, int]]) -> NDArray[np.float32]:
    try:
        tones = np.array(colors, np.float32)
    except (TypeError, ValueError):
        tones = np.empty(0, np.float32)
    if not tones.size or tones.shape[1:] != (3,) or not ((tones >= 0) & (tones <= 255)).all():
        raise ValueError(f"colors must be one or more (red, green, blue), each 0 to 255, such as [(255, 0, 0)], not {colors!r}")
    return tones


def _check_mask(mask: NDArray[Any]) -> NDArray[Any]:
    _check_array("a mask", mask)
    if mask.ndim != 2 or mask.dtype.kind not in "buif":
        raise ValueError(f"a mask must be numbers or bools of shape (H, W), got {mask.dtype} {mask.shape}")
    if mask.dtype.kind == "f" and (mask % 1 != 0).any():
        raise ValueError(f"a mask holds fractions in {mask.dtype}, as a resized one does; round it first")
    if mask.size and mask.min() < 0:
        raise ValueError(f"a mask's classes start at 0, got {mask.min()}")
    return mask
