from __future__ import annotations

import copy
import pickle
import platform
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from needs import needs_halves, needs_native, needs_nnpack
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from unetlib import Preprocessing, UNet
from unetlib.fast import levels, native_kernels, network, nnpack_kernels, optimize_for_inference, planner
from unetlib.fast.folding import Parts
from unetlib.fast.levels import PlainLevel
from unetlib.fast.native import NativeLevel
from unetlib.fast.native_replay import NativeReplay
from unetlib.fast.nnpack import NnpackLevel
from unetlib.fast.onednn import OnednnLevel
from unetlib.fast.replays import Replays

OPTIONS = [
    {},
    {"norm": "instance"},
    {"norm": "instance", "affine": False},
    {"norm": "group"},
    {"norm": "none"},
    {"activation": "leaky_relu", "negative_slope": 0.2},
    {"activation": "elu"},
    {"activation": "gelu"},
    {"activation": "silu"},
    {"dropout": 0.5},
    {"upsample": "bilinear"},
    {"upsample": "bilinear", "align_corners": True},
    {"upsample": "nearest"},
    {"upsample": "nearest_conv"},
    {"match": "zeros"},
    {"match": "replicate"},
    {"skip_first": False},
    {"conv_bias": True},
    {"first_norm": False},
    {"bottleneck": 12, "up_features": (9, 10), "mid_features": (11, 7), "decoder_features": (6, 13)},
    {"in_channels": 1, "out_channels": 4},
    {"patch_size": 2, "out_channels": 2},
    {"patch_size": 3, "match": "replicate"},
]
WAYS = {"plain": PlainLevel, "direct": OnednnLevel, "nnpack": NnpackLevel, "native": NativeLevel, "mixed": None}
NEEDS = {"nnpack": needs_nnpack, "mixed": needs_nnpack, "native": needs_native}
on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
fast_bfloat16 = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this CPU has no fast bfloat16 convolutions"
)


def trained(**options) -> UNet:
    """A network with statistics and weights as training leaves them, that is none of them 0 or 1."""
    torch.manual_seed(0)
    model = UNet(**{"features": (8, 16), **options})
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-1, 1)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, -1.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return model.eval()


def pictures(model: UNet, height: int, width: int, count: int = 2) -> torch.Tensor:
    return torch.rand(count, model.config.in_channels, height, width, generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.fixture(
    params=[pytest.param(way, marks=NEEDS[way]) if way in NEEDS else way for way in WAYS],
)
def way(request, monkeypatch):
    """Every level in the way of this name; mixed: the first one direct, the second Winograd's, the bottleneck direct."""
    kinds = {8: OnednnLevel, 16: NnpackLevel}
    monkeypatch.setattr(
        planner, "plan", lambda device, dtype: lambda width, *_: WAYS[request.param] or kinds.get(width, OnednnLevel)
    )
    return request.param


@pytest.mark.parametrize("size", [(40, 56), (37, 51), (4, 4)])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gives_the_logits_of_the_model(way, options, size):
    model = trained(**options)
    x = pictures(model, *(max(side, model.config.stride) for side in size))
    expected = model(x)
    fast = optimize_for_inference(model)
    for _ in range(2):  # the second call finds memory and transformed weights
        found = fast(x)
        assert found.dtype == expected.dtype
        assert found.shape == expected.shape
        assert error(found, expected) <= 1e-5


@needs_native
@pytest.mark.parametrize("size", [(40, 56), (37, 51)])
@pytest.mark.parametrize(
    "options",
    [*OPTIONS, {"features": (24, 32), "up_features": (8, 32), "mid_features": (16, 32), "decoder_features": (16, 32)}],
    ids=str,
)
def test_gives_the_logits_of_the_model_where_channels_are_whole_vectors(monkeypatch, options, size):
    monkeypatch.setattr(planner, "plan", lambda device, dtype: lambda *_: NativeLevel)
    model = trained(**{"features": (16, 32)} | options)
    x = pictures(model, *size)
    fast = optimize_for_inference(model)
    for _ in range(3):  # the third one is a replay, where all is native
        assert error(fast(x), model(x)) <= 1e-5


@needs_native
@pytest.mark.parametrize(
    ("options", "replayed"),
    [
        ({}, True),
        ({"match": "zeros"}, True),
        ({"match": "resize"}, False),
        ({"norm": "group"}, False),
        ({"upsample": "bilinear"}, False),
    ],
)
def test_native_passes_of_small_pictures_are_replayed(monkeypatch, options, replayed):
    monkeypatch.setattr(planner, "plan", lambda device, dtype: lambda *_: NativeLevel)
    model = trained(**{"features": (16, 32), "patch_size": 2, "match": "replicate"} | options)
    fast = optimize_for_inference(model)
    xs = [
        pictures(model, 37, 51),
        pictures(model, 40, 52, count=1),
        pictures(model, 37, 51).to(memory_format=torch.channels_last),
    ]
    for x in xs * 3:
        assert error(fast(x), model(x)) <= 1e-5
    kept = fast._memory.replays._replays.values()
    assert [isinstance(replay, NativeReplay) for replay in kept] == [replayed] * 3
    fast.free_memory()
    assert not fast._memory.replays._replays
    large = pictures(model, 1024, 640, count=1)
    for _ in range(3):
        fast(large)
    assert not fast._memory.replays._replays


@pytest.mark.parametrize("options", [{"match": "replicate"}, {"norm": "group"}])
def test_recording_loads_no_compiler(options):
    """Of PyTorch, which takes a second. In a process of its own, in which nothing else has."""
    code = f"""
import sys, torch
from unetlib import UNet
from unetlib.fast import optimize_for_inference
fast, x = optimize_for_inference(UNet(features=(16, 32), **{options}).eval()), torch.rand(1, 3, 40, 56)
fast(x)
before = {{*sys.modules}}
fast(x), fast(x)
print(len({{*sys.modules}} - before))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 20


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_a_replay_takes_new_pictures_of_any_type(monkeypatch, dtype):
    monkeypatch.setattr(planner, "plan", lambda device, dtype: lambda *_: NativeLevel)
    model = trained(features=(16, 32), patch_size=2)
    fast = optimize_for_inference(model)
    for x in (pictures(model, 40, 56).to(dtype) + n for n in range(4)):
        found = fast(x)
        assert found.dtype == dtype
        assert error(found, model(x.float())) <= {torch.float16: 2e-3, torch.bfloat16: 2e-2}.get(dtype, 1e-5)


@needs_native
def test_replays_are_of_the_type_of_the_pictures(monkeypatch):
    monkeypatch.setattr(planner, "plan", lambda device, dtype: lambda *_: NativeLevel)
    model = trained(features=(16, 32), patch_size=2)
    fast, x = optimize_for_inference(model), pictures(model, 40, 56)
    for dtype in (torch.float32, torch.float32, torch.float64, torch.float32):  # the second one is recorded
        assert error(fast(x.to(dtype)), model(x)) <= 1e-5


@needs_native
@needs_nnpack
@pytest.mark.parametrize("size", [(40, 56), (4, 4)])  # a bottleneck of one pixel lies alike in both layouts
def test_levels_that_are_not_native_are_not_replayed(monkeypatch, size):
    ways = {16: NativeLevel, 32: NativeLevel, 64: NnpackLevel}
    monkeypatch.setattr(planner, "plan", lambda device, dtype: lambda width, *_: ways[width])
    model = trained(features=(16, 32), bottleneck=64)
    fast = optimize_for_inference(model)
    for x in (pictures(model, *size) + n for n in range(4)):
        assert error(fast(x), model(x)) <= 1e-5


@pytest.mark.parametrize("way", [pytest.param(NativeLevel, marks=needs_native), OnednnLevel])  # the latter looks for NaN before
@pytest.mark.parametrize("size", [(40, 56), (160, 160)])
def test_no_pictures_give_no_logits(monkeypatch, size, way):
    monkeypatch.setattr(planner, "plan", lambda device, dtype: lambda *_: way)
    before = torch.get_num_threads()
    fast = optimize_for_inference(trained(features=(16, 32)))
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for _ in range(3):
                assert fast(torch.rand(0, 3, *size)).shape == (0, 1, *size)
    finally:
        torch.set_num_threads(before)


def test_a_new_thread_leaves_those_of_others_alone():
    fast = optimize_for_inference(trained())
    x, recorded = pictures(trained(), 40, 56), []
    fast._run = Replays(fast._logits, lambda function, x, beside: recorded.append(x) or function)
    fast(x), fast(x)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(fast, x).result()
    fast(x)
    assert len(recorded) == 1


@needs_native
def test_replays_are_of_the_number_of_threads(monkeypatch):
    monkeypatch.setattr(planner, "plan", lambda device, dtype: lambda *_: NativeLevel)
    model, before = trained(features=(16, 32), patch_size=2), torch.get_num_threads()
    fast, x = optimize_for_inference(model), pictures(model, 40, 56)
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            for _ in range(3):
                assert error(fast(x), model(x)) <= 1e-5
    finally:
        torch.set_num_threads(before)
    assert [replay._recording._threads.count for replay in fast._memory.replays._replays.values()] == [1, 3]


@pytest.mark.parametrize("depth", [1, 3, 5])
def test_any_depth(depth):
    model = trained(features=(4,) * depth)
    x = pictures(model, 2**depth * 2 + 1, 2**depth * 3)
    assert error(optimize_for_inference(model)(x), model(x)) <= 1e-5


def test_sizes_may_change_from_call_to_call():
    model = trained(features=(32, 64))
    fast = optimize_for_inference(model)
    for height, width in ((64, 64), (4, 4), (37, 51), (64, 64), (8, 100)):
        x = pictures(model, height, width, count=1)
        assert error(fast(x), model(x)) <= 1e-5


def test_float64_is_exact_to_rounding():
    model = trained().double()
    x = pictures(model, 40, 56).double()
    fast = optimize_for_inference(model)
    assert fast.dtype == torch.float64
    assert error(fast(x), model(x)) <= 1e-14


@fast_bfloat16
def test_bfloat16_computes_in_bfloat16_or_better_and_keeps_the_type_of_the_pictures(way):
    model = trained()
    x = pictures(model, 40, 56)
    fast = optimize_for_inference(model, dtype=torch.bfloat16)
    assert fast.dtype == torch.bfloat16
    found = fast(x)
    assert found.dtype == torch.float32
    assert error(found, model(x)) <= 3e-2
    assert way == "native" or error(found, model(x)) > 1e-5  # the others have levels in bfloat16
    assert fast(x.bfloat16()).dtype == torch.bfloat16


@needs_halves
def test_native_levels_multiply_in_bfloat16_where_the_cpu_can(monkeypatch):
    monkeypatch.setattr(planner, "plan", lambda device, dtype: lambda *_: NativeLevel)
    model = trained(features=(16, 32), patch_size=2)
    x, expected = pictures(model, 101, 80), model(pictures(model, 101, 80))
    fast = optimize_for_inference(model, dtype=torch.bfloat16)
    first, *others = (fast(x) for _ in range(3))
    assert 1e-4 <= error(first, expected) <= 3e-2
    assert all(torch.equal(first, other) for other in others)
    assert error(optimize_for_inference(model)(x), expected) <= 1e-5


@needs_halves
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_native_levels_double_maps_in_their_type(dtype):
    model, x = trained(features=(16, 32)), torch.randn(2, 32, 4, 5).to(memory_format=torch.channels_last)
    up = model.decoder[-1]
    doubling = NativeLevel(Parts.of(model.encoder[0], up), dtype).doubling
    weight = up.upsample.weight.detach().to(dtype).double()
    expected = nn.functional.conv_transpose2d(x.to(dtype).double(), weight, up.upsample.bias.detach().double(), stride=2)
    assert error(doubling(x, 8, 10), expected) <= 1e-6


def test_compiled():
    model = trained(features=(4,))  # compiling takes seconds for each level
    x = pictures(model, 16, 24)
    fast = optimize_for_inference(model, compile=True)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for _ in range(2):
        assert error(fast(x), model(x)) <= 1e-5
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + 1  # the pass as a whole


def test_a_compiler_around_a_copy_leaves_it_alone():
    """In a process of its own, which a traced copy would break down."""
    code = """
import torch
from unetlib import UNet
from unetlib.fast import optimize_for_inference
model, x = UNet(features=(16, 32)).eval(), torch.rand(1, 3, 96, 96)
picture = (255 * x[0]).byte()
with torch.inference_mode():
    expected = model(x).sigmoid()
for before in (0, 2):  # calls, the second of which is recorded
    fast = optimize_for_inference(model)
    for _ in range(before):
        fast(x)
    cases = (fast, x), (lambda x: fast(x).sigmoid(), x), (lambda x: model.predict(x, probabilities=True), picture)
    for function, given in cases:
        compiled = torch.compile(function, backend="eager")
        for _ in range(3):
            found = torch.as_tensor(compiled(given)).reshape(1, 1, 96, 96)
        assert torch.allclose(found.sigmoid() if function is fast else found, expected, atol=2e-3)
"""
    done = subprocess.run([sys.executable, "-W", "error:Dynamo detected", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_model_stays_as_it_is_and_the_copy_does_not_follow_it():
    model = trained().train()
    before = copy.deepcopy(model.state_dict())
    fast, x = optimize_for_inference(model), pictures(model, 40, 56)
    first = fast(x)
    assert model.training
    assert model.encoder[0].act1.inplace
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    assert torch.equal(fast(x), first)


def test_needs_no_gradients_and_gives_results_that_stay():
    model = trained(features=(32,))
    fast, x = optimize_for_inference(model), pictures(model, 40, 56).requires_grad_()
    first = fast(x)
    kept = first.clone()
    fast(torch.zeros_like(x))  # takes the same memory for its maps
    assert not first.requires_grad
    assert torch.equal(first, kept)


@pytest.mark.parametrize("size", [(40, 56), (37, 51)])
def test_results_may_be_changed_and_derived_from(way, size):
    model = trained()
    fast, x, temperature = optimize_for_inference(model), pictures(model, *size), torch.ones((), requires_grad=True)
    for _ in range(3):
        (fast(x).add_(1) * temperature).sum().backward()
    with torch.inference_mode():
        assert fast(x).is_inference()  # where nothing is derived, nothing is copied
    assert temperature.grad == pytest.approx(3 * float((model(x) + 1).sum()), rel=1e-4)


def test_a_graph_would_lack_native_code_and_is_refused():
    fast, x = optimize_for_inference(trained()), pictures(trained(), 40, 56)
    fast(x)  # so that all is native, of which PyTorch sees nothing
    for graph in (torch.jit.trace, partial(torch.export.export, strict=False), lambda fast, xs: make_fx(fast)(*xs)):
        with pytest.raises(TypeError, match=r"a fast copy cannot be traced or exported, .*; take the UNet"):
            graph(fast, (x,))
    assert fast(x).shape == (2, 1, 40, 56)


class Around(torch.Tensor):
    """A tensor around another, as one of `torch.distributed` is."""

    @staticmethod
    def __new__(cls, x: torch.Tensor) -> Around:
        return torch.Tensor._make_wrapper_subclass(cls, x.shape, dtype=x.dtype, device=x.device)

    __torch_dispatch__ = None  # is never asked


@needs_native
def test_tensors_without_memory_are_refused(monkeypatch):
    """The address of a fake one is 0, and that of one around another, which ended the process."""
    monkeypatch.setattr(planner, "plan", lambda device, dtype: lambda *_: NativeLevel)
    fast, x = optimize_for_inference(trained(features=(16, 32))), pictures(trained(), 40, 56)
    for _ in range(2):
        fast(x)
    with FakeTensorMode() as mode:
        others = [mode.from_tensor(x)]
    for other in (*others, Around(x), torch._efficientzerotensor(x.shape), x.to_sparse()):
        with pytest.raises(TypeError, match=r"takes tensors that lie in memory, .*; take the UNet"):
            fast(other)
    with pytest.raises(TypeError, match="takes tensors that lie in memory"):
        torch.func.vmap(fast)(x[None])


@pytest.mark.parametrize("interrupted", ["Pool", "Replays"])
def test_an_interrupt_on_the_way_to_memory_leaves_nothing_half_done(monkeypatch, interrupted):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    fast, x = optimize_for_inference(trained()), pictures(trained(), 40, 56)
    with monkeypatch.context() as patched:
        patched.setattr(network, interrupted, interrupt)
        with pytest.raises(KeyboardInterrupt):
            fast(x)
    assert fast(x).shape == (2, 1, 40, 56)


@needs_native
def test_memory_is_kept_until_it_is_freed(monkeypatch):
    monkeypatch.setattr(planner, "plan", lambda device, dtype: lambda *_: NativeLevel)
    model = trained(features=(16, 32))
    fast, x = optimize_for_inference(model), pictures(model, 300, 300)  # maps of 2 MiB and more are taken from the pool
    assert fast.kept_bytes == 0
    first = fast(x)
    assert fast.kept_bytes > 4 * 16 * 300 * 300
    fast.free_memory()
    assert fast.kept_bytes == 0
    assert torch.equal(fast(x), first)


@pytest.mark.parametrize("way", [PlainLevel, OnednnLevel])
def test_an_autocast_around_a_copy_changes_nothing(monkeypatch, way):
    monkeypatch.setattr(planner, "plan", lambda device, dtype: lambda *_: way)
    model = trained()
    fast, x = optimize_for_inference(model), pictures(model, 40, 56)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = fast(x)
    assert found.dtype == torch.float32
    assert torch.equal(found, fast(x))


def test_maps_beyond_32_bits_are_resized_by_what_counts_in_64(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.nn.functional, "interpolate", lambda x, **options: asked.append(options) or x)
    for count, channels, height, width in ((99962, 341, 9, 7), (2**31 - 1, 1, 1, 1)):  # numbers: 2**31 - 2 and one more
        x = torch.zeros(1, 1, 1, 1).expand(count, channels, height + 1, width)
        levels.matched(x, torch.zeros(1, 1, height, width), "resize")
    assert [options.get("antialias", False) for options in asked] == [False, True]


def test_a_copy_that_is_gone_has_left_nothing(monkeypatch):
    released = []
    monkeypatch.setattr(network, "keep_freed", lambda: True)
    monkeypatch.setattr(network, "release_freed", lambda: released.append(1))
    fast = optimize_for_inference(trained())
    fast(pictures(trained(), 40, 56))
    gone = weakref.ref(fast)
    assert not released
    del fast  # without the collector, that is without cycles
    assert gone() is None
    assert released == [1]


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from Linux's /proc")
def test_memory_of_direct_convolutions_is_used_again_and_given_back():
    """In a process of its own, whose memory nothing else moves; in pages of 4 KiB."""
    code = """
import resource, torch
from pathlib import Path
from unetlib import UNet
from unetlib.inference import optimize_for_inference
def resident(): return int(Path("/proc/self/statm").read_text().split()[1])
def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
fast, x = optimize_for_inference(UNet(features=(12, 12), bottleneck=12)), torch.rand(1, 3, 1024, 1536)
fast(x[..., :64, :64])  # code and threads
before = resident()
counts = [faults()]
for _ in range(8):
    fast(x)
    counts.append(faults())
print(min(after - now for now, after in zip(counts, counts[1:])), resident() - before, end=" ")
fast.free_memory()
print(resident() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    faults, held, left = map(int, done.stdout.split())
    map_of_a_level = 12 * 1024 * 1536 * 4 // 4096
    assert held > 2 * map_of_a_level
    assert left < map_of_a_level / 2
    if platform.libc_ver()[0] == "glibc":
        assert faults < map_of_a_level / 4


def test_knows_what_predict_needs():
    model = trained()
    model.preprocessing = Preprocessing(size=(32, 48), threshold=0.3)
    fast = optimize_for_inference(model)
    assert fast.config == model.config
    assert fast.preprocessing == model.preprocessing
    with pytest.raises(TypeError, match="must be a Preprocessing"):
        fast.preprocessing = (32, 48)
    with pytest.raises(ValueError, match="std has 2 numbers"):
        fast.preprocessing = Preprocessing(std=(1, 2))
    fast.preprocessing = Preprocessing(threshold=0.4)
    assert (fast.preprocessing.threshold, model.preprocessing.threshold) == (0.4, 0.3)
    assert fast.device == torch.device("cpu")
    assert not fast.training


def test_shapes_that_the_model_refuses_are_refused_with_its_words():
    fast = optimize_for_inference(trained())
    with pytest.raises(ValueError, match="at least 4x4 pixels, got 3x9"):
        fast(torch.zeros(1, 3, 3, 9))
    with pytest.raises(ValueError, match=r"add the batch dimension with x\[None\]"):
        fast(torch.zeros(3, 40, 40))


@pytest.mark.parametrize(
    "options",
    [
        {"features": (8, 12)},
        {"features": (8, 16)},
        {"features": (16, 8)},
        {"features": (16, 32), "decoder_features": (12, 32)},
        {"features": (16, 32), "mid_features": (12, 32)},
    ],
    ids=str,
)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_pictures_that_are_no_numbers_give_no_logits_that_look_right(way, options, bad):
    model = trained(**options)
    fast, x = optimize_for_inference(model), pictures(model, 40, 56)
    x[1, 2, 20, 30] = bad
    for _ in range(3):
        with suppress(ValueError):  # or they are refused
            assert not fast(x)[1].isfinite().all()


@needs_native
@pytest.mark.parametrize("size", [(24, 5), (40, 56)])  # the first one's maps are small enough to be convolved directly
@pytest.mark.parametrize("features", [(16, 32), (16, 8)])  # of the second one a level is oneDNN's
def test_logits_are_nan_wherever_those_of_the_model_are(monkeypatch, features, size):
    monkeypatch.setattr(planner, "plan", lambda device, dtype: lambda *_: NativeLevel)
    model = trained(features=features)
    fast = optimize_for_inference(model)
    for place in range(size[0]):
        x = pictures(model, *size, count=1)
        x[0, 1, place, 2] = float("nan")
        with suppress(ValueError):  # or they are refused
            assert fast(x).isnan()[model(x).isnan()].all()


def test_pictures_whose_nan_would_be_hidden_are_refused(monkeypatch):
    monkeypatch.setattr(planner, "plan", lambda device, dtype: lambda *_: OnednnLevel)
    fast, x = optimize_for_inference(trained()), pictures(trained(), 40, 56)
    x[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"the pictures hold NaN or infinity, .*; mend them, or take the UNet"):
        fast(x)
    assert fast(x[1:]).isfinite().all()
    with pytest.raises(ValueError, match="the pictures hold NaN or infinity"):
        fast(x.double().nan_to_num(1e39))  # infinity in float32


def test_nan_is_not_looked_for_where_it_is_not_hidden(monkeypatch):
    """On CUDA that would wait for the device."""
    monkeypatch.setattr(planner, "plan", lambda device, dtype: lambda *_: PlainLevel)
    fast, x = optimize_for_inference(trained()), pictures(trained(), 40, 56)
    x[0, 0, 0, 0] = float("nan")
    assert fast(x)[0].isnan().any()


def test_integers_and_other_devices_are_refused():
    fast, x = optimize_for_inference(trained()), pictures(trained(), 40, 56)
    for integers in (x.byte(), x.long()):
        with pytest.raises(ValueError, match=f"expected pixels as floats, such as pixels / 255, got {integers.dtype}"):
            fast(integers)
    with pytest.raises(ValueError, match=r"pictures on cpu, where this copy is, got meta; pass x\.to\(fast\.device\)"):
        fast(x.to("meta"))


def test_a_default_device_changes_nothing():
    """In a process of its own, in which nothing has been tried and kept before."""
    code = """
import torch
torch.set_default_device("meta")
from unetlib import UNet
from unetlib.fast import native_kernels, nnpack_kernels, optimize_for_inference, planner
from unetlib.fast.nnpack import NnpackLevel
from unetlib.fast.onednn import OnednnLevel
from unetlib.fast.native import NativeLevel
with torch.device("cpu"):
    model, x = UNet(features=(16, 32), patch_size=2).eval(), torch.rand(1, 3, 300, 420)
ways = {OnednnLevel: True, NativeLevel: native_kernels.available(), NnpackLevel: nnpack_kernels.available()}
print(*map(int, ways.values()))
planner._trial(16, torch.float32, [way for way, there in ways.items() if there])
with torch.inference_mode():
    expected = model(x)
    for way in (way for way, there in ways.items() if there):
        planner.plan = lambda device, dtype: lambda *_: way
        assert torch.allclose(optimize_for_inference(model)(x), expected, atol=1e-4)
        assert (model.predict(x[0], tile=160, overlap=0) == model.predict(x[0])).mean() > 0.5
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1", f"{native_kernels.available():d}", f"{nnpack_kernels.available():d}"]


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_a_default_dtype_changes_nothing(dtype):
    """Before and after something has been tried and kept."""
    code = f"""
import numpy, torch
from unetlib import UNet, Preprocessing
from unetlib.fast import native_kernels, nnpack_kernels, optimize_for_inference, planner
model, x = UNet(features=(16, 32), patch_size=2).eval(), torch.rand(1, 3, 80, 96)
large = torch.rand(1, 3, 600, 800)
model.preprocessing = Preprocessing(mean=0.3, std=0.007)
with torch.inference_mode():
    expected, of_large = model(x), model(large)
later = optimize_for_inference(model)
for first in (False, True):
    if first:
        later(x)
    torch.set_default_dtype(torch.{dtype})
    assert (planner._trial(16, torch.float32, [planner.OnednnLevel]).keys()) == {{planner.OnednnLevel}}
    print(int(native_kernels.available()), int(nnpack_kernels.available()))
    for fast in (later, optimize_for_inference(model)):
        assert fast(x).dtype == torch.float32
        torch.testing.assert_close(fast(x), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(fast(large), of_large, rtol=1e-4, atol=1e-4)
    picture = numpy.random.default_rng(0).integers(0, 256, (80, 96, 3), dtype=numpy.uint8)
    pixels = torch.from_numpy(picture).permute(2, 0, 1)[None].to(torch.float32).div(255).sub(0.3).div(0.007)
    with torch.inference_mode():
        found, plain = model.predict(picture, probabilities=True), model(pixels).sigmoid()[0, 0].numpy()
    assert abs(found - plain).max() < 1e-3
    torch.set_default_dtype(torch.float32)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == 2 * [f"{native_kernels.available():d}", f"{nnpack_kernels.available():d}"]


@pytest.mark.parametrize("travel", [copy.deepcopy, pickle.dumps])
def test_a_copy_does_not_travel(travel):
    with pytest.raises(TypeError, match="take the UNet, and call optimize_for_inference there"):
        travel(optimize_for_inference(UNet(features=(8, 16)).eval()))


@pytest.mark.parametrize("change", [nn.Module.half, nn.Module.double, partial(nn.Module.to, device="meta")])
def test_a_copy_stays_on_its_device_and_in_its_type(change):
    model = trained()
    fast, x = optimize_for_inference(model), pictures(model, 40, 56)
    with pytest.raises(TypeError, match="a fast copy stays on its device and in its type; call optimize_for_inference"):
        change(fast)
    assert fast.to("cpu").float() is fast
    assert error(fast(x), model(x)) <= 1e-5


def test_weights_that_are_not_there_are_refused():
    with torch.device("meta"):
        model = UNet(features=(8, 16))
    with pytest.raises(ValueError, match=r"encoder\.0\.conv1\.weight is on the device meta, .*; load the weights first"):
        optimize_for_inference(model)


def test_pictures_that_are_lazily_negative():
    model, x = trained(features=(16, 32)), torch.rand(1, 3, 64, 96)
    negative = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert negative.is_neg()
    fast = optimize_for_inference(model)
    for _ in range(3):
        assert torch.equal(fast(negative), fast(x))


def test_other_modules_are_refused():
    for wrapper, place in ((nn.DataParallel, "module"), (torch.compile, "_orig_mod")):
        with pytest.raises(
            TypeError, match=rf"expected a UNet, got an? \w+; take it out of its wrapper, as in model\.{place}$"
        ):
            optimize_for_inference(wrapper(trained()))
    with pytest.raises(TypeError, match=r"expected a UNet, got a FastUNet$"):
        optimize_for_inference(optimize_for_inference(trained()))


def test_types_that_the_cpu_is_slow_in_are_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"dtype must be one of .*got torch\.int16"):
        optimize_for_inference(trained(), dtype=torch.int16)

    class NoUnits:
        def __getattr__(self, name):
            return lambda: False

    for operations in (NoUnits(), SimpleNamespace()):  # the latter where PyTorch is built without oneDNN
        monkeypatch.setattr(torch.ops, "mkldnn", operations)
        for dtype in (torch.bfloat16, torch.float16):
            with pytest.raises(ValueError, match=f"this CPU has no fast convolutions in {dtype}; leave dtype out"):
                optimize_for_inference(trained(), dtype=dtype)


def test_bfloat16_is_refused_on_a_gpu_before_ampere(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: {0: (8, 0), 1: (7, 5)}[device.index])
    network._check_dtype(torch.bfloat16, torch.device("cuda:0"))
    network._check_dtype(torch.float16, torch.device("cuda:1"))
    with pytest.raises(ValueError, match=r"^cuda:1 has no fast convolutions in torch\.bfloat16; take torch\.float16 or"):
        network._check_dtype(torch.bfloat16, torch.device("cuda:1"))


def test_without_onednn_there_is_the_plain_way(monkeypatch):
    monkeypatch.setattr(planner, "_has_onednn", lambda: False)
    model = trained()
    fast, x = optimize_for_inference(model), pictures(model, 40, 56)
    assert error(fast(x), model(x)) <= 1e-5
    assert {type(level) for level in fast._levels.values()} == {PlainLevel}


def test_what_winograds_method_may_hold_counts(monkeypatch):
    model = trained(features=(16, 32), bottleneck=64)
    narrow = 3 * 16 + 16 * 16 + 32 * 16 + 16 * 16
    wide = 32 * 16 + 32 * 32 + 32 * 64 + 32 * 32 + 64 * 32 + 64 * 64  # of the levels from 32 on
    passes = []
    monkeypatch.setattr("unetlib.passes.pixels_in_one_pass", lambda config, held, **where: passes.append(held) or 10**6)
    for native, widest, expected in (
        (False, NnpackLevel, wide * 4 * 64 + 2**29),
        (False, OnednnLevel, 0),
        (True, NativeLevel, (narrow + wide) * 4 * 45),
        (True, NnpackLevel, (narrow + wide) * 4 * 45 + wide * 4 * 64 + 2**29),
    ):
        ways = {16: (OnednnLevel,), 32: (widest, OnednnLevel), 64: (widest, OnednnLevel)}
        monkeypatch.setattr(native_kernels, "available", lambda native=native: native)
        monkeypatch.setattr(planner, "fastest_ways", lambda width, dtype, ways=ways: ways[width])
        assert optimize_for_inference(model).held_bytes == expected
        copy.deepcopy(model).predict(np.zeros((4, 4, 3), np.uint8))  # whose fast copy has not run
        assert passes.pop() == expected
    assert optimize_for_inference(model.double()).held_bytes == 0


@pytest.mark.parametrize(
    ("way", "a_kernel"),
    [pytest.param(NativeLevel, 45, marks=needs_native), pytest.param(NnpackLevel, 64, marks=needs_nnpack)],
)
def test_weights_that_are_there_are_not_to_come_any_more(monkeypatch, way, a_kernel):
    """They are missing in the free memory already."""
    monkeypatch.setattr(planner, "plan", lambda device, dtype: lambda *_: way)
    monkeypatch.setattr(planner, "fastest_ways", lambda width, dtype: (way,))
    monkeypatch.setattr(native_kernels, "available", lambda: way is NativeLevel)
    model = trained(features=(32,), bottleneck=32)
    fast = optimize_for_inference(model)
    before = fast.held_bytes
    for size in (8, 8, 64, 64):
        fast(pictures(model, size, size))
    kernels = 3 * 32 + 32 * 32 + 64 * 32 + 3 * 32 * 32
    assert before - fast.held_bytes == pytest.approx(4 * a_kernel * kernels, rel=0.01)


def test_levels_may_come_while_another_thread_asks_what_they_hold(monkeypatch):
    fast = optimize_for_inference(trained())
    fast(pictures(trained(), 40, 56))
    before, transformed_bytes = fast.held_bytes, network._transformed_bytes

    def meanwhile(level):
        fast._levels.setdefault((0, PlainLevel), level)
        return transformed_bytes(level)

    monkeypatch.setattr(network, "_transformed_bytes", meanwhile)
    assert fast.held_bytes == before


# --- CUDA


@on_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("options", "compile"), [*((options, False) for options in OPTIONS), ({}, True), ({"match": "zeros"}, True)], ids=str
)
def test_gives_the_logits_of_the_model_on_cuda(options, compile, dtype):
    model = trained(**options).cuda()
    x = pictures(model, 37, 51).cuda()
    tolerance = {torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 5e-3}[dtype]
    fast = optimize_for_inference(model, dtype=dtype, compile=compile)
    poison = torch.full((64, 1024, 1024), float("nan"), device="cuda")  # freed memory holds what a kernel must not read
    del poison
    for _ in range(3):  # called, captured, replayed
        assert error(fast(x), model(x)) <= tolerance
