from __future__ import annotations

import json

import losses
import pytest
import torch

from unetlib.losses import DiceLoss


def test_the_figures_have_the_machine_and_the_command(tmp_path, monkeypatch, capsys):
    """With unetlib alone, since the other libraries need not be here."""
    monkeypatch.setattr(losses, "contestants", lambda: {("dice", "binary"): {"unetlib": DiceLoss(batch=True)}})
    losses.main(["--device", "cpu", "--batch", "2", "--size", "16", "--rounds", "3", "--json", str(tmp_path / "figures.json")])
    results = json.loads((tmp_path / "figures.json").read_text())
    assert results["machine"]["threads"] == torch.get_num_threads()
    assert "--batch 2 --size 16 --rounds 3" in results["command"]
    assert [results[name] for name in ("batch", "size", "classes", "rounds")] == [2, 16, 8, 3]
    (row,) = results["rows"]
    assert len(row["all_seconds"]["unetlib"]) == 3
    assert f"| dice (binary) | {row['seconds']['unetlib'] * 1e3:.2f} |" in capsys.readouterr().out


@pytest.mark.parametrize(("option", "least"), [("rounds", 1), ("batch", 1), ("size", 1), ("classes", 2)])
def test_bad_options(option, least, capsys):
    with pytest.raises(SystemExit):
        losses.main([f"--{option}", "0"])
    assert f"--{option} must be at least {least}, got 0" in capsys.readouterr().err


def test_a_loss_that_there_is_none_of_is_named(monkeypatch):
    monkeypatch.setattr(losses, "contestants", lambda: {("dice", "binary"): {"unetlib": DiceLoss(batch=True)}})
    with pytest.raises(SystemExit, match="there is no loss 'dise'; there are dice"):
        losses.main(["--device", "cpu", "--only", "dice", "dise"])
