from __future__ import annotations

import pytest
import torch
from pretended_mps import OnMps
from test_fast import trained
from torch import nn

from unetlib import DoubleConv
from unetlib.fast.folding import Parts, layers


def test_folded_weights_are_the_formula():
    block = trained().encoder[0]
    folded, norm = layers(block)[0], block.norm1
    for channel in range(8):
        scale = float(norm.weight[channel]) / (float(norm.running_var[channel]) + norm.eps) ** 0.5
        torch.testing.assert_close(folded.weight[channel], block.conv1.weight[channel] * scale, rtol=1e-6, atol=1e-6)
        shift = float(norm.bias[channel]) - float(norm.running_mean[channel]) * scale
        assert float(folded.bias[channel]) == pytest.approx(shift, rel=1e-5, abs=1e-6)


def test_what_is_on_mps_is_folded_on_the_cpu():
    block = DoubleConv(3, 8)
    expected = layers(block)[0]
    for module in (block.conv1, block.norm1):
        for name, value in [*module.named_parameters(), *module.named_buffers()]:
            delattr(module, name)
            setattr(module, name, value.detach().as_subclass(OnMps))
    folded = layers(nn.Sequential(block.conv1, block.norm1))[0]
    assert torch.equal(folded.weight.cpu(), expected.weight)
    assert torch.equal(folded.bias.cpu(), expected.bias)


def test_what_cannot_be_folded_is_left():
    first, second = layers(DoubleConv(3, 8, norm="group", activation="silu"))
    assert [type(module) for module in first.after] == [nn.GroupNorm, nn.SiLU]
    assert not second.relu
    assert layers(DoubleConv(3, 8))[0].relu
    assert not layers(DoubleConv(3, 8, activation="silu"))[0].relu
    assert layers(nn.Sequential(nn.Conv2d(1, 8, 3)))[0].after == ()


def test_parts_are_a_copy():
    model = trained()
    parts = Parts.of(model.encoder[0], model.decoder[-1])
    before = parts.convs[0].weight.clone()
    with torch.no_grad():
        model.encoder[0].conv1.weight.zero_()
    assert torch.equal(parts.convs[0].weight, before)
    assert parts.width == 8
