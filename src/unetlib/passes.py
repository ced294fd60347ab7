"""How pictures go through a network: in batches or in tiles, turned and mirrored where that is asked for."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby, islice
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from .arguments import not_a_unet, whole
from .fast import FastUNet
from .fast.cached import fast_copy, free_memory
from .memory import pixels_in_one_pass
from .pictures import Picture, Source, check_several, in_memory, open_picture, resize
from .structure import difference
from .symmetries import FLIPS, MIRROR, Flips, average_symmetries
from .tiling import Piece, choose_tile, join, plan_tiles, run_tiles, why_whole

if TYPE_CHECKING:
    from .unet import UNet

Network: TypeAlias = "UNet | FastUNet"

_MOST_ON_CPU = 2**20  # pixels of a batch: a larger one keeps the cores no busier, and takes memory
_modes_lent = threading.RLock()  # held while a network in training is in evaluation mode, which all threads see


def iter_predictions(
    model: Network,
    images: Iterable[Picture],
    *,
    batch_size: int,
    tile: int | tuple[int, int] | None,
    overlap: int | None,
    tta: bool | str,
    progress: bool = False,
) -> Iterator[tuple[tuple[int, int], Iterable[Piece]]]:
    """For each picture its size, and its logits (K, h, w) in pieces from the top down, to be taken before the next picture."""
    check_model(model)
    batch_size = whole("batch_size", batch_size, 1)
    if overlap is not None:
        overlap = whole("overlap", overlap, 0, hint="in pixels; leave it out for as many as decide the result")
    if not isinstance(tta, bool) and tta != "mirror":
        raise ValueError(f"tta must be True, False, or 'mirror' for left and right alone, got {tta!r}")
    tile = _tile_size(tile)
    check_several(images)
    # Also where it is one already: of weights that have changed since, the copy is dropped.
    fast = model if isinstance(model, FastUNet) else fast_copy(model, look_closely=True)
    passes = _Passes(model, fast, tile, overlap, tta, batch_size, progress)
    try:
        waiting = iter(images)
        while chunk := [open_picture(picture, model.config.in_channels) for picture in islice(waiting, batch_size)]:
            yield from passes.through(chunk)
    finally:
        free_memory(model)


def check_model(model: object) -> None:
    """Refuse what is neither a network nor a fast copy of one."""
    if not hasattr(model, "preprocessing"):
        raise not_a_unet(model)


def input_size(model: Network, size: tuple[int, int]) -> tuple[int, int]:
    """Height and width at which the network sees a picture of this size."""
    preprocessing = model.preprocessing
    if preprocessing.size is not None:
        return preprocessing.size
    scale = preprocessing.scale or 1.0
    smallest = model.config.stride  # smaller pictures are enlarged to what the poolings need
    height, width = (max(smallest, round(scale * side)) for side in size)
    return height, width


def normalized(model: Network, batch: Tensor) -> Tensor:
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


@dataclass(frozen=True)
class _Passes:
    """How the pictures of one call go through the network."""

    model: Network
    fast: FastUNet | None  # its copy
    tile: tuple[int, int] | None
    overlap: int | None
    tta: bool | str
    batch_size: int
    progress: bool

    def through(self, sources: Iterable[Source]) -> Iterator[tuple[tuple[int, int], Iterable[Piece]]]:
        """What `iter_predictions` gives, for a few pictures."""
        sized = [(input_size(self.model, source.size), source) for source in sources]
        for (size, _), group in groupby(sized, key=lambda pair: (pair[0], pair[1].dtype)):
            alike = [source for _, source in group]
            pixels = self.pixels_in_one_pass()
            if window := self.window(size, pixels):
                number = 1 if self.tile is None else self.at_a_time(window, pixels)
                for source in alike:
                    yield source.size, self.in_tiles(source, size, window, number)
                continue
            number = self.at_a_time(size, pixels)
            while alike:
                batch, alike = alike[:number], alike[number:]
                inputs = torch.stack([resize(source.whole(), size) for source in batch])
                for source, logits in zip(batch, self.forward(inputs)):
                    yield source.size, _one_piece(logits, source.size)

    def pixels_in_one_pass(self) -> int:
        """How many pixels, at the network's input, fit into memory with all views of them that go together."""
        weight = next(self.model.parameters())
        held, kept = (self.fast.held_bytes, self.fast.kept_bytes) if self.fast else (0, 0)
        pixels = pixels_in_one_pass(self.model.config, dtype=weight.dtype, device=weight.device, held=held, kept=kept)
        return pixels // (len(self.flips) if self.tta else 1)

    def window(self, size: tuple[int, int], pixels: int) -> tuple[int, int] | None:
        """Height and width of a tile of a picture that has this size at the network's input; None keeps it whole."""
        if self.tile is not None:
            return self.tile if size[0] > self.tile[0] or size[1] > self.tile[1] else None
        window = choose_tile(self.model.config, size, pixels, mirrored=bool(self.tta))
        if window is not None and self.overlap is None and (reason := why_whole(self.model.config)):
            raise ValueError(
                f"a picture of {size[0]}x{size[1]} pixels does not fit into half of the free memory, and tiles cannot give its "
                f"result, because {reason}; give overlap= for an approximate one, or tile={size} to try the whole picture"
            )
        return window

    def at_a_time(self, size: tuple[int, int], pixels: int) -> int:
        """How many pictures or tiles of this size go through the network together."""
        if next(self.model.parameters()).device.type == "cpu":
            pixels = min(pixels, _MOST_ON_CPU)
        return max(1, min(self.batch_size, pixels // (size[0] * size[1])))

    def in_tiles(self, source: Source, size: tuple[int, int], window: tuple[int, int], number: int) -> Iterable[Piece]:
        """Logits of a picture, at its own size, by so many tiles at a time."""
        seen = source if size == source.size else in_memory(resize(source.whole(), size))
        plan = plan_tiles(self.model.config, size, window, self.overlap, mirrored=bool(self.tta))
        if plan.exact and not isinstance(self.model, FastUNet) and (otherwise := difference(self.model)):
            warnings.warn(
                f"tiles give the whole picture's result for a UNet of the model's config, but {otherwise}; where a pixel then "
                f"depends on more than the {plan.overlap} around its tile, the result is approximate",
                stacklevel=2,
            )
        forward = _with_bar(self.forward, len(plan)) if self.progress else self.forward
        pieces = run_tiles(forward, seen.read, plan, batch_size=number)
        return pieces if size == source.size else _one_piece(join(pieces, size), source.size)

    def forward(self, batch: Tensor) -> Tensor:
        """Logits of a batch of pictures or tiles."""
        if not self.tta:
            return _forward(self.model, batch)
        size, multilabel = self.model.preprocessing.size, self.model.preprocessing.multilabel
        turns = self.tta is True and (size is None or size[0] == size[1])
        return average_symmetries(partial(_forward, self.model), batch, flips=self.flips, turns=turns, multilabel=multilabel)

    @property
    def flips(self) -> Flips:
        """Those of which the mean is taken."""
        return MIRROR if self.tta == "mirror" else FLIPS


def _tile_size(tile: int | tuple[int, int] | None) -> tuple[int, int] | None:
    if tile is None:
        return None
    sides = tuple(tile) if isinstance(tile, Sequence) else (tile, tile)
    if len(sides) != 2 or not all(isinstance(side, (int, np.integer)) and side is not True and side > 0 for side in sides):
        raise ValueError(f"tile must be a side or (height, width) in whole pixels, or None, got {tile!r}")
    return int(sides[0]), int(sides[1])


def _one_piece(logits: Tensor, size: tuple[int, int]) -> list[Piece]:
    return [Piece(slice(0, size[0]), slice(0, size[1]), resize(logits, size))]


def _with_bar(forward: Callable[[Tensor], Tensor], tiles: int) -> Callable[[Tensor], Tensor]:
    from tqdm.auto import tqdm

    bar = tqdm(total=tiles, unit="tile")

    def forward_and_count(batch: Tensor) -> Tensor:
        logits = forward(batch)
        bar.update(len(batch))
        if bar.n == tiles:
            bar.close()
        return logits

    return forward_and_count


@torch.inference_mode()
def _forward(model: Network, batch: Tensor) -> Tensor:
    """Float32 logits of a batch (N, C, h, w) of uint8 or [0, 1] pixels."""
    inputs = normalized(model, batch)
    if (fast := fast_copy(model)) is not None:
        return fast(inputs).float()
    with _eval_mode(model):
        logits = model(inputs)
    return logits.float()


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
