from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from needs import needs_nnpack

from unetlib.fast import nnpack_kernels
from unetlib.fast.nnpack_kernels import NnpackConv, available


def layer(in_channels: int, out_channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(in_channels)
    return torch.randn(out_channels, in_channels, 3, 3, generator=generator), torch.randn(out_channels, generator=generator)


def exact(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return F.conv2d(x.double(), weight.double(), bias.double(), padding=1)


@needs_nnpack
@pytest.mark.parametrize("size", [(1, 1), (2, 5), (6, 6), (7, 13), (12, 31), (61, 47)])
@pytest.mark.parametrize(("in_channels", "out_channels"), [(1, 1), (3, 8), (16, 5), (33, 40)])
@pytest.mark.parametrize("relu", [False, True])
def test_equals_a_direct_convolution(size, in_channels, out_channels, relu):
    weight, bias = layer(in_channels, out_channels)
    conv = NnpackConv(weight, bias, relu=relu)
    x = torch.rand(2, in_channels, *size, generator=torch.Generator().manual_seed(1))
    expected = exact(x, weight, bias)
    expected = expected.relu() if relu else expected
    for _ in range(3):  # the later calls take the weights as transformed once
        assert (conv(x) - expected).norm() <= 1e-5 * exact(x, weight, bias).norm()


@needs_nnpack
def test_writes_into_a_slice_of_channels_and_nowhere_else():
    weight, bias = layer(4, 6)
    x, both = torch.rand(2, 4, 20, 30), torch.full((2, 11, 20, 30), -7.0)
    place = both[:, 3:9]
    assert NnpackConv(weight, bias, relu=False)(x, place) is place
    torch.testing.assert_close(place.double(), exact(x, weight, bias), rtol=1e-4, atol=1e-4)
    assert (both[:, :3] == -7).all()
    assert (both[:, 9:] == -7).all()


@needs_nnpack
@pytest.mark.parametrize("size", [(61, 47), (12, 200), (5, 90)])
def test_large_maps_are_taken_in_strips(monkeypatch, size):
    weight, bias = layer(5, 7)
    x, conv = torch.rand(2, 5, *size), NnpackConv(weight, bias, relu=False)
    whole = conv(x)
    needed = conv._workspace_size(*conv._kernel(*size), *size)
    monkeypatch.setattr(nnpack_kernels, "MOST_WORKSPACE", needed // 3)
    strips = []
    monkeypatch.setattr(conv, "_run", lambda *args: strips.append(args[2].shape) or NnpackConv._run(conv, *args))
    torch.testing.assert_close(conv(x), whole, rtol=1e-5, atol=1e-5)
    assert len(strips) >= 2 * (2 if size[0] > 6 else 1)


@needs_nnpack
def test_small_maps_keep_transformed_weights_from_the_second_call_on_and_large_ones_none():
    conv = NnpackConv(*layer(8, 8), relu=True)
    conv(torch.rand(1, 8, 200, 200))
    conv(torch.rand(1, 8, 200, 200))
    assert conv._transformed is None
    conv(torch.rand(1, 8, 20, 20))
    assert conv._transformed is None
    conv(torch.rand(1, 8, 20, 20))
    assert conv._transformed is not None


@needs_nnpack
def test_threads_side_by_side_do_not_disturb_each_other():
    conv, xs = NnpackConv(*layer(8, 8), relu=True), [torch.rand(1, 8, 50 + n, 60) for n in range(4)]
    expected = [conv(x) for x in xs]
    with ThreadPoolExecutor(len(xs)) as pool:
        found = list(pool.map(lambda x: [conv(x) for _ in range(20)], xs))
    assert all(torch.equal(result, one) for results, one in zip(found, expected) for result in results)


@needs_nnpack
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_process_has_threads_of_its_own():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        conv, x = NnpackConv(*layer(8, 8), relu=True), torch.rand(1, 8, 40, 40)
        expected = conv(x)
        child = os.fork()
        if child == 0:
            torch.set_num_threads(2)
            os._exit(0 if torch.equal(conv(x), expected) else 1)
        assert os.waitpid(child, 0)[1] == 0
    finally:
        torch.set_num_threads(before)


@needs_nnpack
def test_here_it_is_available():
    assert available()


def test_a_pytorch_without_nnpack_is_no_error(monkeypatch):
    def missing():
        raise OSError("no such library")

    monkeypatch.setattr(nnpack_kernels, "_nnpack", missing)
    assert available.__wrapped__() is False


@needs_nnpack
def test_a_library_that_computes_something_else_is_not_used(monkeypatch):
    monkeypatch.setattr(NnpackConv, "__call__", lambda self, x: torch.zeros(len(x), 7, *x.shape[-2:]))
    assert available.__wrapped__() is False
