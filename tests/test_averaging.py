from __future__ import annotations

import copy

import pytest
import torch

from unetlib import UNet
from unetlib.averaging import follow


def test_the_average_follows_weights_and_statistics_and_takes_over_counts():
    model = UNet(features=(4, 8))
    average = copy.deepcopy(model)
    expected = {key: value.double() for key, value in average.state_dict().items()}
    for step in range(12):
        model(torch.rand(2, 3, 8, 8))  # moves the statistics of batch norm
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(torch.randn_like(weight))
        follow(average, model, 0.4, steps=step)
        kept = min(0.4, (1 + step) / (10 + step))  # 0.4 from the sixth step on
        for key, value in model.state_dict().items():
            expected[key] = kept * expected[key] + (1 - kept) * value if value.is_floating_point() else value.double()
    for key, value in average.state_dict().items():
        torch.testing.assert_close(value.double(), expected[key], rtol=1e-5, atol=1e-5)
    assert average.state_dict()["encoder.0.norm1.num_batches_tracked"] == 12


def test_a_weight_under_two_names_moves_once():
    model, average = (torch.nn.Sequential(layer, layer) for layer in (torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)))
    for network, weight in ((model, 1.0), (average, 0.0)):
        torch.nn.init.constant_(network[0].weight, weight)
    follow(average, model, 0.75, steps=1000)
    assert average[1].weight.item() == 0.25


@pytest.mark.parametrize(("decay", "steps"), [(1.0, 0), (-0.1, 0), (0.9, -1)])
def test_bad_numbers_are_named(decay, steps):
    model = UNet(features=(4,))
    with pytest.raises(ValueError, match=rf"decay={decay}, steps={steps}"):
        follow(copy.deepcopy(model), model, decay, steps=steps)
