from __future__ import annotations

import itertools
import re
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from unetlib import UNet, UNetConfig
from unetlib.tiling import Piece, choose_tile, exact_halo, iter_bands, join, plan_tiles, run_tiles, why_whole


def small(depth: int = 2, **options) -> UNet:
    torch.manual_seed(0)
    return UNet(features=(4,) * depth, bottleneck=4, **options).eval()


@torch.no_grad()
def with_exact_sums(depth: int = 2, **options) -> UNet:
    """A network in float64 with few weights, all 1 or -1: no sum is rounded, so that its order does not matter."""
    model = small(depth, activation="leaky_relu", negative_slope=0.5, **options).double()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        parameter.copy_(torch.randint(-1, 2, parameter.shape, generator=generator))
        if name.endswith("weight") and parameter.ndim == 4 and parameter[0, 0].numel() == 9:
            parameter.mul_(torch.rand(parameter.shape, generator=generator) < 0.3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-300  # too little to change a variance, and above 0, as PyTorch 2.11 wants it
            module.weight.fill_(1.0)
            module.running_mean.copy_(torch.randint(-2, 3, module.running_mean.shape, generator=generator))
    return model


def in_tiles(model: UNet, picture: torch.Tensor, tile: int, overlap: int | None = None, **options) -> torch.Tensor:
    plan = plan_tiles(model.config, picture.shape[1:], (tile, tile), overlap, **options)
    assert len(plan) > 1
    with torch.inference_mode():
        return join(run_tiles(model, lambda rows, columns: picture[:, rows, columns], plan), picture.shape[1:])


def whole(model: UNet, picture: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        logits = model(picture[None])[0]
    assert len(logits.unique()) > 20  # it says something
    return logits


def smallest_tile(model: UNet) -> int:
    """What keeps two units of the grid at each side that is inside the picture."""
    unit = model.config.stride
    return 2 * (-(-exact_halo(model.config) // unit) * unit) + 2 * unit


def integers(height: int, width: int) -> torch.Tensor:
    return torch.randint(0, 8, (3, height, width), generator=torch.Generator().manual_seed(2)).double()


# --- the halo


def test_the_halo_of_the_plain_design():
    halos = [exact_halo(UNetConfig(features=(8,) * depth)) for depth in range(1, 8)]
    assert halos == [8, 22, 46, 94, 190, 382, 766]


@torch.no_grad()
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("upsample", ["transpose", "bilinear", "nearest", "nearest_conv"])
def test_the_halo_is_where_the_last_pixel_is_that_changes_the_result(depth, upsample):
    """Positive weights on a black picture: whatever reaches a pixel is seen there, and the last pixel that does is found."""
    model = UNet(features=(1,) * depth, bottleneck=1, in_channels=1, norm="none", upsample=upsample).double().eval()
    for name, parameter in model.named_parameters():
        parameter.fill_(1.0 if name.endswith("weight") else 0.0)
    halo, unit = exact_halo(model.config), 2**depth
    start = -(-(halo + 2) // unit) * unit  # the tile: one unit of the grid, with room on both sides
    pixels = [start - halo - 1, start - halo, start + unit - 1 + halo, start + unit + halo]
    pictures = torch.zeros(4, 1, unit, 2 * start + unit, dtype=torch.float64)
    pictures[range(4), 0, :, pixels] = 1.0
    reached = model(pictures)[:, 0, :, start : start + unit].flatten(1).any(dim=1)
    assert not reached[0]
    assert not reached[3]
    assert reached[1] or reached[2]  # the other side may need less


def test_a_halo_is_of_a_config():
    with pytest.raises(TypeError, match=r"the config of a network, such as model\.config, got a UNet"):
        exact_halo(UNet(features=(4,)))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"norm": "instance"}, "norm='instance' takes its mean"),
        ({"norm": "group"}, "norm='group' takes its mean"),
        ({"upsample": "bilinear", "align_corners": True}, "align_corners=True stretches"),
    ],
)
def test_networks_that_need_the_whole_picture_are_refused(options, reason):
    config = UNetConfig(features=(8, 16), **options)
    assert why_whole(UNetConfig()) is None
    assert why_whole(config).startswith(reason)
    with pytest.raises(ValueError, match=reason):
        exact_halo(config)
    for side in (4, 8, 12, 32, 64):
        with pytest.raises(ValueError, match=rf"{reason}.*give overlap=.*or tile=\(200, 300\)") as refused:
            plan_tiles(config, (200, 300), (64, side))
        overlap = int(re.findall(r"such as overlap=(\d+)", str(refused.value))[0])
        with pytest.warns(UserWarning, match="approximate"):  # and no error: the advice can be followed
            plan_tiles(config, (200, 300), (64, side), overlap)


@torch.no_grad()
@pytest.mark.parametrize("options", [{"norm": "instance"}, {"norm": "group"}, {"upsample": "bilinear", "align_corners": True}])
def test_they_are_refused_for_a_reason(options):
    """A pixel in one corner changes the result in the other, however far away."""
    model = small(1, **options).double()
    picture = integers(64, 64)
    other = picture.clone()
    other[:, :4, :4] += 100.0
    assert exact_halo(UNetConfig(features=(3,))) < 32
    if options.get("align_corners"):  # here it is the size that reaches everywhere
        assert not torch.equal(whole(model, picture)[:, :8, 40:42], whole(model, picture[:, :, :62])[:, :8, 40:42])
    else:
        assert not torch.equal(whole(model, picture)[:, 48:, 48:], whole(model, other)[:, 48:, 48:])


# --- tiles equal the whole picture


@pytest.mark.parametrize(
    ("depth", "upsample", "match", "norm"),
    [
        *itertools.product((1, 2), ("transpose", "bilinear", "nearest", "nearest_conv"), ("zeros", "replicate"), ("batch",)),
        (3, "transpose", "zeros", "none"),
        (3, "bilinear", "replicate", "batch"),
        (3, "nearest_conv", "zeros", "batch"),
        (4, "transpose", "replicate", "batch"),
    ],
)
def test_tiles_are_the_whole_picture_to_the_last_bit_at_any_size(depth, upsample, match, norm):
    model = with_exact_sums(depth, upsample=upsample, match=match, norm=norm)
    tile, unit = smallest_tile(model), 2**depth
    # Taller than one tile, and wider; then odd at every level.
    for size in ((tile + unit, tile + 2 * unit), (tile + 2 * unit - 1, unit), (unit + 1, tile + 3 * unit - 1)):
        picture = integers(*size)
        assert torch.equal(in_tiles(model, picture, tile), whole(model, picture))


@pytest.mark.parametrize("patch_size", [2, 3])
@pytest.mark.parametrize("match", ["zeros", "replicate"])
def test_networks_of_patches_too(patch_size, match):
    model = with_exact_sums(2, patch_size=patch_size, match=match)
    assert exact_halo(model.config) == 22 * patch_size
    tile, unit = smallest_tile(model), 4 * patch_size
    for size in ((tile + unit, tile + 2 * unit), (tile + 2 * unit - 1, unit), (unit + 1, tile + 3 * unit - 1)):
        picture = integers(*size)
        assert torch.equal(in_tiles(model, picture, tile), whole(model, picture))


@pytest.mark.parametrize("match", ["zeros", "replicate"])
@pytest.mark.parametrize(("depth", "patch_size"), [(1, 1), (2, 1), (3, 1), (2, 3)])
@pytest.mark.parametrize("dims", [(-1,), (-2, -1)])
def test_mirrored_tiles_are_the_mirrored_picture_to_the_last_bit_at_any_size(depth, patch_size, match, dims):
    model = with_exact_sums(depth, patch_size=patch_size, match=match)
    unit = model.config.stride
    tile = smallest_tile(model) + 2 * unit
    for size in itertools.product((tile + 1, tile + unit), (tile + unit - 1, tile + 2 * unit, 2 * tile + unit // 2)):
        picture = integers(*size)
        plan = plan_tiles(model.config, size, (tile, tile), mirrored=True)
        assert all(spans[0].stop <= tile for spans in (plan.rows, plan.columns))
        read = partial(lambda picture, rows, columns: picture[:, rows, columns], picture)
        pieces = run_tiles(lambda x: model(x.flip(dims)).flip(dims), read, plan)
        with torch.inference_mode():
            assert torch.equal(join(pieces, size), whole(model, picture.flip(dims)).flip(dims))
        assert torch.equal(in_tiles(model, picture, tile, mirrored=True), whole(model, picture))


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("upsample", ["transpose", "bilinear", "nearest"])
def test_with_resize_too_where_the_sides_are_multiples(depth, upsample):
    model = with_exact_sums(depth, upsample=upsample, match="resize")
    tile, unit = smallest_tile(model), 2**depth
    picture = integers(tile + 2 * unit, tile + unit)
    assert torch.equal(in_tiles(model, picture, tile), whole(model, picture))


@pytest.mark.parametrize("mirrored", [False, True])
def test_other_sizes_with_resize_are_those_of_the_padded_picture(mirrored):
    model = with_exact_sums(2, match="resize")
    height, width = smallest_tile(model) + 5, smallest_tile(model) + 3
    picture = integers(height, width)
    padded = torch.from_numpy(np.pad(picture.numpy(), ((0, 0), (0, -height % 4), (0, -width % 4)), mode="edge"))
    expected = whole(model, padded)[:, :height, :width]
    with pytest.warns(UserWarning, match="sides are no multiples of 4"):
        found = in_tiles(model, picture, smallest_tile(model), mirrored=mirrored)
    assert torch.equal(found, expected)
    assert not torch.equal(expected, whole(model, picture))


@pytest.mark.parametrize(("size", "match"), [((64, 48), "resize"), ((61, 47), "replicate"), ((30, 30), "resize")])
def test_no_warning_where_tiles_are_exact_or_the_picture_is_whole(size, match, recwarn):
    plan_tiles(UNetConfig(features=(8, 16), match=match), size, (60, 60))
    assert not recwarn.list


@pytest.mark.parametrize("size", [(64, 47), (65, 48), (31, 70), (70, 31)])
def test_one_side_that_is_no_multiple_is_warned_of_with_resize(size):
    config = UNetConfig(features=(8, 16), match="resize")
    with pytest.warns(UserWarning, match="whose sides are no multiples of 4"):
        plan_tiles(config, size, (60, 60))


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "elu", "gelu", "silu"])
def test_activations_and_float32(activation):
    model = small(2, activation=activation)
    picture = torch.rand(3, 92, 116)
    torch.testing.assert_close(in_tiles(model, picture, 80), whole(model, picture), rtol=1e-5, atol=1e-6)


def test_less_than_the_halo_is_not_the_whole_picture():
    model = with_exact_sums(2)
    picture = integers(120, 120)
    assert exact_halo(model.config) == 22
    with pytest.warns(UserWarning, match="approximate, because overlap=20 is less than the 24 pixels"):
        blended = in_tiles(model, picture, 80, overlap=20)
    assert not torch.equal(blended, whole(model, picture))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(in_tiles(model, picture, 80, overlap=24), whole(model, picture))
        assert torch.equal(in_tiles(model, picture, 80, overlap=21), whole(model, picture))  # rounded up to 24


# --- the plan


@pytest.mark.parametrize("match", ["zeros", "resize"])
@pytest.mark.parametrize("length", [20, 64, 65, 66, 67, 100, 119, 120, 333, 1000])
def test_spans_cover_the_picture_once_and_see_the_halo(length, match):
    config = UNetConfig(features=(8, 16), match=match)
    plan = plan_tiles(config, (length, 8), (66, 66))
    padded = -(-length // 4) * 4 if match == "resize" else length
    assert plan.exact
    kept = [pixel for span in plan.rows for pixel in range(span.keep_start, span.keep_stop)]
    assert kept == list(range(length))
    for span in plan.rows:
        assert span.start % 4 == 0
        assert span.keep_start < span.keep_stop
        assert span.stop - span.start <= (padded if length <= 66 else 64)
        assert span.keep_start == 0 if span.start == 0 else span.keep_start - span.start >= 24
        assert span.stop == padded if span.keep_stop == length else span.stop - span.keep_stop >= 24
    assert (len(plan.rows) == 1) == (length <= 66)
    assert len(plan) == len(plan.rows)


def test_tiles_are_the_smallest_that_are_as_few():
    plan = plan_tiles(UNetConfig(), (3000, 100), (2048, 2048))
    assert [(span.start, span.stop) for span in plan.rows] == [(0, 1600), (1400 // 16 * 16 + 16 * (1400 % 16 > 0), 3008)]


def test_a_tile_too_small_for_the_halo_is_named():
    with pytest.raises(ValueError, match="must be at least 208 pixels a side, got 200; give a larger tile="):
        plan_tiles(UNetConfig(), (1000, 1000), (200, 2000))


@pytest.mark.parametrize("side", [150, 155, 160])
def test_a_side_that_one_tile_covers_needs_no_halo(side):
    plan = plan_tiles(UNetConfig(), (150, 500), (side, 256))
    assert [tuple(rows) for rows in plan.rows] == [(0, 160, 0, 150)]
    assert len(plan.columns) > 1
    model = with_exact_sums(2, match="zeros")
    picture = integers(37, 200)
    with torch.inference_mode():
        plan = plan_tiles(model.config, (37, 200), (37, 100))
        found = join(run_tiles(model, lambda rows, columns: picture[:, rows, columns], plan), (37, 200))
    assert torch.equal(found, whole(model, picture))


@pytest.mark.parametrize(("overlap", "error"), [(-8, ValueError), (8.0, TypeError)])
def test_an_overlap_that_would_leave_gaps_is_named(overlap, error):
    with pytest.raises(error, match=f"overlap={overlap} must be"):
        plan_tiles(UNetConfig(features=(8, 16)), (100, 100), (64, 64), overlap)


# --- blending


@pytest.mark.parametrize("overlap", [0, 4, 8, 20])
@pytest.mark.parametrize("size", [(100, 120), (57, 203), (41, 40)])
def test_blending_is_the_weighted_mean_of_all_tiles(overlap, size):
    """Against a NumPy loop, with a network that says something else in every tile."""
    config = UNetConfig(features=(8, 16))
    with pytest.warns(UserWarning, match="approximate"):
        plan = plan_tiles(config, size, (48, 48), overlap)
    assert not plan.exact
    seen = [np.random.default_rng(tile).random((2, 48, 48)) for tile in range(len(plan))]
    total, weights = np.zeros((2, *size)), np.zeros(size)
    for (rows, columns), values in zip(itertools.product(plan.rows, plan.columns), seen):
        ramps = []
        for span, spans in ((rows, plan.rows), (columns, plan.columns)):
            ramp = np.ones(span.stop - span.start)
            for pixel in range(len(ramp)):
                if span != spans[0]:
                    ramp[pixel] = min(ramp[pixel], (pixel + 0.5) / max(1, 2 * overlap))
                if span != spans[-1]:
                    ramp[pixel] = min(ramp[pixel], (len(ramp) - pixel - 0.5) / max(1, 2 * overlap))
            ramps.append(ramp)
        weight = np.outer(*ramps)
        assert (weight > 0).all()
        height, width = min(rows.stop, size[0]) - rows.start, min(columns.stop, size[1]) - columns.start
        region = np.s_[rows.start : rows.start + height, columns.start : columns.start + width]
        total[(slice(None), *region)] += (weight * values[:, : len(weight), : weight.shape[1]])[:, :height, :width]
        weights[region] += weight[:height, :width]
    answers = iter(seen)

    def forward(batch):
        return torch.stack([torch.from_numpy(next(answers)[:, : batch.shape[2], : batch.shape[3]]) for _ in batch])

    picture = torch.zeros(3, *size)
    pieces = list(run_tiles(forward, lambda rows, columns: picture[:, rows, columns], plan, batch_size=2))
    np.testing.assert_allclose(join(pieces, size).numpy(), total / weights, atol=1e-12)
    assert [piece.rows.start for piece in pieces[1:]] == [piece.rows.stop for piece in pieces[:-1]]


@pytest.mark.parametrize("match", ["zeros", "replicate"])
def test_blended_tiles_end_where_the_picture_does(match):
    model = with_exact_sums(2, match=match)
    picture = integers(119, 121)
    with pytest.warns(UserWarning, match="approximate"):
        blended = in_tiles(model, picture, 80, overlap=20)
    corner = np.s_[:, -20:, -20:]  # of the last tile alone, and further than the halo from where it begins
    assert torch.equal(blended[corner], whole(model, picture)[corner])


@pytest.mark.parametrize("match", ["zeros", "resize"])
@pytest.mark.parametrize("overlap", [0, 4, 8])
def test_blended_tiles_are_no_smaller_than_a_network_takes(overlap, match):
    config = UNetConfig(features=(8, 16), match=match)
    for tile, length in itertools.product(range(2 * overlap + 4, 48), range(50, 70)):
        with pytest.warns(UserWarning, match="approximate"):
            plan = plan_tiles(config, (length, 50), (tile, tile), overlap)
        spans = plan.rows + plan.columns
        assert all(4 <= span.stop - span.start <= tile for span in spans)
        assert {pixel for span in plan.rows for pixel in range(span.keep_start, span.keep_stop)} == {*range(length)}


def test_blending_is_near_the_whole_picture_and_nearer_with_more_overlap():
    model = small(2, norm="instance")
    picture = torch.rand(3, 160, 160)
    errors = []
    for overlap in (0, 8, 24):
        with pytest.warns(UserWarning, match="norm='instance' takes its mean"):
            errors.append((in_tiles(model, picture, 80, overlap) - whole(model, picture)).square().mean())
    assert errors[0] > errors[1] > errors[2] > 0


# --- running


def test_tiles_go_through_in_batches_of_equal_ones_and_are_read_once():
    plan = plan_tiles(UNetConfig(features=(8, 16), match="zeros"), (150, 302), (64, 64))
    seen, read = [], []

    def forward(batch):
        seen.append(tuple(batch.shape))
        return batch

    def region(rows, columns):
        assert 0 <= rows.start < rows.stop <= 150
        assert 0 <= columns.start < columns.stop <= 302
        read.append((rows.start, columns.start))
        return picture[:, rows, columns]

    picture = torch.rand(3, 150, 302)
    assert torch.equal(join(run_tiles(forward, region, plan, batch_size=4), (150, 302)), picture)
    assert len(set(read)) == len(read) == len(plan)
    assert max(shape[0] for shape in seen) == 4
    assert len(seen) < len(plan)


def test_nothing_is_run_before_it_is_asked_for():
    plan = plan_tiles(UNetConfig(features=(8,)), (200, 100), (64, 64))
    run = []
    pieces = run_tiles(
        lambda batch: run.append(1) or batch, lambda rows, columns: torch.zeros(3, 200, 100)[:, rows, columns], plan
    )
    assert not run
    next(pieces)
    assert len(run) == 1


def test_bands_are_the_pieces_side_by_side():
    values = torch.arange(24.0).reshape(1, 4, 6)
    cuts = [(slice(0, 3), slice(0, 2)), (slice(0, 3), slice(2, 6)), (slice(3, 4), slice(0, 5)), (slice(3, 4), slice(5, 6))]
    pieces = [Piece(rows, columns, values[:, rows, columns]) for rows, columns in cuts]
    bands = list(iter_bands(pieces))
    assert [tuple(band.shape) for band in bands] == [(1, 3, 6), (1, 1, 6)]
    assert torch.equal(torch.cat(bands, dim=1), values)
    assert torch.equal(join(pieces, (4, 6)), values)


# --- the choice


def test_the_tile_is_the_whole_picture_then_what_fits_then_what_is_useful():
    config = UNetConfig()
    assert choose_tile(config, (1000, 1000), 1_000_000) is None
    assert choose_tile(config, (1000, 1001), 1_000_000) == (992, 992)
    assert choose_tile(config, (10**6, 10**6), 10**9) == (2048, 2048)
    assert choose_tile(UNetConfig(features=(8,) * 5), (10**6, 10**6), 10**9) == (3072, 3072)
    assert choose_tile(config, (1000, 1000), 10) == (208, 208)  # the least that works
    plan_tiles(config, (1000, 1000), (208, 208))
    odd, size = UNetConfig(match="zeros"), (1000, 1007)
    assert choose_tile(odd, size, 10) == choose_tile(config, (1008, 1008), 10, mirrored=True) == (208, 208)
    tile = choose_tile(odd, size, 10, mirrored=True)
    assert tile == (256, 256)
    assert plan_tiles(odd, size, tile, mirrored=True).exact
