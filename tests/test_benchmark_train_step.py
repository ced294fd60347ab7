from __future__ import annotations

import json

import pytest
import train_step


def test_all_take_the_same_step_and_the_figures_are_written(tmp_path, capsys):
    file = tmp_path / "steps.json"
    options = ["--device", "cpu", "--shape", "2x32x48", "--features", "4", "8", "--rounds", "2", "--no-compile"]
    train_step.main([*options, "--json", str(file)])
    results = json.loads(file.read_text())
    rows = results["rows"]
    assert results["shape"] == "2x32x48"
    assert {"study", "fp32 contiguous", "fp32 channels_last"} <= set(rows)
    assert sum(name.endswith("memory kept") for name in rows) == 1
    again, kept = ([row for name, row in rows.items() if name.endswith(end)] for end in ("again", "bce-dice"))
    assert again[0]["first_loss"] == kept[0]["first_loss"]
    assert 0 < again[0]["peak_bytes"] < kept[0]["peak_bytes"]
    assert rows["study"]["ratio"] == 1
    printed = capsys.readouterr().out
    for name, row in rows.items():
        assert len(row["seconds"]) == 2
        assert name in printed
    # The same weights, pictures and loss: nobody wins by computing something else.
    for name in ("fp32 contiguous", "fp32 channels_last"):
        assert rows[name]["first_loss"] == pytest.approx(rows["study"]["first_loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--features", "0"), r"features\[0\] must be a positive integer, got 0"),
        (("--features", "4", "8", "--shape", "1x3x9"), "needs pictures of at least 4x4 pixels, got 3x9"),
    ],
)
def test_networks_that_cannot_be(options, message):
    with pytest.raises(SystemExit, match=message):
        train_step.main(["--device", "cpu", *options])
