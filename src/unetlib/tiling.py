"""Overlap-tile inference: a picture too large for memory goes through the network in tiles.

Ronneberger et al. (2015) call this the overlap-tile strategy. A tile sees more of the picture than is kept of it. Where it sees
enough (`exact_halo`) and lies on the grid of the poolings, what is kept equals the result for the whole picture. Where it sees
less, neighbouring tiles are blended.

Everything here is given a function that runs the network and one that reads a part of the picture, and knows neither.
"""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from .arguments import whole
from .config import UNetConfig

_Forward: TypeAlias = Callable[[Tensor], Tensor]  # the network: (N, C, h, w) to (N, K, h, w)
_Read: TypeAlias = Callable[[slice, slice], Tensor]  # the picture's rows and columns, (C, h, w)
_Results: TypeAlias = "Iterable[tuple[Span, Iterable[tuple[Span, Tensor]]]]"  # for each row of tiles those of its columns


class Span(NamedTuple):
    """A tile's extent along one axis, in pixels: it sees `start` to `stop`, and `keep_start` to `keep_stop` of it counts."""

    start: int
    stop: int
    keep_start: int
    keep_stop: int


@dataclass(frozen=True)
class TilePlan:
    """The tiles of a picture: each of `rows` with each of `columns`.

    Args:
        size: height and width of the picture. Spans that stop beyond it see its last row or column repeated.
        rows: the tiles' extents from top to bottom.
        columns: the tiles' extents from left to right.
        overlap: pixels that a tile sees beyond what it keeps, at each side that is no border of the picture.
        exact: what is kept equals the whole picture's result. Otherwise all that a tile sees is kept, and blended.
    """

    size: tuple[int, int]
    rows: tuple[Span, ...]
    columns: tuple[Span, ...]
    overlap: int
    exact: bool

    def __len__(self) -> int:
        """Number of tiles."""
        return len(self.rows) * len(self.columns)


class Piece(NamedTuple):
    """A part of the result: `values` (..., h, w) for the picture's `rows` and `columns`."""

    rows: slice
    columns: slice
    values: Tensor


def exact_halo(config: UNetConfig) -> int:
    """Pixels around a tile that decide what the network says inside it.

    The tile's corners are multiples of `config.stride`, so that poolings fall on the same pixels as in the whole picture.
    What each layer needs is followed from the output back to the input: a 3x3 convolution one more pixel to each side, a
    pooling twice as many, an upsampling half, and the bilinear one a neighbour besides.

    Args:
        config: the network's; dropout and batch norm need nothing in evaluation mode.

    Raises:
        TypeError: for something else than a `UNetConfig`.
        ValueError: where each pixel depends on the whole picture: instance and group norm, and `align_corners=True`.

    Example:
        >>> [exact_halo(UNetConfig(features=(8,) * depth)) for depth in (1, 2, 3, 4)]
        [8, 22, 46, 94]
    """
    if not isinstance(config, UNetConfig):
        raise TypeError(f"expected the config of a network, such as model.config, got a {type(config).__name__}")
    if reason := why_whole(config):
        raise ValueError(f"tiles cannot give the whole picture's result, because {reason}")
    reach = 0  # pixels of the map beyond the tile, the same at each side
    skips: list[int] = []
    for _ in range(config.depth):  # the decoder, the full-size level first
        reach += 2  # the two convolutions
        skips.append(reach)
        if config.upsample in ("bilinear", "nearest_conv"):  # the other neighbour; the convolution
            reach += 1
        reach = _round_up(reach, 2) // 2
    reach += 2  # the bottleneck
    for skip in reversed(skips):  # the encoder, the deepest level first
        reach = max(2 * reach, skip) + 2
    return config.patch_size * reach


def why_whole(config: UNetConfig) -> str | None:
    """Why each pixel of the network's output depends on the whole picture; None where it does not.

    Example:
        >>> why_whole(UNetConfig(norm="group"))
        "norm='group' takes its mean and variance from the whole picture"
    """
    if config.norm in ("instance", "group"):
        return f"norm={config.norm!r} takes its mean and variance from the whole picture"
    if config.align_corners:
        return "align_corners=True stretches each map by a factor that depends on the whole picture's size"
    return None


def plan_tiles(
    config: UNetConfig,
    size: tuple[int, int],
    tile: tuple[int, int],
    overlap: int | None = None,
    *,
    mirrored: bool = False,
) -> TilePlan:
    """Cut a picture into tiles on the grid of the network's poolings.

    The tiles are the smallest equal ones that are as few as tiles of the given size would be.

    With the exact halo, what is kept equals the network's result for the whole picture, to the border. One case is left where
    it cannot: `match="resize"`, which stretches whole maps, and sides that are no multiples of `config.stride`. The result
    is then that of the picture with its last row and column repeated up to such multiples, and a warning says so.

    Args:
        config: the network's.
        size: height and width of the picture.
        tile: height and width that a tile sees, at most; a side less than the picture's is rounded down to a multiple of
            `config.stride`.
        overlap: pixels that a tile sees beyond what it keeps, at each side that is no border of the picture; rounded up to a
            multiple of `config.stride`. None takes `exact_halo`. Less is a warning, and tiles are blended with weights that
            fall in a straight line to the edge, over the pixels that they share.
        mirrored: the network sees the tiles mirrored too, as with `tta`. They then lie on the grid from the picture's other
            end as well, and where its sides are no multiples, `exact_halo` takes a multiple more.

    Raises:
        TypeError: for an `overlap` that is no integer.
        ValueError: for one below 0, a tile too small for it, or a network that `exact_halo` refuses, without an `overlap`.

    Example:
        >>> plan = plan_tiles(UNetConfig(features=(8, 16)), (100, 64), (96, 96))
        >>> plan.rows
        (Span(start=0, stop=76, keep_start=0, keep_stop=48), Span(start=24, stop=100, keep_start=48, keep_stop=100))
        >>> plan.columns
        (Span(start=0, stop=64, keep_start=0, keep_stop=64),)
    """
    multiple = config.stride
    obstacle = why_whole(config)
    if overlap is None and obstacle:
        some = _round_up(min(tile) // 8, multiple)
        some = some if min(tile) >= 2 * some + multiple else 0
        raise ValueError(
            f"tiles cannot give the whole picture's result, because {obstacle}; give overlap= for an approximate result, such "
            f"as overlap={some}, or tile=({size[0]}, {size[1]}) to keep the picture whole"
        )
    two_grids = mirrored and _has_two_grids(config, size)
    halo = _round_up(min(tile) if obstacle else exact_halo(config), multiple) + multiple * two_grids
    overlap = halo if overlap is None else _round_up(whole("overlap", overlap, 0), multiple)
    exact = not obstacle and overlap >= halo
    rests = [length % multiple if two_grids and exact else 0 for length in size]
    for side, length, rest in zip(tile, size, rests):
        least = 2 * overlap + multiple + rest
        if length > side < least:
            raise ValueError(
                f"a tile that sees {overlap} pixels more at each side than it keeps must be at least {least} "
                f"pixels a side, got {side}; give a larger tile=, or a smaller overlap= for an approximate result"
            )
    if not exact:
        reason = obstacle or f"overlap={overlap} is less than the {halo} pixels that decide the result"
        warnings.warn(f"tiles are blended and the result is approximate, because {reason}", stacklevel=2)
    elif config.match == "resize" and any(length % multiple for length in size) and any(map(operator.gt, size, tile)):
        warnings.warn(
            f'match="resize" would stretch the maps of a whole picture of {size[0]}x{size[1]}, whose sides are no multiples of '
            f"{multiple}; tiles give what a picture with its last row and column repeated would. No weight depends on match, "
            'and with "replicate" in the model\'s config both agree',
            stacklevel=2,
        )
    # Without an overlap the last tile could be less than a multiple, which no network takes.
    pad = overlap == 0 or (exact and config.match == "resize")
    rows, columns = (
        _spans(length, _round_up(length, multiple) if pad else length, side, overlap, multiple, exact, rest)
        for length, side, rest in zip(size, tile, rests)
    )
    return TilePlan(size, rows, columns, overlap, exact)


def choose_tile(config: UNetConfig, size: tuple[int, int], pixels: int, *, mirrored: bool = False) -> tuple[int, int] | None:
    """The largest useful tile for a picture, None where it fits whole.

    Beyond 2048 pixels a side, or 16 times the halo, larger tiles save little: the halo is then less than a quarter of the work.

    Args:
        config: the network's.
        size: height and width of the picture.
        pixels: how many fit into one pass, as `unetlib.memory.pixels_in_one_pass` says.
        mirrored: as in `plan_tiles`.

    Returns:
        Height and width, never less than the exact halo needs, or None.

    Example:
        >>> choose_tile(UNetConfig(), (20_000, 30_000), pixels=2**20)
        (1024, 1024)
    """
    if size[0] * size[1] <= pixels:
        return None
    multiple = config.stride
    halo = multiple if why_whole(config) else _round_up(exact_halo(config), multiple)
    least = 2 * halo + multiple * (4 if mirrored and _has_two_grids(config, size) else 1)
    side = min(max(2048, 16 * halo), max(math.isqrt(pixels) // multiple * multiple, least))
    return side, side


def run_tiles(
    forward: Callable[[Tensor], Tensor],
    read: Callable[[slice, slice], Tensor],
    plan: TilePlan,
    *,
    batch_size: int = 1,
) -> Iterator[Piece]:
    """Run a network over the tiles of a plan, from the top down.

    Args:
        forward: the network: (N, C, h, w) to (N, K, h, w).
        read: gives the picture's rows and columns, (C, h, w); called once for each tile, never beyond the picture.
        plan: the tiles.
        batch_size: tiles in one pass.

    Yields:
        Pieces (K, h, w) that cover the picture once: of an exact plan the kept part of each tile, otherwise bands of its whole
        width, of which no more is held than one row of tiles.

    Example:
        >>> picture = torch.rand(3, 100, 64)
        >>> plan = plan_tiles(UNetConfig(features=(8, 16)), (100, 64), (64, 64))
        >>> pieces = run_tiles(lambda batch: 2 * batch, lambda rows, columns: picture[:, rows, columns], plan)
        >>> torch.equal(join(pieces, (100, 64)), 2 * picture)
        True
    """
    results = ((rows, _tiles_of_row(forward, read, plan, rows, batch_size)) for rows in plan.rows)
    return _kept(results) if plan.exact else _blended(results, plan)


def join(pieces: Iterable[Piece], size: tuple[int, int]) -> Tensor:
    """Put pieces together: (..., h, w) each to (..., H, W).

    Example:
        >>> left, right = torch.tensor([[1, 2], [4, 5]]), torch.tensor([[3], [6]])
        >>> join([Piece(slice(0, 2), slice(0, 2), left), Piece(slice(0, 2), slice(2, 3), right)], (2, 3))
        tensor([[1, 2, 3],
                [4, 5, 6]])
    """
    result = None
    for piece in pieces:
        if piece.values.shape[-2:] == size:
            return piece.values
        if result is None:
            result = piece.values.new_empty(*piece.values.shape[:-2], *size)
        result[..., piece.rows, piece.columns] = piece.values
    assert result is not None, "there are no pieces"
    return result


def iter_bands(pieces: Iterable[Piece]) -> Iterator[Tensor]:
    """Put together the pieces that stand side by side: (..., h, w) each to (..., h, W), from the top down.

    Example:
        >>> values = torch.arange(6).view(2, 3)
        >>> pieces = [Piece(slice(y, y + 1), slice(x, x + 1), values[y : y + 1, x : x + 1]) for y in range(2) for x in range(3)]
        >>> list(iter_bands(pieces))
        [tensor([[0, 1, 2]]), tensor([[3, 4, 5]])]
    """
    for _, row in groupby(pieces, key=lambda piece: piece.rows.start):
        yield torch.cat([piece.values for piece in row], dim=-1)


def _has_two_grids(config: UNetConfig, size: tuple[int, int]) -> bool:
    """Whether the grid of the poolings from the picture's other end is another one."""
    return config.match != "resize" and any(length % config.stride for length in size)


def _spans(length: int, padded: int, tile: int, overlap: int, multiple: int, exact: bool, rest: int) -> tuple[Span, ...]:
    """The extents of tiles along one axis; all start on multiples, and the last one ends with the padded picture.

    All stop the same `rest` beyond a multiple.
    """
    if length <= tile:
        return (Span(0, padded, 0, length),)
    padded, tile, shared = padded - rest, (tile - rest) // multiple * multiple, 2 * overlap
    count = math.ceil((padded - shared) / (tile - shared))
    step = _round_up(math.ceil((padded - shared) / count), multiple)
    window = step + shared
    starts = [*range(0, padded - window, step), _round_up(padded - window, multiple)]
    stops = [min(start + window, padded) + rest for start in starts]
    if not exact:
        return tuple(Span(start, stop, start, min(stop, length)) for start, stop in zip(starts, stops))
    cuts = [0, *(start + overlap for start in starts[1:]), length]
    return tuple(Span(*both) for both in zip(starts, stops, cuts, cuts[1:]))


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _tiles_of_row(forward: _Forward, read: _Read, plan: TilePlan, rows: Span, batch_size: int) -> Iterator[tuple[Span, Tensor]]:
    """What the network says of each tile of a row, cut to what is kept of it."""
    for _, equal in groupby(plan.columns, key=lambda columns: columns.stop - columns.start):
        while batch := list(islice(equal, batch_size)):
            logits = forward(torch.stack([_window(read, rows, columns, plan.size) for columns in batch]))
            for columns, one in zip(batch, logits):
                yield columns, one[:, _kept_part(rows), _kept_part(columns)]


def _window(read: _Read, rows: Span, columns: Span, size: tuple[int, int]) -> Tensor:
    """What a tile sees, the picture's last row and column repeated where it ends earlier."""
    part = read(slice(rows.start, min(rows.stop, size[0])), slice(columns.start, min(columns.stop, size[1])))
    for dim, span in ((-2, rows), (-1, columns)):
        missing = span.stop - span.start - part.shape[dim]
        if missing:
            last = part.narrow(dim, part.shape[dim] - 1, 1)
            part = torch.cat([part, *[last] * missing], dim)
    return part


def _kept_part(span: Span) -> slice:
    return slice(span.keep_start - span.start, span.keep_stop - span.start)


def _kept(results: _Results) -> Iterator[Piece]:
    for rows, tiles in results:
        for columns, logits in tiles:
            yield Piece(slice(rows.keep_start, rows.keep_stop), slice(columns.keep_start, columns.keep_stop), logits)


def _blended(results: _Results, plan: TilePlan) -> Iterator[Piece]:
    width = plan.size[1]
    row_weights = _weights(plan.rows, plan.overlap)
    column_weights = dict(zip(plan.columns, _weights(plan.columns, plan.overlap)))
    below = [rows.start for rows in plan.rows[1:]] + [plan.size[0]]
    carried: Tensor | None = None  # rows that the tiles above have begun
    for (rows, tiles), row_weight, next_start in zip(results, row_weights, below):
        band: Tensor | None = None
        for columns, logits in tiles:
            if band is None:
                band = logits.new_zeros(len(logits), rows.keep_stop - rows.start, width)
                if carried is not None:
                    band[:, : carried.shape[1]] = carried
            weight = torch.outer(row_weight, column_weights[columns]).to(logits)
            band[..., columns.keep_start : columns.keep_stop] += weight * logits
        assert band is not None
        done = next_start - rows.start
        yield Piece(slice(rows.start, next_start), slice(0, width), band[:, :done])
        carried = band[:, done:]


def _weights(spans: tuple[Span, ...], overlap: int) -> list[Tensor]:
    """For each tile the weights of what is kept of it: above 0 everywhere, and 1 in all at each pixel."""
    ramps = []
    for span in spans:
        pixel = torch.arange(span.start, span.stop, dtype=torch.float64, device="cpu") + 0.5
        ramp = torch.ones_like(pixel)
        if span is not spans[0]:
            ramp = ramp.minimum((pixel - span.start) / max(1, 2 * overlap))
        if span is not spans[-1]:
            ramp = ramp.minimum((span.stop - pixel) / max(1, 2 * overlap))
        ramps.append(ramp[_kept_part(span)])
    total = torch.zeros(spans[-1].keep_stop, dtype=torch.float64, device="cpu")
    for span, ramp in zip(spans, ramps):
        total[span.keep_start : span.keep_stop] += ramp
    return [ramp / total[span.keep_start : span.keep_stop] for span, ramp in zip(spans, ramps)]
