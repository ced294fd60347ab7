from __future__ import annotations

import copy
import dataclasses
import gc
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from unetlib import UNet
from unetlib.fast import cached, network as fast_network, pool
from unetlib.fast.cached import fast_copy, free_memory
from unetlib.fast.pool import Pool
from unetlib.inference import optimize_for_inference, predict
from unetlib.structure import difference


def model() -> UNet:
    torch.manual_seed(0)
    return UNet(features=(4, 8)).eval()


def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (40, 56, 3), np.uint8)


def probabilities(network: nn.Module) -> np.ndarray:
    return predict(network, picture(), probabilities=True)


@torch.inference_mode()
def by_hand(network: nn.Module) -> np.ndarray:
    """What the network itself says."""
    return network(torch.from_numpy(picture()).permute(2, 0, 1)[None] / 255).sigmoid()[0, 0].numpy()


def test_the_copy_is_kept_and_goes_with_the_network():
    network = model()
    gc.collect()  # networks of other tests that lie in cycles
    assert fast_copy(network) is fast_copy(network)
    assert network in cached._copies
    count = len(cached._copies)
    del network
    gc.collect()
    assert len(cached._copies) == count - 1


def test_a_change_that_counters_show_is_seen_without_a_closer_look():
    network = model()
    before = fast_copy(network)
    with torch.no_grad():
        network.head.bias.add_(1)
    assert fast_copy(network) is not before


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


def other_order_of_inputs(network):
    weight = network.encoder[0].conv1.weight
    weight.data.copy_(weight.data[:, [2, 1, 0]])


def other_order_of_outputs(network):
    weight = network.encoder[0].conv1.weight
    weight.data.copy_(weight.data.flip(0))


def other_order_of_biases(network):
    bias = network.decoder[0].upsample.bias
    bias.data.copy_(bias.data.flip(0))


@pytest.mark.parametrize(
    "change",
    [
        step,
        load,
        statistics,
        through_data,
        other_tensor,
        other_order_of_inputs,
        other_order_of_outputs,
        other_order_of_biases,
    ],
)
def test_predict_sees_every_change_of_weights(change):
    network = model()
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = probabilities(network)
    change(network)
    after = probabilities(network)
    assert not np.array_equal(before, after)
    np.testing.assert_allclose(after, by_hand(network), atol=1e-5)


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


def test_contents_differ_where_parts_of_a_large_tensor_change_places():
    network = model()
    network.head.weight = nn.Parameter(torch.randn(1, 8, 63, 65))  # 4 rows of the checksum, and of whole ones no rest
    weights = network.head.weight.data.view(4, -1)
    found = {cached._contents(network)}
    for order in ([1, 0, 2, 3], [0, 1, 3, 2]):
        weights.copy_(weights[order])
        found.add(cached._contents(network))
    weights.copy_(weights.roll(2, dims=1))
    found.add(cached._contents(network))
    weights[0, [0, 5]] = weights[0, [5, 0]]
    found.add(cached._contents(network))
    weights[[0, 3], 7] = weights[[3, 0], 7]
    found.add(cached._contents(network))
    assert len(found) == 6


@pytest.mark.parametrize(("dtype", "every"), [(torch.float64, 1), (torch.float32, 2)])
def test_contents_differ_where_the_highest_bits_of_all_words_do(dtype, every):
    """Twice the highest bit is 0 in sums of words."""
    network = UNet(features=(32, 64)).to(dtype)
    before = cached._contents(network)
    network.bottleneck.conv2.weight.data.view(-1)[every - 1 :: every].neg_()
    assert cached._contents(network) != before


def test_contents_are_read_wherever_in_memory_weights_begin():
    network, weights = model(), torch.randn(2**14 + 1)
    network.head.weight = nn.Parameter(weights[1:].view(1, 4, 64, 64))  # four bytes off a multiple of eight
    other = copy.deepcopy(network)
    other.head.weight = nn.Parameter(weights[1:].clone().view(1, 4, 64, 64))
    assert cached._contents(network) == cached._contents(other)


class Louder(UNet):
    def forward(self, x):
        return 2 * super().forward(x)


def hooked(network):
    network.head.register_forward_hook(lambda module, inputs, output: 2 * output)


def replaced(network):
    network.head.forward = lambda x: 2 * nn.Conv2d.forward(network.head, x)


def another_padding(network):
    """A recipe for seamless textures."""

    def circular(self, x, weight, bias):
        return nn.functional.conv2d(nn.functional.pad(x, (1, 1, 1, 1), mode="circular"), weight, bias)

    conv = network.encoder[0].conv2
    conv._conv_forward = circular.__get__(conv)


def wrapped(network):
    network.head = nn.Sequential(network.head, nn.Softplus())


def set_in(path, **settings):
    """A change of a module's settings."""

    def change(network):
        for name, value in settings.items():
            setattr(network.get_submodule(path), name, value)

    return change


def padding_mode(network):
    network.encoder[0].conv1 = nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect", bias=False)


def dilation(network):
    set_in("encoder.0.conv2", dilation=(2, 2), padding=(2, 2))(network)


def larger_kernel(network):
    network.decoder[0].upsample = nn.ConvTranspose2d(16, 8, kernel_size=4, stride=2, padding=1)


def activation(network):
    network.encoder[0].act1 = nn.ELU()


def no_statistics(network):
    network.bottleneck.norm1 = nn.BatchNorm2d(16, track_running_stats=False).eval()


def no_affine(network):
    network.encoder[0].norm1 = nn.BatchNorm2d(4, affine=False).eval()
    network.encoder[0].norm1.running_mean.fill_(0.1)


def another_order(network):
    block = network.encoder[0]
    block.act1 = block._modules.pop("act1")


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    "change",
    [
        hooked,
        replaced,
        another_padding,
        wrapped,
        padding_mode,
        dilation,
        larger_kernel,
        activation,
        no_statistics,
        no_affine,
        another_order,
        set_in("encoder.0.norm2", eps=10.0),
        set_in("decoder.1", skip_first=False),
    ],
)
def test_a_network_that_somebody_changed_is_run_as_it_is(change, first):
    network, before = model(), probabilities(model())
    if first:
        probabilities(network)
    change(network)
    assert fast_copy(network) is None
    found = probabilities(network)
    assert not np.allclose(before, found, atol=1e-5)
    np.testing.assert_allclose(found, by_hand(network), atol=1e-6)
    with pytest.raises(ValueError, match=r"would compute something else: its module '.*' .*; .*predict runs it as it is"):
        optimize_for_inference(network)


@pytest.mark.parametrize(("upsample", "name", "value"), [("bilinear", "align_corners", True), ("nearest", "mode", "bicubic")])
def test_settings_that_are_not_printed_count(upsample, name, value):
    torch.manual_seed(0)
    network = UNet(features=(4, 8), upsample=upsample).eval()
    probabilities(network)
    set_in("decoder.1.upsample", **{name: value})(network)
    np.testing.assert_allclose(probabilities(network), by_hand(network), atol=1e-6)


def test_a_copy_follows_the_config():
    network = model()
    probabilities(network)
    network.config = dataclasses.replace(network.config, match="zeros", skip_first=False)
    for up in network.decoder:
        up.match, up.skip_first = "zeros", False
    assert fast_copy(network) is not None
    np.testing.assert_allclose(probabilities(network), by_hand(network), atol=1e-5)


def test_what_is_idle_in_evaluation_mode_does_not_count():
    network = nn.SyncBatchNorm.convert_sync_batchnorm(UNet(features=(4, 8), dropout=0.5)).eval()
    for module in network.modules():
        if isinstance(module, nn.SyncBatchNorm):
            module.momentum = 0.01
        if isinstance(module, nn.Dropout2d):
            module.p = 0.1
    assert fast_copy(network) is not None
    np.testing.assert_allclose(probabilities(network), by_hand(network), atol=1e-5)


def test_what_has_been_pruned_or_normed_and_is_made_plain_again_has_a_copy():
    network = model()
    conv = network.encoder[1].conv1
    for make, remove in (
        (lambda: prune.l1_unstructured(conv, "weight", 0.5), lambda: prune.remove(conv, "weight")),
        (lambda: parametrizations.weight_norm(conv), lambda: parametrize.remove_parametrizations(conv, "weight")),
        (lambda: nn.utils.spectral_norm(conv), lambda: nn.utils.remove_spectral_norm(conv)),
    ):
        make()
        assert fast_copy(network) is None
        remove()
        assert fast_copy(network) is not None
        np.testing.assert_allclose(probabilities(network), by_hand(network), atol=1e-5)


def test_looking_draws_no_random_numbers():
    network = UNet(features=(5, 3))  # of a config that no other test has
    before = torch.get_rng_state()
    assert difference(network) is None
    assert torch.equal(torch.get_rng_state(), before)


def test_a_subclass_is_run_as_it_is():
    torch.manual_seed(0)
    network = Louder(features=(4, 8)).eval()
    assert fast_copy(network) is None
    assert not np.allclose(probabilities(network), probabilities(model()))
    with pytest.raises(ValueError, match="something else: Louder has a forward of its own"):
        optimize_for_inference(network)


class Named(UNet):
    """A subclass that adds what does not change the logits."""

    name = "mine"


def test_a_subclass_without_a_forward_of_its_own_has_a_copy():
    torch.manual_seed(0)
    network = Named(features=(4, 8)).eval()
    assert fast_copy(network) is not None
    np.testing.assert_array_equal(probabilities(network), probabilities(model()))


def test_autocast_is_the_callers_wish():
    network = model()
    kept = fast_copy(network)
    with torch.autocast("cpu", torch.bfloat16):
        assert fast_copy(network) is None
    assert fast_copy(network) is kept


def test_a_type_that_is_slow_here_is_run_as_it_is():
    if torch.ops.mkldnn._is_mkldnn_fp16_supported():
        pytest.skip("this CPU is fast in float16")
    assert fast_copy(model().half()) is None


def test_a_network_that_is_run_as_it_is_holds_no_copy_of_what_it_was():
    network = model()
    kept = weakref.ref(fast_copy(network))
    network.head.register_forward_hook(lambda *_: None)
    predict(network, picture())
    assert kept() is None


def test_weights_made_in_inference_mode():
    with torch.inference_mode():
        network = model()
    assert fast_copy(network) is fast_copy(network)


def test_weights_that_do_not_lie_side_by_side():
    network = model()
    network.encoder[0].norm1.weight = nn.Parameter(torch.arange(1.0, 9.0)[::2])
    assert fast_copy(network) is not None
    np.testing.assert_allclose(probabilities(network), by_hand(network), atol=1e-5)


def test_weights_that_are_views_of_others_with_their_signs_changed():
    network = model()
    network.head.bias = nn.Parameter(torch._neg_view(torch.ones(1)), requires_grad=False)
    assert fast_copy(network) is not None
    np.testing.assert_allclose(probabilities(network), by_hand(network), atol=1e-5)


def test_predict_takes_a_copy_made_by_hand():
    network = model()
    np.testing.assert_allclose(probabilities(optimize_for_inference(network)), probabilities(network), atol=1e-6)


def test_memory_for_maps_is_given_back_after_predict_where_it_is_much(monkeypatch):
    """Of all copies together, in all threads."""
    monkeypatch.setattr(pool, "_pools", weakref.WeakSet())  # those of other tests may go at any time
    monkeypatch.setattr(fast_network, "keep_freed", lambda: True)
    monkeypatch.setattr(fast_network, "release_freed", lambda: released.append(1))
    unet, other, released = model(), Pool(), []
    fast = fast_copy(unet)
    assert fast is not None
    predict(unet, picture())

    def kept_after(*, most: int) -> int:
        monkeypatch.setattr(cached, "_MOST_KEPT", most)
        fast._memory.pool.empty(1000)
        predict(unet, picture())
        return fast.kept_bytes

    assert kept_after(most=2**20) >= 4000
    assert kept_after(most=4000) == 0
    other.empty(2**18)
    assert kept_after(most=2**20) == 0
    assert released == [1] * 4  # what is kept for the whole process is given back always
    free_memory(UNet(features=(2,)))  # without a copy there is nothing to do


def test_hooks_on_all_modules_are_seen():
    model, picture = UNet(features=(8, 16)).eval(), torch.rand(3, 32, 48)
    before = model.predict(picture, probabilities=True)
    hook = torch.nn.modules.module.register_module_forward_hook(lambda module, args, result: result + 0.1)
    try:
        after = model.predict(picture, probabilities=True)
    finally:
        hook.remove()
    assert np.abs(after - before).max() > 1e-3


def test_a_class_that_somebody_patched_is_run_as_it_is(monkeypatch):
    network = model()
    probabilities(network)
    monkeypatch.setattr(nn.ReLU, "forward", lambda self, x: x.tanh())
    np.testing.assert_allclose(probabilities(network), by_hand(network), atol=1e-6)
    with pytest.raises(ValueError, match="something else: the class ReLU has a forward that was put into it"):
        optimize_for_inference(network)


def test_weights_that_are_not_finite_are_not_hidden():
    model = UNet(features=(8, 16)).eval()
    with torch.no_grad():
        model.encoder[0].conv1.weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="hold NaN"):
        model.predict(torch.rand(3, 32, 48))
    finite = UNet(features=(8, 16)).eval()
    finite.predict(torch.rand(3, 32, 48))
    finite.encoder[0].conv1.weight.data[0, 0, 0, 0] = torch.nan  # as no counter shows
    with pytest.raises(ValueError, match="hold NaN"):
        finite.predict(torch.rand(3, 32, 48))
    with pytest.raises(ValueError, match=r"encoder\.0\.conv1\.weight holds NaN or infinity"):
        optimize_for_inference(model)
