from __future__ import annotations

import io
import math
import pickle
from functools import partial
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2

from unetlib.transforms import (
    Mirrored,
    PerPicture,
    RandomAffine,
    RandomCrop,
    RandomElastic,
    RandomLowResolution,
    RandomQuarterTurn,
    Resize,
    _as_jpeg,
    eval_transform,
    seeded,
    train_transform,
)

PLAIN = {"rotation": 0, "horizontal_flip": 0, "vertical_flip": 0}


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


@pytest.mark.parametrize(
    "transform",
    [RandomCrop((20, 30), (0.25, 0.5)), RandomElastic(5.0), RandomQuarterTurn(), RandomLowResolution(1.0)],
)
def test_chance_is_drawn_on_the_cpu_whatever_the_default_device(transform):
    images, masks = (part.as_subclass(torch.Tensor)[None] for part in pair())
    steps = PerPicture(v2.Compose([eval_transform(size=None), transform]))
    expected = steps(images, masks, seeds=[3])
    with torch.device("meta"):
        found = steps(images, masks, seeds=[3])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


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


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("last", [False, True])
def test_a_single_column_keeps_its_rows_in_order(channels, last):
    torch.manual_seed(0)
    pixels = torch.randint(256, (channels, 40, 5), dtype=torch.uint8)
    pixels = pixels.permute(1, 2, 0).contiguous().permute(2, 0, 1) if last else pixels
    for height in (1, 7, 60):
        column = Resize((height, 1))(tv_tensors.Image(pixels))
        assert (type(column), column.dtype) == (tv_tensors.Image, torch.uint8)
        bands = [Image.fromarray(band.float().numpy()).resize((1, height), Image.Resampling.BILINEAR) for band in pixels]
        expected = torch.from_numpy(np.stack(bands))
        torch.testing.assert_close(column.float().as_subclass(torch.Tensor), expected, rtol=0, atol=0.51)
        for kind in (tv_tensors.Image, tv_tensors.Mask):
            floats = Resize((height, 1))(kind(pixels / 255)).as_subclass(torch.Tensor)
            torch.testing.assert_close(floats, expected / 255, rtol=0, atol=1e-6)
    narrow = RandomLowResolution(1.0, (0.2, 0.2))(tv_tensors.Image(pixels))
    floats = RandomLowResolution(1.0, (0.2, 0.2))(tv_tensors.Image(pixels.float() / 255))
    torch.testing.assert_close(narrow.float() / 255, floats.as_subclass(torch.Tensor), rtol=0, atol=1.1 / 255)


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


@pytest.mark.parametrize("size", [(1, 1), (3, 700), (97, 131), (299, 211), (300, 200), (301, 200), (640, 90)])
@pytest.mark.parametrize("soft", [False, True])
def test_a_large_mask_is_reduced_as_pytorch_does(size, soft):
    torch.manual_seed(0)
    mask = torch.rand(601, 443) if soft else torch.rand(601, 443) > 0.5
    resized = Resize(size)(tv_tensors.Mask(mask)).as_subclass(torch.Tensor)
    expected = torch.nn.functional.interpolate(mask[None, None].float(), size, mode="bilinear", antialias=True)[0, 0]
    torch.testing.assert_close(resized, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("default", [torch.float64, torch.float16])
def test_a_large_mask_is_reduced_alike_whatever_the_default_type(default):
    mask = torch.rand(601, 443)
    expected = Resize((97, 131))(tv_tensors.Mask(mask)).as_subclass(torch.Tensor)
    torch.set_default_dtype(default)
    try:
        resized = Resize((97, 131))(tv_tensors.Mask(mask)).as_subclass(torch.Tensor)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(resized, expected, rtol=0, atol=0)


def test_the_range_of_a_float_mask_is_kept():
    for size in ((53, 79), (230, 79)):
        full = Resize(size)(tv_tensors.Mask(torch.ones(430, 643)))
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


@pytest.mark.parametrize(
    ("size", "error"),
    [(10, TypeError), ((10,), TypeError), ((10, 0), ValueError), ((10, 2.5), TypeError), ((1, 2, 3), TypeError)],
)
def test_sizes_that_cannot_be(size, error):
    for make in (Resize, lambda size: RandomCrop(size, (0.5, 1)), train_transform, eval_transform):
        with pytest.raises(error, match="size="):
            make(size)
    assert Resize((np.int64(10), 20)).size == [10, 20]


def test_bool_masks_are_shares_too():
    mask = pair()[1]
    bits = Resize((18, 27))(tv_tensors.Mask(mask.bool()))
    assert bits.dtype == torch.float32
    assert torch.equal(bits, Resize((18, 27))(mask))


# --- RandomCrop


def test_a_crop_keeps_picture_and_mask_together_and_covers_the_asked_share():
    torch.manual_seed(0)
    ramp = torch.linspace(0, 1, 200)
    y, x = ramp[:100, None].expand(100, 200) * 2, ramp.expand(100, 200)
    shares = []
    for _ in range(40):
        image, mask = RandomCrop((50, 100), area=(0.25, 0.64))(
            tv_tensors.Image(torch.stack([y, x])), tv_tensors.Mask(x.clone())
        )
        assert (image[1] - mask).abs().max() < 1e-6
        tall, wide = (image[0].max() - image[0].min()).item(), (image[1].max() - image[1].min()).item()
        assert tall == pytest.approx(wide, abs=0.05)  # of the result's shape
        shares.append(tall * wide)
    assert 0.2 < min(shares) < 0.35
    assert 0.5 < max(shares) < 0.66


def test_a_crop_of_all_is_a_resize():
    for left, right in zip(RandomCrop((30, 45), area=(1.0, 1.0))(*pair()), Resize((30, 45))(*pair()), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("shape", [(100, 400), (400, 100)])
def test_a_crop_of_another_shape_than_the_picture_sees_all_of_it(shape):
    torch.manual_seed(0)
    crop, picture = RandomCrop((50, 50), (0.7, 1.0)), tv_tensors.Image(torch.zeros(1, *shape))
    parts = [crop.make_params([picture]) for _ in range(300)]
    assert {(part["height"], part["width"]) for part in parts} == {(100, 100)}  # 0.7 does not fit: the largest square
    places = [part["top"] + part["left"] for part in parts]
    assert min(places) <= 10
    assert max(places) >= 290
    assert abs(np.mean(places) - 150) < 20
    assert crop(picture).shape == (1, 50, 50)


def test_a_part_of_another_shape_lies_within_the_picture_and_is_a_pixel_or_more():
    tall, dot = torch.zeros(1, 48, 32), (1e-9, 1e-9)
    part = RandomCrop((16, 24), (1.0, 1.0)).make_params([tall])
    assert (part["height"], part["width"], part["left"]) == (21, 32, 0)  # half as wide again as it is high
    part = RandomCrop((16, 24), dot).make_params([tall])
    assert (part["height"], part["width"]) == (1, 1)


@pytest.mark.parametrize("area", [0.5, (0.5,), (0, 1), (0.6, 0.5), (0.5, 1.1)])
def test_areas_that_cannot_be(area):
    with pytest.raises(ValueError, match="area must be"):
        RandomCrop((10, 10), area)
    with pytest.raises(ValueError, match="crop must be"):
        train_transform((10, 10), crop=area)
    with pytest.raises(ValueError, match="size=None"):
        train_transform(None, crop=(0.5, 1.0))


# --- RandomLowResolution


def test_low_resolution_takes_detail_and_leaves_the_mask():
    torch.manual_seed(0)
    image, mask = tv_tensors.Image(torch.randint(256, (3, 60, 90), dtype=torch.uint8)), pair(60, 90)[1]
    for _ in range(5):
        coarse, same = RandomLowResolution(p=1.0, factor=(0.2, 0.5))(image, mask)
        assert coarse.shape == image.shape
        assert coarse.float().std() < 0.6 * image.float().std()
        assert torch.equal(same, mask)
    assert torch.equal(RandomLowResolution(p=0.0)(image), image)
    changed = sum(not torch.equal(RandomLowResolution(p=0.3)(image), image) for _ in range(200))
    assert 40 < changed < 80
    with pytest.raises(ValueError, match=r"p must be from 0 to 1, not 1\.1"):
        RandomLowResolution(p=1.1)
    with pytest.raises(ValueError, match=r"jpeg must be from 0 to 1, not 1\.1"):
        RandomLowResolution(p=1.0, jpeg=1.1)


def test_a_pixel_is_left_of_the_smallest_picture():
    image = tv_tensors.Image(torch.rand(3, 2, 1))
    for jpeg in (0.0, 1.0):
        assert RandomLowResolution(p=1.0, factor=(0.2, 0.2), jpeg=jpeg)(image).shape == image.shape


def test_small_jpegs_of_hard_edges_stay_within_black_and_white():
    edge = torch.zeros(1, 64, 64)
    edge[..., 32:] = 1
    for image in (edge, (255 * edge).to(torch.uint8)):
        stored = RandomLowResolution(p=1.0, factor=(0.5, 0.5), jpeg=1.0)(tv_tensors.Image(image))
        assert (v2.functional.to_dtype(stored, torch.float32, scale=True) - edge).abs().mean() < 0.02


def test_a_jpeg_of_one_grey_is_that_grey_rounded():
    for grey, expected in ((0.0, 0), (99.6 / 255, 100), (1.0, 255)):
        assert (_as_jpeg(torch.full((1, 16, 16), grey), 95) == expected).all()


def test_a_jpeg_has_its_share_at_any_probability():
    torch.manual_seed(0)
    drawn = [RandomLowResolution(p=1.0, jpeg=0.9).make_params([])["quality"] for _ in range(200)]
    assert 160 < sum(quality is not None for quality in drawn) < 196


def test_low_resolution_halves_as_often_at_any_scale():
    torch.manual_seed(0)
    transform = RandomLowResolution(p=1.0, factor=(0.125, 1.0))
    factors = [transform.make_params([])["factor"] for _ in range(300)]
    for most in (0.25, 0.5, 1.0):  # three halvings
        assert 70 < sum(most / 2 <= factor <= most for factor in factors) < 130


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.float32])
@pytest.mark.parametrize("channels", [1, 3])
def test_small_jpegs_are_those_of_pillow(channels, dtype):
    torch.manual_seed(0)
    smooth = torch.nn.functional.interpolate(torch.rand(1, channels, 24, 36), (96, 144), mode="bicubic").clamp(0, 1)[0]
    pixels = (smooth * 255).round().to(torch.uint8)
    transform = RandomLowResolution(p=1.0, factor=(0.25, 0.25), jpeg=1.0)
    image, mask = tv_tensors.Image(v2.functional.to_dtype(pixels, dtype, scale=True)), pair(96, 144)[1]
    params = transform.make_params([image]) | {"quality": 80}
    picture = Image.fromarray(pixels.permute(1, 2, 0).squeeze(-1).numpy())
    stored = io.BytesIO()
    picture.resize((36, 24), Image.Resampling.BICUBIC).save(stored, "JPEG", quality=params["quality"])
    expected = np.asarray(Image.open(stored).resize((144, 96), Image.Resampling.BILINEAR), dtype=np.float32)
    result = transform.transform(image, params)
    assert (type(result), result.dtype) == (tv_tensors.Image, dtype)
    enlarged = {"small": result, "unstored": transform.transform(image, params | {"quality": None})}
    apart = {
        name: np.abs(
            255 * v2.functional.to_dtype(pixels, torch.float32, scale=True).permute(1, 2, 0).squeeze(-1).numpy() - expected
        )
        for name, pixels in enlarged.items()
    }
    assert apart["small"].mean() < apart["unstored"].mean() / 3
    assert torch.equal(transform(image, mask)[1], mask)


def test_small_jpegs_are_a_share_of_what_is_reduced():
    torch.manual_seed(0)
    transform = RandomLowResolution(p=0.5, jpeg=0.5)
    drawn = [transform.make_params([]) for _ in range(400)]
    qualities = [params["quality"] for params in drawn if params["quality"]]
    assert 70 < len(qualities) < 130
    assert 50 <= min(qualities) < 60
    assert 85 < max(qualities) <= 95
    assert not any(params["quality"] for params in drawn if params["factor"] == 1.0)
    assert not any(RandomLowResolution(p=1.0).make_params([])["quality"] for _ in range(20))


@pytest.mark.parametrize("factor", [(0.0, 1.0), (0.5, 0.2), (0.5, 1.5)])
def test_factors_of_low_resolution_that_cannot_be(factor):
    with pytest.raises(ValueError, match="factor must be"):
        RandomLowResolution(p=0.5, factor=factor)


# --- RandomAffine


@pytest.mark.parametrize("scale", [None, (0.6, 1.6)])
@pytest.mark.parametrize("shape", [(37, 52), (160, 90)])
def test_turns_are_those_of_torchvision(shape, scale):
    """The same numbers are drawn; pictures within a level, and masks but for pixels that lie halfway between two."""
    image = tv_tensors.Image(torch.randint(256, (3, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)))
    mask = tv_tensors.Mask(disc(*shape))
    theirs = v2.RandomAffine(35, scale=scale, interpolation=v2.InterpolationMode.BILINEAR, fill=None)
    ours = RandomAffine(35, scale)
    for seed in range(6):
        for picture in (image, image / 255, image.permute(1, 2, 0).contiguous().permute(2, 0, 1)):
            torch.manual_seed(seed)
            expected, expected_mask = theirs(tv_tensors.Image(picture), mask)
            torch.manual_seed(seed)
            turned, turned_mask = ours(tv_tensors.Image(picture), mask)
            assert type(turned) is tv_tensors.Image
            assert type(turned_mask) is tv_tensors.Mask
            assert turned.dtype == picture.dtype
            assert (turned.double() - expected.double()).abs().max() <= (1 if picture.dtype == torch.uint8 else 1e-3)
            assert (turned != expected).float().mean() < 0.01 or picture.is_floating_point()
            assert (turned_mask != expected_mask).sum() <= 3
            assert not torch.equal(turned, picture)


def test_a_quarter_turn_moves_each_pixel_and_stacks_turn_as_one():
    turn = RandomAffine(0)
    turn.degrees = (90.0, 90.0)  # of a square, clockwise
    for dtype in (torch.uint8, torch.float32, torch.float64, torch.int64, torch.bool):
        masks = tv_tensors.Mask(torch.arange(2 * 81).reshape(2, 9, 9).remainder(2 if dtype == torch.bool else 162).to(dtype))
        turned = turn(masks)
        assert turned.dtype == dtype
        assert torch.equal(turned, masks.rot90(-1, (1, 2)))
    images = torch.randint(256, (4, 3, 9, 9), dtype=torch.uint8)
    assert torch.equal(turn(tv_tensors.Image(images)), tv_tensors.Image(images.rot90(-1, (2, 3))))


# --- RandomElastic


def test_bends_have_the_asked_strength_and_picture_and_mask_go_together():
    torch.manual_seed(0)
    height, width = 100, 150
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    where = torch.stack([y, x]).float()
    moves = []
    for _ in range(150):
        params = RandomElastic(sigma=3.0).make_params([where])
        bent = RandomElastic().transform(tv_tensors.Image(where), params)
        mask = RandomElastic().transform(tv_tensors.Mask(x.float()), params)
        inside = (slice(20, -20), slice(20, -20))  # where nothing comes from outside
        assert (bent[1] - mask)[inside].abs().max() < 0.51  # the mask takes the nearest pixel
        moves.append((bent - where)[:, 48:52, 73:77].mean((1, 2)))  # about the grid's middle point
    spread = torch.stack(moves).std(0)
    assert 2.4 < spread[0] < 3.6
    assert 2.4 < spread[1] < 3.6


def test_bends_are_those_of_torchvision():
    torch.manual_seed(0)
    image, mask = pair(40, 60)
    params = RandomElastic(sigma=3.0).make_params([image])
    displacement = params["grid"] - RandomElastic(sigma=0.0).make_params([image])["grid"]
    bent, bent_mask = (RandomElastic().transform(inpt, params) for inpt in (image, mask))
    assert (bent.int() - v2.functional.elastic(image, displacement).int()).abs().max() <= 1
    assert (bent_mask != v2.functional.elastic(mask, displacement)).sum() <= 2


@pytest.mark.parametrize("points", [2, 3])
def test_bends_are_those_of_their_grid_from_corner_to_corner(points):
    image, seed = torch.zeros(1, 41, 61), 5
    torch.manual_seed(seed)
    params = RandomElastic(2.0, points).make_params([image])
    torch.manual_seed(seed)
    drawn = 2 * torch.randn(2, points, points)
    moved = params["grid"] - RandomElastic(0.0).make_params([image])["grid"]
    x, y = (moved[0] * torch.tensor([61, 41]) / 2).movedim(-1, 0)  # in pixels
    for found, expected in ((x, drawn[0]), (y, drawn[1])):
        torch.testing.assert_close(found[:: 40 // (points - 1), :: 60 // (points - 1)], expected)
    with pytest.raises(ValueError, match="grid=1 must be 2 or more"):
        RandomElastic(grid=1)


def test_no_strength_bends_nothing_and_labels_stay_labels():
    image, mask = pair()
    same_image, same_mask = RandomElastic(sigma=0.0)(image, mask)
    assert torch.equal(same_image, image)
    assert torch.equal(same_mask, mask)
    for labels in (mask.bool(), (mask * 7).to(torch.uint8), (mask * 7).long()):
        bent = RandomElastic(sigma=5.0)(tv_tensors.Mask(labels))
        assert bent.dtype == labels.dtype
        assert set(bent.unique().tolist()) <= set(labels.unique().tolist())
    for options, message in (
        ({"sigma": -1.0}, "sigma must be 0"),
        ({"sigma": math.nan}, "not nan"),
        ({"grid": 1}, "grid=1 must"),
    ):
        with pytest.raises(ValueError, match=message):
            RandomElastic(**options)


# --- RandomQuarterTurn


@pytest.mark.parametrize(("shape", "turns"), [((6, 6), (0, 1, 2, 3)), ((4, 6), (0, 2))])
def test_quarter_turns_are_exact_and_alike_for_the_mask(shape, turns):
    torch.manual_seed(0)
    values = torch.arange(shape[0] * shape[1]).reshape(shape)
    expected = {tuple(values.rot90(k).flatten().tolist()) for k in turns}
    seen = set()
    for _ in range(40):
        image, mask = RandomQuarterTurn()(tv_tensors.Image(values[None].to(torch.uint8)), tv_tensors.Mask(values))
        assert torch.equal(image[0].long(), mask)
        assert mask.shape == shape
        seen.add(tuple(mask.flatten().tolist()))
    assert seen == expected


# --- Mirrored


def test_what_comes_from_outside_is_the_mirror_image():
    """Against NumPy's reflection, turned by the same angle and cut out of the middle."""
    image = tv_tensors.Image(torch.randint(256, (3, 40, 60), dtype=torch.uint8))
    mask = tv_tensors.Mask(torch.arange(2400).reshape(40, 60))
    turn = v2.RandomRotation((30, 30))
    turned, turned_mask = Mirrored(turn, rotation=30)(image, mask)
    wide = np.pad(np.asarray(image), ((0, 0), (39, 39), (39, 39)), mode="reflect")
    expected = v2.functional.rotate(tv_tensors.Image(torch.from_numpy(wide)), 30)[:, 39:79, 39:99]
    assert turned.shape == image.shape
    assert torch.equal(turned, expected)
    expected_mask = v2.functional.rotate(torch.from_numpy(np.pad(np.asarray(mask), 39, mode="reflect"))[None], 30)
    assert torch.equal(turned_mask, tv_tensors.Mask(expected_mask[0, 39:79, 39:99]))


@pytest.mark.parametrize("shape", [(40, 40), (40, 60)])
@pytest.mark.parametrize(
    "options",
    [
        {"rotation": 35},
        {"rotation": 180},
        {"rotation": 20, "scale": (0.6, 0.8)},
        {"rotation": 0, "scale": (0.5, 2.0)},
        {"rotation": 0, "elastic": 4.0},
        {"rotation": 90, "scale": (0.8, 1.2), "elastic": 2.0, "quarter_turns": True},
    ],
)
def test_nothing_black_comes_in_with_reflect(shape, options):
    torch.manual_seed(0)
    white, ones = tv_tensors.Image(torch.full((3, *shape), 255, dtype=torch.uint8)), tv_tensors.Mask(torch.ones(shape))
    darkest = {}
    for reflect in (True, False):
        transform = train_transform(None, **(PLAIN | options), reflect=reflect)
        drawn = [transform(white, ones) for _ in range(20)]
        assert all(image.shape[1:] == mask.shape == shape for image, mask in drawn)
        darkest[reflect] = min(min(image.min().item(), mask.min().item()) for image, mask in drawn)
    assert darkest[False] == 0
    assert darkest[True] == pytest.approx(1, abs=1e-6)  # the weights of four pixels add up to 1 within rounding


def test_bits_and_classes_pass_through_all_that_warps():
    image, mask = pair(40, 40)
    transform = train_transform((32, 32), scale=(0.7, 1.3), elastic=2.0, quarter_turns=True, reflect=True)
    for labels, values in (((mask * 7).long(), {0, 7}), ((mask * 7).to(torch.uint8), {0, 7}), (mask, None)):
        out = transform(image, tv_tensors.Mask(labels))[1]
        assert out.dtype == labels.dtype
        assert out.shape == (32, 32)
        assert values is None or set(out.unique().tolist()) <= values
    assert train_transform(None, elastic=2.0, reflect=True)(image, tv_tensors.Mask(mask.bool()))[1].dtype == torch.bool


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
@pytest.mark.parametrize("option", [{"rotation": 45}, {"scale": (0.5, 0.5)}, {"elastic": 10.0}])
def test_what_comes_from_outside_can_be_of_a_class_that_does_not_count(option, dtype):
    image, labels = tv_tensors.Image(torch.zeros(3, 40, 60)), torch.randint(0, 3, (40, 60), dtype=dtype)
    results = []
    for outside in (0, 255):
        torch.manual_seed(1)
        results.append(train_transform(None, **(PLAIN | option), outside=outside)(image, tv_tensors.Mask(labels + 1))[1])
    assert results[1].dtype == dtype
    assert 0 < (results[0] == 0).sum() < 2400
    assert torch.equal(results[1], results[0].masked_fill(results[0] == 0, 255))


def test_shares_of_pixels_are_background_outside():
    image, ones = tv_tensors.Image(torch.ones(3, 40, 60)), torch.ones(40, 60)
    transform = train_transform(None, **(PLAIN | {"scale": (0.5, 0.5)}), outside=255)
    for mask in (ones, ones.bool()):
        new_image, new_mask = transform(image, tv_tensors.Mask(mask))
        assert set(new_mask.unique().tolist()) == {0, 1}
        assert new_image.min() == 0


@pytest.mark.parametrize("transform", [partial(RandomAffine, 9), RandomElastic, partial(train_transform, **PLAIN)])
@pytest.mark.parametrize(("outside", "error"), [(-1, ValueError), (256, ValueError), (0.5, TypeError)])
def test_classes_outside_that_cannot_be(transform, outside, error):
    with pytest.raises(error, match=rf"outside={outside} must be"):
        transform(outside=outside)


@pytest.mark.parametrize("transform", [partial(RandomAffine, 45, (0.5, 0.5)), RandomElastic])
def test_a_class_outside_that_a_mask_cannot_hold_is_refused(transform):
    mask = tv_tensors.Mask(torch.ones(16, 24, dtype=torch.int8))
    with pytest.raises(ValueError, match=r"torch\.int8 cannot hold outside=200; give a wider one, such as mask\.short\(\)"):
        transform(outside=200)(mask)
    assert set(transform(outside=127)(mask).unique().tolist()) <= {1, 127}


def test_outside_is_background_unless_another_class_is_asked_for_and_of_a_picture_always_black():
    white = torch.full((1, 20, 20), 255, dtype=torch.uint8)
    for outside in ({}, {"outside": 255}):
        for turn in (RandomAffine(45, (0.5, 0.5), **outside), RandomElastic(1.0, **outside)):
            image, mask = turn(tv_tensors.Image(white), tv_tensors.Mask(torch.full_like(white[0], 7)))
            assert image.min() == 0 or isinstance(turn, RandomElastic)
            assert set(mask.unique().tolist()) <= {7, outside.get("outside", 0)}
    with pytest.raises(ValueError, match="rotation must be 0 or more, not -1"):
        RandomAffine(-1)


@pytest.mark.parametrize(
    ("options", "side", "other", "margin"),
    [
        ({"rotation": 45}, 100, 100, 21),  # the diagonal is 141.4
        ({"rotation": 90}, 4, 400, 3),  # all that there is
        ({"rotation": 180}, 100, 0, 0),
        ({"zoom": 0.5}, 100, 60, 50),
        ({"zoom": 0.5, "shift": 3}, 100, 60, 56),
        ({"shift": 3}, 100, 60, 3),
        ({"zoom": 2.0}, 100, 60, 0),
        ({}, 100, 60, 0),
    ],
)
def test_no_more_of_the_mirror_image_is_made_than_is_seen(options, side, other, margin):
    assert Mirrored(torch.nn.Identity(), **options)._margin(side, other) == margin


# --- PerPicture


def test_a_batch_is_its_pictures_one_after_another_with_chance_for_each():
    transform = train_transform(None, rotation=35, scale=(0.8, 1.2), color_jitter=0.3, noise=0.1)
    images, masks = pair()[0].expand(6, -1, -1, -1), pair()[1].expand(6, -1, -1)
    torch.manual_seed(0)
    batch = PerPicture(transform)(images, masks)
    torch.manual_seed(0)
    single = [transform(tv_tensors.Image(image), tv_tensors.Mask(mask)) for image, mask in zip(images, masks)]
    for got, expected in zip(batch, zip(*single), strict=True):
        assert type(got) is torch.Tensor
        assert torch.equal(got, torch.stack(expected))
    assert len({mask.sum().item() for mask in batch[1]}) == 6
    for image, mask in zip(*batch):
        assert (image.mean(0) - mask).abs().mean() < 0.2


def test_a_batch_of_masks_with_a_channel():
    images, masks = torch.zeros(2, 3, 20, 30, dtype=torch.uint8), torch.ones(2, 1, 20, 30)
    assert PerPicture(train_transform((10, 15), elastic=1.0))(images, masks)[1].shape == (2, 1, 10, 15)
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, such as train_transform\(size=None\), not a function"):
        PerPicture(lambda image: image)
    with pytest.raises(ValueError, match=r"pictures \(N, C, H, W\).*not \(3, 20, 30\) and \(1, 20, 30\)"):
        PerPicture(train_transform())(images[0], masks[0])
    with pytest.raises(ValueError, match="as many masks"):
        PerPicture(train_transform())(images, masks[:1])
    with pytest.raises(ValueError, match="seeds must be one for each of the 2 pictures, not 1"):
        PerPicture(train_transform())(images, masks, [1])
    with pytest.raises(ValueError, match="not 2 in a list and 1 in a list"):
        PerPicture(train_transform())([*images], [*masks[:1]])
    with pytest.raises(ValueError, match=r"pictures \(N, C, H, W\).*not \(2, 20, 30\) and \(2, 20, 30\)"):
        PerPicture(train_transform())(images[:, 0], masks[:, 0])
    with pytest.raises(ValueError, match=r"of one size, and their transform gives \(20, 30\) and \(20, 31\); give it a size"):
        PerPicture(train_transform(None))([images[0], torch.zeros(3, 20, 31)], [masks[0], torch.zeros(20, 31)])
    for none in (([], []), (images[:0], masks[:0])):
        with pytest.raises(ValueError, match="a batch must hold one picture or more, not none"):
            PerPicture(train_transform())(*none)


def test_seeding_for_a_picture_on_the_cpu_leaves_gpus_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("the state of every GPU is gone"))
    with seeded(7):
        assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(7)))


def test_chance_on_mps_comes_from_the_seed_and_is_given_back(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda device: "before")
    monkeypatch.setattr(torch.mps, "set_rng_state", lambda state, device: calls.append(state))
    monkeypatch.setattr(torch.mps, "manual_seed", calls.append)
    with seeded(7, torch.device("mps")):
        assert calls == [7]
        assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(7)))
    assert calls == [7, "before"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_chance_on_a_gpu_comes_from_the_seed_and_is_given_back():
    states = torch.get_rng_state(), torch.cuda.get_rng_state()
    with seeded(7, torch.device("cuda", 0)):
        expected = torch.rand(3, device="cuda", generator=torch.Generator("cuda").manual_seed(7))
        assert torch.equal(torch.rand(3, device="cuda"), expected)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert torch.equal(torch.cuda.get_rng_state(), states[1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_presets_run_where_the_batch_is():
    images, masks = pair()[0].expand(4, -1, -1, -1).cuda(), pair()[1].expand(4, -1, -1).cuda()
    options = {"scale": (0.8, 1.2), "elastic": 3.0, "quarter_turns": True, "reflect": True, "low_resolution": 0.5, "noise": 0.1}
    transform = train_transform((64, 64), color_jitter=0.2, mean=(0.5,) * 3, std=(0.2,) * 3, **options)
    new_images, new_masks = PerPicture(transform)(images, masks)
    assert new_images.is_cuda
    assert new_masks.is_cuda
    assert new_images.shape == (4, 3, 64, 64)


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


@pytest.mark.parametrize("preset", [train_transform(None), train_transform((30, 45)), eval_transform((30, 45))])
@pytest.mark.parametrize("types", [(True, False), (False, True), (False, False)])
def test_plain_tensors_move_together_as_typed_ones_do(preset, types):
    image, mask = pair()
    parts = [part if typed else part.as_subclass(torch.Tensor) for part, typed in zip((image, mask), types, strict=True)]
    for transform in (preset, v2.Compose([preset]), pickle.loads(pickle.dumps(preset))):
        results = []
        for given in ((image, mask), parts):
            torch.manual_seed(2)
            results.append(transform(*given))
        for expected, found in zip(*results, strict=True):
            assert type(found) is torch.Tensor
            assert torch.equal(found, expected)
    assert preset(parts[0]).dtype == torch.float32  # a picture alone
    assert "ToPureTensor" in repr(preset)


def test_what_a_preset_would_leave_as_it_was_is_refused():
    image, mask = (part.as_subclass(torch.Tensor) for part in pair())
    for preset in (train_transform(None, rotation=0), eval_transform(None)):
        for parts in ((image.permute(1, 2, 0).numpy(), mask), (image, mask.numpy()), ((image, mask),)):
            with pytest.raises(TypeError, match=r"as two tensors, not a (ndarray|tuple); of arrays: .*to_tensor\(picture\)"):
                preset(*parts)
        for parts in ((image, mask[::2, ::2]), (image.permute(1, 2, 0), mask)):
            with pytest.raises(ValueError, match=r"and a mask \(H, W\) of one size, not \(.*\) and \(.*\); put channels first"):
                preset(*parts)
        for dtype in (torch.bool, torch.int8, torch.int16, torch.int32, torch.int64):
            with pytest.raises(TypeError, match=rf"a picture of {dtype} has no known range; give .*uint8, uint16 or floats"):
                preset(tv_tensors.Image(image.to(dtype)), mask)
        floats = torch.rand(3, 8, 9)
        for wrong, found in (
            (image.float(), "0 to 255"),
            (floats - 0.5, "-0.49"),
            (floats / 0, "inf"),
            (floats * math.nan, "nan to nan"),
        ):
            with pytest.raises(
                ValueError, match=rf"^a picture of floats must lie in \[0, 1\], got .*{found}.*; bring it there"
            ):
                preset(wrong, mask)
        preset(1.0005 * floats.round(), mask[:8, :9])  # as resizing leaves them
    sixteen = (torch.arange(4 * 6) * 1000).to(torch.uint16).view(1, 4, 6)
    torch.testing.assert_close(eval_transform(None)(sixteen, mask[:4, :6])[0], sixteen.float() / 65535)


@pytest.mark.parametrize("option", ["color_jitter", "grayscale", "jpeg"])
def test_options_for_grey_and_colour_are_named_where_channels_are_others(option):
    image, mask = torch.rand(4, 32, 32), torch.ones(32, 32)
    transform = train_transform((16, 16), **({option: 0.1} | ({"low_resolution": 1.0} if option == "jpeg" else {})))
    for channels in (1, 3):
        assert transform(image[:channels], mask)[0].shape == (channels, 16, 16)
    for channels in (2, 4):
        with pytest.raises(ValueError, match=rf"^{option} is for pictures of 1 or 3 channels, got {channels}; leave it out"):
            transform(image[:channels], mask)
    others = {"scale": (0.8, 1.2), "elastic": 2, "crop": (0.5, 1), "quarter_turns": True, "reflect": True}
    others |= {"low_resolution": 1, "noise": 0.1, "invert": 1}
    assert train_transform((16, 16), **others)(image, mask)[0].shape == (4, 16, 16)


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
    infinite, nan = (1, 1, math.inf), (1, 1, math.nan)
    for mean, std in (
        (0.5, 0.5),
        ("a", "b"),
        ((0,) * 3, (0, 1, 1)),
        ((0,) * 3, infinite),
        ((0,) * 3, nan),
        ((0, 0), (1,) * 3),
        ((), ()),
    ):
        with pytest.raises(ValueError, match="one number for each channel, and std finite and above 0"):
            eval_transform(mean=mean, std=std)
    with pytest.raises(ValueError, match=r"on the scale of 0 to 1, but mean=\(123.7, 116.3, 103.5\); divide both by 255"):
        eval_transform(mean=(123.7, 116.3, 103.5), std=(58.4, 57.1, 57.4))


def test_what_is_and_what_is_no_scale_of_0_to_1():
    eval_transform(mean=(0, 1), std=(1, 1))
    for mean in ((0.5, 128), (0.5, 1.5)):
        with pytest.raises(ValueError, match=r"on the scale of 0 to 1, but mean=\(0\.5, 1"):
            eval_transform(mean=mean, std=(1, 1))


def test_the_steps_of_the_study():
    _, resize, left_right, upside_down, _, turn, _ = train_transform().transforms
    assert (resize.size, left_right.p, upside_down.p, turn.degrees) == ([160, 240], 0.5, 0.1, [-35, 35])
    assert (type(left_right), type(upside_down)) == (v2.RandomHorizontalFlip, v2.RandomVerticalFlip)


@pytest.mark.parametrize(
    ("options", "step"),
    [
        ({"rotation": 9}, RandomAffine),
        ({"scale": (0.5, 2)}, RandomAffine),
        ({"horizontal_flip": 0.5}, v2.RandomHorizontalFlip),
        ({"vertical_flip": 0.5}, v2.RandomVerticalFlip),
        ({"color_jitter": 0.2}, v2.ColorJitter),
        ({"grayscale": 0.2}, v2.RandomGrayscale),
        ({"invert": 0.2}, v2.RandomInvert),
        ({"elastic": 9.0}, RandomElastic),
        ({"elastic": 9.0, "reflect": True}, Mirrored),
        ({"quarter_turns": True}, RandomQuarterTurn),
        ({"low_resolution": 0.2}, RandomLowResolution),
        ({"low_resolution": 0.2, "least_resolution": 1}, RandomLowResolution),
        ({"noise": 0.1}, v2.RandomApply),
        ({"reflect": True}, None),
    ],
    ids=str,
)
def test_an_option_is_a_step_and_no_other(options, step):
    plain = [type(part) for part in train_transform(None, **PLAIN).transforms]
    steps = [type(part) for part in train_transform(None, **PLAIN | options).transforms]
    if step is not None:
        steps.remove(step)
    assert steps == plain


def test_the_mirror_image_reaches_as_far_as_three_standard_deviations_of_bends():
    mirrored = train_transform(None, **PLAIN, elastic=10, scale=(0.5, 2), reflect=True).transforms[2]
    assert (mirrored.rotation, mirrored.zoom, mirrored.shift) == (0, 0.5, 30)


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


@pytest.mark.parametrize("number", [np.float32, torch.tensor])
def test_numbers_of_numpy_and_pytorch_are_numbers(number):
    image, mask = torch.rand(3, 8, 8), torch.ones(8, 8)
    seen = []
    for kind in (float, number):
        torch.manual_seed(0)
        seen.append(train_transform((8, 8), rotation=kind(30), color_jitter=kind(0.25))(image, mask)[0])
    assert torch.equal(*seen)


def test_zoom_changes_sizes_within_its_range_about_the_middle():
    torch.manual_seed(0)
    square = torch.zeros(80, 80)
    square[30:50, 30:50] = 1
    transform = train_transform(None, **PLAIN, scale=(0.5, 1.5))
    sides = []
    for _ in range(30):
        image, mask = transform(tv_tensors.Image((square * 255).to(torch.uint8).expand(3, -1, -1)), tv_tensors.Mask(square))
        assert (image[0] - mask).abs().mean() < 0.03
        assert centre(mask) == pytest.approx((0.5, 0.5), abs=0.02)
        sides.append(mask.sum().sqrt().item() / 20)
    assert 0.45 < min(sides) < 0.65
    assert 1.35 < max(sides) < 1.55


def test_noise_is_on_every_second_picture_and_of_the_asked_strength():
    torch.manual_seed(0)
    transform = train_transform((40, 60), **PLAIN, noise=0.05)
    image = tv_tensors.Image(torch.full((3, 40, 60), 128, dtype=torch.uint8))
    spreads = [transform(image, tv_tensors.Mask(torch.ones(40, 60)))[0].std().item() for _ in range(60)]
    noisy = [spread for spread in spreads if spread > 1e-3]
    assert 15 < len(noisy) < 45
    assert noisy == pytest.approx([0.05] * len(noisy), rel=0.1)


def test_low_resolution_in_the_preset_leaves_the_mask():
    torch.manual_seed(0)
    image = tv_tensors.Image(torch.randint(256, (3, 60, 90), dtype=torch.uint8))
    transform = train_transform(None, **PLAIN, low_resolution=1.0)
    assert transform(image, pair(60, 90)[1])[0].std() < image.float().std() / 255
    assert torch.equal(transform(image, pair(60, 90)[1])[1], pair(60, 90)[1].as_subclass(torch.Tensor))
    flat = train_transform(None, **PLAIN, low_resolution=1.0, least_resolution=0.01)
    assert min(flat(image, pair(60, 90)[1])[0].std().item() for _ in range(20)) < 0.02


def test_small_jpegs_in_the_preset_are_among_what_is_reduced():
    torch.manual_seed(0)
    image = tv_tensors.Image(torch.randint(256, (3, 60, 90), dtype=torch.uint8))
    seen = []
    with mock.patch("unetlib.transforms._as_jpeg", lambda small, quality: seen.append(quality) or small):
        for _ in range(10):
            train_transform(None, **PLAIN, low_resolution=1.0, jpeg=0.5)(image, pair(60, 90)[1])
    assert 0 < len(seen) < 10
    with pytest.raises(ValueError, match=r"^jpeg=0\.5 is a share of the pictures that low_resolution reduces"):
        train_transform(None, jpeg=0.5)


def test_the_corners_of_the_studys_rotation_are_black_and_background():
    torch.manual_seed(0)
    transform = train_transform((60, 60), **(PLAIN | {"rotation": 35}))
    for _ in range(10):
        image, mask = transform(
            tv_tensors.Image(torch.full((3, 60, 60), 255, dtype=torch.uint8)), tv_tensors.Mask(torch.ones(60, 60))
        )
        image, mask = image[:, 1:-1, 1:-1], v2.functional.gaussian_blur(mask[None], [3, 3])[0, 1:-1, 1:-1]
        assert image[:, mask > 0.999].min() == pytest.approx(1, abs=1e-6)
        assert (image[:, mask == 0] == 0).all()


@pytest.mark.parametrize("scale", [1.2, (0.5,), (0, 1), (1.2, 0.8)])
def test_scales_that_cannot_be(scale):
    with pytest.raises(ValueError, match="scale must be"):
        train_transform(scale=scale)


@pytest.mark.parametrize(
    "option",
    [
        {"elastic": -1},
        {"low_resolution": 2},
        {"low_resolution": 1, "least_resolution": 0},
        {"least_resolution": 7},
        {"least_resolution": 1.5},
        {"least_resolution": "0.2"},
        {"low_resolution": 1, "jpeg": 1.5},
        {"rotation": -1},
        {"horizontal_flip": 2},
        {"vertical_flip": -1},
        {"color_jitter": -1},
        {"grayscale": 2},
        {"invert": -0.1},
        {"noise": -0.1},
    ],
)
def test_options_out_of_range(option):
    name, value = next(reversed(option.items()))
    with pytest.raises(ValueError, match=rf"^{name} must be .*{value}"):
        train_transform(**option)


def test_colour_can_be_lost_and_light_become_dark():
    image = tv_tensors.Image(torch.tensor([10, 60, 200], dtype=torch.uint8).reshape(3, 1, 1).expand(3, 4, 6).contiguous())
    mask = tv_tensors.Mask(torch.ones(4, 6))
    options = {"rotation": 0, "horizontal_flip": 0, "vertical_flip": 0}
    grey, _ = train_transform(None, grayscale=1.0, **options)(image, mask)
    assert torch.equal(grey[0], grey[1])
    assert torch.equal(grey[0], grey[2])
    negative, same = train_transform(None, invert=1.0, **options)(image, mask)
    torch.testing.assert_close(negative, 1 - image.as_subclass(torch.Tensor) / 255)
    assert torch.equal(same, mask.as_subclass(torch.Tensor))


def test_color_jitter_changes_contrast_and_saturation():
    torch.manual_seed(0)
    pixels = torch.tensor([(40, 40, 40), (120, 120, 120), (100, 80, 60)], dtype=torch.uint8)
    image, contrasts, saturations = tv_tensors.Image(pixels.T[:, None].contiguous()), [], []
    transform = train_transform(None, **PLAIN, color_jitter=0.2)
    for _ in range(20):
        dark, light, colour = transform(image, tv_tensors.Mask(torch.ones(1, 3)))[0][:, 0].T
        contrasts.append((light / dark)[0].item() / 3)
        saturations.append(((colour[0] - colour[2]) / 40 / ((light - dark)[0] / 80)).item())
    assert min(contrasts) < 0.9 < 1.1 < max(contrasts)
    assert 0.79 < min(saturations) < 0.95 < 1.05 < max(saturations) < 1.21


def test_a_zoom_in_needs_no_mirror_image():
    results = []
    for reflect in (True, False):
        torch.manual_seed(0)
        results.append(train_transform(None, **PLAIN, scale=(1.5, 2.0), reflect=reflect)(*pair(40, 60)))
    assert all(torch.equal(left, right) for left, right in zip(*results, strict=True))
