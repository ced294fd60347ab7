from __future__ import annotations

import pytest
import torch
from study import StudyUNet, randomize

from unetlib import Preprocessing, UNet, UNetConfig
from unetlib.convert import convert


def converted(study: StudyUNet) -> UNet:
    found = convert(study.state_dict())
    model = UNet.from_config(found.config)
    model.load_state_dict(found.state_dict)
    return model.eval()


@pytest.fixture(scope="module")
def default_pair():
    study = randomize(StudyUNet())
    return study, converted(study)


@pytest.mark.parametrize("size", [(32, 48), (33, 47), (16, 16), (67, 93)])
def test_the_default_network_equals_the_studys(default_pair, size):
    study, model = default_pair
    assert model.config == UNetConfig()
    x = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(size[0]))
    with torch.inference_mode():
        assert torch.equal(model(x), study(x))


@pytest.mark.parametrize("in_channels", [1, 4])
@pytest.mark.parametrize("out_channels", [1, 5])
@pytest.mark.parametrize("features", [(4,), (2, 4, 8), (3, 6)])
def test_channels_and_depth_are_read_off_the_shapes(in_channels, out_channels, features):
    study = randomize(StudyUNet(in_channels, out_channels, features), seed=in_channels + out_channels)
    model = converted(study)
    assert model.config == UNetConfig(in_channels, out_channels, features)
    for size in [(16, 24), (25, 31), (2 ** len(features), 9)]:
        x = torch.randn(2, in_channels, *size)
        assert torch.equal(model(x), study(x))


def test_eleven_levels_keep_their_order():
    study = randomize(StudyUNet(features=[2**level for level in range(6)]))
    assert converted(study).config.features == (1, 2, 4, 8, 16, 32)
    with torch.device("meta"):
        state = StudyUNet(features=(1,) * 11).state_dict()
    assert convert(state).config.features == (1,) * 11
    assert convert(state).state_dict["decoder.10.upsample.weight"] is state["ups.20.weight"]


def test_training_goes_on_as_in_the_study():
    study = randomize(StudyUNet(features=(4, 8))).train()
    model = converted(study).train()
    x = torch.randn(2, 3, 17, 22)
    for network in (study, model):
        network(x).square().mean().backward()
    study_gradients = {name: parameter.grad for name, parameter in study.named_parameters()}
    again = convert(study.state_dict())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict[name]), name  # batch statistics after the step
    renamed = convert({**study.state_dict(), **study_gradients}).state_dict
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, renamed[name]), name


@pytest.mark.parametrize("size", [(16, 24), (17, 23)])
def test_autocast_equals_the_studys(size):
    study = randomize(StudyUNet(features=(4, 8)))
    model = converted(study)
    x = torch.randn(2, 3, *size)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model(x), study(x))


def test_a_state_dict_may_stand_beside_an_optimizer():
    state = randomize(StudyUNet(features=(4, 8))).state_dict()
    bare, inside = convert(state), convert({"state_dict": state, "optimizer": {"param_groups": []}, "epoch": 3})
    assert inside.config == bare.config
    assert inside.state_dict.keys() == bare.state_dict.keys() == UNet(features=(4, 8)).state_dict().keys()
    assert all(inside.state_dict[name] is bare.state_dict[name] for name in bare.state_dict)


def test_the_studys_preprocessing_comes_along():
    found = convert(StudyUNet(features=(4, 8)).state_dict())
    assert found.family == "study"
    assert found.preprocessing == Preprocessing(size=(160, 240), mean=0, std=1, threshold=0.5)


# --- what is refused


def test_unknown_keys_are_refused_with_the_first_of_them_and_the_families_tried():
    state = {**StudyUNet(features=(4, 8)).state_dict(), **{f"attention.{n}": torch.zeros(1) for n in range(4)}}
    with pytest.raises(ValueError, match=r"tried study \(no such key: 'attention.0', .*'attention.2', \.\.\.\)"):
        convert(state)


@pytest.mark.parametrize(
    "key", ["downs.0.conv.2.weight", "ups.0.conv.0.weight", "ups.1.weight", "xdowns.0.conv.0.weight", "final_conv", 7]
)
def test_keys_that_are_nearly_the_studys_are_refused(key):
    with pytest.raises(ValueError, match="no known family"):
        convert({**StudyUNet(features=(4, 8)).state_dict(), key: torch.zeros(1)})


def test_entries_that_are_no_tensors_are_refused():
    with pytest.raises(ValueError, match=r"no such key: 'epoch'"):
        convert({**StudyUNet(features=(4, 8)).state_dict(), "epoch": 3})


@pytest.mark.parametrize("checkpoint", [{}, {"state_dict": {}}, {"state_dict": 3}])
def test_a_checkpoint_without_tensors_is_refused(checkpoint):
    with pytest.raises(ValueError, match="holds no state dict"):
        convert(checkpoint)


@pytest.mark.parametrize(
    ("gone", "named"),
    [
        ("downs.0.conv.0.weight", "encoder.0.conv1.weight"),
        ("downs.1.conv.3.weight", "encoder.1.conv2.weight"),
        ("bottleneck.conv.3.weight", "bottleneck.conv2.weight"),
        ("final_conv.weight", "head.weight"),
    ],
)
def test_a_tensor_that_tells_the_network_must_be_there_and_have_four_dimensions(gone, named):
    state = StudyUNet(features=(4, 8)).state_dict()
    for tensor in (None, torch.zeros(3)):
        state.pop(gone, None)
        if tensor is not None:
            state[gone] = tensor
        with pytest.raises(ValueError, match=f"lacks the 4-D tensor for {named}"):
            convert(state)


def test_a_level_number_out_of_line_is_refused_at_once():
    state = StudyUNet(features=(4, 8)).state_dict()
    state["downs.999999999999.conv.3.weight"] = state.pop("downs.1.conv.3.weight")
    with pytest.raises(ValueError, match=r"lacks the 4-D tensor for encoder\.1\.conv2\.weight"):
        convert(state)


def test_a_state_dict_of_unetlibs_own_is_pointed_to_load_state_dict():
    with pytest.raises(ValueError, match="looks like a unetlib UNet's: build that UNet, then call load_state_dict"):
        convert(UNet(features=(4, 8)).state_dict())
