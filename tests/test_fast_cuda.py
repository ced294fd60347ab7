from __future__ import annotations

import os
import subprocess
import sys
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_fast import OPTIONS, error, on_cuda, pictures, trained

from unetlib.blocks import split_patches
from unetlib.fast import cuda, network, optimize_for_inference, planner, replays
from unetlib.fast.cuda import CudaLevel, fastest
from unetlib.fast.folding import Layer


@pytest.fixture(autouse=True)
def _forget(monkeypatch):
    """Every test makes its own trials."""
    monkeypatch.setattr(cuda, "_winners", {})
    monkeypatch.setattr(cuda, "_leaders", {})
    monkeypatch.setattr(cuda, "_untried", set())


@pytest.fixture
def cuda_level(monkeypatch):
    """Every level in the way of CUDA."""
    monkeypatch.setattr(planner, "plan", lambda device, dtype: lambda *_: CudaLevel)


@pytest.fixture
def stand_ins(monkeypatch):
    """The calls of the routes that a CPU lacks, by PyTorch's own operations; the list of what was called."""
    called = []

    def cudnn(x, weight, bias, stride, padding, dilation, groups):
        assert x.is_contiguous(memory_format=torch.channels_last)
        called.append("cudnn")
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups).relu()

    monkeypatch.setattr(torch, "cudnn_convolution_relu", cudnn)
    monkeypatch.setattr(cuda, "_milliseconds", lambda function: 1.0)
    return called


def prefer(monkeypatch, *wanted):
    """The trial finds these routes the fastest, where they are right."""
    monkeypatch.setattr(cuda, "_milliseconds", lambda function: float(type(function.func) not in wanted))


@pytest.mark.parametrize("size", [(40, 56), (37, 51)])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gives_the_logits_of_the_model(cuda_level, stand_ins, monkeypatch, options, size):
    prefer(monkeypatch, cuda._Cudnn, cuda._ProductUp)
    model = trained(**options)
    x = pictures(model, *size)
    fast = optimize_for_inference(model)
    for _ in range(2):
        found = fast(x)
        assert found.dtype == torch.float32
        assert error(found, model(x)) <= 1e-5
    with_relu = options.get("activation", "relu") == "relu" and options.get("norm", "batch") in ("batch", "none")
    winners = set(cuda._winners.values())
    assert (cuda._Cudnn in winners) == bool(stand_ins) == with_relu
    assert (cuda._ProductUp in winners) == (options.get("upsample", "transpose") == "transpose")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(cuda_level, stand_ins, monkeypatch, dtype):
    monkeypatch.setattr(network, "_check_dtype", lambda *_: None)
    prefer(monkeypatch, cuda._Cudnn, cuda._ProductUp)
    model = trained()
    x = pictures(model, 40, 56)
    found = optimize_for_inference(model, dtype=dtype)(x)
    assert stand_ins
    assert error(found, model(x)) <= {torch.bfloat16: 3e-2, torch.float16: 5e-3}[dtype]


def test_without_any_of_the_libraries_there_is_the_plain_route(cuda_level, monkeypatch):
    monkeypatch.setitem(sys.modules, "unetlib.fast.cuda_kernels", None)  # as where there is no Triton
    monkeypatch.setattr(cuda, "_milliseconds", lambda function: 1.0)
    model = trained()
    x = pictures(model, 40, 56)
    assert error(optimize_for_inference(model)(x), model(x)) <= 1e-5
    last = cuda._lasts(1, True, True, 1)
    assert set(cuda._winners.values()) == {cuda._Plain, cuda._PlainUp, last[0]}


def test_compiling_for_cuda_leaves_convolutions_to_cudnn_and_graphs_to_replays(monkeypatch):
    seen, compile = {}, torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: seen.update(options) or compile(function, **options))
    assert callable(network._compiled(torch.relu, torch.device("cuda")))  # PyTorch refuses options that it does not know
    assert seen["dynamic"] is False
    assert seen["options"]["max_autotune"]
    assert seen["options"]["max_autotune_conv_backends"] == "ATEN"
    assert not seen["options"].get("triton.cudagraphs")


# --- the trial


def layer(in_channels: int = 8, out_channels: int = 8) -> Layer:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out_channels, in_channels, 3, 3, generator=generator)
    return Layer(weight, torch.randn(out_channels, generator=generator), (torch.nn.ReLU(),))


def a_map(channels: int = 8) -> torch.Tensor:
    return torch.rand(2, channels, 9, 13).to(memory_format=torch.channels_last)


class Unfinished(cuda._Plain):
    """Leaves the last row of the result as the memory was."""

    def convolve(self, x):
        out = torch.empty_like(super().convolve(x)).fill_(torch.nan)
        out[:, :, :-1] = super().convolve(x)[:, :, :-1]
        return out


class WrongAtTheBorder(cuda._Plain):
    def convolve(self, x):
        out = super().convolve(x)
        out[:, :, -1, -1] *= 1.5
        return out


class Overflowing(cuda._Plain):
    """Writes beside its place."""

    def put(self, y, place):
        torch.as_strided(place, place.shape, place.stride(), place.storage_offset() + 1).copy_(y)
        return super().put(y, place)


class Pitchless(cuda._Plain):
    """Takes a place for a map of its own height and width."""

    def put(self, y, place):
        height, width = place.shape[-2:]
        total = place.stride(3)
        strides = (total * width * height, 1, total * width, total)
        torch.as_strided(place, place.shape, strides, place.storage_offset()).copy_(y)
        return F.max_pool2d(y, 2)


class Forgetful(cuda._Plain):
    """Pools and leaves the place as it was."""

    def put(self, y, place):
        return F.max_pool2d(y, 2)


class Failing(cuda._Plain):
    def convolve(self, x):
        raise RuntimeError("no engine for this")


class Right(cuda._Plain):
    pass


@pytest.mark.parametrize("wrong", [Unfinished, WrongAtTheBorder, Failing])
def test_a_route_that_is_wrong_is_left_out_however_fast(monkeypatch, wrong):
    monkeypatch.setattr(cuda, "_milliseconds", lambda function: -float([cuda._Plain, Right, wrong].index(type(function.func))))
    assert fastest((cuda._Plain, wrong), layer(), a_map(), None) is cuda._Plain
    assert fastest((cuda._Plain, wrong, Right), layer(), a_map(), None) is Right


def test_a_route_that_writes_beside_its_place_or_not_into_it_is_left_out(monkeypatch):
    monkeypatch.setattr(cuda, "_milliseconds", lambda function: -float(type(function.func) is not cuda._Plain))
    for place in (a_map(20)[:, 4:12], a_map(20)[:, :8], a_map(20)[:, 8:16]):
        for wrong in (Overflowing, Forgetful):
            assert fastest((cuda._Plain, wrong), layer(), a_map(), place) is cuda._Plain
        assert fastest((cuda._Plain, Right), layer(), a_map(), place) is Right


def test_a_route_that_takes_a_place_for_a_whole_map_is_left_out(monkeypatch):
    monkeypatch.setattr(cuda, "_milliseconds", lambda function: -float(type(function.func) is Pitchless))
    larger = torch.empty(2, 20, 10, 14).to(memory_format=torch.channels_last)
    assert fastest((cuda._Plain, Pitchless), layer(), a_map(), a_map(20)[:, 4:12]) is Pitchless
    assert fastest((cuda._Plain, Pitchless), layer(), a_map(), larger[:, 4:12, :9, :13]) is cuda._Plain


def test_the_fastest_wins_and_is_tried_once_for_each_shape(monkeypatch):
    tried = []
    monkeypatch.setattr(cuda, "_milliseconds", lambda function: tried.append(function) or 1.0 / len(tried))
    for _ in range(2):
        assert fastest((cuda._Plain, Right), layer(), a_map(), None) is Right
    assert len(tried) == 2
    fastest((cuda._Plain, Right), layer(), a_map()[:1], None)
    assert len(tried) == 4
    fastest((cuda._Plain, Right), layer(8, 16), a_map(), None)
    assert len(tried) == 6


def test_of_shapes_of_one_size_the_first_decides_what_is_tried(monkeypatch):
    tried, tuned = [], []

    def milliseconds(function):
        tried.append(type(function.func))
        tuned.append(torch.backends.cudnn.benchmark)
        return -float(tried[-1] is Right)

    monkeypatch.setattr(cuda, "_milliseconds", milliseconds)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    routes, x = (cuda._Plain, Failing, cuda._Cudnn, Right), a_map()
    monkeypatch.setattr(
        torch, "cudnn_convolution_relu", lambda x, weight, bias, *_: F.conv2d(x, weight, bias, padding=1).relu()
    )
    assert fastest(routes, layer(), x, None) is Right
    assert tried == [cuda._Plain, cuda._Cudnn, Right]
    assert fastest(routes, layer(), x[:, :, :, 1:], None) is Right
    assert tried[3:] == [cuda._Plain, Right]
    assert tuned == [True] * 3 + [False] * 2
    fastest(routes, layer(), x[:, :, :4, :4], None)  # a quarter of the size
    assert len(tried) == 8
    monkeypatch.setattr(Right, "convolve", Unfinished.convolve)
    assert fastest(routes, layer(), x[:, :, 1:], None) is cuda._Plain  # what was right once proves itself again


def test_trials_of_two_threads_leave_cudnns_switch_as_it_was(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(cuda, "_milliseconds", lambda function: time.sleep(0.05 * len(function.args[0])) or 1.0)
    with ThreadPoolExecutor(2) as pool:  # the one that begins first ends first
        list(pool.map(lambda n: fastest((cuda._Plain, Right), layer(), a_map()[:n], None), (1, 2)))
    assert not torch.backends.cudnn.benchmark


def test_a_trial_is_made_with_frozen_flags_too(monkeypatch):
    tuned = []
    monkeypatch.setattr(cuda, "_milliseconds", lambda function: tuned.append(torch.backends.cudnn.benchmark) or 1.0)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    with monkeypatch.context() as frozen:
        # As torch.backends.disable_global_flags() does, for good.
        frozen.setitem(torch.backends.flags_frozen.__globals__, "__allow_nonbracketed_mutation_flag", False)
        assert torch.backends.flags_frozen()
        fastest((cuda._Plain, Right), layer(), a_map(), None)
        assert tuned == [True, True]
        assert not torch.backends.cudnn.benchmark


def test_the_shapes_that_are_remembered_are_bounded(monkeypatch):
    tried = []
    monkeypatch.setattr(cuda, "_milliseconds", lambda function: tried.append(function) or 1.0)
    monkeypatch.setattr(cuda, "_KEPT", 3)
    for width in (9, 10, 11, 12, 13):
        fastest((cuda._Plain, Right), layer(), a_map()[..., :width], None)
    assert len(cuda._winners) == 3
    count = len(tried)
    fastest((cuda._Plain, Right), layer(), a_map()[..., :13], None)
    assert len(tried) == count


def test_an_autocast_around_it_changes_nothing(cuda_level, stand_ins):
    model = trained(features=(8, 16))
    fast, x = optimize_for_inference(model, dtype=torch.bfloat16), pictures(model, 37, 51)
    with torch.autocast("cpu", dtype=torch.float16):
        found = fast(x)
    assert torch.equal(found, fast(x))
    assert error(found, model(x)) <= 3e-2


@pytest.mark.parametrize("channels", [8, 256])
def test_a_trial_is_of_numbers_about_1(channels):
    """Of which errors are told from roundings."""
    case = cuda._Case(layer(channels, channels), a_map(channels), None)
    (found,) = case.run(cuda._Plain(replace(case.layer, after=()), torch.float32))
    assert 1 < found.std() < 2


def test_what_is_timed_lies_between_two_events_behind_a_wait(monkeypatch):
    called, times = [], iter([3.0, 2.0, 1.0, 5.0, 4.0])

    class Event:
        def __init__(self, *, enable_timing):
            assert enable_timing

        def record(self):
            called.append("record")

        def synchronize(self):
            called.append("synchronize")

        def elapsed_time(self, ended):
            return next(times)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: called.append("wait"))
    assert cuda._milliseconds(lambda: called.append("run")) == 1.0
    assert called == ["wait", "record", "run", "record", "synchronize"] * 5


def test_a_trial_leaves_no_trace(monkeypatch):
    monkeypatch.setattr(cuda, "_milliseconds", lambda function: 1.0)
    before, state, of_layer = a_map(20), torch.get_rng_state(), layer()
    whole, weight = before.clone(memory_format=torch.preserve_format), of_layer.weight.clone()
    x = a_map()
    torch.set_rng_state(state)
    tuned = torch.backends.cudnn.benchmark
    fastest((cuda._Plain, Right), of_layer, x, whole[:, 4:12])
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(whole, before)
    assert torch.equal(of_layer.weight, weight)
    assert torch.backends.cudnn.benchmark == tuned


def test_a_trial_without_memory_gives_the_plain_route_and_is_made_once_more(monkeypatch):
    prefer(monkeypatch, Right)
    tries = []

    def full(*args):
        tries.append(args)
        raise torch.OutOfMemoryError("CUDA out of memory")

    def found(x):
        return fastest((cuda._Plain, Right), layer(), x, None)

    x, small = a_map(), a_map()[:, :, :4, :4]
    with monkeypatch.context() as short:
        short.setattr(cuda, "_Case", full)
        assert found(small) is cuda._Plain
        for _ in range(3):
            assert found(x) is cuda._Plain
        assert len(tries) == 1 + 2
    assert found(small) is Right  # memory was short for a moment only
    assert found(x) is cuda._Plain  # for this shape it was short twice
    assert found(x[..., 1:]) is Right  # another of its size


def test_only_narrow_layers_try_kernels_of_triton():
    level = object.__new__(CudaLevel)
    level.dtype = torch.bfloat16
    assert cuda._Kernel in level.step(layer(64, 128)).routes
    assert cuda._Kernel not in level.step(layer(128, 136)).routes


def test_only_a_narrow_layer_with_a_relu_and_few_results_is_one_kernel_with_the_head():
    def fused(width: int = 128, results: int = 16, after: tuple[torch.nn.Module, ...] = (torch.nn.ReLU(),)) -> bool:
        last, head = replace(layer(width, width), after=after), torch.nn.Conv2d(width, results, 1)
        routes = cuda.CudaEnds(head, 1, torch.bfloat16, 8, last).last.routes
        return any(route.func is cuda._KernelLast for route in routes)

    assert fused()
    assert not fused(width=136)
    assert not fused(results=17)
    assert not fused(after=(torch.nn.GELU(),))


class WrongHead(cuda._PlainHead):
    def __call__(self, x):
        return super().__call__(x) + 0.5


def test_a_wrong_head_is_left_out(monkeypatch):
    """By drawn weights: beside numbers as large as these, its error would be a rounding."""
    monkeypatch.setattr(cuda, "_milliseconds", lambda function: -float(type(function.func.head) is not cuda._PlainHead))
    plain, wrong, right = (
        partial(cuda._Last, side=1, conv=cuda._Plain, head=head)
        for head in (cuda._PlainHead, WrongHead, type("Other", (cuda._PlainHead,), {}))
    )
    both = cuda._WithHead(*vars(layer()).values(), Layer(torch.full((1, 8, 1, 1), 1e6), torch.full((1,), 1e6), ()))
    assert fastest((plain, wrong), both, a_map(), None) is plain
    assert fastest((plain, wrong, right), both, a_map(), None) is right


@pytest.mark.parametrize("place", [0, 11, 15])
def test_a_kernel_that_splits_wrongly_is_left_out_for_its_type_of_pictures(monkeypatch, place):
    def split(self, x):
        out = torch.zeros(len(x), self.channels, 3, 4)
        out[:, :12] = split_patches(x, 2)
        out[:, place, -1, -1] += x.dtype == torch.float64
        return out

    monkeypatch.setattr(cuda.CudaEnds, "_split", split)
    ends = cuda.CudaEnds(torch.nn.Conv2d(16, 4, 1), 2, torch.float32, 16, layer(16, 16))
    x = torch.rand(2, 3, 5, 7)
    x[0, 1, 2, 3] = torch.nan  # as in the kernel
    for _ in range(2):
        assert ends.split(x).shape[1] == 16
        found = ends.split(x.double())
        torch.testing.assert_close(found, split_patches(x, 2), equal_nan=True)


# --- Triton's kernels


def test_kernels_by_the_interpreter():
    pytest.importorskip("triton")
    file = Path(__file__).with_name("interpreted_kernels.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout


def test_kernels_compile_for_hopper_and_move_16_bytes_at_a_time():
    pytest.importorskip("triton", minversion="3.6")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from unetlib.fast import cuda_kernels

    def ptx(kernel, x="bf16", out="bf16", **constants):
        pointers = {"x": f"*{x}", "out": f"*{out}", "pooled": "*bf16", "weight": "*bf16", "bias": "*fp32"}
        pointers |= {"head": "*fp32", "head_bias": "*fp32"}
        names = kernel.arg_names
        signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names}
        aligned = {(place,): [["tt.divisibility", 16]] for place, name in enumerate(names) if name in pointers}
        values = {(names.index(name),): value for name, value in constants.items()}
        source = ASTSource(kernel, signature, values, aligned)
        return compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm["ptx"]

    tile = {"ROWS": 8, "COLUMNS": 16, "DEEP": 32, "WIDE": 32, "POOL": True}
    for text in (
        ptx(cuda_kernels._conv3x3, UNIT=8, CHANNELS=8, FILTERS=24, **tile),
        ptx(cuda_kernels._up_conv2x2, UNIT=8, CHANNELS=128, FILTERS=24, PIXELS=128, DEEP=64, WIDE=128),
    ):
        assert "wgmma.mma_async" in text
        assert "cp.async.cg.shared.global" in text
        assert "st.global.v4" in text
        assert ".local" not in text
    text = ptx(
        cuda_kernels._conv3x3_head, out="fp32", UNIT=8, CHANNELS=64, RESULTS=4, SIDE=2, ROWS=8, COLUMNS=16, DEEP=64, WIDE=64
    )
    assert "wgmma.mma_async" in text
    assert "cp.async.cg.shared.global" in text
    assert ".local" not in text
    text = ptx(cuda_kernels._head, out="fp32", UNIT=8, CHANNELS=64, RESULTS=4, SIDE=2, PIXELS=128, DEEP=64, WIDE=16)
    assert "mma" in text
    assert "ld.global.v4" in text
    text = ptx(cuda_kernels._split_patches, x="fp32", UNIT=8, CHANNELS=3, WIDTH=16, SIDE=2, PIXELS=128, WIDE=16)
    assert "st.global.v4" in text
    text = ptx(cuda_kernels._place_and_pool, UNIT=8, CHANNELS=24, WINDOWS=32, WIDE=32)
    assert "ld.global.v4" in text
    assert "st.global.v4" in text
    ptx(cuda_kernels._conv3x3, UNIT=1, CHANNELS=3, FILTERS=5, **tile)


# --- CUDA


@on_cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [(37, 51), (64, 96), (160, 240)])
@pytest.mark.parametrize("features", [(8, 16), (16, 32, 64), (24, 40), (64, 128)])
@pytest.mark.parametrize("skip_first", [True, False])
def test_every_route_that_wins_is_right_on_cuda(monkeypatch, dtype, size, features, skip_first):
    model = trained(features=features, skip_first=skip_first).cuda()
    x = pictures(model, *size).cuda()
    tolerance = {torch.bfloat16: 3e-2, torch.float16: 5e-3}[dtype]
    for maker in (cuda._Plain, cuda._Cudnn, cuda._CudnnPlaced, cuda._Kernel):  # each where it can, be it slow or fast
        monkeypatch.setattr(cuda, "_winners", {})
        monkeypatch.setattr(cuda, "_leaders", {})
        prefer(monkeypatch, maker, cuda._KernelUp, cuda._KernelLast)
        fast = optimize_for_inference(model, dtype=dtype)
        poison = torch.full((64, 1024, 1024), float("nan"), device="cuda")  # freed memory holds what a kernel must not read
        del poison
        for _ in range(3):  # called, captured, replayed
            assert error(fast(x), model(x)) <= tolerance


@on_cuda
def test_the_kernels_are_among_the_right_routes_on_cuda():
    if not pytest.importorskip("triton") or torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("needs Triton and a GPU of compute capability 8.0")
    model = trained(features=(16, 32)).cuda()
    times = {}
    original = cuda._milliseconds

    def milliseconds(function):
        route = function.func
        name = type(route).__name__
        if isinstance(route, cuda._Last):
            name = f"{type(route.conv).__name__} {type(route.head).__name__}"
        times[name] = original(function)
        return times[name]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "_milliseconds", milliseconds)
        optimize_for_inference(model, dtype=torch.bfloat16)(pictures(model, 160, 240).cuda())
    of_layers = {"_Plain", "_Cudnn", "_CudnnPlaced", "_Kernel", "_PlainUp", "_ProductUp", "_KernelUp"}
    of_ends = {"_Plain _PlainHead", "_Plain _KernelHead", "_Cudnn _KernelHead", "_Kernel _KernelHead", "_KernelLast"}
    assert set(times) == of_layers | of_ends
    assert all(0 < time < 100 for time in times.values())


@on_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replays_give_what_the_first_call_gives_and_results_stay(dtype):
    model = trained(features=(16, 32)).cuda()
    fast = optimize_for_inference(model, dtype=dtype)
    xs = [pictures(model, *size).cuda() for size in ((64, 96), (37, 51), (64, 96))]
    xs[2] = 1 - xs[2]
    eager = [fast._logits(x).float() for x in xs]
    kept = [fast(x) for _ in range(4) for x in xs]
    assert all(error(found, eager[place % 3]) <= 1e-2 for place, found in enumerate(kept))
    assert len(fast._run._replays) == 2
    assert all(isinstance(replay, replays.CudaReplay) for replay in fast._run._replays.values())
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        found = [fast(x) for x in xs]
    side.synchronize()
    assert all(error(one, other) <= 1e-2 for one, other in zip(found, eager))
    fast.free_memory()
    assert error(fast(xs[0]), eager[0]) <= 1e-2


@on_cuda
def test_a_copy_that_is_gone_has_left_nothing_on_cuda():
    model = trained(features=(16, 32)).cuda()
    fast, x = optimize_for_inference(model, dtype=torch.bfloat16), pictures(model, 64, 96).cuda()
    for _ in range(3):
        fast(x)
    gone = weakref.ref(fast)
    del fast  # without the collector, that is without cycles
    assert gone() is None


@on_cuda
def test_weights_first_made_in_an_outer_capture_are_there_for_later_calls():
    model = trained(features=(16, 32)).cuda()
    fast, x = optimize_for_inference(model, dtype=torch.bfloat16), pictures(model, 64, 96).cuda()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fast(x)
    assert error(fast(x), model(x)) <= 3e-2  # though the graph was never replayed


@on_cuda
def test_within_an_outer_capture_the_work_is_captured_by_it():
    model = trained(features=(16, 32)).cuda()
    fast, x = optimize_for_inference(model, dtype=torch.bfloat16), pictures(model, 64, 96).cuda()
    expected = fast(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = fast(x)
    graph.replay()
    assert error(result, expected) <= 1e-2
