from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image
from pretended_mps import OnMps
from study import randomize
from torch import nn

from unetlib import DoubleConv
from unetlib.blocks import LayerOptions, Up, conv_layers, make_activation, make_norm, make_upsample, match_size
from unetlib.config import ACTIVATIONS, NORMS, UPSAMPLINGS

# --- NumPy readings, float64, one number at a time


def conv3x3(x, weight, bias=None):
    channels, height, width = x.shape
    padded = np.zeros((channels, height + 2, width + 2))
    padded[:, 1:-1, 1:-1] = x
    out = np.zeros((len(weight), height, width))
    for o in range(len(weight)):
        for i in range(height):
            for j in range(width):
                out[o, i, j] = (padded[:, i : i + 3, j : j + 3] * weight[o]).sum()
        if bias is not None:
            out[o] += bias[o]
    return out


def transposed_conv2x2(x, weight, bias):
    _, height, width = x.shape
    out = np.zeros((weight.shape[1], 2 * height, 2 * width))
    for o in range(weight.shape[1]):
        for i in range(2 * height):
            for j in range(2 * width):
                out[o, i, j] = bias[o] + (x[:, i // 2, j // 2] * weight[:, o, i % 2, j % 2]).sum()
    return out


def bilinear2x(x, align_corners):
    _, height, width = x.shape

    def places(size):
        position = np.arange(2 * size) * ((size - 1) / (2 * size - 1)) if align_corners else (np.arange(2 * size) - 0.5) / 2
        position = position.clip(0, size - 1)
        before = np.floor(position).astype(int)
        return before, np.minimum(before + 1, size - 1), position - before

    top, bottom, down = places(height)
    left, right, across = places(width)
    rows = x[:, top] * (1 - down)[:, None] + x[:, bottom] * down[:, None]
    return rows[:, :, left] * (1 - across) + rows[:, :, right] * across


def normalise(x, groups, weight, bias):
    parts = x.reshape(groups, -1)
    parts = (parts - parts.mean(1, keepdims=True)) / np.sqrt(parts.var(1, keepdims=True) + 1e-5)
    return parts.reshape(x.shape) * weight[:, None, None] + bias[:, None, None]


ACTIVATION = {
    "relu": lambda v: max(v, 0.0),
    "leaky_relu": lambda v: v if v > 0 else 0.1 * v,
    "elu": lambda v: v if v > 0 else math.exp(v) - 1,
    "gelu": lambda v: v * 0.5 * (1 + math.erf(v / math.sqrt(2))),
    "silu": lambda v: v / (1 + math.exp(-v)),
}


def double_conv(x, state, norm, activation):
    """One picture through a double convolution; batch norm by its stored statistics."""
    for number in (1, 2):
        x = conv3x3(x, state[f"conv{number}.weight"], state.get(f"conv{number}.bias"))
        if norm != "none":
            weight, bias = state[f"norm{number}.weight"], state[f"norm{number}.bias"]
        if norm == "batch":
            mean, var = state[f"norm{number}.running_mean"], state[f"norm{number}.running_var"]
            x = (x - mean[:, None, None]) / np.sqrt(var[:, None, None] + 1e-5) * weight[:, None, None] + bias[:, None, None]
        elif norm == "instance":
            x = normalise(x, len(x), weight, bias)
        elif norm == "group":
            x = normalise(x, 2, weight, bias)  # of four channels
        x = np.vectorize(ACTIVATION[activation])(x)
    return x


def numpy_state(module):
    return {name: tensor.double().numpy().copy() for name, tensor in module.state_dict().items()}


# --- DoubleConv


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_double_conv_is_what_its_docstring_says(norm, activation):
    block = randomize(DoubleConv(2, 4, norm=norm, activation=activation).double())
    x = torch.randn(2, 2, 3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = np.stack([double_conv(picture.numpy(), numpy_state(block), norm, activation) for picture in x])
    np.testing.assert_allclose(block(x).detach().numpy(), expected, rtol=1e-9, atol=1e-9)


def test_batch_norm_takes_the_batchs_statistics_while_training():
    block = randomize(DoubleConv(2, 4).double()).train()
    x = torch.randn(2, 2, 3, 4, dtype=torch.float64)
    state = numpy_state(block)
    first = np.stack([conv3x3(picture.numpy(), state["conv1.weight"]) for picture in x])
    block(x)
    mean = 0.9 * state["norm1.running_mean"] + 0.1 * first.mean((0, 2, 3))
    var = 0.9 * state["norm1.running_var"] + 0.1 * first.var((0, 2, 3), ddof=1)
    np.testing.assert_allclose(block.norm1.running_mean.numpy(), mean)
    np.testing.assert_allclose(block.norm1.running_var.numpy(), var)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_agree_with_finite_differences(norm, activation):
    # Activations in place must not overwrite what a gradient needs.
    block = randomize(DoubleConv(1, 2, norm=norm, activation=activation).double()).train()
    x = torch.randn(2, 1, 2, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(block, (x,), atol=1e-4)


@pytest.mark.parametrize("norm", NORMS)
def test_convolutions_have_biases_only_without_a_norm(norm):
    assert ("conv1.bias" in DoubleConv(3, 8, norm=norm).state_dict()) == (norm == "none")


def test_dropout_drops_whole_channels_and_only_while_training():
    torch.manual_seed(0)
    block = randomize(DoubleConv(3, 64, activation="elu", dropout=0.25))
    plain = DoubleConv(3, 64, activation="elu").eval()
    plain.load_state_dict(block.state_dict())
    x = torch.randn(4, 3, 5, 5)
    expected = plain(x)
    assert torch.equal(block(x), expected)

    block.dropout.train()
    dropped = block(x)
    gone = (dropped == 0).flatten(2).all(2)
    assert 0.1 < gone.float().mean() < 0.4
    torch.testing.assert_close(dropped[~gone], expected[~gone] / 0.75)


def test_unknown_norms_and_activations_list_the_known():
    for option in ("foo", "first_norm"):
        for upsample in ("transpose", "nearest_conv"):
            with pytest.raises(TypeError, match=f"^Up has no option {option}; it has mid_channels"):
                Up(8, 4, upsample=upsample, **{option: False})
    with pytest.raises(ValueError, match="norm must be one of batch, instance, group, none, got 'layer'"):
        DoubleConv(3, 8, norm="layer")
    with pytest.raises(ValueError, match="activation must be one of relu, leaky_relu, elu, gelu, silu, got 'tanh'"):
        DoubleConv(3, 8, activation="tanh")
    with pytest.raises(TypeError, match=r"DoubleConv has no option padding; it has mid_channels, .*, negative_slope$"):
        DoubleConv(3, 8, padding=0)
    with pytest.raises(ValueError, match="norm must be one of"):
        make_norm("layer", 8)
    with pytest.raises(ValueError, match="activation must be one of"):
        make_activation("tanh")


@pytest.mark.parametrize("norm", NORMS)
def test_biases_the_width_between_and_the_first_norm_may_be_chosen(norm):
    block = DoubleConv(2, 4, 6, norm=norm, bias=True)
    assert [block.conv1.weight.shape[:2], block.conv2.weight.shape[:2]] == [(6, 2), (4, 6)]
    assert "conv1.bias" in block.state_dict()
    assert "conv2.bias" in block.state_dict()
    if norm != "none":
        first = DoubleConv(2, 4, norm=norm, first_norm=False)
        assert isinstance(first.norm1, nn.Identity)
        assert type(first.norm2) is type(block.norm2)
        assert first.conv1.bias is not None
        assert first.conv2.bias is None


def test_a_first_convolution_without_norm_is_activated():
    block = randomize(DoubleConv(2, 4, first_norm=False).double())
    x = torch.randn(1, 2, 3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    state = numpy_state(block)
    middle = np.maximum(conv3x3(x[0].numpy(), state["conv1.weight"], state["conv1.bias"]), 0)
    expected = block.act2(block.norm2(block.conv2(torch.from_numpy(middle)[None])))
    torch.testing.assert_close(block(x), expected)


def test_the_leaky_slope_may_be_chosen():
    x = torch.tensor([-2.0, 3.0])
    assert torch.equal(make_activation("leaky_relu", negative_slope=0.25)(x.clone()), torch.tensor([-0.5, 3.0]))
    assert DoubleConv(2, 4, activation="leaky_relu", negative_slope=0.25).act2.negative_slope == 0.25


def test_type_checkers_see_the_keywords_that_there_are():
    assert set(LayerOptions.__annotations__) == set(conv_layers.__kwdefaults__)


# --- norms


@pytest.mark.parametrize(
    ("channels", "groups"),
    [(1, 1), (3, 1), (4, 2), (8, 4), (24, 4), (32, 16), (48, 8), (64, 32), (96, 16), (512, 32), (100, 2)],
)
def test_group_norm_has_half_as_many_groups_as_the_largest_power_of_two_in_the_width(channels, groups):
    assert make_norm("group", channels).num_groups == groups


@pytest.mark.parametrize("training", [True, False])
def test_instance_norm_is_torchs(training):
    norm = randomize(make_norm("instance", 6)).train(training)
    theirs = nn.InstanceNorm2d(6, affine=True).train(training)
    theirs.load_state_dict(norm.state_dict())
    x = torch.randn(2, 6, 3, 5)
    assert torch.equal(norm(x), theirs(x))
    plain = make_norm("instance", 6, affine=False)
    assert not plain.state_dict()
    assert torch.equal(plain(x), nn.InstanceNorm2d(6)(x))


def test_instance_norm_of_one_pixel_is_the_bias():
    norm = randomize(make_norm("instance", 6))
    x = torch.randn(2, 6, 1, 1)
    torch.testing.assert_close(norm(x), norm.bias.view(1, 6, 1, 1).expand(2, 6, 1, 1), rtol=0, atol=1e-3)


# --- Up


@pytest.mark.parametrize("norm", NORMS)
def test_up_doubles_puts_the_skip_first_and_convolves(norm):
    up = randomize(Up(3, 4, norm=norm).double())
    generator = torch.Generator().manual_seed(2)
    x, skip = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((3, 2, 2), (4, 4, 4)))
    state = numpy_state(up)
    doubled = transposed_conv2x2(x.numpy(), state["upsample.weight"], state["upsample.bias"])
    conv = {name.removeprefix("conv."): value for name, value in state.items() if name.startswith("conv.")}
    expected = double_conv(np.concatenate((skip.numpy(), doubled)), conv, norm, "relu")
    np.testing.assert_allclose(up(x[None], skip[None])[0].detach().numpy(), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("skip_first", [True, False])
@pytest.mark.parametrize("upsample", UPSAMPLINGS)
def test_up_in_every_way_of_doubling_and_either_order(upsample, skip_first):
    options = {"bias": True, "activation": "leaky_relu"}
    up = randomize(Up(3, 4, 5, mid_channels=2, up_channels=6, upsample=upsample, skip_first=skip_first, **options).double())
    generator = torch.Generator().manual_seed(2)
    x, skip = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((3, 2, 3), (4, 4, 6)))
    state = numpy_state(up)
    if upsample == "transpose":
        doubled = transposed_conv2x2(x.numpy(), state["upsample.weight"], state["upsample.bias"])
    elif upsample == "bilinear":
        doubled = bilinear2x(x.numpy(), align_corners=False)
    else:
        doubled = x.numpy().repeat(2, axis=1).repeat(2, axis=2)
    if upsample == "nearest_conv":
        doubled = conv3x3(doubled, state["upsample.conv.weight"], state["upsample.conv.bias"])
        mean, var, weight, bias = (
            state[f"upsample.norm.{name}"][:, None, None] for name in ("running_mean", "running_var", "weight", "bias")
        )
        doubled = (doubled - mean) / np.sqrt(var + 1e-5) * weight + bias
        doubled = np.where(doubled > 0, doubled, 0.1 * doubled)
    assert len(doubled) == (3 if upsample in ("bilinear", "nearest") else 6)
    conv = {name.removeprefix("conv."): value for name, value in state.items() if name.startswith("conv.")}
    maps = (skip.numpy(), doubled) if skip_first else (doubled, skip.numpy())
    expected = double_conv(np.concatenate(maps), conv, "batch", "leaky_relu")
    np.testing.assert_allclose(up(x[None], skip[None])[0].detach().numpy(), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("align_corners", [True, False])
def test_bilinear_doubling_is_what_its_name_says(align_corners):
    x = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    layer = make_upsample("bilinear", 2, 2, align_corners=align_corners)
    np.testing.assert_allclose(layer(x[None])[0].numpy(), bilinear2x(x.numpy(), align_corners=align_corners), atol=1e-12)


def test_unknown_ways_of_doubling_and_matching_list_the_known():
    with pytest.raises(ValueError, match="upsample must be one of transpose, bilinear, nearest, nearest_conv, got 'cubic'"):
        Up(3, 4, upsample="cubic")
    with pytest.raises(ValueError, match="match must be one of resize, zeros, replicate, got 'crop'"):
        Up(3, 4, match="crop")
    with pytest.raises(ValueError, match="match must be one of resize, zeros, replicate, got 'zero'"):
        match_size(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 3, 3), "zero")


# --- match_size


@pytest.mark.parametrize("size", [(4, 6), (5, 6), (4, 7), (5, 7)])
@pytest.mark.parametrize(("match", "mode"), [("zeros", "constant"), ("replicate", "edge")])
def test_an_odd_skip_is_matched_by_padding_at_the_bottom_and_right(size, match, mode, monkeypatch):
    x = torch.rand(2, 1, 4, 6, generator=torch.Generator().manual_seed(4))
    expected = np.pad(x.numpy(), [(0, 0), (0, 0), (0, size[0] - 4), (0, size[1] - 6)], mode=mode)
    assert np.array_equal(match_size(x, torch.empty(2, 3, *size), match).numpy(), expected)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert np.array_equal(match_size(x, torch.empty(2, 3, *size), match).numpy(), expected)


@pytest.mark.parametrize("size", [(5, 6), (4, 7), (5, 7)])
def test_an_odd_skip_is_matched_by_bilinear_resizing(size):
    x = torch.rand(1, 1, 4, 6, generator=torch.Generator().manual_seed(4))
    matched = match_size(x, torch.empty(1, 3, *size))
    pillow = Image.fromarray(x[0, 0].numpy()).resize(size[::-1], Image.Resampling.BILINEAR)
    np.testing.assert_allclose(matched[0, 0].numpy(), np.array(pillow), atol=1e-6)


def test_on_mps_it_is_resized_without_what_torch_2_6_lacks_there():
    x = torch.rand(1, 2, 4, 6, generator=torch.Generator().manual_seed(4))
    skip = torch.empty(1, 3, 5, 7)
    torch.testing.assert_close(match_size(x.as_subclass(OnMps), skip).cpu(), match_size(x, skip))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_equal_sizes_are_an_exact_identity_in_a_captured_graph_too(dtype, monkeypatch):
    x = torch.randn(2, 3, 6, 5).to(dtype)
    assert match_size(x, x) is x
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert match_size(x, x) is not x
    assert torch.equal(match_size(x, x), x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_resized_through_float32(dtype):
    # torch has no half precision kernel for this on the CPU, and torchvision's resize takes the same way.
    x = torch.randn(1, 2, 4, 6).to(dtype)
    skip = torch.empty(1, 2, 5, 7)
    assert torch.equal(match_size(x, skip), match_size(x.float(), skip).to(dtype))
    assert match_size(x.double(), skip).dtype == torch.float64
