from __future__ import annotations

import gc
import logging
import math
import os
import pickle
import re
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from needs import needs_data
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, Subset
from torchvision import tv_tensors

from unetlib.cache import CachedDataset, _is_memory
from unetlib.datasets import CarvanaDataset, ImageMaskDataset
from unetlib.imaging import read_image
from unetlib.transforms import Resize, eval_transform, train_transform

SIZES = [(40, 60), (40, 60), (30, 45), (41, 59)]  # height, width; the last has bits that fill no whole bytes
SMALL = (16, 24)


def disc(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return (y - height / 2) ** 2 + (x - width / 3) ** 2 < (height / 3) ** 2


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    images, masks = tmp_path / "train", tmp_path / "train_masks"
    images.mkdir()
    masks.mkdir()
    rng = np.random.default_rng(0)
    for number, (height, width) in enumerate(SIZES):
        coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(images / f"a_{number:02d}.jpg", quality=95)
        mask = Image.fromarray(disc(height, width).astype(np.uint8))
        mask.putpalette([0, 0, 0, 255, 255, 255])
        mask.save(masks / f"a_{number:02d}_mask.gif")
    return images, masks


def spoil(folders: tuple[Path, Path]) -> None:
    """What is read from files from now on is an error."""
    for folder in folders:
        for path in folder.iterdir():
            path.write_bytes(b"spoilt")


def assert_equal(left, right):
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=0, atol=0)


# --- what comes out is what ImageMaskDataset gives


def test_own_sizes_are_exact_and_need_no_files_the_second_time(folders):
    plain = [(image.transpose(2, 0, 1), mask.astype(bool)) for image, mask in CarvanaDataset(*folders)]
    cached = CachedDataset(CarvanaDataset(*folders))
    first = [cached[i] for i in range(4)]
    spoil(folders)
    for pair, again, expected in zip(first, [cached[i] for i in range(4)], plain, strict=True):
        assert type(pair[0]) is type(again[0]) is tv_tensors.Image
        assert type(pair[1]) is type(again[1]) is tv_tensors.Mask
        assert_equal(pair, again)
        assert_equal(pair, expected)
    assert cached[-1][1].shape == SIZES[-1]
    with pytest.raises(IndexError):
        cached[4]


def test_a_loop_over_pairs_has_all_of_them_and_stops_at_a_transforms_index_error(folders):
    cached = CachedDataset(CarvanaDataset(*folders))
    for pair, expected in zip(cached, [cached[i] for i in range(4)], strict=True):
        assert_equal(pair, expected)

    def broken(image, mask):
        raise IndexError("of the transform")

    with pytest.raises(IndexError, match="of the transform"):
        list(CachedDataset(CarvanaDataset(*folders), transform=broken))


@pytest.mark.parametrize("size", [None, SMALL])
@pytest.mark.parametrize("transform", [None, eval_transform(SMALL)])
def test_items_are_on_the_cpu_whatever_the_default_device(folders, size, transform):
    plain = CarvanaDataset(*folders, transform)
    expected = plain[0], CachedDataset(CarvanaDataset(*folders), size, transform=transform)[0]
    with torch.device("meta"):
        found = plain[0], CachedDataset(CarvanaDataset(*folders), size, transform=transform)[0]
    for one, other in zip(found, expected, strict=True):
        assert_equal(one, other)


def test_reduced_pairs_are_what_resize_gives_to_rounding(folders):
    size = (21, 31)  # more than half of each picture, so that all of each is decoded
    plain = CarvanaDataset(*folders, Resize(size))
    cached = CachedDataset(CarvanaDataset(*folders), size)
    for index in range(4):
        first, again = cached[index], cached[index]
        assert_equal(first, again)
        assert first[0].dtype == torch.uint8
        assert first[1].dtype == torch.float32
        assert torch.equal(first[0], plain[index][0])
        difference = (first[1] - plain[index][1]).abs().max()
        assert 0 < difference <= 0.5 / 255 + 1e-6
        assert (first[1] == 1).any()
        assert (first[1] == 0).any()
    spoil(folders)
    assert len([cached[i] for i in range(4)]) == 4


def test_large_jpegs_are_decoded_in_part_and_stay_near_the_whole(tmp_path):
    rng = np.random.default_rng(1)
    smooth = Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).resize((720, 480), Image.Resampling.BICUBIC)
    smooth.save(tmp_path / "x.jpg", quality=92)
    Image.new("L", smooth.size).save(tmp_path / "x_mask.png")
    dataset = ImageMaskDataset(tmp_path, tmp_path, mask_suffix="_mask")
    assert read_image(tmp_path / "x.jpg", min_size=(120, 180)).shape == (120, 180, 3)
    for size in ((60, 90), (100, 150), (200, 300)):
        whole = Resize(size)(tv_tensors.Image(torch.from_numpy(read_image(tmp_path / "x.jpg")).permute(2, 0, 1)))
        difference = (CachedDataset(dataset, size)[0][0].float() - whole.float()).abs()
        assert 0 < difference.mean() < 2
        assert difference.max() < 16


@needs_data
@pytest.mark.parametrize("size", [(160, 240), (320, 480)])
def test_photographs_stay_near_the_whole(size):
    root = Path(os.environ["UNETLIB_DATA"], "carvana")
    if not root.is_dir():
        pytest.skip(f"there is no {root}")
    dataset = CarvanaDataset(root / "val", root / "val_masks").subset([0, 40, 80])
    whole = dataset.subset(range(3))
    whole.transform = Resize(size)
    cached = CachedDataset(dataset, size)
    for index in range(3):
        image, mask = cached[index]
        assert (image.float() - whole[index][0].float()).abs().mean() < 0.6  # of 255; the most that was found is 0.37
        assert (mask - whole[index][1]).abs().max() <= 0.5 / 255 + 1e-6


@pytest.mark.parametrize(("values", "dtype"), [((0, 100, 200), torch.uint8), ({0: 0, 100: 300, 200: 7}, torch.int64)])
@pytest.mark.parametrize("size", [None, (10, 15)])
def test_classes_stay_exact(tmp_path, values, dtype, size):
    index = np.random.default_rng(2).integers(0, 3, (30, 45))
    Image.fromarray((index * 100).astype(np.uint8)).save(tmp_path / "x_mask.png")
    Image.new("RGB", (45, 30)).save(tmp_path / "x.png")
    options = {"mask_suffix": "_mask", "mask_values": values}
    expected = ImageMaskDataset(tmp_path, tmp_path, Resize(size or (30, 45)), **options)[0][1]
    cached = CachedDataset(ImageMaskDataset(tmp_path, tmp_path, **options), size)
    for _ in range(2):
        mask = cached[0][1]
        assert mask.dtype == dtype
        assert torch.equal(mask.long(), expected)


def test_grey_pictures(folders):
    plain = ImageMaskDataset(*folders, mask_suffix="_mask", mode="L")
    cached = CachedDataset(plain)
    for _ in range(2):
        assert_equal(cached[2][0][0:1], torch.from_numpy(plain[2][0]).permute(2, 0, 1))


def test_pictures_that_exif_turns(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("x.jpg", "y.tif", "z.png"):
        Image.fromarray(np.arange(24 * 48, dtype=np.uint8).reshape(24, 48)).save(tmp_path / name, exif=exif)
        Image.new("L", (24, 48), 1).save(tmp_path / f"{name[0]}_mask.png")
    for size in (None, (12, 6)):
        cached = CachedDataset(ImageMaskDataset(tmp_path, tmp_path, mask_suffix="_mask"), size)
        for index in (0, 1, 2, 0, 1, 2):
            assert cached[index][0].shape[1:] == cached[index][1].shape == (size or (48, 24))


def test_the_transform_is_called_afresh_on_copies(folders):
    def spoiling(picture, target):
        calls.append(picture.clone())
        return picture.zero_(), target.zero_()

    calls: list[torch.Tensor] = []
    cached = CachedDataset(CarvanaDataset(*folders), transform=spoiling)
    assert not cached[0][0].any()
    cached[0], cached[0]
    assert len(calls) == 3
    assert torch.equal(calls[0], calls[1])
    assert torch.equal(calls[1], calls[2])
    assert calls[0].any()


def test_presets_take_masks_as_bits(folders):
    cached = CachedDataset(CarvanaDataset(*folders), transform=eval_transform(SMALL))
    plain = CarvanaDataset(*folders, eval_transform(SMALL))
    for index in range(4):
        assert_equal(cached[index], plain[index])
    options = {"scale": (0.8, 1.2), "elastic": 2.0, "quarter_turns": True, "reflect": True}
    cached.transform = train_transform(size=None, **options)
    image, mask = cached[0]
    assert mask.dtype == torch.bool
    assert image.shape[1:] == mask.shape == SIZES[0]


@pytest.mark.parametrize("size", [None, SMALL])
def test_albumentations_get_arrays_by_keyword(folders, size):
    A = pytest.importorskip("albumentations")
    pipeline = A.Compose([A.Resize(height=20, width=30), A.HorizontalFlip(p=1.0)])
    cached = CachedDataset(CarvanaDataset(*folders), size, transform=pipeline)
    plain = CachedDataset(CarvanaDataset(*folders), size)
    for index in range(4):
        image, mask = plain[index]
        expected = pipeline(image=image.permute(1, 2, 0).numpy(), mask=mask.float().numpy())
        assert_equal(cached[index], (expected["image"], expected["mask"]))
        assert cached[index][1].dtype == np.float32


# --- the budget


def room(cached: CachedDataset) -> str:
    return repr(cached).partition("room for ")[2]


def test_masks_come_first_and_what_does_not_fit_is_decoded_each_time(folders):
    pixels = SMALL[0] * SMALL[1]
    whole = CachedDataset(CarvanaDataset(*folders), SMALL)
    for budget, expected in (
        (0, "0 pictures and 0 masks"),
        (2 * pixels, "0 pictures and 2 masks"),
        (4 * pixels + 3 * pixels, "1 pictures and 4 masks"),
        (4 * pixels + 6 * pixels - 1, "1 pictures and 4 masks"),
        (16 * pixels, "4 pictures and 4 masks"),
    ):
        cached = CachedDataset(CarvanaDataset(*folders), SMALL, budget_gib=budget / 2**30)
        assert room(cached) == expected
        for _ in range(2):
            for index in range(4):
                assert_equal(cached[index], whole[index])
    bits = sum(-(-height * width // 8) for height, width in SIZES)
    assert room(CachedDataset(CarvanaDataset(*folders), budget_gib=bits / 2**30)) == "0 pictures and 4 masks"
    assert room(CachedDataset(CarvanaDataset(*folders), budget_gib=(bits - 1) / 2**30)) == "0 pictures and 3 masks"


def test_what_is_not_kept_is_read_again(folders):
    cached = CachedDataset(CarvanaDataset(*folders), SMALL, budget_gib=4 * SMALL[0] * SMALL[1] / 2**30)
    before = [cached[i] for i in range(4)]
    for path in folders[1].iterdir():
        path.write_bytes(b"masks are kept")
    assert_equal(cached[0], before[0])
    Image.new("RGB", (60, 40)).save(folders[0] / "a_00.jpg")
    assert not cached[0][0].any()


def test_a_pair_that_has_another_size_by_now_is_read_each_time(folders):
    cached = CachedDataset(CarvanaDataset(*folders))
    for size in ((9, 7), (90, 70)):
        Image.new("RGB", size, "white").save(folders[0] / "a_00.jpg")
        Image.new("L", size, 1).save(folders[1] / "a_00_mask.gif")
        image, mask = cached[0]
        assert image.shape[1:] == mask.shape == size[::-1]
        assert image.min() > 250
        assert mask.all()


def test_a_small_disk_is_a_smaller_budget(folders, monkeypatch, caplog):
    pixels = SMALL[0] * SMALL[1]
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("usage", (), {"free": 3 * pixels * 10 // 9 + 1}))
    with caplog.at_level(logging.WARNING, "unetlib"):
        cached = CachedDataset(CarvanaDataset(*folders), SMALL)
    assert room(cached) == "0 pictures and 3 masks"
    assert "the rest is decoded each time" in caplog.text


@pytest.mark.skipif(sys.platform != "linux", reason="knows Linux's kind alone")
def test_a_folder_in_memory_takes_half_of_what_is_free(folders, monkeypatch):
    pixels = SMALL[0] * SMALL[1]
    monkeypatch.setattr("unetlib.cache.available_memory", lambda: 2 * 7 * pixels)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("usage", (), {"free": 2**30}))
    assert room(CachedDataset(CarvanaDataset(*folders), SMALL, folder="/dev/shm")) == "1 pictures and 4 masks"
    assert not _is_memory("/proc")
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("usage", (), {"free": 3 * pixels * 10 // 9 + 1}))
    assert room(CachedDataset(CarvanaDataset(*folders), SMALL, folder="/dev/shm")) == "0 pictures and 3 masks"


def test_the_folder_is_where_the_file_lies_and_nothing_stays(folders, tmp_path):
    where = tmp_path / "cache"
    where.mkdir()
    cached = CachedDataset(CarvanaDataset(*folders), SMALL, folder=where)
    assert os.stat(cached._store._file.fileno()).st_dev == where.stat().st_dev
    if sys.platform == "linux":
        assert not list(where.iterdir())
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", ResourceWarning)
        del cached
        gc.collect()
    assert not told
    assert not list(where.iterdir())
    with pytest.raises(FileNotFoundError, match=r"no folder '.*nowhere'"):
        CachedDataset(CarvanaDataset(*folders), folder=tmp_path / "nowhere")


def test_a_limit_that_disks_do_not_tell_of_is_named(folders, tmp_path):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))
    try:
        with pytest.raises(OSError, match=rf"room for 0\.01 GiB .* in {re.escape(str(tmp_path))} \(.*\); give folder= .*_gib"):
            CachedDataset(CarvanaDataset(*folders), (800, 1200), folder=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


# --- processes


@pytest.mark.parametrize("context", ["fork", "spawn"])
@pytest.mark.skipif(sys.platform != "linux", reason="sharing is promised for fork and spawn on Linux alone")
def test_workers_share_what_they_decode(folders, context):
    cached = CachedDataset(CarvanaDataset(*folders), SMALL)
    expected = [cached[0]]
    loader = DataLoader(cached, batch_size=4, num_workers=1, multiprocessing_context=context)
    images, masks = next(iter(loader))
    assert torch.equal(images[0], expected[0][0])
    spoil(folders)  # from now on this process and new workers know only what the first worker has kept
    for index in range(4):
        assert_equal(cached[index], (images[index], masks[index]))
    if context == "fork":  # the other way takes as long as importing torch does
        assert_equal(next(iter(loader)), (images, masks))


def test_a_copy_out_of_reach_of_the_file_decodes_each_time(folders, caplog):
    cached = CachedDataset(CarvanaDataset(*folders), SMALL)
    expected = cached[0]
    near = pickle.loads(pickle.dumps(cached))
    assert room(near) == room(cached)
    if sys.platform == "linux":
        far, number = pickle.dumps(cached), cached._store._file.fileno()
        del cached, near
        gc.collect()
        assert room(pickle.loads(far)) == "0 pictures and 0 masks"
        with open(folders[0].parent / "other", "w+b", buffering=0) as other:
            other.write(bytes(10_000))
            assert other.fileno() == number  # the lowest that is free
            late = pickle.loads(far)
        assert room(late) == "0 pictures and 0 masks"
        assert "each is decoded each time" in caplog.text
        assert_equal(late[0], expected)


def test_several_at_once(folders):
    both = ConcatDataset([CachedDataset(CarvanaDataset(*folders), SMALL), CachedDataset(CarvanaDataset(*folders), SMALL)])
    assert_equal(both[1], both[5])
    images, masks = next(iter(DataLoader(both, batch_size=8)))
    assert (images.shape, masks.shape) == ((8, 3, *SMALL), (8, *SMALL))


# --- bad input


def test_bad_pairs_are_named(folders):
    cached = CachedDataset(CarvanaDataset(*folders), SMALL)
    Image.new("L", (3, 2)).save(folders[1] / "a_00_mask.gif")
    (folders[0] / "a_01.jpg").write_bytes(b"x")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"a_00\.jpg is 60x40, but its mask .*a_00_mask\.gif is 3x2"):
            cached[0]
        with pytest.raises(ValueError, match=r"a_01\.jpg cannot be read"):
            cached[1]


def test_wrong_arguments(folders):
    dataset = CarvanaDataset(*folders)
    with pytest.raises(TypeError, match=r"must be an ImageMaskDataset, not a list$"):
        CachedDataset([dataset])
    with pytest.raises(TypeError, match=r"must be an ImageMaskDataset, not a Subset; take dataset\.subset\(indices\)"):
        CachedDataset(Subset(dataset, [0]))
    with pytest.raises(TypeError, match="transform must be callable"):
        CachedDataset(dataset, transform=SMALL)
    with pytest.raises(TypeError, match="function does not take a picture and its mask; give a preset"):
        CachedDataset(dataset, transform=lambda image: image)
    with pytest.raises(TypeError, match=r"one picture at a time, not slice\(0, 2, None\); dataset\.subset"):
        CachedDataset(dataset)[0:2]
    for size in ((16,), 16):
        with pytest.raises(TypeError, match=r"must be a pair \(height, width\)"):
            CachedDataset(dataset, size)
    assert "room for 4 pictures" in repr(CachedDataset(dataset, (4, 4), budget_gib=math.inf))
    with pytest.raises(ValueError, match="budget_gib must be 0 or more, not -1"):
        CachedDataset(dataset, budget_gib=-1)
    with pytest.raises(ValueError, match=r"CachedDataset\(transform=\.\.\.\)"):
        CachedDataset(CarvanaDataset(*folders, eval_transform()))
