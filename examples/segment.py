"""Segment pictures: a mask and an overlay for each.

python examples/segment.py                         # the sample picture beside this script
python examples/segment.py photo.jpg folder/       # pictures, or folders of them
python examples/segment.py --model runs/carvana/model photo.jpg
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from unetlib import UNet, list_pretrained
from unetlib.arguments import check_device
from unetlib.console import print_any_letter
from unetlib.datasets import IMAGE_SUFFIXES
from unetlib.imaging import read_image
from unetlib.rasters import is_huge_tiff, open_raster
from unetlib.visualize import mask_to_image, overlay

SAMPLE = Path(__file__).parent / "car.jpg"


def main(argv: list[str] | None = None) -> None:
    print_any_letter()
    args = parse_args(argv)
    try:
        segment(args)
    except (ValueError, OSError) as error:  # what the library says is wrong with a file or an option
        raise SystemExit(str(error)) from error


def segment(args: argparse.Namespace) -> None:
    """Write the masks and overlays of all pictures."""
    pictures = find_pictures(args.pictures)
    if args.out.is_file():
        raise ValueError(f"--out {args.out} is a file; name a folder for the masks and overlays")
    if args.out.resolve() in {picture.parent.resolve() for picture in pictures}:
        raise ValueError(f"--out {args.out} is the folder of the pictures, whose files it could replace; name another")
    model = UNet.from_pretrained(args.model, device=args.device)
    if model.preprocessing.multilabel:
        raise ValueError(f"{args.model} is multilabel, and one file cannot hold masks that overlap; use model.predict(picture)")
    count = max(2, model.config.out_channels)
    unnamed = [f"class {k}" for k in range(count)] if count > 2 else ["background", "foreground"]
    names = model.preprocessing.class_names or unnamed
    args.out.mkdir(parents=True, exist_ok=True)
    for picture in pictures:
        start = time.perf_counter()
        image = open_raster(picture)[:, :] if is_huge_tiff(picture) else read_image(picture)
        mask = model.predict(image)
        seconds = time.perf_counter() - start
        mask_path, overlay_path = (args.out / f"{picture.stem}_{kind}.png" for kind in ("mask", "overlay"))
        Image.fromarray(mask_to_image(mask, classes=count)).save(mask_path)
        Image.fromarray(overlay(image, mask)).save(overlay_path)
        shares = [f"{n / mask.size:.1%} {name}" for name, n in zip(names, np.bincount(mask.ravel())) if n]
        print(f"{picture}: {', '.join(shares)}, {seconds:.2f} s -> {mask_path}, {overlay_path}")


def find_pictures(paths: list[Path]) -> list[Path]:
    """The pictures among files and folders, each once; two that would write the same mask are refused."""
    found = []
    for path in paths:
        inside = [path]
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith("."))
        if not inside:
            sys.exit(f"no picture in {path}")
        found += inside
    found = list({os.path.abspath(path): path for path in found}.values())  # one may be given beside its folder
    by_mask: dict[str, Path] = {}
    for path in found:
        first = by_mask.setdefault(path.stem.casefold(), path)  # X.png is x.png on Windows and macOS
        if first is not path:
            sys.exit(f"{first} and {path} would share a mask file; segment them apart, each with its own --out")
    return found


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", type=Path, nargs="*", default=[SAMPLE], help="pictures, or folders of them")
    parser.add_argument(
        "--model", default="carvana", help=f"{', '.join(list_pretrained())}, a folder, a file or a Hub repository (carvana)"
    )
    parser.add_argument("--out", type=Path, default=Path("segmented"), help="folder for the masks and overlays (%(default)s)")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="as PyTorch names it (cuda where there is one)"
    )
    args = parser.parse_args(argv)
    try:
        check_device(args.device)
    except ValueError as error:
        parser.error(str(error))
    return args


if __name__ == "__main__":
    main()
