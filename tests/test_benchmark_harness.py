from __future__ import annotations

import argparse
import gc
import json
import math
import os
import re
import statistics
import sys

import harness
import numpy as np
import pytest
import torch
from study import StudyUNet
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from unetlib import UNet
from unetlib.memory import release_freed

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")


def hand_counted_flop(features, height, width, channels=3, classes=1):
    """Two for each weight and output pixel, but a transposed convolution of stride 2 uses a weight once for an input pixel."""
    total, before = 0, channels
    for level, feature in enumerate(features):
        pixels = (height >> level) * (width >> level)
        deeper_pixels = (height >> level + 1) * (width >> level + 1)
        total += 2 * 9 * pixels * (before * feature + feature * feature)  # down
        total += 2 * 4 * deeper_pixels * 2 * feature * feature  # up
        total += 2 * 9 * pixels * (2 * feature * feature + feature * feature)  # after the concatenation
        before = feature
    total += 2 * 9 * deeper_pixels * (before * 2 * before + 4 * before * before)  # bottleneck
    return total + 2 * height * width * features[0] * classes


def test_calls_take_turns():
    calls = []
    seconds = harness.time_turns([lambda name=name: calls.append(name) for name in "ABC"], 4, "cpu", warm_up=2)
    assert seconds.shape == (4, 3)
    assert (seconds > 0).all()
    assert "".join(calls) == "ABC" * 2 + "AABBCC" * 4  # the second one counts


def test_each_call_has_its_own_time(monkeypatch):
    clock = iter([0.0, 1.0, 5.0, 8.0, 10.0, 12.0, 20.0, 27.0])  # begin and end of each call
    monkeypatch.setattr(harness.time, "perf_counter", lambda: next(clock))
    seconds = harness.time_turns([int, int], 2, "cpu", warm_up=0)
    assert seconds.tolist() == [[1, 3], [2, 7]]


def test_of_a_short_call_the_second_counts(monkeypatch):
    clock = iter([0.0, 0.09, 1.0, 1.05, 2.0, 2.2])
    monkeypatch.setattr(harness.time, "perf_counter", lambda: next(clock))
    assert harness.time_turns([int, int], 1, "cpu", warm_up=0) == pytest.approx(np.array([[0.05, 0.2]]))


class FakeEvent:
    """Stands in for a CUDA event: it writes down when it was recorded, in turns of a counter."""

    order = []  # noqa: RUF012  # shared on purpose

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.order.append(self)

    def elapsed_time(self, end):
        assert self.order[-1] == "waited"
        return 1e3 * (self.order.index(end) - self.order.index(self))


def test_on_cuda_all_is_queued_before_any_is_waited_for(monkeypatch):
    """Without a GPU: its events are stood in for."""
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: FakeEvent.order.append("waited"))
    calls = [lambda name=name: FakeEvent.order.append(name) for name in "AB"]
    seconds = harness.time_turns(calls, 2, "cuda", warm_up=1)
    names = [entry for entry in FakeEvent.order if isinstance(entry, str)]
    assert names == ["A", "B", "A", "B", "A", "B", "waited"]
    assert seconds.tolist() == [[2, 2], [2, 2]]  # start, the call, end


def test_spread_and_ratios():
    values = [5.0, 1.0, 3.0, 2.0, 4.0]
    found = harness.spread(values)
    assert (found.median, found.low, found.high) == (statistics.median(values), 2, 4)
    assert harness.ratios([4.0, 9.0], [2.0, 3.0]) == [2, 3]


def test_machine(monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    about = harness.machine("cpu", ("pillow", "no-such-package"))
    assert about["torch"] == torch.__version__.split("+")[0]
    assert about["threads"] == torch.get_num_threads()
    assert about["OMP_WAIT_POLICY"] == "passive"
    assert about["pillow"]
    assert "no-such-package" not in about
    json.dumps(about)


def test_of_the_folder_with_data_it_is_kept_that_there_is_one(monkeypatch):
    monkeypatch.setenv("UNETLIB_DATA", "/home/somebody/data")
    assert harness.machine("cpu")["UNETLIB_DATA"] == "set"
    monkeypatch.delenv("UNETLIB_DATA")
    assert "UNETLIB_DATA" not in harness.machine("cpu")


def test_roofs_of_this_machine():
    found = harness.roofs("cpu", ["float32"], side=64)
    assert list(found["flop_per_second"]) == ["float32"]
    assert 1e6 < found["flop_per_second"]["float32"] < 1e15
    assert 1e6 < found["bytes_per_second"] < 1e13


def test_roofs_count_two_for_a_product_and_bytes_both_ways(monkeypatch):
    monkeypatch.setattr(harness, "time_turns", lambda calls, *_, **__: np.full((5, len(calls)), 2.0))
    found = harness.roofs("cpu", ["float32"], side=64)
    assert found == {"flop_per_second": {"float32": 64**3}, "bytes_per_second": (4 * 64) ** 2 * 4}


@pytest.mark.parametrize("model", [StudyUNet(features=(4, 8)), UNet(features=(4, 8))])
def test_flop_agree_with_a_real_pass_and_by_hand(model):
    with FlopCounterMode(display=False) as counter:
        model(torch.rand(1, 3, 20, 36))
    assert harness.flop(model, 20, 36) == counter.get_total_flops() == hand_counted_flop((4, 8), 20, 36)


def test_flop_of_the_studys_network():
    with torch.device("meta"):
        model = UNet()
    assert harness.flop(model, 320, 480) == hand_counted_flop((64, 128, 256, 512), 320, 480)
    assert harness.flop(model, 320, 480) / 1e9 == pytest.approx(225.8, abs=0.05)  # counted by hand: 1.470 MFLOP for each pixel


def test_traffic_by_hand():
    model = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(5, 4, 2, stride=2))
    first = 2 * 6 * 8 * (3 + 5) + 5 * 3 * 9
    second = 2 * 6 * 8 * 5 + 2 * 12 * 16 * 4 + 5 * 4 * 4
    assert harness.traffic(model, 2, 6, 8) == first + second


def test_peak_allocated_counts_what_is_held_at_a_time():
    def call():
        first = torch.empty(1_000_000)
        del first
        torch.empty(3_000_000) + torch.empty(3_000_000)

    assert harness.peak_allocated(call, "cpu") == pytest.approx(36_000_000, rel=0.01)


def test_peak_allocated_is_not_lowered_by_what_the_collector_frees_during_the_call():
    def call():
        gc.collect()
        of_itself = [torch.empty(1_000_000)]
        of_itself.append(of_itself)

    assert [harness.peak_allocated(call, "cpu") for _ in range(2)] == pytest.approx([4_000_000] * 2, rel=0.01)


@LINUX
def test_resident_peak_is_of_the_call_alone():
    gc.collect()
    release_freed()  # memory that the process kept would be taken first
    np.ones(600_000_000, np.uint8)  # before the call: not counted
    before = harness.resident("VmRSS")
    peak = harness.resident_peak(lambda: np.ones(300_000_000, np.uint8)) - before
    assert 200_000_000 < peak < 400_000_000  # what else this process has may come and go


@LINUX
def test_a_fresh_process_gives_the_json_of_its_last_line(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import os, sys; print('chatter'); print([len(sys.argv), int(os.environ['N'])])")
    assert harness.in_fresh_process(str(script), "a", N="7") == [2, 7]


def test_json_is_replaced_whole(tmp_path):
    file = tmp_path / "figures.json"
    file.write_text("before")
    with pytest.raises(TypeError):
        harness.write_json(file, {"rows": object()})
    assert file.read_text() == "before"
    harness.write_json(file, {"rows": [1]})
    assert json.loads(file.read_text()) == {"rows": [1]}
    assert os.listdir(tmp_path) == ["figures.json"]


def test_json_has_null_for_nan(tmp_path):
    harness.write_json(tmp_path / "figures.json", {"rows": [{"seconds": [0.5, math.nan], "ratio": math.nan}]})
    assert json.loads((tmp_path / "figures.json").read_text()) == {"rows": [{"seconds": [0.5, None], "ratio": None}]}


def test_networks_have_files_of_their_own():
    names = ("runs/a/model", "runs/b/model", "./my_model", "./my-model", "owner/name")
    parts = [harness.file_part(name) for name in names]
    assert len({*parts}) == len(names)
    assert all(re.fullmatch(r"[\w.-]+", part) for part in parts)
    assert harness.file_part("study") == "study"


def test_a_full_disk_leaves_no_file(tmp_path, monkeypatch):
    def half_written(path, *_, **__):
        path.touch()
        raise OSError("No space left on device")

    monkeypatch.setattr(harness.Path, "write_text", half_written)
    with pytest.raises(OSError, match="No space left"):
        harness.write_json(tmp_path / "figures.json", {})
    assert os.listdir(tmp_path) == []


def test_where_photographs_are(tmp_path, monkeypatch):
    (tmp_path / "carvana" / "train").mkdir(parents=True)
    monkeypatch.delenv("UNETLIB_DATA", raising=False)
    assert harness.carvana_folder(None) is None
    assert harness.carvana_folder(tmp_path / "carvana") == tmp_path / "carvana"
    monkeypatch.setenv("UNETLIB_DATA", str(tmp_path))
    assert harness.carvana_folder(None) == tmp_path / "carvana"
    monkeypatch.setenv("UNETLIB_DATA", str(tmp_path / "elsewhere"))
    assert harness.carvana_folder(None) is None
    with pytest.raises(SystemExit, match=r"there is no folder .*train'; --data must hold train/ and train_masks/"):
        harness.carvana_folder(tmp_path)


def test_the_command_stands_beside_the_figures(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/benchmarks/load.py", "--rounds", "3"])
    assert harness.command() == "python benchmarks/load.py --rounds 3"
    assert harness.command(["--models", "a b"]) == "python benchmarks/load.py --models 'a b'"


@pytest.mark.parametrize("shape", ["320x480", "0x320x480", "1x2x3x4", "axbxc"])
def test_shapes_that_are_none(shape):
    with pytest.raises(ValueError, match=f"expected a shape BATCHxHEIGHTxWIDTH such as 4x320x480, got '{shape}'"):
        harness.sizes(shape)


@pytest.mark.parametrize("device", ["toaster", "cuda:99"])
def test_devices_that_are_not_there(device, capsys):
    with pytest.raises(SystemExit):
        harness.check(argparse.ArgumentParser(), argparse.Namespace(device=device, json=None))
    assert f"there is no device '{device}' here; give --device cpu" in capsys.readouterr().err


def test_what_this_machine_cannot_show(monkeypatch):
    assert harness.unsupported("float32", "cpu") is None
    assert harness.unsupported("tf32", "cpu") == "tf32 is a mode of GPUs"
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert "no fast bfloat16 convolution on this CPU" in harness.unsupported("bfloat16", "cpu")


def test_a_plot_is_the_same_file_each_time(tmp_path):
    pytest.importorskip("matplotlib", reason="plots need matplotlib; `pip install .[test]` has it")
    for name in ("a.svg", "b.svg"):
        figure, (left, _) = harness.new_plot("x", "y", ["title", "other"])
        left.plot([1, 10], [2, 20])
        harness.save_plot(figure, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert ">title<" in (tmp_path / "a.svg").read_text()
