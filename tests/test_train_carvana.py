"""examples/train_carvana.py: what it writes, that it survives being killed, and that two processes do what one does."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import weakref
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from test_distributed import run_processes
from torch.utils.flop_counter import FlopCounterMode
from torchvision import tv_tensors

from unetlib import CarvanaDataset, Preprocessing, UNet, UNetConfig
from unetlib.cache import CachedDataset
from unetlib.checkpoints import load_checkpoint, save_checkpoint
from unetlib.files import only_writer
from unetlib.inference import evaluate
from unetlib.recompute import recomputed
from unetlib.synthetic import write_carvana
from unetlib.transforms import train_transform

SCRIPT = Path(__file__).parents[1] / "examples" / "train_carvana.py"
TINY = shlex.split(
    "--features 8 16 --size 32 48 --batch-size 4 --epochs 2 --device cpu --precision fp32 --workers 0 --no-channels-last"
)


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import train_carvana

    return train_carvana


@pytest.fixture
def training_options(script):
    import training_options

    return training_options


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """8 training and 4 validation pictures of 64x96 in Kaggle's layout."""
    folder = tmp_path_factory.mktemp("data")
    write_carvana(folder, cars=2, views=4, size=(64, 96), split="train")
    write_carvana(folder, cars=[7], views=4, size=(64, 96), split="val")
    return folder


def weights(folder):
    return UNet.from_pretrained(folder / "model").state_dict()


def assert_same(first, second):
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_training_on_rendered_scenes_writes_weights_card_curves_and_predictions(script, tmp_path, capsys):
    script.main(["--synthetic", "16", "--out", str(tmp_path), *TINY, "--color-jitter", "0", "--tensorboard"])
    model = UNet.from_pretrained(tmp_path / "model")
    assert model.config.features == (8, 16)
    assert model.preprocessing.size == (32, 48)
    history = json.loads((tmp_path / "history.json").read_text())
    assert len(history["loss"]) == 2 * 3
    best = max(entry["dice"] for entry in history["epochs"])
    card = (tmp_path / "model/README.md").read_text()
    assert f"{best:.4f}" in card
    assert "12 pictures to train on" in card
    assert Image.open(tmp_path / "predictions.png").size == (4 * 244 + 4, 3 * 164 + 4)
    assert Image.open(tmp_path / "curves.png").size == (1000, 400)
    assert list((tmp_path / "tensorboard").iterdir())
    assert f"best: Dice {best:.5f}" in capsys.readouterr().out


def test_gradient_checkpointing_changes_nothing_but_memory_and_may_differ_in_a_resumed_run(script, data, tmp_path, monkeypatch):
    losses, calls = [], []
    monkeypatch.setattr("unetlib.unet.recomputed", lambda *given: calls.append(1) or recomputed(*given))
    for folder, options in (("kept", []), ("again", ["--checkpoint-gradients"])):
        assert not calls
        script.main(["--data", str(data), *TINY, *options, "--out", str(tmp_path / folder)])
        losses.append(json.loads((tmp_path / folder / "history.json").read_text())["loss"])
    assert calls
    assert losses[0] == losses[1]
    assert_same(weights(tmp_path / "kept"), weights(tmp_path / "again"))
    script.main(["--data", str(data), *TINY, "--resume", "--out", str(tmp_path / "again")])


def test_without_matplotlib_only_the_curves_are_missing(script, tmp_path, monkeypatch, capsys):
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else there(name))
    script.main(["--synthetic", "16", "--out", str(tmp_path), *TINY])
    assert "no curves.png without matplotlib" in capsys.readouterr().out
    assert not (tmp_path / "curves.png").exists()
    assert (tmp_path / "predictions.png").exists()


def test_the_sheet_of_predictions_holds_no_picture_at_full_size(script, tmp_path, monkeypatch):
    write_carvana(tmp_path / "data", cars=[7], views=2, size=(960, 640), split="val")
    UNet(features=(8,)).save_pretrained(tmp_path / "model")
    held, draw = [], script.comparison

    def seen(*parts, **options):
        held.extend((array.shape[:2], array.base) for part in parts for array in part)
        return draw(*parts, **options)

    monkeypatch.setattr(script, "comparison", seen)
    args = script.parse_args(["--data", str(tmp_path / "data"), "--out", str(tmp_path)])
    history = {"loss": [1.0], "epochs": [{"epoch": 1, "loss": 1.0, "dice": 0.5}]}
    val_set = CarvanaDataset(tmp_path / "data" / "val", tmp_path / "data" / "val_masks")
    script.write_results(args, history, val_set, torch.device("cpu"))
    assert held == [((320, 214), None)] * 6  # and none is a view of a larger one
    assert Image.open(tmp_path / "predictions.png").size[1] == 3 * 164 + 4


def test_windows_are_parts_to_train_on_and_whole_pictures_are_scored(script, data, tmp_path):
    script.main(["--data", str(data), *TINY, "--window", "--out", str(tmp_path)])
    model = UNet.from_pretrained(tmp_path / "model")
    assert model.preprocessing.size is None
    val = CarvanaDataset(data / "val", data / "val_masks")
    best = max(entry["dice"] for entry in json.loads((tmp_path / "history.json").read_text())["epochs"])
    assert evaluate(model, val)["dice"] == pytest.approx(best, abs=1e-3)


def test_a_picture_too_small_for_windows_is_named_with_the_largest_that_fits(script, training_options, data, tmp_path):
    first = min((data / "train").iterdir())
    expected = f"{first} has 96x64 pixels (width x height), too few for --window with --size 128 48; give --size 127 48 or less"
    with pytest.raises(SystemExit, match=re.escape(expected)):
        script.main(["--data", str(data), *TINY, "--window", "--size", "128", "48", "--out", str(tmp_path)])
    args = script.parse_args(["--data", str(data), "--window", "--size", "127", "191"])
    augment = training_options.make_augment(args, [CarvanaDataset(data / "train", data / "train_masks")])
    image, mask = augment(tv_tensors.Image(torch.zeros(3, 64, 96, dtype=torch.uint8)), tv_tensors.Mask(torch.zeros(64, 96)))
    assert (image.shape, mask.shape) == ((3, 127, 191), (127, 191))


def test_where_nothing_is_to_be_found_and_nothing_is_found_there_are_weights_too(script, data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    for mask in (tmp_path / "data" / "val_masks").iterdir():
        Image.new("L", (96, 64)).save(mask)
    model = UNet(features=(8, 16))
    torch.nn.init.constant_(model.head.bias, -100.0)
    model.save_pretrained(tmp_path / "start")
    options = ["--init", str(tmp_path / "start"), "--lr", "1e-9", "--out", str(tmp_path / "run")]
    script.main(["--data", str(tmp_path / "data"), *TINY, *options])
    assert math.isnan(load_checkpoint(tmp_path / "run" / "checkpoint.pt")["best"]["dice"])
    assert weights(tmp_path / "run")["head.bias"].item() == pytest.approx(-100)
    history = json.loads((tmp_path / "run" / "history.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert history["epochs"][-1]["dice"] is None


def given_scores(*dice):
    """A `validate` that gives these, and is interrupted after the last."""
    scores = iter([dict.fromkeys(("dice", "iou", "accuracy"), score) for score in dice])

    def validate(*_):
        if (score := next(scores, None)) is None:
            raise KeyboardInterrupt
        return score

    return validate


@pytest.mark.parametrize(("dice", "epoch"), [((0.0, math.nan, 0.5), 2), ((0.5, 0.5, 0.4), 1)])
def test_the_best_is_the_first_of_the_best_or_nothing_found_where_nothing_is_to_be_found(
    script, data, tmp_path, monkeypatch, dice, epoch
):
    monkeypatch.setattr(script, "validate", given_scores(*dice))
    script.main(["--data", str(data), "--out", str(tmp_path), *TINY, "--epochs", "3"])
    assert load_checkpoint(tmp_path / "checkpoint.pt")["best"]["epoch"] == epoch


@pytest.mark.parametrize(("options", "size"), [("", (32, 48)), ("--crop 0.2 1", None), ("--window", None)])
def test_parts_are_cut_out_of_pictures_that_were_not_reduced_before(script, data, tmp_path, monkeypatch, options, size):
    given = []

    def batches(*_, size, **__):
        given.append(size)
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "AugmentedBatches", batches)
    with pytest.raises(SystemExit, match="130"):
        script.main(["--data", str(data), "--out", str(tmp_path), *TINY, *shlex.split(options)])
    assert given == [size]


OPTIONS = (
    "--loss bce-dice --schedule onecycle --epochs 12 --noise 0.1 --crop 0.3 1 --rotation 20 "
    "--checkpoint-every 1 --validate-every 4"
)


def test_killed_and_resumed_it_has_the_losses_of_an_unbroken_run_to_the_last_bit(script, data, tmp_path):
    options = ["--data", str(data), *TINY, *shlex.split(OPTIONS)]
    script.main([*options, "--out", str(tmp_path / "unbroken")])

    killed = subprocess.Popen(
        [sys.executable, str(SCRIPT), *options, "--out", str(tmp_path / "killed")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    checkpoint = tmp_path / "killed/checkpoint.pt"
    while killed.poll() is None:
        if checkpoint.exists() and len(load_checkpoint(checkpoint)["history"]["loss"]) >= 7:
            killed.send_signal(signal.SIGKILL)
            killed.wait()
    assert killed.returncode == -signal.SIGKILL
    assert 7 <= len(load_checkpoint(checkpoint)["history"]["loss"]) < 24
    script.main([*options, "--out", str(tmp_path / "killed"), "--resume"])

    unbroken, resumed = (json.loads((tmp_path / name / "history.json").read_text()) for name in ("unbroken", "killed"))
    assert len(unbroken["loss"]) == 24
    assert resumed["loss"] == unbroken["loss"]
    for mine, other in zip(unbroken["epochs"], resumed["epochs"], strict=True):
        assert mine | {"pictures_per_second": 0} == other | {"pictures_per_second": 0}
    assert_same(weights(tmp_path / "unbroken"), weights(tmp_path / "killed"))
    ends = [load_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("unbroken", "killed")]
    for part in ("model", "average"):
        assert_same(ends[0][part], ends[1][part])


def interrupted(script, monkeypatch, options, *dice):
    """A run that is interrupted in the validation after that of the last of these scores."""
    with monkeypatch.context() as patch:
        patch.setattr(script, "validate", given_scores(*dice))
        with pytest.raises(SystemExit, match="130"):
            script.main(options)


def test_a_run_goes_on_with_another_number_of_processes(script, data, tmp_path, monkeypatch):
    UNet(features=(8, 16), norm="group").save_pretrained(tmp_path / "start")
    options = ["--data", str(data), *TINY, "--init", str(tmp_path / "start"), "--out"]
    script.main([*options, str(tmp_path / "one")])
    interrupted(script, monkeypatch, [*options, str(tmp_path / "other")], 0.0)
    printed = run_processes(2, str(SCRIPT), *options, str(tmp_path / "other"), "--resume")
    assert "going on in epoch 2" in printed
    one, other = (load_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("one", "other"))
    assert len(other["random"]) == 2
    assert other["history"]["loss"] == pytest.approx(one["history"]["loss"], rel=1e-4)
    assert other["history"]["loss"][:2] == one["history"]["loss"][:2]
    for part in ("model", "average"):
        for key, value in one[part].items():
            torch.testing.assert_close(other[part][key], value, rtol=1e-3, atol=1e-5)


def test_checkpoints_are_written_after_so_many_steps_and_each_epoch(script, data, tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(script, "save_checkpoint", lambda state, path: written.append((state["epoch"], state["step"])))
    options = ["--epochs", "3", "--batch-size", "1", "--checkpoint-every", "4", "--validate-every", "2"]
    script.main(["--data", str(data), "--out", str(tmp_path), *TINY, *options])
    epochs = [(0, 4), (1, 0)], [(1, 4), (1, 8), (2, 0)], [(2, 4), (2, 8), (3, 0)]  # and none twice
    assert written == [*itertools.chain(*epochs)]


def test_a_run_that_is_stopped_in_its_validation_has_trained_the_epoch_for_good(script, data, tmp_path, monkeypatch, capsys):
    options = ["--data", str(data), *TINY, "--epochs", "1", "--out"]
    script.main([*options, str(tmp_path / "whole")])
    interrupted(script, monkeypatch, [*options, str(tmp_path / "stopped")])
    capsys.readouterr()
    script.main([*options, str(tmp_path / "stopped"), "--resume"])
    assert "going on in epoch 1 after step 2 of 2" in capsys.readouterr().out
    whole, stopped = (load_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("whole", "stopped"))
    assert stopped["history"]["loss"] == whole["history"]["loss"]
    assert stopped["best"]["dice"] == whole["best"]["dice"]
    assert whole["best"].keys() - stopped["best"].keys() == {"pictures_per_second"}  # it trained on none since it went on


def test_pictures_a_second_are_those_of_training_alone(script, data, tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(script, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    take, save = script.follow, script.save_checkpoint

    def slowly(work, seconds):
        return lambda *given, **options: (now.append(now.pop() + seconds), work(*given, **options))[1]

    monkeypatch.setattr(script, "follow", slowly(take, 1.0))  # once a step
    monkeypatch.setattr(script, "save_checkpoint", slowly(save, 100.0))
    script.main(["--data", str(data), "--out", str(tmp_path), *TINY, "--epochs", "1"])
    (entry,) = load_checkpoint(tmp_path / "checkpoint.pt")["history"]["epochs"]
    assert entry["pictures_per_second"] == 4  # two steps of four


def test_an_interrupt_ends_a_run_in_one_line(script, data, tmp_path, monkeypatch, capsys):
    options = ["--data", str(data), "--out", str(tmp_path), *TINY]
    for stage, what in (("readable", "starts anew"), ("validate", "with --resume goes on")):
        with monkeypatch.context() as patch:
            patch.setattr(script, stage, given_scores())
            with pytest.raises(SystemExit, match="130"):
                script.main(options)
        assert capsys.readouterr().err.endswith(f"\ninterrupted; the same command {what}\n")


def test_an_interrupt_while_pictures_are_looked_for_is_one_line_too(script, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "load_data", given_scores())
    with pytest.raises(SystemExit, match="130"):
        script.main(["--data", str(data), "--out", str(tmp_path / "out"), *TINY])
    assert capsys.readouterr().err == "interrupted; the same command starts anew\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("local_rank", "lines"), [("0", 1), ("1", 0)])
def test_an_interrupt_of_several_processes_is_one_line_on_each_machine(
    script, data, tmp_path, monkeypatch, capsys, local_rank, lines
):
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    monkeypatch.setattr(script, "load_data", given_scores())
    with pytest.raises(SystemExit, match="130"):
        script.main(["--data", str(data), "--out", str(tmp_path / "out"), *TINY])
    assert capsys.readouterr().err == lines * "interrupted; the same command starts anew\n"


def test_pictures_a_second_of_a_resumed_epoch_are_those_of_its_rest(script, data, tmp_path, monkeypatch):
    options = ["--data", str(data), "--out", str(tmp_path), *TINY, "--epochs", "1", "--checkpoint-every", "1"]
    save = script.save_checkpoint

    def saved_once(*given):
        save(*given)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(script, "save_checkpoint", saved_once)
        with pytest.raises(SystemExit, match="130"):
            script.main(options)
    monkeypatch.setattr(script, "time", SimpleNamespace(perf_counter=itertools.count().__next__))
    script.main([*options, "--resume"])
    (entry,) = load_checkpoint(tmp_path / "checkpoint.pt")["history"]["epochs"]
    assert entry["pictures_per_second"] == 4  # one of two steps


def test_a_resumed_run_drops_the_channels_of_an_unbroken_one(script, data, tmp_path, monkeypatch):
    UNet(features=(8, 16), dropout=0.5).save_pretrained(tmp_path / "start")
    options = ["--data", str(data), *TINY, "--init", str(tmp_path / "start"), "--out"]
    script.main([*options, str(tmp_path / "unbroken")])
    interrupted(script, monkeypatch, [*options, str(tmp_path / "resumed")], 0.0)
    torch.rand(1)
    script.main([*options, str(tmp_path / "resumed"), "--resume"])
    unbroken, resumed = (load_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("unbroken", "resumed"))
    assert resumed["history"]["loss"] == unbroken["history"]["loss"]


def test_a_resumed_run_holds_what_it_read_no_longer_than_it_needs(script, data, tmp_path, monkeypatch):
    options = ["--data", str(data), "--out", str(tmp_path), *TINY]
    interrupted(script, monkeypatch, options, 0.0)
    read, load = [], script.load_run

    def spied(*given):
        state = load(*given)
        read.extend(weakref.ref(state[part]["head.weight"]) for part in ("model", "average"))
        return state

    monkeypatch.setattr(script, "load_run", spied)
    held, validate = [], script.validate
    monkeypatch.setattr(script, "validate", lambda *given: held.extend(ref() for ref in read) or validate(*given))
    script.main([*options, "--resume"])
    assert held == [None, None]


def test_a_run_goes_on_where_the_disk_has_room_for_what_is_missing(script, data, tmp_path, monkeypatch):
    options = ["--data", str(data), *TINY, "--epochs", "1", "--out"]
    script.main([*options, str(tmp_path / "run")])
    needed = 55 * sum(tensor.numel() for tensor in UNet(features=(8, 16)).parameters())
    usage = namedtuple("usage", "total used free")(10**9, 10**9 - needed + 1, needed - 1)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage)
    script.main([*options, str(tmp_path / "run"), "--resume"])
    with pytest.raises(SystemExit, match="MB left and the run writes up to"):
        script.main([*options, str(tmp_path / "anew")])


def test_what_a_run_writes_fits_into_the_room_that_it_asks_for(script, data, tmp_path, monkeypatch):
    asked, most = [], []
    monkeypatch.setattr("training_runs.check_space", lambda folder, needed: asked.append(needed))
    replace = os.replace

    def seen(source, target):  # a checkpoint is written, beside what there was
        most.append(sum(path.stat().st_size for path in (tmp_path / "run").rglob("*") if path.is_file()))
        replace(source, target)

    monkeypatch.setattr(os, "replace", seen)
    options = ["--data", str(data), "--out", str(tmp_path / "run"), *TINY, "--features", "64", "64", "--epochs", "3"]
    script.main([*options, "--checkpoint-every", "1"])
    assert asked[0] * 0.8 < max(most) < asked[0]


def test_resuming_a_finished_run_says_so_and_writes_its_end_again(script, data, tmp_path, capsys):
    options = ["--data", str(data), "--out", str(tmp_path), *TINY, "--epochs", "1"]
    script.main(options)
    (tmp_path / "predictions.png").unlink()
    capsys.readouterr()
    script.main([*options, "--resume"])
    printed = capsys.readouterr().out
    assert printed.startswith("the run is finished: its 1 epochs are done, and only what its end writes is written again\n")
    assert (tmp_path / "predictions.png").is_file()


def test_a_folder_that_processes_do_not_share_is_refused(script, tmp_path, monkeypatch):
    monkeypatch.setattr("training_runs.shared", lambda seen: [True, seen] if isinstance(seen, bool) else [seen])
    with pytest.raises(SystemExit, match="has an earlier run for some processes and none for others; give a folder that all"):
        script.main(["--synthetic", "8", "--out", str(tmp_path), *TINY, "--resume"])


def test_resuming_with_other_settings_or_without_a_checkpoint_is_refused(script, data, tmp_path):
    options = ["--data", str(data), "--out", str(tmp_path), *TINY]
    nowhere = tmp_path / "nowhere"
    with pytest.raises(SystemExit, match=r"there is no .*checkpoint\.pt; leave out --resume, or give --out of an earlier run"):
        script.main(["--synthetic", "8", "--out", str(nowhere), *TINY, "--resume"])
    assert not nowhere.exists()
    script.main([*options, "--epochs", "1"])
    with pytest.raises(SystemExit, match=r"other options: --epochs 1; resume with those"):
        script.main([*options, "--resume"])
    others = shlex.split("--epochs 1 --size 64 48 --window --channels-last --resume")
    was = "--size 32 48, without --window, --no-channels-last"
    with pytest.raises(SystemExit, match=f"checkpoint.pt is from a run with other options: {was}; resume with those"):
        script.main([*options, *others])


def test_a_run_of_an_older_script_is_resumed_where_what_it_lacked_is_off(script, data, tmp_path):
    options = ["--data", str(data), "--out", str(tmp_path), *TINY, "--epochs", "1"]
    script.main(options)
    state = load_checkpoint(tmp_path / "checkpoint.pt")
    del state["settings"]["jpeg"]
    save_checkpoint(state, tmp_path / "checkpoint.pt")
    script.main([*options, "--resume"])
    with pytest.raises(SystemExit, match=r"from a run with other options: --low-resolution 0\.0, without --jpeg; resume"):
        script.main([*options, "--low-resolution", "0.1", "--jpeg", "0.5", "--resume"])


def test_a_run_is_not_resumed_without_its_best_weights(script, data, tmp_path):
    options = ["--data", str(data), *TINY, "--epochs", "1", "--out"]
    script.main([*options, str(tmp_path / "run")])
    (tmp_path / "moved").mkdir()
    shutil.copy(tmp_path / "run" / "checkpoint.pt", tmp_path / "moved")
    expected = f"{tmp_path / 'moved' / 'model'} is missing, with the weights of epoch 1, the best so far; bring back model/"
    with pytest.raises(SystemExit, match=re.escape(expected)):
        script.main([*options, str(tmp_path / "moved"), "--resume"])


def test_a_checkpoint_of_another_script_is_not_gone_on_from(script, data, tmp_path):
    save_checkpoint({"model": {}}, tmp_path / "checkpoint.pt")
    with pytest.raises(SystemExit, match=r"checkpoint\.pt is not from this script; give another --out without --resume"):
        script.main(["--data", str(data), "--out", str(tmp_path), *TINY, "--resume"])


@pytest.mark.parametrize("name", ["checkpoint.pt", "checkpoint.pt.previous"])
def test_a_run_does_not_start_over_in_the_place_of_an_earlier_one(script, data, tmp_path, name):
    (tmp_path / name).write_bytes(b"an earlier run")
    expected = f"{tmp_path / 'checkpoint.pt'} is of an earlier run; add --resume to go on with it, or give another --out"
    with pytest.raises(SystemExit, match=re.escape(expected)):
        script.main(["--synthetic", "8", "--out", str(tmp_path), *TINY])
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [(name, b"an earlier run")]


def test_weights_whose_checkpoint_is_gone_are_not_written_over(script, data, tmp_path):
    UNet(features=(8,)).save_pretrained(tmp_path / "model")
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    expected = f"{tmp_path / 'model'} has the weights of an earlier run; give another --out, or move them elsewhere"
    with pytest.raises(SystemExit, match=re.escape(expected)):
        script.main(["--data", str(data), "--out", str(tmp_path), *TINY])
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before


@pytest.mark.skipif(sys.platform == "win32", reason="has no such locks")
@pytest.mark.parametrize("source", ["--data", "--synthetic"])
def test_two_runs_do_not_write_into_one_folder(script, data, tmp_path, source):
    given = [source, str(data) if source == "--data" else "8"]
    with only_writer(tmp_path), pytest.raises(SystemExit, match=f"another run is writing to {re.escape(str(tmp_path))}; wait"):
        script.main([*given, "--out", str(tmp_path), *TINY])
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_ends_while_another_starts_is_not_started_over(script, data, tmp_path, monkeypatch):
    @contextlib.contextmanager
    def just_free(folder):  # the run before this one has written its checkpoint, and gives the folder back
        (folder / "checkpoint.pt").touch()
        yield

    monkeypatch.setattr("training_runs.only_writer", just_free)
    with pytest.raises(SystemExit, match=r"checkpoint\.pt is of an earlier run; add --resume"):
        script.main(["--data", str(data), "--out", str(tmp_path), *TINY])


@pytest.mark.parametrize("side", ["train", "val"])
def test_a_run_does_not_go_on_with_other_pictures_and_folders_may_move(script, data, tmp_path, side):
    shutil.copytree(data, tmp_path / "data")
    options = ["--out", str(tmp_path / "run"), *TINY, "--epochs", "1"]
    script.main(["--data", str(tmp_path / "data"), *options])
    (tmp_path / "data").rename(tmp_path / "moved")
    script.main(["--data", str(tmp_path / "moved"), *options, "--resume"])
    picture = min((tmp_path / "moved" / side).iterdir())
    picture.unlink()
    (tmp_path / "moved" / f"{side}_masks" / f"{picture.stem}_mask.gif").unlink()
    with pytest.raises(SystemExit, match=r"the pictures of --data are no longer those of the run; bring those back, or give"):
        script.main(["--data", str(tmp_path / "moved"), *options, "--resume"])


@pytest.mark.parametrize("module", ["save_checkpoint", "UNet.save_pretrained"])
def test_a_disk_that_fills_up_is_one_clear_error(script, data, tmp_path, monkeypatch, module):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    options = ["--data", str(data), "--out", str(tmp_path), *TINY, "--epochs", "1"]
    monkeypatch.setattr(f"train_carvana.{module}", full)
    expected = f"[Errno 28] No space left on device; make room in {tmp_path}, then the same command"
    what = "starts anew" if module == "save_checkpoint" else "with --resume goes on"
    with pytest.raises(SystemExit, match=f"{re.escape(f'{expected} {what}')}$"):
        script.main(options)


def test_weights_to_start_from_may_have_moved_and_no_others_are_resumed_with(script, data, tmp_path):
    for name, width in (("start", 8), ("same", 8), ("wider", 16)):
        model = UNet(features=(width,))
        if name == "start":
            model.preprocessing = Preprocessing(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
        model.save_pretrained(tmp_path / name)
    options = ["--data", str(data), "--out", str(tmp_path / "run"), *TINY[3:], "--epochs", "1"]
    script.main([*options, "--init", str(tmp_path / "start")])
    was = f"is from a run with other options: --init {tmp_path / 'start'}; resume"
    for name in ("same", "wider"):
        with pytest.raises(SystemExit, match=re.escape(was)):
            script.main([*options, "--init", str(tmp_path / name), "--resume"])
    (tmp_path / "start").rename(tmp_path / "moved")
    script.main([*options, "--init", str(tmp_path / "moved"), "--resume"])
    assert UNet.from_pretrained(tmp_path / "run" / "model").preprocessing.mean == (0.5, 0.4, 0.3)


def test_a_run_from_random_weights_is_not_resumed_from_given_ones_nor_the_other_way_round(script, data, tmp_path):
    start = ["--init", str(UNet(features=(8, 16)).save_pretrained(tmp_path / "start"))]
    for name, one, other, was in (("random", [], start, "without --init"), ("given", start, [], shlex.join(start))):
        options = ["--data", str(data), "--out", str(tmp_path / name), *TINY, "--epochs", "1"]
        script.main([*options, *one])
        with pytest.raises(SystemExit, match=re.escape(f"is from a run with other options: {was}; resume with those")):
            script.main([*options, *other, "--resume"])


@pytest.mark.parametrize("options", ["--batch-size 1", "--batch-size 3 --accumulate 2", "--accumulate 4"])
def test_batch_norm_needs_more_than_one_value(script, data, tmp_path, options):
    options = shlex.split(f"--features 8 8 8 --size 8 15 {options}")
    expected = r"--size 8 15 leaves one pixel .*; give --size 16 30, or a larger --batch-size than \d or a smaller --accumulate"
    with pytest.raises(SystemExit, match=expected):
        script.main(["--data", str(data), "--out", str(tmp_path), *TINY, *options])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", ["--size 8 15 --accumulate 3", "--size 8 16 --batch-size 1"])
def test_two_values_are_enough_for_batch_norm(script, data, tmp_path, options):
    options = shlex.split(f"--features 8 8 8 --epochs 1 {options}")
    script.main(["--data", str(data), "--out", str(tmp_path), *TINY, *options])


def test_values_for_batch_norm_are_those_of_one_process(script, training_options):
    args = script.parse_args(shlex.split("--data carvana --features 8 8 8 --size 8 8 --batch-size 4"))
    model = script.starting_model(args)
    training_options.check_shares(args, model, 2)
    with pytest.raises(ValueError, match="leaves one pixel"):
        training_options.check_shares(args, model, 4)
    args.sync_batch_norm = True
    training_options.check_shares(args, model, 4)


def test_a_batch_larger_than_the_data_is_named(script, data, tmp_path):
    with pytest.raises(SystemExit, match=r"--batch-size 100: a batch takes 100 pictures, and there are \d+; give a smaller"):
        script.main([*TINY, "--data", str(data), "--out", str(tmp_path / "out"), "--batch-size", "100"])


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore of it"), "CUDA out.*2.00 GiB."),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."), "DefaultCPUAll.*9 bytes."),
    ],
)
def test_too_little_memory_for_a_step_says_what_to_try(script, data, tmp_path, monkeypatch, error, said):
    def loss(logits, masks):
        raise error

    monkeypatch.setattr(script, "make_loss", lambda args: loss)
    with pytest.raises(
        SystemExit,
        match=rf"not enough memory for a step \({said}\); try --checkpoint-gradients, --accumulate 2",
    ):
        script.main([*TINY, "--data", str(data), "--out", str(tmp_path / "out")])


def test_an_error_of_another_kind_keeps_its_traceback(script, data, tmp_path, monkeypatch):
    def loss(logits, masks):
        raise RuntimeError("a mistake in the code")

    monkeypatch.setattr(script, "make_loss", lambda args: loss)
    with pytest.raises(RuntimeError, match="a mistake in the code"):
        script.main([*TINY, "--data", str(data), "--out", str(tmp_path / "out")])


def test_the_recipe_of_a_resumed_run_is_for_a_new_one(script, data, tmp_path, monkeypatch):
    options = ["--data", str(data), "--out", str(tmp_path), *TINY]
    interrupted(script, monkeypatch, options, 0.1)
    monkeypatch.setattr(script, "validate", given_scores(0.2))
    monkeypatch.setattr(sys, "argv", ["train_carvana.py", *options, "--resume"])
    script.main(sys.argv[1:])
    assert f"\npython {shlex.join(['train_carvana.py', *options])}\n" in (tmp_path / "model" / "README.md").read_text()


@pytest.mark.parametrize(
    ("processes", "here", "launcher"),
    [
        (1, None, "python"),
        (4, None, "torchrun --nproc-per-node 4"),
        (4, "4", "torchrun --nproc-per-node 4"),
        (16, "8", "torchrun --nnodes 2 --nproc-per-node 8"),
    ],
)
def test_the_recipe_names_the_machines(script, monkeypatch, processes, here, launcher):
    monkeypatch.setattr(sys, "argv", ["train.py", "--data", "my cars", "--resume"])
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if here:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", here)
    assert script.command_typed(processes) == f"{launcher} train.py --data 'my cars'"


def test_two_processes_train_and_validate_as_one(script, data, tmp_path):
    options = ["--data", str(data), *TINY, "--init", str(tmp_path / "start"), "--epochs", "1", "--ema", "0"]
    UNet(features=(8, 16), norm="group").save_pretrained(tmp_path / "start")
    script.main([*options, "--accumulate", "2", "--out", str(tmp_path / "one")])
    printed = run_processes(2, str(SCRIPT), *options, "--accumulate", "2", "--out", str(tmp_path / "two"))
    assert "2 x cpu" in printed
    assert f"\ntorchrun --nproc-per-node 2 {SCRIPT} --data" in (tmp_path / "two" / "model" / "README.md").read_text()
    one, two = (load_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("one", "two"))
    for key, value in one["model"].items():
        torch.testing.assert_close(two["model"][key], value, rtol=1e-3, atol=1e-5)
    assert two["best"]["dice"] == pytest.approx(one["best"]["dice"], abs=1e-3)
    assert two["history"]["loss"] == pytest.approx(one["history"]["loss"], rel=1e-4)  # of the whole batch, not of a share
    states = [state["torch"] for state in two["random"]]
    assert not torch.equal(*states)  # of dropout, which would drop the same channels in both
    # The sharded validation is that of one process on the same weights, to the last bit.
    model = UNet.from_config(UNet.from_pretrained(tmp_path / "start").config).eval()
    model.load_state_dict(two["model"])
    model.preprocessing = UNet.from_pretrained(tmp_path / "two/model").preprocessing
    val_set = CarvanaDataset(data / "val", data / "val_masks")
    assert evaluate(model, val_set)["dice"] == two["best"]["dice"]


@pytest.mark.parametrize("decay", ["0", "0.5"])
def test_two_processes_validate_what_is_saved_though_each_has_statistics_of_its_own(data, tmp_path, decay):
    model, train_set = UNet(features=(8, 16)), CarvanaDataset(data / "train", data / "train_masks")
    images = [torch.from_numpy(train_set[i][0]).permute(2, 0, 1)[None] / 255 for i in range(8)]
    with torch.no_grad():
        for image in images:
            model(image)
        model.head.bias -= torch.cat([*map(model.eval(), images)]).median()  # logits of both signs
    model.save_pretrained(tmp_path / "start")
    options = ["--data", str(data), *TINY, "--init", str(tmp_path / "start"), "--epochs", "1", "--ema", decay, "--lr", "1e-9"]
    run_processes(2, str(SCRIPT), *options, "--out", str(tmp_path))
    checkpoint = load_checkpoint(tmp_path / "checkpoint.pt")
    model.load_state_dict(checkpoint["model" if decay == "0" else "average"])
    model.preprocessing = UNet.from_pretrained(tmp_path / "model").preprocessing
    assert evaluate(model, CarvanaDataset(data / "val", data / "val_masks"))["dice"] == checkpoint["best"]["dice"]


def test_shares_of_a_batch_give_the_step_of_the_whole(script, data, tmp_path):
    UNet(features=(8, 16), norm="group").save_pretrained(tmp_path / "start")
    options = ["--data", str(data), *TINY, "--init", str(tmp_path / "start"), "--epochs", "1", "--clip", "0.1"]
    for shares in ("1", "3"):  # of 4 pictures: 2 and 2
        script.main([*options, "--accumulate", shares, "--out", str(tmp_path / shares)])
    first, second = (load_checkpoint(tmp_path / shares / "checkpoint.pt") for shares in ("1", "3"))
    assert second["history"]["loss"] == pytest.approx(first["history"]["loss"], abs=1e-4)
    for key, value in first["model"].items():
        torch.testing.assert_close(second["model"][key], value, rtol=1e-3, atol=1e-5)


def test_gradients_are_clipped(script, data, tmp_path, monkeypatch):
    norms, step = [], torch.optim.AdamW.step

    def spy(optimizer, *args, **options):
        gradients = [weight.grad for group in optimizer.param_groups for weight in group["params"]]
        norms.append(torch.stack([gradient.norm() for gradient in gradients]).norm().item())
        return step(optimizer, *args, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    script.main(["--data", str(data), "--out", str(tmp_path), *TINY, "--epochs", "1", "--clip", "0.001"])
    assert norms == pytest.approx([0.001] * 2, rel=0.01)


def test_weight_decay_is_what_was_asked_for(script, data, tmp_path):
    options = ["--epochs", "1", "--weight-decay", "0.5", "--lr", "0.25"]
    script.main(["--data", str(data), "--out", str(tmp_path), *TINY, *options])
    (group,) = load_checkpoint(tmp_path / "checkpoint.pt")["optimizer"]["param_groups"]
    assert group["weight_decay"] == 0.5


def test_the_average_counts_the_steps_of_the_run(script, data, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(script, "follow", lambda *_, steps: seen.append(steps))
    script.main(["--data", str(data), "--out", str(tmp_path), *TINY])
    assert seen == [0, 1, 2, 3]  # two epochs of two steps


def test_the_last_epoch_is_always_scored(script, data, tmp_path):
    script.main(["--data", str(data), "--out", str(tmp_path), *TINY, "--epochs", "3", "--validate-every", "2"])
    history = json.loads((tmp_path / "history.json").read_text())
    assert ["dice" in entry for entry in history["epochs"]] == [False, True, True]


def test_every_option_of_the_augmentation_is_passed_on(training_options):
    options = {*inspect.signature(train_transform).parameters} - {"size", "mean", "std", "outside"}
    assert {*training_options.AUGMENTATION} == options


def test_augmented_on_the_device_pictures_are_what_workers_make_of_them(script, data, tmp_path):
    options = ["--data", str(data), *TINY, "--epochs", "1", "--rotation", "20", "--low-resolution", "0.5", "--noise", "0.1"]
    places = {"workers": "workers", "device": "device", "sent": "device --cache-gib 0 --workers 1"}  # decoded again each time
    for name, place in places.items():
        script.main([*options, "--augment-on", *place.split(), "--out", str(tmp_path / name)])
    first, *others = (json.loads((tmp_path / name / "history.json").read_text())["loss"] for name in places)
    assert others == [first, first]


@pytest.mark.parametrize("place", ["workers", "device"])
def test_the_network_sees_pictures_less_its_mean_over_its_deviation(script, data, tmp_path, monkeypatch, place):
    seen = []
    model = UNet(features=(4, 8))
    model.preprocessing = Preprocessing(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    model.register_forward_pre_hook(lambda model, inputs: seen.extend(inputs if model.training else ()))
    monkeypatch.setattr(script, "starting_model", lambda args, **ends: model)
    options = shlex.split(f"--epochs 1 --ema 0 --horizontal-flip 0 --color-jitter 0 --augment-on {place}")
    script.main(["--data", str(data), "--out", str(tmp_path), *TINY, *options])
    cached = CachedDataset(CarvanaDataset(data / "train", data / "train_masks"), (32, 48))
    pixels = torch.stack([cached[i][0].as_subclass(torch.Tensor) for i in range(8)]) / 255
    expected = (pixels.mean((0, 2, 3)) - torch.tensor((0.5, 0.4, 0.3))) / torch.tensor((0.2, 0.3, 0.4))
    torch.testing.assert_close(torch.cat(seen).mean((0, 2, 3)), expected, rtol=0, atol=1e-5)


def test_training_starts_from_given_weights(script, data, tmp_path):
    UNet(features=(8, 16)).save_pretrained(tmp_path / "start")
    options = ["--init", str(tmp_path / "start"), "--lr", "1e-9", "--ema", "0", "--epochs", "1"]
    script.main(["--data", str(data), "--out", str(tmp_path / "next"), *TINY, *options])
    before, after = UNet.from_pretrained(tmp_path / "start").state_dict(), weights(tmp_path / "next")
    np.testing.assert_allclose(after["head.weight"], before["head.weight"], atol=1e-3)  # stored in half precision


def test_statistics_of_given_weights_move_too(script, data, tmp_path):
    UNet(features=(8, 16)).save_pretrained(tmp_path / "start")
    options = ["--init", str(tmp_path / "start"), "--lr", "1e-9", "--ema", "0", "--epochs", "1"]
    script.main(["--data", str(data), "--out", str(tmp_path / "run"), *TINY, *options])
    assert weights(tmp_path / "run")["encoder.0.norm1.num_batches_tracked"] == 2


def test_scale_and_threshold_of_given_weights_go(script, data, tmp_path):
    model = UNet(features=(8, 16))
    model.preprocessing = Preprocessing(scale=0.5, threshold=0.8)
    options = ["--epochs", "1", "--init", str(model.save_pretrained(tmp_path / "start"))]
    script.main(["--data", str(data), "--out", str(tmp_path / "run"), *TINY, *options])
    found = UNet.from_pretrained(tmp_path / "run" / "model").preprocessing
    assert found == Preprocessing(size=(32, 48), class_names=("background", "car"))


def test_weights_of_other_pictures_and_classes_get_other_ends(script, data, tmp_path):
    UNet(features=(8, 16), in_channels=1, out_channels=3).save_pretrained(tmp_path / "start")
    options = ["--init", str(tmp_path / "start"), "--epochs", "1"]
    script.main(["--data", str(data), "--out", str(tmp_path / "run"), *TINY, *options])
    assert UNet.from_pretrained(tmp_path / "run" / "model").config == UNetConfig(features=(8, 16))


def test_larger_than_the_weights_it_starts_from(script, data, tmp_path):
    UNet(features=(4, 8), bottleneck=12).save_pretrained(tmp_path / "start")
    options = [*shlex.split("--epochs 1 --features 6 8 --patch-size 2 --match zeros --init"), str(tmp_path / "start")]
    script.main(["--data", str(data), "--out", str(tmp_path / "run"), *TINY, *options])
    config = UNet.from_pretrained(tmp_path / "run" / "model").config
    assert config == UNetConfig(features=(6, 8), bottleneck=12, patch_size=2, match="zeros")


def test_a_loss_that_is_not_finite_stops_the_run_and_names_step_and_pictures(script, data, tmp_path, monkeypatch, capsys):
    losses = iter([1.0, 0.5, float("nan")])
    monkeypatch.setattr(script, "make_loss", lambda args: lambda logits, masks: logits.mean() * 0 + next(losses))
    options = ["--data", str(data), "--out", str(tmp_path), *TINY, "--batch-size", "2", "--checkpoint-every", "1"]
    (tmp_path / "model").mkdir()  # as an epoch before this one would have left it
    with pytest.raises(SystemExit, match=r"the loss is nan in step 3, pictures \w+_\d\d\.jpg, \w+_\d\d\.jpg;.*--lr.* --init"):
        script.main(options)
    assert capsys.readouterr().err.endswith("\n")  # the bar's line, so that the message has one of its own
    assert load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 2


@pytest.mark.parametrize("value", [math.nan, 1e30])  # the latter is too large for half precision
@pytest.mark.parametrize("options", ["--checkpoint-every 1", ""])
def test_weights_that_are_not_finite_are_not_saved(script, data, tmp_path, monkeypatch, options, value):
    step = torch.optim.AdamW.step

    def diverged(optimizer, *args, **options):
        step(optimizer, *args, **options)
        torch.nn.init.constant_(optimizer.param_groups[0]["params"][0], value)

    monkeypatch.setattr(torch.optim.AdamW, "step", diverged)
    options = ["--batch-size", "8", *shlex.split(options)]  # one step in an epoch, whose loss is finite
    with pytest.raises(
        SystemExit, match=r"after step 1 the weights are not finite in half precision; start anew with another --out .* fp32$"
    ):
        script.main(["--data", str(data), "--out", str(tmp_path), *TINY, *options])
    assert list(tmp_path.iterdir()) == []


def test_weights_that_overflow_where_they_are_validated_are_one_clear_error(script, data, tmp_path, monkeypatch):
    step = torch.optim.AdamW.step

    def diverged(optimizer, *args, **options):
        step(optimizer, *args, **options)
        torch.nn.init.constant_(optimizer.param_groups[0]["params"][0], 6e4)  # finite in half precision, unlike what it gives

    monkeypatch.setattr(torch.optim.AdamW, "step", diverged)
    options = ["--batch-size", "8", "--epochs", "1", "--ema", "0", "--precision", "fp16"]  # one step, whose loss is finite
    expected = "validation of epoch 1: logits must hold numbers, found nan; the network diverged, or overflowed in half"
    with pytest.raises(SystemExit, match=expected):
        script.main(["--data", str(data), "--out", str(tmp_path), *TINY, *options])
    assert not (tmp_path / "model").exists()


def test_a_full_disk_and_an_unwritable_folder_are_found_before_training(script, data, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for source in (["--data", str(data)], ["--synthetic", "8"]):
        with pytest.raises(SystemExit, match="cannot be written to"):
            script.main([*source, "--out", str(tmp_path / "file"), *TINY])
    usage = namedtuple("usage", "total used free")(10**9, 10**9 - 10**6, 10**6)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage)
    with pytest.raises(SystemExit, match="1 MB left and the run writes up to"):
        script.main(["--data", str(data), "--out", str(tmp_path / "run"), *TINY])
    assert not (tmp_path / "run").exists()


def test_the_preset_is_the_study(script, monkeypatch):
    args = script.parse_args(["--preset", "study", "--data", "carvana"])
    assert (args.features, args.size, args.batch_size, args.epochs, args.lr) == ([64, 128, 256, 512], [160, 240], 32, 3, 1e-4)
    assert (args.rotation, args.horizontal_flip, args.vertical_flip, args.color_jitter) == (35.0, 0.5, 0.1, 0.0)
    assert (args.schedule, args.weight_decay, args.loss, args.ema, args.clip) == ("constant", 0.0, "bce", 0.0, 0.0)
    assert args.precision == ("fp16" if torch.cuda.is_available() else "fp32")
    assert script.parse_args(["--preset", "study", "--data", "carvana", "--epochs", "1"]).epochs == 1


@pytest.mark.parametrize(("ampere", "expected"), [(True, "bf16"), (False, "fp16")])
def test_bfloat16_is_the_default_only_where_the_gpu_has_it(script, monkeypatch, ampere, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: ampere or including_emulation)
    assert script.parse_args(["--data", "carvana", "--device", "cpu"]).precision == expected


def test_the_bottleneck_of_a_recipe_goes_with_its_features(script):
    full = ["--preset", "full", "--data", "carvana"]
    assert script.parse_args(full).bottleneck == 192
    assert script.starting_model(script.parse_args([*full, "--features", "8", "16"])).config.bottleneck == 32
    assert script.parse_args([*full, "--features", "8", "16", "--bottleneck", "24"]).bottleneck == 24


def test_the_full_recipe_makes_weights_fit_for_the_zoo(script):
    args = script.parse_args(["--preset", "full", "--data", "carvana", "--init", "carvana"])
    model = script.starting_model(args).to("meta")
    assert sum(tensor.numel() for tensor in model.parameters()) * 2 < 8 * 2**20
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, *args.size, device="meta"))
    assert args.size == [1280, 1918]
    assert counter.get_total_flops() < 250e9


def test_the_study_validates_at_its_own_size(script, data, tmp_path):
    options = ["--preset", "study", "--data", str(data), *TINY, "--out", str(tmp_path)]
    script.main(options)
    checkpoint = load_checkpoint(tmp_path / "checkpoint.pt")
    assert "average" not in checkpoint
    model = UNet(features=(8, 16)).eval()
    model.load_state_dict(checkpoint["model"])
    entry = checkpoint["history"]["epochs"][-1]
    correct = pixels = 0
    for name in sorted((data / "val").glob("*.jpg")):
        image = Image.open(name).resize((48, 32), Image.Resampling.BILINEAR)
        mask = np.asarray(Image.open(data / "val_masks" / f"{name.stem}_mask.gif").resize((48, 32), Image.Resampling.BOX)) > 0
        with torch.no_grad():
            car = model(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255)[0, 0] > 0
        correct += (car.numpy() == mask).sum()
        pixels += mask.size
    assert entry["accuracy"] == pytest.approx(correct / pixels, abs=0.02)
    assert "4 validation pictures at 32x48" in (tmp_path / "model" / "README.md").read_text()


def test_pictures_are_read_one_after_another_to_validate_at_the_networks_size(script, data, tmp_path, monkeypatch):
    read, before = [], []
    get, judge = CarvanaDataset.__getitem__, script.evaluate
    monkeypatch.setattr(CarvanaDataset, "__getitem__", lambda part, k: read.append(part.image_dir.name) or get(part, k))
    monkeypatch.setattr(
        script,
        "evaluate",
        lambda *given, **options: before.append((read.count("val"), len(given[1]))) or judge(*given, **options),
    )
    script.main(["--data", str(data), "--out", str(tmp_path), *TINY, "--epochs", "1", "--validate-at", "size"])
    assert before == [(0, 4)]  # with a length, for the progress bar
    assert read.count("val") >= 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_training_on_cuda(script, data, tmp_path, precision):
    options = [*TINY, "--device", "cuda", "--precision", precision, "--channels-last", "--workers", "2"]
    script.main(["--data", str(data), "--out", str(tmp_path), *options])
    history = json.loads((tmp_path / "history.json").read_text())
    assert history["loss"][-1] < history["loss"][0]


def rates_of(script, training_options, schedule: str, warmup: float, steps: int) -> list[float]:
    """The learning rate of each step."""
    args = script.parse_args(["--data", "carvana", "--schedule", schedule, "--warmup", str(warmup), "--lr", "1"])
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    plan, rates = training_options.make_schedule(args, optimizer, steps), []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        plan.step()
    return rates


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_rates_of_the_other_schedules(script, training_options, schedule):
    rates = rates_of(script, training_options, schedule, 0.5, 8)
    rise, fall = [0.01 + 0.99 * k / 4 for k in range(4)], [(1 + math.cos(math.pi * k / 4)) / 2 for k in range(4)]
    assert rates == pytest.approx([1] * 8 if schedule == "constant" else rise + fall)
    assert np.argmax(rates_of(script, training_options, schedule, 0.1, 17)) == (0 if schedule == "constant" else 2)


def test_a_cosine_without_warm_up_begins_at_the_top(script, training_options):
    rates = rates_of(script, training_options, "cosine", 0, 4)
    assert rates == pytest.approx([(1 + math.cos(math.pi * k / 4)) / 2 for k in range(4)])


@pytest.mark.parametrize(("warmup", "steps"), [(0.1, 10), (0.5, 2), (0.25, 4), (1.0, 1), (0.1, 1), (0.0, 3), (1.0, 7)])
def test_one_cycle_rises_for_any_number_of_steps(script, training_options, warmup, steps):
    rates = rates_of(script, training_options, "onecycle", warmup, steps)
    assert all(0 < rate <= 1 for rate in rates)
    assert abs(int(np.argmax(rates)) - max(warmup * steps - 1, 0)) <= 1
    if warmup * steps == 1 < steps:  # PyTorch's own formula at this point divides 0 by 0
        fall = [(1 + math.cos(math.pi * step / (steps - 1))) / 2 for step in range(steps)]
        assert rates[0] == pytest.approx(1 / 25)
        assert rates[1:] == pytest.approx(fall[1:], abs=2e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--epochs 0", "--epochs=0 must be 1 or more"),
        ("--accumulate 0", "--accumulate=0 must be 1 or more"),
        ("--validate-every 0", "--validate-every=0 must be 1 or more"),
        ("--workers -1", "--workers=-1 must be 0 or more"),
        ("--lr nan", "--lr must be 0 or more, not nan"),
        ("--lr inf", "--lr must be finite, not inf"),
        ("--weight-decay inf", "--weight-decay must be finite, not inf"),
        ("--border-weight inf", "--border-weight must be finite, not inf"),
        ("--log-every nan", "--log-every must be 0 or more, not nan"),
        ("--rotation inf", "rotation must be finite, not inf"),
        ("--elastic inf", "elastic must be finite, not inf"),
        ("--scale 0.5 inf", "scale must be (least, largest), 0 < least <= largest < inf, not [0.5, inf]"),
        ("--warmup 1.5", "--warmup must be from 0 to 1, not 1.5"),
        ("--ema 1", "--ema must be 0 or more and below 1, such as 0.99, not 1.0"),
        ("--size 0 48", "--size=0 must be 1 or more"),
        ("--features 8 0", "--features=0 must be 1 or more"),
        ("--bottleneck 0", "--bottleneck=0 must be 1 or more"),
        ("--patch-size 0", "--patch-size=0 must be 1 or more"),
        ("--seed 18446744073709551616", "--seed=18446744073709551616 must be from"),
        ("--sync-batch-norm --device cpu", "--sync-batch-norm is for GPUs, not for --device cpu; leave it out"),
        ("--border-weight 3 --border-size 40", "--border-size must be odd, such as 41, not 40"),
        ("--loss bce --border-weight 3", "--border-weight 3 is for bce-dice and not for --loss bce; give --border-weight"),
        ("--preset study --border-weight 3", "--border-weight 3 is for bce-dice and not for --loss bce"),
        ("--reflect --crop 0.2 1", "--reflect mirrors the picture where --rotation, --scale or --elastic reach beyond it"),
        ("--crop 0.2 1 --window", "--crop resizes the parts that it cuts out, --window keeps their scale; give one of the two"),
        ("--crop 1 0.2", "crop must be (least, largest), 0 < least <= largest <= 1, not [1.0, 0.2]"),
        ("--device gpu", "device gpu is not to be had here; give cpu"),
        ("--device cuda:99", "device cuda:99 is not to be had here; give cpu, or cuda where PyTorch finds a GPU"),
        ("--tensorboard", "--tensorboard needs tensorboard: pip install 'unetlib[examples]'"),
        ("--synthetic -1", "--synthetic must be 0 or more, not -1"),
        ("--window --validate-at size", "give --validate-at original beside them"),
        ("--out runs/\udce9", r"--out runs/\udce9 is not UTF-8, and weights in such a folder cannot be read; give"),
    ],
)
def test_what_cannot_be_right_is_refused_before_anything_is_read(script, monkeypatch, capsys, options, message):
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorboard" else there(name))
    with pytest.raises(SystemExit):
        script.parse_args(["--data", "no/such/folder", *shlex.split(options)])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--init nosuch", "nosuch"),
        ("--init ''", "no model is called ''"),
        ("--size 8 48 --features 8 8 8 8", "--size 8 48 is too small for the network, which takes 16x16 pixels or more"),
        ("--data nosuch", "there is no folder 'nosuch/train'"),
    ],
)
def test_what_there_is_none_of_is_one_clear_error_before_scenes_are_rendered(script, tmp_path, options, message):
    with pytest.raises(SystemExit, match=message):
        script.main([*TINY, "--synthetic", "0", "--data", str(tmp_path), "--out", str(tmp_path / "out"), *shlex.split(options)])
    assert not (tmp_path / "out").exists()


def test_fewer_features_are_no_way_out_where_weights_have_theirs(script, data, tmp_path):
    start = UNet(features=(8, 16)).save_pretrained(tmp_path / "start")
    options = ["--init", str(start), "--size", "2", "48", "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match=r"--size 2 48 is too small for .* takes 4x4 pixels or more; give a larger --size$"):
        script.main(["--data", str(data), *TINY[3:], *options])


@pytest.mark.parametrize("place", ["train", "val"])
@pytest.mark.parametrize("options", ["", "--augment-on device", "--workers 1"])
def test_a_picture_that_cannot_be_read_is_named(script, data, tmp_path, place, options):
    shutil.copytree(data, tmp_path / "data")
    broken = min((tmp_path / "data" / place).iterdir())
    broken.write_bytes(broken.read_bytes()[:-500])
    with pytest.raises(SystemExit, match=rf"{re.escape(str(broken))} cannot be read as a picture") as caught:
        script.main([*TINY, "--data", str(tmp_path / "data"), "--out", str(tmp_path / "out"), *shlex.split(options)])
    assert "Traceback" not in str(caught.value)


def test_a_picture_without_a_mask_is_named(script, data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    min((tmp_path / "data" / "train_masks").iterdir()).unlink()
    with pytest.raises(SystemExit, match="1 x picture without a mask"):
        script.main([*TINY, "--data", str(tmp_path / "data"), "--out", str(tmp_path / "out")])


def test_scenes_are_counted_in_fours_and_make_two_cars(script, capsys):
    assert script.parse_args(["--synthetic", "5"]).synthetic == 8
    assert script.parse_args(["--synthetic", "3", "--data", "carvana"]).synthetic == 4
    with pytest.raises(SystemExit):
        script.parse_args(["--synthetic", "4"])
    assert "8 or more (four views of a car, and two cars at least), not 4" in capsys.readouterr().err


def test_the_script_says_what_to_give(script, capsys):
    with pytest.raises(SystemExit):
        script.main([])
    assert "--synthetic N" in capsys.readouterr().err
