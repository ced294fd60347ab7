"""Pictures in, masks out: everything between a file and a `UNet`'s logits, and back to the picture's own size."""

from __future__ import annotations

import math
import reprlib
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import groupby, islice
from os import PathLike
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from .arguments import not_a_unet, whole
from .fast import FastUNet, optimize_for_inference as optimize_for_inference
from .fast.cached import fast_copy, free_memory
from .fast.network import untraced
from .memory import pixels_in_one_pass
from .pictures import Picture as Picture, Source, check_several, in_memory, open_picture, resize
from .rasters import check_output, is_read_from, write_raster
from .structure import difference
from .symmetries import FLIPS, MIRROR, Flips, average_symmetries
from .targets import check_threshold, read as read_target
from .tiling import Piece, choose_tile, iter_bands, join, plan_tiles, run_tiles, why_whole

if TYPE_CHECKING:
    from .metrics import SegmentationMetrics
    from .unet import UNet

_Item = TypeVar("_Item")


@untraced
def predict(
    model: UNet,
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
    _check_model(model)
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
    predictions = _predictions(model, pictures, batch_size, tile, overlap, tta, progress)
    decide = _probabilities if probabilities else _classes
    results: list[Any] = []
    for size, pieces in _with_bar(predictions, len(pictures)) if progress else predictions:
        numbers = _without_nan(pieces, pictures[len(results)], len(results), softmax=softmax)
        decided = (piece._replace(values=decide(piece.values, threshold, multilabel).cpu()) for piece in numbers)
        if out is None:
            results.append(join(decided, size).numpy())
        else:
            results.append(write_raster(out, size, (band.numpy() for band in iter_bands(decided))))
    return results[0] if one else results


def iter_logits(
    model: UNet,
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
    for size, pieces in _predictions(model, images, batch_size, tile, overlap, tta, False):
        logits = join(pieces, size)
        yield logits.clone() if logits.is_inference() else logits  # a tensor that may be changed, and derived from


def network_inputs(model: UNet, images: Iterable[Picture]) -> Iterator[Tensor]:
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
    _check_model(model)
    check_several(images)
    for image in images:
        source = open_picture(image, model.config.in_channels)
        yield _normalized(model, resize(source.whole(), _input_size(model, source.size))[None])


def evaluate(
    model: UNet,
    dataset: Iterable[tuple[Picture, ArrayLike]],
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
            `multilabel`: an `ImageMaskDataset` without a transform, for one.
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
        TypeError: for something else than pairs of a picture and its mask as an array, such as paths of masks, or batches.
        ValueError: as `predict`; for a mask of another shape than its picture, or with other values than the classes; for
            `metrics` that are multilabel and a model that is not, or the other way round; for an `ignore_index` beside them.

    Example:
        >>> from unetlib import UNet
        >>> from unetlib.synthetic import render_scene
        >>> scenes = [render_scene(car, size=(32, 48)) for car in range(3)]
        >>> 0 <= evaluate(UNet(features=(8,)), scenes)["dice"] <= 1
        True
    """
    _check_model(model)
    if metrics is None:
        from .metrics import SegmentationMetrics

        how = model.preprocessing
        options: Any = {"threshold": how.threshold, "multilabel": how.multilabel, "ignore_index": ignore_index}
        metrics = SegmentationMetrics(model.config.out_channels, **options)
    elif ignore_index is not None:
        raise ValueError(f"give SegmentationMetrics(..., ignore_index={ignore_index}), or leave out metrics")
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


_MOST_ON_CPU = 2**20  # pixels of a batch: a larger one keeps the cores no busier, and takes memory
_modes_lent = threading.RLock()  # held while a network in training is in evaluation mode, which all threads see


def _predictions(
    model: UNet,
    images: Iterable[Picture],
    batch_size: int,
    tile: int | tuple[int, int] | None,
    overlap: int | None,
    tta: bool | str,
    progress: bool,
) -> Iterator[tuple[tuple[int, int], Iterable[Piece]]]:
    """For each picture its size, and its logits (K, h, w) in pieces from the top down, to be taken before the next picture."""
    _check_model(model)
    batch_size = whole("batch_size", batch_size, 1)
    if overlap is not None:
        overlap = whole("overlap", overlap, 0, hint="in pixels; leave it out for as many as decide the result")
    tile = _tile_size(tile)
    if not isinstance(tta, bool) and tta != "mirror":
        raise ValueError(f"tta must be True, False, or 'mirror' for left and right alone, got {tta!r}")
    check_several(images)
    passes = _Passes(model, tile, overlap, tta, batch_size, progress)
    fast_copy(model, look_closely=True)  # one of weights that have changed since is dropped
    try:
        waiting = iter(images)
        while chunk := [open_picture(picture, model.config.in_channels) for picture in islice(waiting, batch_size)]:
            yield from passes.through(chunk)
    finally:
        free_memory(model)


@dataclass(frozen=True)
class _Passes:
    """How the pictures of one call go through the network."""

    model: UNet
    tile: tuple[int, int] | None
    overlap: int | None
    tta: bool | str
    batch_size: int
    progress: bool

    def through(self, chunk: Iterable[Source]) -> Iterator[tuple[tuple[int, int], Iterable[Piece]]]:
        """What `_predictions` gives, for a few pictures."""
        numbered = [(_input_size(self.model, source.size), source) for source in chunk]
        for (size, _), group in groupby(numbered, key=lambda pair: (pair[0], pair[1].dtype)):
            sources = deque(source for _, source in group)
            window = self.window(size)
            while sources and window is not None:
                source = sources.popleft()
                yield source.size, self.in_tiles(source, size, window)
            while sources:
                batch = [sources.popleft() for _ in range(min(len(sources), self.pictures(size)))]
                inputs = torch.stack([resize(source.whole(), size) for source in batch])
                for source, logits in zip(batch, self.forward(inputs)):
                    yield source.size, [_one_piece(resize(logits, source.size))]

    def forward(self, batch: Tensor) -> Tensor:
        """Logits of a batch of pictures or tiles."""
        if not self.tta:
            return _forward(self.model, batch)
        size, multilabel = self.model.preprocessing.size, self.model.preprocessing.multilabel
        turns = self.tta is True and (size is None or size[0] == size[1])
        return average_symmetries(partial(_forward, self.model), batch, flips=self._flips, turns=turns, multilabel=multilabel)

    def pictures(self, size: tuple[int, int]) -> int:
        """How many of this size, at the network's input, go through it at a time."""
        on_cpu = next(self.model.parameters()).device.type == "cpu"
        most = min(self._pixels(), _MOST_ON_CPU) if on_cpu else self._pixels()
        return max(1, min(self.batch_size, most // (size[0] * size[1])))

    def window(self, size: tuple[int, int]) -> tuple[int, int] | None:
        """Height and width of a tile of a picture that has this size at the network's input; None keeps it whole."""
        if self.tile is not None:
            return self.tile if size[0] > self.tile[0] or size[1] > self.tile[1] else None
        window = choose_tile(self.model.config, size, self._pixels(), mirrored=bool(self.tta))
        if window is not None and self.overlap is None and (reason := why_whole(self.model.config)):
            raise ValueError(
                f"a picture of {size[0]}x{size[1]} pixels does not fit into half of the free memory, and tiles cannot give its "
                f"result, because {reason}; give overlap= for an approximate one, or tile={size} to try the whole picture"
            )
        return window

    def in_tiles(self, source: Source, size: tuple[int, int], window: tuple[int, int]) -> Iterable[Piece]:
        """Logits of a picture, at its own size."""
        seen = source if size == source.size else in_memory(resize(source.whole(), size))
        plan = plan_tiles(self.model.config, size, window, self.overlap, mirrored=bool(self.tta))
        if plan.exact and not isinstance(self.model, FastUNet) and (otherwise := difference(self.model)):
            warnings.warn(
                f"tiles give the whole picture's result for a UNet of the model's config, but {otherwise}; where a pixel then "
                f"depends on more than the {plan.overlap} around its tile, the result is approximate",
                stacklevel=2,
            )
        forward = _with_bar_of_tiles(self.forward, len(plan)) if self.progress else self.forward
        pieces = run_tiles(forward, seen.read, plan, batch_size=1 if self.tile is None else self.pictures(window))
        return pieces if size == source.size else [_one_piece(resize(join(pieces, size), source.size))]

    @property
    def _flips(self) -> Flips:
        return MIRROR if self.tta == "mirror" else FLIPS

    @cached_property
    def _fast(self) -> FastUNet | None:
        return self.model if isinstance(self.model, FastUNet) else fast_copy(self.model)

    def _pixels(self) -> int:
        weight, fast = next(self.model.parameters()), self._fast
        held, kept = (fast.held_bytes, fast.kept_bytes) if fast else (0, 0)
        pixels = pixels_in_one_pass(self.model.config, dtype=weight.dtype, device=weight.device, held=held, kept=kept)
        return pixels // (len(self._flips) if self.tta else 1)


def _tile_size(tile: int | tuple[int, int] | None) -> tuple[int, int] | None:
    if tile is None:
        return None
    sides = tuple(tile) if isinstance(tile, Sequence) else (tile, tile)
    if len(sides) != 2 or not all(isinstance(side, (int, np.integer)) and side is not True and side > 0 for side in sides):
        raise ValueError(f"tile must be a side or (height, width) in whole pixels, or None, got {tile!r}")
    return int(sides[0]), int(sides[1])


def _one_piece(values: Tensor) -> Piece:
    return Piece(slice(0, values.shape[-2]), slice(0, values.shape[-1]), values)


def _with_bar_of_tiles(forward: Callable[[Tensor], Tensor], tiles: int) -> Callable[[Tensor], Tensor]:
    from tqdm.auto import tqdm

    bar = tqdm(total=tiles, unit="tile")

    def forward_and_count(batch: Tensor) -> Tensor:
        logits = forward(batch)
        bar.update(len(batch))
        if bar.n == tiles:
            bar.close()
        return logits

    return forward_and_count


def _with_bar(items: Iterator[_Item], total: int | None) -> Iterator[_Item]:
    from tqdm.auto import tqdm

    yield from tqdm(items, total=total, unit="picture")


def _check_model(model: object) -> None:
    if not hasattr(model, "preprocessing"):
        raise not_a_unet(model)


def _pairs(dataset: Any) -> Iterable[Any]:
    """What a data set holds; one of PyTorch ends where its length says, and need not raise an IndexError there."""
    if isinstance(dataset, Sized) and not isinstance(dataset, Iterable):
        return (dataset[index] for index in range(len(dataset)))  # type: ignore[index]
    return dataset  # type: ignore[no-any-return]


def _picture_and_mask(pair: object) -> tuple[Any, Tensor]:
    """A pair of a data set, the mask as a tensor."""
    picture, mask = pair if isinstance(pair, (tuple, list)) and len(pair) == 2 else (None, None)
    if getattr(picture, "ndim", 0) == 4:
        raise TypeError("expected pairs of one picture and its mask, got a batch; give the data set, not its DataLoader")
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


def _input_size(model: UNet, size: tuple[int, ...]) -> tuple[int, int]:
    """Height and width at which the network sees a picture of this size."""
    preprocessing = model.preprocessing
    if preprocessing.size is not None:
        return preprocessing.size
    scale = preprocessing.scale or 1.0
    smallest = model.config.stride  # smaller pictures are enlarged to what the poolings need
    height, width = (max(smallest, round(scale * side)) for side in size)
    return height, width


@torch.inference_mode()
def _forward(model: UNet, batch: Tensor) -> Tensor:
    """Float32 logits of a batch (N, C, h, w) of uint8 or [0, 1] pixels."""
    inputs = _normalized(model, batch)
    if (fast := fast_copy(model)) is not None:
        logits: Tensor = fast(inputs)
        return logits.float()
    with _eval_mode(model):
        logits = model(inputs)
    return logits.float()


def _normalized(model: UNet, batch: Tensor) -> Tensor:
    """The network's input, in its type and on its device, for a batch (N, C, h, w) of uint8 or [0, 1] pixels."""
    weight = next(model.parameters())
    there = batch.to(weight.device)  # bytes, a quarter of what floats would be
    pixels = there.to(torch.float32, copy=there is batch)  # so that all else can be done in its place
    if batch.dtype == torch.uint8:
        pixels.div_(255)
    mean, std = model.preprocessing.mean, model.preprocessing.std
    if any(mean):
        pixels.sub_(pixels.new_tensor(mean).view(-1, 1, 1))
    if any(value != 1 for value in std):
        pixels.div_(pixels.new_tensor(std).view(-1, 1, 1))
    return pixels.to(weight.dtype)


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; each module's own mode again outside, frozen ones included."""
    with _modes_lent:
        if in_training := [module for module in model.modules() if module.training]:
            try:  # from before the first module changes, for an interrupt
                model.eval()
                yield
            finally:
                try:
                    for module in in_training:
                        module.training = True
                except BaseException:  # an interrupt, which waits until all are back
                    for module in in_training:
                        module.training = True
                    raise
            return
    yield


def _softmax(model: UNet) -> bool:
    return model.config.out_channels > 1 and not model.preprocessing.multilabel


def _without_nan(pieces: Iterable[Piece], picture: Picture, number: int, *, softmax: bool) -> Iterator[Piece]:
    """Logits as they are, for no mask would show what is wrong: NaN is above no threshold."""
    name = repr(str(picture)) if isinstance(picture, (str, PathLike)) else f"the picture [{number}]"
    for piece in pieces:
        _refuse_nan(piece.values, name, softmax=softmax)
        yield piece


def _refuse_nan(logits: Tensor, name: str, *, softmax: bool) -> None:
    largest = logits.amax().item()
    if math.isnan(largest) or (softmax and largest == math.inf):  # of which a softmax makes NaN
        what = "NaN" if math.isnan(largest) else "infinity"
        raise ValueError(
            f"the network's logits for {name} hold {what}: its weights do, or half precision overflows; take other weights, or "
            "predict in float32"
        )


def _probabilities(logits: Tensor, threshold: float, multilabel: bool) -> Tensor:
    if multilabel:
        return logits.sigmoid()
    return logits[0].sigmoid() if len(logits) == 1 else logits.softmax(dim=0)


def _classes(logits: Tensor, threshold: float, multilabel: bool) -> Tensor:
    if len(logits) > 1 and not multilabel:
        # By max, which takes a CPU an eighth to a third of argmax's time.
        return logits.max(dim=0).indices.to(torch.uint8 if len(logits) <= 256 else torch.int32)
    # The threshold is moved to the logits, so that no sigmoid is needed.
    foreground = (logits if multilabel else logits[0]) > math.log(threshold / (1 - threshold))
    return foreground.to(torch.uint8)
