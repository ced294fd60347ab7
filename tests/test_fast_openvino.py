from __future__ import annotations

import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from test_fast import OPTIONS, error, fast_bfloat16, pictures, trained

from unetlib import Preprocessing
from unetlib.inference import network_inputs, optimize_for_inference, predict

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


def test_no_pictures_give_no_logits():
    fast = optimize_for_inference(trained(), backend="openvino")
    assert fast(torch.rand(0, 3, 37, 51)).shape == (0, 1, 37, 51)


def test_pictures_whose_nan_would_be_hidden_are_refused():
    fast, x = optimize_for_inference(trained(), backend="openvino"), torch.rand(1, 3, 40, 56)
    x[0, 2, 3, 4] = float("nan")
    with pytest.raises(ValueError, match="the pictures hold NaN or infinity"):
        fast(x)


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


def test_what_is_kept_is_given_back_when_no_thread_computes():
    fast, cleared = optimize_for_inference(trained(), backend="openvino"), []
    with fast._run._lock, ThreadPoolExecutor(1) as pool:
        fast._run._compiled["shape"] = None
        done = pool.submit(fast.free_memory)
        done.add_done_callback(cleared.append)
        time.sleep(0.05)
        assert fast._run._compiled
        assert not cleared
        fast._run._lock.release()
        done.result()
        fast._run._lock.acquire()
    assert not fast._run._compiled


def test_predict_takes_it():
    model = trained(patch_size=2)
    model.preprocessing = Preprocessing(size=(32, 48))
    picture = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
    found = predict(optimize_for_inference(model, backend="openvino"), picture, probabilities=True)
    np.testing.assert_allclose(found, model.predict(picture, probabilities=True), atol=1e-5)


@pytest.mark.parametrize("patch_size", [1, 2])
def test_eight_bits_are_near_and_predict_takes_them(patch_size):
    pytest.importorskip("nncf", reason="needs the extra int8")
    model = trained(features=(16, 32), patch_size=patch_size)
    model.preprocessing = Preprocessing(size=(32, 48), mean=(0.5,), std=(0.25,))
    *others, last = np.random.default_rng(0).integers(0, 256, (9, 50, 70, 3), np.uint8)
    inputs = network_inputs(model, others)
    fast = optimize_for_inference(model, dtype=torch.int8, backend="openvino", calibration=inputs)
    assert fast.dtype == torch.int8
    [x] = network_inputs(model, [last])
    assert 1e-4 < error(fast(x), model(x)) < 0.1
    assert fast(torch.rand(2, 3, 41, 57)).shape == (2, 1, 41, 57)
    assert (predict(fast, last) != model.predict(last)).mean() < 0.05


def test_int8_and_calibration_go_together():
    model, batches = trained(), [torch.rand(1, 3, 16, 16)]
    for options in ({"dtype": torch.int8}, {"calibration": batches}, {"dtype": torch.bfloat16, "calibration": batches}):
        with pytest.raises(ValueError, match=r"int8 and calibration= go together, got .*network_inputs\(model, pictures\)"):
            optimize_for_inference(model, backend="openvino", **options)
    with pytest.raises(ValueError, match="calibration holds no batch; give some dozens"):
        optimize_for_inference(model, backend="openvino", dtype=torch.int8, calibration=iter(()))
    picture = np.zeros((16, 16, 3), np.uint8)
    for item in (picture, (batches[0], 0)):
        with pytest.raises(TypeError, match=rf"\(N, 3, H, W\) as tensors, got {type(item).__name__}; give network_inputs"):
            optimize_for_inference(model, backend="openvino", dtype=torch.int8, calibration=[item])
    with pytest.raises(ValueError, match=r"add the batch dimension with x\[None\]"):
        optimize_for_inference(model, backend="openvino", dtype=torch.int8, calibration=batches[0])
    with pytest.raises(ValueError, match=r"dtype must be one of .*got torch\.int8; .* for backend='openvino'"):
        optimize_for_inference(model, dtype=torch.int8, calibration=batches)


def test_what_it_cannot_do_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="backend must be 'openvino' or None, got 'onnx'"):
        optimize_for_inference(trained(), backend="onnx")
    with pytest.raises(ValueError, match="give compile=True or backend='openvino', not both"):
        optimize_for_inference(trained(), backend="openvino", compile=True)
    with pytest.raises(ValueError, match=r"in torch.float32, bfloat16 or int8, got cpu and torch.float64"):
        optimize_for_inference(trained().double(), backend="openvino")
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ImportError, match=r"openvino is not installed; .*pip install 'unetlib\[openvino\]'"):
        optimize_for_inference(trained(), backend="openvino")
