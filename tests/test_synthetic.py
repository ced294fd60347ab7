from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from unetlib import synthetic
from unetlib.synthetic import car_name, render_scene, write_carvana

SIZE = (80, 120)


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * np.count_nonzero(a & b) / (np.count_nonzero(a) + np.count_nonzero(b))


def dilate(mask: np.ndarray, pixels: int) -> np.ndarray:
    return np.asarray(Image.fromarray(mask).filter(ImageFilter.MaxFilter(2 * pixels + 1))) > 0


@pytest.fixture
def fresh_cars(monkeypatch):
    """Cars are remembered: forget them where a test changes what they are made of."""
    synthetic.scene.build_car.cache_clear()
    yield monkeypatch
    synthetic.scene.build_car.cache_clear()


# ---- one scene ----


def test_types_shapes_and_values():
    image, mask = render_scene(0, 4, size=SIZE)
    assert image.shape == (80, 120, 3)
    assert image.dtype == np.uint8
    assert mask.shape == (80, 120)
    assert mask.dtype == np.uint8
    assert set(np.unique(mask)) == {0, 1}


def test_kaggles_size_is_the_default():
    image, mask = render_scene(0)
    assert image.shape == (1280, 1918, 3)
    assert mask.shape == (1280, 1918)


def test_same_arguments_same_scene():
    first = render_scene(3, 7, size=SIZE, seed=5)
    synthetic.scene.build_car.cache_clear()
    again = render_scene(np.int64(3), 7, size=list(SIZE), seed=5)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))


def test_scenes_stay_what_they_were():
    # Weights were trained on these scenes and documents show them: a change here needs a reason.
    shares = [render_scene(car, view, size=SIZE)[1].mean() for car, view in ((0, 1), (1, 5), (2, 9), (3, 12))]
    assert shares == pytest.approx([0.1824, 0.2909, 0.1499, 0.1982], abs=0.002)
    colours = np.mean([render_scene(car, 5, size=(40, 60))[0].mean((0, 1)) for car in range(30)], axis=0)
    assert colours == pytest.approx([169.565, 168.274, 168.245], abs=0.03)


@pytest.mark.parametrize("other", [{"car": 4}, {"view": 6}, {"seed": 1}])
def test_car_view_and_seed_each_change_the_scene(other):
    base = {"car": 3, "view": 5, "seed": 0}
    image, mask = render_scene(**base, size=SIZE)
    changed, changed_mask = render_scene(**(base | other), size=SIZE)
    assert np.abs(image.astype(int) - changed).mean() > 3
    assert dice(mask, changed_mask) < 0.99


def test_a_turn_of_the_table_keeps_car_and_studio():
    synthetic.scene.build_car.cache_clear()
    pictures = [render_scene(2, view, size=SIZE)[0] for view in (1, 5, 9)]
    assert synthetic.scene.build_car.cache_info().misses == 1
    corners = np.stack([picture[:20, :8].astype(int) for picture in pictures])  # wall, far from the car
    assert np.abs(corners - corners[0]).mean() < 6  # grain only


def test_views_show_front_sides_and_rear():
    def width(view: int) -> int:
        return int(render_scene(11, view, size=SIZE)[1].any(0).sum())

    assert min(width(5), width(13)) > 1.5 * max(width(1), width(9))
    left, right = (render_scene(11, view, size=SIZE)[1] for view in (5, 13))
    left, right = (mask[:, mask.any(0)] for mask in (left, right))
    columns = min(left.shape[1], right.shape[1])
    flipped = dice(left[:, :columns], right[:, ::-1][:, :columns])
    assert flipped > 0.95
    assert flipped > dice(left[:, :columns], right[:, :columns])


def test_tail_lights_turn_with_the_table(fresh_cars):
    fresh_cars.setattr(synthetic.car, "PAINTS", [(weight, (120, 120, 120)) for weight, _ in synthetic.car.PAINTS])

    def red(view: int) -> np.ndarray:
        """Columns of red samples, from -1 at the car's left end to 1 at its right end."""
        image, mask = render_scene(11, view, size=(160, 240))
        columns = np.flatnonzero(mask.any(0))
        found = np.nonzero((image[..., 0] > 1.6 * image[..., 1]) & (mask > 0))[1]
        return 2 * (found - columns[0]) / (columns[-1] - columns[0]) - 1

    assert red(1).size == 0
    assert red(5).min() > 0.6
    assert red(13).max() < -0.6
    assert red(7).max() > 0.3
    assert red(11).min() < -0.3
    assert red(9).min() < -0.4
    assert red(9).max() > 0.4


@pytest.mark.parametrize(("car", "view"), [(1, 1), (5, 4), (8, 11)])
def test_sizes_show_the_same_scene(car, view):
    image, mask = render_scene(car, view, size=(320, 480))
    small_image, small_mask = render_scene(car, view, size=(80, 120))
    share = mask.reshape(80, 4, 120, 4).mean((1, 3))
    assert dice(share >= 0.5, small_mask > 0) > 0.985
    assert np.all(small_mask[share == 1] == 1)
    assert np.all(small_mask[share == 0] == 0)
    reduced = image.reshape(80, 4, 120, 4, 3).mean((1, 3))
    assert np.abs(reduced - small_image).mean() < 5


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (5, 7), (33, 200), (200, 33), (1, 1000), (96, 96), (101, 151)])
def test_any_size(size):
    image, mask = render_scene(1, 4, size=size)
    assert image.shape == (*size, 3)
    assert mask.shape == size
    assert mask.any()


def test_cars_fill_the_picture_as_in_a_studio():
    shares = [render_scene(car, car % 16 + 1, size=(40, 60))[1].mean() for car in range(40)]
    assert min(shares) > 0.08
    assert max(shares) < 0.4
    assert 0.15 < np.mean(shares) < 0.27


def test_cars_are_whole_and_inside_the_picture():
    for car in range(30):
        _, mask = render_scene(car, 5, size=(40, 60))
        assert not mask[[0, -1]].any()
        assert not mask[:, [0, -1]].any()


def test_cars_vary():
    cars = [synthetic.car.design_car(np.random.default_rng(number)) for number in range(150)]
    assert {car.body for car in cars} == set(synthetic.car.BODIES)
    assert len({car.paint[:3] for car in cars}) > 100
    assert {car.wheel.spokes for car in cars} == {5, 6, 7, 10, 12}
    assert {car.trim == synthetic.car.CHROME for car in cars} == {car.sunroof for car in cars} == {True, False}


# ---- the mask is exact ----


@pytest.mark.parametrize(("car", "view"), [(0, 3), (6, 9), (9, 14)])
def test_the_picture_differs_from_the_empty_studio_on_the_mask_only(monkeypatch, car, view):
    image, mask = render_scene(car, view, size=(160, 240))
    nothing = Image.new("RGBA", (1, 1)), (0, 0)
    monkeypatch.setattr(synthetic.scene, "paint_car", lambda *_: nothing)
    empty, no_mask = render_scene(car, view, size=(160, 240))
    assert not no_mask.any()
    difference = np.abs(image.astype(int) - empty).max(-1)
    assert np.all(difference[~dilate(mask, 2)] == 0)  # the lens's blur reaches one pixel further than the car
    assert (difference[mask > 0] > 4).mean() > 0.93  # shadows are in both: what differs is the car


def test_the_mask_knows_nothing_of_colours(fresh_cars):
    image, mask = render_scene(6, 4, size=(160, 240))
    fresh_cars.setattr(synthetic.car, "PAINTS", [(weight, (40, 200, 60)) for weight, _ in synthetic.car.PAINTS])
    synthetic.scene.build_car.cache_clear()
    green, same = render_scene(6, 4, size=(160, 240))
    assert np.array_equal(mask, same)
    changed = np.abs(image.astype(int) - green).max(-1) > 0
    assert not changed[~dilate(mask, 2)].any()
    assert changed[mask > 0].mean() > 0.4


def test_the_mask_is_the_half_covered_pixels(monkeypatch):
    layers = []
    paint = synthetic.scene.paint_car
    monkeypatch.setattr(synthetic.scene, "paint_car", lambda *given: layers.append(paint(*given)) or layers[-1])
    _, mask = render_scene(4, 6, size=SIZE)
    layer, (left, top) = layers[0]
    alpha = np.zeros(SIZE)
    alpha[top : top + layer.height, left : left + layer.width] = np.asarray(layer)[..., 3] / 255
    assert np.array_equal(mask, alpha >= 0.5)
    assert 0 < np.count_nonzero((alpha > 0) & (alpha < 1)) < 0.2 * mask.sum()


def test_projection_is_that_of_a_pinhole():
    camera = dataclasses.replace(synthetic.studio.design_studio(np.random.default_rng(0), (200, 300)).camera, shift=(0.0, 0.0))
    target = np.array([0.0, 0.0, 0.72])
    place, depth = camera.project(target)
    assert place == pytest.approx([150, 100])
    assert depth == pytest.approx(np.hypot(camera.distance, camera.height - 0.72))
    points = np.random.default_rng(1).uniform(-2, 2, (20, 3))
    places, depths = camera.project(points)
    rays = camera.rays(places[:, 0], places[:, 1]).T
    eye = np.array([0, -camera.distance, camera.height])
    straight = (points - eye) / np.linalg.norm(points - eye, axis=1, keepdims=True)
    assert rays == pytest.approx(straight, abs=1e-5)
    assert np.all(depths > 0)


# ---- arguments ----


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"car": -1}, ValueError, "car=-1"),
        ({"car": 1.5}, TypeError, "car=1.5"),
        ({"car": 0, "view": 0}, ValueError, "view=0 must be from 1 to 16"),
        ({"car": 0, "view": 17}, ValueError, "view=17"),
        ({"car": 0, "seed": -3}, ValueError, "seed=-3"),
        ({"car": 0, "seed": "a"}, TypeError, "seed='a'"),
        ({"car": 0, "size": 64}, TypeError, "size=64 must be a pair"),
        ({"car": 0, "size": (64, 64, 3)}, TypeError, "pair"),
        ({"car": 0, "size": (0, 64)}, ValueError, "size=0"),
        ({"car": 0, "size": (64.0, 64)}, TypeError, "size=64.0"),
    ],
)
def test_bad_arguments(arguments, error, words):
    with pytest.raises(error, match=re.escape(words)):
        render_scene(**arguments)


def test_needs_numpy_and_pillow_only():
    code = (
        "import sys\n"
        "from unetlib.synthetic import render_scene\n"
        "render_scene(0, size=(8, 12))\n"
        "assert not {'torch', 'torchvision', 'scipy', 'cv2'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_each_room_knows_only_rooms_above_it():
    rooms = re.findall(r"^- `(\w+)`:", synthetic.__doc__, re.MULTILINE)
    files = {path.stem: path for path in Path(synthetic.__file__).parent.glob("*.py")}
    assert {*rooms, "__init__"} == set(files)
    for number, room in enumerate(rooms):
        known = re.findall(r"^from \.(\w*) import", files[room].read_text("utf-8"), re.MULTILINE)
        assert set(known) <= set(rooms[:number]), room


# ---- files ----


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_layout_and_names(tmp_path):
    pictures = write_carvana(tmp_path / "new", cars=2, views=3, size=(20, 30))
    names = [car_name(0), car_name(1)]
    stems = [f"{name}_{view:02d}" for name in names for view in (1, 2, 3)]
    expected = {f"train/{stem}.jpg" for stem in stems} | {f"train_masks/{stem}_mask.gif" for stem in stems}
    assert set(tree(tmp_path / "new")) == expected
    assert pictures == [tmp_path / "new" / "train" / f"{stem}.jpg" for stem in stems]
    assert all(re.fullmatch(r"[0-9a-f]{12}", name) for name in names)


def test_names_are_fixed_by_seed_and_number():
    assert car_name(0) == "28e13a2a217b"
    assert len({car_name(car, seed=seed) for car in range(50) for seed in (0, 1)}) == 100
    with pytest.raises(ValueError, match="car=-1"):
        car_name(-1)


def test_files_hold_the_scenes(tmp_path):
    [picture] = write_carvana(tmp_path, cars=[7], views=[12], size=(60, 90), seed=3)
    image, mask = render_scene(7, 12, size=(60, 90), seed=3)
    with Image.open(picture) as jpeg:
        assert jpeg.format == "JPEG"
        assert jpeg.mode == "RGB"
        assert np.abs(np.asarray(jpeg).astype(int) - image).mean() < 5
    with Image.open(tmp_path / "train_masks" / f"{picture.stem}_mask.gif") as gif:
        assert gif.format == "GIF"
        assert gif.mode == "P"
        assert gif.getpalette()[:6] == [0, 0, 0, 255, 255, 255]
        assert np.array_equal(np.asarray(gif), mask)
        assert set(np.unique(np.asarray(gif.convert("L")))) == {0, 255}


def test_splits_lie_beside_each_other_with_their_own_cars(tmp_path):
    train = write_carvana(tmp_path, cars=2, views=[1], size=(8, 12))
    val = write_carvana(tmp_path, cars=range(2, 4), views=[1], size=(8, 12), split="val")
    assert {path.parent.name for path in tmp_path.rglob("*.*")} == {"train", "train_masks", "val", "val_masks"}
    assert not {path.name for path in train} & {path.name for path in val}


def test_the_same_call_writes_the_same_files(tmp_path):
    write_carvana(tmp_path, cars=1, views=2, size=(8, 12))
    (tmp_path / "train" / ".hidden").touch()  # a file manager's, or what a killed run left
    before = tree(tmp_path)
    write_carvana(tmp_path, cars=1, views=2, size=(8, 12))
    assert tree(tmp_path) == before


@pytest.mark.parametrize("foreign", ["train/photo.jpg", "train_masks/00087a6bd4dc_01_mask.gif"])
def test_foreign_files_are_left_alone(tmp_path, foreign):
    path = tmp_path / foreign
    path.parent.mkdir()
    path.write_bytes(b"mine")
    with pytest.raises(FileExistsError, match=re.escape(path.name)):
        write_carvana(tmp_path, cars=1, views=1, size=(8, 12))
    assert tree(tmp_path) == {foreign: b"mine"}


def test_no_file_is_left_half_written(tmp_path, monkeypatch):
    def break_off(self, path, **options):
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", break_off)
    with pytest.raises(OSError, match="disk full"):
        write_carvana(tmp_path, cars=1, views=1, size=(8, 12))
    assert tree(tmp_path) == {}


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"cars": 0}, ValueError, "cars=0"),
        ({"cars": []}, ValueError, "nothing to write"),
        ({"cars": [-1]}, ValueError, "cars=-1"),
        ({"cars": ["a"]}, TypeError, "cars='a'"),
        ({"cars": 2.5}, TypeError, "cars=2.5"),
        ({"cars": 1, "views": []}, ValueError, "nothing to write"),
        ({"cars": 1, "views": 0}, ValueError, "views=0"),
        ({"cars": 1, "views": 17}, ValueError, "views=17 must be from 1 to 16"),
        ({"cars": 1, "views": [0]}, ValueError, "views=0"),
        ({"cars": 1, "size": (0, 1)}, ValueError, "size=0"),
        ({"cars": 1, "seed": -1}, ValueError, "seed=-1"),
        ({"cars": 1, "split": ""}, ValueError, "split=''"),
        ({"cars": 1, "split": "a/b"}, ValueError, "split='a/b'"),
        ({"cars": 1, "split": ".."}, ValueError, "split='..'"),
    ],
)
def test_bad_requests_write_nothing(tmp_path, arguments, error, words):
    with pytest.raises(error, match=re.escape(words)):
        write_carvana(tmp_path, **arguments)
    assert not list(tmp_path.iterdir())
