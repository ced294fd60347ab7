from __future__ import annotations

import math
from collections import UserList

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from unetlib import UNet
from unetlib.arguments import at_least, check_device, check_options, check_unet, height_and_width, needed, rising, whole


def test_what_fits_is_given_back():
    assert whole("seed", np.int64(3), 0) == 3
    assert height_and_width([np.int32(4), 6]) == (4, 6)
    assert rising("crop", [0.5, 1], 0, 1) == (0.5, 1)
    assert (rising("crop", UserList([0.5, 1]), 0, 1), height_and_width(UserList([4, 6]))) == ((0.5, 1), (4, 6))
    at_least("noise", 0.0, 0)
    at_least("budget", math.inf, 0, endless=True)
    for one in (1, np.float32(1), np.array(1.0), torch.tensor(1.0)):
        at_least("p", one, 0, 1)
    assert needed("math", "a plot", "examples") is math


def test_a_unet_is_told_from_what_wraps_it():
    model = UNet(features=(4,))
    check_unet(model)
    for wrapped, place in (
        (nn.DataParallel(model), "module"),
        (AveragedModel(model), "module"),
        (torch.compile(model), "_orig_mod"),
    ):
        with pytest.raises(
            TypeError, match=rf"expected a UNet, got an? \w+; take it out of its wrapper, as in model\.{place}$"
        ):
            check_unet(wrapped)
    with pytest.raises(TypeError, match=r"expected a UNet, got a dict$"):
        check_unet({})
    for name in ("UNet", "Unet"):
        another = type(name, (nn.Module,), {"__module__": "monai.networks.nets.unet"})
        with pytest.raises(TypeError, match=rf"expected a UNet, got a {name} of monai$"):
            check_unet(another())


def test_devices_are_there_or_named(monkeypatch):
    for name in ("cpu", "meta"):
        check_device(name)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_device("cuda")
    check_device("cuda:1")
    for name in ("cuda:5", "mps"):
        check_device(name, here=False)
    for name in ("cuda:2", "gpu", "cuda:x"):
        with pytest.raises(ValueError, match=f"device {name} is not to be had here; give cpu"):
            check_device(name)


@pytest.mark.parametrize(
    ("check", "error", "message"),
    [
        (lambda: whole("seed", 1.0, 0), TypeError, "seed=1.0 must be an integer, such as seed=0"),
        (lambda: whole("seed", True, 0), TypeError, "seed=True must be an integer, such as seed=0"),
        (lambda: whole("seed", -1, 0), ValueError, "seed=-1 must be 0 or more"),
        (lambda: whole("view", 17, 1, 16), ValueError, "view=17 must be from 1 to 16"),
        (lambda: height_and_width(64), TypeError, r"size=64 must be a pair \(height, width\)"),
        (lambda: height_and_width((4, 5, 6), "min_size"), TypeError, r"min_size=\(4, 5, 6\) must be a pair"),
        (lambda: height_and_width((4, 0)), ValueError, "size=0 must be 1 or more"),
        (
            lambda: rising("crop", (0, 1), 0, 1),
            ValueError,
            r"crop must be \(least, largest\), 0 < least <= largest <= 1, not \(0, 1\)",
        ),
        (lambda: rising("scale", (2, 1), 0), ValueError, r"0 < least <= largest < inf, not \(2, 1\)"),
        (lambda: rising("scale", 1.5, 0), ValueError, "not 1.5"),
        (lambda: rising("scale", ("1", "2"), 0), ValueError, r"not \('1', '2'\)"),
        (lambda: at_least("smooth", "1e-5", 0), ValueError, "smooth must be 0 or more, not '1e-5'"),
        (lambda: at_least("rotation", (-10, 10), 0), ValueError, r"rotation must be 0 or more, not \(-10, 10\)"),
        (lambda: at_least("noise", np.zeros(2), 0), ValueError, r"noise must be 0 or more, not array\(\[0"),
        (lambda: rising("scale", (1, torch.ones(2)), 0), ValueError, r"not \(1, tensor"),
        (lambda: at_least("noise", -0.1, 0), ValueError, "noise must be 0 or more, not -0.1"),
        (lambda: at_least("p", 2, 0, 1), ValueError, "p must be from 0 to 1, not 2"),
        (lambda: at_least("noise", math.nan, 0), ValueError, "not nan"),
        (lambda: at_least("noise", math.inf, 0), ValueError, "noise must be finite, not inf"),
        (lambda: rising("scale", (1, math.inf), 0), ValueError, r"0 < least <= largest < inf, not \(1, inf\)"),
        (lambda: check_options("UNet", {"d": 1, "a": 2, "c": 3}, iter("ab")), TypeError, "no option c, d; it has a, b$"),
        (
            lambda: needed("nowhere.at_all", "a plot", "examples"),
            ImportError,
            r"^nowhere is not installed; a plot needs it: pip install 'unetlib\[examples\]'$",
        ),
    ],
)
def test_what_does_not_is_named(check, error, message):
    with pytest.raises(error, match=message):
        check()
