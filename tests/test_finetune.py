"""`examples/finetune.py` on tiny folders of every kind, and what `examples/evaluate.py` says of objects."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from needs import needs_data
from PIL import Image
from study import randomize

from unetlib import ImageMaskDataset, Preprocessing, UNet, boundary_f_score
from unetlib.inference import evaluate, iter_logits
from unetlib.losses import bce_dice_loss
from unetlib.objects import label_objects, rand_f_score

ROOT = Path(__file__).parents[1]
TINY = [
    "--features",
    "8",
    "16",
    "--size",
    "32",
    "48",
    "--batch-size",
    "2",
    "--epochs",
    "1",
    "--device",
    "cpu",
    "--precision",
    "fp32",
    "--workers",
    "0",
    "--no-channels-last",
]


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")

    def load(name):
        spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


def write(folder: Path, count: int = 4, values: tuple = (0, 255), size: tuple[int, int] = (40, 56), split: str = "train"):
    """Grey pictures with a bright square, and masks whose bands hold `values`; numbers, or colours."""
    rng = np.random.default_rng(0)
    for number in range(count):
        mask = np.zeros((*size, 3) if isinstance(values[0], tuple) else size, np.uint8)
        for k, value in enumerate(values):
            mask[k * size[0] // len(values) :] = value
        picture = rng.integers(0, 60, (*size, 3)).astype(np.uint8) + (mask if mask.ndim == 3 else mask[..., None]) // 2
        for name, array in ((split, picture), (f"{split}_masks", mask)):
            (folder / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(folder / name / f"{number}.png")
    return folder


def loaded(example, *argv):
    """What `load_data` makes of the command line, and the lines it says."""
    finetune, lines = example("finetune"), []
    return *finetune.load_data(finetune.parse_args([str(arg) for arg in argv]), lines.append), lines


# ---- whole runs ---------------------------------------------------------------------------------------------------------


def test_two_classes_from_random_weights(example, tmp_path, capsys):
    write(tmp_path / "mine")
    write(tmp_path / "mine", count=1, split="val")
    example("finetune").main(["--data", str(tmp_path / "mine"), "--out", str(tmp_path / "out"), *TINY])
    model = UNet.from_pretrained(tmp_path / "out" / "model")
    assert model.config.features == (8, 16)
    assert model.config.out_channels == 1
    assert model.preprocessing.size == (32, 48)
    assert model.preprocessing.class_names == ("background", "foreground")
    assert "classes: background, foreground (found in the masks" in capsys.readouterr().out


def test_the_folder_one_is_in_has_a_name_too(example, tmp_path, monkeypatch):
    monkeypatch.chdir(write(tmp_path / "mine"))
    example("finetune").main(["--data", ".", "--out", ".", *TINY])
    card = (tmp_path / "mine" / "model" / "README.md").read_text()
    assert "\n# mine\n" in card
    assert "pictures like those of `mine`" in card


def test_three_classes_from_other_weights_say_what_is_replaced(example, tmp_path, capsys):
    torch.manual_seed(0)
    UNet(features=(8, 16)).save_pretrained(tmp_path / "old")
    data = write(tmp_path / "streets", values=(10, 20, 30))
    (data / "classes.txt").write_text("sky\nhouse\nroad\n")
    options = ["--init", str(tmp_path / "old"), "--grey", "--own-size", "--out", str(tmp_path / "out"), "--lr", "1e-9"]
    example("finetune").main(["--data", str(data), *TINY, *options])
    model, old = UNet.from_pretrained(tmp_path / "out" / "model"), UNet.from_pretrained(tmp_path / "old")
    assert (model.config.in_channels, model.config.out_channels) == (1, 3)
    assert model.preprocessing.size is None
    assert model.preprocessing.class_names == ("sky", "house", "road")
    torch.testing.assert_close(model.bottleneck.conv1.weight, old.bottleneck.conv1.weight, atol=1e-3, rtol=1e-3)
    printed = capsys.readouterr().out
    assert "classes: sky, house, road\n" in printed
    assert "in_channels 3 -> 1, out_channels 1 -> 3" in printed
    card = (tmp_path / "out" / "model" / "README.md").read_text()
    assert f", starting from `UNet.from_pretrained('{tmp_path / 'old'}')`; epoch 1 of" in card


@pytest.mark.parametrize("values", [(0, 1, 2, 255), (0, 1, 255), (10, 20, 30, 7)])
def test_a_value_that_does_not_count_has_no_say_in_the_scores(example, tmp_path, values):
    data = write(tmp_path / "mine", values=values)
    write(data, count=2, values=values, split="val")
    example("finetune").main(["--data", str(data), "--out", str(tmp_path / "out"), *TINY, "--ignore", str(values[-1])])
    (entry,) = json.loads((tmp_path / "out" / "history.json").read_text())["epochs"]
    model = UNet.from_pretrained(tmp_path / "out" / "model")
    assert model.config.out_channels == (1 if len(values) == 3 else 3)
    right = []
    for k in range(2):
        mask = np.asarray(Image.open(data / "val_masks" / f"{k}.png"))
        found = np.array(values)[model.predict(data / "val" / f"{k}.png")]
        right.append((found == mask)[mask != values[-1]])
    assert entry["accuracy"] == pytest.approx(np.concatenate(right).mean(), abs=0.01)  # weights are stored in half precision
    assert (tmp_path / "out" / "predictions.png").is_file()


@pytest.mark.parametrize("loss", ["bce", "bce-dice"])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_value_that_does_not_count_has_no_say_in_the_loss(example, channels, loss):
    import training_options as options

    args = example("finetune").parse_args(["--data", "mine", "--ignore", "7", "--loss", loss])
    logits, masks = torch.randn(2, channels, 8, 6), torch.randint(max(channels, 2), (2, 8, 6))
    expected = options.make_loss(args)(logits[:, :, :5], masks[:, :5])
    masks[:, 5:] = options.IGNORED
    torch.testing.assert_close(options.make_loss(args)(logits, masks), expected)


@pytest.mark.parametrize("place", ["workers", "device"])
def test_what_comes_from_outside_does_not_count_where_a_value_does_not(example, tmp_path, monkeypatch, place):
    import train_carvana

    seen, make = [], train_carvana.make_loss

    def spied(args):
        loss = make(args)
        return lambda logits, masks: seen.append(masks) or loss(logits, masks)

    finetune = example("finetune")
    monkeypatch.setattr(train_carvana, "make_loss", spied)
    data = write(tmp_path / "mine", values=(0, 1, 2))  # all of what is left are the classes 1 and 2
    options = ["--ignore", "0", "--scale", "0.5", "0.5", "--elastic", "1", "--rotation", "20", "--augment-on", place]
    finetune.main(["--data", str(data), "--out", str(tmp_path / "out"), *TINY, *options])
    counts = torch.cat([masks.flatten() for masks in seen]).long().bincount(minlength=256)
    assert counts[0] == pytest.approx(counts[1].item(), rel=0.3)  # two bands of one height
    assert counts[255] > 0.7 * counts.sum()


@pytest.mark.parametrize("channels", [1, 3])
def test_borders_count_whatever_the_number_of_classes(example, channels):
    import training_options as options

    args = example("finetune").parse_args(["--data", "mine", "--border-weight", "3", "--border-size", "3"])
    logits, masks = torch.randn(2, channels, 8, 6), torch.zeros(2, 8, 6, dtype=torch.long)
    masks[:, :, 3:] = 1
    expected = bce_dice_loss(logits, masks, border_weight=3.0, border_size=3)
    torch.testing.assert_close(options.make_loss(args)(logits, masks), expected)
    assert expected != bce_dice_loss(logits, masks)


def test_something_must_be_left_beside_a_value_that_is_set_aside(example, tmp_path):
    data = write(tmp_path / "mine", values=(7,))
    with pytest.raises(SystemExit, match="the masks hold no value that counts; there is nothing to tell apart"):
        example("finetune").main(["--data", str(data), "--out", str(tmp_path / "out"), *TINY, "--ignore", "7"])


def test_a_value_to_set_aside_must_be_there(example, tmp_path):
    data = write(tmp_path / "mine")
    wrong = (["--ignore", "7"], "no mask holds that number; they hold 0, 255"), (["--ignore", "255", "--nonzero"], "not both")
    for option, message in wrong:
        with pytest.raises(SystemExit, match=message):
            example("finetune").main(["--data", str(data), "--out", str(tmp_path / "out"), *TINY, *option])


def test_what_does_not_count_is_no_object(example):
    mask = np.zeros((40, 56), np.int64)
    mask[4:12, 4:12], mask[20:40, :30] = 1, 255

    seen = mask == 1
    seen[25:30, 5:10] = True  # what is found there does not count either
    for ignore_index in (255, None):
        metrics = example("evaluate").WithObjects(ignore_index=ignore_index, threshold=0.9)
        target = torch.from_numpy(mask if ignore_index else mask.clip(0, 1))[None]
        metrics.update(torch.where(torch.from_numpy(seen), 2.2, 2.19)[None, None], target)  # 0.9 is a logit of 2.197
        scores = metrics.compute()
        assert (scores["ap"] == scores["edge_f"] == scores["rand"] == scores["dice"] == 1) == (ignore_index == 255)


def test_objects_are_of_any_class_but_the_background(example):
    target = torch.zeros(1, 40, 56, dtype=torch.int64)
    target[:, 4:12, 4:12], target[:, 20:30, 20:30] = 1, 2
    metrics = example("evaluate").WithObjects(3)
    metrics.update(torch.stack([torch.zeros(target.shape), target == 2, target == 1], dim=1), target)  # one class for the other
    scores = metrics.compute()
    assert scores["ap"] == scores["edge_f"] == 1 > scores["dice"]


def test_each_picture_is_read_and_predicted_once_whatever_is_scored(example, tmp_path, monkeypatch):
    data = write(tmp_path / "mine", values=(0, 1, 2))
    UNet(features=(8,), out_channels=3).save_pretrained(tmp_path / "model")
    read, get = [], ImageMaskDataset.__getitem__
    monkeypatch.setattr(ImageMaskDataset, "__getitem__", lambda part, k: read.append(k) or get(part, k))
    folders = ["--images", str(data / "train"), "--masks", str(data / "train_masks")]
    options = [*folders, "--mask-values", "0", "1", "2", "--objects", "--device", "cpu"]
    example("evaluate").main(["--model", str(tmp_path / "model"), *options])
    assert read == [0, 1, 2, 3]


def test_scores_of_each_class_and_without_what_does_not_count(example, tmp_path, capsys):
    write(tmp_path, values=(0, 1, 2, 255))
    model = UNet(out_channels=3, features=(8, 16))
    model.preprocessing = Preprocessing(class_names=("sky", "house", "road"))
    model.save_pretrained(tmp_path / "model")
    folders = ["--images", str(tmp_path / "train"), "--masks", str(tmp_path / "train_masks")]
    options = ["--model", str(tmp_path / "model"), *folders, "--device", "cpu", "--ignore", "255"]
    example("evaluate").main([*options, "--mask-values", "0", "1", "2"])
    scores = json.loads(capsys.readouterr().out)
    dice = np.zeros((4, 3))
    for k in range(4):
        mask = np.asarray(Image.open(tmp_path / "train_masks" / f"{k}.png"))
        found = model.eval().predict(tmp_path / "train" / f"{k}.png")
        for c in range(3):
            p, t = (found == c) & (mask != 255), mask == c
            dice[k, c] = 2 * (p & t).sum() / (p.sum() + t.sum())
    assert scores["dice of each class"] == {name: round(mean, 5) for name, mean in zip(("sky", "house", "road"), dice.mean(0))}
    assert scores["dice"] == round(dice.mean(), 5)
    with pytest.raises(SystemExit):
        example("evaluate").main(options)
    assert "--ignore 255 needs the values of the classes, such as" in capsys.readouterr().err


def test_a_value_among_the_classes_that_does_not_count_shifts_no_class(example, tmp_path, capsys):
    data, values = tmp_path / "mine", (0, 1, 2, 3)
    write(data, values=values)
    write(data, count=2, values=values, split="val")
    (data / "classes.txt").write_text("ground\nroad\nvoid\ncar\n")
    example("finetune").main(["--data", str(data), "--out", str(tmp_path / "out"), *TINY, "--ignore", "2"])
    model = UNet.from_pretrained(tmp_path / "out" / "model")
    assert (model.preprocessing.class_names, model.config.out_channels) == (("ground", "road", "car"), 3)
    assert np.unique(loaded(example, "--data", data, "--ignore", "2")[1][0][1]).tolist() == [0, 1, 2, 255]
    (entry,) = json.loads((tmp_path / "out" / "history.json").read_text())["epochs"]
    folders = ["--images", str(data / "val"), "--masks", str(data / "val_masks"), "--device", "cpu"]
    options = [*folders, "--ignore", "2", "--mask-values", "0", "1", "3"]
    capsys.readouterr()
    example("evaluate").main(["--model", str(tmp_path / "out" / "model"), *options])
    assert json.loads(capsys.readouterr().out)["dice"] == pytest.approx(entry["dice"], abs=0.01)  # stored in half precision
    torch.nn.init.zeros_(model.head.weight), torch.nn.init.zeros_(model.head.bias)
    torch.nn.init.constant_(model.head.bias[-1:], 1.0)  # all of it is a car
    model.save_pretrained(tmp_path / "cars")
    example("evaluate").main(["--model", str(tmp_path / "cars"), *options, "--objects"])
    scores = json.loads(capsys.readouterr().out)
    assert scores["dice of each class"] == pytest.approx({"ground": 0, "road": 0, "car": 0.5})
    assert scores["rand"] is not None
    with pytest.raises(SystemExit):
        example("evaluate").main(["--model", str(tmp_path / "cars"), *options, "2"])
    assert "the model has 3 classes (ground, road, car); name the masks' values in their order" in capsys.readouterr().err


def test_a_class_that_does_not_count_in_scores_leaves_the_others_their_numbers(example, tmp_path, capsys):
    write(tmp_path, values=(0, 1, 2))
    model = UNet(features=(8,), out_channels=3)
    torch.nn.init.zeros_(model.head.weight), torch.nn.init.zeros_(model.head.bias)
    torch.nn.init.constant_(model.head.bias[-1:], 1.0)  # all of it is the last class
    folders = ["--images", str(tmp_path / "train"), "--masks", str(tmp_path / "train_masks")]
    options = ["--model", str(model.save_pretrained(tmp_path / "model")), *folders, "--device", "cpu"]
    example("evaluate").main([*options, "--mask-values", "0", "1", "2", "--ignore", "0"])
    scores = json.loads(capsys.readouterr().out)
    assert scores["accuracy"] == pytest.approx(0.5, abs=0.02)
    assert scores["dice of each class"] == pytest.approx({"0": None, "1": 0, "2": 2 / 3}, abs=0.02)
    with pytest.raises(SystemExit, match="names a value twice"):
        example("evaluate").main([*options, "--mask-values", "0", "1", "1", "--ignore", "255"])


def test_no_class_to_score_is_left_out(example, capsys):
    for options, which in (("0 255 --ignore 255", " beside --ignore 255"), ("1", "")):
        with pytest.raises(SystemExit):
            example("evaluate").main(shlex.split(f"--images a --masks b --mask-values {options}"))
        assert f"--mask-values names fewer than two classes{which}, and scores need two; name" in capsys.readouterr().err


def test_scores_of_several_classes_need_the_masks_values(example, tmp_path, capsys):
    write(tmp_path, values=(0, 2))  # each of which would be read as 0 and 1
    UNet(out_channels=3, features=(8,)).save_pretrained(tmp_path / "model")
    folders = ["--images", str(tmp_path / "train"), "--masks", str(tmp_path / "train_masks")]
    for option, message in (
        ([], "the model has 3 classes (0, 1, 2); name the masks' values in their order, such as --mask-values 0 1 2; where"),
        (["--nonzero", "--mask-values", "0", "1", "2"], "give one, not both"),
    ):
        with pytest.raises(SystemExit):
            example("evaluate").main(["--model", str(tmp_path / "model"), *folders, "--device", "cpu", *option])
        assert message in capsys.readouterr().err


def test_windows_are_parts_to_train_on_and_whole_pictures_are_scored(example, tmp_path):
    write(tmp_path / "mine")
    write(tmp_path / "mine", count=2, split="val")
    example("finetune").main(["--data", str(tmp_path / "mine"), "--out", str(tmp_path / "out"), *TINY, "--window"])
    model = UNet.from_pretrained(tmp_path / "out" / "model")
    assert model.preprocessing.size is None
    val = ImageMaskDataset(tmp_path / "mine" / "val", tmp_path / "mine" / "val_masks")
    (entry,) = json.loads((tmp_path / "out" / "history.json").read_text())["epochs"]
    assert evaluate(model, val)["dice"] == pytest.approx(entry["dice"], abs=1e-3)


def test_a_class_that_is_nowhere_has_no_score(example, tmp_path, capsys):
    model = UNet(features=(8,), out_channels=3)
    torch.nn.init.zeros_(model.head.weight), torch.nn.init.zeros_(model.head.bias)
    write(tmp_path, count=1, values=(0, 1))
    folders = ["--images", str(tmp_path / "train"), "--masks", str(tmp_path / "train_masks")]
    options = ["--model", str(model.save_pretrained(tmp_path / "model")), "--device", "cpu", "--mask-values", "0", "1", "2"]
    example("evaluate").main([*options, *folders])
    printed = capsys.readouterr().out
    assert json.loads(printed)["dice of each class"]["2"] is None


def no_number(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def test_where_nothing_is_to_be_found_and_nothing_is_found_the_scores_are_null(example, tmp_path, capsys):
    write(tmp_path, count=1, values=(0,))
    model = UNet(features=(8,))
    torch.nn.init.zeros_(model.head.weight), torch.nn.init.constant_(model.head.bias, -1.0)
    folders = ["--images", str(tmp_path / "train"), "--masks", str(tmp_path / "train_masks")]
    options = ["--model", str(model.save_pretrained(tmp_path / "model")), *folders, "--device", "cpu", "--objects"]
    example("evaluate").main(options)
    scores = json.loads(capsys.readouterr().out, parse_constant=no_number)
    assert [scores[name] for name in ("dice", "ap", "rand", "edge_f", "accuracy")] == [None, None, None, None, 1.0]


def test_scenes_come_to_an_end(example):
    assert len(list(zip(example("evaluate").Scenes(2, (32, 48)), range(9)))) == 2


@pytest.mark.parametrize(("threshold", "recall"), [(0.4, 1), (0.6, 0)])
def test_evaluation_takes_the_models_threshold(example, tmp_path, capsys, threshold, recall):
    write(tmp_path, count=2)
    model = UNet(features=(8,))
    torch.nn.init.zeros_(model.head.weight), torch.nn.init.zeros_(model.head.bias)
    model.preprocessing = Preprocessing(threshold=threshold)
    folders = ["--images", str(tmp_path / "train"), "--masks", str(tmp_path / "train_masks")]
    example("evaluate").main(["--model", str(model.save_pretrained(tmp_path / "model")), *folders, "--device", "cpu"])
    assert json.loads(capsys.readouterr().out)["recall"] == recall


def test_a_fitting_head_is_kept_and_so_is_what_the_weights_expect(example, tmp_path, monkeypatch):
    old = UNet(features=(8,))
    old.preprocessing = Preprocessing(scale=0.5, mean=(0.4, 0.5, 0.6), std=(0.2,), threshold=0.8)
    old.save_pretrained(tmp_path / "old")
    finetune, lines = example("finetune"), []
    args = finetune.parse_args(["--data", "mine", "--init", str(tmp_path / "old"), "--size", "32", "48"])
    loads, load = [], UNet.from_pretrained
    with monkeypatch.context() as patch:
        patch.setattr(UNet, "from_pretrained", lambda name, **ends: loads.append(name) or load(name, **ends))
        model = finetune.make_model(args, ["background", "cell"], lines.append)
    assert len(loads) == 1
    torch.testing.assert_close(model.head.weight, UNet.from_pretrained(tmp_path / "old").head.weight)
    expected = Preprocessing(size=(32, 48), mean=(0.4, 0.5, 0.6), std=(0.2,), class_names=("background", "cell"))
    assert model.preprocessing == expected
    assert lines == [f"starting from {tmp_path / 'old'}, its head kept"]


def test_classes_of_mask_files_exclude_each_other_whatever_the_start_said(example, tmp_path):
    old = UNet(features=(8,), out_channels=3)
    old.preprocessing = Preprocessing(multilabel=True)
    old.save_pretrained(tmp_path / "old")
    finetune = example("finetune")
    args = finetune.parse_args(["--data", "mine", "--init", str(tmp_path / "old")])
    assert not finetune.make_model(args, ["background", "cell", "wall"], print).preprocessing.multilabel


def test_few_pictures_are_trained_on_often_in_small_batches(example, capsys):
    args = example("finetune").parse_args(["--data", "mine"])
    assert (args.epochs, args.batch_size) == (100, 8)
    with pytest.raises(SystemExit):
        example("finetune").parse_args(["--help"])
    assert "how often each picture is trained on (100)" in capsys.readouterr().out


def test_options_that_cannot_be_right_are_refused(example, capsys):
    with pytest.raises(SystemExit):
        example("finetune").parse_args(["--data", "mine", "--validate-every", "0"])
    assert "--validate-every=0 must be 1 or more" in capsys.readouterr().err
    for share in ("0", "-1", "1", "nan"):
        with pytest.raises(SystemExit):
            example("finetune").parse_args(["--data", "mine", "--val-share", share])
        assert "--val-share must be above 0 and below 1, such as 0.1, not " in capsys.readouterr().err


# ---- classes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "classes_txt", "names", "held"),
    [
        ((0, 255), None, ["background", "foreground"], [0, 1]),
        ((0, 1), "ground\ncell", ["ground", "cell"], [0, 1]),
        ((0, 1), "\ufeffground\r\ncell", ["ground", "cell"], [0, 1]),  # as Windows' editor saves it
        ((1, 2), None, ["class 1", "class 2"], [0, 1]),
        ((0, 7, 9), None, ["class 0", "class 7", "class 9"], [0, 1, 2]),
        ((0, 2), "a\nb\nc", ["a", "b", "c"], [0, 2]),  # class 1 is in none of these masks
        (((0, 0, 0), (255, 0, 0)), None, ["background", "foreground"], [0, 1]),
        (((0, 0, 0), (0, 0, 255), (255, 0, 0)), "a\nb\nc\n\n", ["a", "b", "c"], [0, 1, 2]),
    ],
)
def test_classes_are_the_masks_values_in_order(example, tmp_path, values, classes_txt, names, held):
    write(tmp_path, values=values)
    if classes_txt:
        (tmp_path / "classes.txt").write_bytes(classes_txt.encode())
    found, train_set, _, _ = loaded(example, "--data", tmp_path)
    assert found == names
    assert np.unique(train_set[0][1]).tolist() == held


@pytest.mark.parametrize(
    ("values", "ignore", "classes_txt", "names", "held"),
    [
        ((0, 1, 2, 3), 2, None, ["class 0", "class 1", "class 3"], [0, 1, 2, 255]),
        ((0, 1, 2, 3), 2, "a\nb\nc", ["a", "b", "c"], [0, 1, 2, 255]),  # of the values that count, in rising order
        ((0, 2, 3), 2, "a\nb\nvoid\nd", ["a", "b", "d"], [0, 2, 255]),  # class 1 is in none of these masks
        ((0, 1, 2), 0, "void\nb\nc", ["b", "c"], [0, 1, 255]),
        ((0, 2, 255), 255, "a\nb\nc", ["a", "b", "c"], [0, 2, 255]),
    ],
)
def test_a_value_that_does_not_count_is_no_class(example, tmp_path, values, ignore, classes_txt, names, held):
    write(tmp_path, values=values)
    if classes_txt:
        (tmp_path / "classes.txt").write_text(classes_txt)
    found, train_set, _, _ = loaded(example, "--data", tmp_path, "--ignore", ignore)
    assert found == names
    assert np.unique(train_set[0][1]).tolist() == held


def test_a_line_for_a_value_that_does_not_count_is_one_too_many_where_lines_name_values_in_order(example, tmp_path):
    write(tmp_path, values=(0, 10, 20))
    (tmp_path / "classes.txt").write_text("a\nvoid\nb")
    with pytest.raises(ValueError, match=r"names 3 classes \(a, void, b\), .* hold 2 values \(0, 20\) beside --ignore 10$"):
        loaded(example, "--data", tmp_path, "--ignore", "10")


def test_no_line_names_a_value_beyond_the_last(example, tmp_path):
    write(tmp_path, values=(0, 3))
    (tmp_path / "classes.txt").write_text("a\nb\nc")
    with pytest.raises(ValueError, match=r"names 3 classes \(a, b, c\), but the masks hold 2 values \(0, 3\)$"):
        loaded(example, "--data", tmp_path)


@pytest.mark.parametrize("values", [(0, 255), (255,)])
def test_white_of_one_bit_is_white_of_eight(example, tmp_path, values):
    write(tmp_path, values=values)
    Image.fromarray(np.arange(40 * 56).reshape(40, 56) > 999).save(tmp_path / "train_masks" / "0.png")
    names, *sets, _ = loaded(example, "--data", tmp_path)
    assert names == ["background", "foreground"]
    assert {value for part in sets for _, mask in part for value in np.unique(mask)} == {0, 1}


def with_palettes(folder: Path, *palettes: tuple) -> Path:
    """Masks of two numbers, whose palettes are these in turns."""
    for number in range(4):
        palette = palettes[number % len(palettes)]
        mask = Image.fromarray(np.asarray(Image.open(folder / "train_masks" / f"{number}.png")) % 2 ^ number % len(palettes))
        mask.putpalette([part for colour in palette for part in colour])
        mask.save(folder / "train_masks" / f"{number}.png")
    return folder


BLACK, WHITE, GREY, RED = (0, 0, 0), (255, 255, 255), (128, 128, 128), (255, 0, 0)


def test_names_fit_a_palette_in_one_order_only(example, tmp_path):
    with_palettes(write(tmp_path), (WHITE, BLACK))
    names, train_set, _, _ = loaded(example, "--data", tmp_path)
    assert names == ["background", "foreground"]
    assert train_set[0][1][0].all()  # white
    (tmp_path / "classes.txt").write_text("sky\nhouse\n")
    with pytest.raises(ValueError, match=r"palettes begin with \(255, 255, 255\), .* in either order; save the masks as RGB"):
        loaded(example, "--data", tmp_path)
    with_palettes(write(tmp_path), (BLACK, WHITE), (WHITE, BLACK))  # numbers say nothing
    names, train_set, _, _ = loaded(example, "--data", tmp_path)
    assert names == ["sky", "house"]
    assert all(train_set[i][1].tolist() == train_set[0][1].tolist() for i in range(3))


def test_no_palette_without_black_is_all_foreground(example, tmp_path):
    with_palettes(write(tmp_path), (GREY, RED))
    with pytest.raises(ValueError, match=r"2 values \(\(128, 128, 128\), .* and no 0, so that --nonzero .* leave it out"):
        loaded(example, "--data", tmp_path, "--nonzero")


def test_colours_of_a_palette_without_black_are_classes(example, tmp_path):
    with_palettes(write(tmp_path), (GREY, RED))
    names, train_set, _, _ = loaded(example, "--data", tmp_path)
    assert names == ["class (128, 128, 128)", "class (255, 0, 0)"]
    assert (train_set[0][1][0, 0], train_set[0][1][-1, 0]) == (0, 1)


def test_numbers_tell_apart_what_a_palette_shows_in_one_colour(example, tmp_path):
    with_palettes(write(tmp_path), (WHITE, WHITE))
    names, train_set, _, _ = loaded(example, "--data", tmp_path)
    assert names == ["background", "foreground"]
    assert np.unique(train_set[0][1]).tolist() == [0, 1]


def test_palettes_that_number_their_colours_differently_are_refused(example, tmp_path):
    write(tmp_path, values=(0, 1, 2))
    for number in range(4):
        mask = Image.open(tmp_path / "train_masks" / f"{number}.png").convert("P", palette=Image.Palette.WEB)
        mask.putdata([*np.asarray(Image.open(tmp_path / "train_masks" / f"{number}.png")).flat])
        mask.putpalette([*BLACK, *RED, *GREY] if number % 2 else [*BLACK, *GREY, *RED])
        mask.save(tmp_path / "train_masks" / f"{number}.png")
    message = (
        r"have the colour \(128, 128, 128\) under the numbers 1, 2, so that numbers tell no classes apart; save the masks as"
    )
    for options in ((), ("--ignore", "2")):
        with pytest.raises(ValueError, match=message):
            loaded(example, "--data", tmp_path, *options)
    assert loaded(example, "--data", tmp_path, "--nonzero")[0] == ["background", "foreground"]


def test_floats_are_classes_where_they_are_whole(example, tmp_path):
    write(tmp_path, values=(0, 1, 2))
    for path in (tmp_path / "train_masks").iterdir():
        Image.fromarray(np.asarray(Image.open(path)).astype(np.float32)).save(path.with_suffix(".tif"))
        path.unlink()
    names, train_set, _, _ = loaded(example, "--data", tmp_path)
    assert names == ["class 0", "class 1", "class 2"]
    assert np.unique(train_set[0][1]).tolist() == [0, 1, 2]
    for path in (tmp_path / "train_masks").iterdir():
        Image.fromarray(np.asarray(Image.open(path)) / 4).save(path)
    with pytest.raises(ValueError, match=r"the masks hold 0\.25, and classes are whole numbers; round .* --nonzero"):
        loaded(example, "--data", tmp_path)
    assert np.unique(loaded(example, "--data", tmp_path, "--nonzero")[1][0][1]).tolist() == [0, 1]


def test_numbered_objects_are_foreground_if_one_says_so(example, tmp_path):
    write(tmp_path, values=tuple(range(40)))
    with pytest.raises(ValueError, match=r"40 values \(0, 1, .*--nonzero"):
        loaded(example, "--data", tmp_path)
    names, train_set, _, _ = loaded(example, "--data", tmp_path, "--nonzero")
    assert names == ["background", "foreground"]
    assert np.unique(train_set[0][1]).tolist() == [0, 1]
    assert len(loaded(example, "--data", write(tmp_path, values=tuple(range(32))))[0]) == 32  # few enough to be classes


def test_without_any_background_not_all_is_foreground(example, tmp_path):
    write(tmp_path, values=(1, 2))
    with pytest.raises(ValueError, match=r"2 values \(1, 2\) and no 0, so that --nonzero .* leave it out"):
        loaded(example, "--data", tmp_path, "--nonzero")


# ---- the split ----------------------------------------------------------------------------------------------------------


def test_the_last_pictures_are_held_out_in_natural_order(example, tmp_path):
    write(tmp_path, count=12)
    _, train_set, val_set, lines = loaded(example, "--data", tmp_path, "--val-last", "3")
    assert sorted(val_set.images) == ["10.png", "11.png", "9.png"]
    assert not set(train_set.images) & set(val_set.images)
    assert len(train_set) == 9
    assert lines[-1] == "held out for validation: 9.png, 10.png, 11.png"


def test_a_share_is_held_out_at_random_and_always_the_same(example, tmp_path):
    write(tmp_path, count=12)
    first, second = (loaded(example, "--data", tmp_path, "--val-share", "0.3") for _ in range(2))
    assert first[2].images == second[2].images
    assert len(first[2]) == 4
    names = sorted(first[1].images + first[2].images)
    assert names == sorted(f"{number}.png" for number in range(12))
    assert sorted(first[2].images) not in (names[:4], names[-4:])


# ---- bad folders: one clear error ---------------------------------------------------------------------------------------


def no_masks(folder: Path) -> None:
    for mask in (folder / "train_masks").iterdir():
        mask.unlink()
    (folder / "train_masks").rmdir()


def other_name(folder: Path) -> None:
    (folder / "train_masks" / "0.png").rename(folder / "train_masks" / "zero.png")


def other_size(folder: Path) -> None:
    Image.new("L", (20, 20), 255).save(folder / "train_masks" / "1.png")


def three_values(folder: Path) -> None:
    (folder / "classes.txt").write_text("ground\ncell\n")
    mask = np.asarray(Image.open(folder / "train_masks" / "1.png")).copy()
    mask[0, 0] = 128
    Image.fromarray(mask).save(folder / "train_masks" / "1.png")


def one_name_twice(folder: Path) -> None:
    (folder / "classes.txt").write_text("cell\ncell\n")


def names_in_utf_16(folder: Path) -> None:
    (folder / "classes.txt").write_text("ground\ncell\n", encoding="utf-16")


def one_picture(folder: Path) -> None:
    for name in ("train", "train_masks"):
        for number in range(1, 4):
            (folder / name / f"{number}.png").unlink()


def one_value(folder: Path) -> None:
    for mask in (folder / "train_masks").iterdir():
        Image.new("L", (56, 40)).save(mask)


def cut_off(folder: Path) -> None:
    mask = folder / "train_masks" / "1.png"
    mask.write_bytes(mask.read_bytes()[:60])


def no_picture(folder: Path) -> None:
    (folder / "train_masks" / "1.png").write_text("no picture")


def wide_integers(folder: Path) -> None:
    tifffile.imwrite(folder / "train_masks" / "1.tif", np.eye(8, dtype=np.int64))
    (folder / "train_masks" / "1.png").unlink()


def colours_and_numbers(folder: Path) -> None:
    Image.open(folder / "train_masks" / "1.png").convert("RGB").save(folder / "train_masks" / "1.png")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (no_masks, r"there is no folder train_masks/; pictures belong in its folder train/ and masks in train_masks/"),
        (other_name, "1 x picture without a mask"),
        (other_size, "1 x size clash"),
        (three_values, r"names 2 classes \(ground, cell\), but the masks hold 3 values \(0, 128, 255\)"),
        (one_name_twice, "names cell more than once"),
        (names_in_utf_16, r"classes\.txt is not UTF-8; save it again as UTF-8"),
        (one_picture, "one picture cannot be both .* give two or more, or val/ and val_masks/"),
        (one_value, "the masks hold the one value 0"),
        (cut_off, r"train_masks/1\.png cannot be read as a picture \(.*\)\. Replace or remove it"),
        (no_picture, r"train_masks/1\.png cannot be read as a picture \(.*\)\. Replace or remove it"),
        (wide_integers, r"train_masks/1\.tif cannot be read .*, save array\.astype\(numpy\.uint16\) instead"),
        (colours_and_numbers, "some masks hold numbers and others colours"),
    ],
)
def test_a_bad_folder_is_one_clear_error(example, tmp_path, spoil, message):
    spoil(write(tmp_path))
    with pytest.raises(SystemExit, match=message):
        example("finetune").main(["--data", str(tmp_path), "--out", str(tmp_path / "out"), *TINY])


def renamed(masks: Path, suffix: str) -> Path:
    for mask in list(masks.iterdir()):
        mask.rename(mask.with_stem(mask.stem + suffix))
    return masks


@pytest.mark.parametrize("suffix", ["", "_mask", "_seg"])
def test_the_suffix_of_masks_is_found_where_it_is_carvanas_or_none(example, tmp_path, capsys, suffix):
    data = write(tmp_path / "mine")
    masks = renamed(data / "train_masks", suffix)
    given = ["--mask-suffix", suffix] if suffix == "_seg" else []
    names, train, val, _ = loaded(example, "--data", data, *given)
    assert (names, len(train) + len(val)) == (["background", "foreground"], 4)
    model = UNet(features=(8,)).save_pretrained(tmp_path / "model")
    options = ["--model", str(model), "--images", str(data / "train"), "--device", "cpu", *given]
    example("evaluate").main([*options, "--masks", str(masks)])
    assert json.loads(capsys.readouterr().out)["pictures"] == 4
    example("evaluate").main([*options[: -len(given) or None], "--masks", f"{masks}/*{suffix}"])  # a pattern says it all
    assert json.loads(capsys.readouterr().out)["pictures"] == 4


def test_a_picture_of_a_mask_is_told_by_its_users_word(example, tmp_path):
    data = write(tmp_path / "mine")
    for folder in ("train", "train_masks"):
        (data / folder / "3.png").rename(data / folder / "gas_mask.png")
    with pytest.raises(ValueError, match=r"give mask_suffix='' \(--mask-suffix\)"):
        loaded(example, "--data", data)
    assert len(loaded(example, "--data", data, "--mask-suffix", "")[1]) == 3


def test_no_folder_is_told_from_one_of_another_layout(example, tmp_path):
    with pytest.raises(SystemExit, match=r"^--data nowhere: there is no such folder$"):
        example("finetune").main(["--data", "nowhere", "--out", str(tmp_path / "out"), *TINY])


def test_weights_to_start_from_that_there_are_none_of_are_one_clear_error(example, tmp_path):
    write(tmp_path)
    with pytest.raises(SystemExit, match="nosuch"):
        example("finetune").main(["--data", str(tmp_path), "--out", str(tmp_path / "out"), *TINY, "--init", "nosuch"])


def test_some_pictures_must_be_left_to_train_on(example, tmp_path):
    write(tmp_path)
    with pytest.raises(ValueError, match="cannot hold out 4 of 4 pictures"):
        loaded(example, "--data", tmp_path, "--val-last", "4")


@pytest.mark.parametrize("option", ["--val-last 2", "--val-share 0.2"])
def test_pictures_are_held_out_or_there_is_a_folder_of_them(example, tmp_path, option):
    write(write(tmp_path), split="val")
    with pytest.raises(ValueError, match=f"{option} holds out pictures of train/, but there is a val/"):
        loaded(example, "--data", tmp_path, *option.split())


def test_pictures_are_held_out_in_one_way(example, capsys):
    with pytest.raises(SystemExit):
        example("finetune").parse_args(["--data", "mine", "--val-last", "2", "--val-share", "0.2"])
    assert "--val-last 2 and --val-share 0.2 both hold out pictures; give one of the two" in capsys.readouterr().err


def test_a_run_goes_on_with_the_pictures_and_classes_that_it_had(example, tmp_path):
    data = write(tmp_path / "mine", count=8)
    options = ["--data", str(data), "--out", str(tmp_path / "out"), *TINY]
    example("finetune").main(options)
    with pytest.raises(SystemExit, match="is of an earlier run; add --resume to go on with it, or give another --out"):
        example("finetune").main(options)
    (data / "classes.txt").write_text("ground\ncell\n")
    with pytest.raises(SystemExit, match="the classes of --data are no longer those of the run; bring those back, or give"):
        example("finetune").main([*options, "--resume"])
    (data / "classes.txt").unlink()
    for folder in ("train", "train_masks"):
        (data / folder / "7.png").rename(data / folder / "8.png")
    with pytest.raises(SystemExit, match="the pictures of --data are no longer those of the run; bring those back, or give"):
        example("finetune").main([*options, "--resume"])


# ---- the two data sets --------------------------------------------------------------------------------------------------


@needs_data
@pytest.mark.parametrize(("name", "options", "counts"), [("nuclei", [], (461, 51)), ("em", ["--val-last", "3"], (21, 3))])
def test_the_real_folders_are_read(example, name, options, counts):
    _, train_set, val_set, _ = loaded(example, "--data", Path(os.environ["UNETLIB_DATA"]) / name, *options)
    assert (len(train_set), len(val_set)) == counts


# ---- evaluate.py --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("given", "tta"), [(["--tta", "mirror"], "mirror"), (["--tta", "all"], True), (["--tta"], True)])
def test_evaluation_scores_objects_and_edges(example, tmp_path, capsys, given, tta):
    write(tmp_path, count=2)
    model = randomize(UNet(features=(8,)))
    with torch.no_grad():  # half of the pixels are found
        model.head.bias -= next(iter_logits(model, [tmp_path / "train" / "0.png"])).median()
    model.save_pretrained(tmp_path / "model")
    folders = ["--images", str(tmp_path / "train"), "--masks", str(tmp_path / "train_masks")]
    options = ["--objects", "--device", "cpu", *given]
    example("evaluate").main(["--model", str(tmp_path / "model"), *folders, *options])
    scores = json.loads(capsys.readouterr().out)
    pairs = [[np.asarray(Image.open(tmp_path / part / f"{k}.png")) for part in ("train", "train_masks")] for k in range(2)]
    expected = [rand_f_score(label_objects(model.eval().predict(picture, tta=tta)), mask) for picture, mask in pairs]
    assert scores["pictures"] == 2
    zeros_and_ones = [(picture, (mask > 0).astype(np.uint8)) for picture, mask in pairs]
    assert scores["dice"] == round(evaluate(model, zeros_and_ones, tta=tta)["dice"], 5)  # as many digits as people read
    assert scores["dice"] != pytest.approx(evaluate(model, zeros_and_ones)["dice"])
    assert scores["rand"] == round(np.mean(expected), 5)
    assert 0 <= scores["ap"] <= scores["ap50"] <= 1
    edges = []
    for picture, mask in pairs:
        found = torch.from_numpy(model.predict(picture, tta=tta) > 0)
        edges.append(boundary_f_score(20.0 * found[None, None] - 10, torch.from_numpy(mask > 0)[None]).item())
    assert 0 < np.mean(edges) < 1
    assert scores["edge_f"] == round(np.mean(edges), 5)


def test_the_page_has_every_option():
    script = (ROOT / "examples" / "finetune.py").read_text(encoding="utf-8")
    page = (ROOT / "docs" / "finetune.md").read_text(encoding="utf-8")
    options = re.findall(r'^ +add\(\s*"(--[\w-]+)"', script, re.MULTILINE)
    assert len(options) > 5
    assert re.findall(r"^\| `(--[\w-]+)` \|", page, re.MULTILINE) == options


def test_evaluation_of_masks_with_more_values(example, tmp_path, capsys):
    folders = [
        "--images",
        str(tmp_path / "train"),
        "--masks",
        str(tmp_path / "train_masks"),
        "--device",
        "cpu",
    ]
    write(tmp_path, values=(0, 3, 7))
    for channels, option, accuracy in ((3, ["--mask-values", "0", "3", "7"], 1 / 3), (1, ["--nonzero"], 2 / 3)):
        model = UNet(features=(8,), out_channels=channels)
        torch.nn.init.zeros_(model.head.weight)  # so that all of it is the last class
        torch.nn.init.constant_(model.head.bias[-1:], 1.0)
        model.save_pretrained(tmp_path / "model")
        example("evaluate").main(["--model", str(tmp_path / "model"), *folders, *option])
        assert json.loads(capsys.readouterr().out)["accuracy"] == pytest.approx(accuracy, abs=0.02)
    with pytest.raises(SystemExit, match="binary mask"):
        example("evaluate").main(["--model", str(tmp_path / "model"), *folders])


def test_what_cannot_be_evaluated_is_one_clear_error(example, tmp_path, capsys):
    evaluation = example("evaluate")
    with pytest.raises(SystemExit, match="nosuch"):
        evaluation.main(["--model", "nosuch", "--synthetic", "1"])
    UNet(features=(8,)).save_pretrained(tmp_path / "model")
    with pytest.raises(SystemExit, match="there is no folder 'nosuch'"):
        evaluation.main(["--model", str(tmp_path / "model"), "--images", "nosuch", "--masks", "nosuch"])
    with pytest.raises(SystemExit):
        evaluation.main(["--synthetic", "-3"])
    assert "--synthetic=-3 must be 0 or more" in capsys.readouterr().err
    pictures = ["--images", "pictures", "--masks", "masks"]
    for options, message in (
        (["--synthetic", "1", *pictures], "give one, not both"),
        (["--synthetic", "1", "--size", "0", "9"], "--size=0"),
        (["--synthetic", "1", "--nonzero"], "are for mask files, and scenes have none; leave them out"),
        (["--synthetic", "1", "--mask-values", "0", "1"], "are for mask files, and scenes have none; leave them out"),
        (["--synthetic", "1", "--ignore", "255"], "are for mask files, and scenes have none; leave them out"),
        ([*pictures, "--size", "64", "96"], "--size is that of the scenes of --synthetic"),
    ):
        with pytest.raises(SystemExit):
            evaluation.main(options)
        assert message in capsys.readouterr().err


def test_scenes_say_nothing_of_other_classes(example, tmp_path):
    UNet(features=(8,), out_channels=3).save_pretrained(tmp_path / "model")
    with pytest.raises(SystemExit, match=r"tells 3 classes apart \(0, 1, 2\), and rendered scenes have two; give --images"):
        example("evaluate").main(["--model", str(tmp_path / "model"), "--synthetic", "1"])


def test_evaluation_of_objects_asks_for_scipy_before_the_work(example, tmp_path, monkeypatch, capsys):
    module, there = example("evaluate"), importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "scipy" else there(name))
    with pytest.raises(SystemExit):
        module.main(["--model", str(tmp_path / "none"), "--synthetic", "1", "--objects"])
    assert "needs scipy: pip install 'unetlib[metrics]'" in capsys.readouterr().err
