"""Pictures in, masks out: everything between a file and a `UNet`'s logits, and back to the picture's own size."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from itertools import groupby, islice
from os import PathLike
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from torch import Tensor, nn

from .imaging import read_image, to_tensor

if TYPE_CHECKING:
    from .metrics import SegmentationMetrics
    from .unet import UNet

Picture: TypeAlias = "str | PathLike[str] | Image.Image | NDArray[np.uint8] | Tensor"


def predict(
    model: UNet,
    images: Picture | Sequence[Picture],
    *,
    threshold: float | None = None,
    probabilities: bool = False,
    batch_size: int = 4,
    progress: bool = False,
) -> NDArray[np.uint8] | NDArray[np.float32] | list[NDArray[np.uint8]] | list[NDArray[np.float32]]:
    """Segment pictures of any size; `UNet.predict` calls this.

    Args:
        model: the network; its `preprocessing` says how a picture becomes its input. Training mode and device stay as they are.
        images: one picture or a list of them: a path, a PIL picture, a uint8 array (H, W) or (H, W, C), or a tensor (C, H, W),
            uint8 or floating point in [0, 1]. Grey pictures are repeated for a network of three channels, colour ones turned
            into grey for a network of one.
        threshold: probability from which a pixel is foreground; None takes the model's own. For one output channel only.
        probabilities: return probabilities instead of classes.
        batch_size: pictures in one forward pass.
        progress: show a progress bar.

    Returns:
        For each picture, at its own height and width: its mask, uint8 (H, W) of class indices (0 and 1 for one output channel);
        or with `probabilities`, float32 (H, W) for one output channel and (C, H, W) for several. One result for one picture, a
        list for a list.

    Raises:
        FileNotFoundError: for a path that does not exist.
        TypeError: for something that is no picture.
        ValueError: for a file, shape or value that cannot be read, naming it.

    Example:
        >>> from unetlib import UNet
        >>> UNet(features=(8, 16)).predict(np.zeros((90, 120, 3), np.uint8)).shape
        (90, 120)
    """
    if threshold is None:
        threshold = model.preprocessing.threshold
    elif model.config.out_channels > 1:
        raise ValueError("threshold is for one output channel; several are decided by the largest logit, so leave it out")
    elif not 0.0 < threshold < 1.0:
        raise ValueError(f"threshold must be a probability in (0, 1), got {threshold!r}")
    one = not isinstance(images, (list, tuple))
    pictures: Sequence[Picture] = [images] if one else images  # type: ignore[assignment, list-item]
    logits = iter_logits(model, pictures, batch_size=batch_size)
    decide = _probabilities if probabilities else _classes
    results = [decide(one_logits, threshold) for one_logits in (_with_bar(logits, len(pictures)) if progress else logits)]
    return results[0] if one else results  # type: ignore[return-value]


def iter_logits(model: UNet, images: Iterable[Picture], *, batch_size: int = 4) -> Iterator[Tensor]:
    """Yield each picture's logits at its own size, reading `batch_size` pictures at a time.

    Args:
        model: the network, as in `predict`.
        images: pictures, as in `predict`; an iterator is read a batch at a time.
        batch_size: pictures in one forward pass.

    Yields:
        float32 (out_channels, H, W) on the model's device, one for each picture in turn.

    Raises:
        ValueError: for a `batch_size` below 1, and as `predict`.

    Example:
        >>> from unetlib import SegmentationMetrics, UNet
        >>> metrics, picture, mask = SegmentationMetrics(), np.zeros((32, 48, 3), np.uint8), torch.zeros(32, 48)
        >>> for logits in iter_logits(UNet(features=(8,)), [picture]):
        ...     metrics.update(logits[None], mask[None])
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size!r}")
    waiting = iter(images)
    while chunk := [_read(picture, model.config.in_channels) for picture in islice(waiting, batch_size)]:
        sizes = [tuple(picture.shape[-2:]) for picture in chunk]
        inputs = [_resize(picture, _input_size(model, size)) for picture, size in zip(chunk, sizes)]
        numbered = zip(inputs, sizes)
        for _, group in groupby(numbered, key=lambda pair: pair[0].shape):
            batch, own_sizes = zip(*group)
            for logits, own_size in zip(_forward(model, torch.stack(batch)), own_sizes):
                yield _resize(logits, own_size)


def evaluate(
    model: UNet,
    dataset: Iterable[tuple[Picture, ArrayLike]],
    *,
    batch_size: int = 4,
    progress: bool = False,
    metrics: SegmentationMetrics | None = None,
) -> dict[str, float]:
    """Scores of a model on a data set, at the pictures' own size.

    Args:
        model: the network; its `preprocessing` applies, as in `predict`.
        dataset: pairs of a picture, as in `predict`, and its mask (H, W): an `ImageMaskDataset` without a transform, for one.
        batch_size: pictures in one forward pass.
        progress: show a progress bar.
        metrics: what counts, if not `SegmentationMetrics` as the model needs it: one with other options, or one that goes on
            counting; it may be merged with those of other processes afterwards.

    Returns:
        What `SegmentationMetrics.compute` gives: "dice" is the mean over pictures, "dice_pooled" of all pixels together, ...

    Example:
        >>> from unetlib import UNet
        >>> from unetlib.synthetic import render_scene
        >>> scenes = [render_scene(car, size=(32, 48)) for car in range(3)]
        >>> 0 <= evaluate(UNet(features=(8,)), scenes)["dice"] <= 1
        True
    """
    if metrics is None:
        from .metrics import SegmentationMetrics

        metrics = SegmentationMetrics(model.config.out_channels, threshold=model.preprocessing.threshold)
    masks: deque[ArrayLike] = deque()

    def pictures() -> Iterator[Picture]:
        for picture, mask in dataset:
            masks.append(mask)
            yield picture

    logits = iter_logits(model, pictures(), batch_size=batch_size)
    total = len(dataset) if isinstance(dataset, Sized) else None
    for picture_logits in _with_bar(logits, total) if progress else logits:
        mask = torch.as_tensor(masks.popleft(), device=picture_logits.device)
        metrics.update(picture_logits[None], mask[None])
    return metrics.compute()


def _with_bar(items: Iterator[Tensor], total: int | None) -> Iterator[Tensor]:
    from tqdm.auto import tqdm

    yield from tqdm(items, total=total, unit="picture")


def _read(picture: Picture, channels: int) -> Tensor:
    """The picture as (channels, H, W), uint8 or float in [0, 1]."""
    if isinstance(picture, (str, PathLike, Image.Image)):
        return to_tensor(read_image(picture, "L" if channels == 1 else "RGB"))
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim not in (2, 3):
            raise ValueError(
                f"a picture as an array must be uint8 of shape (H, W) or (H, W, C), got {picture.dtype} {picture.shape}; "
                "scale other numbers to 0..255, or pass a tensor (C, H, W) of floats in [0, 1]"
            )
        tensor = to_tensor(picture)
    elif isinstance(picture, Tensor):
        tensor = picture.detach()
        if tensor.ndim != 3 or not (tensor.dtype == torch.uint8 or tensor.is_floating_point()):
            raise ValueError(
                f"a picture as a tensor must be (C, H, W), uint8 or floating point, got {tensor.dtype} {tuple(tensor.shape)}"
                + ("; pass a batch as list(batch)" if tensor.ndim == 4 else "")
            )
        if tensor.is_floating_point() and tensor.numel() > 0 and not (tensor.amin() >= 0 and tensor.amax() <= 1):
            raise ValueError(
                f"a picture of floats must lie in [0, 1], got {tensor.amin():.6g} to {tensor.amax():.6g}; "
                "divide by 255, and leave mean and std to the model's preprocessing"
            )
    else:
        raise TypeError(f"expected a path, PIL picture, array or tensor, got {type(picture).__name__}")
    if 0 in tensor.shape:
        raise ValueError(f"the picture is empty: its shape is {tuple(picture.shape)}")
    return _match_channels(tensor, channels)


def _match_channels(picture: Tensor, channels: int) -> Tensor:
    found = picture.shape[0]
    if found == channels:
        return picture
    if found == 1 and channels == 3:
        return picture.expand(3, -1, -1)
    if found == 3 and channels == 1:
        from torchvision.transforms.v2.functional import rgb_to_grayscale

        grey: Tensor = rgb_to_grayscale(picture)
        return grey
    raise ValueError(
        f"the picture has {found} channels, but the network takes {channels}; expected (H, W, {channels}) as an array or "
        f"({channels}, H, W) as a tensor"
    )


def _input_size(model: UNet, size: tuple[int, ...]) -> tuple[int, int]:
    """Height and width at which the network sees a picture of this size."""
    preprocessing = model.preprocessing
    if preprocessing.size is not None:
        return preprocessing.size
    scale = preprocessing.scale or 1.0
    smallest = 2**model.config.depth  # smaller pictures are enlarged to what the poolings need
    height, width = (max(smallest, round(scale * side)) for side in size)
    return height, width


def _resize(picture: Tensor, size: Sequence[int]) -> Tensor:
    """(C, H, W) at another height and width: bilinear, antialiased; uint8 stays uint8."""
    if tuple(picture.shape[-2:]) == tuple(size):
        return picture
    from torchvision.transforms.v2.functional import resize_image

    resized: Tensor = resize_image(picture, list(size), antialias=True)
    return resized


@torch.inference_mode()
def _forward(model: UNet, batch: Tensor) -> Tensor:
    """Float32 logits of a batch (N, C, h, w) of uint8 or [0, 1] pixels."""
    weight = next(model.parameters())
    batch = batch.to(weight.device)
    pixels = batch.float() / 255 if batch.dtype == torch.uint8 else batch.float()
    mean, std = (
        torch.tensor(values, device=weight.device).view(-1, 1, 1)
        for values in (model.preprocessing.mean, model.preprocessing.std)
    )
    with _eval_mode(model):
        logits: Tensor = model(((pixels - mean) / std).to(weight.dtype))
    return logits.float()


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; each module's own mode again outside, frozen ones included."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _probabilities(logits: Tensor, threshold: float) -> NDArray[np.float32]:
    probabilities = logits[0].sigmoid() if len(logits) == 1 else logits.softmax(dim=0)
    return probabilities.cpu().numpy()


def _classes(logits: Tensor, threshold: float) -> NDArray[np.uint8]:
    # The threshold is moved to the logits, so that no sigmoid is needed.
    classes = logits[0] >= math.log(threshold / (1 - threshold)) if len(logits) == 1 else logits.argmax(dim=0)
    return classes.to(torch.uint8).cpu().numpy()
