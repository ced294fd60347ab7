from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import forward
import numpy as np
import peers
import pytest
import torch
from study import StudyUNet

import unetlib.inference
from unetlib import UNet
from unetlib.convert import convert


@pytest.fixture
def small(monkeypatch, tmp_path):
    """The study's network made small, roofs that need no measurement, and a pretrained model's folder."""
    monkeypatch.setattr(peers, "StudyUNet", SmallStudy)
    monkeypatch.setattr(peers, "UNet", SmallUNet)
    roofs = {"flop_per_second": dict.fromkeys(forward.PRECISIONS, 1e9), "bytes_per_second": 1e9}
    monkeypatch.setattr(forward, "roofs", lambda *_: roofs)
    return UNet(features=(8,), bottleneck=12).save_pretrained(tmp_path / "model")


class SmallStudy(StudyUNet):
    def __init__(self, in_channels=3, out_channels=1, features=(4, 8), bottleneck=None):
        super().__init__(in_channels, out_channels, features, bottleneck)


class SmallUNet(UNet):
    def __init__(self, in_channels=3, out_channels=1, features=(4, 8), **options):
        super().__init__(in_channels, out_channels, features, **options)


def run(*arguments):
    options = ["--device", "cpu", "--precisions", "float32", "--rounds", "3", "--networks", "study"]
    forward.main([*options, *map(str, arguments)])


def halves_of(logits):
    """A faster network that computes something else."""
    return lambda network, case, device, folder: lambda x: logits * network.study(x)


def test_table_and_json(small, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(forward, "peak_on_cpu", lambda *_: 3 * 2**20)
    options = (
        "--shapes",
        "2x16x24",
        "1x17x21",
        "--networks",
        "study",
        small,
        "--peers",
        "channels_last",
        "unetlib",
        "--memory",
    )
    run(*options, "--json", tmp_path / "figures.json")
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "figures.json").read_text())
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["figures.json"]  # no temporary file stays
    assert results["machine"]["threads"] == torch.get_num_threads()
    assert results["skipped"] == {}
    rows = results["rows"]
    assert [(row["network"], row["shape"], row["peer"]) for row in rows] == [
        (network, shape, peer)
        for network in ("study", str(small))
        for shape in ("2x16x24", "1x17x21")
        for peer in ("study", "channels_last", "unetlib")
    ]
    lines = [line for line in printed.splitlines() if len(line.split()) == 13 and line.startswith("  ")]
    assert len(lines) == len(rows)
    for index, (row, line) in enumerate(zip(rows, lines)):
        study = rows[index - index % 3]
        assert len(row["seconds"]) == 3
        assert min(row["seconds"]) > 0
        assert row["speedup"] == pytest.approx([a / b for a, b in zip(study["seconds"], row["seconds"])])
        assert row["error"] < 1e-5
        gflop, median, low, high, pictures, rate, roof, error, peak, speedup, slow, fast = map(float, line.split()[1:])
        assert median == pytest.approx(1e3 * np.median(row["seconds"]), abs=0.006)
        assert low <= median <= high
        assert slow <= speedup <= fast
        assert speedup == pytest.approx(np.median(row["speedup"]), abs=0.0006)
        assert pictures == pytest.approx(int(row["shape"][0]) / np.median(row["seconds"]), abs=0.006)
        assert gflop == pytest.approx(row["flop_per_picture"] / 1e9, abs=0.0006)
        speed = row["flop_per_picture"] * int(row["shape"][0]) / np.median(row["seconds"]) / 1e9
        assert rate == pytest.approx(speed, abs=0.06)
        assert roof == pytest.approx(speed, abs=0.006)  # the roof is 1 GFLOP/s
        assert error == pytest.approx(row["error"], rel=0.1)
        assert peak == 3
    for best in results["best"]:
        own = {row["peer"]: row for row in rows if row["network"] == best["network"] and row["shape"] == best["shape"]}
        assert best["ours"] == "unetlib"
        assert np.median(own[best["peer"]]["seconds"]) == min(
            np.median(own[name]["seconds"]) for name in ("study", "channels_last")
        )
        assert best["ratio"] == pytest.approx([a / b for a, b in zip(own[best["peer"]]["seconds"], own["unetlib"]["seconds"])])
    assert printed.count("the best peer") == len(results["best"]) == 4


def test_a_network_of_another_function_is_no_best_peer():
    times = {"study": 4.0, "monai": 1.0, "openvino": 3.0, "unetlib": 5.0, "optimized": 2.0}
    case = {"network": "study", "shape": "1x16x16", "precision": "float32"}
    rows = [{**case, "peer": peer, "seconds": [time] * 3} for peer, time in times.items()]
    assert forward.best_against_best(rows) == {**case, "ours": "optimized", "peer": "openvino", "ratio": [1.5] * 3}
    assert forward.best_against_best(rows[:3]) is None


@pytest.mark.parametrize("size", [(16, 32), (21, 35)])
@pytest.mark.parametrize("features", [(4, 8), (4, 6, 10)])
def test_all_modules_compute_the_same(size, features):
    ours = UNet(features=features, bottleneck=14).eval()
    study = StudyUNet(features=features, bottleneck=14).eval()
    ours.load_state_dict(convert(study.state_dict()).state_dict)
    x = torch.rand(2, 3, *size)
    torch.testing.assert_close(ours(x), study(x))
    if size == (16, 32):  # milesial's pads where the study's resizes
        network = peers.Network(study, ours)
        torch.testing.assert_close(peers.milesial_module(network)(x), study(x))


def test_milesials_module_has_milesials_tensors():
    with torch.device("meta"):
        state = peers.MilesialUNet((64, 128, 256, 512), 1024, 2).state_dict()
    assert len(state) == 118
    assert sum(tensor.numel() for name, tensor in state.items() if "running" not in name and "num_" not in name) == 31_037_698
    assert state["down4.maxpool_conv.1.double_conv.0.weight"].shape == (1024, 512, 3, 3)
    assert state["up1.up.weight"].shape == (1024, 512, 2, 2)
    assert convert(state).config.match == "zeros"


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


def test_the_narrow_network_is_the_studys_with_a_quarter_of_its_widths():
    study, ours = peers.load_network("narrow")
    assert ours.config == UNet(features=(16, 32, 64, 128)).config
    x = torch.rand(1, 3, 32, 48)
    with torch.inference_mode():
        assert torch.equal(study(x), ours(x))


@pytest.mark.parametrize("peer", ["onnxruntime", "openvino"])
def test_other_runtimes_compute_the_same(small, tmp_path, peer):
    for package in (peer, "onnxscript"):
        pytest.importorskip(package, reason=f"{package} is not installed; `pip install .[bench]` has it")
    case = peers.Case("study", "2x16x24", "float32")
    network = peers.load_network("study")
    x = peers.example(case)
    with torch.inference_mode():
        logits = peers.PEERS[peer](network, case, "cpu", tmp_path)(x)
        assert forward.relative_error(logits, network.study(x)) < 1e-5
    assert [path for path in tmp_path.iterdir() if path.name.startswith("study-2x16x24")]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_options_of_the_compiled_study_are_known(small, monkeypatch, device):
    """Compiling takes half a minute, so it is only asked for; on CUDA even without a GPU."""
    given = []
    monkeypatch.setattr(torch, "compile", lambda module, **options: given.append(options) or module)
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, *_, **__: module)
    case = peers.Case("study", "1x16x16", "bfloat16")
    peers.PEERS["compiled"](peers.load_network("study"), case, device, None)
    monkeypatch.undo()
    assert given[0]["dynamic"] is False
    torch.compile(torch.nn.ReLU(), **given[0])  # raises for an option that this PyTorch does not have
    assert given[0]["options"].get("max_autotune_conv_backends") == {"cpu": None, "cuda": "ATEN"}[device]


def test_monais_network_is_the_nearest(small):
    pytest.importorskip("monai", reason="MONAI is not installed; `pip install .[test]` has it")
    ours = UNet(features=(4, 6, 8, 10), bottleneck=12)
    module = peers.monai_module(peers.Network(StudyUNet(), ours))
    widths = [tensor.shape[0] for name, tensor in module.state_dict().items() if name.endswith("conv_1.conv.weight")]
    assert widths == [4, 6, 8, 10, 12, 10, 8, 6, 4]
    with pytest.raises(peers.NotHere, match="four levels below the first, this network 2"):
        peers.monai_module(peers.load_network("study"))


def test_the_optimized_model_is_asked_for_as_documented(small, monkeypatch, tmp_path):
    given = []

    def optimize_for_inference(model, *, dtype=None, compile=False, backend=None):
        given.append((dtype, compile, backend))
        return model

    monkeypatch.setattr(unetlib.inference, "optimize_for_inference", optimize_for_inference)
    network = peers.load_network("study")
    for peer in ("optimized", "optimized_compiled", "optimized_openvino"):
        for precision in ("float32", "tf32", "bfloat16"):
            peers.PEERS[peer](network, peers.Case("study", "1x16x16", precision), "cpu", tmp_path)
    ways = ((False, None), (True, None), (False, "openvino"))
    assert given == [(dtype, *way) for way in ways for dtype in (None, None, torch.bfloat16)]


def test_weights_that_no_other_layout_can_hold(tmp_path):
    ours = UNet(features=(4, 8), patch_size=2, match="replicate").eval()
    network = peers.load_network(str(ours.save_pretrained(tmp_path / "model")))
    x = torch.rand(1, 3, 17, 24)
    assert type(network.study) is UNet
    assert torch.equal(network.study(x), ours(x))
    with pytest.raises(peers.NotHere, match="milesial's layout has no patches"):
        peers.milesial_module(network)


def test_wrong_logits_are_refused_and_not_timed(small, monkeypatch, tmp_path):
    monkeypatch.setitem(forward.PEERS, "unetlib", halves_of(0.5))
    with pytest.raises(SystemExit, match="wrong logits, so not timed: study 1x16x16 float32 unetlib"):
        run("--shapes", "1x16x16", "--peers", "channels_last", "unetlib", "--json", tmp_path / "figures.json")
    results = json.loads((tmp_path / "figures.json").read_text())
    assert [row["peer"] for row in results["rows"]] == ["study", "channels_last"]
    assert results["skipped"]["study 1x16x16 float32 unetlib"].startswith("refused: its logits are 5.0e-01 from the study's")
    assert results["best"] == []


def test_logits_that_are_no_number_are_refused(small, monkeypatch):
    monkeypatch.setitem(forward.PEERS, "unetlib", halves_of(float("nan")))
    with pytest.raises(SystemExit, match="wrong logits"):
        run("--shapes", "1x16x16", "--peers", "unetlib")


def test_what_cannot_run_is_skipped_with_the_reason(small, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    options = ("--precisions", "tf32", "bfloat16", "float32", "--shapes", "1x17x16", "--peers", "autocast", "milesial")
    run(*options, "--json", tmp_path / "figures.json")
    skipped = json.loads((tmp_path / "figures.json").read_text())["skipped"]
    case = "study 1x17x16 float32"
    assert list(skipped) == ["tf32", "bfloat16", f"{case} autocast", f"{case} milesial"]
    assert "no fast bfloat16 convolution on this CPU" in skipped["bfloat16"]
    assert "no multiple of 4" in skipped[f"{case} milesial"]
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("skipped")] == [
        f"skipped {what}: {reason}" for what, reason in skipped.items()
    ]


def test_a_contestant_that_does_not_fit_is_skipped(small, monkeypatch, tmp_path):
    def too_large(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setitem(forward.PEERS, "channels_last", too_large)
    run("--shapes", "1x16x16", "--peers", "channels_last", "unetlib", "--json", tmp_path / "figures.json")
    results = json.loads((tmp_path / "figures.json").read_text())
    assert results["skipped"] == {"study 1x16x16 float32 channels_last": "out of memory"}
    assert [row["peer"] for row in results["rows"]] == ["study", "unetlib"]


def test_an_interrupted_run_leaves_what_it_measured(small, monkeypatch, tmp_path):
    measure = forward.measure
    monkeypatch.setattr(
        forward, "measure", lambda network, case, *rest: measure(network, case, *rest) if case.shape == "1x16x16" else 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        run("--shapes", "1x16x16", "2x16x16", "--peers", "unetlib", "--json", tmp_path / "figures.json")
    assert {row["shape"] for row in json.loads((tmp_path / "figures.json").read_text())["rows"]} == {"1x16x16"}


def test_figures_are_drawn_where_asked(small, tmp_path):
    pytest.importorskip("matplotlib", reason="plots need matplotlib; `pip install .[test]` has it")
    run("--shapes", "1x16x16", "--peers", "unetlib", "--plot", tmp_path)
    assert {path.name for path in tmp_path.glob("*.svg")} == {"forward-study-time.svg", "forward-study-roofline.svg"}


def test_networks_are_exported_to_files_of_their_own(tmp_path):
    cases = [peers.Case(network, "1x16x16", "float32") for network in ("./my_model", "./my-model", "study")]
    assert len({peers.export_file(tmp_path, case, "xml") for case in cases}) == 3
    assert peers.export_file(tmp_path, cases[2], "xml") == tmp_path / "study-1x16x16.xml"


def test_quick_compiles_nothing():
    args = forward.parse(["--quick", "--device", "cpu"])
    assert set(forward.PEERS) - set(args.peers) == {"compiled", "optimized_compiled"}
    assert (args.shapes, args.rounds) == (["1x160x240"], 3)
    assert forward.parse(["--quick", "--device", "cpu", "--rounds", "9"]).rounds == 9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--shapes", "320x480"), "expected a shape BATCHxHEIGHTxWIDTH such as 4x320x480, got '320x480'"),
        (("--rounds", "0"), "--rounds must be at least 1, got 0"),
        (("--json", "no/such/folder/figures.json"), "there is no folder 'no/such/folder' for --json"),
        (("--plot", "no/such/folder"), "there is no folder 'no/such/folder' for --plot"),
        (("--peers", "tensorflow"), "invalid choice: 'tensorflow'"),
    ],
)
def test_bad_options(arguments, message, capsys):
    with pytest.raises(SystemExit):
        run(*arguments)
    assert message in capsys.readouterr().err


def test_a_network_that_is_not_there_is_said_before_the_first_is_measured(small, monkeypatch):
    monkeypatch.setattr(forward, "measure", lambda *_: pytest.fail("measured"))
    with pytest.raises(SystemExit, match="Did you mean 'carvana'"):
        run("--networks", "study", "carvanna")


def test_a_picture_too_small_for_the_network_is_said_before_the_first_is_measured(small, monkeypatch):
    monkeypatch.setattr(forward, "measure", lambda *_: pytest.fail("measured"))
    with pytest.raises(SystemExit, match="needs pictures of at least 16x16 pixels, got 15x40"):
        run("--networks", "narrow", "--shapes", "1x16x16", "1x15x40")


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_peak_memory_of_a_process_of_its_own(tmp_path):
    folder = UNet(features=(32,)).save_pretrained(tmp_path / "model")
    peak = forward.peak_on_cpu("unetlib", tmp_path, peers.Case(str(folder), "1x512x512", "float32"))
    a_map = 512 * 512 * 32 * 4  # bytes at full size; the skip, the doubled map and their concatenation make four
    assert 4 * a_map < peak < 12 * a_map


@pytest.mark.parametrize(("kept", "held"), [(0, 70), (90, 70)])
def test_peak_on_cuda_is_what_a_pass_holds_or_what_a_graph_keeps(monkeypatch, kept, held):
    """Without a GPU: PyTorch's counters are stood in for."""
    counters = {"memory_reserved": 10 + kept, "memory_allocated": 5, "max_memory_allocated": 5 + held}
    stand_in = {name: lambda value=value: value for name, value in counters.items()}
    idle = {"empty_cache": lambda: None, "reset_peak_memory_stats": lambda: None}
    monkeypatch.setattr(forward.torch, "cuda", SimpleNamespace(**stand_in, **idle))
    assert forward.peak_on_cuda(lambda x: x, torch.zeros(1), allocated=5, reserved=10) == max(kept, held)


def test_what_others_left_to_be_used_again_is_not_held(monkeypatch):
    """Without a GPU: an allocator that keeps 7 bytes of somebody's until it is asked for them."""
    kept = [7]
    stand_in = {"empty_cache": kept.clear, "memory_allocated": lambda: 5, "memory_reserved": lambda: 5 + sum(kept)}
    monkeypatch.setattr(forward.torch, "cuda", SimpleNamespace(**stand_in))
    assert forward.held_on_cuda() == (5, 5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu(small, tmp_path):
    options = ["--device", "cuda", "--shapes", "1x32x48", "2x33x49", "--rounds", "3", "--networks", "study", str(small)]
    peers_ = ["channels_last", "autocast", "milesial", "unetlib", "optimized"]
    forward.main([*options, "--peers", *peers_, "--json", str(tmp_path / "a.json")])
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert {row["precision"] for row in rows} >= {"float32", "float16"}
    for row in rows:
        assert min(row["seconds"]) > 0
        assert row["peak_bytes"] > 4 * 33 * 49
