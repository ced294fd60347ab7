from __future__ import annotations

import json
import sys

import forward
import numpy as np
import pytest
import torch
from study import StudyUNet
from torch.utils.flop_counter import FlopCounterMode

from unetlib import UNet
from unetlib.convert import convert


@pytest.fixture
def small(monkeypatch, tmp_path):
    """The study's network made small, memory that needs no process of its own, and a pretrained model's folder."""
    monkeypatch.setattr(forward, "StudyUNet", lambda: StudyUNet(features=(4, 8)))
    monkeypatch.setattr(forward, "UNet", SmallUNet)
    monkeypatch.setattr(forward, "peak_on_cpu", lambda network, case: 3 * 2**20)
    return UNet(features=(8,)).save_pretrained(tmp_path / "model")


class SmallUNet(UNet):
    def __init__(self, in_channels=3, out_channels=1, features=(4, 8), **options):
        super().__init__(in_channels, out_channels, features, **options)


def run(*arguments):
    forward.main(["--device", "cpu", "--precisions", "float32", "--rounds", "3", *map(str, arguments)])


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


def test_table_and_json(small, tmp_path, capsys):
    run("--shapes", "2x16x24", "1x17x21", "--models", small, "--json", tmp_path / "figures.json")
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "figures.json").read_text())
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["figures.json"]  # no temporary file stays
    assert results["machine"]["torch"] == torch.__version__.split("+")[0]
    assert results["machine"]["threads"] == torch.get_num_threads()
    assert results["skipped"] == {}
    rows = results["rows"]
    assert [(row["shape"], row["layout"], row["network"]) for row in rows] == [
        (shape, layout, network)
        for shape in ("2x16x24", "1x17x21")
        for layout in ("contiguous", "channels_last")
        for network in ("study", "unetlib", str(small))
    ]
    lines = [line for line in printed.splitlines() if line.split()[:1] in (["study"], ["unetlib"], [str(small)])]
    assert len(lines) == len(rows)
    for index, (row, line) in enumerate(zip(rows, lines)):
        study = rows[index - index % 3]
        assert len(row["seconds"]) == 3
        assert min(row["seconds"]) > 0
        assert row["speedup"] == pytest.approx([a / b for a, b in zip(study["seconds"], row["seconds"])])
        assert row["difference"] < 1e-5
        gflop, median, low, high, pictures, rate, peak, speedup, slow, fast = map(float, line.split()[1:])
        assert median == pytest.approx(1e3 * np.median(row["seconds"]), abs=0.006)
        assert low <= median <= high
        assert slow <= speedup <= fast
        assert speedup == pytest.approx(np.median(row["speedup"]), abs=0.0006)
        assert pictures == pytest.approx(int(row["shape"][0]) / np.median(row["seconds"]), abs=0.006)
        assert rate == pytest.approx(row["flop_per_picture"] / 1e9 * pictures, abs=0.06)
        assert gflop == pytest.approx(row["flop_per_picture"] / 1e9, abs=0.0006)
        assert peak == 3


def test_passes_are_interleaved():
    calls = []
    passes = [(lambda x, name=name: calls.append(name), torch.zeros(1)) for name in "ABC"]
    seconds = forward.time_passes(passes, rounds=4, device="cpu")
    assert seconds.shape == (4, 3)
    assert "".join(calls) == "ABC" * (4 + forward.WARM_UP["cpu"])


@pytest.mark.parametrize("model", [StudyUNet(features=(4, 8)), UNet(features=(4, 8))])
def test_flop_agree_with_a_real_pass_and_by_hand(model):
    with FlopCounterMode(display=False) as counter:
        model(torch.rand(1, 3, 20, 36))
    assert forward.flop(model, 20, 36) == counter.get_total_flops() == hand_counted_flop((4, 8), 20, 36)


def test_flop_of_the_studys_network():
    with torch.device("meta"):
        model = UNet()
    assert forward.flop(model, 320, 480) == hand_counted_flop((64, 128, 256, 512), 320, 480)
    assert forward.flop(model, 320, 480) / 1e9 == pytest.approx(225.8, abs=0.05)  # counted by hand: 1.470 MFLOP for each pixel


@pytest.mark.parametrize("size", [(16, 32), (21, 35)])
def test_the_studys_module_and_ours_compute_the_same(size):
    study = StudyUNet(features=(4, 8)).eval()
    ours = UNet(features=(4, 8)).eval()
    ours.load_state_dict(convert(study.state_dict()).state_dict)
    x = torch.rand(2, 3, *size)
    torch.testing.assert_close(ours(x), study(x))


def test_the_studys_module_has_the_studys_tensors():
    with torch.device("meta"):
        state = StudyUNet().state_dict()
    assert len(state) == 118
    assert (
        sum(tensor.numel() for name, tensor in state.items() if "running" not in name and "num_batches" not in name)
        == 31_037_633
    )
    parts = list(dict.fromkeys(name.split(".")[0] for name in state))
    assert parts == ["ups", "downs", "bottleneck", "final_conv"]
    assert state["ups.0.weight"].shape == (1024, 512, 2, 2)
    assert state["ups.1.conv.0.weight"].shape == (512, 1024, 3, 3)


def test_nothing_is_timed_when_outputs_differ(small, monkeypatch, tmp_path):
    def swapped(checkpoint):
        found = convert(checkpoint)
        found.state_dict["decoder.1.conv.conv1.weight"] = found.state_dict["decoder.1.conv.conv1.weight"].flip(1)
        return found

    monkeypatch.setattr(forward, "convert", swapped)
    monkeypatch.setattr(forward, "time_passes", lambda *_: pytest.fail("timed"))
    with pytest.raises(SystemExit, match="1x16x16 float32 contiguous: the logits of unetlib and study differ by"):
        run("--shapes", "1x16x16", "--models", "--json", tmp_path / "figures.json")
    assert not (tmp_path / "figures.json").exists()


def test_what_cannot_run_is_skipped_with_the_reason(small, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(forward, "list_pretrained", lambda: [])
    run("--precisions", "tf32", "bfloat16", "--shapes", "1x16x16", "--json", tmp_path / "figures.json")
    skipped = json.loads((tmp_path / "figures.json").read_text())["skipped"]
    assert list(skipped) == ["tf32", "bfloat16", "carvana"]
    assert "no fast bfloat16 convolution on this CPU" in skipped["bfloat16"]
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("skipped")] == [
        f"skipped {what}: {reason}" for what, reason in skipped.items()
    ]


def test_a_case_that_does_not_fit_is_skipped(small, monkeypatch, tmp_path):
    measure = forward.measure

    def fits(models, case, rounds, device):
        if case.shape == "9x16x16":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return measure(models, case, rounds, device)

    monkeypatch.setattr(forward, "measure", fits)
    run("--shapes", "9x16x16", "1x16x16", "--layouts", "contiguous", "--models", "--json", tmp_path / "figures.json")
    results = json.loads((tmp_path / "figures.json").read_text())
    assert results["skipped"] == {"9x16x16 float32 contiguous": "out of memory"}
    assert {row["shape"] for row in results["rows"]} == {"1x16x16"}


def test_an_interrupted_run_leaves_what_it_measured(small, monkeypatch, tmp_path):
    measure = forward.measure
    monkeypatch.setattr(
        forward, "measure", lambda models, case, *rest: measure(models, case, *rest) if case.shape == "1x16x16" else 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        run("--shapes", "1x16x16", "2x16x16", "--layouts", "contiguous", "--models", "--json", tmp_path / "figures.json")
    assert {row["shape"] for row in json.loads((tmp_path / "figures.json").read_text())["rows"]} == {"1x16x16"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--shapes", "320x480"), "expected a shape BATCHxHEIGHTxWIDTH such as 4x320x480, got '320x480'"),
        (("--shapes", "0x320x480"), "got '0x320x480'"),
        (("--rounds", "0"), "--rounds must be at least 1, got 0"),
        (("--json", "no/such/folder/figures.json"), "there is no folder 'no/such/folder' for --json"),
        (("--layouts", "channels_first"), "invalid choice: 'channels_first'"),
    ],
)
def test_bad_options(arguments, message, capsys):
    with pytest.raises(SystemExit):
        run(*arguments)
    assert message in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_peak_memory_of_a_process_of_its_own(tmp_path):
    folder = UNet(features=(32,)).save_pretrained(tmp_path / "model")
    peak = forward.peak_on_cpu(str(folder), forward.Case("1x512x512", "float32", "contiguous"))
    a_map = 512 * 512 * 32 * 4  # bytes at full size; the skip, the doubled map and their concatenation make four
    assert 4 * a_map < peak < 12 * a_map


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu(small, tmp_path):
    forward.main(
        [
            "--device",
            "cuda",
            "--shapes",
            "1x32x48",
            "2x33x49",
            "--rounds",
            "3",
            "--models",
            str(small),
            "--json",
            str(tmp_path / "a.json"),
        ]
    )
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert {row["precision"] for row in rows} >= {"float32", "float16"}
    for row in rows:
        assert min(row["seconds"]) > 0
        assert row["peak_bytes"] > 4 * 33 * 49
