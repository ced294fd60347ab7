from __future__ import annotations

import json
import statistics
from pathlib import Path

import load
import pytest
import torch
from study import randomize

from unetlib import UNet


@pytest.fixture
def folder(tmp_path) -> Path:
    return randomize(UNet(features=(4, 8), activation="silu")).save_pretrained(tmp_path / "model", dtype=torch.float16)


def test_table_and_json(folder, tmp_path, monkeypatch, capsys):
    memory = {"unetlib": {"peak": 2**20, "private": 2**19}}
    monkeypatch.setattr(load, "peak_bytes", lambda name, *_: memory.get(name, {"peak": 3 * 2**20, "private": 2**20}))
    load.main(["--models", str(folder), "--rounds", "3", "--json", str(tmp_path / "figures.json")])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["figures.json", "model"]
    (row,) = json.loads((tmp_path / "figures.json").read_text())["rows"]
    assert row["stored_bytes"] == (folder / "model.safetensors").stat().st_size
    lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith(f"| {folder}")]
    assert [line[1] for line in lines] == list(load.CONTESTANTS)
    for line in lines:
        seconds = row["seconds"][line[1]]
        assert len(seconds) == 3
        assert min(seconds) > 0
        assert float(line[2]) == pytest.approx(1e3 * statistics.median(seconds), abs=0.06)
        pairs = zip(seconds, row["seconds"]["unetlib"])
        assert float(line[3]) == pytest.approx(statistics.median(theirs / ours for theirs, ours in pairs), abs=0.006)
        assert line[4:] == (["1.0", "1.00", "0.5", "1.00"] if line[1] == "unetlib" else ["3.0", "3.00", "1.0", "2.00"])


def test_nothing_is_timed_when_the_networks_differ(folder, monkeypatch):
    monkeypatch.setitem(load.CONTESTANTS, "mixin", lambda folder: randomize(UNet(features=(4, 8), activation="silu"), seed=9))
    monkeypatch.setattr(load, "time_loads", lambda *_: pytest.fail("timed"))
    with pytest.raises(SystemExit, match="of mixin is not that of unetlib"):
        load.main(["--models", str(folder)])


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read from Linux's /proc")
def test_memory_of_a_process_of_its_own(folder, tmp_path):
    for name in ("warm", "big"):
        (tmp_path / name).mkdir()
    load.prepare(str(folder), tmp_path / "warm")
    big = UNet(features=(512,), bottleneck=512).save_pretrained(tmp_path / "float32")  # 30 MiB
    load.prepare(str(big), tmp_path / "big")
    weights = (big / "model.safetensors").stat().st_size
    figures = load.peak_bytes("torch.load", tmp_path / "big", tmp_path / "warm")
    assert 0.9 * weights < figures["private"] <= figures["peak"] < 4 * weights


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["--json", "no/such/a.json"], "there is no folder 'no/such'"),
        (
            ["--models", "carvana", "carvanna"],
            "--models must be carvana, em, nuclei, study or a model's folder, not 'carvanna'",
        ),
    ],
)
def test_bad_options(arguments, message, capsys):
    with pytest.raises(SystemExit):
        load.main(arguments)
    assert message in capsys.readouterr().err
