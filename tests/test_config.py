from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import textwrap

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from unetlib import Preprocessing, UNetConfig
from unetlib.config import ACTIVATIONS, MATCHES, NORMS, UPSAMPLINGS

# --- UNetConfig


def test_the_defaults_are_the_studys_network():
    assert UNetConfig().to_dict() == {
        "in_channels": 3,
        "out_channels": 1,
        "features": [64, 128, 256, 512],
        "bottleneck": 1024,
        "norm": "batch",
        "activation": "relu",
        "dropout": 0.0,
        "upsample": "transpose",
        "align_corners": False,
        "match": "resize",
        "skip_first": True,
        "up_features": [64, 128, 256, 512],
        "mid_features": [64, 128, 256, 512],
        "decoder_features": [64, 128, 256, 512],
        "conv_bias": False,
        "first_norm": True,
        "affine": True,
        "negative_slope": 0.1,
        "patch_size": 1,
    }


def test_a_config_written_before_the_options_of_other_projects_builds_the_same_network():
    old = {"in_channels": 3, "out_channels": 1, "features": [8, 16], "bottleneck": 16, "norm": "batch", "activation": "relu"}
    assert UNetConfig.from_dict(old) == UNetConfig(features=(8, 16), bottleneck=16)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("in_channels", 0, "positive integer"),
        ("in_channels", True, "positive integer"),
        ("in_channels", "3", "positive integer"),
        ("out_channels", -1, "positive integer"),
        ("out_channels", 1.0, "positive integer"),
        ("features", 64, "sequence of widths"),
        ("features", "64", "sequence of widths"),
        ("features", {64: 128}, "sequence of widths"),
        ("features", {64, 128}, "sequence of widths"),
        ("features", (), "at least one width"),
        ("features", None, "sequence of widths"),
        ("bottleneck", 0, "positive integer"),
        ("bottleneck", 12.5, "positive integer"),
        ("norm", "layer", "batch, instance, group, none"),
        ("norm", None, "batch, instance, group, none"),
        ("activation", "swish", "relu, leaky_relu, elu, gelu, silu"),
        ("dropout", 1.0, "in [0, 1)"),
        ("dropout", -0.1, "in [0, 1)"),
        ("dropout", float("nan"), "in [0, 1)"),
        ("dropout", "half", "in [0, 1)"),
        ("dropout", False, "in [0, 1)"),
        ("upsample", "pixelshuffle", "transpose, bilinear, nearest, nearest_conv"),
        ("align_corners", 1, "True or False"),
        ("match", "crop", "resize, zeros, replicate"),
        ("skip_first", None, "True or False"),
        ("up_features", 64, "sequence of widths such as (64, 128, 256, 512)"),
        ("up_features", (64,), "4 widths, one for each of features"),
        ("mid_features", "64", "sequence of widths"),
        ("mid_features", (), "at least one width"),
        ("decoder_features", (8, 8, 8), "4 widths, one for each of features"),
        ("conv_bias", "yes", "True or False"),
        ("first_norm", 0, "True or False"),
        ("affine", None, "True or False"),
        ("negative_slope", float("inf"), "0 or more"),
        ("negative_slope", "0.1", "0 or more"),
        ("negative_slope", -0.1, "0 or more, such as 0.1"),
        ("patch_size", 0, "positive integer"),
        ("patch_size", 2.0, "positive integer"),
    ],
)
def test_a_bad_field_is_named_with_its_value_and_what_was_expected(field, value, expected):
    with pytest.raises(ValueError) as error:  # the message is checked in three parts
        UNetConfig(**{field: value})
    assert str(error.value).startswith(field)
    assert expected in str(error.value)
    if value != ():
        assert repr(value) in str(error.value)


@pytest.mark.parametrize("bad", [0, -4, 2.0, "16", None, True])
def test_a_bad_width_is_named_by_its_level(bad):
    with pytest.raises(ValueError, match=r"features\[1\] must be a positive integer, got"):
        UNetConfig(features=(8, bad))
    for name in ("up_features", "mid_features", "decoder_features"):
        with pytest.raises(ValueError, match=rf"{name}\[1\] must be a positive integer, got"):
            UNetConfig(features=(8, 16), **{name: (8, bad)})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"align_corners": True}, "align_corners=True is for upsample='bilinear'"),
        ({"align_corners": True, "upsample": "nearest"}, "align_corners=True is for upsample='bilinear'"),
        ({"affine": False}, "affine=False is for norm='instance'"),
        ({"first_norm": False, "norm": "none"}, "first_norm=False is for a norm other than 'none'"),
        ({"negative_slope": 0.01}, "negative_slope=0.01 is for activation='leaky_relu'"),
        (
            {"up_features": (4, 8), "upsample": "bilinear"},
            r"up_features must be the deeper maps' widths \(16, 32\) .* got \(4, 8\)",
        ),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        UNetConfig(features=(8, 16), **options)


def test_the_decoders_widths_follow_from_the_encoders_unless_given():
    config = UNetConfig(features=(8, 16), decoder_features=[4, 6])
    assert (config.up_features, config.mid_features, config.decoder_features) == ((8, 16), (4, 6), (4, 6))
    assert UNetConfig(features=(8, 16), decoder_features=(4, 6), upsample="nearest").up_features == (6, 32)
    given = UNetConfig(features=(8, 16), up_features=(3, 5), mid_features=(7, 9))
    assert (given.up_features, given.mid_features, given.decoder_features) == ((3, 5), (7, 9), (8, 16))


def test_convolutions_have_biases_where_no_norm_has_one_unless_given():
    assert [UNetConfig(norm=norm).conv_bias for norm in NORMS] == [norm == "none" for norm in NORMS]
    assert UNetConfig(conv_bias=True).conv_bias


def test_the_bottleneck_is_twice_the_deepest_level_unless_given():
    assert UNetConfig(features=(8, 24, 16)).bottleneck == 32
    assert UNetConfig(features=(8, 24, 16), bottleneck=5).bottleneck == 5


def test_depth_is_the_number_of_levels():
    assert [UNetConfig(features=(8,) * levels).depth for levels in (1, 4, 7)] == [1, 4, 7]


@pytest.mark.parametrize("config", [UNetConfig(), Preprocessing()])
def test_configs_are_frozen_and_hashable(config):
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, dataclasses.fields(config)[0].name, 5)
    assert hash(config) == hash(type(config)())


@pytest.mark.parametrize("of", [np.array, torch.tensor])
def test_numbers_of_numpy_and_torch_become_pythons_own(of):
    features, mean = of([8, 16]), of([0.25, 0.5, 0.75])
    found = UNetConfig(features=tuple(features), out_channels=features.max() + 1, bottleneck=features[0])
    assert found == UNetConfig(features=(8, 16), out_channels=17, bottleneck=8)
    found = Preprocessing(size=features, mean=mean, std=mean[1], threshold=mean[0])
    assert found == Preprocessing(size=(8, 16), mean=(0.25, 0.5, 0.75), std=0.5, threshold=0.25)
    assert type(found.threshold) is float
    assert Preprocessing.from_json(found.to_json()) == found


def test_lists_become_tuples_so_that_equal_configs_are_equal():
    assert UNetConfig(features=[8, 16]) == UNetConfig(features=(8, 16))
    assert Preprocessing(size=[4, 6], mean=[0.5], std=[2], class_names=["a", "b"]) == Preprocessing(
        size=(4, 6), mean=0.5, std=2.0, class_names=("a", "b")
    )


widths = st.integers(1, 2048)


@st.composite
def unet_configs(draw):
    features = draw(st.lists(widths, min_size=1, max_size=8))
    per_level = st.none() | st.lists(widths, min_size=len(features), max_size=len(features))
    norm, activation = draw(st.sampled_from(NORMS)), draw(st.sampled_from(ACTIVATIONS))
    upsample = draw(st.sampled_from(UPSAMPLINGS))
    return UNetConfig(
        in_channels=draw(widths),
        out_channels=draw(widths),
        features=features,
        bottleneck=draw(st.none() | widths),
        norm=norm,
        activation=activation,
        dropout=draw(st.floats(0, 1, exclude_max=True)),
        upsample=upsample,
        align_corners=upsample == "bilinear" and draw(st.booleans()),
        match=draw(st.sampled_from(MATCHES)),
        skip_first=draw(st.booleans()),
        up_features=draw(per_level) if upsample in ("transpose", "nearest_conv") else None,
        mid_features=draw(per_level),
        decoder_features=draw(per_level),
        conv_bias=draw(st.none() | st.booleans()),
        first_norm=norm == "none" or draw(st.booleans()),
        affine=norm != "instance" or draw(st.booleans()),
        negative_slope=abs(draw(finite)) if activation == "leaky_relu" else 0.1,
        patch_size=draw(st.integers(1, 8)),
    )


finite = st.floats(allow_nan=False, allow_infinity=False)


@settings(max_examples=50)
@given(unet_configs())
def test_a_unet_config_survives_json(config):
    assert UNetConfig.from_json(config.to_json()) == config
    assert UNetConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


# --- Preprocessing

positive = st.floats(0, 1e6, exclude_min=True)
preprocessings = st.builds(
    lambda size_or_scale, **rest: Preprocessing(**size_or_scale, **rest),
    st.fixed_dictionaries({"size": st.tuples(widths, widths)}) | st.fixed_dictionaries({"scale": positive}) | st.just({}),
    mean=st.lists(st.floats(0, 1), min_size=1, max_size=4),
    std=st.lists(positive, min_size=1, max_size=4),
    threshold=st.floats(0, 1, exclude_min=True, exclude_max=True),
    class_names=st.none() | st.lists(st.text('car é"\\'), max_size=3),
    multilabel=st.booleans(),
)


@settings(max_examples=50)
@given(preprocessings)
def test_a_preprocessing_survives_json(preprocessing):
    assert Preprocessing.from_json(preprocessing.to_json()) == preprocessing


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("size", 640, "(height, width)"),
        ("size", (640,), "(height, width)"),
        ("size", (640, 0), "(height, width)"),
        ("size", (640.0, 960.0), "(height, width)"),
        ("size", (True, True), "(height, width)"),
        ("size", "ab", "(height, width)"),
        ("scale", 0, "positive number"),
        ("scale", float("inf"), "positive number"),
        ("scale", "0.5", "positive number"),
        ("mean", (), "one finite number for each input channel"),
        ("mean", "0.5", "one finite number for each input channel"),
        ("mean", (0.5, None), "one finite number for each input channel"),
        ("mean", None, "one finite number for each input channel"),
        ("mean", (123.675, 116.28, 103.53), "from 0 to 1, got (123.675, 116.28, 103.53); for pixels up to 255, divide"),
        ("mean", (-0.1, 0.5, 0.5), "from 0 to 1"),
        ("std", (1.0, float("nan")), "one finite number for each input channel"),
        ("std", (1.0, 0.0), "positive"),
        ("std", -1, "positive"),
        ("threshold", 0, "in (0, 1)"),
        ("threshold", 1.0, "in (0, 1)"),
        ("threshold", float("nan"), "in (0, 1)"),
        ("threshold", None, "in (0, 1)"),
        ("class_names", "car", "sequence of strings"),
        ("class_names", ("background", 1), "sequence of strings"),
        ("class_names", 2, "sequence of strings"),
        ("multilabel", 1, "True or False"),
        ("multilabel", "yes", "True or False"),
    ],
)
def test_bad_preprocessing_is_named_with_what_was_expected(field, value, expected):
    with pytest.raises(ValueError) as error:  # the message is checked in two parts
        Preprocessing(**{field: value})
    assert str(error.value).startswith(field)
    assert expected in str(error.value)


def test_names_may_come_one_by_one():
    assert Preprocessing(class_names=map(str.strip, ["bg ", "car"])).class_names == ("bg", "car")


def test_size_and_scale_exclude_each_other():
    with pytest.raises(ValueError, match=r"size or scale, not both: got size=\(4, 6\) and scale=0.5"):
        Preprocessing(size=(4, 6), scale=0.5)


def test_one_mean_and_std_serve_every_channel_and_others_must_be_as_many_as_channels():
    Preprocessing(mean=0.5, std=0.25).check_channels(in_channels=5, out_channels=1)
    Preprocessing(mean=(0.1, 0.2, 0.3), std=2).check_channels(in_channels=3, out_channels=1)
    with pytest.raises(ValueError, match="mean has 3 numbers, but the network has 4 input channels; give 1 or 4"):
        Preprocessing(mean=(0.1, 0.2, 0.3)).check_channels(in_channels=4, out_channels=1)
    with pytest.raises(ValueError, match="std has 3 numbers, but the network has 1 input channels"):
        Preprocessing(std=(0.1, 0.2, 0.3)).check_channels(in_channels=1, out_channels=1)


@pytest.mark.parametrize(("out_channels", "classes"), [(1, 2), (2, 2), (5, 5)])
def test_class_names_count_the_background(out_channels, classes):
    Preprocessing(class_names=("x",) * classes).check_channels(3, out_channels)
    with pytest.raises(ValueError, match=f"class_names has {classes + 1} names.*background incl.*give {classes} names or None"):
        Preprocessing(class_names=("x",) * (classes + 1)).check_channels(3, out_channels)


def test_classes_that_overlap_have_no_background():
    Preprocessing(class_names=("road", "wet"), multilabel=True).check_channels(3, 2)
    with pytest.raises(ValueError, match=r"2 classes \(none of them the background\); give 2 names"):
        Preprocessing(class_names=("background", "road", "wet"), multilabel=True).check_channels(3, 2)
    with pytest.raises(ValueError, match="multilabel is for two output channels and more"):
        Preprocessing(multilabel=True).check_channels(3, 1)


# --- JSON


@pytest.mark.parametrize("cls", [UNetConfig, Preprocessing])
def test_an_unknown_field_is_named_beside_the_known_ones(cls):
    with pytest.raises(ValueError, match=rf"{cls.__name__} does not know \['colour'\]; its fields are .*install a newer"):
        cls.from_dict({"colour": 1})


@pytest.mark.parametrize("cls", [UNetConfig, Preprocessing])
@pytest.mark.parametrize("text", ["[]", "3", "null", '"x"', "{", ""])
def test_json_that_is_no_object_is_refused(cls, text):
    with pytest.raises(ValueError, match=r"expects a JSON object|Expecting"):
        cls.from_json(text)


@pytest.mark.parametrize("cls", [UNetConfig, Preprocessing])
def test_fields_left_out_take_their_defaults(cls):
    assert cls.from_json("{}") == cls()


@pytest.mark.parametrize("config", [UNetConfig, Preprocessing])
def test_type_checkers_see_a_constructor_with_the_fields_and_defaults_that_there_are(config):
    (block,) = (node for node in ast.parse(textwrap.dedent(inspect.getsource(config))).body[0].body if isinstance(node, ast.If))
    arguments = block.body[0].args
    names = [argument.arg for argument in arguments.args[1:]]
    assert dict(zip(names, map(ast.literal_eval, arguments.defaults), strict=True)) == {
        field.name: field.default for field in dataclasses.fields(config)
    }
