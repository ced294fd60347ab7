from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import tv_tensors

from unetlib import CarvanaDataset, ImageMaskDataset, SegmentationMetrics, losses
from unetlib.cache import CachedDataset
from unetlib.loading import Augmented, AugmentedBatches, Draw, Resident, ShuffledBatches, listed, padded, stacked
from unetlib.synthetic import write_carvana
from unetlib.transforms import PerPicture, eval_transform, train_transform


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


def test_the_order_is_the_same_on_any_default_device():
    order = list(ShuffledBatches(range(10), batch_size=3, seed=5))
    with torch.device("meta"):
        assert list(ShuffledBatches(range(10), batch_size=3, seed=5)) == order


def test_seeds_differ_between_pictures_epochs_and_runs():
    batches = [ShuffledBatches(range(50), batch_size=50, seed=seed) for seed in range(4)]
    seeds = []
    for run in batches:
        for run.epoch in range(5):
            seeds += [draw.seed for batch in run for draw in batch]
    assert len(set(seeds)) == 4 * 5 * 50


def test_any_integer_is_a_seed():
    for seed in (-1, 2**63, 10**30):
        assert sorted(draw.item for batch in ShuffledBatches(range(8), batch_size=4, seed=seed) for draw in batch) == [
            *range(8)
        ]


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
    [
        (4, 0, 1, "batch_size=0 must be 1 or more"),
        (9, 4, 3, "multiple of the 3"),
        (3, 4, 1, "give a smaller"),
        (4, 4, 0, "world_size=0"),
    ],
)
def test_sizes_that_cannot_be_are_refused(pictures, size, world, message):
    with pytest.raises(ValueError, match=message):
        ShuffledBatches(range(pictures), batch_size=size, world_size=world)
    with pytest.raises(ValueError, match="rank must be from 0 to world_size - 1, got rank=3"):
        ShuffledBatches(range(12), batch_size=6, rank=3, world_size=3)


def noisy(image, mask):
    return image + torch.rand(2), mask


PAIRS = [(torch.full((2,), float(i)), torch.tensor(i)) for i in range(8)]


@pytest.mark.parametrize("workers", [1, 2])
def test_chance_is_the_same_in_any_number_of_workers(workers):
    batches = ShuffledBatches(PAIRS, batch_size=4, seed=3)
    data = Augmented(PAIRS, noisy)
    expected = [[data[draw] for draw in batch] for batch in batches]
    loader = DataLoader(data, batch_sampler=batches, num_workers=workers, collate_fn=stacked)
    for batch, (images, masks, draws) in zip(expected, loader, strict=True):
        assert torch.equal(images, torch.stack([image for image, _, _ in batch]))
        assert masks.tolist() == [draw.item for draw in draws]
        assert draws == [draw for _, _, draw in batch]


def test_augmented_later_pictures_are_what_workers_make_of_them():
    sizes = [(8, 12), (10, 14)] * 4
    shares = torch.arange(8 * 12 // 2) / 255
    pairs = [
        (tv_tensors.Image(torch.randint(256, (3, *size), dtype=torch.uint8)), tv_tensors.Mask(shares.new_ones(size)))
        for size in sizes
    ]
    pairs[0][1][:4] = shares.view(4, 12)
    transform = train_transform((8, 12), color_jitter=0.2)
    data, plain = Augmented(pairs, transform), Augmented(pairs, None)
    batches = ShuffledBatches(pairs, batch_size=4, seed=3)
    early = DataLoader(data, batch_sampler=batches, collate_fn=stacked)
    late = DataLoader(plain, batch_sampler=batches, collate_fn=listed)
    resident = Resident(plain, batches, torch.device("cpu"), workers=1)
    assert sum(image.nbytes + mask.nbytes for image, mask in zip(resident.images, resident.masks)) == 4 * 4 * (96 + 140)
    assert Resident.nbytes(plain) == 4 * 4 * (96 + 140)
    assert Resident.nbytes(Augmented(pairs * 3, None)) == 3 * 4 * 4 * (96 + 140)  # from 8 of the 24
    augment = PerPicture(transform)
    for (images, masks, draws), *others in zip(early, late, resident, strict=True):
        for other_images, other_masks, other_draws in others:
            assert other_draws == draws
            found, found_masks = augment(other_images, other_masks, [draw.seed for draw in other_draws])
            assert torch.equal(found, images)
            torch.testing.assert_close(found_masks, masks, rtol=0, atol=1e-7)


def test_a_preset_moves_pictures_and_masks_of_plain_tensors_together():
    image = torch.rand(4, 16, 16)
    data = Augmented([(image, image[0])], train_transform(None, rotation=0, horizontal_flip=0.5))
    pairs = [data[Draw(0, seed)][:2] for seed in range(8)]
    assert all(torch.equal(found[0], mask) for found, mask in pairs)
    assert {torch.equal(mask, image[0]) for _, mask in pairs} == {True, False}


@pytest.mark.parametrize("values", [torch.bool, torch.uint8, torch.int64])
def test_classes_stay_as_they_are(values):
    mask = torch.tensor([[0, 1], [1, 0]]).to(values)
    data = Augmented([(torch.zeros(3, 2, 2, dtype=torch.uint8), mask)], None)
    [(_, masks, _)] = Resident(data, ShuffledBatches(data, batch_size=1), torch.device("cpu"))
    assert masks[0].dtype == values
    assert torch.equal(masks[0], mask)


def test_what_workers_decoded_is_copied_out_of_their_memory_and_takes_no_chance():
    data = Augmented([(torch.full((3, 2, 2), i, dtype=torch.uint8), torch.zeros(2, 2)) for i in range(4)], None)
    for workers in (0, 1):
        state = torch.get_rng_state()
        resident = Resident(data, ShuffledBatches(data, batch_size=4), torch.device("cpu"), workers=workers)
        assert torch.equal(torch.get_rng_state(), state)
        assert [int(image[0, 0, 0]) for image in resident.images] == [0, 1, 2, 3]
        assert not any(part.is_shared() for part in resident.images + resident.masks)
        assert resident.images[0].data_ptr() != data[Draw(0, 0)][0].data_ptr()


def test_augmentation_leaves_the_chance_outside_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    first, _, _ = Augmented(PAIRS, noisy)[Draw(0, 1)]
    assert torch.equal(torch.rand(1), expected)
    assert not torch.equal(first, Augmented(PAIRS, noisy)[Draw(0, 2)][0])


# --- padded


@pytest.mark.parametrize("kind", ["shares", "classes", "bools"])
def test_pictures_of_different_sizes_are_padded_to_a_batch_whose_padding_counts_for_nothing(tmp_path, kind):
    chance = np.random.default_rng(0)
    for folder, shape in (("pictures", (3,)), ("masks", ())):
        (tmp_path / folder).mkdir()
        for name, size in (("a.png", (16, 40)), ("b.png", (24, 32))):
            Image.fromarray(chance.integers(2, size=size + shape, dtype=np.uint8)).save(tmp_path / folder / name)
    folders, keep = (tmp_path / "pictures", tmp_path / "masks"), eval_transform(size=None)
    data = {
        "shares": ImageMaskDataset(*folders, transform=keep),
        "classes": ImageMaskDataset(*folders, mask_values=(0, 1), transform=keep),
        "bools": CachedDataset(ImageMaskDataset(*folders), transform=keep),
    }[kind]
    with pytest.raises(RuntimeError, match="stack expects each tensor to be equal size"):
        next(iter(DataLoader(data, batch_size=2)))
    [(images, masks)] = DataLoader(data, batch_size=2, collate_fn=padded)
    assert images.shape == (2, 3, 24, 40)
    assert masks.shape == (2, 24, 40)
    assert type(images) is type(masks) is torch.Tensor
    assert masks.dtype == {"shares": torch.float32, "classes": torch.int64, "bools": torch.uint8}[kind]

    logits = torch.randn(2, 2 if kind == "classes" else 1, 24, 40)
    found, true = [], []
    for (image, mask), batch_image, batch_mask, output in zip(data, images, masks, logits):
        height, width = mask.shape
        assert torch.equal(batch_image, F.pad(image, (0, 40 - width, 0, 24 - height)))
        assert torch.equal(batch_mask[:height, :width], mask.to(masks.dtype))
        assert (batch_mask == 255).sum() == 24 * 40 - height * width
        found.append(output[:, :height, :width].flatten(1))
        true.append(mask.flatten())
    pixels, answers = torch.cat(found, dim=1), torch.cat(true)
    if kind == "classes":
        expected = F.cross_entropy(pixels.T, answers)
    else:
        expected = F.binary_cross_entropy_with_logits(pixels[0], answers.float())
    torch.testing.assert_close(losses.cross_entropy_loss(logits, masks, ignore_index=255), expected)
    torch.testing.assert_close(
        losses.dice_loss(logits, masks, ignore_index=255, batch=True), losses.dice_loss(pixels[None], answers[None], batch=True)
    )
    metrics = SegmentationMetrics(logits.shape[1], ignore_index=255)
    metrics.update(logits, masks)
    assert metrics.confusion.sum() == answers.numel()


def test_padding_holds_the_value_asked_for_in_every_channel_of_a_mask():
    pairs = [(torch.ones(4, 2, 2), torch.ones(3, 2, 2)), (torch.ones(4, 1, 2), torch.ones(3, 1, 2))]
    _, masks = partial(padded, ignore_index=-100)(pairs)
    assert masks.tolist() == [[[[1, 1], [1, 1]]] * 3, [[[1, 1], [-100, -100]]] * 3]


def test_what_cannot_be_padded_is_named():
    image, mask = torch.ones(3, 2, 2), torch.ones(2, 2, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"masks of torch.uint8 cannot hold ignore_index=-100; .* such as 127"):
        padded([(image, mask)], ignore_index=-100)
    with pytest.raises(ValueError, match=r"a picture has the size \(2, 2\) and its mask \(2, 1\)"):
        padded([(image, mask), (image, mask[:, :1])])
    with pytest.raises(TypeError, match=r"takes tensors, got ndarray and ndarray; .* eval_transform\(size=None\)"):
        padded([(image.numpy(), mask.numpy())])


# --- AugmentedBatches


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    write_carvana(folder, cars=2, views=4, size=(64, 96))
    write_carvana(folder, cars=[5], views=4, size=(48, 96), split="more")
    return [CarvanaDataset(folder / split, folder / f"{split}_masks") for split in ("train", "more")]


@pytest.mark.parametrize("size", [(32, 48), None])
def test_batches_do_not_depend_on_where_pictures_are_kept_and_augmented(scenes, size, monkeypatch):
    augment = train_transform((32, 48), rotation=20, color_jitter=0.2)
    batches = ShuffledBatches(range(12), batch_size=4, seed=3)
    batches.first = 1
    ways = {
        "workers": {"workers": 1},
        "here": {"workers": 0, "cache_gib": 0},
        "on the device": {"augment_on": "device"},
        "sent to it": {"augment_on": "device", "cache_gib": 0},
        "no room": {"augment_on": "device"},
    }
    loaders = {}
    for name, options in ways.items():
        if name == "no room":
            monkeypatch.setattr("unetlib.loading.available_memory", lambda device: 1000)
        loaders[name] = AugmentedBatches(scenes, batches, augment, torch.device("cpu"), size=size, **options)
    assert [name for name, loader in loaders.items() if isinstance(loader.loader, Resident)] == ["on the device"]
    expected, *others = (list(loader) for loader in loaders.values())
    assert [draws for _, _, draws in expected] == list(batches)
    assert len(expected) == 2
    for batch, (images, masks, draws) in zip(list(batches), expected, strict=True):
        assert draws == batch
        assert images.shape == (4, 3, 32, 48)
        assert masks.shape == (4, 32, 48)
    for other in others:
        for (images, masks, draws), (other_images, other_masks, other_draws) in zip(expected, other, strict=True):
            assert other_draws == draws
            assert torch.equal(other_images, images)
            torch.testing.assert_close(other_masks, masks, rtol=0, atol=1e-7)


def test_another_place_and_other_numbers_of_pictures_are_refused(scenes):
    batches = ShuffledBatches(range(12), batch_size=4)
    with pytest.raises(ValueError, match='augment_on must be "workers" or "device", got \'gpu\''):
        AugmentedBatches(scenes, batches, train_transform((32, 48)), torch.device("cpu"), augment_on="gpu")
    with pytest.raises(ValueError, match="batches are of 12 pictures, and datasets have 8"):
        AugmentedBatches(scenes[:1], batches, train_transform((32, 48)), "cpu")


@pytest.mark.parametrize("place", ["workers", "device"])
def test_pictures_that_stay_of_different_sizes_are_no_batch(scenes, place):
    order = ShuffledBatches(range(12), batch_size=12)
    with pytest.raises(ValueError, match=r"of one size.*\(48, 96\) and \(64, 96\); give it a size"):
        [*AugmentedBatches(scenes, order, train_transform(None), "cpu", augment_on=place)]


def test_pictures_for_workers_are_opened_for_their_sizes_once(scenes, monkeypatch):
    looked = []
    monkeypatch.setattr("unetlib.cache.image_size", lambda path, **_: looked.append(path) or (64, 96))
    AugmentedBatches(scenes, ShuffledBatches(range(12), batch_size=4), train_transform((32, 48)), "cpu")
    assert len(looked) == len(set(looked)) == 12


def batches_of(scenes, size=(32, 48), **options):
    order = ShuffledBatches(range(12), batch_size=4)
    return AugmentedBatches(scenes, order, train_transform((32, 48)), torch.device("cpu"), size=size, **options)


@pytest.mark.parametrize("size", [(32, 48), None])
def test_all_sets_together_keep_what_the_budget_holds_at_the_size_asked_for(scenes, size):
    half = 10 * 4 * 32 * 48 if size else 10 * (3 * 64 * 96 + 64 * 96 // 8)
    sets = batches_of(scenes, size, cache_gib=2 * half / 2**30).loader.dataset.dataset.datasets
    expected = [CachedDataset(dataset, size, budget_gib=half / 2**30) for dataset in scenes]
    assert [repr(kept) for kept in sets] == [repr(kept) for kept in expected]
    tight = batches_of(scenes, size, cache_gib=half / 4 / 2**30).loader.dataset.dataset.datasets
    expected = [CachedDataset(dataset, size, budget_gib=half / 8 / 2**30) for dataset in scenes]
    assert [repr(kept) for kept in tight] == [repr(kept) for kept in expected]
    assert "room for 8 pictures" in repr(sets[0])
    assert "room for 8 pictures" not in repr(tight[0])


def test_pictures_stay_on_the_device_where_they_fit_into_half_of_its_free_memory(scenes, monkeypatch):
    needed = Resident.nbytes(Augmented([CachedDataset(part, (32, 48))[i] for part in scenes for i in range(len(part))], None))
    enough, gib = 2 * needed, needed / 2**30
    for free, cache_gib, stay in ((enough, gib, True), (enough - 1, gib, False), (enough, gib - 2**-30, False)):
        monkeypatch.setattr("unetlib.loading.available_memory", lambda device, free=free: free)
        assert isinstance(batches_of(scenes, augment_on="device", cache_gib=cache_gib).loader, Resident) is stay


@pytest.mark.parametrize("place", ["workers", "device"])
@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_only_cuda_is_sent_batches_without_a_wait(scenes, place, device, monkeypatch):
    batches = batches_of(scenes, augment_on=place, cache_gib=0)
    batches.device = torch.device(device)
    asked, to = set(), torch.Tensor.to

    def spy(part, *args, **options):
        if args[:1] != (batches.device,):
            return to(part, *args, **options)
        asked.add(options["non_blocking"])
        return part

    monkeypatch.setattr(torch.Tensor, "to", spy)
    assert len([*batches]) == 3
    assert asked == {device == "cuda"}


@pytest.mark.parametrize("place", ["workers", "device"])
def test_batches_take_nothing_from_the_chance_outside_and_their_workers_stay(scenes, place):
    batches = batches_of(scenes, augment_on=place, workers=1, cache_gib=0)
    state = torch.get_rng_state()
    assert len([*batches]) == len([*batches]) == 3
    assert torch.equal(torch.get_rng_state(), state)
    assert batches.loader.persistent_workers
