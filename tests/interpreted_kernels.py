"""The kernels on the CPU, by Triton's interpreter, which has no bfloat16.

`test_fast_cuda.py` runs this file with TRITON_INTERPRET=1.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from test_fast import error, pictures, trained

from unetlib.blocks import split_patches
from unetlib.fast import cuda, cuda_kernels, network, optimize_for_inference, planner
from unetlib.fast.cuda_kernels import Conv3x3, Conv3x3Head, Head, UpConv2x2, place_and_pool


def drawn(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    numbers = torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)
    return numbers.to(memory_format=torch.channels_last) if len(shape) == 4 else numbers


def buffer(count: int, channels: int, height: int, width: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    """A map of -7 in channels_last, which no ReLU gives."""
    return torch.full((count, height, width, channels), -7.0, dtype=dtype).permute(0, 3, 1, 2)


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    eps = torch.finfo(found.dtype).eps
    torch.testing.assert_close(found.double(), expected, rtol=eps, atol=eps)


def exact(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return F.conv2d(x.double(), weight.double(), bias.double(), padding=1).relu()


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (5, 9)])
@pytest.mark.parametrize(("in_channels", "out_channels"), [(8, 8), (8, 16), (16, 24), (24, 8), (64, 64), (3, 5)])
def test_convolution_fills_its_slice_and_nothing_else(size, in_channels, out_channels):
    weight, bias = drawn(out_channels, in_channels, 3, 3), drawn(out_channels)
    x, both = drawn(2, in_channels, *size), buffer(2, out_channels + 11, *size)
    pooled = buffer(2, out_channels, size[0] // 2, size[1] // 2)
    conv, expected = Conv3x3(weight, bias, rows=4, columns=8), exact(x, weight, bias)
    conv(x, both[:, 8:-3], pooled)
    assert_close(both[:, 8:-3], expected)
    assert (both[:, :8] == -7).all()
    assert (both[:, -3:] == -7).all()
    if min(size) > 1:
        assert_close(pooled, F.max_pool2d(expected, 2))
    alone = buffer(2, out_channels, *size)
    conv(x, alone)
    assert torch.equal(alone, both[:, 8:-3])


def test_convolution_of_a_slice_in_another_type_and_of_many_filters():
    weight, bias, whole = (drawn(*shape, dtype=torch.float32) for shape in ((130, 16, 3, 3), (130,), (1, 40, 3, 5)))
    x, out = whole[:, 8:24], buffer(1, 130, 3, 5, torch.float32)
    Conv3x3(weight, bias, rows=4, columns=8)(x, out)
    torch.testing.assert_close(out.double(), exact(x, weight, bias), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(1, 1), (9, 17)])
@pytest.mark.parametrize(("in_channels", "out_channels"), [(8, 8), (16, 8), (24, 16), (64, 33)])
def test_transposed_convolution_fills_its_slice_and_nothing_else(size, in_channels, out_channels):
    weight, bias, x = drawn(in_channels, out_channels, 2, 2), drawn(out_channels), drawn(2, in_channels, *size)
    for more in (0, 1):  # rows and columns that the place has beyond the doubled map
        both = buffer(2, out_channels + 11, 2 * size[0] + more, 2 * size[1] + more)
        place = both[:, 8:-3, : 2 * size[0], : 2 * size[1]]
        UpConv2x2(weight, bias)(x, place)
        assert_close(place, F.conv_transpose2d(x.double(), weight.double(), bias.double(), stride=2))
        place.fill_(-7)
        assert (both == -7).all()


@pytest.mark.parametrize("channels", [5, 24, 136])
@pytest.mark.parametrize("size", [(1, 1), (9, 17)])
def test_a_map_is_placed_and_pooled(size, channels):
    x, both = drawn(2, channels, *size), buffer(2, channels + 11, *size)
    pooled = buffer(2, channels, size[0] // 2, size[1] // 2)
    place_and_pool(x, both[:, 8:-3], pooled)
    assert torch.equal(both[:, 8:-3], x)
    assert (both[:, :8] == -7).all()
    assert (both[:, -3:] == -7).all()
    if min(size) > 1:
        assert torch.equal(pooled, F.max_pool2d(x, 2))


@pytest.mark.parametrize("side", [1, 2, 3])
@pytest.mark.parametrize("size", [(1, 1), (9, 17)])
@pytest.mark.parametrize(("channels", "classes"), [(8, 1), (24, 3), (64, 1), (72, 2), (8, 150)])
def test_logits_become_pixels(size, channels, classes, side):
    results = classes * side**2
    weight, bias, x = drawn(results, channels, 1, 1), drawn(results), drawn(2, channels, *size)
    expected = F.conv2d(x.double(), weight.double(), bias.double())
    found = Head(weight, bias, side)(x)
    assert found.dtype == torch.float32
    assert found.is_contiguous()
    torch.testing.assert_close(found.double(), F.pixel_shuffle(expected, side), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", [1, 2])
@pytest.mark.parametrize("size", [(1, 1), (5, 9)])
@pytest.mark.parametrize(("in_channels", "out_channels", "classes"), [(8, 8, 1), (16, 24, 3), (64, 64, 1), (3, 5, 2)])
def test_a_convolution_goes_on_to_the_logits(size, in_channels, out_channels, classes, side):
    results = classes * side**2
    weight, bias, x = drawn(out_channels, in_channels, 3, 3), drawn(out_channels), drawn(2, in_channels, *size)
    head, head_bias = drawn(results, out_channels, 1, 1), drawn(results)
    expected = F.conv2d(exact(x, weight, bias), head.double(), head_bias.double())
    found = Conv3x3Head(weight, bias, head, head_bias, side, rows=4, columns=8)(x)
    assert found.dtype == torch.float32
    assert found.is_contiguous()
    torch.testing.assert_close(found.double(), F.pixel_shuffle(expected, side), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("side", [1, 2, 3])
@pytest.mark.parametrize("size", [(2, 3), (9, 17), (8, 12)])
@pytest.mark.parametrize(("channels", "width"), [(3, 32), (1, 16), (3, 27), (32, 288)])
def test_pictures_become_patches(size, channels, width, side, dtype):
    x = drawn(2, channels, *size, dtype=dtype)
    expected = split_patches(x, side).half()
    width = max(width, expected.shape[1])
    for layout in (torch.contiguous_format, torch.channels_last):
        out = buffer(2, width, *expected.shape[-2:])
        cuda_kernels.split_patches(x.to(memory_format=layout), out, side)
        assert torch.equal(out[:, : expected.shape[1]], expected)
        assert (out[:, expected.shape[1] :] == 0).all()


def test_what_is_no_number_is_not_hidden():
    x, weight, pooled = drawn(1, 8, 4, 4), drawn(8, 8, 3, 3), buffer(1, 8, 2, 2)
    x[0, 3, 3, 1] = float("nan")
    out = buffer(1, 8, 4, 4)
    Conv3x3(weight, torch.zeros(8), rows=4, columns=8)(x, out, pooled)
    logits = Conv3x3Head(weight, torch.zeros(8), drawn(1, 8, 1, 1), drawn(1), 1, rows=4, columns=8)(x)
    assert torch.equal(logits.isnan(), out.isnan()[:, :1])
    assert torch.equal(out.isnan(), exact(x, weight, torch.zeros(8)).isnan())  # nor seen where it is not
    for _ in range(2):
        assert torch.equal(pooled.isnan()[0, 0], torch.tensor([[False, False], [True, True]]))
        place_and_pool(out, out.clone(), pooled.fill_(0))


@pytest.mark.parametrize(("size", "skip_first", "side"), [((8, 12), False, 1), ((7, 11), True, 1), ((15, 23), True, 2)])
def test_a_network_all_of_kernels(monkeypatch, size, skip_first, side):
    chosen = []

    def milliseconds(function: partial) -> float:
        route = function.func
        chosen.extend((type(route.conv), type(route.head)) if isinstance(route, cuda._Last) else [type(route)])
        return float(chosen[-1] not in (cuda._Kernel, cuda._KernelUp, cuda._KernelLast))

    monkeypatch.setattr(cuda, "_milliseconds", milliseconds)
    monkeypatch.setattr(cuda, "_winners", {})
    monkeypatch.setattr(cuda, "_leaders", {})
    monkeypatch.setattr(planner, "plan", lambda device, dtype: lambda *_: cuda.CudaLevel)
    monkeypatch.setattr(network, "_check_dtype", lambda *_: None)
    model = trained(features=(8,), skip_first=skip_first, patch_size=side)
    x = pictures(model, *size)
    fast = optimize_for_inference(model, dtype=torch.float16)
    assert error(fast(x), model(x)) <= 5e-3
    assert fast._ends[cuda.CudaLevel]._kernel_is_right == {torch.float32: True}
    assert chosen.count(cuda._Kernel) == 7 - side  # right on every layer; of patches two are of one shape
    assert chosen.count(cuda._KernelUp) == 1  # at odd sizes too
    assert chosen.count(cuda._KernelHead) == 2  # after each of the convolutions that a CPU has
    assert chosen.count(cuda._KernelLast) == 1
