"""Pictures in, masks out: everything between a file and a `UNet`'s logits, and back to the picture's own size."""

from __future__ import annotations

import math
import os
import reprlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from functools import partial
from os import PathLike
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from .fast import optimize_for_inference as optimize_for_inference
from .fast.network import untraced
from .passes import Network as Network, check_model, input_size, iter_predictions, normalized
from .pictures import Picture as Picture, check_several, open_picture, resize
from .rasters import check_output, is_read_from, write_raster
from .targets import check_threshold, read as read_target
from .tiling import Piece, iter_bands, join

if TYPE_CHECKING:
    from torch.utils.data import Dataset

    from .metrics import SegmentationMetrics

_Item = TypeVar("_Item")


@untraced
def predict(
    model: Network,
    images: Picture | Sequence[Picture],
    *,
    threshold: float | None = None,
    tile: int | tuple[int, int] | None = None,
    overlap: int | None = None,
    tta: bool | str = False,
    probabilities: bool = False,
    batch_size: int = 4,
    progress: bool = False,
    out: str | PathLike[str] | None = None,
) -> Any:
    """Segment pictures of any size; `UNet.predict` calls this.

    A picture that does not fit into half of the free memory goes through the network in tiles, with the same result
    (`unetlib.tiling`), or a warning where `match="resize"` does not let it be the same. One that is read by region and is not
    resized is never in memory as a whole: an array mapped from disk, a `.npy` file, a TIFF file of more than 2**26 pixels, or
    anything else with `shape`, `dtype` and `[rows, columns]`.

    Args:
        model: the network; its `preprocessing` says how a picture becomes its input. It runs in evaluation mode, where
            dropout does nothing; afterwards its modules are in the modes that they were in.
        images: one picture or a list of them: a path, a PIL picture, a uint8 array (H, W) or (H, W, C), or a tensor (C, H, W),
            uint8 or floating point in [0, 1]. Grey pictures are repeated for a network of three channels, colour ones turned
            into grey for a network of one.
        threshold: probability above which a pixel is foreground; None takes the model's own. Not for a softmax.
        tile: side, or (height, width), of what the network sees at a time, in pixels of its input. None takes the whole picture
            where that fits into memory, otherwise the largest useful tile that does. A picture no larger than that stays whole.
        overlap: pixels that a tile sees beyond what it keeps, at each inner side. None takes as many as decide the result, so
            that it is that of the whole picture. Less is a warning, and tiles are blended.
        tta: average the probabilities over the picture's eight symmetries; over the four flips alone if the model's
            `preprocessing.size` is not square. Eight or four times the work. "mirror": over the picture and its mirror image,
            left to right, alone, for models that know no upside down.
        probabilities: return probabilities instead of classes.
        batch_size: pictures, or tiles of a given size, in one forward pass; fewer where memory is short, and on a CPU
            at most a million pixels, or one picture.
        progress: show a progress bar of pictures, and one of the tiles of each.
        out: file to write the result of a single picture to instead of returning it: `.npy`, or for masks `.tif`, tiled. It
            appears when it is whole. It cannot be the picture's own.

    Returns:
        For each picture, at its own height and width: its mask, uint8 (H, W) of class indices (0 and 1 for one output channel),
        int32 beyond 256 classes; or with `probabilities`, float32 (H, W) for one output channel and (C, H, W) for several.
        Where the `preprocessing` says `multilabel`, masks are uint8 (C, H, W), 0 and 1 for each class. One result for one
        picture, a list for a list. With `out` its path.

    Raises:
        FileNotFoundError: for a path that does not exist.
        ImportError: for a large TIFF file without the extra `tiff`.
        TypeError: for something that is no picture, and a `batch_size` or `overlap` that is no integer.
        ValueError: for a file, shape or value that cannot be read, naming it; for logits that are NaN, or infinite before a
            softmax; for a picture that needs tiles and a network whose tiles cannot give the whole picture's result, without an
            `overlap`.

    Example:
        >>> from unetlib import UNet
        >>> UNet(features=(8, 16)).predict(np.zeros((90, 120, 3), np.uint8)).shape
        (90, 120)
        >>> UNet(features=(8, 16)).predict(np.zeros((90, 120, 3), np.uint8), tile=64, tta=True).shape
        (90, 120)
    """
    check_model(model)
    multilabel, softmax = model.preprocessing.multilabel, _softmax(model)
    if threshold is None:
        threshold = model.preprocessing.threshold
    elif softmax:
        raise ValueError("threshold is for one output channel; several are decided by the largest logit, so leave it out")
    else:
        check_threshold(threshold)
    one = not isinstance(images, (list, tuple))
    pictures: Sequence[Picture] = [images] if one else images  # type: ignore[assignment, list-item]
    if out is not None:
        if not one:
            raise ValueError(f"out is for one picture, got a list of {len(pictures)}; call predict for each")
        if check_output(out).suffix.lower() != ".npy" and (probabilities or multilabel):
            what = "probabilities" if probabilities else "masks that may overlap"
            raise ValueError(f"a TIFF holds one class for each pixel; give a .npy file for {what} instead of {str(out)!r}")
        if is_read_from(images, out):
            raise ValueError(f"out={str(out)!r} is the picture itself, which the result would replace; name another file")
    options: Any = {"batch_size": batch_size, "tile": tile, "overlap": overlap, "tta": tta}
    predictions = iter_predictions(model, pictures, **options, progress=progress)
    as_classes = partial(_classes, multilabel=multilabel, threshold=threshold)
    decide = partial(_probabilities, multilabel=multilabel) if probabilities else as_classes
    results: list[Any] = []
    for number, (size, pieces) in enumerate(_with_bar(predictions, len(pictures)) if progress else predictions):
        picture = pictures[number]
        name = repr(str(os.fspath(picture))) if isinstance(picture, (str, PathLike)) else f"the picture [{number}]"
        decided = _decided(pieces, decide, name, softmax=softmax)
        if out is None:
            results.append(join(decided, size).numpy())
        else:
            results.append(write_raster(out, size, (band.numpy() for band in iter_bands(decided))))
    return results[0] if one else results


def iter_logits(
    model: Network,
    images: Iterable[Picture],
    *,
    batch_size: int = 4,
    tile: int | tuple[int, int] | None = None,
    overlap: int | None = None,
    tta: bool | str = False,
) -> Iterator[Tensor]:
    """Yield each picture's logits at its own size, reading `batch_size` pictures at a time.

    Ask for all of them in one thread: on a CPU each that asks keeps memory for maps, and only the last gives its own back.

    Args:
        model: the network, as in `predict`.
        images: pictures, as in `predict`; an iterator is read a batch at a time, a single picture is refused.
        batch_size: pictures in one forward pass, as in `predict`.
        tile: as in `predict`.
        overlap: as in `predict`.
        tta: as in `predict`; these are then logits of the mean probability.

    Yields:
        float32 (out_channels, H, W) on the model's device, one for each picture in turn.

    Raises:
        ValueError: for a picture in the place of several, and as `predict`.

    Example:
        >>> from unetlib import SegmentationMetrics, UNet
        >>> metrics, picture, mask = SegmentationMetrics(), np.zeros((32, 48, 3), np.uint8), torch.zeros(32, 48)
        >>> for logits in iter_logits(UNet(features=(8,)), [picture]):
        ...     metrics.update(logits[None], mask[None])
    """
    for size, pieces in iter_predictions(model, images, batch_size=batch_size, tile=tile, overlap=overlap, tta=tta):
        logits = join(pieces, size)
        yield logits.clone() if logits.is_inference() else logits  # a tensor that may be changed, and derived from


def network_inputs(model: Network, images: Iterable[Picture]) -> Iterator[Tensor]:
    """Yield each picture as the network sees it: what `predict` passes to it.

    Args:
        model: the network; its `preprocessing` applies.
        images: pictures, as in `predict`.

    Yields:
        (1, in_channels, h, w) of the model's type, on its device.

    Raises:
        ValueError: for a picture in the place of several, or one that cannot be read.

    Example:
        >>> from unetlib import Preprocessing, UNet
        >>> model = UNet(features=(8, 16))
        >>> model.preprocessing = Preprocessing(size=(16, 24), mean=(0.5,))
        >>> [x.shape for x in network_inputs(model, [np.zeros((90, 120, 3), np.uint8)])]
        [torch.Size([1, 3, 16, 24])]
    """
    check_model(model)
    check_several(images)
    for image in images:
        source = open_picture(image, model.config.in_channels)
        yield normalized(model, resize(source.whole(), input_size(model, source.size))[None])


def evaluate(
    model: Network,
    dataset: Iterable[tuple[Picture, ArrayLike]] | Dataset[tuple[Picture, ArrayLike]],
    *,
    tile: int | tuple[int, int] | None = None,
    overlap: int | None = None,
    tta: bool | str = False,
    batch_size: int = 4,
    progress: bool = False,
    ignore_index: int | None = None,
    metrics: SegmentationMetrics | None = None,
) -> dict[str, float]:
    """Scores of a model on a data set, at the pictures' own size.

    Args:
        model: the network; its `preprocessing` applies, as in `predict`.
        dataset: pairs of a picture, as in `predict`, and its mask (H, W), or (C, H, W) where the `preprocessing` says
            `multilabel`: an `ImageMaskDataset` without a transform, for one; or a `DataLoader` of a `CachedDataset`, with
            `batch_size=None`, that reads in other processes.
        tile: as in `predict`.
        overlap: as in `predict`.
        tta: as in `predict`.
        batch_size: pictures in one forward pass, as in `predict`.
        progress: show a progress bar.
        ignore_index: value of the masks whose pixels do not count, such as 255.
        metrics: the `SegmentationMetrics` that count, to give them other options, to go on counting, or to merge them with
            those of other processes afterwards; None makes what the model needs. They decide by a threshold of their own, 0.5
            unless they are made with `threshold=model.preprocessing.threshold`, and have an `ignore_index` of their own.

    Returns:
        What `SegmentationMetrics.compute` gives: "dice" is the mean over pictures, "dice_pooled" of all pixels together, ...

    Raises:
        TypeError: for something else than pairs of a picture and its mask as an array, such as paths of masks, or batches; for
            `metrics` that are no `SegmentationMetrics`.
        ValueError: as `predict`; for a mask of another shape than its picture, or with other values than the classes; for
            `metrics` that are multilabel and a model that is not, or the other way round; for an `ignore_index` beside them.

    Example:
        >>> from unetlib import UNet
        >>> from unetlib.synthetic import render_scene
        >>> scenes = [render_scene(car, size=(32, 48)) for car in range(3)]
        >>> 0 <= evaluate(UNet(features=(8,)), scenes)["dice"] <= 1
        True
    """
    check_model(model)
    from .metrics import SegmentationMetrics

    if metrics is None:
        how = model.preprocessing
        options: Any = {"threshold": how.threshold, "multilabel": how.multilabel, "ignore_index": ignore_index}
        metrics = SegmentationMetrics(model.config.out_channels, **options)
    elif ignore_index is not None:
        raise ValueError(f"give SegmentationMetrics(..., ignore_index={ignore_index}), or leave out metrics")
    elif not isinstance(metrics, SegmentationMetrics):
        raise TypeError(
            f"metrics must be a SegmentationMetrics, such as SegmentationMetrics({model.config.out_channels}), "
            f"got {metrics!r}; leave it out for all scores"
        )
    if model.config.out_channels > 1 and metrics.multilabel != model.preprocessing.multilabel:
        raise ValueError(
            f"the model's preprocessing says multilabel={model.preprocessing.multilabel}, metrics {metrics.multilabel}; give "
            f"SegmentationMetrics({model.config.out_channels}, multilabel={model.preprocessing.multilabel})"
        )
    masks: deque[Tensor] = deque()

    def pictures() -> Iterator[Picture]:
        for pair in _pairs(dataset):
            picture, mask = _picture_and_mask(pair)
            masks.append(mask)
            yield picture

    logits = iter_logits(model, pictures(), batch_size=batch_size, tile=tile, overlap=overlap, tta=tta)
    total = len(dataset) if isinstance(dataset, Sized) else None
    for number, picture_logits in enumerate(_with_bar(logits, total) if progress else logits):
        mask = masks.popleft()[None]
        if picture_logits.is_cuda:  # where the metrics' own checks would end the process's use of the device
            _refuse_nan(picture_logits, f"the picture [{number}]", softmax=_softmax(model))
            like = torch.zeros(()).expand(1, *picture_logits.shape)
            read_target(like, mask, multilabel=metrics.multilabel, ignore_index=metrics.ignore_index)
        metrics.update(picture_logits[None], mask.to(picture_logits.device))
    return metrics.compute()


def _with_bar(items: Iterator[_Item], total: int | None) -> Iterator[_Item]:
    from tqdm.auto import tqdm

    yield from tqdm(items, total=total, unit="picture")


def _pairs(dataset: Any) -> Iterable[Any]:
    """What a data set holds; one of PyTorch ends where its length says, and need not raise an IndexError there."""
    if isinstance(dataset, Sized) and not isinstance(dataset, Iterable):
        return (dataset[index] for index in range(len(dataset)))  # type: ignore[index]
    return dataset  # type: ignore[no-any-return]


def _picture_and_mask(pair: object) -> tuple[Any, Tensor]:
    """A pair of a data set, the mask as a tensor."""
    picture, mask = pair if isinstance(pair, (tuple, list)) and len(pair) == 2 else (None, None)
    if getattr(picture, "ndim", 0) == 4:
        raise TypeError(
            "expected pairs of one picture and its mask, got a batch; give the data set, or DataLoader(..., batch_size=None)"
        )
    if not isinstance(mask, Tensor):
        array = np.asarray(mask)
        if array.dtype.kind not in "biuf":
            raise TypeError(
                f"expected pairs of a picture and its mask as an array, got {reprlib.repr(pair)}; read a file with "
                "unetlib.imaging.read_mask(path), or pass an ImageMaskDataset"
            )
        # Torch takes no read-only arrays, as PIL's are, no steps of mirrored ones, and no bytes in another machine's order.
        mask = torch.from_numpy(np.require(array, array.dtype.newbyteorder("="), ("C", "W")))
    return picture, mask.float() if mask.dtype == torch.float64 else mask  # MPS takes no float64


def _softmax(model: Network) -> bool:
    return model.config.out_channels > 1 and not model.preprocessing.multilabel


def _decided(pieces: Iterable[Piece], decide: Callable[[Tensor], Tensor], name: str, *, softmax: bool) -> Iterator[Piece]:
    """Pieces of the result, from those of the logits; NaN is refused, since no mask would show it: it is above no threshold."""
    for piece in pieces:
        _refuse_nan(piece.values, name, softmax=softmax)
        yield piece._replace(values=decide(piece.values).cpu())


def _refuse_nan(logits: Tensor, name: str, *, softmax: bool) -> None:
    largest = logits.amax().item()
    if math.isnan(largest) or (softmax and largest == math.inf):  # of which a softmax makes NaN
        what = "NaN" if math.isnan(largest) else "infinity"
        raise ValueError(
            f"the network's logits for {name} hold {what}: its weights do, or half precision overflows; take other weights, or "
            "predict in float32"
        )


def _probabilities(logits: Tensor, *, multilabel: bool) -> Tensor:
    if multilabel:
        return logits.sigmoid()
    return logits[0].sigmoid() if len(logits) == 1 else logits.softmax(dim=0)


def _classes(logits: Tensor, *, threshold: float, multilabel: bool) -> Tensor:
    if len(logits) > 1 and not multilabel:
        # By max, which takes a CPU an eighth to a third of argmax's time.
        return logits.max(dim=0).indices.to(torch.uint8 if len(logits) <= 256 else torch.int32)
    # The threshold is moved to the logits, so that no sigmoid is needed.
    foreground = (logits if multilabel else logits[0]) > math.log(threshold / (1 - threshold))
    return foreground.to(torch.uint8)
