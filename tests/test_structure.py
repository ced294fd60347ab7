from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import nn

from unetlib import UNet
from unetlib.structure import changed_module, difference, parts_of


@pytest.fixture
def model():
    return UNet(features=(4, 8))


def test_a_network_differs_from_none_of_its_config(model):
    assert difference(model) is None
    assert difference(nn.SyncBatchNorm.convert_sync_batchnorm(model).double()) is None
    assert changed_module(copy.deepcopy(model), parts_of(model)) is None
    model.encoder[0].norm1.momentum, model.encoder[0].act1.inplace = 0.5, False
    assert difference(model.eval()) is None


def test_networks_of_other_configs_differ_where_they_are_built_otherwise(model):
    deeper, narrower = UNet(features=(4, 8, 8)).encoder, UNet(features=(2, 8)).encoder
    assert "'0.conv1'" in changed_module(model.encoder, parts_of(narrower))
    assert "'2'" in changed_module(deeper, parts_of(model.encoder))
    assert "'2'" in changed_module(model.encoder, parts_of(deeper))


class Noted(nn.Conv2d):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.note = torch.zeros(2)


def test_what_modules_of_others_keep_is_not_looked_at():
    first, second = nn.Sequential(Noted(3, 4, 1)), nn.Sequential(Noted(3, 4, 1))
    second[0].note += 1
    assert changed_module(first, parts_of(second)) is None
    second = nn.Sequential(Noted(3, 4, 3))
    assert "'0'" in changed_module(first, parts_of(second))


def test_hooks_and_a_forward_of_its_own_are_a_difference(model):
    model.head.register_forward_hook(lambda *_: None)
    assert difference(model) == "its module 'head' has hooks, or a forward of its own"
    before = UNet(features=(4,))
    before.bottleneck.register_forward_pre_hook(lambda *_: None)
    assert difference(before) == "its module 'bottleneck' has hooks, or a forward of its own"
    for register in (nn.modules.module.register_module_forward_hook, nn.modules.module.register_module_forward_pre_hook):
        handle = register(lambda *_: None)
        assert difference(UNet(features=(4,))) == "there are hooks for all modules"
        handle.remove()

    class Other(UNet):
        def forward(self, x):
            return -super().forward(x)

    assert difference(Other(features=(4,))) == "Other has a forward of its own"


@pytest.mark.parametrize(("kind", "method"), [(nn.ReLU, "forward"), (nn.Conv2d, "_conv_forward"), (UNet, "forward")])
def test_what_was_put_into_a_class_is_a_difference(model, monkeypatch, kind, method):
    original = getattr(kind, method)
    monkeypatch.setattr(kind, method, functools.wraps(original)(lambda *args: 2 * original(*args)))
    assert difference(model) == f"the class {kind.__name__} has a forward that was put into it"
