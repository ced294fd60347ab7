from __future__ import annotations

import gc
import threading

import torch

from unetlib.fast.pool import Pool, empty, pooled


def test_a_block_is_handed_out_again_when_its_tensor_is_gone_and_not_before():
    pool = Pool()
    first = pool.empty(2, 3, 5)
    place = first.data_ptr()
    second = pool.empty(30)
    assert second.data_ptr() != place
    assert pool.free_bytes == 0
    del first
    gc.collect()
    assert pool.free_bytes == 4 * 30
    assert pool.empty(4, 7).data_ptr() == place  # 28 numbers fit into 30


def test_the_block_that_fits_best_is_taken():
    pool = Pool()
    large, small = pool.empty(1000), pool.empty(100)
    place = small.data_ptr()
    del large, small
    gc.collect()
    assert pool.empty(90).data_ptr() == place


def test_blocks_of_one_size_come_back_all():
    pool = Pool()
    first, second = pool.empty(30), pool.empty(30)
    del first, second
    gc.collect()
    assert pool.free_bytes == 2 * 4 * 30


def test_a_block_much_too_large_is_kept_for_a_tensor_of_its_size():
    pool = Pool()
    large = pool.empty(1000)
    place = large.data_ptr()
    del large
    gc.collect()
    small = pool.empty(100)
    assert small.data_ptr() != place
    assert pool.empty(2, 5, 10, 10, channels_last=True).data_ptr() == place


def test_blocks_begin_where_nnpack_wants_them_and_have_the_shape():
    for shape in ((3,), (1, 2, 3, 4), (2, 1024, 1024)):
        tensor = empty(*shape)
        assert tensor.shape == shape
        assert tensor.dtype == torch.float32
        assert tensor.is_contiguous()
        assert tensor.data_ptr() % 64 == 0


def test_a_map_may_lie_in_channels_last():
    pool = Pool()
    for shape, take in (((2, 3, 5, 7), empty), ((2, 3, 5, 2**15), empty), ((2, 3, 5, 7), pool.empty)):
        tensor = take(*shape, channels_last=True)
        assert tensor.shape == shape
        assert tensor.is_contiguous(memory_format=torch.channels_last)
        assert tensor.data_ptr() % 64 == 0


def test_a_pool_is_used_within_its_context_and_in_its_thread():
    pool, taken, large = Pool(), [], 2**19  # numbers of a huge page
    with pooled(pool):
        small = empty(large - 1)
        kept = empty(large)
        worker = threading.Thread(target=lambda: taken.append(empty(large)))
        worker.start()
        worker.join()
        assert len(taken) == 1
    del kept, small
    taken.clear()
    gc.collect()
    outside = empty(large)
    assert len(pool._free) == 1
    del outside
    assert len(pool._free) == 1


def test_a_pool_within_another_one_gives_way_to_it_again():
    outer, inner = Pool(), Pool()
    with pooled(outer, least=0):
        with pooled(inner, least=0):
            empty(8)
        empty(8)
    assert len(outer._free) == len(inner._free) == 1
