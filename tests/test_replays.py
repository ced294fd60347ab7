from __future__ import annotations

import torch

from unetlib.fast import replays
from unetlib.fast.replays import Replays


class Recorder:
    """A function that counts its calls, and captures of it that count theirs."""

    def __init__(self):
        self.calls = self.captures = self.replays = 0
        self.besides = []

    def __call__(self, x):
        self.calls += 1
        return 2 * x

    def capture(self, function, x, beside):
        self.captures += 1
        self.besides.append(beside)

        def replay(x):
            self.replays += 1
            return 2 * x

        return replay


def test_a_shape_is_captured_when_it_comes_again():
    recorder = Recorder()
    doubled, x = Replays(recorder, recorder.capture), torch.rand(1, 3, 4, 5)
    for _ in range(4):
        assert torch.equal(doubled(x), 2 * x)
    assert (recorder.calls, recorder.captures, recorder.replays) == (1, 1, 3)
    doubled(x.double())
    doubled(x[..., :4])
    assert (recorder.calls, recorder.captures) == (3, 1)
    doubled(x.double())
    assert recorder.besides[0] is None
    assert recorder.besides[1] is not None
    doubled.clear()
    doubled(x)
    assert recorder.calls == 4


def test_what_counts_as_the_same_can_be_said():
    recorder = Recorder()
    doubled, x = Replays(recorder, recorder.capture, key=lambda x: x.stride()), torch.rand(1, 3, 4, 5)
    for same in (x, x.double(), x.to(memory_format=torch.channels_last)):
        doubled(same)
    assert (recorder.calls, recorder.captures) == (2, 1)


def test_few_shapes_are_kept_the_last_used_ones():
    recorder = Recorder()
    doubled = Replays(recorder, recorder.capture)
    xs = [torch.rand(1, 1, 4, width) for width in range(1, replays._KEPT + 2)]
    for x in (*xs[:-1], xs[0], xs[-1]):
        doubled(x)
    assert recorder.captures == 1
    doubled(xs[0])
    assert (recorder.captures, recorder.replays) == (1, 2)
    doubled(xs[1])  # the least recently used one was dropped
    assert recorder.captures == 1


def test_large_batches_and_captures_within_captures_go_to_the_function(monkeypatch):
    recorder = Recorder()
    doubled, x = Replays(recorder, recorder.capture, most_pixels=40), torch.rand(2, 3, 4, 5)
    for _ in range(3):
        doubled(torch.rand(2, 3, 1, 21))
    assert (recorder.calls, recorder.captures) == (3, 0)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    for _ in range(3):
        doubled(x)
    assert (recorder.calls, recorder.captures) == (6, 0)


def test_a_capture_that_fails_is_not_tried_again():
    attempts = []

    def capture(function, x, beside):
        attempts.append(beside)
        raise RuntimeError("operation not permitted when stream is capturing")

    recorder = Recorder()
    doubled = Replays(recorder, capture)
    for width in (3, 4):
        x = torch.rand(1, 1, 2, width)
        for _ in range(3):
            assert torch.equal(doubled(x), 2 * x)
    assert attempts == [None, None]
    assert recorder.calls == 6
