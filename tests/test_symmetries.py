from __future__ import annotations

import weakref

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from unetlib import UNet
from unetlib.symmetries import average_symmetries


def symmetries(turns: bool):
    """Each as a function there and one back, from quarter turns and a mirror instead of flips and a transposition."""
    for quarter in range(4) if turns else (0, 2):
        for mirror in (False, True):

            def there(x, quarter=quarter, mirror=mirror):
                return torch.rot90(x.flip(-1) if mirror else x, quarter, (-2, -1))

            def back(x, quarter=quarter, mirror=mirror):
                x = torch.rot90(x, -quarter, (-2, -1))
                return x.flip(-1) if mirror else x

            yield there, back


@pytest.mark.parametrize("turns", [True, False])
@pytest.mark.parametrize(("channels", "multilabel"), [(1, False), (3, False), (3, True)])
@pytest.mark.parametrize("size", [(16, 16), (17, 22), (13, 9)])
def test_the_mean_probability_of_all_views(turns, channels, multilabel, size):
    torch.manual_seed(0)
    model = UNet(features=(4, 8), out_channels=channels).double().eval()
    batch = torch.rand(2, 3, *size, dtype=torch.float64)

    def probabilities(logits):
        return logits.sigmoid() if channels == 1 or multilabel else logits.softmax(dim=1)

    with torch.no_grad():
        views = [back(probabilities(model(there(batch)))) for there, back in symmetries(turns)]
        found = probabilities(average_symmetries(model, batch, turns=turns, multilabel=multilabel))
        if not multilabel:
            assert torch.equal(found, probabilities(average_symmetries(model, batch, turns=turns)))
    assert len(views) == (8 if turns else 4)
    torch.testing.assert_close(found, torch.stack(views).mean(dim=0))
    assert not torch.allclose(found, views[0])


def test_four_views_at_a_time():
    seen = []
    average_symmetries(lambda batch: seen.append(tuple(batch.shape)) or batch[:, :1], torch.rand(2, 3, 5, 7))
    assert seen == [(8, 3, 5, 7), (8, 3, 7, 5)]


class LargestMade(TorchDispatchMode):
    """The most bytes that a tensor of any operation lies in."""

    size = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        made = operation(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            self.size = max(self.size, made.untyped_storage().nbytes())
        return made


@pytest.mark.parametrize(("multilabel", "largest"), [(False, 1), (True, 2)])
def test_of_many_classes_one_view_is_turned_back_at_a_time(multilabel, largest):
    batch, given, held = torch.rand(1, 3, 8, 8), [], []

    def forward(views):
        held.extend(memory() is not None for memory in given)
        memory = np.zeros(1, np.float32)
        given.append(weakref.ref(memory))
        return torch.from_numpy(memory).expand(len(views), 50, 8, 8)

    with LargestMade() as made:
        average_symmetries(forward, batch, multilabel=multilabel)
    assert made.size == largest * 50 * 8 * 8 * 4
    assert held == [False]  # the first pass's, in the second


def test_sure_answers_stay_finite():
    batch = torch.full((1, 1, 4, 4), 200.0)
    assert torch.allclose(average_symmetries(lambda views: views, batch), batch)
    assert torch.allclose(average_symmetries(lambda views: -views, batch), -batch)
