from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2

from unetlib.transforms import Resize, eval_transform, train_transform


def disc(height: int, width: int) -> torch.Tensor:
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    return ((y - 0.4 * height) ** 2 + (x - 0.6 * width) ** 2 < (0.25 * height) ** 2).float()


def centre(mask: torch.Tensor) -> tuple[float, float]:
    """Centre of mass in parts of height and width."""
    mask = mask.double()
    y = (torch.arange(mask.shape[0]) + 0.5) / mask.shape[0]
    x = (torch.arange(mask.shape[1]) + 0.5) / mask.shape[1]
    return ((mask.sum(1) * y).sum() / mask.sum()).item(), ((mask.sum(0) * x).sum() / mask.sum()).item()


def pair(height: int = 90, width: int = 135) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
    """A picture that shows its own mask."""
    mask = disc(height, width)
    return tv_tensors.Image((mask * 255).to(torch.uint8).expand(3, -1, -1)), tv_tensors.Mask(mask)


# --- Resize


@pytest.mark.parametrize("size", [(27, 41), (18, 27), (45, 45), (200, 300)])
def test_the_mask_stays_where_the_picture_is(size):
    image, mask = pair()
    small_image, small_mask = Resize(size)(image, mask)
    assert small_image.shape == (3, *size)
    assert small_mask.shape == size
    assert type(small_image) is tv_tensors.Image
    assert type(small_mask) is tv_tensors.Mask
    assert centre(small_mask) == pytest.approx(centre(mask), abs=1e-4)
    assert (small_image[0] / 255 - small_mask).abs().max() < 0.01


def test_torchvisions_own_rule_shifts_the_mask():
    # The reason for this class; when this fails, torchvision's Resize will do.
    mask = pair()[1]
    shifted = centre(v2.Resize((18, 27))(mask))
    assert shifted[0] - centre(mask)[0] > 0.5 / 90
    assert shifted[1] - centre(mask)[1] > 0.5 / 135


def test_a_float_mask_is_the_covered_part_of_each_pixel():
    mask = torch.tensor([[0.0, 0, 1, 1], [0, 0, 1, 1], [0, 1, 1, 1], [1, 1, 1, 1]])
    resized = Resize((2, 2))(tv_tensors.Mask(mask))
    pillow = Image.fromarray(mask.numpy()).resize((2, 2), Image.Resampling.BILINEAR)
    torch.testing.assert_close(resized.as_subclass(torch.Tensor), torch.from_numpy(np.array(pillow)))
    assert 0 < resized[0, 0] < resized[1, 0] < 1


def test_the_range_of_a_float_mask_is_kept():
    full = Resize((53, 79))(tv_tensors.Mask(torch.ones(430, 643)))
    assert (full == 1).all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_integer_masks_take_the_middle_pixel(dtype):
    labels = torch.arange(81).reshape(9, 9).to(dtype)
    resized = Resize((3, 3))(tv_tensors.Mask(labels))
    assert resized.dtype == dtype
    assert resized.tolist() == labels[1::3, 1::3].tolist()


def test_stacked_masks_and_single_tensors():
    masks = torch.stack([disc(30, 30), 1 - disc(30, 30)])
    resized = Resize((10, 10))(tv_tensors.Mask(masks))
    assert resized.shape == (2, 10, 10)
    torch.testing.assert_close(resized.sum(0).as_subclass(torch.Tensor), torch.ones(10, 10))
    assert Resize((10, 20))(torch.zeros(3, 30, 30)).shape == (3, 10, 20)


@pytest.mark.parametrize("size", [(10,), (10, 0), (10, 2.5), (1, 2, 3)])
def test_sizes_that_cannot_be(size):
    with pytest.raises(ValueError, match=r"size must be \(height, width\)"):
        Resize(size)


# --- presets


def test_eval_is_resize_and_scale():
    image, mask = pair()
    out, out_mask = eval_transform((30, 45))(image, mask)
    assert type(out) is type(out_mask) is torch.Tensor
    assert out.dtype == out_mask.dtype == torch.float32
    small_image, small_mask = Resize((30, 45))(image, mask)
    torch.testing.assert_close(out, small_image.as_subclass(torch.Tensor) / 255)
    torch.testing.assert_close(out_mask, small_mask.as_subclass(torch.Tensor))


def test_size_none_keeps_each_size_and_the_default_is_the_studys():
    for preset in (eval_transform, train_transform):
        assert preset(None)(*pair(20, 31))[0].shape == (3, 20, 31)
        assert preset()(*pair(20, 31))[0].shape == (3, 160, 240)


def test_class_masks_stay_class_masks():
    image, mask = pair()
    for preset in (eval_transform, train_transform):
        labels = preset((30, 45))(image, tv_tensors.Mask(mask.long() * 7))[1]
        assert labels.dtype == torch.int64
        assert set(labels.unique().tolist()) == {0, 7}


def test_mean_and_std():
    image = tv_tensors.Image(torch.tensor([0, 51, 255], dtype=torch.uint8)[:, None, None].expand(3, 4, 4))
    mask = tv_tensors.Mask(torch.ones(4, 4))
    for preset in (
        eval_transform((4, 4), mean=(0.5, 0.2, 0), std=(0.5, 1, 2)),
        train_transform((4, 4), rotation=0, mean=(0.5, 0.2, 0), std=(0.5, 1, 2)),
    ):
        out, out_mask = preset(image, mask)
        torch.testing.assert_close(out[:, 0, 0], torch.tensor([-1.0, 0.0, 0.5]))
        assert (out_mask == 1).all()
    with pytest.raises(ValueError, match=r"mean and std go together, but mean=\(0,\)"):
        eval_transform(mean=(0,))


def test_without_options_train_is_eval():
    plain = train_transform((30, 45), rotation=0, horizontal_flip=0, vertical_flip=0)
    for left, right in zip(plain(*pair()), eval_transform((30, 45))(*pair()), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize(("option", "axis"), [("horizontal_flip", -1), ("vertical_flip", -2)])
def test_flips(option, axis):
    off = {"rotation": 0, "horizontal_flip": 0, "vertical_flip": 0}
    flipped = train_transform((30, 45), **(off | {option: 1.0}))(*pair())
    for left, right in zip(flipped, eval_transform((30, 45))(*pair()), strict=True):
        assert torch.equal(left, right.flip(axis))


def test_rotation_turns_picture_and_mask_together_within_its_limit():
    torch.manual_seed(0)
    transform = train_transform((60, 60), rotation=20, horizontal_flip=0, vertical_flip=0)
    start = np.array(centre(eval_transform((60, 60))(*pair(60, 60))[1])) - 0.5
    angles = []
    for _ in range(30):
        image, mask = transform(*pair(60, 60))
        assert (image[0] - mask).abs().mean() < 0.02
        now = np.array(centre(mask)) - 0.5
        angles.append(np.degrees(np.arctan2(*now) - np.arctan2(*start)))
    assert -21 < min(angles) < -10 < 10 < max(angles) < 21


def test_color_jitter_changes_the_picture_alone():
    torch.manual_seed(0)
    image = tv_tensors.Image(torch.full((3, 8, 8), 100, dtype=torch.uint8))
    transform = train_transform((8, 8), rotation=0, horizontal_flip=0, vertical_flip=0, color_jitter=0.2)
    means = []
    for _ in range(20):
        out, mask = transform(image, tv_tensors.Mask(torch.ones(8, 8)))
        means.append(out.mean().item() * 255)
        assert (mask == 1).all()
    assert 79 <= min(means) < 95 < 105 < max(means) <= 121


@pytest.mark.parametrize("option", [{"rotation": -1}, {"horizontal_flip": 2}, {"vertical_flip": -1}, {"color_jitter": -1}])
def test_options_out_of_range(option):
    with pytest.raises(ValueError):
        train_transform(**option)
