from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from needs import needs_halves, needs_native

from unetlib.blocks import join_patches, split_patches
from unetlib.fast import native_kernels
from unetlib.fast.native_kernels import (
    NativeConv,
    NativeDoubling,
    NativeHead,
    available,
    lanes,
    split_picture,
)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def map_of(channels: int, *size: int, pictures: int = 2, seed: int = 1) -> torch.Tensor:
    return random(pictures, channels, *size, seed=seed).to(memory_format=torch.channels_last)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    return float((found.double() - expected).norm() / expected.norm())


@needs_native
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (5, 1), (2, 5), (11, 13), (12, 12), (1, 150), (12, 31), (61, 147)])
@pytest.mark.parametrize(("first", "second", "out"), [(1, 0, 1), (2, 0, 3), (1, 2, 1), (3, 1, 4)])  # in vectors
@pytest.mark.parametrize("relu", [False, True])
def test_a_convolution_is_a_direct_one_of_the_maps_side_by_side(size, first, second, out, relu):
    first, second, out = (count * lanes() for count in (first, second, out))
    weight, bias, x = random(out, first + second, 3, 3), random(out), map_of(first, *size)
    beside = map_of(second, *size, seed=2) if second else None
    both = x if beside is None else torch.cat((x, beside), dim=1)
    expected = F.conv2d(both.double(), weight.double(), bias.double(), padding=1)
    found = NativeConv(weight, bias, relu=relu)(x, beside)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert error(found, expected.relu() if relu else expected) <= 2e-6


@pytest.mark.parametrize("halves", [pytest.param(False, marks=needs_native), pytest.param(True, marks=needs_halves)])
@pytest.mark.parametrize("size", [(2, 2), (7, 9), (12, 12), (13, 15), (61, 147)])
def test_the_pooled_map_is_that_of_the_result(size, halves):
    width = lanes()
    x, pooled = map_of(width, *size), map_of(width, size[0] // 2, size[1] // 2)
    found = NativeConv(random(width, width, 3, 3), random(width), relu=True, halves=halves)(x, pooled=pooled)
    assert torch.equal(pooled, F.max_pool2d(found, 2))


@needs_native
@pytest.mark.parametrize("size", [(9, 9), (20, 20)])  # directly, and by tiles
@pytest.mark.parametrize("place", [(4, 4), (4, 5), (5, 4), (5, 5)])
def test_nan_is_pooled_wherever_it_lies_in_a_window(size, place):
    width = lanes()
    x, pooled = map_of(width, *size), map_of(width, size[0] // 2, size[1] // 2)
    x[..., place[0], place[1]] = float("nan")
    found = NativeConv(random(width, width, 3, 3), random(width), relu=True)(x, pooled=pooled)
    assert torch.equal(pooled.isnan(), F.max_pool2d(found, 2).isnan())


def rounded(x: torch.Tensor) -> torch.Tensor:
    """To the nearest number of bfloat16."""
    return x.bfloat16().double()


def in_halves(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Winograd's method with what is multiplied in bfloat16, from its formula: Y = A' [(G g G') * (B' d B)] A."""
    root, (height, width) = 2**0.5, x.shape[-2:]
    points, unit = torch.tensor([0, 1 / root, -1 / root, root, -root], dtype=torch.float64), torch.eye(6, dtype=torch.float64)
    a = torch.cat(
        (points[:, None] ** torch.arange(4), unit[:1, [1, 2, 3, 0]])
    ).T  # values of a polynomial, and the last coefficient
    g = torch.tensor(native_kernels._WEIGHTS, dtype=torch.float64)
    # With a kernel of a single tap, its k-th one, the result is d moved by k, which determines B'.
    taps, moved = torch.cat([a * g[:, k] for k in range(3)]), torch.cat([unit[k : k + 4] for k in range(3)])
    b = torch.linalg.lstsq(taps, moved).solution
    windows = F.pad(x.double(), (1, -width % 4 + 1, 1, -height % 4 + 1)).unfold(2, 6, 4).unfold(3, 6, 4)
    windows = rounded(torch.einsum("ia,ncyxab,jb->ncyxij", b, windows, b))
    kernels = rounded(torch.einsum("ia,ocab,jb->ocij", g, weight.double(), g))
    tiles = torch.einsum("ai,noyxij,bj->noyaxb", a, torch.einsum("ncyxij,ocij->noyxij", windows, kernels), a)
    return tiles.flatten(4, 5).flatten(2, 3)[..., :height, :width]


@needs_halves
@pytest.mark.parametrize("size", [(12, 13), (61, 147)])
@pytest.mark.parametrize("threads", [1, 9])
def test_halves_multiply_numbers_of_bfloat16(size, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)  # more of them take small maps in stages
    weight, x, beside = random(48, 80, 3, 3), map_of(48, *size), map_of(32, *size, seed=2)
    both = torch.cat((x, beside), dim=1)
    found = NativeConv(weight, torch.zeros(48), relu=False, halves=True)(x, beside)
    assert error(found, in_halves(both, weight)) <= 1e-4
    assert 5e-3 <= error(found, F.conv2d(both.double(), weight.double(), padding=1)) <= 2e-2


@needs_halves
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (7, 9)])
def test_halves_of_small_maps_are_direct(size):
    weight, bias, x, beside = random(16, 48, 3, 3), random(16), map_of(16, *size), map_of(32, *size, seed=2)
    found = NativeConv(weight, bias, relu=True, halves=True)(x, beside)
    expected = F.conv2d(rounded(torch.cat((x, beside), dim=1)), rounded(weight), bias.double(), padding=1)
    assert error(found, expected.relu()) <= 1e-6


@needs_native
def test_large_maps_go_past_the_caches():
    width = lanes()
    weight, x = random(width, width, 3, 3), map_of(width, 600, 901, pictures=1)
    assert x.numel() >= 4 * 2**20
    expected = F.conv2d(x.double(), weight.double(), padding=1)
    assert error(NativeConv(weight, torch.zeros(width), relu=False)(x), expected) <= 2e-6


@pytest.mark.parametrize("halves", [pytest.param(False, marks=needs_native), pytest.param(True, marks=needs_halves)])
@pytest.mark.parametrize("size", [(9, 9), (13, 13)])
def test_not_a_number_stays_one(size, halves):
    width, x = lanes(), map_of(lanes(), *size)
    x[0, 3, 4, 4] = float("nan")
    found = NativeConv(random(width, width, 3, 3), random(width), relu=True, halves=halves)(x)
    assert found[0, :, 4, 4].isnan().all()
    assert not found[1].isnan().any()


@needs_native
@pytest.mark.parametrize("size", [(1, 1), (3, 5), (9, 30)])
@pytest.mark.parametrize(("more_rows", "more_columns"), [(0, 0), (1, 0), (0, 1), (1, 1), (2, 3)])
@pytest.mark.parametrize("replicate", [False, True])
def test_doubling_is_a_transposed_convolution_and_goes_on_beyond(size, more_rows, more_columns, replicate):
    channels, out = 5, 3 * lanes()
    weight, bias, x = random(channels, out, 2, 2), random(out), map_of(channels, *size)
    height, width = (2 * side for side in size)
    found = NativeDoubling(weight, bias)(x, height + more_rows, width + more_columns, replicate=replicate)
    doubled = F.conv_transpose2d(x.double(), weight.double(), bias.double(), stride=2)
    expected = F.pad(doubled, (0, more_columns, 0, more_rows), mode="replicate" if replicate else "constant")
    assert error(found, expected) <= 1e-6


@needs_halves
@pytest.mark.parametrize("size", [(1, 1), (9, 30)])
def test_doubling_in_halves_multiplies_numbers_of_bfloat16(size):
    channels, out = 3 * lanes(), 2 * lanes()
    weight, bias, x = random(channels, out, 2, 2), random(out), map_of(channels, *size)
    found = NativeDoubling(weight, bias, halves=True)(x, *(2 * side + 1 for side in size))
    expected = F.conv_transpose2d(rounded(x), rounded(weight), bias.double(), stride=2)
    assert error(found, F.pad(expected, (0, 1, 0, 1))) <= 1e-6


@needs_native
@pytest.mark.parametrize("side", [1, 2, 3])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "slice", "turned"])
def test_a_split_picture_is_its_patches_and_zeros(side, layout):
    x = {
        "contiguous": random(2, 3, 40, 71),
        "channels_last": map_of(3, 40, 71),
        "slice": random(2, 5, 90, 80)[:, 1:4, 2:42, 5:76],
        "turned": random(2, 3, 71, 40).transpose(2, 3),
    }[layout]
    found, channels = split_picture(x, side, 3 * side**2 + 4), 3 * side**2
    assert torch.equal(found[:, :channels], split_patches(x, side))
    assert not found[:, channels:].any()
    assert torch.equal(split_picture(x, side, 2), split_patches(x, side)[:, :2])


@needs_native
@pytest.mark.parametrize("side", [1, 2, 3])
@pytest.mark.parametrize(("channels", "classes"), [(5, 1), (32, 3), (8, 20)])
def test_the_head_is_a_convolution_of_one_pixel_whose_results_are_joined(side, channels, classes):
    weight, bias, x = random(classes * side**2, channels, 1, 1), random(classes * side**2), map_of(channels, 9, 30)
    size = 9 * side - side // 2, 30 * side - side // 3
    expected = join_patches(F.conv2d(x.double(), weight.double(), bias.double()), side, size)
    found = NativeHead(weight, bias, side)(x, size)
    assert found.is_contiguous()
    assert error(found, expected) <= 1e-6


@needs_native
def test_results_do_not_depend_on_the_threads():
    width, before = 4 * lanes(), torch.get_num_threads()
    conv, maps, found, operations = (
        NativeConv(random(width, width, 3, 3), random(width), relu=True),
        [map_of(width, 61, 47), map_of(width, 12, 13), map_of(width, 6, 7)],
        [],
        set(),
    )
    try:
        for threads in (1, 2, 9):
            torch.set_num_threads(threads)
            operations |= {conv._operation(*x.shape[::2], x.shape[-1])[0] for x in maps}
            found.append([conv(x) for x in maps])
    finally:
        torch.set_num_threads(before)
    assert operations == {"convolve", "convolve_in_stages", "convolve_directly"}
    assert all(torch.equal(result, first) for results in found for result, first in zip(results, found[0]))


@needs_native
def test_callers_side_by_side_do_not_disturb_each_other():
    width = lanes()
    conv, maps = NativeConv(random(width, width, 3, 3), random(width), relu=True), [map_of(width, 50 + n, 60) for n in range(4)]
    expected = [conv(x) for x in maps]
    with ThreadPoolExecutor(len(maps)) as pool:
        found = list(pool.map(lambda x: [conv(x) for _ in range(20)], maps))
    assert all(torch.equal(result, one) for results, one in zip(found, expected) for result in results)


@needs_native
def test_code_for_cpus_without_avx512():
    """In a process of its own, whose PyTorch takes the CPU for one of those."""
    code = """
import torch
from unetlib import UNet
from unetlib.fast import native_kernels, optimize_for_inference, planner
from unetlib.fast.native import NativeLevel
assert native_kernels.available()
planner.plan = lambda *_: lambda *_: NativeLevel
model, x = UNet(features=(16, 24)).eval(), torch.rand(2, 3, 61, 77)
found, expected = optimize_for_inference(model)(x), model(x)
assert not native_kernels.has_halves()
if torch.ops.mkldnn._is_mkldnn_bf16_supported():
    assert torch.equal(optimize_for_inference(model, dtype=torch.bfloat16)(x), optimize_for_inference(model)(x))
print(native_kernels.lanes(), float((found - expected).norm() / expected.norm()))
"""
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "avx2"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    width, difference = done.stdout.split()
    assert width == "8"
    assert float(difference) <= 1e-5


# --- whether they are right


@needs_native
def test_here_it_is_available():
    assert available()


@needs_halves
def test_products_in_bfloat16_are_checked_too(monkeypatch):
    packed = native_kernels._packed
    monkeypatch.setattr(
        native_kernels, "_packed", lambda weights, halves=False: packed(weights, halves=halves) * (0 if halves else 1)
    )
    assert not available.__wrapped__()


@needs_native
def test_code_that_computes_something_else_is_not_used(monkeypatch):
    monkeypatch.setattr(NativeDoubling, "__call__", lambda self, x, height, width: torch.zeros(2, lanes(), height, width))
    assert not available.__wrapped__()
