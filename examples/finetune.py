"""Train a U-Net on pictures of your own: from the zoo's weights or from random ones, two classes or more.

    python examples/finetune.py --data mine --init carvana --size 320 480              # start from weights of the zoo
    python examples/finetune.py --data mine --features 16 32 64 128 --size 320 480     # start from random weights
    python examples/finetune.py --help

`--data` holds `train/` and `train_masks/`, with the same names, and `val/` and `val_masks/` or else a part is held out.
A file `classes.txt` in it names the classes, one a line, background first, in the order of the masks' values.
The loop, with all its options, is that of `train_carvana.py`.
"""

from __future__ import annotations

import argparse
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from train_carvana import train
from training_options import IGNORED, mask_suffix, parse_options, set_aside, starting_model, typed
from training_runs import only_run, without_traceback

from unetlib import ImageMaskDataset, UNet, model_info
from unetlib.console import print_any_letter
from unetlib.distributed import joined_processes
from unetlib.imaging import is_binary, opened

MOST_VALUES = 32  # more in masks without classes.txt are numbered objects or soft edges, hardly classes


def main(argv: list[str] | None = None) -> None:
    print_any_letter()
    args = parse_args(argv)
    with joined_processes(args.device) as process, only_run(args, process):
        say = print if process.rank == 0 else lambda _: None
        with without_traceback(f"--data {args.data}: "):
            class_names, train_set, val_set = load_data(args, say)
        torch.manual_seed(args.seed)
        with without_traceback():
            model = make_model(args, class_names, say)
        classes, folder = f"{', '.join(class_names[:-1])} and {class_names[-1]}", args.data.resolve().name
        about = f"Tells {classes} apart in pictures like those of `{folder}`."
        train(args, process, model, [train_set], val_set, args.out.resolve().name, about)


def load_data(args: argparse.Namespace, say: Callable[[str], Any]) -> tuple[list[str], ImageMaskDataset, ImageMaskDataset]:
    """The names of the classes, and the pictures to train and to validate on, every file of which can be read."""
    own_val = (args.data / "val").is_dir()
    sets = []
    if not args.data.is_dir():
        raise FileNotFoundError("there is no such folder")
    for split in ["train", "val"] if own_val else ["train"]:
        folders = args.data / split, args.data / f"{split}_masks"
        if missing := [folder.name for folder in folders if not folder.is_dir()]:
            raise FileNotFoundError(
                f"there is no folder {missing[0]}/; pictures belong in its folder {split}/ and masks in {split}_masks/: rename "
                "yours, or link to them"
            )
        sets.append(ImageMaskDataset(*folders, mode="L" if args.grey else "RGB", mask_suffix=args.mask_suffix))
    if own_val and (given := [typed(name, getattr(args, name)) for name in ("val_last", "val_share") if getattr(args, name)]):
        raise ValueError(f"{given[0]} holds out pictures of train/, but there is a val/; leave one out")

    names, mask_values = find_classes(args, [dataset.mask_dir / mask for dataset in sets for mask in dataset.masks])
    named = (args.data / "classes.txt").is_file()
    say(f"classes: {', '.join(names)}" + ("" if named else " (found in the masks; classes.txt would name them)"))
    for dataset in sets:
        dataset.mask_values = mask_values
        dataset.check()
    if own_val:
        return names, sets[0], sets[1]
    val = held_out(sets[0].images, args.val_last, args.val_share or 0.1)
    say(f"held out for validation: {', '.join(sets[0].images[i] for i in val[:4])}{', ...' * (len(val) > 4)}")
    return names, sets[0].subset(sorted({*range(len(sets[0]))}.difference(val))), sets[0].subset(val)


def find_classes(args: argparse.Namespace, masks: list[Path]) -> tuple[list[str], Any]:
    """Names of the classes in the masks, and the `mask_values` with which `ImageMaskDataset` reads them."""
    listed = read_names(args.data / "classes.txt")
    found, palettes = values_of(masks)
    if args.ignore is not None:
        if args.nonzero:
            raise ValueError(f"--ignore {args.ignore} is for masks of classes and --nonzero for others; give one, not both")
        if args.ignore not in found:
            raise ValueError(f"--ignore {args.ignore}: no mask holds that number; they hold {', '.join(map(str, found[:8]))}")
        found.remove(args.ignore)
    names, mask_values = classes_of(found, listed, args.nonzero, args.ignore)
    if args.ignore is not None:
        if len(names) > IGNORED:
            raise ValueError(f"--ignore goes with up to {IGNORED} classes, and there are {len(names)}")
        mask_values = set_aside(mask_values or found, args.ignore)
    elif is_binary(mask_values) and (colours := colours_of(palettes, listed)):
        names, mask_values = classes_of(colours, listed, args.nonzero)
    if not is_binary(mask_values):
        check_palettes(palettes)
        if fractions := [value for value in found if isinstance(value, float)]:
            raise ValueError(
                f"the masks hold {fractions[0]}, and classes are whole numbers; round the masks, or give --nonzero if all "
                "but 0 is foreground"
            )
    return names, mask_values


def read_names(listed: Path) -> list[str]:
    """The names in a file, one a line; none where there is no file."""
    try:  # Windows marks the order of bytes
        lines = listed.read_text(encoding="utf-8-sig").split("\n") if listed.is_file() else []
    except UnicodeDecodeError:
        raise ValueError(f"{listed} is not UTF-8; save it again as UTF-8") from None
    return [line.strip() for line in lines if line.strip()]


def values_of(masks: list[Path]) -> tuple[list[Any], set[tuple[int, Any]]]:
    """All values in the masks, sorted: numbers, or (r, g, b) colours; and the numbers with their colours in palettes."""
    found: set[Any] = set()
    palettes: set[tuple[int, Any]] = set()
    bits: set[Any] = set()  # of masks with one bit a pixel
    for path in masks:
        with opened(path) as mask:
            if mask.mode == "1":
                bits |= set(np.unique(np.asarray(mask, np.uint8)).tolist())
            elif len(mask.getbands()) == 1:
                numbers = np.unique(np.asarray(mask)).tolist()
                found |= {int(number) if number == number // 1 else number for number in numbers}  # whole ones of floats
                if mask.mode == "P":
                    palette = [*(mask.getpalette("RGB") or ()), *[0] * 768]  # entries that the file leaves out are black
                    palettes |= {(number, tuple(palette[3 * number : 3 * number + 3])) for number in numbers}
            else:
                found |= {colour for _, colour in mask.convert("RGB").getcolors(mask.width * mask.height) or ()}
    if found in ({255}, {0, 255}):
        bits.discard(1)  # white, as their 255 is
    found |= bits
    if len({isinstance(value, tuple) for value in found}) > 1:
        raise ValueError("some masks hold numbers and others colours; save all of them in one way")
    return sorted(found), palettes


def check_palettes(palettes: set[tuple[int, Any]]) -> None:
    """Refuse palettes that number their colours differently, as encoders that put them in order leave behind."""
    numbers, colours = defaultdict(set), defaultdict(set)
    for number, colour in palettes:
        numbers[colour].add(number)
        colours[number].add(colour)
    for colour, places in sorted(numbers.items()):
        if len(places) > 1 and any(len(colours[place]) > 1 for place in places):
            raise ValueError(
                f"the masks' palettes have the colour {colour} under the numbers {', '.join(map(str, sorted(places)))}, so "
                "that numbers tell no classes apart; save the masks as RGB, or without palettes where numbers are the classes"
            )


def colours_of(palettes: set[tuple[int, Any]], names: list[str]) -> list[Any]:
    """The colours by which binary masks with palettes are read, sorted, if number 0 is not black in all of them; or none."""
    zero = {colour for number, colour in palettes if number == 0}
    colours = sorted({colour for _, colour in palettes})
    if zero <= {(0, 0, 0)} or len(colours) == 1:  # of one colour, numbers tell the pixels apart
        return []
    if names and zero == {colours[-1]}:
        raise ValueError(
            f"the masks' palettes begin with {colours[-1]}, which is the last of their colours, so that classes.txt could name "
            "them in either order; save the masks as RGB, whose colours it names in rising order"
        )
    return colours


def classes_of(found: list[Any], names: list[str], nonzero: bool, ignore: int | None = None) -> tuple[list[str], Any]:
    """Names of the classes, and the `mask_values` with which `ImageMaskDataset` reads them; none are of the value `ignore`."""
    values = f"{len(found)} values ({', '.join(map(str, found[:8]))}{', ...' * (len(found) > 8)})"
    if len(found) < 2:
        held = f"the one value {found[0]}" if found else "no value that counts"
        raise ValueError(f"the masks hold {held}; there is nothing to tell apart")
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise ValueError(f"classes.txt names {', '.join(twice)} more than once; give each class a name of its own")
    if nonzero and 0 not in found and (0, 0, 0) not in found:
        raise ValueError(f"the masks hold {values} and no 0, so that --nonzero makes all of them foreground; leave it out")
    if not names and len(found) > MOST_VALUES and not nonzero:
        raise ValueError(
            f"the masks hold {values}. If they are classes, name them in classes.txt; if all but 0 is foreground, as where "
            "objects are numbered, give --nonzero"
        )
    binary = nonzero or (len(found) == 2 and found[0] in (0, (0, 0, 0)))
    names = names or (["background", "foreground"] if binary else [f"class {value}" for value in found])
    if len(names) == (2 if nonzero else len(found)):
        return names, "nonzero" if nonzero else None if binary else found
    if not nonzero and isinstance(found[0], int) and found[-1] < len(names):  # line k names value k, which may be in no mask
        counting = [k for k in range(len(names)) if k != ignore]
        return [names[k] for k in counting], counting
    beside = "" if ignore is None else f" beside {typed('ignore', ignore)}"
    raise ValueError(f"classes.txt names {len(names)} classes ({', '.join(names)}), but the masks hold {values}{beside}")


def held_out(images: list[str], last: int, share: float) -> list[int]:
    """Numbers of the pictures to validate on: the last ones, 10 after 9, or a random share, always the same."""
    if len(images) < 2:
        raise ValueError("one picture cannot be both trained on and held out; give two or more, or val/ and val_masks/")
    count = last or max(1, round(share * len(images)))
    if not 0 < count < len(images):
        raise ValueError(f"cannot hold out {count} of {len(images)} pictures; see --val-last and --val-share")
    if last:
        by_number = [[int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", image)] for image in images]
        return sorted(range(len(images)), key=by_number.__getitem__)[-last:]
    return sorted(torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count].tolist())


def make_model(args: argparse.Namespace, class_names: list[str], say: Callable[[str], Any]) -> UNet:
    """The network to train, which knows how pictures become its input and what its classes are called."""
    needed = {"in_channels": 1 if args.grey else 3, "out_channels": 1 if len(class_names) == 2 else len(class_names)}
    model = starting_model(args, **needed)
    if args.init:
        before = model_info(args.init).config
        changes = [f"{key} {getattr(before, key)} -> {n}" for key, n in needed.items() if getattr(before, key) != n]
        say(f"starting from {args.init}, " + (f"its ends replaced: {', '.join(changes)}" if changes else "its head kept"))
    size = None if args.own_size or args.window else tuple(args.size)  # windows are cut out at the pictures' own scale
    model.preprocessing = replace(
        model.preprocessing, size=size, scale=None, threshold=0.5, class_names=tuple(class_names), multilabel=False
    )
    return model


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder as above")
    add("--val-last", type=int, default=0, metavar="N", help="hold out the last N pictures by name: slices, frames")
    add("--val-share", type=float, metavar="SHARE", help="hold out such a part at random (0.1)")
    add("--mask-suffix", help="what a mask's name has after its picture's (_mask if a mask has it, or nothing)")
    add("--nonzero", action="store_true", help="two classes: 0 is background, all else is foreground")
    add("--ignore", type=int, metavar="VALUE", help="a mask's value whose pixels do not count, such as 255")
    add("--grey", action="store_true", help="read pictures as grey: one input channel")
    add("--own-size", action="store_true", help="predict at each picture's own size, as with --window, instead of --size")
    args = parse_options(parser, argv, out=Path("runs/finetuned"), epochs=100, batch_size=8)
    args.mask_suffix = mask_suffix(args.mask_suffix, args.data / "train_masks")
    if args.val_share is not None and args.val_last:
        parser.error(f"--val-last {args.val_last} and --val-share {args.val_share} both hold out pictures; give one of the two")
    if args.val_share is not None and not 0 < args.val_share < 1:
        parser.error(f"--val-share must be above 0 and below 1, such as 0.1, not {args.val_share}")
    return args


if __name__ == "__main__":
    main()
