from __future__ import annotations

import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
import torch.nn.functional as F
from PIL import Image, ImageSequence
from pretended_mps import OnMps
from torch.optim.swa_utils import AveragedModel

from unetlib import ImageMaskDataset, Preprocessing, UNet, passes, pictures, rasters
from unetlib.cache import CachedDataset
from unetlib.imaging import read_image
from unetlib.inference import evaluate, iter_logits, network_inputs, predict
from unetlib.metrics import SegmentationMetrics
from unetlib.objects import ObjectMetrics
from unetlib.synthetic import write_carvana
from unetlib.tiling import plan_tiles


@pytest.fixture
def model():
    torch.manual_seed(0)
    return UNet(features=(8, 16)).eval()


@pytest.fixture
def picture():
    return np.random.default_rng(0).integers(0, 256, (37, 50, 3), np.uint8)


def logits_by_hand(model, picture):
    """The network on the picture's own pixels, without the library's own way there."""
    pixels = torch.from_numpy(picture.astype(np.float32) / 255).permute(2, 0, 1)
    with torch.no_grad():
        return model(pixels[None])[0]


def test_the_mask_is_the_sign_of_the_logits(model, picture):
    mask = model.predict(picture)
    assert mask.dtype == np.uint8
    assert mask.shape == (37, 50)
    assert (mask == (logits_by_hand(model, picture)[0] >= 0).numpy()).all()


def test_probabilities_and_threshold(model, picture):
    probabilities = model.predict(picture, probabilities=True)
    assert probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities, logits_by_hand(model, picture)[0].sigmoid().numpy(), atol=1e-6)
    nearby = np.sort(probabilities, axis=None)[probabilities.size // 2 - 100 :][:200]
    widest = np.diff(nearby).argmax()  # between two values that no machine's rounding brings together
    middle = float(nearby[widest : widest + 2].mean())
    assert 0.3 < model.predict(picture, threshold=middle).mean() < 0.7
    assert (model.predict(picture, threshold=middle) == (probabilities > middle)).all()
    model.preprocessing = Preprocessing(threshold=middle)
    assert (model.predict(picture) == (probabilities >= middle)).all()


def test_a_probability_equal_to_the_threshold_is_background_as_in_the_scores(picture):
    model = UNet(features=(8,))
    torch.nn.init.zeros_(model.head.weight)
    torch.nn.init.zeros_(model.head.bias)
    mask = model.predict(picture)
    assert not mask.any()
    assert evaluate(model, [(picture, np.ones_like(mask))])["accuracy"] == 0


def test_every_form_of_a_picture_gives_the_same_mask(model, picture, tmp_path):
    path = tmp_path / "picture.png"
    Image.fromarray(picture).save(path)
    tensor = torch.from_numpy(picture).permute(2, 0, 1)
    expected = model.predict(picture, probabilities=True)
    for form in (path, str(path), Image.open(path), tensor, tensor.float() / 255):
        np.testing.assert_allclose(model.predict(form, probabilities=True), expected, atol=1e-6)


def test_a_list_gives_a_list_in_order_whatever_the_sizes_and_batches(model):
    rng = np.random.default_rng(1)
    pictures = [rng.integers(0, 256, (h, w, 3), np.uint8) for h, w in ((20, 30), (20, 30), (41, 17), (20, 30), (8, 90))]
    alone = [model.predict(p, probabilities=True) for p in pictures]
    for batch_size in (1, 2, 5, 99):
        together = model.predict(pictures, probabilities=True, batch_size=batch_size)
        assert [p.shape for p in together] == [(20, 30), (20, 30), (41, 17), (20, 30), (8, 90)]
        for one, other in zip(alone, together):
            np.testing.assert_allclose(one, other, atol=1e-5)
    assert model.predict([]) == []


def test_several_classes_take_the_largest_logit(picture):
    torch.manual_seed(0)
    model = UNet(out_channels=4, features=(8,)).eval()
    logits = logits_by_hand(model, picture)
    assert (model.predict(picture) == logits.argmax(dim=0).numpy()).all()
    probabilities = model.predict(picture, probabilities=True)
    assert probabilities.shape == (4, 37, 50)
    np.testing.assert_allclose(probabilities, logits.softmax(dim=0).numpy(), atol=1e-6)
    with pytest.raises(ValueError, match="largest logit"):
        model.predict(picture, threshold=0.5)


@pytest.fixture
def overlapping(picture):
    torch.manual_seed(0)
    model = UNet(out_channels=3, features=(8, 16)).eval()
    with torch.no_grad():  # about half of the pixels are of each class
        model.head.bias.sub_(logits_by_hand(model, picture).mean(dim=(1, 2)))
    model.preprocessing = Preprocessing(class_names=("road", "wet", "marked"), multilabel=True)
    return model


def test_classes_that_overlap_are_decided_one_by_one(overlapping, picture):
    logits = logits_by_hand(overlapping, picture)
    masks = overlapping.predict(picture)
    assert masks.dtype == np.uint8
    assert masks.shape == (3, 37, 50)
    np.testing.assert_array_equal(masks, (logits > 0).numpy())
    assert set(masks.sum(axis=0).flat) == {0, 1, 2, 3}
    np.testing.assert_array_equal(overlapping.predict(picture, threshold=0.51), (logits.sigmoid() > 0.51).numpy())
    np.testing.assert_allclose(overlapping.predict(picture, probabilities=True), logits.sigmoid().numpy(), atol=1e-6)
    with pytest.raises(ValueError, match="threshold is a probability"):
        overlapping.predict(picture, threshold=1)


@pytest.mark.parametrize("metrics", ["dice", ["dice", "iou"], SegmentationMetrics, ObjectMetrics()])
def test_what_is_no_metrics_of_pixels_is_refused(model, picture, metrics):
    with pytest.raises(TypeError, match=r"must be a SegmentationMetrics, such as SegmentationMetrics\(1\), got "):
        evaluate(model, [(picture, np.zeros((37, 50), np.uint8))], metrics=metrics)


def test_metrics_of_the_other_kind_are_refused(overlapping, picture):
    pairs = [(picture, np.zeros((37, 50), np.uint8))]
    with pytest.raises(ValueError, match=r"multilabel=True, metrics False; give SegmentationMetrics\(3, multilabel=True\)"):
        evaluate(overlapping, pairs, metrics=SegmentationMetrics(3))
    with pytest.raises(ValueError, match=r"give SegmentationMetrics\(3, multilabel=False\)"):
        evaluate(UNet(out_channels=3, features=(8, 16)), pairs, metrics=SegmentationMetrics(3, multilabel=True))
    with pytest.raises(ValueError, match=r"give SegmentationMetrics\(2, multilabel=False\)"):
        evaluate(UNet(out_channels=2, features=(8, 16)), pairs, metrics=SegmentationMetrics(2, multilabel=True))


def test_classes_that_overlap_in_tiles_files_and_all_symmetries(overlapping, wide, tmp_path):
    masks = overlapping.predict(wide)
    assert masks.mean() not in (0, 1)
    np.testing.assert_array_equal(overlapping.predict(wide, tile=72), masks)
    np.testing.assert_array_equal(np.load(overlapping.predict(wide, tile=72, out=tmp_path / "masks.npy")), masks)
    with pytest.raises(ValueError, match=r"one class for each pixel; give a \.npy file for masks that may overlap"):
        overlapping.predict(wide, out=tmp_path / "masks.tif")
    views = [overlapping.predict(wide[:, ::step], probabilities=True)[..., ::step] for step in (1, -1)]
    np.testing.assert_allclose(overlapping.predict(wide, probabilities=True, tta="mirror"), np.mean(views, axis=0), atol=1e-6)


def test_classes_that_overlap_are_scored_one_by_one(overlapping, picture):
    truth = np.random.default_rng(3).integers(0, 2, (3, 37, 50), np.uint8)
    found = overlapping.predict(picture)
    dice = 2 * (found & truth).sum(axis=(1, 2)) / (found.sum(axis=(1, 2)) + truth.sum(axis=(1, 2), dtype=int))
    scores = evaluate(overlapping, [(picture, truth)])
    assert scores["dice"] == pytest.approx(dice.mean(), abs=1e-9)
    assert scores["accuracy"] == pytest.approx((found == truth).mean(), abs=1e-9)


@pytest.mark.parametrize(
    ("preprocessing", "seen"), [(Preprocessing(size=(16, 24)), (16, 24)), (Preprocessing(scale=0.5), (18, 25))]
)
def test_size_and_scale_say_what_the_network_sees_and_the_mask_comes_back(model, picture, preprocessing, seen):
    shapes = []
    model.register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape)))
    model.preprocessing = preprocessing
    probabilities = model.predict(picture, probabilities=True)
    assert shapes == [(1, 3, *seen)]
    small = F.interpolate(torch.from_numpy(picture).permute(2, 0, 1)[None].float(), seen, mode="bilinear", antialias=True)
    with torch.no_grad():
        logits = F.interpolate(model(small / 255), (37, 50), mode="bilinear")
    # Half a grey level apart: predict reduces the picture in whole grey levels, as the training transforms do.
    np.testing.assert_allclose(probabilities, logits[0, 0].sigmoid().numpy(), atol=5e-3)


def test_mean_and_std_are_applied(model, picture):
    model.preprocessing = Preprocessing(mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
    pixels = torch.from_numpy((picture / 255.0 - [0.4, 0.5, 0.6]) / [0.2, 0.25, 0.3]).float().permute(2, 0, 1)
    with torch.no_grad():
        expected = model(pixels[None])[0, 0].sigmoid().numpy()
    np.testing.assert_allclose(model.predict(picture, probabilities=True), expected, atol=1e-5)


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (5, 2)])
def test_pictures_smaller_than_the_poolings_need(model, size):
    assert model.predict(np.zeros((*size, 3), np.uint8)).shape == size


def test_grey_and_colour_are_matched_to_the_network(model, picture):
    grey = picture[..., 0]
    np.testing.assert_array_equal(model.predict(grey), model.predict(np.repeat(grey[..., None], 3, axis=2)))
    one_channel = UNet(in_channels=1, features=(8,)).eval()
    luma = np.asarray(Image.fromarray(picture).convert("L"))
    tensor = torch.from_numpy(picture).movedim(-1, 0)
    by_pillow, *others = network_inputs(one_channel, [Image.fromarray(picture), luma, picture, tensor])
    assert all(torch.equal(one, by_pillow) for one in others)
    (of_floats,) = network_inputs(one_channel, [tensor / 255])
    torch.testing.assert_close(of_floats, by_pillow, atol=0.502 / 255, rtol=0)  # Pillow rounds
    (white,) = network_inputs(one_channel, [torch.ones(3, 8, 8)])
    assert (white == 1).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_half_precision_pictures_are_resized_as_floats(dtype):
    model, picture = UNet(in_channels=1, features=(8,)), torch.rand(3, 40, 50).to(dtype)
    model.preprocessing = Preprocessing(size=(16, 24))
    half, whole = network_inputs(model, [picture, picture.float()])
    assert torch.equal(half, whole)


def test_training_modes_are_left_as_they_were(model, picture):
    model.train()
    model.encoder[0].eval()  # a frozen block
    before = [module.training for module in model.modules()]
    statistics = {key: value.clone() for key, value in model.state_dict().items()}
    model.predict(picture)
    assert [module.training for module in model.modules()] == before
    assert all(torch.equal(value, statistics[key]) for key, value in model.state_dict().items())
    with pytest.raises(ValueError):
        model.predict([picture, np.zeros((2, 2, 7), np.uint8)])
    assert [module.training for module in model.modules()] == before


def test_a_pass_that_fails_leaves_modes_and_memory_as_they_were(model, picture, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError

    freed = []
    monkeypatch.setattr(passes, "free_memory", freed.append)
    monkeypatch.setattr(passes, "fast_copy", lambda *_, **__: None)
    model.train().head.register_forward_pre_hook(fail)
    with pytest.raises(torch.OutOfMemoryError):
        model.predict(picture)
    assert all(module.training for module in model.modules())
    assert freed == [model]


def test_an_interrupt_on_the_way_to_evaluation_mode_leaves_modes_as_they_were(model, picture, monkeypatch):
    def interrupted(mode):
        raise KeyboardInterrupt

    model.train().encoder[1].eval()
    before = [module.training for module in model.modules()]
    monkeypatch.setattr(passes, "fast_copy", lambda *_, **__: None)
    monkeypatch.setattr(model.head, "train", interrupted)  # the last of all modules
    with pytest.raises(KeyboardInterrupt):
        model.predict(picture)
    assert [module.training for module in model.modules()] == before


def test_an_interrupt_on_the_way_back_leaves_modes_as_they_were(model, picture, monkeypatch):
    def interrupted(module, name, value):
        if (name, value) == ("training", True):
            restored.append(module)
            if len(restored) == 3:
                raise KeyboardInterrupt
        setter(module, name, value)

    model.train().encoder[1].eval()
    before, restored, setter = [module.training for module in model.modules()], [], torch.nn.Module.__setattr__
    monkeypatch.setattr(passes, "fast_copy", lambda *_, **__: None)
    monkeypatch.setattr(torch.nn.Module, "__setattr__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.predict(picture)
    assert [module.training for module in model.modules()] == before


def test_threads_share_a_network_in_training(model, picture):
    expected = model.predict(picture, probabilities=True)
    model.train()
    inside, both, first_is_over = threading.Event(), threading.Event(), threading.Event()

    def wait_for_the_other(*_):
        if inside.is_set():
            both.set()
            first_is_over.wait()
        inside.set()
        both.wait(0.2)  # in here the second thread could take these modes for the network's own

    model.encoder[0].register_forward_pre_hook(wait_for_the_other)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(model.predict, picture, probabilities=True)
        inside.wait()
        second = pool.submit(model.predict, picture, probabilities=True)
        first.add_done_callback(lambda _: first_is_over.set())
        results = first.result(), second.result()
    for result in results:
        np.testing.assert_allclose(result, expected, atol=1e-6)
    assert all(module.training for module in model.modules())
    assert model.encoder[0].norm1.num_batches_tracked == 0


def test_threads_share_a_network():
    torch.manual_seed(0)
    model, random = UNet(features=(16, 32)).eval(), np.random.default_rng(0)
    pictures = [random.integers(0, 256, (height, 64, 3), np.uint8) for height in (48, 64, 80, 96)] * 8
    with ThreadPoolExecutor(8) as pool:  # one makes the copy, and each size is new to each thread
        results = list(pool.map(partial(model.predict, probabilities=True), pictures))
    for picture, result in zip(pictures, results, strict=True):
        np.testing.assert_allclose(result, logits_by_hand(model, picture)[0].sigmoid().numpy(), atol=1e-5)


def test_training_goes_on_after_a_prediction(model, picture):
    model.predict(picture)
    model(torch.rand(1, 3, 16, 16)).sum().backward()
    assert model.head.weight.grad is not None


def test_progress_shows_a_bar_with_the_number_of_pictures(model, picture, capsys):
    model.predict([picture, picture], progress=True)
    assert "2/2" in capsys.readouterr().err
    model.predict([picture, picture])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("most", "expected"), [(10**6, [3]), (2 * 37 * 50, [2, 1]), (1, [1, 1, 1])])
def test_on_a_cpu_a_batch_has_only_so_many_pixels(model, picture, monkeypatch, most, expected):
    monkeypatch.setattr(passes, "_MOST_ON_CPU", most)
    batches = []
    model.register_forward_pre_hook(lambda module, args: batches.append(len(args[0])))
    model.predict([picture] * 3)
    assert batches == expected


@pytest.mark.parametrize("tta", [False, True])
def test_a_picture_of_floats_is_normalised_once_for_each_pass_and_stays_as_it_is(model, picture, tta):
    model.preprocessing = Preprocessing(mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
    floats = torch.from_numpy(picture).permute(2, 0, 1) / 255
    before = floats.clone()
    found = model.predict(floats, probabilities=True, tta=tta)
    np.testing.assert_allclose(found, model.predict(picture, probabilities=True, tta=tta), atol=1e-6)
    assert torch.equal(floats, before)
    passes.normalized(model, floats[None])  # no caller's batch is changed in its place
    assert torch.equal(floats, before)


def test_iter_logits_reads_a_batch_at_a_time(model, picture):
    taken = []

    def pictures():
        for index in range(6):
            taken.append(index)
            yield picture

    logits = iter_logits(model, pictures(), batch_size=2)
    assert next(logits).shape == (1, 37, 50)
    assert taken == [0, 1]


@pytest.mark.parametrize(("scale", "tile"), [(None, None), (0.5, None), (None, 32)])
def test_logits_may_be_changed_and_derived_from(scale, tile):
    model = UNet(features=(4, 8))
    model.preprocessing = Preprocessing(scale=scale)
    temperature = torch.ones((), requires_grad=True)
    (logits,) = iter_logits(model, [np.zeros((64, 80, 3), np.uint8)], tile=tile, overlap=4 if tile else None)
    (logits.add_(1) * temperature).sum().backward()
    assert temperature.grad == pytest.approx(logits.sum().item(), rel=1e-5)


def test_evaluate_scores_the_masks_that_predict_gives(model, capsys):
    rng = np.random.default_rng(2)
    pairs = [
        (rng.integers(0, 256, (h, w, 3), np.uint8), rng.integers(0, 2, (h, w), np.uint8))
        for h, w in ((9, 30), (20, 8), (9, 30))
    ]
    model.preprocessing = Preprocessing(size=(16, 16), threshold=0.47)
    dice, right, pixels = [], 0, 0
    for picture, mask in pairs:
        found = model.predict(picture)
        dice.append(2 * (found & mask).sum() / (found.sum() + mask.sum()))
        right, pixels = right + (found == mask).sum(), pixels + mask.size
    scores = evaluate(model, pairs, batch_size=2, progress=True)
    assert scores["dice"] == pytest.approx(np.mean(dice), abs=1e-9)
    assert scores["accuracy"] == pytest.approx(right / pixels, abs=1e-9)
    assert "3/3" in capsys.readouterr().err


@pytest.mark.parametrize("options", [{}, {"probabilities": True}, {"tile": 56}, {"out": "mask.npy"}])
def test_logits_that_are_nan_are_no_mask(model, wide, options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(wide).save("a.png")
    model.head.bias.data.fill_(torch.nan)
    with os.scandir(tmp_path) as entries:
        (entry,) = entries
    for images, name in (("a.png", "'a.png'"), (entry, f"'{tmp_path}/a.png'"), (wide, r"the picture \[0\]")):
        with pytest.raises(ValueError, match=rf"logits for {name} hold NaN: .* predict in float32"):
            model.predict(images, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_infinity_is_a_sigmoid_s_number_but_no_softmax_s(picture):
    for channels, refused in ((1, False), (3, True)):
        model = UNet(out_channels=channels, features=(8, 16))
        model.head.bias.data[-1] = torch.inf  # of one class
        if refused:
            with pytest.raises(ValueError, match=r"the picture \[0\] hold infinity: .* predict in float32"):
                model.predict(picture)
        else:
            assert model.predict(picture).all()


def test_what_comes_as_an_open_file_is_told(model, tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    with open(tmp_path / "a.png", "rb") as file, pytest.raises(TypeError, match=r"or unetlib\.imaging\.read_image"):
        model.predict(file)


def test_the_picture_whose_logits_are_nan_is_named(model, picture):
    model.head.register_forward_hook(lambda module, args, logits: logits * (torch.nan if logits.shape[-1] == 32 else 1))
    with pytest.raises(ValueError, match=r"the picture \[2\] hold NaN"):
        model.predict([picture, picture, picture[:32, :32], picture[:32, :32]], batch_size=4)


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        ("nowhere.jpg", FileNotFoundError, "nowhere.jpg"),
        (3.5, TypeError, "got float$"),
        (b"GIF89a", TypeError, r"got bytes; give unetlib\.imaging\.read_image\(io\.BytesIO\(data\)\)$"),
        (iter(["a.jpg"]), TypeError, r"got list_iterator; give list\(pictures\), or take iter_logits"),
        (np.zeros((4, 4, 3), np.float32), ValueError, r"float32 \(4, 4, 3\)"),
        (np.zeros((4, 4, 5), np.uint8), ValueError, "5 channels"),
        (np.zeros((0, 4, 3), np.uint8), ValueError, "empty"),
        (torch.zeros(1, 3, 4, 4), ValueError, r"list\(batch\)"),
        (torch.zeros(3, 4, 4, dtype=torch.int64), ValueError, "int64"),
        (torch.full((3, 4, 4), 255.0), ValueError, "255 to 255"),
        (torch.full((3, 4, 4), float("nan")), ValueError, "nan"),
    ],
)
def test_bad_pictures_are_named(model, image, error, message):
    with pytest.raises(error, match=message):
        model.predict(image)


@pytest.mark.parametrize("threshold", [0.0, 1.0, -1, 2])
def test_bad_thresholds(model, picture, threshold):
    with pytest.raises(ValueError, match="threshold is a probability between 0 and 1"):
        model.predict(picture, threshold=threshold)


@pytest.mark.parametrize("threshold", ["0.5", [0.5], True, np.array([0.4, 0.6]), torch.tensor([0.4, 0.6])])
def test_thresholds_that_are_no_numbers(model, picture, threshold):
    with pytest.raises(ValueError, match=rf"threshold is a probability between 0 and 1, got {re.escape(repr(threshold))}"):
        model.predict(picture, threshold=threshold)


def test_bad_batch_size(model, picture):
    with pytest.raises(ValueError, match="batch_size=0 must be 1 or more"):
        model.predict(picture, batch_size=0)
    for number in (2.5, "4"):
        with pytest.raises(TypeError, match=f"batch_size={number!r} must be an integer"):
            model.predict(picture, batch_size=number)


def test_one_picture_is_not_taken_for_several(model, picture):
    tensor = torch.from_numpy(picture).permute(2, 0, 1)
    for one in ("photo.jpg", Image.fromarray(picture), picture, tensor, picture[..., 0]):
        for function in (iter_logits, network_inputs):
            with pytest.raises(ValueError, match=r"expected several pictures, got one \w+; give a list, such as \[picture\]"):
                next(function(model, one))
    assert len(list(iter_logits(model, np.stack([picture, picture])))) == 2


def test_floats_may_lie_beside_the_range_by_rounding(model, picture):
    exact = (torch.from_numpy(picture).permute(2, 0, 1) / 255).round()
    rounded = exact * (1 + 1e-6) - 1e-7
    assert rounded.amin() < 0
    assert rounded.amax() > 1
    np.testing.assert_allclose(model.predict(rounded, probabilities=True), model.predict(exact, probabilities=True), atol=1e-5)
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\], got 0 to 1\.00199997; .* as in training .*uint16: / 65535"):
        model.predict(exact * 1.002)


@pytest.mark.parametrize("classes", [256, 257, 300])
def test_many_classes_do_not_wrap_around(picture, tmp_path, classes):
    torch.manual_seed(0)
    model = UNet(out_channels=classes, features=(4,)).eval()
    with torch.no_grad():
        model.head.bias[: classes - 9] -= 9.0  # the last ones win
    mask = model.predict(picture)
    assert mask.dtype == (np.uint8 if classes == 256 else np.int32)
    assert mask.min() >= classes - 9
    np.testing.assert_array_equal(mask, logits_by_hand(model, picture).argmax(dim=0))
    np.testing.assert_array_equal(model.predict(picture, tile=24), mask)
    np.testing.assert_array_equal(np.load(model.predict(picture, out=tmp_path / "mask.npy")), mask)
    np.testing.assert_array_equal(tifffile.imread(model.predict(picture, out=tmp_path / "mask.tif")), mask)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_gives_the_cpu_mask(model, picture):
    on_cpu = model.predict(picture, probabilities=True)
    on_cuda = model.to("cuda").predict(torch.from_numpy(picture).permute(2, 0, 1), probabilities=True)
    np.testing.assert_allclose(on_cuda, on_cpu, atol=1e-2)  # TF32 convolutions


# --- huge pictures: tiles, symmetries, files by region


@pytest.fixture
def wide():
    return np.random.default_rng(3).integers(0, 256, (88, 132, 3), np.uint8)


def few_pixels(monkeypatch, pixels):
    """As if memory were so short."""
    monkeypatch.setattr(passes, "pixels_in_one_pass", lambda config, **where: pixels)


def shapes_seen(model):
    shapes = []
    model.register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape)))
    return shapes


@pytest.mark.parametrize("out_channels", [1, 3])
@pytest.mark.parametrize("tile", [64, (64, 72), (1000, 64)])
def test_tiles_give_what_the_whole_picture_gives(wide, out_channels, tile):
    torch.manual_seed(0)
    model = UNet(features=(4, 8), out_channels=out_channels).eval()
    shapes = shapes_seen(model)
    whole = model.predict(wide, probabilities=True)
    assert shapes == [(1, 3, 88, 132)]
    tiles = model.predict(wide, probabilities=True, tile=tile)
    assert len(shapes) > 1
    assert max(shape[0] for shape in shapes) > 1  # equal tiles go together
    assert tiles.shape == whole.shape
    np.testing.assert_allclose(tiles, whole, rtol=1e-5, atol=1e-6)
    (logits,) = iter_logits(model, [wide], tile=tile)
    np.testing.assert_allclose(logits.numpy(), logits_by_hand(model, wide).numpy(), rtol=1e-5, atol=1e-6)
    classes = model.predict(wide, tile=tile)
    np.testing.assert_array_equal(classes, tiles >= 0.5 if out_channels == 1 else tiles.argmax(axis=0))


def test_tiles_of_a_network_that_somebody_changed_may_be_approximate_and_say_so(model, wide):
    model.bottleneck.norm2 = torch.nn.InstanceNorm2d(32)
    whole = model.predict(wide, probabilities=True)
    with pytest.warns(UserWarning, match=r"its module 'bottleneck\.norm2' is not that .* more than the 24 around its tile"):
        tiled = model.predict(wide, probabilities=True, tile=72)
    assert np.abs(tiled - whole).max() > 1e-5
    with pytest.warns(UserWarning, match="tiles are blended") as warned:
        model.predict(wide, tile=72, overlap=8)
    assert len(warned) == 1


def test_a_picture_no_larger_than_a_tile_stays_whole(model, picture):
    shapes = shapes_seen(model)
    model.predict([picture, picture], tile=50)
    assert shapes == [(2, 3, 37, 50)]


def test_memory_decides_how_many_pictures_go_together_and_which_in_tiles(model, wide, monkeypatch):
    shapes = shapes_seen(model)
    expected = model.predict(wide, probabilities=True)
    for pixels, seen in ((3 * 88 * 132, [3, 2]), (88 * 132, [1] * 5)):
        shapes.clear()
        few_pixels(monkeypatch, pixels)
        for found in model.predict([wide] * 5, probabilities=True, batch_size=5):
            np.testing.assert_allclose(found, expected, atol=1e-6)
        assert [shape[0] for shape in shapes] == seen
    shapes.clear()
    few_pixels(monkeypatch, 72 * 72)
    found = model.predict(wide, probabilities=True)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert len(shapes) > 1
    assert all(shape[0] == 1 and shape[2] * shape[3] <= 72 * 72 for shape in shapes)


def test_views_of_a_picture_count_against_the_memory(model, picture, monkeypatch):
    shapes = shapes_seen(model)
    few_pixels(monkeypatch, 4 * 37 * 50)
    for tta, views, most in ((True, 4, 1), ("mirror", 2, 2)):
        shapes.clear()
        model.predict([picture] * 4, tta=tta)
        assert {shape[0] for shape in shapes} == {views * most}


def test_networks_that_need_the_whole_picture_say_so(wide, monkeypatch):
    torch.manual_seed(0)
    model = UNet(features=(4, 8), norm="group").eval()
    few_pixels(monkeypatch, 72 * 72)
    with pytest.raises(ValueError, match=r"88x132 pixels does not fit .* norm='group' .* tile=\(88, 132\)"):
        model.predict(wide)
    assert model.predict(wide, tile=(88, 132)).shape == (88, 132)
    with pytest.warns(UserWarning, match="approximate, because norm='group'"):
        assert model.predict(wide, overlap=8).shape == (88, 132)


def test_less_overlap_is_blended_and_warned_of(model, wide):
    whole = model.predict(wide, probabilities=True)
    with pytest.warns(UserWarning, match="overlap=8 is less than the 24 pixels"):
        blended = model.predict(wide, probabilities=True, tile=48, overlap=8)
    assert 0 < np.abs(blended - whole).max() < 0.1


def test_tiles_are_of_the_networks_input(model, wide):
    for preprocessing in (Preprocessing(size=(112, 96)), Preprocessing(scale=2.0), Preprocessing(size=(88, 132))):
        model.preprocessing = preprocessing
        np.testing.assert_allclose(
            model.predict(wide, probabilities=True, tile=64), model.predict(wide, probabilities=True), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize(
    ("preprocessing", "views"), [(Preprocessing(), 8), (Preprocessing(size=(40, 40)), 8), (Preprocessing(size=(24, 40)), 4)]
)
def test_tta_is_the_mean_over_turned_and_mirrored_pictures(model, picture, preprocessing, views):
    if preprocessing.size is not None:
        picture = picture[: preprocessing.size[0], : preprocessing.size[1]]
        picture = np.pad(picture, ((0, preprocessing.size[0] - len(picture)), (0, 0), (0, 0)))
    plain = model.predict(picture, probabilities=True)
    expected = []
    for quarter in range(4) if views == 8 else (0, 2):
        for mirror in (1, -1):
            view = np.ascontiguousarray(np.rot90(picture[:, ::mirror], quarter))
            answer = np.rot90(logits_by_hand(model, view)[0].sigmoid().numpy(), -quarter)
            expected.append(answer[:, ::mirror])
    model.preprocessing = preprocessing
    found = model.predict(picture, probabilities=True, tta=True)
    np.testing.assert_allclose(found, np.mean(expected, axis=0), atol=1e-6)
    assert np.abs(found - plain).max() > 1e-4
    assert (model.predict(picture, tta=True) == (found >= 0.5)).all()


def test_tta_of_the_mirror_image_alone(model, picture):
    pictures = [np.ascontiguousarray(picture[:, ::step]) for step in (1, -1)]
    views = [logits_by_hand(model, view)[0].sigmoid().numpy()[:, ::step] for view, step in zip(pictures, (1, -1))]
    found = model.predict(picture, probabilities=True, tta="mirror")
    np.testing.assert_allclose(found, np.mean(views, axis=0), atol=1e-6)
    assert np.abs(found - views[0]).max() > 1e-4


@pytest.mark.parametrize("tta", ["flips", 2, None])
def test_another_tta_is_refused(model, picture, tta):
    with pytest.raises(ValueError, match=f"tta must be True, False, or 'mirror' for left and right alone, got {tta!r}"):
        model.predict(picture, tta=tta)


@pytest.mark.parametrize("tta", [True, "mirror"])
def test_tta_in_tiles_is_tta_of_the_whole_picture_at_any_size(wide, tta, recwarn):
    torch.manual_seed(0)
    odd, model = wide[:85, :131], UNet(features=(8, 16), match="replicate")
    found = model.predict(odd, probabilities=True, tta=tta, tile=80)
    assert not recwarn.list
    np.testing.assert_allclose(found, model.predict(odd, probabilities=True, tta=tta), atol=1e-6)


def test_tta_in_tiles_is_tta_of_the_whole_picture(model, wide):
    np.testing.assert_allclose(
        model.predict(wide, probabilities=True, tta=True, tile=72), model.predict(wide, probabilities=True, tta=True), atol=1e-6
    )
    odd = wide[:85, :131]  # of which match="resize" makes one with whole multiples
    padded = np.pad(odd, ((0, 3), (0, 1), (0, 0)), mode="edge")
    np.testing.assert_allclose(
        model.predict(odd, probabilities=True, tta=True, tile=72),
        model.predict(padded, probabilities=True, tta=True)[:85, :131],
        atol=1e-6,
    )


def test_evaluate_passes_sizes_of_batches_and_tiles_on(model, picture, wide):
    shapes = shapes_seen(model)
    evaluate(model, [(picture, picture[..., 0] > 127)] * 5, batch_size=3)
    assert [shape[0] for shape in shapes] == [3, 2]
    shapes.clear()
    with pytest.warns(UserWarning, match="overlap=8 is less than the 24"):
        evaluate(model, [(wide, wide[..., 0] > 127)], tile=48, overlap=8)
    assert max(max(shape[2:]) for shape in shapes) <= 48


def test_evaluate_takes_the_same_options(model, wide):
    mask = (wide[..., 0] > 127).astype(np.uint8)
    found = model.predict(wide, tta=True)
    scores = evaluate(model, [(wide, mask)], tta=True, tile=72)
    assert scores["dice"] == pytest.approx(2 * (found & mask).sum() / (found.sum() + mask.sum()), abs=1e-4)


class Watched:
    """An array of which only parts may be read."""

    def __init__(self, array):
        self.array, self.shape, self.dtype, self.read = array, array.shape, array.dtype, []

    def __getitem__(self, region):
        rows, columns = region
        self.read.append((rows.stop - rows.start) * (columns.stop - columns.start))
        return self.array[region]


def test_what_is_read_by_region_is_never_read_whole(model, wide):
    watched = Watched(wide)
    found = model.predict(watched, tile=64)
    np.testing.assert_array_equal(found, model.predict(wide))
    assert len(watched.read) > 1
    assert max(watched.read) <= 64 * 64


def test_arrays_and_tiffs_on_disk(model, wide, tmp_path, monkeypatch):
    expected = model.predict(wide, probabilities=True)
    np.save(tmp_path / "a.npy", wide)
    tifffile.imwrite(tmp_path / "a.tif", wide, photometric="rgb", tile=(32, 32), compression="zlib")
    for form in (tmp_path / "a.npy", str(tmp_path / "a.npy"), np.load(tmp_path / "a.npy", mmap_mode="r"), tmp_path / "a.tif"):
        np.testing.assert_allclose(model.predict(form, probabilities=True), expected, atol=1e-6)
    whole = pictures.read_image
    monkeypatch.setattr(pictures, "read_image", lambda *_: pytest.fail("read whole"))
    monkeypatch.setattr(rasters, "_READ_WHOLE", 88 * 132 - 1)
    np.testing.assert_allclose(model.predict(tmp_path / "a.tif", probabilities=True, tile=64), expected, rtol=1e-5, atol=1e-6)
    monkeypatch.setattr(pictures, "read_image", whole)
    monkeypatch.setattr(rasters, "_READ_WHOLE", 88 * 132)
    model.predict(tmp_path / "a.tif")


@pytest.mark.parametrize("options", [{}, {"tile": 64}, {"tile": 48, "overlap": 8}, {"tile": 72, "tta": True}])
@pytest.mark.filterwarnings("ignore:tiles are blended")
def test_results_go_to_a_file_as_they_come(model, wide, tmp_path, options):
    expected = model.predict(wide, **options)
    for name in ("mask.npy", "mask.tif"):
        assert model.predict(wide, out=tmp_path / name, **options) == tmp_path / name
        np.testing.assert_array_equal(np.asarray(rasters.open_raster(tmp_path / name)[:, :]), expected)
    model.predict(wide, out=str(tmp_path / "probabilities.npy"), probabilities=True, **options)
    np.testing.assert_array_equal(np.load(tmp_path / "probabilities.npy"), model.predict(wide, probabilities=True, **options))


def test_an_interrupted_prediction_leaves_no_file(model, wide, tmp_path):
    class Broken(Watched):
        def __getitem__(self, region):
            if len(self.read) == 3:
                raise OSError("the disk is gone")
            return super().__getitem__(region)

    with pytest.raises(OSError, match="the disk is gone"):
        model.predict(Broken(wide), tile=64, out=tmp_path / "mask.npy")
    assert list(tmp_path.iterdir()) == []


def test_progress_counts_tiles(model, wide, capsys):
    plan = plan_tiles(model.config, (88, 132), (64, 64))
    model.predict(wide, tile=64, progress=True)
    shown = capsys.readouterr().err
    assert f"{len(plan)}/{len(plan)}" in shown
    assert "tile/s" in shown or "s/tile" in shown


def test_bytes_and_floats_are_not_mixed_in_a_batch(model, picture):
    floats = torch.from_numpy(picture).permute(2, 0, 1) / 255
    for found in model.predict([picture, floats, picture], probabilities=True):
        np.testing.assert_allclose(found, model.predict(picture, probabilities=True), atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tile": 0}, "tile must be a side or .*, got 0"),
        ({"tile": (64, 64, 3)}, r"tile must be .*, got \(64, 64, 3\)"),
        ({"tile": 64.0}, "tile must be .*, got 64.0"),
        ({"tile": 40}, "must be at least 52 pixels a side, got 40"),
        ({"tile": True}, "tile must be .*, got True"),
        ({"tile": "64"}, "tile must be .*, got '64'"),
        ({"overlap": -1}, "overlap=-1 must be 0 or more"),
        ({"out": "mask.png"}, r"expected a \.npy, \.tif or \.tiff file to write, got 'mask.png'"),
        ({"out": "mask.tif", "probabilities": True}, r"give a \.npy file for probabilities instead of 'mask.tif'"),
    ],
)
def test_bad_options_are_named(model, wide, options, message):
    with pytest.raises(ValueError, match=message):
        model.predict(wide, **options)


def test_sides_may_be_numbers_of_numpy(model, wide):
    expected = model.predict(wide, tile=64)
    np.testing.assert_array_equal(model.predict(wide, tile=np.int64(64), overlap=np.int32(24)), expected)
    np.testing.assert_array_equal(model.predict(wide, tile=(np.int64(64), 64), batch_size=np.int64(2)), expected)
    with pytest.raises(TypeError, match=r"overlap=0\.5 must be an integer, in pixels; leave it out for as many as"):
        model.predict(wide, overlap=0.5)


def test_evaluate_takes_a_data_set_as_far_as_its_length(model, picture):
    class Crops(torch.utils.data.Dataset):
        """Of chance, so that no index is out of range."""

        def __len__(self):
            return 2

        def __getitem__(self, index):
            assert index < 5, "it goes on for ever"
            return picture, np.zeros(picture.shape[:2])

    metrics = SegmentationMetrics()
    evaluate(model, Crops(), metrics=metrics)
    assert metrics.pictures == 2


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "form",
    [
        Image.fromarray,
        lambda mask: mask[:, ::-1].copy()[:, ::-1],
        lambda mask: np.frombuffer(mask.tobytes(), np.uint8).reshape(mask.shape),
        lambda mask: mask.tolist(),
        lambda mask: mask.astype(">i4"),
        torch.from_numpy,
    ],
)
def test_evaluate_takes_masks_of_any_form(model, picture, form):
    mask = (picture[..., 0] > 127).astype(np.uint8)
    found = model.predict(picture)
    scores = evaluate(model, [(picture, form(mask))])
    assert scores["accuracy"] == pytest.approx((found == mask).mean(), abs=1e-9)


def test_evaluate_leaves_pixels_out(model, picture):
    mask = np.where(picture[..., 1] > 99, np.uint8(255), picture[..., 0] > 127)
    data, metrics = [(picture, mask)], SegmentationMetrics(ignore_index=255)
    with pytest.raises(ValueError, match=r"found 255; .* leave a value out with ignore_index="):
        evaluate(model, data)
    assert evaluate(model, data, ignore_index=255) == evaluate(model, data, metrics=metrics)
    with pytest.raises(ValueError, match=r"give SegmentationMetrics\(\.\.\., ignore_index=255\), or leave out metrics"):
        evaluate(model, data, ignore_index=255, metrics=metrics)


@pytest.mark.parametrize(
    "data",
    [
        lambda picture, mask: [("p.png", "m.png")],
        lambda picture, mask: [(picture, Path("m.png"))],
        lambda picture, mask: [(picture, None)],
        lambda picture, mask: [(picture, mask, 3)],
        lambda picture, mask: [picture],
        lambda picture, mask: [picture[:2]],
        lambda picture, mask: picture,
        lambda picture, mask: "pictures",
    ],
)
def test_evaluate_says_what_pairs_it_takes(model, picture, data):
    with pytest.raises(TypeError, match=r"expected pairs of a picture and its mask as an array, got .*read_mask\(path\)"):
        evaluate(model, data(picture, picture[..., 0] > 127))


def test_evaluate_takes_no_batches(model, picture):
    pairs = [(torch.from_numpy(picture).permute(2, 0, 1), picture[..., 0] > 127)]
    with pytest.raises(TypeError, match=r"got a batch; give the data set, or DataLoader\(\.\.\., batch_size=None\)"):
        evaluate(model, torch.utils.data.DataLoader(pairs))
    assert evaluate(model, torch.utils.data.DataLoader(pairs, batch_size=None)) == evaluate(model, pairs)
    assert evaluate(model, iter(pairs)) == evaluate(model, pairs)


@pytest.mark.parametrize("classes", [None, (0, 1)])
def test_evaluate_reads_in_other_processes_and_what_they_have_decoded(model, tmp_path, classes):
    write_carvana(tmp_path, cars=1, views=4, size=(36, 50))
    scenes = ImageMaskDataset(tmp_path / "train", tmp_path / "train_masks", mask_suffix="_mask", mask_values=classes)
    cached = CachedDataset(scenes)
    expected = evaluate(model, scenes)
    assert evaluate(model, torch.utils.data.DataLoader(cached, batch_size=None, num_workers=1)) == expected
    for path in scenes.paths(0):
        path.unlink()
    assert evaluate(model, cached) == expected


def test_no_float64_is_sent_to_the_device(model, picture, monkeypatch):
    counted = []
    monkeypatch.setattr(SegmentationMetrics, "update", lambda self, logits, mask: counted.append(mask))
    mask = picture[..., 0] / 255
    for form in (mask, torch.from_numpy(mask), mask.tolist()):
        evaluate(model, [(picture, form)])
        assert counted[-1].dtype == torch.float32
        np.testing.assert_array_equal(counted[-1][0], mask.astype(np.float32))


def test_on_mps_it_is_resized_on_the_cpu_and_sent_back(monkeypatch):
    x, to = torch.rand(1, 8, 6), torch.Tensor.to
    expected = pictures.resize(x, (4, 9))
    mps = x.as_subclass(OnMps)
    back = {mps.device: lambda resized: resized.as_subclass(OnMps)}
    monkeypatch.setattr(
        torch.Tensor, "to", lambda part, *args, **kw: back[args[0]](part) if args[0] in back else to(part, *args, **kw)
    )
    resized = pictures.resize(mps, (4, 9))
    assert isinstance(resized, OnMps)
    assert torch.equal(resized.cpu(), expected)


@pytest.mark.parametrize("wrapper", [torch.nn.DataParallel, AveragedModel])
def test_a_wrapped_model_is_told_to_be_unwrapped(model, picture, wrapper):
    wrapped = wrapper(model)
    for call in (
        lambda: predict(wrapped, picture),
        lambda: list(iter_logits(wrapped, [picture])),
        lambda: list(network_inputs(wrapped, [picture])),
        lambda: evaluate(wrapped, [(picture, picture[..., 0] > 0)]),
    ):
        with pytest.raises(TypeError, match=rf"expected a UNet, got a {wrapper.__name__}; .* as in model\.module"):
            call()
    with pytest.raises(TypeError, match=r"expected a UNet, got a str; give UNet\.from_pretrained\('carvana'\)$"):
        predict("carvana", picture)


def test_names_from_numpy_are_paths(model, picture, tmp_path):
    Image.fromarray(picture).save(tmp_path / "a.png")
    names = np.array([str(tmp_path / "a.png")])
    assert (model.predict(names[0]) == model.predict(picture)).all()
    for several in (names, names.astype(object)):
        assert len(list(network_inputs(model, several))) == 1
    assert (model.predict(picture, threshold=torch.tensor(0.4)) == model.predict(picture, threshold=0.4)).all()


def test_files_in_a_list_are_named(model, picture, tmp_path):
    np.save(tmp_path / "floats.npy", picture / 255)
    np.save(tmp_path / "four.npy", np.concatenate([picture, picture[..., :1]], axis=-1))
    np.save(tmp_path / "none.npy", picture[:0])
    np.save(tmp_path / "good.npy", picture)
    for name, message in (
        ("floats", r"must be uint8.*huge-pictures\.md"),
        ("four", "has 4 channels, but the network takes 3"),
        ("none", "is empty"),
    ):
        with pytest.raises(ValueError, match=rf"{name}\.npy.*{message}"):
            model.predict([tmp_path / "good.npy", str(tmp_path / f"{name}.npy")])
    Image.fromarray(picture).save(tmp_path / "colour.png")


def test_a_grey_tensor_is_a_grey_array_and_an_empty_one_is_refused(model, picture):
    grey = picture[..., 0]
    np.testing.assert_array_equal(model.predict(torch.from_numpy(grey.copy())[None]), model.predict(grey))
    with pytest.raises(ValueError, match=r"the picture is empty: its shape is \(3, 0, 4\)"):
        model.predict(torch.zeros(3, 0, 4))


def test_files_and_pil_pictures_are_for_networks_of_grey_or_colour(picture, tmp_path, monkeypatch):
    four = np.concatenate([picture, picture[..., :1]], axis=-1)
    network = UNet(in_channels=4, features=(4,))
    Image.fromarray(four).save(tmp_path / "four.png")
    tifffile.imwrite(tmp_path / "four.tif", four, photometric="minisblack", planarconfig="contig")  # which Pillow cannot read
    reason = "would be read as grey or RGB, but the network takes 4 channels; pass an array, such as"
    for name in ("four.png", "four.tif"):
        with pytest.raises(ValueError, match=rf"{name} {reason} tifffile\.imread\(path\), uint8 \(H, W, 4\)"):
            network.predict(tmp_path / name)
    with pytest.raises(ValueError, match=rf"the picture {reason} numpy\.asarray\(picture\), uint8"):
        network.predict(Image.fromarray(four))
    with pytest.raises(ValueError, match="the picture has 1 channels, but the network takes 4"):
        network.predict(picture[..., 0])
    expected = network.predict(four)
    for array in (tifffile.imread(tmp_path / "four.tif"), np.asarray(Image.open(tmp_path / "four.png"))):
        np.testing.assert_array_equal(network.predict(array), expected)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        network.predict(tmp_path / "nowhere.tif")
    monkeypatch.setattr(rasters, "_READ_WHOLE", 1)  # by region, all bands are read
    np.testing.assert_array_equal(network.predict(tmp_path / "four.tif"), expected)
    tifffile.imwrite(tmp_path / "rgba.tif", four, photometric="rgb")
    with pytest.raises(ValueError, match=r"rgba\.tif, transparency aside, has 3 channels, but the network takes 4"):
        network.predict(tmp_path / "rgba.tif")


def test_frames_of_a_stack_in_a_list_are_pictures_of_their_own(tmp_path):
    frames = [Image.fromarray(np.full((8, 8), level, np.uint8)) for level in (0, 100, 200)]
    frames[0].save(tmp_path / "stack.tif", save_all=True, append_images=frames[1:])
    model = UNet(in_channels=1, features=(4,)).eval()
    expected = model.predict(frames, probabilities=True)
    with Image.open(tmp_path / "stack.tif") as stack:
        with pytest.raises(
            ValueError, match=r"one PIL picture of 3 frames several times.*\[unetlib\.imaging\.read_image\(frame\)"
        ):
            model.predict(list(ImageSequence.Iterator(stack)))
        pages = [read_image(frame) for frame in ImageSequence.Iterator(stack)]
        one_by_one = [logits.sigmoid()[0] for logits in iter_logits(model, ImageSequence.Iterator(stack))]
    np.testing.assert_array_equal(model.predict(pages, probabilities=True), expected)
    np.testing.assert_allclose(torch.stack(one_by_one), expected)
    model.predict([frames[0], frames[0]])  # of one frame: the same twice


def test_a_suffix_may_be_in_capitals(model, picture, tmp_path):
    expected = model.predict(picture, probabilities=True)
    found = model.predict(picture, probabilities=True, out=tmp_path / "P.NPY")
    np.testing.assert_array_equal(np.load(found), expected)


def test_out_is_for_one_picture(model, picture):
    with pytest.raises(ValueError, match="out is for one picture, got a list of 2"):
        model.predict([picture, picture], out="mask.npy")


def test_out_does_not_replace_the_picture(model, picture, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("slide.npy", picture)
    tifffile.imwrite("slide.tif", picture, photometric="rgb")
    for name in ("slide.npy", "slide.tif"):
        before = (tmp_path / name).read_bytes()
        for source in (name, rasters.open_raster(name)):
            with pytest.raises(ValueError, match=rf"^out='.*{name}' is the picture itself, .*; name another file"):
                model.predict(source, out=tmp_path / name)
        assert (tmp_path / name).read_bytes() == before
    (tmp_path / "mask.npy").write_bytes(b"an older one")
    assert np.load(model.predict("slide.npy", out="mask.npy")).shape == (37, 50)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_evaluate_names_what_is_wrong_on_cuda_too(model, picture):
    model, mask = model.to("cuda"), np.zeros(picture.shape[:2], np.uint8)
    with pytest.raises(ValueError, match="255"):
        evaluate(model, [(picture, mask + 255)])
    assert evaluate(model, [(picture, mask)])["dice"] >= 0  # the device can still be used
    with torch.no_grad():
        model.head.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"logits for the picture \[0\] hold NaN"):
        evaluate(model, [(picture, mask)])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_tiles_on_cuda(model, wide):
    model = model.to("cuda")
    np.testing.assert_allclose(
        model.predict(wide, probabilities=True, tile=64),
        model.predict(wide, probabilities=True),
        atol=1e-2,  # TF32 convolutions
    )


# --- what the network sees


def test_network_inputs_are_what_predict_passes_on():
    model = UNet(features=(4, 8)).eval()
    model.preprocessing = Preprocessing(size=(16, 24), mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    seen = []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    pictures = [np.random.default_rng(side).integers(0, 256, (side, 40, 3), np.uint8) for side in (30, 50)]
    for picture in pictures:
        model.predict(picture)
    found = list(network_inputs(model, iter(pictures)))
    assert [x.shape for x in found] == [(1, 3, 16, 24)] * 2
    for x, expected in zip(found, seen, strict=True):
        assert torch.equal(x, expected)
    assert next(network_inputs(model.double(), pictures)).dtype == torch.float64
