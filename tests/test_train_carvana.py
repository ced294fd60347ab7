"""examples/train_carvana.py: what it writes, that it survives being killed, and that two processes do what one does."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_distributed import run_processes
from torch.utils.flop_counter import FlopCounterMode

from unetlib import CarvanaDataset, Preprocessing, UNet, UNetConfig
from unetlib.cache import CachedDataset
from unetlib.checkpoints import load_checkpoint
from unetlib.inference import evaluate
from unetlib.synthetic import write_carvana

SCRIPT = Path(__file__).parents[1] / "examples" / "train_carvana.py"
TINY = shlex.split(
    "--features 8 16 --size 32 48 --batch-size 4 --epochs 2 --device cpu --precision fp32 --workers 0 --no-channels-last"
)


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import train_carvana

    return train_carvana


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
    assert Image.open(tmp_path / "predictions.png").size == (8 * 244 + 4, 3 * 164 + 4)
    assert Image.open(tmp_path / "curves.png").size == (1000, 400)
    assert list((tmp_path / "tensorboard").iterdir())
    assert f"best: Dice {best:.5f}" in capsys.readouterr().out


def test_without_matplotlib_only_the_curves_are_missing(script, tmp_path, monkeypatch, capsys):
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else there(name))
    script.main(["--synthetic", "16", "--out", str(tmp_path), *TINY])
    assert "no curves.png without matplotlib" in capsys.readouterr().out
    assert not (tmp_path / "curves.png").exists()
    assert (tmp_path / "predictions.png").exists()


def test_windows_are_parts_to_train_on_and_whole_pictures_are_scored(script, data, tmp_path):
    script.main(["--data", str(data), *TINY, "--window", "--out", str(tmp_path)])
    model = UNet.from_pretrained(tmp_path / "model")
    assert model.preprocessing.size is None
    val = CarvanaDataset(data / "val", data / "val_masks")
    best = max(entry["dice"] for entry in json.loads((tmp_path / "history.json").read_text())["epochs"])
    assert evaluate(model, val)["dice"] == pytest.approx(best, abs=1e-3)


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


def test_resuming_with_other_settings_or_without_a_checkpoint_is_refused(script, data, tmp_path):
    options = ["--data", str(data), "--out", str(tmp_path), *TINY]
    with pytest.raises(FileNotFoundError, match="leave out --resume"):
        script.main([*options, "--resume"])
    script.main([*options, "--epochs", "1"])
    with pytest.raises(SystemExit, match=r"--epochs 1.*resume with the same"):
        script.main([*options, "--resume"])


def test_two_processes_train_and_validate_as_one(script, data, tmp_path):
    options = ["--data", str(data), *TINY, "--init", str(tmp_path / "start"), "--epochs", "1", "--ema", "0"]
    UNet(features=(8, 16), norm="group").save_pretrained(tmp_path / "start")
    script.main([*options, "--out", str(tmp_path / "one")])
    printed = run_processes(2, str(SCRIPT), *options, "--out", str(tmp_path / "two"))
    assert "2 x cpu" in printed
    one, two = (load_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("one", "two"))
    for key, value in one["model"].items():
        torch.testing.assert_close(two["model"][key], value, rtol=1e-3, atol=1e-5)
    assert two["best"]["dice"] == pytest.approx(one["best"]["dice"], abs=1e-3)
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
    monkeypatch.setattr(script, "starting_model", lambda args: model)
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


def test_larger_than_the_weights_it_starts_from(script, data, tmp_path):
    UNet(features=(4, 8), bottleneck=12).save_pretrained(tmp_path / "start")
    options = [*shlex.split("--epochs 1 --features 6 8 --patch-size 2 --match zeros --init"), str(tmp_path / "start")]
    script.main(["--data", str(data), "--out", str(tmp_path / "run"), *TINY, *options])
    config = UNet.from_pretrained(tmp_path / "run" / "model").config
    assert config == UNetConfig(features=(6, 8), bottleneck=12, patch_size=2, match="zeros")


def test_a_loss_that_is_not_finite_stops_the_run_and_names_step_and_pictures(script, data, tmp_path, monkeypatch):
    losses = iter([1.0, 0.5, float("nan")])
    monkeypatch.setattr(script, "make_loss", lambda args, channels: lambda logits, masks: logits.mean() * 0 + next(losses))
    options = ["--data", str(data), "--out", str(tmp_path), *TINY, "--batch-size", "2", "--checkpoint-every", "1"]
    with pytest.raises(SystemExit, match=r"the loss is nan in step 3, pictures \w+_\d\d\.jpg, \w+_\d\d\.jpg;.*--lr"):
        script.main(options)
    assert load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 2


def test_a_full_disk_and_an_unwritable_folder_are_found_before_training(script, data, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cannot be written to"):
        script.main(["--data", str(data), "--out", str(tmp_path / "file" / "run"), *TINY])
    usage = namedtuple("usage", "total used free")(10**9, 10**9 - 10**6, 10**6)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage)
    with pytest.raises(OSError, match="1 MB left and the run writes up to"):
        script.main(["--data", str(data), "--out", str(tmp_path / "run"), *TINY])
    assert not list((tmp_path / "run").iterdir())


def test_the_preset_is_the_study(script, monkeypatch):
    args = script.parse_args(["--preset", "study", "--data", "carvana"])
    assert (args.features, args.size, args.batch_size, args.epochs, args.lr) == ([64, 128, 256, 512], [160, 240], 32, 3, 1e-4)
    assert (args.rotation, args.horizontal_flip, args.vertical_flip, args.color_jitter) == (35.0, 0.5, 0.1, 0.0)
    assert (args.schedule, args.weight_decay, args.loss, args.ema, args.clip) == ("constant", 0.0, "bce", 0.0, 0.0)
    assert args.precision == ("fp16" if torch.cuda.is_available() else "fp32")
    assert script.parse_args(["--preset", "study", "--data", "carvana", "--epochs", "1"]).epochs == 1


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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_training_on_cuda(script, data, tmp_path, precision):
    options = [*TINY, "--device", "cuda", "--precision", precision, "--channels-last", "--workers", "2"]
    script.main(["--data", str(data), "--out", str(tmp_path), *options])
    history = json.loads((tmp_path / "history.json").read_text())
    assert history["loss"][-1] < history["loss"][0]


def test_the_script_says_what_to_give(script, capsys):
    with pytest.raises(SystemExit):
        script.main([])
    assert "--synthetic N" in capsys.readouterr().err
    help_text = re.sub(r"\s+", " ", script.__doc__)
    assert "--resume" in help_text
