"""Folders of pictures and masks as PyTorch data sets, the split by car, and Carvana's run-length code."""

from __future__ import annotations

import copy
import hashlib
import inspect
import random
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from os import PathLike
from pathlib import Path, PurePath
from typing import Any, Literal, TypeVar, overload

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch.utils.data import Dataset, get_worker_info

from .arguments import height_and_width, is_number
from .imaging import MaskValues, class_of_value, read_image, read_labels, read_mask, to_tensor

MASK_SUFFIXES = (".gif", ".png", ".tif", ".tiff", ".bmp", ".ppm", ".pgm", ".pbm")
_LOSSY_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".webp")
IMAGE_SUFFIXES = _LOSSY_SUFFIXES + MASK_SUFFIXES
_SYSTEM_FILES = ("thumbs.db", "desktop.ini")
_NAMED = 3  # of each kind of problem

DatasetT = TypeVar("DatasetT", bound="ImageMaskDataset")
NameT = TypeVar("NameT", bound="str | PathLike[str]")


class ImageMaskDataset(Dataset[tuple[Any, Any]]):
    """Pictures in one folder, their masks in another (or the same), paired by name.

    `<name>.<any picture format>` pairs with `<name><mask_suffix>.<any lossless format>`. Pairs are sorted by name. The
    pairing is checked when the data set is made; what is inside the files is checked when they are read, or all at once
    by `check()`. `unetlib.imaging` says how colour, grey, 16-bit and turned pictures and every form of mask are read.

    Args:
        image_dir: Folder of pictures; or which files of a folder, with one `*` for the `<name>`: `"data/img_*"` (any format)
            or `"data/*_sat.jpg"`.
        mask_dir: Folder of masks, or which files, likewise. May be the folder of the pictures if `mask_suffix` or a pattern
            tells the masks apart.
        transform: Called on each pair, in one of two ways:
            a torchvision v2 transform (any `nn.Module`) as `transform(image, mask)`, with `tv_tensors.Image` (uint8,
            CxHxW) and `tv_tensors.Mask` (HxW); `unetlib.transforms` has ready ones;
            an albumentations pipeline, or whatever else has keywords `image` and `mask`, as
            `transform(image=image, mask=mask)`, with the arrays one gets without a transform; but class indices are
            handed as int16, which OpenCV takes, and come back as int64. In a `DataLoader`'s workers its chance comes from
            torch's generator, so that no two are alike. Other callables are called the first way. The result is
            `(image, mask)` or a dictionary of "image" and "mask".
        mask_suffix: What a mask's `<name>` has after its picture's.
        names: The pictures to take, by `<name>` or by file name, such as those of a split's list; the others may be without a
            mask. `None` takes all.
        mode: `"RGB"`, or `"L"` for grey: the model's `in_channels` is then 1.
        mask_values: `None` for binary masks, otherwise the values or colours that are the classes; see
            `unetlib.imaging.read_mask`.

    Attributes:
        image_dir: Folder of the pictures.
        mask_dir: Folder of the masks.
        images: File names of the pictures, sorted.
        masks: File names of their masks.
        transform: As given; may be replaced, also on one side of a split.

    Raises:
        FileNotFoundError: A folder does not exist.
        ValueError: The folders do not pair up: one error that counts missing masks, stray files and names that clash, and
            names the first of each kind. Hidden files (`.DS_Store`) are ignored. Or a pattern of several `*`, empty `names`, a
            wrong `mode`, or value in `mask_values`.
        TypeError: `transform` is not callable, or does not take a picture and its mask; or `mask_suffix`, `names` or
            `mask_values` is of another type.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> folder = Path(tempfile.mkdtemp())
        >>> Image.new("RGB", (8, 6)).save(folder / "cat.jpg")
        >>> Image.new("L", (8, 6), 255).save(folder / "cat_mask.png")
        >>> image, mask = ImageMaskDataset(folder, folder, mask_suffix="_mask")[0]
        >>> image.shape, image.dtype, mask.shape, mask.dtype, float(mask.min())
        ((6, 8, 3), dtype('uint8'), (6, 8), dtype('float32'), 1.0)
    """

    def __init__(
        self,
        image_dir: str | PathLike[str],
        mask_dir: str | PathLike[str],
        transform: Callable[..., Any] | None = None,
        *,
        mask_suffix: str = "",
        names: Iterable[str] | None = None,
        mode: Literal["RGB", "L"] = "RGB",
        mask_values: MaskValues = None,
    ) -> None:
        check_transform(transform)
        if mode not in ("RGB", "L"):
            raise ValueError(f'mode must be "RGB" or "L", not {mode!r}')
        if not isinstance(mask_suffix, str):
            raise TypeError(f'mask_suffix must be a string, such as "_mask", or "" for none, not {mask_suffix!r}')
        class_of_value(mask_values)  # wrong ones are refused here rather than in a worker
        self.image_dir, self.mask_dir = (_folder_and_pattern(Path(where))[0] for where in (image_dir, mask_dir))
        self.transform = transform
        self.mode: Literal["RGB", "L"] = mode
        self.mask_values: MaskValues = mask_values
        self.images, self.masks = _pair(Path(image_dir), Path(mask_dir), mask_suffix, names, self._advice)

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        """The picture and mask number `index`.

        Returns:
            Without a transform a uint8 array (H, W, C), where C is 3, or 1 for grey, and a mask (H, W): float32 of 0.
            and 1., or int64 class indices if `mask_values` names classes. With one, what it gives.

        Raises:
            TypeError: for a slice.
            ValueError: A file cannot be read, the sizes differ, or the mask holds values other than expected.
        """
        refuse_slice(index)
        image_path, mask_path = self.paths(index)
        image = read_image(image_path, self.mode)
        mask = read_mask(mask_path, self.mask_values)
        if image.shape[:2] != mask.shape:
            raise ValueError(size_clash(image_path, image.shape[:2], mask_path, mask.shape))
        return (image, mask) if self.transform is None else apply_transform(self.transform, image, mask)

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        """The pairs in order; an `IndexError` of a transform is raised, where Python's own loop would take it for the end."""
        return (self[index] for index in range(len(self)))

    def __repr__(self) -> str:
        """One line with the folders and the count."""
        return f"{type(self).__name__}({str(self.image_dir)!r}, {str(self.mask_dir)!r}): {len(self)} pairs"

    def subset(self: DatasetT, indices: Iterable[int]) -> DatasetT:
        """The same data set with the pairs at `indices` only, and a `transform` of its own to replace.

        Raises:
            TypeError: for booleans, names or fractions instead of numbers.
            IndexError: for a number that there is no pair of.

        Example:
            >>> dataset.subset(range(100))  # doctest: +SKIP
            CarvanaDataset('train', 'train_masks'): 100 pairs
        """
        part = copy.copy(self)
        chosen = [index.item() if hasattr(index, "item") else index for index in indices]  # NumPy's and PyTorch's numbers
        if not all(type(index) is int for index in chosen):
            raise TypeError(
                "subset takes the numbers of the pairs, such as [i for i, name in enumerate(dataset.images) if ...]"
            )
        if outside := [index for index in chosen if not -len(self) <= index < len(self)]:
            raise IndexError(f"there is no pair {outside[0]}: the data set has {len(self)}, numbered from 0")
        part.images = [self.images[i] for i in chosen]
        part.masks = [self.masks[i] for i in chosen]
        return part

    def check(self) -> None:
        """Read every file once, without the transform, and count all that is wrong.

        Raises:
            ValueError: One error that counts pictures and masks that cannot be read, sizes that clash and unexpected mask
                values, and names the first of each kind.
            MemoryError: There is too little memory for one.

        Example:
            >>> CarvanaDataset("train", "train_masks").check()  # doctest: +SKIP
        """
        problems: dict[str, list[str]] = {
            "unreadable picture": [],
            "unreadable mask or unexpected value": [],
            "size clash": [],
        }

        def read(index: int) -> None:
            image_path, mask_path = self.paths(index)
            image = mask = None
            try:
                image = read_image(image_path, self.mode)
            except (ValueError, FileNotFoundError) as error:
                problems["unreadable picture"].append(str(error))
            try:
                mask = read_labels(mask_path, self.mask_values)
            except (ValueError, FileNotFoundError) as error:
                problems["unreadable mask or unexpected value"].append(str(error))
            if image is not None and mask is not None and image.shape[:2] != mask.shape:
                problems["size clash"].append(size_clash(image_path, image.shape[:2], mask_path, mask.shape))

        with ThreadPoolExecutor() as pool:  # decoding releases the interpreter lock
            list(pool.map(read, range(len(self))))
        _raise_problems(problems, self.image_dir, self.mask_dir)

    def paths(self, index: int) -> tuple[Path, Path]:
        """The files of the picture and mask number `index`."""
        return self.image_dir / self.images[index], self.mask_dir / self.masks[index]

    @staticmethod
    def _advice(image: str, masks: Iterable[str]) -> str:
        """What to type where no mask has the name of a picture."""
        if longer := [mask for mask in masks if mask.startswith(image)]:
            return f"If they belong together, give mask_suffix={min(longer, key=len).removeprefix(image)!r} (--mask-suffix)."
        return (
            "If they belong together, give them the same names, or write * for what their names share, as in 'pictures/img_*' "
            "and 'masks/mask_*' (evaluate.py: --images, --masks)."
        )


class CarvanaDataset(ImageMaskDataset):
    """Kaggle's Carvana Image Masking Challenge: `<car>_<view>.jpg` pairs with `<car>_<view>_mask.gif` (or `.png`).

    Download `train_hq.zip` (or `train.zip`) and `train_masks.zip` from the competition's page, after accepting its
    rules there.

    Args:
        image_dir: Folder of pictures.
        mask_dir: Folder of masks.
        transform: An albumentations or torchvision v2 transform; see `ImageMaskDataset`.

    Raises:
        FileNotFoundError: A folder does not exist.
        ValueError: The folders do not pair up; see `ImageMaskDataset`.

    Example:
        >>> from unetlib.transforms import train_transform
        >>> dataset = CarvanaDataset("train", "train_masks", train_transform((160, 240)))  # doctest: +SKIP
        >>> train, val = split_by_car(dataset, val_fraction=0.1)  # doctest: +SKIP
    """

    def __init__(
        self, image_dir: str | PathLike[str], mask_dir: str | PathLike[str], transform: Callable[..., Any] | None = None
    ) -> None:
        try:
            super().__init__(image_dir, mask_dir, transform, mask_suffix="_mask")
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{error}. For Carvana, accept the competition's rules on Kaggle, download train_hq.zip and train_masks.zip, "
                "and unpack both."
            ) from None

    @staticmethod
    def _advice(image: str, masks: Iterable[str]) -> str:  # no mask_suffix, which is Carvana's here
        return "Carvana's masks are <car>_<view>_mask.gif or .png; ImageMaskDataset takes others, as examples/finetune.py does."


@overload
def split_by_car(dataset: DatasetT, val_fraction: float = 0.1, seed: int = 0) -> tuple[DatasetT, DatasetT]: ...
@overload
def split_by_car(dataset: Sequence[NameT], val_fraction: float = 0.1, seed: int = 0) -> tuple[list[NameT], list[NameT]]: ...
def split_by_car(dataset: Any, val_fraction: float = 0.1, seed: int = 0) -> tuple[Any, Any]:
    """Split into training and validation so that no car is on both sides.

    A car's 16 views look alike: a split by picture would test on cars the model has trained on. The choice depends on
    the cars' names and `seed` alone, so it is the same on every machine and for every order of the pictures.

    Args:
        dataset: A `CarvanaDataset` (or another `ImageMaskDataset` with such names), or a list of file names
            `<car>_<view>.<suffix>`.
        val_fraction: Part of the cars to hold back, rounded to whole cars, at least one on each side.
        seed: Another seed gives another choice.

    Returns:
        `(train, val)`: two data sets, each with a `transform` of its own to set, or two lists of names in the given
        order.

    Raises:
        ValueError: `val_fraction` is not between 0 and 1, there are fewer than two cars, or a name has no car in it.
        TypeError: `dataset` is neither.

    Example:
        >>> split_by_car(["a_01.jpg", "a_02.jpg", "b_01.jpg", "b_02.jpg"], val_fraction=0.5)
        (['a_01.jpg', 'a_02.jpg'], ['b_01.jpg', 'b_02.jpg'])

        With a data set: `train, val = split_by_car(dataset)`, then `val.transform = eval_transform((160, 240))`.
    """
    if not is_number(val_fraction) or not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction must lie between 0 and 1, not be {val_fraction!r}")
    names = dataset.images if isinstance(dataset, ImageMaskDataset) else dataset
    if not isinstance(names, Sequence) or isinstance(names, str):
        raise TypeError(
            f"split_by_car takes an ImageMaskDataset or a list of file names, not a {type(names).__name__}; give list(...) of "
            "what else holds names"
        )
    cars = [car_id(name) for name in names]
    ranked = sorted(set(cars), key=lambda car: hashlib.sha256(f"{seed}/{car}".encode()).digest())
    if len(ranked) < 2:
        raise ValueError(f"a split by car needs two or more cars, but there are {len(ranked)} in {len(names)} pictures")
    held_back = set(ranked[: min(max(round(float(val_fraction) * len(ranked)), 1), len(ranked) - 1)])
    train = [i for i, car in enumerate(cars) if car not in held_back]
    val = [i for i, car in enumerate(cars) if car in held_back]
    if isinstance(dataset, ImageMaskDataset):
        return dataset.subset(train), dataset.subset(val)
    return [names[i] for i in train], [names[i] for i in val]


def car_id(name: str | PathLike[str]) -> str:
    """The car in a Carvana file name: what stands before the last underscore, `_mask` aside.

    Raises:
        ValueError: The name has no such part.

    Example:
        >>> car_id("00087a6bd4dc_01.jpg"), car_id("train_masks/00087a6bd4dc_01_mask.gif")
        ('00087a6bd4dc', '00087a6bd4dc')
    """
    car, _, view = PurePath(name).stem.removesuffix("_mask").rpartition("_")
    if not car or not view:
        raise ValueError(f"no car in the name {str(name)!r}; expected <car>_<view>, such as 00087a6bd4dc_01.jpg")
    return car


def rle_encode(mask: ArrayLike) -> str:
    """Write a mask in the run-length code of the Carvana competition.

    Pixels are numbered from 1, left to right, then top to bottom; the code lists "start length" of each run of
    foreground.

    Args:
        mask: Array (H, W); what is not 0 is foreground.

    Returns:
        "start length start length ...", empty for an empty mask.

    Raises:
        ValueError: `mask` does not have two dimensions.

    Example:
        >>> rle_encode([[0, 1, 1], [1, 0, 1]])
        '2 3 6 1'
    """
    pixels = np.asarray(mask)
    if pixels.ndim != 2:
        raise ValueError(f"mask must have two dimensions (H, W), not the shape {pixels.shape}")
    foreground = pixels.reshape(-1).astype(np.bool_, copy=False)  # NumPy compares bools with 0 as int64
    padded = np.concatenate(([False], foreground, [False]))
    runs = np.flatnonzero(padded[1:] != padded[:-1]) + 1
    runs[1::2] -= runs[::2]
    return " ".join(map(str, runs.tolist()))


def rle_decode(rle: str, shape: tuple[int, int]) -> NDArray[np.uint8]:
    """Read a mask written by `rle_encode`, or a line of a Carvana submission or of `train_masks.csv`.

    Args:
        rle: "start length start length ...": 1-based, row by row, in rising order, not overlapping.
        shape: (H, W) of the mask: (1280, 1918) for Carvana.

    Returns:
        uint8 array (H, W) of 0 and 1.

    Raises:
        ValueError: `rle` holds anything but pairs of positive whole numbers, or runs that overlap or leave the picture.
        TypeError: `rle` is not a string, or `shape` no pair of integers.

    Example:
        >>> rle_decode("2 3 6 1", (2, 3))
        array([[0, 1, 1],
               [1, 0, 1]], dtype=uint8)
    """
    if not isinstance(rle, str):
        raise TypeError(f'rle must be a string, not {rle!r} (an empty mask is "", which pandas reads as NaN)')
    height, width = height_and_width(shape, "shape")
    words = rle.split()
    if unknown := [word for word in words if not (word.isascii() and word.isdigit())]:
        raise ValueError(f"rle must hold whole numbers separated by spaces, not {unknown[0]!r}")
    if len(words) % 2:
        raise ValueError(f'rle must hold pairs "start length", but has {len(words)} numbers')
    mask = np.zeros(height * width, np.uint8)
    end = 0  # of the run before, in pixels from 0
    for start, length in zip(map(int, words[::2]), map(int, words[1::2]), strict=True):
        if length < 1 or start <= end or start - 1 + length > mask.size:
            raise ValueError(
                f'rle has the run "{start} {length}" after pixel {end}; runs must have a length of 1 or more, rise '
                f"without overlap, and lie in 1..{mask.size} for the shape {height}x{width}"
            )
        end = start - 1 + length
        mask[start - 1 : end] = 1
    return mask.reshape(height, width)


def refuse_slice(index: Any) -> None:
    """Say how a part of a data set is taken."""
    if isinstance(index, slice):
        raise TypeError(f"one picture at a time, not {index}; dataset.subset(range(...)) is a part of the data set")


def check_transform(transform: Any) -> None:
    """Refuse what `apply_transform` cannot call; None is no transform.

    Raises:
        TypeError: for what cannot be called, or not with a picture and its mask.
    """
    if transform is None:
        return
    if not callable(transform):
        raise TypeError(f"transform must be callable or None, not {transform!r}")
    if type(transform).__module__.startswith("monai."):  # would take the mask for another option
        raise TypeError(
            f"{type(transform).__name__} of MONAI takes one dictionary; give an object with it as self.transform, and whose "
            '__call__(self, image, mask) returns self.transform({"image": image.transpose(2, 0, 1), "mask": mask[None]})'
        )
    if not (_by_keyword(transform) or _binds(transform, None, None)):
        raise TypeError(
            f"{type(transform).__name__} does not take a picture and its mask; give a preset of unetlib.transforms, "
            "transforms of torchvision.transforms.v2, or an albumentations pipeline"
        )


def apply_transform(transform: Callable[..., Any], image: NDArray[np.uint8], mask: NDArray[Any]) -> tuple[Any, Any]:
    """Call a transform in its way, see `ImageMaskDataset`, on a picture (H, W, C) and its mask (H, W).

    Raises:
        TypeError: if it does not give a picture and a mask.
    """
    if by_keyword := _by_keyword(transform):
        # albumentations' own state is the program's in every worker, and in every epoch: all would augment alike. MONAI has a
        # method of that name too, which takes seeds.
        if get_worker_info() is not None and hasattr(transform, "py_random") and hasattr(transform, "set_random_state"):
            seed = int(torch.randint(2**63 - 1, (), device="cpu"))
            transform.set_random_state(np.random.default_rng(seed), random.Random(seed))
        result = transform(image=image, mask=_for_opencv(mask))
    else:
        from torchvision import tv_tensors  # here, so that albumentations needs no torchvision

        # Without a device they would go to the default one.
        parts = tv_tensors.Image(to_tensor(image), device="cpu"), tv_tensors.Mask(torch.from_numpy(mask), device="cpu")
        result = transform(*parts)
    if isinstance(result, Mapping) and {"image", "mask"} <= result.keys():
        result = result["image"], result["mask"]
    if not isinstance(result, (tuple, list)) or len(result) != 2:
        raise TypeError(
            f'{type(transform).__name__} must give (image, mask) or {{"image": ..., "mask": ...}}, but gave a '
            f"{type(result).__name__}"
        )
    new_image, new_mask = result
    return new_image, _as_int64(new_mask) if by_keyword and mask.dtype.kind in "iu" else new_mask


def _for_opencv(mask: NDArray[Any]) -> NDArray[Any]:
    """A mask in a type that all of OpenCV takes."""
    if mask.dtype == np.bool_:
        return mask.astype(np.float32)
    # Not bytes: a transform may fill in -100, which cross-entropy leaves out.
    return mask.astype(np.int16) if mask.dtype.kind in "iu" and mask.max(initial=0) < 2**15 else mask


def _as_int64(classes: Any) -> Any:
    """Class indices, which may be of any integer type, in the one that cross-entropy takes; floats stay."""
    if isinstance(classes, torch.Tensor):
        return classes if classes.is_floating_point() or classes.dtype == torch.bool else classes.long()
    return classes.astype(np.int64) if isinstance(classes, np.ndarray) and classes.dtype.kind in "iu" else classes


def _by_keyword(transform: Callable[..., Any]) -> bool:
    """Whether it is called as albumentations' pipelines are; modules are called as torchvision's."""
    return not isinstance(transform, torch.nn.Module) and _binds(transform, image=None, mask=None)


def _binds(transform: Callable[..., Any], *args: None, **kwargs: None) -> bool:
    """Whether a callable takes such arguments; one that is built in and has no signature takes them by position."""
    try:
        # A module's own call takes anything, and hands it on to its `forward`.
        inspect.signature(transform.forward if isinstance(transform, torch.nn.Module) else transform).bind(*args, **kwargs)
    except TypeError:
        return False
    except ValueError:
        return not kwargs
    return True


def _pair(
    image_dir: Path, mask_dir: Path, mask_suffix: str, names: Iterable[str] | None, advise: Callable[[str, Iterable[str]], str]
) -> tuple[list[str], list[str]]:
    """The sorted names of the pictures and of their masks, or one error about all that does not pair up."""
    (image_folder, image_pattern), (mask_folder, mask_pattern) = map(_folder_and_pattern, (image_dir, mask_dir))
    image_files, mask_files = _list_folder(image_folder, image_pattern), _list_folder(mask_folder, mask_pattern)
    mask_suffix = unicodedata.normalize("NFC", mask_suffix)
    if image_folder.resolve() == mask_folder.resolve():
        if not mask_suffix and image_pattern == mask_pattern:
            raise ValueError(
                f"pictures and masks are both in {image_folder}; tell them apart by mask_suffix='_mask' or similar "
                "(--mask-suffix)"
            )
        if mask_suffix or mask_pattern != "*":
            mask_files = {path: key for path, key in mask_files.items() if key.endswith(mask_suffix)}
            image_files = _without(image_files, mask_files)
        else:  # the pattern of the pictures tells
            mask_files = _without(mask_files, image_files)
    missing: set[str] = set()
    if names is not None:
        wanted = _listed(names)
        found = {path: {key, unicodedata.normalize("NFC", path.name)} for path, key in image_files.items()}
        image_files = {path: key for path, key in image_files.items() if found[path] & wanted}
        missing = wanted.difference(*(found[path] for path in image_files))
        theirs = {key + mask_suffix for key in image_files.values()}
        mask_files = {path: key for path, key in mask_files.items() if key in theirs}
    images, other_images = _by_key(image_files, IMAGE_SUFFIXES)
    masks, other_masks = _by_key(mask_files, MASK_SUFFIXES)
    lossy = {path for path in other_masks if path.suffix.lower() in _LOSSY_SUFFIXES and path.is_file()}

    unmasked = [key for key in images if key + mask_suffix not in masks]
    unused = masks.keys() - {key + mask_suffix for key in images}
    several = [paths for group in (images, masks) for paths in group.values() if len(paths) > 1]
    formats = "" if _names_a_format(mask_pattern) else ".gif or .png"
    problems = {
        "name without a picture": [f"{name} (in {image_dir})" for name in missing],
        "picture without a mask": [
            f"{images[key][0]} (no {mask_pattern.replace('*', key + mask_suffix)}{formats} in {mask_folder})"
            for key in unmasked
        ],
        "mask without a picture": [str(masks[key][0]) for key in unused],
        "name in several formats": [" and ".join(map(str, paths)) for paths in several],
        "mask in a lossy format (draw or save it as PNG)": [str(path) for path in lossy],
        "stray file or folder": [str(path) for path in [*other_images, *other_masks] if path not in lossy],
    }
    advice = advise(min(images), masks) if images and masks and len(unmasked) == len(images) else ""
    _raise_problems(problems, image_dir, mask_dir, advice)
    if not images:
        raise ValueError(f"there are no pictures ({', '.join(IMAGE_SUFFIXES)}) in {image_dir}")
    keys = sorted(images, key=lambda key: images[key][0].name)
    return [images[key][0].name for key in keys], [masks[key + mask_suffix][0].name for key in keys]


def _listed(names: Iterable[str]) -> set[str]:
    if isinstance(names, (str, PathLike)):
        raise TypeError(f"names must be a list of names, such as Path({str(names)!r}).read_text().split(), not {names!r}")
    listed = [*names]
    if not listed:
        raise ValueError("names is empty; give None to take all pictures")
    for name in listed:
        if not isinstance(name, str):
            raise TypeError(f"names must hold strings, such as 'cat' or 'cat.jpg', not {name!r}")
    return {unicodedata.normalize("NFC", name) for name in listed}


def _without(files: Mapping[Path, str], others: Iterable[Path]) -> dict[Path, str]:
    taken = {path.name for path in others}  # the folder may be written in two ways
    return {path: key for path, key in files.items() if path.name not in taken}


def _folder_and_pattern(path: Path) -> tuple[Path, str]:
    """A folder, and a pattern of names in it; `*` is all of them."""
    if "*" not in path.name or path.is_dir():
        return path, "*"
    pattern = path.name.removesuffix(".*")
    if pattern.count("*") != 1:
        raise ValueError(f"a pattern has one *, for what a picture and its mask share, as in img_*, not {path.name!r}")
    return path.parent, unicodedata.normalize("NFC", pattern)


def _list_folder(folder: Path, pattern: str) -> dict[Path, str]:
    """What is in a folder and fits a pattern, each with what the `*` stands for, by which pictures and masks pair up."""
    others = {*folder.name, *pattern.replace("*", "")} & {*"*?[{"}
    wildcards = "; only one * is understood, in the names of files, as in img_*" if others else ""
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {str(folder)!r}{wildcards}")
    ending = "" if _names_a_format(pattern) else r"(\.[^.]*)?"
    form = re.compile(re.escape(pattern).replace(r"\*", "(.*?)") + ending, re.DOTALL)
    files = [path for path in sorted(folder.iterdir()) if path.name[0] != "." and path.name.lower() not in _SYSTEM_FILES]
    # Names that come from a Mac may have their accents apart.
    matches = ((path, form.fullmatch(unicodedata.normalize("NFC", path.name))) for path in files)
    found = {path: match[1] for path, match in matches if match}
    if wildcards and not found:
        raise ValueError(f"no file in {folder} fits {pattern!r}{wildcards}")
    return found


def _names_a_format(pattern: str) -> bool:
    return pattern.lower().endswith(IMAGE_SUFFIXES)


def _by_key(files: Mapping[Path, str], suffixes: Sequence[str]) -> tuple[dict[str, list[Path]], list[Path]]:
    """Files of the given kinds by the part of their name that pairs them, and all the rest."""
    found: dict[str, list[Path]] = {}
    rest: list[Path] = []
    for path, key in files.items():
        if path.suffix.lower() in suffixes and path.is_file():
            found.setdefault(key, []).append(path)
        else:
            rest.append(path)
    return found, rest


def size_clash(image_path: Path, image: tuple[int, ...], mask_path: Path, mask: tuple[int, ...]) -> str:
    """What to say of a picture and a mask whose (height, width) differ.

    Example:
        >>> print(size_clash(Path("a.jpg"), (2, 3), Path("a.gif"), (2, 4)))
        a.jpg is 3x2, but its mask a.gif is 4x2 (width x height, upright). Save the mask at the picture's size.
    """
    advice = "Save the mask at the picture's size."
    if image == mask[::-1]:
        advice = "Turn the mask: programs that pass over EXIF draw it on the picture as that is stored."
    return (
        f"{image_path} is {image[1]}x{image[0]}, but its mask {mask_path} is {mask[1]}x{mask[0]} (width x height, "
        f"upright). {advice}"
    )


def _raise_problems(problems: Mapping[str, list[str]], images: Path, masks: Path, advice: str = "") -> None:
    """Raise one error that counts each kind of problem and names the first few, if there is any."""
    lines = []
    for kind, found in problems.items():
        if found:
            lines.append(f"{len(found)} x {kind}:")
            lines += [f"  {text}" for text in sorted(found)[:_NAMED]]
            lines += [f"  ... and {len(found) - _NAMED} more"] * (len(found) > _NAMED)
    if lines:
        raise ValueError("\n".join([f"pictures in {images} and masks in {masks}:", *lines, *filter(None, [advice])]))
