from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader

from unetlib.loading import Augmented, Draw, ShuffledBatches


def test_each_picture_comes_once_a_pass_in_an_order_of_its_own():
    batches = ShuffledBatches(range(10), batch_size=3, seed=5)
    passes = []
    for epoch in (0, 1):
        batches.epoch = epoch
        passes.append([[draw.item for draw in batch] for batch in batches])
        assert [len(batch) for batch in passes[-1]] == [3, 3, 3]
        assert len(batches) == 3
        assert len({index for batch in passes[-1] for index in batch}) == 9
    assert passes[0] != passes[1]
    assert passes[0] != [[draw.item for draw in batch] for batch in ShuffledBatches(range(10), batch_size=3, seed=6)]


def test_seeds_differ_between_pictures_epochs_and_runs():
    batches = [ShuffledBatches(range(50), batch_size=50, seed=seed) for seed in range(4)]
    seeds = []
    for run in batches:
        for run.epoch in range(5):
            seeds += [draw.seed for batch in run for draw in batch]
    assert len(set(seeds)) == 4 * 5 * 50


def test_processes_share_the_batches_of_one():
    whole = list(ShuffledBatches(range(20), batch_size=6, seed=1))
    shares = [list(ShuffledBatches(range(20), batch_size=6, seed=1, rank=rank, world_size=3)) for rank in range(3)]
    for batch, *parts in zip(whole, *shares, strict=True):
        assert all(len(part) == 2 for part in parts)
        assert sorted(batch) == sorted(draw for part in parts for draw in part)


def test_a_pass_goes_on_from_the_middle():
    batches = ShuffledBatches(range(20), batch_size=4, seed=1)
    whole = list(batches)
    batches.first = 3
    assert list(batches) == whole[3:]


@pytest.mark.parametrize(
    ("pictures", "size", "world", "message"),
    [(4, 0, 1, "positive multiple"), (9, 4, 3, "multiple of the 3"), (3, 4, 1, "give a smaller")],
)
def test_sizes_that_cannot_be_are_refused(pictures, size, world, message):
    with pytest.raises(ValueError, match=message):
        ShuffledBatches(range(pictures), batch_size=size, world_size=world)


def noisy(image, mask):
    return image + torch.rand(2), mask


PAIRS = [(torch.full((2,), float(i)), torch.tensor(i)) for i in range(8)]


@pytest.mark.parametrize("workers", [1, 2])
def test_chance_is_the_same_in_any_number_of_workers(workers):
    batches = ShuffledBatches(PAIRS, batch_size=4, seed=3)
    data = Augmented(PAIRS, noisy)
    expected = [[data[draw] for draw in batch] for batch in batches]
    for batch, (images, masks, indices) in zip(expected, DataLoader(data, batch_sampler=batches, num_workers=workers)):
        assert torch.equal(images, torch.stack([image for image, _, _ in batch]))
        assert torch.equal(masks, indices)
        assert indices.tolist() == [index for _, _, index in batch]


def test_augmentation_leaves_the_chance_outside_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    first, _, _ = Augmented(PAIRS, noisy)[Draw(0, 1)]
    assert torch.equal(torch.rand(1), expected)
    assert not torch.equal(first, Augmented(PAIRS, noisy)[Draw(0, 2)][0])
