from __future__ import annotations

import functools
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from test_fast import fast_bfloat16

from unetlib.fast import native_kernels, nnpack_kernels, planner
from unetlib.fast.cuda import CudaLevel
from unetlib.fast.levels import PlainLevel
from unetlib.fast.native import NativeLevel
from unetlib.fast.nnpack import NnpackLevel
from unetlib.fast.onednn import OnednnLevel


def test_each_level_takes_the_fastest_way_that_suits_its_map(monkeypatch):
    native, nnpack = NativeLevel, NnpackLevel
    asked = []

    def fastest_ways(channels, dtype):
        asked.append(channels)
        return (native, nnpack) if channels <= 64 else (nnpack, native)

    monkeypatch.setattr(planner, "fastest_ways", fastest_ways)
    way = planner.plan(torch.device("cpu"), torch.float32)
    for (channels, height, width), expected in {
        (16, 640, 960): native,
        (48, 160, 240): native,
        (48, 9, 15): native,
        (128, 80, 120): nnpack,
        (128, 20, 30): native,  # 0.2 GFLOP
        (2048, 10, 16): native,  # 12 GFLOP, but 640 bytes
    }.items():
        assert way(channels, height, width) is expected
    assert set(asked) == {16, 64, 128, 256}


@pytest.mark.parametrize(
    ("device", "dtype", "only"),
    [
        ("cuda", torch.float16, CudaLevel),
        ("cuda", torch.bfloat16, CudaLevel),
        ("cuda", torch.float32, PlainLevel),
        ("cpu", torch.float16, PlainLevel),
        ("cpu", torch.float64, PlainLevel),
    ],
)
def test_without_a_choice_there_is_one_way(device, dtype, only):
    assert planner.plan(torch.device(device), dtype)(16, 640, 960) is only
    assert planner.winograd_bytes([], torch.device(device), dtype) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_trial_compares_what_there_is(monkeypatch, dtype):
    fastest_ways, tried = planner._found_by_trial.__wrapped__, []
    seconds = {OnednnLevel: 3.0, NnpackLevel: 1.8, NativeLevel: 2.0}
    monkeypatch.setattr(planner, "_trial", lambda channels, dtype, ways: tried.append(ways) or seconds)
    monkeypatch.setattr(native_kernels, "available", lambda: True)
    monkeypatch.setattr(nnpack_kernels, "available", lambda: True)
    assert fastest_ways(64, dtype) == (NativeLevel, NnpackLevel, OnednnLevel)  # 0.8 * 2 and 1.15 * 1.8
    assert fastest_ways(16, dtype) == (NativeLevel, OnednnLevel)
    monkeypatch.setattr(native_kernels, "available", lambda: False)
    assert fastest_ways(64, dtype) == (NnpackLevel, OnednnLevel)
    tried.clear()
    monkeypatch.setattr(nnpack_kernels, "available", lambda: False)
    assert fastest_ways(64, dtype) == (OnednnLevel,)
    assert not tried


def test_of_several_threads_one_makes_the_trial(monkeypatch):
    trials, start = [], threading.Barrier(3)

    def trial(channels, dtype, ways):
        trials.append(channels)
        time.sleep(0.05)  # in which the others would begin theirs
        return dict.fromkeys(ways, 1.0)

    monkeypatch.setattr(planner, "_trial", trial)
    monkeypatch.setattr(planner, "_found_by_trial", functools.cache(planner._found_by_trial.__wrapped__))
    monkeypatch.setattr(native_kernels, "available", lambda: True)
    with ThreadPoolExecutor(3) as pool:
        assert len({*pool.map(lambda _: start.wait() >= 0 and planner.fastest_ways(16, torch.float32), range(3))}) == 1
    assert trials == [16]


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=fast_bfloat16)])
def test_a_trial_takes_times(dtype):
    found = planner._trial(16, dtype, (OnednnLevel, PlainLevel))
    assert list(found) == [OnednnLevel, PlainLevel]
    assert all(seconds > 0 for seconds in found.values())


def test_a_trial_draws_nothing_from_the_chance_of_the_program():
    before = torch.get_rng_state()
    planner._trial(16, torch.float32, (OnednnLevel,))
    assert torch.equal(torch.get_rng_state(), before)
