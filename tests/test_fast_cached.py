from __future__ import annotations

import copy
import gc

import numpy as np
import pytest
import torch
from torch import nn

from unetlib import UNet
from unetlib.fast import cached
from unetlib.fast.cached import fast_copy, free_memory
from unetlib.inference import optimize_for_inference, predict


def model() -> UNet:
    torch.manual_seed(0)
    return UNet(features=(4, 8)).eval()


def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (40, 56, 3), np.uint8)


def probabilities(network: nn.Module) -> np.ndarray:
    return predict(network, picture(), probabilities=True)


def test_the_copy_is_kept_and_goes_with_the_network():
    network = model()
    assert fast_copy(network) is fast_copy(network)
    assert network in cached._copies
    count = len(cached._copies)
    del network
    gc.collect()
    assert len(cached._copies) == count - 1


def step(network):
    torch.optim.SGD(network.parameters(), lr=1.0).step()


def load(network):
    network.load_state_dict({name: tensor + 1 for name, tensor in network.state_dict().items()})


def statistics(network):
    network.train()(torch.rand(2, 3, 16, 16))
    network.eval()


def through_data(network):
    network.decoder[0].conv.conv2.weight.data[1, 2, 0, 1] += 0.5


def other_tensor(network):
    network.head.weight = nn.Parameter(network.head.weight + 1)


@pytest.mark.parametrize("change", [step, load, statistics, through_data, other_tensor])
def test_predict_sees_every_change_of_weights(change):
    network = model()
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = probabilities(network)
    change(network)
    after = probabilities(network)
    assert not np.array_equal(before, after)
    with torch.inference_mode():
        expected = network(torch.from_numpy(picture()).permute(2, 0, 1)[None] / 255).sigmoid()[0, 0]
    np.testing.assert_allclose(after, expected, atol=1e-5)


def test_contents_differ_where_any_tensor_does():
    network = model()
    before = cached._contents(network)
    assert cached._contents(copy.deepcopy(network)) == before
    for tensor in (*network.parameters(), *network.buffers()):
        kept = tensor.detach().clone()
        tensor.data.view(-1)[-1] += 1
        assert cached._contents(network) != before
        tensor.data.copy_(kept)
    assert cached._contents(network) == before


class Louder(UNet):
    def forward(self, x):
        return 2 * super().forward(x)


def hooked(network):
    network.head.register_forward_hook(lambda module, inputs, output: 2 * output)


def replaced(network):
    network.head.forward = lambda x: 2 * nn.Conv2d.forward(network.head, x)


def wrapped(network):
    network.head = nn.Sequential(network.head, nn.Softplus())


@pytest.mark.parametrize("change", [hooked, replaced, wrapped])
def test_a_network_that_somebody_changed_is_run_as_it_is(change):
    network = model()
    before = probabilities(network)
    change(network)
    assert fast_copy(network) is None
    assert not np.array_equal(before, probabilities(network))


def test_a_subclass_is_run_as_it_is():
    torch.manual_seed(0)
    network = Louder(features=(4, 8)).eval()
    assert fast_copy(network) is None
    assert not np.allclose(probabilities(network), probabilities(model()))


def test_autocast_is_the_callers_wish():
    network = model()
    with torch.autocast("cpu", torch.bfloat16):
        assert fast_copy(network) is None
    assert fast_copy(network) is not None


def test_a_type_that_is_slow_here_is_run_as_it_is():
    if torch.ops.mkldnn._is_mkldnn_fp16_supported():
        pytest.skip("this CPU is fast in float16")
    assert fast_copy(model().half()) is None


def test_weights_made_in_inference_mode():
    with torch.inference_mode():
        network = model()
    assert fast_copy(network) is fast_copy(network)


def test_predict_takes_a_copy_made_by_hand():
    network = model()
    np.testing.assert_allclose(probabilities(optimize_for_inference(network)), probabilities(network), atol=1e-6)


def test_memory_for_maps_is_given_back_after_predict():
    network = model()
    fast = fast_copy(network)
    fast(torch.rand(1, 3, 40, 56))
    predict(network, picture())
    assert not fast._memory.pool._free
    free_memory(UNet(features=(2,)))  # without a copy there is nothing to do
