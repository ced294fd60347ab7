from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from unetlib import Preprocessing, UNet
from unetlib.inference import evaluate, iter_logits


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
    middle = float(np.median(probabilities)) + 1e-4
    assert 0.3 < model.predict(picture, threshold=middle).mean() < 0.7
    assert (model.predict(picture, threshold=middle) == (probabilities >= middle)).all()
    model.preprocessing = Preprocessing(threshold=middle)
    assert (model.predict(picture) == (probabilities >= middle)).all()


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
    np.testing.assert_allclose(
        one_channel.predict(picture, probabilities=True), one_channel.predict(luma, probabilities=True), atol=0.02
    )


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


def test_training_goes_on_after_a_prediction(model, picture):
    model.predict(picture)
    model(torch.rand(1, 3, 16, 16)).sum().backward()
    assert model.head.weight.grad is not None


def test_progress_shows_a_bar_with_the_number_of_pictures(model, picture, capsys):
    model.predict([picture, picture], progress=True)
    assert "2/2" in capsys.readouterr().err
    model.predict([picture, picture])
    assert capsys.readouterr().err == ""


def test_iter_logits_reads_a_batch_at_a_time(model, picture):
    taken = []

    def pictures():
        for index in range(6):
            taken.append(index)
            yield picture

    logits = iter_logits(model, pictures(), batch_size=2)
    assert next(logits).shape == (1, 37, 50)
    assert taken == [0, 1]


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


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        ("nowhere.jpg", FileNotFoundError, "nowhere.jpg"),
        (3.5, TypeError, "float"),
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
    with pytest.raises(ValueError, match=r"threshold must be a probability in \(0, 1\)"):
        model.predict(picture, threshold=threshold)


def test_bad_batch_size(model, picture):
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        model.predict(picture, batch_size=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_gives_the_cpu_mask(model, picture):
    on_cpu = model.predict(picture, probabilities=True)
    on_cuda = model.to("cuda").predict(torch.from_numpy(picture).permute(2, 0, 1), probabilities=True)
    np.testing.assert_allclose(on_cuda, on_cpu, atol=1e-2)  # TF32 convolutions
