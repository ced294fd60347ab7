from __future__ import annotations

import sys
import threading

import numpy as np
import pytest
import torch
from test_fast import OPTIONS, error, fast_bfloat16, pictures, trained

from unetlib import Preprocessing
from unetlib.inference import optimize_for_inference, predict

pytest.importorskip("openvino", reason="needs the extra openvino")


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gives_the_logits_of_the_model(options):
    model = trained(**options)
    fast = optimize_for_inference(model, backend="openvino")
    for size in ((40, 56), (37, 51)):
        x = pictures(model, *size)
        found = fast(x)
        assert found.shape == model(x).shape
        assert not found.requires_grad
        assert error(found, model(x)) <= 1e-5


@fast_bfloat16
def test_bfloat16_is_near():
    model = trained(features=(16, 32))
    x = pictures(model, 40, 56)
    assert 1e-6 < error(optimize_for_inference(model, dtype=torch.bfloat16, backend="openvino")(x), model(x)) < 0.1


def test_results_stay_and_the_model_too():
    model = trained().train()
    fast, x = optimize_for_inference(model, backend="openvino"), pictures(model, 40, 56)
    first = fast(x)
    kept = first.clone()
    with torch.no_grad():
        model.head.weight.zero_()
    assert not torch.equal(fast(torch.zeros_like(x)), first)
    assert torch.equal(first, kept)
    assert torch.equal(fast(x), first)
    assert model.training


def test_the_last_four_shapes_are_kept_until_they_are_freed():
    fast = optimize_for_inference(trained(), backend="openvino")
    for side in (8, 12, 16, 20, 24):
        fast(torch.rand(1, 3, side, side))
    fast(torch.rand(1, 3, 12, 12))
    assert [shape[-3] for shape in fast._run._compiled] == [16, 20, 24, 12]
    fast.free_memory()
    assert not fast._run._compiled
    assert fast(torch.rand(1, 3, 12, 12)).shape == (1, 1, 12, 12)


def test_threads_wait_for_each_other():
    model = trained()
    fast = optimize_for_inference(model, backend="openvino")
    batches = [torch.rand(1, 3, 32, 32) for _ in range(4)]
    results: dict[int, list[torch.Tensor]] = {}

    def work(number: int) -> None:
        results[number] = [fast(batches[number]) for _ in range(20)]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, batch in enumerate(batches):
        expected = model(batch)
        assert all(error(result, expected) <= 1e-5 for result in results[number])


def test_predict_takes_it():
    model = trained(patch_size=2)
    model.preprocessing = Preprocessing(size=(32, 48))
    picture = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
    found = predict(optimize_for_inference(model, backend="openvino"), picture, probabilities=True)
    np.testing.assert_allclose(found, model.predict(picture, probabilities=True), atol=1e-5)


def test_what_it_cannot_do_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="backend must be 'openvino' or None, got 'onnx'"):
        optimize_for_inference(trained(), backend="onnx")
    with pytest.raises(ValueError, match="give compile=True or backend='openvino', not both"):
        optimize_for_inference(trained(), backend="openvino", compile=True)
    with pytest.raises(ValueError, match=r"is for CPUs, in torch.float32 or bfloat16, got cpu and torch.float64"):
        optimize_for_inference(trained().double(), backend="openvino")
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ImportError, match=r"needs the extra: pip install 'unetlib\[openvino\]'"):
        optimize_for_inference(trained(), backend="openvino")
