from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from study import StudyUNet, randomize
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import unetlib
from unetlib import Preprocessing, UNet, UNetConfig
from unetlib.convert import FAMILIES, convert, export_state_dict
from unetlib.losses import DiceLoss

# --- the peers, each read from a description of its layout: a table of named layers and a forward pass over it


class Peer(nn.Module):
    """Layers under dotted names, a layer under two names where the peer registers it twice."""

    def __init__(self, layers: Mapping[str, nn.Module], run: Callable[[Mapping[str, nn.Module], Tensor], Tensor]) -> None:
        super().__init__()
        self.layers, self.run = dict(layers), run
        for name, layer in layers.items():
            *path, last = name.split(".")
            node: nn.Module = self
            for part in path:
                if part not in node._modules:
                    node.add_module(part, nn.Module())
                node = node._modules[part]
            node.add_module(last, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.layers, x)


Names = Sequence[tuple[str, str | None]]  # (convolution, norm) twice


def add_double(layers: dict[str, nn.Module], names: Names, channels: Sequence[int], *, bias: bool) -> None:
    for (conv, norm), (before, after) in zip(names, pairwise(channels)):
        layers[conv] = nn.Conv2d(before, after, 3, padding=1, bias=bias)
        if norm:
            layers[norm] = nn.BatchNorm2d(after)


def run_double(layers: Mapping[str, nn.Module], names: Names, x: Tensor) -> Tensor:
    for conv, norm in names:
        x = layers[conv](x)
        x = F.relu(layers[norm](x) if norm in layers else x)
    return x


def milesial(
    *, bilinear: bool = False, bias: bool = False, channels: int = 3, classes: int = 2, width: int = 4, align: bool = True
) -> Peer:
    def at(block: str) -> Names:
        return [(f"{block}.0", f"{block}.1"), (f"{block}.3", f"{block}.4")]

    blocks = ["inc.double_conv", *(f"down{n}.maxpool_conv.1.double_conv" for n in (1, 2, 3, 4))]
    factor = 2 if bilinear else 1
    widths = [width, 2 * width, 4 * width, 8 * width, 16 * width // factor]
    layers: dict[str, nn.Module] = {}
    for block, before, after in zip(blocks, [channels, *widths], widths):
        add_double(layers, at(block), (before, after, after), bias=bias)
    for n, before in zip((1, 2, 3, 4), (16 * width, 8 * width, 4 * width, 2 * width)):
        if not bilinear:
            layers[f"up{n}.up"] = nn.ConvTranspose2d(before, before // 2, 2, stride=2)
        after = before // 2 // (factor if n < 4 else 1)
        middle = before // 2 if bilinear else after
        add_double(layers, at(f"up{n}.conv.double_conv"), (before, middle, after), bias=bias)
    layers["outc.conv"] = nn.Conv2d(width, classes, 1)

    def run(layers: Mapping[str, nn.Module], x: Tensor) -> Tensor:
        maps = [run_double(layers, at(blocks[0]), x)]
        for block in blocks[1:]:
            maps.append(run_double(layers, at(block), F.max_pool2d(maps[-1], 2)))
        x = maps.pop()
        for n in (1, 2, 3, 4):
            skip = maps.pop()
            up = None if bilinear else layers[f"up{n}.up"]
            x = up(x) if up else F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=align)
            down, right = skip.shape[2] - x.shape[2], skip.shape[3] - x.shape[3]
            x = F.pad(x, [right // 2, right - right // 2, down // 2, down - down // 2])  # centred zeros
            x = run_double(layers, at(f"up{n}.conv.double_conv"), torch.cat([skip, x], dim=1))
        return layers["outc.conv"](x)

    return Peer(layers, run)


def mateuszbuda(*, channels: int = 3, classes: int = 1, width: int = 4) -> Peer:
    def at(block: str, short: str) -> Names:
        return [(f"{block}.{short}conv{n}", f"{block}.{short}norm{n}") for n in (1, 2)]

    layers: dict[str, nn.Module] = {}
    widths = [channels, width, 2 * width, 4 * width, 8 * width]
    for n in (1, 2, 3, 4):
        add_double(layers, at(f"encoder{n}", f"enc{n}"), (widths[n - 1], widths[n], widths[n]), bias=False)
        layers[f"upconv{n}"] = nn.ConvTranspose2d(2 * widths[n], widths[n], 2, stride=2)
        add_double(layers, at(f"decoder{n}", f"dec{n}"), (2 * widths[n], widths[n], widths[n]), bias=False)
    add_double(layers, at("bottleneck", "bottleneck"), (8 * width, 16 * width, 16 * width), bias=False)
    layers["conv"] = nn.Conv2d(width, classes, 1)

    def run(layers: Mapping[str, nn.Module], x: Tensor) -> Tensor:
        skips = []
        for n in (1, 2, 3, 4):
            skips.append(run_double(layers, at(f"encoder{n}", f"enc{n}"), x))
            x = F.max_pool2d(skips[-1], 2)
        x = run_double(layers, at("bottleneck", "bottleneck"), x)
        for n in (4, 3, 2, 1):
            x = torch.cat((layers[f"upconv{n}"](x), skips.pop()), dim=1)  # the doubled map first
            x = run_double(layers, at(f"decoder{n}", f"dec{n}"), x)
        return layers["conv"](x).sigmoid()

    return Peer(layers, run)


def fepegar(
    *,
    norm: type[nn.Module] | None = nn.BatchNorm2d,
    normed_bias: bool = False,
    channels: int = 3,
    classes: int = 2,
    width: int = 4,
    levels: int = 4,
    upsampling: str = "conv",
) -> Peer:
    layers: dict[str, nn.Module] = {}

    def add(name: str, before: int, after: int, norm: type[nn.Module] | None, size: int = 3) -> None:
        conv = nn.Conv2d(before, after, size, padding=size // 2, bias=normed_bias or norm is None)
        layers[f"{name}.conv_layer"] = layers[f"{name}.block.0"] = conv
        if norm is not None:
            layers[f"{name}.norm_layer"] = layers[f"{name}.block.1"] = norm(after)

    def run_one(layers: Mapping[str, nn.Module], name: str, x: Tensor) -> Tensor:
        x = layers[f"{name}.block.0"](x)
        return layers[f"{name}.block.1"](x) if f"{name}.block.1" in layers else x

    down = [f"encoder.encoding_blocks.{level}" for level in range(levels)] + ["bottom_block"]
    before, after = channels, width
    for block in down:
        add(f"{block}.conv1", before, after, None if block == down[0] else norm)  # the very first without a norm
        add(f"{block}.conv2", after, after, norm)
        before, after = after, 2 * after
    for step in range(levels):
        block, after = f"decoder.decoding_blocks.{step}", before // 2
        if upsampling == "conv":
            layers[f"{block}.upsample"] = nn.ConvTranspose2d(before, before, 2, stride=2)  # keeps its channels
        add(f"{block}.conv1", before + after, after, norm)
        add(f"{block}.conv2", after, after, norm)
        before = after
    add("classifier", width, classes, None, size=1)

    def run(layers: Mapping[str, nn.Module], x: Tensor) -> Tensor:
        maps = []
        for block in down:
            for conv in ("conv1", "conv2"):
                x = run_one(layers, f"{block}.{conv}", x).relu()
            maps.append(x)
            x = F.max_pool2d(x, 2)
        x = maps.pop()
        for step in range(levels):
            block = f"decoder.decoding_blocks.{step}"
            x = layers[f"{block}.upsample"](x) if upsampling == "conv" else F.interpolate(x, scale_factor=2, mode=upsampling)
            x = torch.cat((maps.pop(), x), dim=1)
            for conv in ("conv1", "conv2"):
                x = run_one(layers, f"{block}.{conv}", x).relu()
        return run_one(layers, "classifier", x)

    return Peer(layers, run)


def leejunhyun(*, channels: int = 3, classes: int = 1, width: int = 4) -> Peer:
    def at(block: str) -> Names:
        return [(f"{block}.conv.0", f"{block}.conv.1"), (f"{block}.conv.3", f"{block}.conv.4")]

    layers: dict[str, nn.Module] = {}
    widths = [channels, *(width * 2**n for n in range(5))]
    for n in (1, 2, 3, 4, 5):
        add_double(layers, at(f"Conv{n}"), (widths[n - 1], widths[n], widths[n]), bias=True)
    for n in (5, 4, 3, 2):
        layers[f"Up{n}.up.1"] = nn.Conv2d(widths[n], widths[n - 1], 3, padding=1)
        layers[f"Up{n}.up.2"] = nn.BatchNorm2d(widths[n - 1])
        add_double(layers, at(f"Up_conv{n}"), (2 * widths[n - 1], widths[n - 1], widths[n - 1]), bias=True)
    layers["Conv_1x1"] = nn.Conv2d(width, classes, 1)

    def run(layers: Mapping[str, nn.Module], x: Tensor) -> Tensor:
        maps = [run_double(layers, at("Conv1"), x)]
        for n in (2, 3, 4, 5):
            maps.append(run_double(layers, at(f"Conv{n}"), F.max_pool2d(maps[-1], 2)))
        x = maps.pop()
        for n in (5, 4, 3, 2):
            x = layers[f"Up{n}.up.1"](F.interpolate(x, scale_factor=2))
            x = torch.cat((maps.pop(), layers[f"Up{n}.up.2"](x).relu()), dim=1)
            x = run_double(layers, at(f"Up_conv{n}"), x)
        return layers["Conv_1x1"](x)

    return Peer(layers, run)


def nested(*, channels: int = 3, classes: int = 1, width: int = 4) -> Peer:
    def at(block: str) -> Names:
        return [(f"{block}.conv1", f"{block}.bn1"), (f"{block}.conv2", f"{block}.bn2")]

    layers: dict[str, nn.Module] = {}
    widths = [width * 2**n for n in range(5)]
    for n, (before, after) in enumerate(pairwise((channels, *widths))):
        add_double(layers, at(f"conv{n}_0"), (before, after, after), bias=True)
    for n in (3, 2, 1, 0):
        add_double(layers, at(f"conv{n}_{4 - n}"), (widths[n] + widths[n + 1], widths[n], widths[n]), bias=True)
    layers["final"] = nn.Conv2d(width, classes, 1)

    def run(layers: Mapping[str, nn.Module], x: Tensor) -> Tensor:
        maps = [run_double(layers, at("conv0_0"), x)]
        for n in (1, 2, 3, 4):
            maps.append(run_double(layers, at(f"conv{n}_0"), F.max_pool2d(maps[-1], 2)))
        x = maps.pop()
        for n in (3, 2, 1, 0):
            x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
            x = run_double(layers, at(f"conv{n}_{4 - n}"), torch.cat((maps.pop(), x), dim=1))
        return layers["final"](x)

    return Peer(layers, run)


def usuyama(*, channels: int = 3, classes: int = 6, width: int = 4) -> Peer:
    def at(block: str) -> Names:
        return [(f"{block}.0", None), (f"{block}.2", None)]

    layers: dict[str, nn.Module] = {}
    widths = [channels, width, 2 * width, 4 * width, 8 * width]
    for n in (1, 2, 3, 4):
        add_double(layers, at(f"dconv_down{n}"), (widths[n - 1], widths[n], widths[n]), bias=True)
    for n in (3, 2, 1):
        add_double(layers, at(f"dconv_up{n}"), (widths[n] + widths[n + 1], widths[n], widths[n]), bias=True)
    layers["conv_last"] = nn.Conv2d(width, classes, 1)

    def run(layers: Mapping[str, nn.Module], x: Tensor) -> Tensor:
        maps = [run_double(layers, at("dconv_down1"), x)]
        for n in (2, 3, 4):
            maps.append(run_double(layers, at(f"dconv_down{n}"), F.max_pool2d(maps[-1], 2)))
        x = maps.pop()
        for n in (3, 2, 1):
            x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
            x = run_double(layers, at(f"dconv_up{n}"), torch.cat((x, maps.pop()), dim=1))  # the doubled map first
        return layers["conv_last"](x)

    return Peer(layers, run)


def jaxony(*, channels: int = 3, classes: int = 5, width: int = 4, levels: int = 4) -> Peer:
    def at(block: str) -> Names:
        return [(f"{block}.conv1", None), (f"{block}.conv2", None)]

    layers: dict[str, nn.Module] = {}
    widths = [width * 2**n for n in range(levels + 1)]
    for n, (before, after) in enumerate(pairwise((channels, *widths))):
        add_double(layers, at(f"down_convs.{n}"), (before, after, after), bias=True)
    for n, (before, after) in enumerate(pairwise(reversed(widths))):
        layers[f"up_convs.{n}.upconv"] = nn.ConvTranspose2d(before, after, 2, stride=2)
        add_double(layers, at(f"up_convs.{n}"), (2 * after, after, after), bias=True)
    layers["conv_final"] = nn.Conv2d(width, classes, 1)

    def run(layers: Mapping[str, nn.Module], x: Tensor) -> Tensor:
        maps = []
        for n in range(levels + 1):
            x = run_double(layers, at(f"down_convs.{n}"), x)
            maps.append(x)
            x = F.max_pool2d(x, 2)
        x = maps.pop()
        for n in range(levels):
            x = torch.cat((layers[f"up_convs.{n}.upconv"](x), maps.pop()), dim=1)  # the doubled map first
            x = run_double(layers, at(f"up_convs.{n}"), x)
        return layers["conv_final"](x)

    return Peer(layers, run)


def monai(**options) -> nn.Module:
    from monai.networks.nets import BasicUNet

    return BasicUNet(spatial_dims=2, **{"in_channels": 3, "out_channels": 2, "features": (4, 4, 8, 12, 24, 4), **options})


EVEN = [(32, 48), (64, 32)]
ANY = [*EVEN, (67, 93), (100, 75), (33, 47), (47, 32)]
INSTANCE = ("instance", {"affine": True})

# (family, peer, what its tensors do not tell, sizes that the peer takes)
CASES = {
    "study": ("study", lambda: StudyUNet(features=(4, 8, 16)), {}, ANY),
    "milesial, transposed": ("milesial", milesial, {}, ANY),
    "milesial, bilinear": ("milesial", lambda: milesial(bilinear=True), {}, ANY),
    "milesial before version 3, transposed": ("milesial", lambda: milesial(bias=True), {}, ANY),
    "milesial before version 3, bilinear": ("milesial", lambda: milesial(bilinear=True, bias=True), {}, ANY),
    "milesial, grey, one class": ("milesial", lambda: milesial(channels=1, classes=1), {}, ANY),
    "mateuszbuda": ("mateuszbuda", mateuszbuda, {}, EVEN),
    "fepegar, batch": ("fepegar", fepegar, {}, EVEN),
    "fepegar, batch and biases": ("fepegar", lambda: fepegar(normed_bias=True, levels=2), {}, EVEN),
    "fepegar, no norm": ("fepegar", lambda: fepegar(norm=None, levels=3), {}, EVEN),
    "fepegar, instance": ("fepegar", lambda: fepegar(norm=nn.InstanceNorm2d), {"norm": "instance", "affine": False}, EVEN),
    "fepegar, nearest": ("fepegar", lambda: fepegar(upsampling="nearest"), {"upsample": "nearest"}, EVEN),
    "fepegar, bilinear": ("fepegar", lambda: fepegar(upsampling="bilinear"), {"upsample": "bilinear"}, EVEN),
    "monai": ("monai", monai, {}, ANY),
    "monai, other widths": ("monai", lambda: monai(features=(6, 4, 8, 16, 12, 10), in_channels=1, out_channels=4), {}, ANY),
    "monai, batch": ("monai", lambda: monai(norm="batch"), {}, ANY),
    "monai, batch, no biases": ("monai", lambda: monai(norm="batch", bias=False), {}, ANY),
    "monai, instance, no biases": ("monai", lambda: monai(norm=INSTANCE, bias=False), {}, ANY),
    "monai, plain instance": ("monai", lambda: monai(norm="instance"), {"norm": "instance", "affine": False}, ANY),
    "monai, ELU": ("monai", lambda: monai(act="elu"), {"activation": "elu"}, ANY),
    "monai, LeakyReLU(0.01)": ("monai", lambda: monai(act="leakyrelu"), {"negative_slope": 0.01}, ANY),
    "leejunhyun": ("leejunhyun", leejunhyun, {}, EVEN),
    "4uiiurz1": ("4uiiurz1", nested, {}, EVEN),
    "usuyama": ("usuyama", usuyama, {}, EVEN),
    "jaxony": ("jaxony", jaxony, {}, EVEN),
}
cases = pytest.mark.parametrize(("family", "build", "told", "sizes"), CASES.values(), ids=CASES)


@cases
def test_outputs_equal_the_peers(family, build, told, sizes):
    peer = randomize(build(), seed=3)
    found = convert(peer.state_dict(), **told)
    assert found.family == family
    model = found.to_model()
    for height, width in sizes:
        x = torch.randn(2, model.config.in_channels, height, width, generator=torch.Generator().manual_seed(height))
        with torch.inference_mode():
            logits, expected = model(x), peer(x)
        assert expected.std() > 1e-3  # a dead network would equal any other
        assert torch.equal(logits.sigmoid() if family == "mateuszbuda" else logits, expected)


@cases
def test_the_way_back_gives_the_peers_own_state_dict(family, build, told, sizes):
    peer = randomize(build(), seed=4)
    found = convert(peer.state_dict(), **told)
    state = export_state_dict(found.to_model(), family)
    assert state.keys() == peer.state_dict().keys()
    assert all(torch.equal(state[key], tensor) for key, tensor in peer.state_dict().items())
    build().load_state_dict(state)  # strictly
    assert convert(state, **told).config == found.config


@pytest.mark.parametrize(
    ("build", "tensors", "parameters"),
    [
        (StudyUNet, 118, 31_037_633),
        (lambda: milesial(width=64), 118, 31_037_698),
        (lambda: milesial(width=64, bilinear=True), 110, 17_263_042),
        (lambda: mateuszbuda(width=32), 118, 7_763_041),
        (lambda: fepegar(width=64), 220, 36_957_314),
        (lambda: monai(features=(32, 32, 64, 128, 256, 32)), 82, 1_979_042),
        (lambda: leejunhyun(width=64), None, 34_527_041),
    ],
)
def test_the_readings_are_as_large_as_the_peers(build, tensors, parameters):
    with torch.device("meta"):
        peer = build()
    assert sum(parameter.numel() for parameter in peer.parameters()) == parameters
    if tensors is not None:
        assert len(peer.state_dict()) == tensors


def test_milesials_bilinear_network_has_its_own_widths():
    config = convert(milesial(bilinear=True, width=8).state_dict()).config
    assert config == UNetConfig(
        out_channels=2,
        features=(8, 16, 32, 64),
        bottleneck=64,
        upsample="bilinear",
        align_corners=True,
        match="zeros",
        up_features=(8, 16, 32, 64),
        mid_features=(8, 16, 32, 64),
        decoder_features=(8, 8, 16, 32),
    )


def test_corners_matter():
    # That the comparison of outputs would see a wrong align_corners.
    peer = randomize(milesial(bilinear=True, align=False))
    x = torch.randn(1, 3, 32, 32)
    assert not torch.allclose(convert(peer.state_dict()).to_model()(x), peer(x))


# --- the study's network, which is the default


@pytest.fixture(scope="module")
def default_pair():
    study = randomize(StudyUNet())
    return study, convert(study.state_dict()).to_model()


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
    model = convert(study.state_dict()).to_model()
    assert model.config == UNetConfig(in_channels, out_channels, features)
    for size in [(16, 24), (25, 31), (2 ** len(features), 9)]:
        x = torch.randn(2, in_channels, *size)
        assert torch.equal(model(x), study(x))


def test_eleven_levels_keep_their_order():
    study = randomize(StudyUNet(features=[2**level for level in range(6)]))
    assert convert(study.state_dict()).config.features == (1, 2, 4, 8, 16, 32)
    with torch.device("meta"):
        state = StudyUNet(features=[2**level for level in range(11)]).state_dict()
    found = convert(state)
    assert found.config.features == tuple(2**level for level in range(11))
    assert found.state_dict["decoder.10.upsample.weight"] is state["ups.20.weight"]


def test_training_goes_on_as_in_the_study():
    study = randomize(StudyUNet(features=(4, 8))).train()
    model = convert(study.state_dict()).to_model().train()
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
    model = convert(study.state_dict()).to_model()
    x = torch.randn(2, 3, *size)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model(x), study(x))


# --- what stands around a state dict

STATE = randomize(StudyUNet(features=(4, 8))).state_dict()


def prefixed(*prefixes: str, state: dict[str, Tensor] = STATE) -> dict[str, Tensor]:
    return {"".join(prefixes) + key: value for key, value in state.items()}


@pytest.mark.parametrize(
    "checkpoint",
    [
        STATE,
        {"state_dict": STATE, "optimizer": {"param_groups": []}, "epoch": 3},
        {"model": STATE},
        {"model_state_dict": STATE},
        {"network_weights": STATE, "init_args": {}},
        {"model": {"state_dict": STATE}},
        {"ema": STATE, "model": {**STATE, "ups.1.conv.0.weight": torch.zeros(8, 16, 3, 3)}},
        {"state_dict_ema": STATE, "state_dict": {key: value * 0 for key, value in STATE.items()}},
        {"ema": {"decay": 0.999, "updates": 7}, "model": STATE},
        {"ema": {"updates": torch.tensor(7)}, "model": STATE},
        prefixed("module."),
        prefixed("_orig_mod."),
        prefixed("module.", "_orig_mod."),
        {"state_dict": prefixed("model.", "_orig_mod.")},  # Lightning
        {"state_dict": prefixed("net."), "pytorch-lightning_version": "2.0"},
        {"n_averaged": torch.tensor(5), **prefixed("module.")},
    ],
)
def test_wrappers_and_prefixes_are_peeled(checkpoint):
    found = convert(checkpoint)
    assert found.config == UNetConfig(features=(4, 8))
    expected = convert(STATE).state_dict
    assert found.state_dict.keys() == expected.keys() == UNet(features=(4, 8)).state_dict().keys()
    assert all(found.state_dict[name] is expected[name] for name in expected)


def test_torchs_own_wrappers_are_peeled():
    study = randomize(StudyUNet(features=(4, 8)))
    for wrapped in (AveragedModel(study), nn.DataParallel(study)):
        found = convert(wrapped.state_dict())
        assert torch.equal(found.state_dict["bottleneck.conv1.weight"], study.state_dict()["bottleneck.conv.0.weight"])


def test_a_checkpoint_that_holds_itself_ends():
    checkpoint = {"epoch": 3}
    checkpoint["model"] = checkpoint["net"] = checkpoint
    with pytest.raises(ValueError, match="holds no state dict"):
        convert(checkpoint)


def test_milesials_mask_values_are_no_weights(caplog):
    state = milesial().state_dict()
    with caplog.at_level(logging.INFO, logger="unetlib"):
        found = convert({**state, "mask_values": [[0, 0, 0], [255, 255, 255]]})
    assert found.config == convert(state).config
    assert "mask_values=[[0, 0, 0], [255, 255, 255]] of the milesial checkpoint is left out" in caplog.text
    with pytest.raises(ValueError, match="the nearest, study, has no 'mask_values'"):
        convert({**STATE, "mask_values": [0, 1]})


def test_counters_that_old_files_lack_are_filled_in():
    state = {key: value for key, value in mateuszbuda().state_dict().items() if not key.endswith("num_batches_tracked")}
    model = convert(state).to_model()
    assert model.bottleneck.norm1.num_batches_tracked == 0


@pytest.mark.parametrize(
    ("build", "preprocessing", "warning"),
    [
        (lambda: StudyUNet(features=(4, 8)), Preprocessing(size=(160, 240), mean=0, std=1, threshold=0.5), None),
        (milesial, Preprocessing(scale=0.5), "its scale is not in the file"),
        (mateuszbuda, Preprocessing(size=(256, 256)), "normalised by the statistics of their own MRI volume"),
        (fepegar, Preprocessing(), "ReLU and pixels in [0, 1]. For another activation: unetlib.convert.convert(torch.load("),
        (monai, Preprocessing(), "LeakyReLU(0.1) and pixels in [0, 1]. For another activation: unetlib.convert.convert("),
        (leejunhyun, Preprocessing(mean=0.5, std=0.5), "size of its pictures is not in the file"),
        (nested, Preprocessing(), "scaling of its pictures"),
        (usuyama, Preprocessing(), "scaling of its pictures"),
        (jaxony, Preprocessing(), "scaling of its pictures"),
    ],
)
def test_the_familys_preprocessing_comes_along_and_what_is_unknown_is_said(build, preprocessing, warning, caplog):
    found = convert(build().state_dict())
    assert found.preprocessing == preprocessing == found.to_model().preprocessing
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == (warning is not None)
    assert warning is None or warning in warnings[0]


def test_the_call_that_a_warning_names_tells_another_activation(tmp_path, caplog):
    peer, path = randomize(monai(act="elu")), tmp_path / "unet.pt"
    torch.save(peer.state_dict(), path)
    UNet.from_pretrained(path)
    call = caplog.messages[-1].rpartition("For another activation: ")[2]
    caplog.clear()
    model, x = eval(call, {"unetlib": unetlib, "torch": torch, "path": path}), torch.randn(1, 3, 32, 32)
    assert caplog.messages[-1].endswith(": its pictures are not in the file; assumed are pixels in [0, 1]")  # told is told
    with torch.inference_mode():
        assert torch.equal(model(x), peer(x))


@pytest.mark.parametrize("name", ["unet_carvana_scale0.5_epoch2.pth", "last.ckpt"])
def test_a_file_loads_by_from_pretrained(tmp_path, name):
    peer = randomize(milesial())
    torch.save({**peer.state_dict(), "mask_values": [0, 1]}, tmp_path / name)
    model = UNet.from_pretrained(tmp_path / name)
    x = torch.randn(1, 3, 33, 50)
    with torch.inference_mode():
        assert torch.equal(model(x), peer(x))
    assert model.preprocessing.scale == 0.5
    UNet.from_pretrained(model.save_pretrained(tmp_path / "ours"))  # and is then one of ours


@cases
def test_shapes_alone_are_enough(family, build, told, sizes):
    with torch.device("meta"):
        state = build().state_dict()
    found, real = convert(state, **told), convert(build().state_dict(), **told)
    assert (found.family, found.config) == (real.family, real.config)
    assert all(tensor.is_meta for tensor in found.state_dict.values())


def test_a_checkpoint_in_half_precision_becomes_a_float32_network():
    state = {key: value.half() if value.is_floating_point() else value for key, value in STATE.items()}
    assert {parameter.dtype for parameter in convert(state).to_model().parameters()} == {torch.float32}


# --- what is refused


def test_an_unknown_checkpoint_is_refused_with_the_families_tried_and_the_first_keys():
    state = {**STATE, **{f"attention.{n}": torch.zeros(1) for n in range(4)}}
    names = ", ".join(family.name for family in FAMILIES)
    with pytest.raises(ValueError) as error:  # the whole message is checked
        convert(state)
    assert str(error.value) == (
        f"this checkpoint of {len(state)} entries is of no known family; tried {names}; "
        "the nearest, study, has no 'attention.0', 'attention.1', 'attention.2', ..."
    )


@pytest.mark.parametrize(
    ("build", "extra", "nearest"),
    [
        (milesial, "up5.conv.double_conv.7.weight", "milesial"),
        (mateuszbuda, "attention.weight", "mateuszbuda"),
        (lambda: fepegar(levels=2), "encoder.encoding_blocks.0.conv_residual.conv_layer.weight", "fepegar"),
        (lambda: monai(upsample="nontrainable"), None, "monai"),
        (lambda: monai(act="prelu"), None, "monai"),
        (leejunhyun, "Att5.W_g.0.weight", "leejunhyun"),
        (nested, "conv0_1.conv1.weight", "4uiiurz1"),
    ],
)
def test_relatives_of_a_family_are_refused_and_the_nearest_is_named(build, extra, nearest):
    state = build().state_dict()
    if extra:
        state[extra] = torch.zeros(4, 4, 3, 3)
    with pytest.raises(ValueError, match=f"of no known family.*the nearest, {nearest}, has no '"):
        convert(state)


def test_networks_unlike_any_family_are_sent_to_their_own_library_and_none_is_called_near():
    from monai.networks.nets import DynUNet, UNet as ResidualUNet
    from segmentation_models_pytorch import Unet as UNetOfResNet

    residual = ResidualUNet(2, 3, 1, channels=(2, 4), strides=(2,), num_res_units=1)
    like_nnunet = DynUNet(2, 3, 1, kernel_size=[3, 3, 3], strides=[1, 2, 2], upsample_kernel_size=[2, 2], filters=[2, 4, 8])
    for network in (UNetOfResNet("resnet18", encoder_weights=None), residual, like_nnunet):
        with pytest.raises(ValueError, match=r"none has any of its keys: '.*; networks with pretrained .* own library$"):
            convert(network.state_dict())


@pytest.mark.parametrize(
    "key", ["downs.0.conv.2.weight", "ups.0.conv.0.weight", "ups.1.weight", "xdowns.0.conv.0.weight", "final_conv", 7]
)
def test_keys_that_are_nearly_the_studys_are_refused(key):
    with pytest.raises(ValueError, match="no known family"):
        convert({**STATE, key: torch.zeros(1)})


def test_entries_that_are_no_tensors_are_refused():
    with pytest.raises(ValueError, match="the nearest, study, has no 'epoch'"):
        convert({**STATE, "epoch": 3})


@pytest.mark.parametrize("checkpoint", [{}, {"state_dict": {}}, {"state_dict": 3}, {"model": {"net": {"epoch": 3}}}])
def test_a_checkpoint_without_tensors_is_refused(checkpoint):
    with pytest.raises(ValueError, match=r"expected a state dict, got a str; .* UNet\.from_pretrained reads a file"):
        convert("unet.pth")
    with pytest.raises(ValueError, match="holds no state dict"):
        convert(checkpoint)


@pytest.mark.parametrize(
    ("gone", "named"),
    [
        ("downs.0.conv.0.weight", "encoder.0.conv1.weight"),
        ("downs.1.conv.3.weight", "encoder.1.conv2.weight"),
        ("bottleneck.conv.3.weight", "bottleneck.conv2.weight"),
        ("ups.1.conv.0.weight", "decoder.0.conv.conv1.weight"),
        ("ups.2.weight", "decoder.1.upsample.weight"),
        ("final_conv.weight", "head.weight"),
    ],
)
def test_a_tensor_that_tells_the_network_must_be_there_and_have_four_dimensions(gone, named):
    state = {key: value for key, value in STATE.items() if key != gone}
    with pytest.raises(ValueError, match=f"lacks the 4-D tensor for {named}, so its network cannot be told$"):
        convert(state)
    with pytest.raises(ValueError, match=f"lacks the 4-D tensor for {named}, .*; the one it has is 1-D"):
        convert({**state, gone: torch.zeros(3)})


def test_a_network_in_three_dimensions_is_refused():
    from monai.networks.nets import BasicUNet

    with pytest.raises(ValueError, match="monai checkpoint is of a 3-D network; 3-D networks are not supported"):
        convert(BasicUNet(spatial_dims=3, features=(2, 2, 4, 4, 8, 2)).state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"downs.0.conv.1.bias": None}, r"encoder\.0\.norm1\.bias is missing$"),
        ({"downs.0.conv.0.bias": torch.zeros(4)}, r"encoder\.0\.conv1\.bias has no place$"),
        ({"downs.1.conv.0.weight": torch.zeros(8, 5, 3, 3)}, r"conv1\.weight has shape \(8, 5, 3, 3\), not \(8, 4, 3, 3\)$"),
        ({"final_conv.weight": torch.zeros(1, 4, 3, 3)}, r"head\.weight has shape \(1, 4, 3, 3\), not \(1, 4, 1, 1\)$"),
        ({f"ups.0.{n}": torch.zeros(1) for n in "abcde"}, r"'?decoder\.0\.upsample\.a has no place; .*; and 2 more$"),
    ],
)
def test_loading_is_strict(change, message):
    state = {key: value for key, value in {**STATE, **change}.items() if value is not None}
    with pytest.raises(ValueError, match=f"the study checkpoint does not make a network: .*{message}"):
        convert(state)


def test_an_empty_tensor_makes_no_network():
    state = {**STATE, "final_conv.weight": torch.zeros(0, 4, 1, 1)}
    with pytest.raises(
        ValueError, match="the study checkpoint tells no network: out_channels must be a positive integer, got 0"
    ):
        convert(state)


def test_a_tensor_that_is_not_a_number_is_not_taken_for_a_disagreement():
    state = {**STATE, "final_conv.bias": torch.full((1,), torch.nan)}
    assert convert(state).state_dict["head.bias"].isnan()


def test_tensors_under_two_names_must_agree():
    state = {key: value.clone() for key, value in fepegar(levels=2).state_dict().items()}
    convert(state)
    key = "bottom_block.conv1.block.0.weight"
    for other in (state[key] + 1, state[key].double(), torch.zeros(1)):
        with pytest.raises(ValueError, match=r"fepegar checkpoint holds bottom_block\.conv1\.\S+ under another name too"):
            convert({**state, key: other})


@pytest.mark.parametrize(
    ("build", "told"),
    [
        (lambda: monai(norm="instance"), {"norm": "instance", "affine": False}),
        (lambda: monai(norm=None), {"norm": "none"}),
        (lambda: fepegar(norm=nn.InstanceNorm2d), {"norm": "instance", "affine": False}),
    ],
)
def test_a_norm_without_tensors_must_be_told(build, told):
    state = randomize(build()).state_dict()
    with pytest.raises(ValueError, match=r"has no tensors of norm batch or .*if you know its norm, tell it"):
        convert(state)
    assert convert(state, **told).config.norm == told["norm"]


def test_a_norm_that_the_family_does_not_have_must_be_told():
    state = {key: value for key, value in milesial().state_dict().items() if "running" not in key and "num_" not in key}
    with pytest.raises(ValueError, match="milesial checkpoint has no tensors of norm batch; if you know its norm, tell it"):
        convert(state)
    assert convert(state, norm="instance").config.norm == "instance"


def test_upsampling_without_weights_must_be_told():
    state = fepegar(upsampling="nearest").state_dict()
    with pytest.raises(ValueError, match="fepegar checkpoint has no weights for upsampling; if you know how it upsamples"):
        convert(state)


@pytest.mark.parametrize(
    ("build", "told"),
    [(lambda: monai(norm=None), {"norm": "none"}), (lambda: fepegar(upsampling="nearest"), {"upsample": "nearest"})],
)
def test_what_to_type_for_what_a_file_does_not_tell_reads_it(tmp_path, build, told):
    path = tmp_path / "unet.pt"
    torch.save(build().state_dict(), path)
    with pytest.raises(ValueError, match="tell it: ") as error:
        UNet.from_pretrained(path)
    advice = re.findall(r"tell it: (convert\(.*?\)),? or ", str(error.value))[0]
    assert eval(advice, {"convert": convert, "torch": torch}).config == convert(torch.load(path), **told).config


def test_an_option_that_does_not_fit_the_tensors_is_refused():
    with pytest.raises(ValueError, match=r"tells no network: decoder_features must hold 3 widths, .* got \(4, 8\)"):
        convert(STATE, features=(4, 8, 16))
    with pytest.raises(ValueError, match=r"does not make a network: .*upsample\.weight has no place"):
        convert(STATE, upsample="bilinear", up_features=(8, 16))
    with pytest.raises(ValueError, match=r"tells no network: UNetConfig does not know \['colour'\]"):
        convert(STATE, colour="red")


def test_a_level_number_out_of_line_is_refused_at_once():
    state = dict(STATE)
    state["downs.999999999999.conv.3.weight"] = state.pop("downs.1.conv.3.weight")
    with pytest.raises(ValueError, match=r"the nearest, study, has no 'downs\.999999999999\.conv\.3\.weight'"):
        convert(state)


def test_keys_of_different_depths_are_refused():
    state = milesial().state_dict()
    state["down9.maxpool_conv.1.double_conv.0.weight"] = state.pop("down4.maxpool_conv.1.double_conv.0.weight")
    with pytest.raises(ValueError, match=r"the milesial checkpoint lacks the 4-D tensor for bottleneck\.conv2\.weight"):
        convert(state)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda model: model.state_dict(),
        lambda model: nn.DataParallel(model).state_dict(),
        lambda model: {"epoch": 3, "model": {"state_dict": torch.compile(model).state_dict()}},
        lambda model: {"ema": AveragedModel(nn.DataParallel(model)).state_dict()},
        lambda model: {"state_dict": nn.ModuleDict({"model": model, "loss_fn": DiceLoss(weight=[2])}).state_dict()},
        lambda model: nn.DataParallel(nn.ModuleDict({"segmenter": model, "head": nn.Linear(2, 1)})).state_dict(),
    ],
)
def test_a_state_dict_of_unetlibs_own_is_pointed_to_load_state_dict(wrap):
    model = randomize(UNet(features=(4, 8)))
    checkpoint, twin = wrap(model), UNet(features=(4, 8))
    with pytest.raises(ValueError, match="looks like a unetlib UNet's, without its config: build that network") as refused:
        convert(checkpoint)
    advice = re.findall(r"model\.load_state_dict\((.*)\) and model\.save_pretrained", str(refused.value))[0]
    twin.load_state_dict(eval(advice, {"checkpoint": checkpoint}))  # the advice can be followed
    assert all(torch.equal(tensor, twin.state_dict()[name]) for name, tensor in model.state_dict().items())


# --- the tables


@pytest.mark.parametrize("wrap", [lambda state: state, lambda state: {"state_dict": prefixed("module.", state=state)}])
def test_a_training_module_with_more_than_the_network_is_told_what_to_call(wrap):
    checkpoint = wrap({**prefixed("model."), "criterion.pos_weight": torch.ones(1)})
    with pytest.raises(
        ValueError, match=r"'criterion\.pos_weight' are not under 'model\.': call convert on the rest, "
    ) as error:
        convert(checkpoint)
    rest = eval(str(error.value).partition("on the rest, ")[2], {"checkpoint": checkpoint})
    assert convert(rest).config == UNetConfig(features=(4, 8))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
@pytest.mark.parametrize("depth", [1, 2, 4, 11])
def test_a_table_names_each_layer_of_each_block_and_no_two_alike(family, depth):
    blocks = ["bottleneck", *(f"encoder.{level}" for level in range(depth)), *(f"decoder.{step}.conv" for step in range(depth))]
    ours = {"head", *(f"{block}.{layer}" for block in blocks for layer in family.layers)}
    ours |= {f"decoder.{step}.upsample{part}" for step in range(depth) for part in family.upsample}
    names = len(ours) * (2 if family.name == "fepegar" else 1) - (depth if family.name == "fepegar" else 0)
    modules = family.modules(depth)
    assert set(modules.values()) == ours
    assert len(modules) == names  # fepegar's layers have two names each, its upsampling one


# --- export


def test_a_default_network_exports_to_the_study():
    model = randomize(UNet(features=(4, 8)))
    study = StudyUNet(features=(4, 8)).eval()
    study.load_state_dict(export_state_dict(model, "study"))
    for size in [(16, 24), (17, 23)]:
        x = torch.randn(2, 3, *size)
        assert torch.equal(study(x), model(x))


def test_any_size_is_kept_unless_given_up():
    model = randomize(UNet(out_channels=2, features=(4, 8, 16, 32)))
    with pytest.raises(
        ValueError, match=r"cannot express this network: it has match='resize' \(there 'zeros'\); .*multiples of 16"
    ):
        export_state_dict(model, "milesial")
    peer = milesial().eval()
    peer.load_state_dict(export_state_dict(model, "milesial", any_size=False))
    x = torch.randn(1, 3, 32, 48)
    assert torch.equal(peer(x), model(x))
    x = torch.randn(1, 3, 33, 48)
    assert not torch.equal(peer(x), model(x))


def test_a_network_exports_to_a_family_that_takes_no_odd_sizes():
    model = randomize(UNet(out_channels=1, features=(4, 8, 16, 32), skip_first=False))
    peer = mateuszbuda().eval()
    peer.load_state_dict(export_state_dict(model, "mateuszbuda"))
    x = torch.randn(1, 3, 32, 48)
    assert torch.equal(peer(x), model(x).sigmoid())


def test_exported_tensors_are_the_models_own_detached():
    model = UNet(features=(4, 8), dropout=0.5)  # dropout has no tensors, and does nothing in evaluation
    state = export_state_dict(model, "study")
    assert state["final_conv.weight"].data_ptr() == model.head.weight.data_ptr()
    assert not any(tensor.requires_grad for tensor in state.values())


@pytest.mark.parametrize(
    ("options", "family", "message"),
    [
        (
            {"norm": "group"},
            "milesial",
            "cannot express this network: it has norm='group' and upsample='transpose', the family",
        ),
        ({"norm": "instance"}, "study", "cannot express this network: it has norm='instance'"),
        ({"norm": "none"}, "study", "cannot express this network: it has norm='none'"),
        (
            {"upsample": "bilinear"},
            "study",
            "has norm='batch' and upsample='bilinear', the family norm batch and upsample transpose$",
        ),
        ({"upsample": "nearest_conv"}, "milesial", "milesial has no place for 'decoder.0.upsample.conv.weight'"),
        ({"upsample": "bilinear", "match": "zeros"}, "milesial", r"it has align_corners=False \(there True\)$"),
        ({"activation": "elu"}, "study", r"it has activation='elu' \(there 'relu'\)$"),
        ({"skip_first": False}, "study", r"it has skip_first=False \(there True\)$"),
        ({}, "mateuszbuda", r"it has skip_first=True \(there False\)$"),
        ({}, "usuyama", "usuyama has no place for 'encoder.0.norm1.weight', 'encoder.0.norm1.bias', "),
        ({"norm": "none", "skip_first": False}, "usuyama", "usuyama has no place for 'decoder.0.upsample.weight'"),
        ({}, "torchvision", "no family is called 'torchvision'; known are study, milesial, "),
    ],
)
def test_what_a_family_cannot_express_is_one_error(options, family, message):
    with pytest.raises(ValueError, match=message):
        export_state_dict(UNet(features=(4, 8), **options), family)


@pytest.mark.parametrize("norm", ["batch", "instance", "none"])
def test_what_a_constructor_leaves_open_exports(norm):
    model = UNet(features=(4, 8), norm=norm, conv_bias=True, activation="silu", match="replicate")
    state = export_state_dict(model, "monai")
    assert convert(state, norm=norm, activation="silu").config == model.config


def test_a_family_that_takes_no_odd_sizes_leaves_their_match_open():
    model = UNet.from_config(replace(convert(leejunhyun().state_dict()).config, match="zeros"))
    leejunhyun().load_state_dict(export_state_dict(model, "leejunhyun"))


def test_an_exports_widths_may_be_any():
    config = UNetConfig(
        features=(4, 6, 8), bottleneck=10, decoder_features=(2, 4, 6), mid_features=(3, 5, 7), up_features=(9, 8, 7)
    )
    model = randomize(UNet.from_config(replace(config, match="zeros")))
    found = convert(export_state_dict(model, "milesial"))
    assert found.config == model.config
    x = torch.randn(1, 3, 21, 18)
    assert torch.equal(found.to_model()(x), model(x))


def test_a_wrapped_network_is_not_exported():
    for wrapper in (nn.DataParallel, torch.compile):
        with pytest.raises(TypeError, match=r"expected a UNet, .* take it out of its wrapper"):
            export_state_dict(wrapper(UNet(features=(4,))), "study")
