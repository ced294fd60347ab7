"""The files: names and folders as Kaggle's Carvana challenge has them."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image

from ..arguments import height_and_width, whole
from ..files import whole_file
from .scene import VIEWS, render_scene

logger = logging.getLogger("unetlib")


def car_name(car: int, *, seed: int = 0) -> str:
    """Name a car as Kaggle does: 12 hexadecimal digits, the same for all its views.

    Example:
        >>> len(car_name(0)), car_name(0) == car_name(0), car_name(0) == car_name(0, seed=1)
        (12, True, False)
    """
    car, seed = whole("car", car, 0), whole("seed", seed, 0)
    return hashlib.sha256(f"unetlib.synthetic {seed} {car}".encode()).hexdigest()[:12]


def write_carvana(
    folder: str | os.PathLike[str],
    *,
    cars: int | Iterable[int],
    views: int | Iterable[int] = VIEWS,
    size: tuple[int, int] = (1280, 1918),
    seed: int = 0,
    split: str = "train",
) -> list[Path]:
    """Write scenes as Kaggle's Carvana challenge lays them out.

    A picture goes to `folder/<split>/<car>_<view>.jpg`, its mask to `folder/<split>_masks/<car>_<view>_mask.gif`, in
    palette mode with the values 0 and 1. `<car>` is `car_name(...)`, `<view>` two digits. Each file appears whole or
    not at all, and the same call again writes the same files. For a validation split of other cars call again with
    other numbers: `cars=range(20, 25), split="val"`.

    Args:
        folder: Made where it is missing.
        cars: How many cars, numbered from 0, or their numbers.
        views: How many views of each, from 1, or which of 1 to 16.
        size: Height and width of the pictures.
        seed: See `render_scene`.
        split: First part of the two folders' names.

    Returns:
        The pictures' paths, in the order of cars and views.

    Raises:
        FileExistsError: One of the two folders holds files that this call does not write.
        TypeError, ValueError: As `render_scene`; or there is nothing to write; or `split` is no plain name.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     pictures = write_carvana(folder, cars=2, views=[1, 4], size=(32, 48))
        ...     [path.relative_to(folder).as_posix() for path in pictures[:2]]
        ['train/28e13a2a217b_01.jpg', 'train/28e13a2a217b_04.jpg']
    """
    if not isinstance(cars, Iterable):
        cars = range(whole("cars", cars, 1))
    if not isinstance(views, Iterable):
        views = range(1, whole("views", views, 1, VIEWS) + 1)
    cars, views = [whole("cars", car, 0) for car in cars], [whole("views", view, 1, VIEWS) for view in views]
    size = height_and_width(size)
    scenes = {f"{car_name(car, seed=seed)}_{view:02d}": (car, view) for car in cars for view in views}
    if not scenes:
        raise ValueError(f"nothing to write with cars={cars!r} and views={views!r}: give at least one of each")
    if not split.strip(".") or split != Path(split).name:
        raise ValueError(f'split={split!r} must be a plain folder name, such as "train" or "val"')
    images, masks = Path(folder) / split, Path(folder) / f"{split}_masks"
    refuse_other_files(images, {f"{stem}.jpg" for stem in scenes})
    refuse_other_files(masks, {f"{stem}_mask.gif" for stem in scenes})
    images.mkdir(parents=True, exist_ok=True)
    masks.mkdir(parents=True, exist_ok=True)
    for stem, (car, view) in scenes.items():
        picture, mask = render_scene(car, view, size=size, seed=seed)
        gif = Image.fromarray(mask)
        gif.putpalette([0, 0, 0, 255, 255, 255])
        save(gif, masks / f"{stem}_mask.gif")
        save(Image.fromarray(picture), images / f"{stem}.jpg", quality=92)
    logger.info("wrote %d scenes under %s", len(scenes), folder)
    return [images / f"{stem}.jpg" for stem in scenes]


def refuse_other_files(folder: Path, names: set[str]) -> None:
    """Raise where a folder holds more than files of these names; hidden files do not count."""
    found = {entry.name for entry in folder.iterdir() if entry.name[0] != "."} if folder.is_dir() else set()
    others = found - names
    if others:
        raise FileExistsError(
            f"{folder} holds other files, such as {min(others)!r}, and scenes are never mixed into them: "
            "give an empty or a new folder, or another split="
        )


def save(image: Image.Image, path: Path, **options: Any) -> None:
    """Write an image whole or not at all."""
    with whole_file(path, flush=False) as partial:
        image.save(partial, **options)
