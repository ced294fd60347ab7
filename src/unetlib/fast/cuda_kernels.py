"""Kernels in Triton for levels on CUDA: maps in channels_last, results written where they are concatenated.

Maps are tensors (N, C, H, W) whose channels lie side by side. Kernels get their strides of N, H and W in units of 8 numbers
where all are multiples of 8, which lets the compiler move 16 bytes at a time. A program computes a tile of pixels and channels;
offsets within a tile fit into 32 bits, those of a tile are 64 bits wide.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor


class _Product:
    """Weights (depth, results) and bias (results,), with zeros up to whole blocks: kernels need not look where they end."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self.wide = _wide(weight.shape[1])
        self.deep = 64 if len(weight) % 64 == 0 else 32
        missing = -weight.shape[1] % self.wide
        self.weight = F.pad(weight, (0, missing, 0, -len(weight) % self.deep)).contiguous()
        self.bias = F.pad(bias.float(), (0, missing)).contiguous()


class Conv3x3(_Product):
    """A 3x3 convolution with padding 1, its bias and its ReLU, and with them 2x2 max pooling, in one kernel.

    Args:
        weight: (out, in, 3, 3) in half precision.
        bias: (out,).
        rows: of the tile of pixels that a program computes; even, as the columns are, and powers of two.
        columns: of the tile.
    """

    def __init__(self, weight: Tensor, bias: Tensor, *, rows: int = 8, columns: int = 16) -> None:
        self.out_channels, self.channels = weight.shape[:2]
        super().__init__(weight.permute(2, 3, 1, 0).reshape(9 * self.channels, self.out_channels), bias)
        # Of narrow maps the L1 cache holds all that neighbours read again; wider ones are loaded while others are multiplied.
        stages = 1 if max(weight.shape[:2]) <= 16 else 3
        self.rows, self.columns, self.options = rows, columns, {"num_warps": 4, "num_stages": stages}

    def __call__(self, x: Tensor, out: Tensor, pooled: Tensor | None = None) -> None:
        """Fill `out` (N, out, H, W), any slice of channels, and `pooled` (N, out, H // 2, W // 2), by x (N, in, H, W)."""
        count, _, height, width = x.shape
        tiles = count * triton.cdiv(height, self.rows) * triton.cdiv(width, self.columns)
        maps = (x, out, out if pooled is None else pooled)
        unit, strides = _strides(*maps)
        _conv3x3[(tiles * triton.cdiv(self.out_channels, self.wide),)](
            *maps, self.weight, self.bias, height, width, *strides,
            UNIT=unit, CHANNELS=self.channels, FILTERS=self.out_channels, ROWS=self.rows, COLUMNS=self.columns,
            DEEP=self.deep, WIDE=self.wide, POOL=pooled is not None, **self.options,
        )  # fmt: skip


class Conv3x3Head(Conv3x3):
    """A 3x3 convolution with padding 1, its bias, its ReLU, and the last 1x1 convolution of the result, in one kernel.

    Args:
        weight: (out, in, 3, 3) in half precision, with up to 128 results.
        bias: (out,).
        head: (classes * side ** 2, out, 1, 1), a few.
        head_bias: (classes * side ** 2,).
        side: of the patches.
        rows: of the tile, as for `Conv3x3`.
        columns: of the tile.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor, head: Tensor, head_bias: Tensor, side: int, *, rows: int = 8, columns: int = 16
    ) -> None:
        super().__init__(weight, bias, rows=rows, columns=columns)
        self.results, self.side = len(head), side
        self.head = F.pad(head.flatten(1).float(), (0, self.wide - self.out_channels)).contiguous()
        self.head_bias = head_bias.float()

    def __call__(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Logits (N, classes, H * side, W * side), float32, of x (N, in, H, W)."""
        count, _, height, width = x.shape
        out = _logits(x, self.results, self.side)
        unit, strides = _strides(x)
        _conv3x3_head[(count * triton.cdiv(height, self.rows) * triton.cdiv(width, self.columns),)](
            x, out, self.weight, self.bias, self.head, self.head_bias, height, width, *strides,
            UNIT=unit, CHANNELS=self.channels, RESULTS=self.results, SIDE=self.side, ROWS=self.rows, COLUMNS=self.columns,
            DEEP=self.deep, WIDE=self.wide, **self.options,
        )  # fmt: skip
        return out


class UpConv2x2(_Product):
    """A transposed 2x2 convolution with stride 2 and its bias: a matrix product whose results go to four places each.

    Args:
        weight: (in, out, 2, 2) in half precision.
        bias: (out,).
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self.channels, self.out_channels = weight.shape[:2]
        super().__init__(weight.permute(0, 2, 3, 1).flatten(1), bias.repeat(4))

    def __call__(self, x: Tensor, out: Tensor) -> None:
        """Fill `out` (N, out, 2 * h, 2 * w), any slice of channels, by x (N, in, h, w)."""
        count, _, height, width = x.shape
        unit, strides = _strides(x, out)
        _up_conv2x2[(triton.cdiv(count * height * width, 128) * triton.cdiv(4 * self.out_channels, self.wide),)](
            x, out, self.weight, self.bias, count * height * width, height, width, *strides,
            UNIT=unit, CHANNELS=self.channels, FILTERS=self.out_channels, PIXELS=128, DEEP=self.deep, WIDE=self.wide,
            num_warps=4, num_stages=3,
        )  # fmt: skip


class Head(_Product):
    """The last 1x1 convolution and its bias, its results stored as pixels of the picture.

    Args:
        weight: (out * side ** 2, in, 1, 1) in half precision.
        bias: (out * side ** 2,).
        side: of the patches.
    """

    def __init__(self, weight: Tensor, bias: Tensor, side: int) -> None:
        self.results, self.channels = weight.shape[:2]
        self.side = side
        super().__init__(weight.flatten(1).T, bias)

    def __call__(self, x: Tensor) -> Tensor:
        """Logits (N, out, h * side, w * side), float32, of x (N, in, h, w)."""
        count, _, height, width = x.shape
        out = _logits(x, self.results, self.side)
        unit, strides = _strides(x)
        _head[(triton.cdiv(count * height * width, 128) * triton.cdiv(self.results, self.wide),)](
            x, out, self.weight, self.bias, count * height * width, height, width, *strides,
            UNIT=unit, CHANNELS=self.channels, RESULTS=self.results, SIDE=self.side, PIXELS=128, DEEP=self.deep,
            WIDE=self.wide, num_warps=4, num_stages=3,
        )  # fmt: skip
        return out


def split_patches(x: Tensor, out: Tensor, side: int) -> None:
    """Fill `out` (N, C * side ** 2 or more, h, w) by the patches of a picture (N, C, H, W) of any layout, and by zeros.

    In the order and with the repeated border of `unetlib.blocks.split_patches`.
    """
    count, channels, height, width = out.shape
    wide = _wide(channels)
    unit, strides = _strides(out)
    _split_patches[(triton.cdiv(count * height * width, 2048 // wide) * triton.cdiv(channels, wide),)](
        x, out, count * height * width, height, width, x.shape[2], x.shape[3], *x.stride(), *strides,
        UNIT=unit, CHANNELS=x.shape[1], WIDTH=channels, SIDE=side, PIXELS=2048 // wide, WIDE=wide,
    )  # fmt: skip


def place_and_pool(x: Tensor, out: Tensor, pooled: Tensor) -> None:
    """Copy x (N, C, H, W) to `out`, any slice of channels, and its 2x2 maxima to `pooled` (N, C, H // 2, W // 2)."""
    count, channels, height, width = x.shape
    windows = count * triton.cdiv(height, 2) * triton.cdiv(width, 2)
    unit, strides = _strides(x, out, pooled)
    wide = _wide(channels)
    _place_and_pool[(triton.cdiv(windows, 1024 // wide) * triton.cdiv(channels, wide),)](
        x, out, pooled, windows, height, width, *strides, UNIT=unit, CHANNELS=channels, WINDOWS=1024 // wide, WIDE=wide
    )


def _logits(x: Tensor, results: int, side: int) -> Tensor:
    """Uninitialised logits (N, classes, H * side, W * side) for a map (N, C, H, W)."""
    count, _, height, width = x.shape
    return torch.empty(count, results // side**2, height * side, width * side, dtype=torch.float32, device=x.device)


def _wide(channels: int) -> int:
    """Channels that a program computes."""
    return min(128, max(16, 1 << (channels - 1).bit_length()))


def _strides(*maps: Tensor) -> tuple[int, list[int]]:
    """The unit, and the strides of N, H and W of each map in it."""
    strides = [x.stride(dim) for x in maps for dim in (0, 2, 3)]
    unit = 8 if all(stride % 8 == 0 for stride in strides) else 1
    return unit, [stride // unit for stride in strides]


# Not compiled anew for sizes that are 1 or multiples of 16: what that would gain is known by UNIT.
_SIZES = ["pixels", "windows", "height", "width", "rows", "columns"]
_SIZES += [f"{name}_{dim}" for name in ("x", "out", "pooled") for dim in "nchw"]
_compiled = triton.jit(do_not_specialize=_SIZES)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _convolved(
    x, weight, bias, n, top, left, row, column, filter, height, width, x_n, x_h, x_w,
    UNIT: tl.constexpr, CHANNELS: tl.constexpr, FILTERS: tl.constexpr, PIXELS: tl.constexpr, DEEP: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """A convolution with its bias and its ReLU, of some pixels and filters."""
    x += (n.to(tl.int64) * x_n + top.to(tl.int64) * x_h + left * x_w) * UNIT
    here = (row * x_h + column * x_w) * UNIT

    # A product of (pixels, 9 * channels) by (9 * channels, filters), of which the first is read where it lies in the map.
    total = tl.zeros((PIXELS, WIDE), tl.float32)
    for first in range(0, 9 * CHANNELS, DEEP):
        depth = first + tl.arange(0, DEEP)
        tap, channel = depth // CHANNELS, depth % CHANNELS
        below, beside = tap // 3 - 1, tap % 3 - 1
        y, z = top + row[:, None] + below[None, :], left + column[:, None] + beside[None, :]
        inside = (y >= 0) & (y < height) & (z >= 0) & (z < width) & (depth < 9 * CHANNELS)[None, :]
        there = (below * x_h + beside * x_w) * UNIT + channel
        pixels = tl.load(x + here[:, None] + there[None, :], mask=inside, other=0.0)
        filters = tl.load(weight + depth[:, None] * FILTERS + filter[None, :])
        total = tl.dot(pixels, filters, total)
    return _larger(total + tl.load(bias + filter)[None, :], 0.0)


@_compiled
def _conv3x3(
    x, out, pooled, weight, bias, height, width,
    x_n, x_h, x_w, out_n, out_h, out_w, pooled_n, pooled_h, pooled_w,
    UNIT: tl.constexpr, CHANNELS: tl.constexpr, FILTERS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEEP: tl.constexpr, WIDE: tl.constexpr, POOL: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = (FILTERS + WIDE - 1) // WIDE
    across, down = tl.cdiv(width, COLUMNS), tl.cdiv(height, ROWS)
    program = tl.program_id(0)
    block, tile = program % blocks, program // blocks
    n, top, left = tile // across // down, tile // across % down * ROWS, tile % across * COLUMNS

    # The pixels of the tile in the order of their 2x2 windows, so that the four of a window lie side by side.
    pixel = tl.arange(0, ROWS * COLUMNS)
    row, column = pixel // (2 * COLUMNS) * 2 + pixel % 4 // 2, pixel // 4 % (COLUMNS // 2) * 2 + pixel % 2
    filter = block * WIDE + tl.arange(0, WIDE)
    total = _convolved(
        x, weight, bias, n, top, left, row, column, filter, height, width, x_n, x_h, x_w,
        UNIT, CHANNELS, blocks * WIDE, ROWS * COLUMNS, DEEP, WIDE,
    )  # fmt: skip

    wanted = (filter < FILTERS)[None, :]
    inside = ((top + row < height) & (left + column < width))[:, None] & wanted
    out += (n.to(tl.int64) * out_n + top.to(tl.int64) * out_h + left * out_w) * UNIT
    places = ((row * out_h + column * out_w) * UNIT)[:, None] + filter[None, :]
    tl.store(out + places, total.to(out.dtype.element_ty), mask=inside)
    if POOL:
        best = tl.reduce(tl.reshape(total, (ROWS * COLUMNS // 4, 4, WIDE)), 1, _larger)
        window = tl.arange(0, ROWS * COLUMNS // 4)
        row, column = window // (COLUMNS // 2), window % (COLUMNS // 2)
        inside = ((top // 2 + row < height // 2) & (left // 2 + column < width // 2))[:, None] & wanted
        pooled += (n.to(tl.int64) * pooled_n + (top // 2).to(tl.int64) * pooled_h + left // 2 * pooled_w) * UNIT
        places = ((row * pooled_h + column * pooled_w) * UNIT)[:, None] + filter[None, :]
        tl.store(pooled + places, best.to(pooled.dtype.element_ty), mask=inside)


@_compiled
def _conv3x3_head(
    x, out, weight, bias, head, head_bias, height, width, x_n, x_h, x_w,
    UNIT: tl.constexpr, CHANNELS: tl.constexpr, RESULTS: tl.constexpr, SIDE: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, DEEP: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    across, down = tl.cdiv(width, COLUMNS), tl.cdiv(height, ROWS)
    tile = tl.program_id(0)
    n, top, left = tile // across // down, tile // across % down * ROWS, tile % across * COLUMNS
    pixel = tl.arange(0, ROWS * COLUMNS)
    row, column = pixel // COLUMNS, pixel % COLUMNS
    filter = tl.arange(0, WIDE)
    total = _convolved(
        x, weight, bias, n, top, left, row, column, filter, height, width, x_n, x_h, x_w,
        UNIT, CHANNELS, WIDE, ROWS * COLUMNS, DEEP, WIDE,
    )  # fmt: skip

    # Few results: a sum over the filters for each, stored where it lies in its patch, and the patch in the picture.
    inside = (top + row < height) & (left + column < width)
    classes: tl.constexpr = RESULTS // (SIDE * SIDE)
    for result in tl.static_range(RESULTS):
        logit = tl.sum(total * tl.load(head + result * WIDE + filter)[None, :], 1) + tl.load(head_bias + result)
        channel, below, beside = result // (SIDE * SIDE), result // SIDE % SIDE, result % SIDE
        line = ((n.to(tl.int64) * classes + channel) * height + top + row) * SIDE + below
        tl.store(out + (line * width + left + column) * SIDE + beside, logit, mask=inside)


@_compiled
def _up_conv2x2(
    x, out, weight, bias, pixels, height, width, x_n, x_h, x_w, out_n, out_h, out_w,
    UNIT: tl.constexpr, CHANNELS: tl.constexpr, FILTERS: tl.constexpr, PIXELS: tl.constexpr,
    DEEP: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = (4 * FILTERS + WIDE - 1) // WIDE
    pixel = tl.program_id(0) // blocks * PIXELS + tl.arange(0, PIXELS)
    result = tl.program_id(0) % blocks * WIDE + tl.arange(0, WIDE)
    n, row, column = (pixel // (height * width)).to(tl.int64), (pixel // width % height).to(tl.int64), pixel % width
    here = (n * x_n + row * x_h + column * x_w) * UNIT

    total = tl.zeros((PIXELS, WIDE), tl.float32)
    for first in range(0, CHANNELS, DEEP):
        depth = first + tl.arange(0, DEEP)
        inside = (pixel < pixels)[:, None] & (depth < CHANNELS)[None, :]
        maps = tl.load(x + here[:, None] + depth[None, :], mask=inside, other=0.0)
        total = tl.dot(maps, tl.load(weight + depth[:, None] * (blocks * WIDE) + result[None, :]), total)
    total += tl.load(bias + result)[None, :]

    # The four places of a pixel, the filters of each side by side.
    filter, below, beside = result % FILTERS, result // FILTERS // 2, result // FILTERS % 2
    there = (n * out_n + 2 * row * out_h + 2 * column * out_w) * UNIT
    places = (below * out_h + beside * out_w) * UNIT + filter
    inside = (pixel < pixels)[:, None] & (result < 4 * FILTERS)[None, :]
    tl.store(out + there[:, None] + places[None, :], total.to(out.dtype.element_ty), mask=inside)


@_compiled
def _place_and_pool(
    x, out, pooled, windows, height, width, x_n, x_h, x_w, out_n, out_h, out_w, pooled_n, pooled_h, pooled_w,
    UNIT: tl.constexpr, CHANNELS: tl.constexpr, WINDOWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = (CHANNELS + WIDE - 1) // WIDE
    across, down = tl.cdiv(width, 2), tl.cdiv(height, 2)
    window = tl.program_id(0) // blocks * WINDOWS + tl.arange(0, WINDOWS)
    channel = tl.program_id(0) % blocks * WIDE + tl.arange(0, WIDE)
    n, row, column = (window // across // down).to(tl.int64), (window // across % down).to(tl.int64), window % across
    wanted = (channel < CHANNELS)[None, :]
    best = tl.full((WINDOWS, WIDE), float("-inf"), x.dtype.element_ty)
    for place in tl.static_range(4):
        y, z = 2 * row + place // 2, 2 * column + place % 2
        inside = ((window < windows) & (y < height) & (z < width))[:, None] & wanted
        here, there = (n * x_n + y * x_h + z * x_w) * UNIT, (n * out_n + y * out_h + z * out_w) * UNIT
        value = tl.load(x + here[:, None] + channel[None, :], mask=inside, other=0.0)
        tl.store(out + there[:, None] + channel[None, :], value, mask=inside)
        best = _larger(best, value)
    there = (n * pooled_n + row * pooled_h + column * pooled_w) * UNIT
    inside = ((window < windows) & (row < height // 2) & (column < width // 2))[:, None] & wanted
    tl.store(pooled + there[:, None] + channel[None, :], best, mask=inside)


@_compiled
def _head(
    x, out, weight, bias, pixels, height, width, x_n, x_h, x_w,
    UNIT: tl.constexpr, CHANNELS: tl.constexpr, RESULTS: tl.constexpr, SIDE: tl.constexpr, PIXELS: tl.constexpr,
    DEEP: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = (RESULTS + WIDE - 1) // WIDE
    pixel = tl.program_id(0) // blocks * PIXELS + tl.arange(0, PIXELS)
    result = tl.program_id(0) % blocks * WIDE + tl.arange(0, WIDE)
    n, row, column = (pixel // (height * width)).to(tl.int64), pixel // width % height, pixel % width
    here = (n * x_n + row.to(tl.int64) * x_h + column.to(tl.int64) * x_w) * UNIT

    total = tl.zeros((PIXELS, WIDE), tl.float32)
    for first in range(0, CHANNELS, DEEP):
        depth = first + tl.arange(0, DEEP)
        inside = (pixel < pixels)[:, None] & (depth < CHANNELS)[None, :]
        maps = tl.load(x + here[:, None] + depth[None, :], mask=inside, other=0.0)
        total = tl.dot(maps, tl.load(weight + depth[:, None] * (blocks * WIDE) + result[None, :]), total)
    total += tl.load(bias + result)[None, :]

    # Where each result lies in its patch, and each patch in the picture.
    channel, below, beside = result // (SIDE * SIDE), result // SIDE % SIDE, result % SIDE
    channels: tl.constexpr = RESULTS // (SIDE * SIDE)
    line = (n[:, None] * channels + channel[None, :]) * height * SIDE + (row[:, None] * SIDE + below[None, :])
    there = line * width * SIDE + column[:, None] * SIDE + beside[None, :]
    tl.store(out + there, total, mask=(pixel < pixels)[:, None] & (result < RESULTS)[None, :])


@_compiled
def _split_patches(
    x, out, pixels, height, width, rows, columns, x_n, x_c, x_h, x_w, out_n, out_h, out_w,
    UNIT: tl.constexpr, CHANNELS: tl.constexpr, WIDTH: tl.constexpr, SIDE: tl.constexpr, PIXELS: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = (WIDTH + WIDE - 1) // WIDE
    pixel = tl.program_id(0) // blocks * PIXELS + tl.arange(0, PIXELS)
    place = tl.program_id(0) % blocks * WIDE + tl.arange(0, WIDE)
    n, row, column = (pixel // (height * width)).to(tl.int64), pixel // width % height, pixel % width
    channel, below, beside = place // (SIDE * SIDE), place // SIDE % SIDE, place % SIDE

    y = tl.minimum(row[:, None] * SIDE + below[None, :], rows - 1).to(tl.int64)
    z = tl.minimum(column[:, None] * SIDE + beside[None, :], columns - 1).to(tl.int64)
    here = n[:, None] * x_n + channel[None, :].to(tl.int64) * x_c + y * x_h + z * x_w
    inside = (pixel < pixels)[:, None]
    value = tl.load(x + here, mask=inside & (channel < CHANNELS)[None, :], other=0.0)
    there = (n * out_n + row.to(tl.int64) * out_h + column.to(tl.int64) * out_w) * UNIT
    tl.store(out + there[:, None] + place[None, :], value.to(out.dtype.element_ty), mask=inside & (place < WIDTH)[None, :])
