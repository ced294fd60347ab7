from __future__ import annotations

import copy
import dataclasses
import inspect
import itertools
import pickle
import typing
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from needs import needs_native
from study import randomize
from torch import Tensor

from unetlib import Preprocessing, UNet, UNetConfig
from unetlib.config import ACTIVATIONS, MATCHES, NORMS, PeerOptions
from unetlib.unet import PredictOptions


def small(**options) -> UNet:
    return randomize(UNet(**{"features": (4, 8), **options}))


def pictures(height: int, width: int, channels: int = 3, count: int = 2) -> Tensor:
    return torch.randn(count, channels, height, width, generator=torch.Generator().manual_seed(height * 1000 + width))


# Options as the networks of other projects have them, every value of every one at least once.
PEERS = {
    "padded": {"match": "zeros", "conv_bias": True, "first_norm": False},
    "bilinear": {
        "upsample": "bilinear",
        "align_corners": True,
        "match": "zeros",
        "bottleneck": 8,
        "mid_features": (5, 6),
        "decoder_features": (3, 4),
    },
    "replicated": {"match": "replicate", "up_features": (5, 6), "norm": "instance"},
    "nearest": {"upsample": "nearest", "skip_first": False, "norm": "none"},
    "nearest_conv": {"upsample": "nearest_conv", "match": "replicate", "skip_first": False},
}
peers = pytest.mark.parametrize("options", [{}, *PEERS.values()], ids=["default", *PEERS])


def reference(model: UNet, x: Tensor) -> Tensor:
    """The forward pass written over the state dict, one level inside the other; batch norm and ReLU."""
    state = model.state_dict()

    def double(x: Tensor, name: str) -> Tensor:
        for number in (1, 2):
            norm = [state[f"{name}.norm{number}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
            x = F.batch_norm(F.conv2d(x, state[f"{name}.conv{number}.weight"], padding=1), *norm).relu()
        return x

    def level(x: Tensor, number: int) -> Tensor:
        if number == model.config.depth:
            return double(x, "bottleneck")
        skip = double(x, f"encoder.{number}")
        up = f"decoder.{model.config.depth - 1 - number}"
        deeper = level(F.max_pool2d(skip, 2), number + 1)
        deeper = F.conv_transpose2d(deeper, state[f"{up}.upsample.weight"], state[f"{up}.upsample.bias"], stride=2)
        deeper = F.interpolate(deeper, skip.shape[2:], mode="bilinear", antialias=True)
        return double(torch.cat((skip, deeper), dim=1), f"{up}.conv")

    return F.conv2d(level(x, 0), state["head.weight"], state["head.bias"])


# --- architecture


def test_the_default_network_has_31_037_633_parameters():
    with torch.device("meta"):
        assert sum(p.numel() for p in UNet().parameters()) == 31_037_633


@pytest.mark.parametrize("features", [(5,), (4, 8), (8, 24, 16), (16, 4, 4, 8, 3), (2,) * 6])
@pytest.mark.parametrize("bottleneck", [None, 6])
def test_features_of_any_length_and_widths(features, bottleneck):
    model = small(features=features, bottleneck=bottleneck, in_channels=2, out_channels=3)
    widths = [block.conv2.out_channels for block in model.encoder]
    assert widths == [up.conv.conv2.out_channels for up in reversed(model.decoder)] == list(features)
    assert model.bottleneck.conv2.out_channels == (bottleneck or 2 * features[-1])
    for x in (pictures(64, 64, channels=2), pictures(75, 93, channels=2)):
        assert torch.equal(model(x), reference(model, x))


def test_features_may_be_any_sequence():
    assert UNet(features=[4, 8]).config == UNet(features=iter((4, 8))).config == UNetConfig(features=(4, 8))
    with pytest.raises(ValueError, match=r"features must be a sequence of widths .*, got 64"):
        UNet(features=64)


@pytest.mark.parametrize(
    "config",
    [
        UNetConfig(features=(4, 8)),
        UNetConfig(2, 5, (4, 6, 3), bottleneck=7, norm="group", activation="silu", dropout=0.25),
        UNetConfig(features=(4,), norm="none", activation="leaky_relu"),
        UNetConfig(
            features=(4, 8), norm="instance", affine=False, conv_bias=True, activation="leaky_relu", negative_slope=0.01
        ),
        *(UNetConfig(features=(4, 8), **options) for options in PEERS.values()),
    ],
)
def test_a_config_builds_the_network_that_has_it(config):
    model = UNet.from_config(config)
    assert model.config == config
    again = randomize(UNet.from_config(model.config))
    again.load_state_dict(randomize(model).state_dict())
    x = pictures(16, 16, channels=config.in_channels)
    assert torch.equal(again(x), model(x))
    assert model(x).shape == (2, config.out_channels, 16, 16)


def test_numbers_of_numpy_become_plain_ones():
    model = UNet(np.int64(3), np.int32(2), (4,), norm=np.str_("batch"), activation=np.str_("gelu"), dropout=np.float32(0.25))
    channels = [model.encoder[0].conv1.in_channels, model.head.out_channels, model.encoder[0].norm1.num_features]
    assert [type(number) for number in channels] == [int, int, int]
    assert type(model.encoder[0].dropout.p) is float


def test_options_are_checked():
    with pytest.raises(ValueError, match="norm must be one of"):
        UNet(norm="layer")
    with pytest.raises(ValueError, match=r"dropout must be a probability in \[0, 1\), got 1"):
        UNet(dropout=1)
    with pytest.raises(TypeError, match=r"UNet has no option colour; it has in_channels, .*, patch_size$"):
        UNet(colour="red")
    with pytest.raises(TypeError, match="expected a batch as a tensor, got a list; `predict` takes pictures as they are"):
        UNet(features=(8,))([[0.0]])


def test_a_dictionary_is_told_how_to_become_a_config():
    with pytest.raises(TypeError, match=r"expected a UNetConfig, got a dict; UNetConfig\.from_dict makes one"):
        UNet.from_config({"features": (4, 8)})


def test_a_config_in_place_of_options_is_told_where_it_goes():
    with pytest.raises(TypeError, match=r"UNet takes options, got a UNetConfig; write UNet\.from_config\(config\)"):
        UNet(UNetConfig(features=(4, 8)))


def test_type_checkers_see_the_keywords_that_there_are():
    def keywords(function) -> set[str]:
        return {name for name, parameter in inspect.signature(function).parameters.items() if parameter.kind.value != 4} - {
            "self"
        }

    fields = [field.name for field in dataclasses.fields(UNetConfig)]
    assert sorted([*keywords(UNet.__init__), *PeerOptions.__annotations__]) == sorted(fields)
    assert keywords(UNet.predict) - {"images", "out"} == set(PredictOptions.__annotations__)


@pytest.mark.parametrize("method", [UNet.from_config, UNet.from_pretrained, UNet.save_pretrained, UNet.push_to_hub])
def test_the_types_of_methods_are_there_at_run_time(method):
    assert "return" in typing.get_type_hints(method)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_parameter_gets_a_gradient(norm, activation):
    model = small(norm=norm, activation=activation).train()
    model(pictures(18, 21)).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_dropout_is_at_the_end_of_every_double_convolution_and_only_while_training():
    model = small(dropout=0.5)
    assert sum(isinstance(m, torch.nn.Dropout2d) for m in model.modules()) == 2 * model.config.depth + 1
    plain = small()
    plain.load_state_dict(model.state_dict())
    x = pictures(16, 16)
    assert torch.equal(model(x), plain(x))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout2d):
            module.train()
    assert not torch.equal(model(x), plain(x))
    assert not torch.equal(model(x), model(x))


# --- sizes


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("size", [(8, 8), (8, 9), (15, 8), (9, 15), (16, 17), (31, 33), (40, 25)])
def test_any_size_from_two_to_the_depth_on(size, norm):
    model = small(features=(2, 4, 4), norm=norm)
    logits = model(pictures(*size, count=1))
    assert logits.shape == (1, 1, *size)
    assert logits.isfinite().all()
    if norm == "batch":
        assert torch.equal(logits, reference(model, pictures(*size, count=1)))


@peers
@pytest.mark.parametrize("size", [(4, 4), (4, 5), (13, 10), (16, 24)])
def test_any_size_with_the_options_of_other_projects(options, size):
    model = small(**options)
    logits = model(pictures(*size))
    assert logits.shape == (2, 1, *size)
    assert logits.isfinite().all()
    assert logits.std() > 0


@peers
def test_widths_are_those_of_the_config(options):
    model = small(**options)
    for level, up in enumerate(reversed(model.decoder)):
        doubled, skip = model.config.up_features[level], model.config.features[level]
        assert up.conv.conv1.weight.shape[:2] == (model.config.mid_features[level], doubled + skip)
        assert up.conv.conv2.weight.shape[0] == model.config.decoder_features[level]
    assert model.head.in_channels == model.config.decoder_features[0]


def test_the_first_norm_alone_is_left_out():
    model = small(first_norm=False)
    bare = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Identity)]
    assert bare == ["encoder.0.norm1"]
    assert [name for name in model.state_dict() if name.endswith(("conv1.bias", "conv2.bias"))] == ["encoder.0.conv1.bias"]


@pytest.mark.parametrize("size", [(24, 36), (25, 38), (17, 12)])
def test_patches_are_pixels_whose_channels_are_pixels(size):
    model = small(features=(4, 6), in_channels=2, out_channels=2, patch_size=3)
    plain = small(features=(4, 6), in_channels=18, out_channels=18)
    plain.load_state_dict(model.state_dict())
    model, plain = (network.requires_grad_(False) for network in (model, plain))
    x = pictures(*size, channels=2)
    padded = np.pad(x.numpy(), ((0, 0), (0, 0), (0, -size[0] % 3), (0, -size[1] % 3)), mode="edge")
    patches = np.stack([padded[:, c, row::3, column::3] for c in range(2) for row in range(3) for column in range(3)], axis=1)
    logits = plain(torch.from_numpy(patches)).numpy()
    expected = np.empty_like(padded)
    for channel, (c, row, column) in enumerate(itertools.product(range(2), range(3), range(3))):
        expected[:, c, row::3, column::3] = logits[:, channel]
    np.testing.assert_allclose(model(x).numpy(), expected[:, :, : size[0], : size[1]], rtol=1e-5, atol=1e-6)


def test_the_smallest_size_of_the_default_depth():
    model = small(features=(2, 2, 2, 2))
    assert model(pictures(16, 16)).shape == (2, 1, 16, 16)


@pytest.mark.parametrize("size", [(7, 8), (8, 7), (1, 1), (0, 8)])
def test_smaller_pictures_are_refused_with_both_sizes_named(size):
    with pytest.raises(ValueError, match=rf"3 levels needs pictures of at least 8x8 pixels, got {size[0]}x{size[1]}"):
        small(features=(2, 4, 4))(torch.zeros(1, 3, *size))


def test_a_network_of_patches_needs_as_many_of_them():
    with pytest.raises(ValueError, match="2 levels needs pictures of at least 12x12 pixels, got 11x12"):
        small(patch_size=3)(torch.zeros(1, 3, 11, 12))


def test_another_shape_is_refused_with_the_expected_one():
    with pytest.raises(ValueError, match=r"shape \(N, 3, H, W\), got \(2, 4, 16, 16\)"):
        small()(pictures(16, 16, channels=4))
    for channels, mode in ((3, "RGB"), (1, "L")):
        other = 4 - channels
        hint = rf'; read pictures with mode="{mode}", or take a network for these: UNet\(in_channels={other}\), or '
        hint += rf"UNet\.from_pretrained\(\.\.\., in_channels={other}\)$"
        with pytest.raises(ValueError, match=rf"got \(2, {other}, 16, 16\){hint}"):
            small(in_channels=channels)(pictures(16, 16, channels=other))
    for last in (torch.rand(2, 16, 24, 3), torch.rand(16, 24, 3)):  # as pictures are outside of PyTorch
        with pytest.raises(ValueError, match=r"; its channels come last: give ") as error:
            small()(last)
        assert small()(eval(str(error.value).rpartition("give ")[2], {"x": last})).shape[-2:] == (16, 24)
    with pytest.raises(ValueError, match=r"got \(3, 16, 16\); add the batch dimension with x\[None\]"):
        small()(pictures(16, 16)[0])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool])
def test_pictures_of_bytes_are_told_what_to_become(dtype):
    with pytest.raises(ValueError, match=rf"floats, such as pixels / 255, got {dtype}; `predict` takes pictures as they are"):
        small()(pictures(16, 16).to(dtype))


def test_an_empty_batch_gives_empty_logits():
    assert small()(torch.zeros(0, 3, 9, 8)).shape == (0, 1, 9, 8)


# --- precision and memory format


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [(16, 16), (17, 23)])
@peers
def test_half_precision_runs_at_even_and_odd_sizes(options, dtype, size):
    model, x = small(**options), pictures(*size)
    expected = model(x)
    with torch.autocast("cpu", dtype=dtype):
        torch.testing.assert_close(model(x).float(), expected, rtol=0.1, atol=0.1)
    assert model.to(dtype)(x.to(dtype)).dtype == dtype


@pytest.mark.parametrize("norm", NORMS)
def test_channels_last_gives_the_same_logits_and_stays_channels_last(norm):
    model, x = small(norm=norm, out_channels=4), pictures(19, 26)
    expected = model(x)
    logits = model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    assert logits.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


# --- captured graphs


@pytest.mark.parametrize("options", [{}, PEERS["bilinear"], PEERS["nearest_conv"]], ids=["default", "bilinear", "nearest_conv"])
def test_compile_takes_every_size_in_one_graph(options):
    torch.compiler.reset()
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    model = small(**options)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=count)
    for size in [(16, 24), (17, 23), (12, 9), (33, 10)]:
        assert torch.equal(compiled(pictures(*size)), model(pictures(*size)))
    assert len(graphs) == 1


@needs_native  # and with it a compiler for those of PyTorch
@pytest.mark.parametrize("match", MATCHES)
def test_a_compiled_network_has_the_gradients_of_the_network(match):
    torch.compiler.reset()
    model, x = small(match=match, features=(4,)).double(), pictures(17, 22).double()
    gradients = []
    for run in (model, torch.compile(model)):
        run(x).square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
        model.zero_grad(set_to_none=True)
    torch.testing.assert_close(*gradients)


def test_networks_of_patches_compile_and_export():
    torch.compiler.reset()
    model = small(patch_size=2, out_channels=2)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    for size in [(16, 24), (17, 23), (12, 9), (33, 10)]:
        assert torch.equal(compiled(pictures(*size)), model(pictures(*size)))
    dims = {2: 2 * torch.export.Dim("half_height", min=8), 3: 2 * torch.export.Dim("half_width", min=8)}
    program = torch.export.export(model, (pictures(16, 24),), dynamic_shapes=(dims,)).module()
    with pytest.warns(torch.jit.TracerWarning):
        traced = torch.jit.trace(model, pictures(16, 24))
    for size in [(16, 24), (18, 22), (16, 16), (20, 30)]:
        assert torch.equal(program(pictures(*size)), model(pictures(*size)))
        assert torch.equal(traced(pictures(*size)), model(pictures(*size)))
    with pytest.raises(RuntimeError, match="pixel_unshuffle"):
        traced(pictures(17, 24))


def test_compile_differentiates():
    torch.compiler.reset()
    model = small().train()
    twin = copy.deepcopy(model)
    x = pictures(17, 24)
    torch.compile(model, fullgraph=True, backend="aot_eager")(x).square().mean().backward()
    twin(x).square().mean().backward()
    for (name, parameter), other in zip(model.named_parameters(), twin.parameters()):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize(
    "options", [*({"norm": norm} for norm in NORMS), *PEERS.values()], ids=[*(f"norm {norm}" for norm in NORMS), *PEERS]
)
def test_an_export_from_an_even_size_serves_odd_ones(options):
    model = small(**options)
    # torch lays out maps of one pixel in their own way, so that an export starts at two pixels in the bottleneck.
    dims = {2: torch.export.Dim("height", min=8), 3: torch.export.Dim("width", min=8)}
    program = torch.export.export(model, (pictures(16, 24),), dynamic_shapes=(dims,)).module()
    for size in [(16, 24), (17, 23), (8, 8), (9, 30)]:
        assert torch.equal(program(pictures(*size)), model(pictures(*size)))


@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated, and each comparison of sizes warns
@peers
def test_a_trace_from_an_even_size_serves_odd_ones(options):
    model = small(**options)
    traced = torch.jit.trace(model, pictures(16, 24))
    for size in itertools.product((16, 17), (23, 24)):
        assert torch.equal(traced(pictures(*size)), model(pictures(*size)))


@pytest.mark.parametrize("options", [{}, {"patch_size": 2}, *PEERS.values()], ids=["default", "patches", *PEERS])
def test_torch_fx_traces_for_any_size(options):
    model = small(**options)
    traced = torch.fx.symbolic_trace(model)
    for graph in (traced, copy.deepcopy(traced), pickle.loads(pickle.dumps(traced))):
        for size in [(16, 24), (17, 23)]:
            assert torch.equal(graph(pictures(*size)), model(pictures(*size)))
    with pytest.raises(ValueError, match=r"expected pictures of shape \(N, 3, H, W\), got \(3, 16, 24\)"):
        traced(pictures(16, 24)[0])


# --- preprocessing


def test_preprocessing_must_fit_the_network():
    model = small(out_channels=3)
    model.preprocessing = Preprocessing(size=(16, 24), mean=(0.1, 0.2, 0.3), class_names=("sky", "road", "car"))
    assert model.preprocessing.size == (16, 24)
    with pytest.raises(ValueError, match="mean has 2 numbers, but the network has 3 input channels"):
        model.preprocessing = Preprocessing(mean=(0.1, 0.2))
    with pytest.raises(ValueError, match="class_names has 2 names, but 3 output channels make 3 classes"):
        model.preprocessing = Preprocessing(class_names=("background", "car"))
    for wrong in ({"size": (64, 96)}, None):
        with pytest.raises(TypeError, match=r"must be a Preprocessing, such as Preprocessing\(size=\(160, 240\)\), got"):
            model.preprocessing = wrong
    least = model.config.stride
    with pytest.raises(
        ValueError, match=rf"size=\(16, 1\) is smaller than config\.stride={least}; give at least \({least}, {least}\)"
    ):
        model.preprocessing = Preprocessing(size=(16, 1))
    assert model.preprocessing.size == (16, 24)
    model.preprocessing = Preprocessing(size=(least, least))


def test_a_copy_keeps_config_preprocessing_and_weights():
    model = small()
    model.preprocessing = Preprocessing(scale=0.5)
    twin = copy.deepcopy(model)
    assert (twin.config, twin.preprocessing) == (model.config, model.preprocessing)
    assert torch.equal(twin(pictures(17, 16)), model(pictures(17, 16)))
