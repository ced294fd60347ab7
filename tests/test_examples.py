"""The examples run as a newcomer runs them, and the README's commands are those that CI runs."""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import albumentations as A
import numpy as np
import pytest
import tifffile
import torch
from albumentations.pytorch import ToTensorV2
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

from unetlib import CarvanaDataset, Preprocessing, UNet, rasters
from unetlib.synthetic import write_carvana

ROOT = Path(__file__).parents[1]
FILES = [*ROOT.glob("examples/*.py"), *ROOT.glob("benchmarks/*.py")]
SCRIPTS = sorted(script for script in FILES if "ArgumentParser(" in script.read_text("utf-8"))


def example(name):
    return loaded(ROOT / "examples" / f"{name}.py")


def loaded(script):
    spec = importlib.util.spec_from_file_location(script.stem, script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def explained(add_argument):
    """`add_argument` of a parser that takes only options with a help text, which names a number that is the default."""

    def add(parser, *names, **options):
        assert options.get("help"), names
        if type(default := options.get("default")) in (int, float) and default:
            assert re.search(rf"\b{default:g}\b", options["help"] % options), names
        return add_argument(parser, *names, **options)

    return add


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_help_explains_every_option(script, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    monkeypatch.setattr(argparse.ArgumentParser, "add_argument", explained(argparse.ArgumentParser.add_argument))
    with pytest.raises(SystemExit, match="0"):
        loaded(script).main(["--help"])


def test_segmenting_files_and_folders(tmp_path, capsys):
    UNet(features=(8,)).save_pretrained(tmp_path / "model")
    write_carvana(tmp_path, cars=1, views=[1, 2], size=(40, 60))
    Image.new("L", (30, 20)).save(tmp_path / "grey.png")
    out = tmp_path / "out"
    pictures = [str(tmp_path / "grey.png"), str(tmp_path / "train")]
    example("segment").main([*pictures, "--model", str(tmp_path / "model"), "--out", str(out), "--device", "cpu"])
    assert len(list(out.iterdir())) == 6
    mask = np.asarray(Image.open(out / "grey_mask.png"))
    assert mask.shape == (20, 30)
    assert set(np.unique(mask)) <= {0, 255}
    assert Image.open(out / "grey_overlay.png").size == (30, 20)
    assert str(out / "grey_mask.png") in capsys.readouterr().out


def test_segmenting_a_folder_takes_pictures_alone_and_tiffs_of_any_size(tmp_path, monkeypatch):
    UNet(features=(8,)).save_pretrained(tmp_path / "model")
    (tmp_path / "in").mkdir()
    for name in (".hidden.png", "text.pdf", "film.mpg"):
        (tmp_path / "in" / name).write_text("no picture")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    tifffile.imwrite(tmp_path / "in" / "huge.TIF", pixels, photometric="rgb", tile=(32, 32), compression="zlib")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    monkeypatch.setattr(rasters, "_READ_WHOLE", 1000)
    out = tmp_path / "out"
    example("segment").main([str(tmp_path / "in"), "--model", str(tmp_path / "model"), "--out", str(out), "--device", "cpu"])
    monkeypatch.undo()
    assert sorted(path.name for path in out.iterdir()) == ["huge_mask.png", "huge_overlay.png"]
    expected = UNet.from_pretrained(tmp_path / "model").predict(pixels) * 255
    np.testing.assert_array_equal(np.asarray(Image.open(out / "huge_mask.png")), expected)


@pytest.mark.parametrize("other", ["x.png", "X.jpg"])
def test_segmenting_refuses_masks_that_would_overwrite_each_other(tmp_path, other):
    for name in ("a/x.png", f"b/{other}"):
        (tmp_path / name).parent.mkdir()
        Image.new("L", (4, 4)).save(tmp_path / name)
    with pytest.raises(SystemExit, match=rf"a/x\.png and \S+/b/{other} would share a mask file"):
        example("segment").main([str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "out")])


def test_segmenting_takes_a_picture_once_however_often_it_is_given(tmp_path, monkeypatch, capsys):
    model = str(UNet(features=(8,)).save_pretrained(tmp_path / "model"))
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    Image.new("L", (30, 20)).save("in/a.png")
    pictures = ["in/a.png", "in", "in/../in/a.png", str(tmp_path / "in" / "a.png")]
    example("segment").main([*pictures, "--model", model, "--out", "out", "--device", "cpu"])
    assert capsys.readouterr().out.count("\n") == 1


def test_segmenting_into_the_folder_of_the_pictures_would_replace_their_masks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_carvana(tmp_path, cars=1, views=[1], size=(40, 60))
    (picture,) = (tmp_path / "train").iterdir()
    mine = picture.with_name(f"{picture.stem}_mask.png")
    mine.write_bytes(b"drawn by hand")
    for given in (str(picture), "train"):
        with pytest.raises(SystemExit, match=r"^--out train/\.\./train is the folder of the pictures"):
            example("segment").main([given, "--out", "train/../train", "--device", "cpu"])
    assert mine.read_bytes() == b"drawn by hand"
    assert sorted((tmp_path / "train").iterdir()) == sorted([picture, mine])


SMALL = "--features 8 --size 32 48 --batch-size 2 --epochs 1 --device cpu --precision fp32 --workers 0 --no-channels-last"


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("segment", "{0}/train --out {0}/out --model ./model --device cpu"),
        ("predict_folder", "{0}/train {0}/out --model ./model --device cpu"),
        ("finetune", f"--data {{0}} --out {{0}}/out {SMALL}"),
        ("train_carvana", f"--synthetic 8 --out {{0}}/out {SMALL}"),
    ],
)
def test_names_that_the_output_has_no_letters_for_are_said(tmp_path, name, options):
    UNet(features=(8,)).save_pretrained(tmp_path / "model")
    for folder in ("train", "train_masks"):
        (tmp_path / "\u8f66" / folder).mkdir(parents=True)
        for number in range(4):
            picture = Image.new("L", (48, 32))
            picture.paste(255, (0, 0, 24, 32))
            picture.save(tmp_path / "\u8f66" / folder / f"\u8f66{number}.png")
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py"), *options.format("\u8f66").split()]
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, check=True)
    assert b"\\u8f66" in done.stdout
    assert list((tmp_path / "\u8f66" / "out").iterdir())


def test_segmenting_several_classes(tmp_path):
    model = UNet(features=(8,), out_channels=3)
    torch.nn.init.zeros_(model.head.weight), torch.nn.init.constant_(model.head.bias[-1:], 1.0)
    folder, out = model.save_pretrained(tmp_path / "model"), tmp_path / "out"
    Image.new("RGB", (30, 20)).save(tmp_path / "a.png")
    example("segment").main([str(tmp_path / "a.png"), "--model", str(folder), "--out", str(out), "--device", "cpu"])
    assert (np.asarray(Image.open(out / "a_mask.png")) == 255).all()


@pytest.mark.parametrize(
    ("channels", "class_names", "said"),
    [
        (1, None, "25.0% background, 75.0% foreground, "),
        (2, ("sky", "tree"), "25.0% sky, 75.0% tree, "),
        (4, None, "25.0% class 0, 50.0% class 1, 25.0% class 3, "),
        (4, ("sky", "tree", "car", "road"), "25.0% sky, 50.0% tree, 25.0% road, "),
    ],
)
def test_segmenting_says_the_share_of_each_class(tmp_path, monkeypatch, capsys, channels, class_names, said):
    model = UNet(features=(8,), out_channels=channels)
    model.preprocessing = Preprocessing(class_names=class_names)
    model.save_pretrained(tmp_path / "model")
    Image.new("RGB", (4, 2)).save(tmp_path / "a.png")
    mask = np.array([[0, 0, 1, 1], [1, 1, 3, 3]], np.uint8).clip(0, max(1, channels - 1))
    monkeypatch.setattr(UNet, "predict", lambda *_: mask)
    options = ["--model", str(tmp_path / "model"), "--out", str(tmp_path / "out"), "--device", "cpu"]
    example("segment").main([str(tmp_path / "a.png"), *options])
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'a.png'}: {said}")


def test_what_cannot_be_segmented_is_one_clear_error(tmp_path):
    UNet(features=(8,)).save_pretrained(tmp_path / "model")
    (tmp_path / "file").write_text("no folder")
    for options, message in (
        (["--model", "carvanna"], "Did you mean 'carvana'"),
        (["--model", str(tmp_path / "model"), "nosuch.jpg"], "there is no file 'nosuch.jpg'"),
        (["--model", str(tmp_path / "model"), "--out", str(tmp_path / "file" / "out")], "file/out"),
        (["--model", str(tmp_path / "model"), "--out", str(tmp_path / "file")], r"^--out \S+file is a file; name a folder"),
    ):
        with pytest.raises(SystemExit, match=message):
            example("segment").main(["--out", str(tmp_path / "out"), "--device", "cpu", *options])


@pytest.mark.parametrize(
    ("name", "command"),
    [("segment", ["{}"]), ("predict_folder", ["{}", "{}-masks"]), ("evaluate", ["--images", "{}", "--masks", "{}"])],
)
def test_masks_that_overlap_are_not_for_single_files(tmp_path, monkeypatch, name, command):
    monkeypatch.syspath_prepend(ROOT / "examples")
    model = UNet(out_channels=2, features=(4,))
    model.preprocessing = Preprocessing(multilabel=True)
    model.save_pretrained(tmp_path / "model")
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    Image.new("RGB", (8, 8)).save(pictures / "a.png")
    with pytest.raises(SystemExit, match=r"is multilabel, and (one file cannot|mask files) hold"):
        example(name).main([word.format(pictures) for word in command] + ["--model", str(tmp_path / "model")])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "pictures"]


def test_the_study_runs_with_its_imports_changed(tmp_path):
    """The study's steps in its order: albumentations, UNET, BCE with logits, Adam, autocast and scaler, checkpoint."""
    write_carvana(tmp_path, cars=1, views=4, size=(64, 96))
    transform = A.Compose(
        [
            A.Resize(height=32, width=48),
            A.Rotate(limit=35, p=1.0),
            A.HorizontalFlip(p=0.5),
            A.VerticalFlip(p=0.1),
            A.Normalize(mean=[0.0, 0.0, 0.0], std=[1.0, 1.0, 1.0], max_pixel_value=255.0),
            ToTensorV2(),
        ],
        seed=0,
    )
    dataset = CarvanaDataset(image_dir=str(tmp_path / "train"), mask_dir=str(tmp_path / "train_masks"), transform=transform)
    loader = DataLoader(dataset, batch_size=2, shuffle=True)
    model = UNet(in_channels=3, out_channels=1)
    loss_fn, optimizer = nn.BCEWithLogitsLoss(), torch.optim.Adam(model.parameters(), lr=1e-4)
    scaler = torch.amp.GradScaler("cuda", enabled=torch.cuda.is_available())
    losses = []
    for _ in range(2):
        for data, targets in loader:
            assert data.shape == (2, 3, 32, 48)
            assert data.dtype == torch.float32
            assert targets.shape == (2, 32, 48)
            assert set(targets.unique().tolist()) <= {0.0, 1.0}
            with torch.autocast("cuda", enabled=torch.cuda.is_available()):
                loss = loss_fn(model(data), targets.float().unsqueeze(1))
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.item())
    assert losses[-1] < losses[0]

    path = tmp_path / "my_checkpoint.pth.tar"
    torch.save({"state_dict": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
    again = UNet(in_channels=3, out_channels=1)
    again.load_state_dict(torch.load(path)["state_dict"])
    model.eval(), again.eval()
    with torch.no_grad():
        assert torch.equal(torch.sigmoid(again(data)) > 0.5, torch.sigmoid(model(data)) > 0.5)


def test_ci_runs_the_commands_of_the_readme():
    readme, ci = (ROOT / "README.md").read_text(), (ROOT / ".ci/run").read_text()
    commands = re.findall(r"^python -m pip install -e .*$", readme, flags=re.MULTILINE)
    assert len(commands) == 2, "one command to segment, one to test"
    install, test = commands[1].split(" && ")
    assert install.replace("pip install", "pip install --quiet") in ci
    assert re.search(rf"^{test}$", ci, flags=re.MULTILINE)
    segment = commands[0].split(" && ")[1]
    assert segment == "python examples/segment.py"
