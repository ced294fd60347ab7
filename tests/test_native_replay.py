from __future__ import annotations

import gc
import weakref

import pytest
import torch
from needs import needs_native

from unetlib.fast.native_kernels import NativeConv, NativeDoubling, NativeHead, lanes, split_picture
from unetlib.fast.native_replay import NativeReplay, NotNative
from unetlib.fast.pool import Pool


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def native_pass(seed: int = 0):
    """Some operations after each other, as a function of a picture; several maps are of the same size."""
    width, side = lanes(), 2
    convs = [NativeConv(random(width, width, 3, 3, seed=seed + n), random(width), relu=True) for n in range(2)]
    doubling, head = (
        NativeDoubling(random(width, width, 2, 2), random(width)),
        NativeHead(random(side**2, width, 1, 1), random(4), side),
    )

    def function(x):
        x = split_picture(x, side, width)
        height, wide = x.shape[-2:]
        return head(convs[1](convs[0](doubling(convs[0](convs[1](x)), 2 * height, 2 * wide))), (4 * height, 4 * wide))

    return function


@needs_native
@pytest.mark.parametrize("size", [(6, 10), (50, 71), (300, 200)])
def test_a_replay_gives_what_the_calls_give(size):
    function, xs = native_pass(), [random(2, 3, *size, seed=n) for n in range(3)]
    expected = [function(x) for x in xs]
    replay = NativeReplay(function, xs[0], Pool())
    found = [replay(x) for x in xs]  # all of them there at the end: a result has its own memory
    assert all(torch.equal(one, other) for one, other in zip(found, expected))


@needs_native
def test_replays_share_memory():
    functions, xs = [native_pass(0), native_pass(7)], [random(1, 3, 60, 90), random(1, 3, 80, 30)]
    expected, pool = [function(x) for function, x in zip(functions, xs)], Pool()
    replays = [NativeReplay(function, x, pool) for function, x in zip(functions, xs)]
    for _ in range(2):
        assert all(torch.equal(replay(x), result) for replay, x, result in zip(replays, xs, expected))
    held = len(pool._free)
    NativeReplay(functions[0], xs[0], pool)
    assert len(pool._free) == held


OTHER = {
    "relu": torch.relu,
    "clone": torch.clone,
    "type": lambda x: x.double(),
    "layout": lambda x: x.expand(-1, 2, -1, -1).contiguous(memory_format=torch.channels_last),
    "reshape": lambda x: x.transpose(2, 3).reshape(1, -1),
    "flatten": lambda x: x.transpose(2, 3).flatten(1),
    "cat": lambda x: torch.cat((x, x)),
    "in place": lambda x: x.zero_(),
}


@needs_native
@pytest.mark.parametrize("inference", [False, True])  # in which copies have the names of views
@pytest.mark.parametrize("name", OTHER)
def test_what_is_not_native_is_not_replayed(name, inference):
    function, x = native_pass(), random(1, 3, 8, 8)
    with torch.inference_mode(inference):
        function(x)
        with pytest.raises(NotNative, match="aten"):
            NativeReplay(lambda x: OTHER[name](function(x)), x, Pool())
        assert torch.equal(NativeReplay(function, x, Pool())(x), function(x))  # nothing is left of the attempt


@needs_native
def test_the_input_must_be_read_and_the_result_made():
    function, x = native_pass(), random(1, 3, 8, 8)
    other = function(x)
    with pytest.raises(NotNative, match="input"):
        NativeReplay(lambda _: function(x), x.clone(), Pool())
    with pytest.raises(NotNative, match="result"):
        NativeReplay(lambda x: function(x) is None or other, x, Pool())


@needs_native
def test_weights_live_as_long_as_the_replay():
    width = lanes()
    convs = [NativeConv(random(width, width, 3, 3), random(width), relu=True)]
    x = random(1, 3, 40, 40)
    expected, weights = convs[0](split_picture(x, 1, width)), weakref.ref(convs[0].transformed)
    replay = NativeReplay(lambda x: convs[0](split_picture(x, 1, width)), x, Pool())
    convs.clear()
    gc.collect()
    assert weights() is not None
    assert torch.equal(replay(x), expected)
    del replay
    gc.collect()
    assert weights() is None
