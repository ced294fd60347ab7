from __future__ import annotations

import sys
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.utils import make_grid

from unetlib.visualize import PALETTE, comparison, grid, learning_curves, mask_to_image, overlay

PAIR = np.zeros((2, 2, 3), np.uint8), np.ones((2, 2), np.uint8)


def test_mask_to_image_spreads_the_classes_over_the_greys():
    mask = np.array([[0, 1], [2, 3]], np.uint8)
    assert mask_to_image(mask, classes=4).tolist() == [[0, 85], [170, 255]]
    assert mask_to_image(mask.astype(bool)).tolist() == [[0, 255], [255, 255]]
    assert mask_to_image(np.array([[0, 150, 299]]), classes=300).tolist() == [[0, 127, 255]]
    assert mask_to_image(np.array([[0.0, 1.0]]), classes=2).tolist() == [[0, 255]]


@pytest.mark.parametrize(
    ("draw", "bytes_a_pixel"), [(mask_to_image, 1), (lambda mask: overlay(mask, mask), 3)], ids=["grey", "overlay"]
)
def test_a_huge_mask_takes_little_more_memory_than_its_picture(draw, bytes_a_pixel):
    mask = np.ones((1000, 2000), np.uint8)
    tracemalloc.start()
    try:
        draw(mask)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < (bytes_a_pixel + 2) * mask.nbytes


@pytest.mark.parametrize("alpha", [0, 0.1, 0.25, 0.5, 1])
@pytest.mark.parametrize("shape", [(9, 11, 3), (9, 11)])
def test_overlay_mixes_the_class_colour_and_leaves_the_background(shape, alpha):
    image = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    mask = np.random.default_rng(1).integers(0, 10, (9, 11))
    painted = overlay(image, mask, alpha=alpha)
    expected = np.empty((9, 11, 3))
    for place, index in np.ndenumerate(mask):
        color = np.array(PALETTE[(index - 1) % len(PALETTE)])
        expected[place] = (1 - alpha) * image[place] + alpha * color if index else image[place]
    assert painted.dtype == np.uint8
    assert np.abs(painted - expected).max() < 0.5001
    assert (painted[mask == 0] == expected[mask == 0]).all()


@pytest.mark.parametrize("dtype", [bool, np.int16, np.float32])
def test_what_a_grey_data_set_gives_can_be_shown(dtype):
    image, mask = np.random.default_rng(0).integers(0, 256, (9, 11, 1), np.uint8), np.eye(9, 11, dtype=dtype)
    painted = overlay(image, mask)
    np.testing.assert_array_equal(painted, overlay(image[..., 0], mask.astype(np.uint8)))
    np.testing.assert_array_equal(mask_to_image(mask), 255 * np.eye(9, 11))
    np.testing.assert_array_equal(grid([image, painted])[4:13, 4:15], np.repeat(image, 3, axis=2))


@pytest.mark.parametrize("shape", [(3, 4, 3), (3, 4)])
def test_overlay_of_an_empty_mask_is_a_copy_of_the_picture(shape):
    image = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
    painted = overlay(image, np.zeros((3, 4), np.uint8))
    assert (painted == image.reshape(3, 4, -1)).all()
    assert not np.shares_memory(painted, image)


def test_white_on_white_is_white():
    white = np.full((2, 2, 3), 255, np.uint8)
    for alpha in np.linspace(0, 1, 101):
        assert (overlay(white, PAIR[1], alpha=alpha, colors=[(255, 255, 255)]) == 255).all()


def test_overlay_takes_colours_from_the_start_again():
    painted = overlay(np.zeros((1, 1, 3), np.uint8), np.array([[3]]), alpha=1.0, colors=[(1, 2, 3), (4, 5, 6)])
    assert painted[0, 0].tolist() == [1, 2, 3]


def test_grid_puts_pictures_where_they_belong():
    pictures = [np.full((3, 5, 3), value, np.uint8) for value in (10, 20, 30)]
    sheet = grid(pictures, columns=2, gap=1)
    assert sheet.shape == (2 * 4 + 1, 2 * 6 + 1, 3)
    assert [sheet[1, 1, 0], sheet[1, 7, 0], sheet[5, 1, 0], sheet[0, 0, 0]] == [10, 20, 30, 255]
    tensors = [torch.from_numpy(picture).permute(2, 0, 1) for picture in pictures]
    np.testing.assert_array_equal(sheet, np.moveaxis(make_grid(tensors, nrow=2, padding=1, pad_value=255).numpy(), 0, -1))
    for one in (pictures[:1], [pictures[0][..., 0]]):
        alone = grid(one, columns=2, gap=1)
        np.testing.assert_array_equal(alone, np.pad(pictures[0], ((1, 1), (1, 1), (0, 0)), constant_values=255))


def test_a_comparison_has_masks_below_their_pictures():
    grey, sizes = [30, 60, 90], [(40, 60), (40, 60), (20, 30)]
    images = [np.full((*size, 3), value, np.uint8) for value, size in zip(grey, sizes)]
    images[2] = images[2][..., :1]
    masks = [np.full(size, number, np.float32) for number, size in enumerate(sizes)]
    predicted = [np.full(size, 2 - number, np.uint8) for number, size in enumerate(sizes)]
    sheet = comparison(images, masks, predicted, classes=3, columns=2, height=40)
    assert sheet.shape == (6 * 44 + 4, 2 * 64 + 4, 3)
    middles = sheet[24::44, 34::64]
    assert (middles == middles[..., :1]).all()
    assert middles[..., 0].tolist() == [[30, 60], [0, 127], [255, 127], [90, 255], [255, 255], [0, 255]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mask_to_image(np.array([[2]])), "holds class 2"),
        (lambda: mask_to_image(np.array([[-1]])), "start at 0, got -1"),
        (lambda: mask_to_image(np.array([[0.5]])), "fractions in float64"),
        (lambda: mask_to_image(np.array([[np.nan]])), "fractions"),
        (lambda: overlay(PAIR[0], np.ones((1, 2, 2))), r"of shape \(H, W\), got float64 \(1, 2, 2\)"),
        (lambda: mask_to_image(np.array([[0]]), classes=1), "classes=1 must be 2 or more"),
        (lambda: overlay(np.zeros((2, 2, 3), np.uint8), np.zeros((2, 3), np.uint8)), r"\(2, 2\) and its mask \(2, 3\)"),
        (lambda: overlay(np.zeros((2, 2, 3), np.float32), np.zeros((2, 2), np.uint8)), "float32"),
        (lambda: overlay(*PAIR, alpha=1.5), "alpha must be from 0 to 1, not 1.5"),
        (lambda: overlay(*PAIR, colors=[]), r"colors must be one or more \(red, green, blue\).*, not \[\]"),
        (lambda: overlay(*PAIR, colors=["red"]), r"such as \[\(255, 0, 0\)\], not \['red'\]"),
        (lambda: overlay(*PAIR, colors=(255, 0, 0)), r"not \(255, 0, 0\)"),
        (lambda: overlay(*PAIR, colors=[(1, 2, 256)]), r"each 0 to 255.*256"),
        (lambda: comparison([np.zeros((2, 2), np.uint8)], [np.zeros((2, 2))], []), "1 pictures, 1 masks and 0 predicted"),
        (lambda: comparison([], [], []), "got 0 pictures"),
        (lambda: comparison([np.zeros((2, 3), np.uint8)], [np.zeros((3, 2))], [np.zeros((2, 3))]), r"mask \(3, 2\)"),
        (lambda: comparison([np.zeros((2, 3), np.uint8)], [np.zeros((2, 3))], [np.zeros((3, 2))]), r"mask \(3, 2\)"),
        (lambda: comparison([np.zeros((2, 2, 3))], *[[np.zeros((2, 2))]] * 2), "a picture must be uint8"),
        (lambda: comparison([np.zeros((3, 2, 2), np.uint8)], *[[np.zeros((2, 2))]] * 2), "a picture must be uint8 of shape"),
        (lambda: comparison([np.zeros((2, 2), np.uint8)], *[[np.full((2, 2), 0.9)]] * 2), "fractions"),
        (lambda: comparison([np.zeros((2, 2), np.uint8)], *[[np.zeros((2, 2))]] * 2, columns=0), "columns=0 must be 1 or more"),
        (lambda: comparison([np.zeros((2, 2), np.uint8)], *[[np.zeros((2, 2))]] * 2, height=0), "height=0 must be 1 or more"),
        (lambda: grid([np.zeros((2, 2), np.uint8)], columns=0), "columns=0 must be 1 or more"),
        (lambda: grid([np.zeros((2, 2), np.uint8)], gap=-9), "gap=-9 must be 0 or more"),
        (lambda: learning_curves([], [], "curves.png"), "loss must hold a number for each step"),
        (lambda: grid([np.zeros((2, 2, 4), np.uint8)] * 2), r"uint8 \(2, 2, 4\)"),
        (lambda: grid([]), "got none"),
        (lambda: grid([np.zeros((2, 2), np.uint8), np.zeros((2, 3), np.uint8)]), r"\(2, 2\), \(2, 3\)"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("other", [Image.fromarray(PAIR[1]), torch.from_numpy(PAIR[1])])
@pytest.mark.parametrize(
    "call",
    [
        mask_to_image,
        lambda other: overlay(other, PAIR[1]),
        lambda other: overlay(PAIR[0], other),
        lambda other: grid([other]),
        lambda other: comparison([other], PAIR[1:], PAIR[1:]),
        lambda other: comparison(PAIR[:1], PAIR[1:], [other]),
    ],
)
def test_what_is_no_array_is_named(call, other):
    with pytest.raises(TypeError, match=rf"must be a NumPy array, got {type(other).__name__}; use np\.asarray"):
        call(other)


def test_a_comparison_is_as_wide_as_its_pictures():
    image, mask = np.zeros((20, 30, 3), np.uint8), np.ones((20, 30), np.uint8)
    assert comparison([image] * 2, [mask] * 2, [mask] * 2, columns=8, height=20).shape == (3 * 24 + 4, 2 * 34 + 4, 3)


def test_a_path_is_to_be_read():
    for call in (lambda: overlay("a.png", PAIR[1]), lambda: grid([Path("a.png")])):
        with pytest.raises(TypeError, match=r"must be a NumPy array, got \w+; read the file with .*read_image$"):
            call()
    with pytest.raises(TypeError, match=r"read the file with unetlib\.imaging\.read_mask$"):
        overlay(PAIR[0], "a_mask.png")


def test_curves_of_numbers_are_told_what_scores_are(tmp_path):
    with pytest.raises(TypeError, match=r'a dictionary for each epoch, such as \{"dice": 0\.9\}, not 0\.7$'):
        learning_curves([0.9, 0.5], [0.7, 0.8], tmp_path / "curves.png")


@pytest.mark.parametrize("dice", [0.001, 0.5, 0.999])
def test_the_legend_of_curves_covers_none(tmp_path, monkeypatch, dice):
    figure_type, figures = pytest.importorskip("matplotlib.figure").Figure, []
    save = figure_type.savefig
    monkeypatch.setattr(figure_type, "savefig", lambda figure, *to, **how: figures.append(figure) or save(figure, *to, **how))
    wild = [{"dice": dice, "iou": k % 2, "accuracy": 1 - k % 2} for k in range(40)]
    learning_curves([0.9, 0.5], wild, tmp_path / "curves.png")
    _, scores = figures[0].axes
    plot, legend = scores.get_window_extent(), scores.get_legend().get_window_extent()
    assert plot.y1 <= legend.y0 < legend.y1 <= 400
    assert 500 <= legend.x0 < legend.x1 <= 1000


def test_epochs_are_whole_numbers(tmp_path, monkeypatch):
    figure_type, ticks = pytest.importorskip("matplotlib.figure").Figure, []
    monkeypatch.setattr(figure_type, "savefig", lambda figure, *to, **how: ticks.extend(figure.axes[1].get_xticks()))
    learning_curves([0.9, 0.5], [{"dice": 0.5}] * 4, tmp_path / "curves.png")
    assert len(ticks) > 2
    assert all(tick == int(tick) for tick in ticks)


def test_curves_are_a_png_by_any_name_and_need_no_scores(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learning_curves([0.9, 0.5], [], tmp_path / "curves")
    assert Image.open(tmp_path / "curves").format == "PNG"


def test_without_matplotlib_curves_say_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"matplotlib is not installed; .*pip install 'unetlib\[examples\]'"):
        learning_curves([0.9, 0.5], [], tmp_path / "curves")
