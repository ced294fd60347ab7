from __future__ import annotations

import weakref

import pytest
import torch

from unetlib import UNet, symmetries as module
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
    assert len(views) == (8 if turns else 4)
    torch.testing.assert_close(found, torch.stack(views).mean(dim=0))
    assert not torch.allclose(found, views[0])


def test_four_views_at_a_time():
    seen = []
    average_symmetries(lambda batch: seen.append(tuple(batch.shape)) or batch[:, :1], torch.rand(2, 3, 5, 7))
    assert seen == [(8, 3, 5, 7), (8, 3, 7, 5)]


def test_the_networks_own_answers_are_let_go_before_their_probabilities(monkeypatch):
    given, held = [], []
    log_probabilities = module._log_probabilities

    def forward(views):
        logits = views[:, :2] * 3
        given.append(weakref.ref(logits))
        return logits

    def noted(*args):
        held.append(given[-1]() is not None)
        return log_probabilities(*args)

    monkeypatch.setattr(module, "_log_probabilities", noted)
    average_symmetries(forward, torch.rand(1, 3, 5, 7))
    assert held == [False, False]


def test_sure_answers_stay_finite():
    batch = torch.full((1, 1, 4, 4), 200.0)
    assert torch.allclose(average_symmetries(lambda views: views, batch), batch)
    assert torch.allclose(average_symmetries(lambda views: -views, batch), -batch)
