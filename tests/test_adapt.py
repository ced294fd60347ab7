from __future__ import annotations

import dataclasses
import logging

import numpy as np
import pytest
import torch
from study import randomize

from unetlib import Preprocessing, UNet
from unetlib.adapt import adapt, adapt_input, grow


@pytest.fixture
def model() -> UNet:
    model = randomize(UNet(3, 2, features=(4, 8))).eval()
    model.preprocessing = Preprocessing(size=(16, 24), mean=(0.3, 0.4, 0.8), std=(0.1, 0.2, 0.6), class_names=("a", "b"))
    return model


@pytest.fixture
def folder(model, tmp_path):
    return model.save_pretrained(tmp_path / "model")


@pytest.mark.parametrize(("old", "new"), [(3, 1), (3, 2), (3, 4), (3, 6), (1, 3), (4, 3)])
def test_weights_by_a_loop(old, new):
    weight = torch.randn(5, old, 3, 3)
    expected = np.zeros((5, new, 3, 3))
    for channel in range(new):
        for source in range(old) if new == 1 else [channel % old]:
            expected[:, channel] += weight[:, source].numpy() * (1 if new == 1 else old / new)
    np.testing.assert_allclose(adapt_input(weight, new), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("channels", [1, 2, 4, 6])
def test_weights_are_timms(channels):
    timm = pytest.importorskip("timm.models._manipulate")
    weight = torch.randn(5, 3, 3, 3)
    torch.testing.assert_close(adapt_input(weight, channels), timm.adapt_input_conv(channels, weight))


def test_half_precision_is_summed_in_full():
    weight = torch.tensor([2048.0, 1.0, 1.0]).half().reshape(1, 3, 1, 1)
    assert adapt_input(weight, 1).item() == 2050


@pytest.mark.parametrize("channels", [0, -1])
def test_there_is_one_channel_at_least(channels):
    with pytest.raises(ValueError, match=f"in_channels={channels} must be 1 or more"):
        adapt_input(torch.ones(4, 3, 3, 3), channels)


@pytest.mark.parametrize("channels", [1, 6])
def test_a_grey_picture_gives_what_it_gave(model, folder, channels):
    adapted = UNet.from_pretrained(folder, in_channels=channels)
    grey = torch.randn(2, 1, 17, 22)
    torch.testing.assert_close(adapted(grey.expand(-1, channels, -1, -1)), model(grey.expand(-1, 3, -1, -1)))


def test_everything_but_the_first_convolution_and_the_head_is_kept(model, folder):
    adapted = UNet.from_pretrained(folder, in_channels=5, out_channels=4)
    assert (adapted.config.in_channels, adapted.config.out_channels) == (5, 4)
    assert not adapted.training
    changed = {"encoder.0.conv1.weight", "head.weight", "head.bias"}
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, adapted.state_dict()[name]) is (name not in changed), name
    assert adapted(torch.zeros(1, 5, 8, 8)).shape == (1, 4, 8, 8)
    assert all(parameter.requires_grad and parameter.dtype == torch.float32 for parameter in adapted.parameters())


def test_an_adapted_network_predicts_and_saves(folder, tmp_path):
    adapted = UNet.from_pretrained(folder, in_channels=1, out_channels=4)
    assert adapted.predict(np.zeros((20, 30), np.uint8)).max() < 4
    again = UNet.from_pretrained(adapted.save_pretrained(tmp_path / "adapted"))
    assert (again.config, again.preprocessing) == (adapted.config, adapted.preprocessing)


@pytest.mark.parametrize(
    ("channels", "mean", "std"),
    [(1, (0.5,), (0.3,)), (2, (0.3, 0.4), (0.1, 0.2)), (4, (0.3, 0.4, 0.8, 0.3), (0.1, 0.2, 0.6, 0.1))],
)
def test_means_and_deviations_go_the_way_of_the_weights(folder, channels, mean, std):
    preprocessing = UNet.from_pretrained(folder, in_channels=channels).preprocessing
    assert preprocessing.mean == pytest.approx(mean)
    assert preprocessing.std == pytest.approx(std)
    assert preprocessing.size == (16, 24)


def test_one_mean_serves_every_channel(model):
    preprocessing = Preprocessing(mean=0.5, std=0.25)
    assert adapt(model.config, model.state_dict(), preprocessing, in_channels=5)[2] == preprocessing


def test_a_new_head_is_as_a_fresh_convolutions(model):
    torch.manual_seed(0)
    heads = [adapt(model.config, model.state_dict(), model.preprocessing, out_channels=500)[1] for _ in range(2)]
    assert not torch.equal(heads[0]["head.weight"], heads[1]["head.weight"])
    fresh = torch.nn.Conv2d(4, 500, 1)
    for name in ("weight", "bias"):
        new, reference = heads[0][f"head.{name}"], getattr(fresh, name)
        assert new.shape == reference.shape
        assert new.abs().max().item() == pytest.approx(reference.abs().max().item(), rel=0.02)  # uniform up to 1/sqrt(4)
        assert new.std().item() == pytest.approx(reference.std().item(), rel=0.1)


@pytest.mark.parametrize("patch_size", [1, 2])
def test_a_new_head_is_drawn_as_a_convolutions_is_on_the_cpu_whatever_the_default(patch_size):
    model = UNet(features=(4, 8), patch_size=patch_size).double()
    torch.manual_seed(0)
    fresh = torch.nn.Conv2d(4, 3 * patch_size**2, 1).state_dict(prefix="head.")
    torch.manual_seed(0)
    with torch.device("meta"):
        _, tensors, _ = adapt(model.config, model.state_dict(), model.preprocessing, out_channels=3)
    assert list(tensors) == list(model.state_dict())
    for name, expected in fresh.items():
        assert (tensors[name].device.type, tensors[name].requires_grad) == ("cpu", False)
        torch.testing.assert_close(tensors[name], expected, rtol=0, atol=0)  # of the same type too


def test_class_names_go_with_the_head(folder, caplog):
    assert UNet.from_pretrained(folder, out_channels=4).preprocessing.class_names is None
    assert UNet.from_pretrained(folder, in_channels=1).preprocessing.class_names == ("a", "b")


def test_classes_that_overlap_may_do_so_with_another_head_unless_it_has_one_channel():
    model, overlapping = UNet(features=(8,), out_channels=2), Preprocessing(multilabel=True)
    for channels, expected in ((2, True), (3, True), (1, False)):
        config, _, preprocessing = adapt(model.config, model.state_dict(), overlapping, out_channels=channels)
        preprocessing.check_channels(config.in_channels, config.out_channels)
        assert preprocessing.multilabel is expected


def test_what_changes_is_logged(folder, caplog):
    with caplog.at_level(logging.INFO, "unetlib"):
        UNet.from_pretrained(folder, in_channels=1, out_channels=4)
        UNet.from_pretrained(folder, in_channels=4)
    assert [(record.levelname, record.message) for record in caplog.records] == [
        ("INFO", "the first convolution takes 1 channels instead of 3: its weights are summed"),
        ("WARNING", "the head gives 4 channels instead of 2: its weights are new and random, train them before you predict"),
        ("INFO", "the first convolution takes 4 channels instead of 3: its weights are repeated and scaled by 3/4"),
    ]


def test_the_same_numbers_change_nothing(model, folder, caplog):
    with caplog.at_level(logging.INFO, "unetlib"):
        same = UNet.from_pretrained(folder, in_channels=3, out_channels=2)
    assert not caplog.records
    assert same.preprocessing == model.preprocessing
    assert all(torch.equal(tensor, same.state_dict()[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("options", [{"in_channels": 0}, {"out_channels": -1}, {"in_channels": 1.5}, {"out_channels": "4"}])
def test_impossible_numbers_are_refused(folder, options):
    (name,) = options
    with pytest.raises(ValueError, match=f"{name} must be a positive integer"):
        UNet.from_pretrained(folder, **options)


def test_other_numbers_of_channels_of_a_network_of_patches(tmp_path):
    model = randomize(UNet(3, 2, features=(4, 8), patch_size=2)).eval()
    model.save_pretrained(tmp_path)
    grey = torch.rand(1, 1, 17, 24)
    torch.testing.assert_close(UNet.from_pretrained(tmp_path, in_channels=1)(grey), model(grey.expand(-1, 3, -1, -1)))
    assert UNet.from_pretrained(tmp_path, out_channels=3)(torch.rand(1, 3, 17, 24)).shape == (1, 3, 17, 24)


# --- larger networks

ANY = [
    {},
    {"skip_first": False, "norm": "instance"},
    {"out_channels": 3, "conv_bias": True, "match": "zeros"},
    {"upsample": "bilinear", "norm": "none"},
    {"upsample": "nearest", "skip_first": False},
    {"upsample": "nearest_conv", "mid_features": (3, 5), "decoder_features": (4, 6), "up_features": (3, 7)},
]


@pytest.mark.parametrize("options", ANY, ids=str)
def test_a_wider_network_gives_the_same_logits(options):
    model = randomize(UNet(features=(4, 8), bottleneck=8, **options)).eval()
    for grown in (grow(model, features=(7, 9)), grow(model, bottleneck=11), grow(model, features=[4, 10], bottleneck=12)):
        assert not grown.training
        x = torch.rand(2, 3, 17, 24)
        torch.testing.assert_close(grown(x), model(x), rtol=1e-4, atol=1e-4)
    assert grown.config.features == grown.config.decoder_features == (4, 10)
    assert grown.config.bottleneck == 12


@pytest.mark.parametrize(
    ("before", "after"),
    [({"size": (8, 12)}, {"size": (16, 24)}), ({"scale": 0.5}, {"scale": 1.0}), ({}, {})],
)
def test_a_network_of_patches_sees_more_pixels_of_a_picture_that_is_resized(before, after):
    model = UNet(features=(4, 8))
    model.preprocessing = Preprocessing(**before, threshold=0.3)
    assert grow(model, patch_size=2).preprocessing == Preprocessing(**after, threshold=0.3)
    assert grow(model, features=(5, 9)).preprocessing == model.preprocessing


@pytest.mark.parametrize("options", [*ANY, {"norm": "group"}], ids=str)
@pytest.mark.parametrize("side", [2, 3])
def test_a_network_of_patches_gives_the_logits_of_the_reduced_picture(options, side):
    model = randomize(UNet(features=(4, 8), **options)).eval()
    grown = grow(model, patch_size=side, match="replicate")
    assert grown.config == dataclasses.replace(model.config, patch_size=side, match="replicate")
    small = torch.rand(2, 3, 16, 24)
    large = small.repeat_interleave(side, dim=2).repeat_interleave(side, dim=3)
    expected = model(small).repeat_interleave(side, dim=2).repeat_interleave(side, dim=3)
    torch.testing.assert_close(grown(large), expected, rtol=1e-4, atol=1e-4)


def test_patches_of_the_size_that_there_is_change_nothing():
    model, x = randomize(UNet(features=(4, 8), patch_size=2)).eval(), torch.rand(1, 3, 16, 24)
    torch.testing.assert_close(grow(model, features=(6, 9), patch_size=2)(x), model(x), rtol=1e-4, atol=1e-4)


def test_a_larger_network_keeps_preprocessing_and_type():
    model = UNet(features=(4, 8)).double()
    model(torch.rand(2, 3, 16, 16, dtype=torch.float64))
    model.eval().preprocessing = Preprocessing(size=(16, 24), mean=(0.5,), threshold=0.4)
    grown, x = grow(model, features=(6, 9)), torch.rand(1, 3, 16, 16, dtype=torch.float64)
    assert grown.preprocessing == model.preprocessing
    assert grown.encoder[0].norm1.num_batches_tracked == 1
    torch.testing.assert_close(grown(x), model(x))


def test_every_weight_of_a_larger_network_learns():
    model = UNet(features=(4, 6))
    grown = grow(model, features=(6, 9), bottleneck=15, patch_size=2)
    assert grown.preprocessing == model.preprocessing
    assert grown.training
    rate = 0.1
    for _ in range(2):  # what is behind the zeros gets a gradient once they have moved
        grown.zero_grad()
        grown(torch.rand(2, 3, 16, 24)).square().mean().backward()
        with torch.no_grad():
            for parameter in grown.parameters():
                parameter -= rate * parameter.grad
    silent = [name for name, parameter in grown.named_parameters() if not parameter.grad.any()]
    assert not silent
    fresh = grown.encoder[0].conv1.weight.grad[4:]
    assert fresh.abs().sum() > 0


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ({"norm": "group"}, {"features": (8, 8)}, "norm 'group' cannot be widened: the groups of its channels would change"),
        ({"patch_size": 2}, {"patch_size": 4}, "patch_size can be grown from 1, not from the network's 2 to 4; leave it out"),
        ({}, {"features": (4, 7)}, r"features and bottleneck must be \(4, 8, 16\) or more, level by level, got \(4, 7, 16\)"),
        ({}, {"features": (4, 8, 8)}, r"features and bottleneck must be \(4, 8, 16\) or more, .* got \(4, 8, 8, 16\)"),
        ({}, {"bottleneck": 8}, r"must be \(4, 8, 16\) or more, level by level, got \(4, 8, 8\)"),
        ({"mid_features": (9, 9)}, {"features": (8, 8)}, r"^features and bottleneck must be \(9, 9, 16\) or more"),
    ],
)
def test_networks_that_cannot_be_grown_are_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        grow(UNet(features=(4, 8), **model), **options)


def test_a_wrapped_network_is_not_grown():
    for wrapper in (torch.nn.DataParallel, torch.compile):
        with pytest.raises(TypeError, match=r"expected a UNet, .* take it out of its wrapper"):
            grow(wrapper(UNet(features=(4,))), features=(8,))
