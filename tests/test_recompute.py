from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from unetlib import UNet
from unetlib.inference import optimize_for_inference
from unetlib.recompute import recomputed


def after_two_batches(model: UNet, dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    """Gradients and running statistics."""
    torch.manual_seed(1)  # of dropout
    for picture in torch.rand(2, 2, 3, 21, 30, generator=torch.Generator().manual_seed(0)):
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            loss = model(picture).square().mean()
        loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()} | dict(model.named_buffers())


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize(
    "options", [{}, {"dropout": 0.3}, {"norm": "group"}, {"upsample": "bilinear", "match": "zeros", "patch_size": 2}], ids=str
)
def test_gradients_and_statistics_are_the_same_to_the_last_bit(options, dtype):
    torch.manual_seed(0)
    model = UNet(features=(8, 16), **options)
    twin = copy.deepcopy(model)
    twin.checkpoint_gradients = True
    kept, again = after_two_batches(model, dtype), after_two_batches(twin, dtype)
    assert kept.keys() == again.keys()
    for name in kept:
        assert torch.equal(kept[name], again[name]), name


def test_frozen_batch_norm_stays_frozen():
    torch.manual_seed(0)
    model = UNet(features=(8, 16))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    twin = copy.deepcopy(model)
    twin.checkpoint_gradients = True
    kept, again = after_two_batches(model, None), after_two_batches(twin, None)
    assert all(torch.equal(kept[name], again[name]) for name in kept)
    assert twin.encoder[0].norm1.num_batches_tracked == 0


def test_synchronized_batch_norm_too():
    torch.manual_seed(0)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(UNet(features=(8, 16)))
    twin = copy.deepcopy(model)
    twin.checkpoint_gradients = True
    kept, again = after_two_batches(model, None), after_two_batches(twin, None)
    assert all(torch.equal(kept[name], again[name]) for name in kept)
    assert twin.encoder[0].norm1.num_batches_tracked == 2


def test_batch_norm_is_itself_again_after_an_error():
    def breaks_the_second_time(*_):
        if len(passes) == 2:
            raise RuntimeError("broken")

    block = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2, momentum=0.3), nn.Sigmoid())
    passes = []
    block[0].register_forward_pre_hook(lambda *_: passes.append(1))
    block[2].register_forward_pre_hook(breaks_the_second_time)
    with pytest.raises(RuntimeError, match="broken"):
        recomputed(block, torch.rand(2, 1, 4, 4)).sum().backward()
    assert block[1].momentum == 0.3
    assert block[1].num_batches_tracked == 1


def test_less_is_kept_for_the_backward_pass():
    def kept(model):
        sizes = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.setdefault(x.data_ptr(), x.nbytes) and x, lambda x: x):
            logits = model(torch.rand(2, 3, 64, 64))
        del logits
        return sum(sizes.values())

    model = UNet(features=(8, 16))
    most = kept(model)
    model.checkpoint_gradients = True
    assert kept(model) < most / 2


def test_nothing_is_recomputed_without_gradients(monkeypatch):
    monkeypatch.setattr("unetlib.unet.recomputed", lambda *_: pytest.fail("recomputed"))
    model, x = UNet(features=(4, 8)).eval(), torch.rand(1, 3, 16, 16)
    model.checkpoint_gradients = True
    with torch.no_grad():
        logits = model(x)
    torch.testing.assert_close(optimize_for_inference(model)(x), logits)  # nor is it another network
    with pytest.raises(pytest.fail.Exception, match="recomputed"):
        model(x)


def test_compiled_networks_do_the_same():
    torch.compiler.reset()
    torch.manual_seed(0)
    model = UNet(features=(4, 8))
    twin = copy.deepcopy(model)
    twin.checkpoint_gradients = True
    kept = after_two_batches(model, None)
    again = after_two_batches(torch.compile(twin, fullgraph=True, backend="aot_eager"), None)
    for (name, value), other in zip(kept.items(), again.values()):
        torch.testing.assert_close(value, other, msg=name)


def test_a_trace_is_that_of_the_plain_network():
    model, x = UNet(features=(4, 8)).eval(), torch.rand(1, 3, 13, 10)
    expected = model(x)
    model.checkpoint_gradients = True
    assert torch.equal(torch.jit.trace(model, torch.rand(1, 3, 8, 8))(x), expected)
