from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from study import randomize

from unetlib import Preprocessing, UNet
from unetlib.adapt import adapt, adapt_input, deepen


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


def test_class_names_go_with_the_head(folder, caplog):
    assert UNet.from_pretrained(folder, out_channels=4).preprocessing.class_names is None
    assert UNet.from_pretrained(folder, in_channels=1).preprocessing.class_names == ("a", "b")


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


# --- one more level


@pytest.mark.parametrize("options", [{}, {"skip_first": False}, {"out_channels": 3, "conv_bias": True}])
@pytest.mark.parametrize("width", [None, 11])
def test_a_deeper_network_gives_the_logits_of_the_half_sized_picture(options, width):
    torch.manual_seed(0)
    model = UNet(features=(8, 16), **options)
    model(torch.rand(4, 3, 32, 48))  # statistics that are not 0 and 1
    small = torch.rand(2, 3, 16, 24)
    large = small.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    deeper = deepen(model.eval(), large, width)
    assert deeper.config.features == (width or 8, 8, 16)
    expected = model(small).repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    torch.testing.assert_close(deeper(large), expected, rtol=1e-4, atol=1e-4)


def test_every_weight_of_a_deeper_network_learns():
    model = UNet(features=(4,))
    deeper = deepen(model, torch.rand(1, 3, 8, 12), width=6).train()
    deeper(torch.rand(2, 3, 16, 24)).square().mean().backward()
    silent = [name for name, parameter in deeper.named_parameters() if parameter.grad.abs().sum() == 0]
    assert not silent


def test_networks_that_cannot_be_deepened_are_refused():
    pictures = torch.rand(1, 3, 16, 16)
    with pytest.raises(ValueError, match=r"only a network with norm 'batch'.*got 'group', 'transpose' and 'relu'"):
        deepen(UNet(features=(4,), norm="group"), pictures)
    with pytest.raises(ValueError, match="width must be at least 4, what the new level hands on, got 3"):
        deepen(UNet(features=(4,)), pictures, width=3)
