"""Score a model on pictures with masks, at the pictures' own size.

python examples/evaluate.py --images carvana/val --masks carvana/val_masks
python examples/evaluate.py --images carvana/val --masks carvana/val_masks --tta mirror
python examples/evaluate.py --synthetic 50                  # freshly rendered scenes; no data needed
python examples/evaluate.py --model runs/carvana/model --synthetic 50
python examples/evaluate.py --model nuclei --images nuclei/val --masks nuclei/val_masks --objects
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset
from training_options import ignored, mask_suffix, set_aside
from training_runs import without_traceback

from unetlib import ImageMaskDataset, SegmentationMetrics, UNet, boundary_f_score
from unetlib.arguments import check_device, height_and_width, whole
from unetlib.console import add_tta, as_json
from unetlib.inference import evaluate
from unetlib.objects import ObjectMetrics
from unetlib.synthetic import render_scene


class Scenes(Dataset[tuple[NDArray[np.uint8], NDArray[np.uint8]]]):
    """Rendered scenes of one car each, under a seed that training does not use."""

    def __init__(self, count: int, size: tuple[int, int]) -> None:
        self.count, self.size = count, size

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        if index >= self.count:
            raise IndexError(index)
        return render_scene(index, 1 + 5 * index % 16, size=self.size, seed=2026)


class WithObjects(SegmentationMetrics):
    """Counts the objects that are not background, and their edges, too: of one picture in each update."""

    def reset(self) -> None:
        super().reset()
        self.objects = ObjectMetrics()
        self.edges: list[Tensor] = []

    def update(self, logits: Tensor, target: Tensor) -> None:
        super().update(logits, target)
        logits, target = logits.cpu(), target.cpu()
        counting = torch.ones_like(target, dtype=torch.bool) if self.ignore_index is None else target != self.ignore_index
        above = math.log(self.threshold / (1 - self.threshold))  # this decides as `predict` does
        found = (logits[:, 0] > above if self.num_classes == 1 else logits[:, 1:].amax(dim=1) > logits[:, 0]) & counting
        true = (target > 0) & counting
        self.objects.update(found[0].numpy(), true[0].numpy())
        self.edges.append(boundary_f_score(20.0 * found[:, None] - 10, true))

    def compute(self) -> dict[str, float]:
        return {**super().compute(), **self.objects.compute(), "edge_f": torch.stack(self.edges).nanmean().item()}


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(argv)
    check(parser, args)
    with without_traceback():
        model = UNet.from_pretrained(args.model, device=args.device)
        names = model.preprocessing.class_names or [str(k) for k in range(max(2, model.config.out_channels))]
        dataset = load_data(parser, args, model, names)
    start = time.perf_counter()
    kind = WithObjects if args.objects else SegmentationMetrics
    metrics = kind(model.config.out_channels, threshold=model.preprocessing.threshold, ignore_index=ignored(args))
    with without_traceback():  # pictures are read on the way
        scores: dict[str, Any] = evaluate(model, dataset, batch_size=1, progress=True, tta=args.tta, metrics=metrics)
    if model.config.out_channels > 1:
        scores["dice of each class"] = dict(zip(names, metrics.per_class()["dice"]))
    seconds = (time.perf_counter() - start) / len(dataset)
    told = {"pictures": len(dataset), **scores, "seconds a picture with reading and scoring": seconds}
    print(as_json(told, indent=2, digits=5))


def load_data(
    parser: argparse.ArgumentParser, args: argparse.Namespace, model: UNet, names: Sequence[str]
) -> Scenes | ImageMaskDataset:
    """Pictures and masks of the model's classes, which have these names."""
    if model.preprocessing.multilabel:
        raise ValueError(
            f"{args.model} is multilabel, and mask files hold one class for each pixel; use unetlib.inference.evaluate "
            "with pairs of a picture and its masks (C, H, W)"
        )
    if args.synthetic and len(names) > 2:
        raise ValueError(
            f"{args.model} tells {len(names)} classes apart ({', '.join(names)}), and rendered scenes have two; give "
            "--images and --masks"
        )
    if args.synthetic:
        return Scenes(args.synthetic, args.size)
    if len(args.mask_values or range(2)) != len(names):
        parser.error(
            f"the model has {len(names)} classes ({', '.join(names)}); name the masks' values in their order, such as "
            f"--mask-values {' '.join(map(str, range(len(names))))}; where colours are the classes, score in Python: "
            "docs/finetune.md"
        )
    values: Any = "nonzero" if args.nonzero else args.mask_values
    if args.ignore is not None:
        values = set_aside(values, args.ignore)
    suffix = mask_suffix(args.mask_suffix, args.masks)
    grey = model.config.in_channels == 1
    return ImageMaskDataset(args.images, args.masks, mask_suffix=suffix, mode="L" if grey else "RGB", mask_values=values)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="carvana", help="zoo name, folder, file or Hub repository (carvana)")
    parser.add_argument("--images", type=Path, help="folder of pictures")
    parser.add_argument("--masks", type=Path, help="folder of their masks")
    parser.add_argument("--mask-suffix", help="what a mask's name has after its picture's (_mask if a mask has it, or nothing)")
    parser.add_argument("--nonzero", action="store_true", help="masks: 0 is background, all else foreground")
    parser.add_argument("--mask-values", type=int, nargs="+", help="one for each class, in their order")
    parser.add_argument("--ignore", type=int, metavar="VALUE", help="beside --mask-values: pixels of it do not count")
    parser.add_argument("--objects", action="store_true", help="score objects and their edges too (needs scipy)")
    parser.add_argument("--synthetic", type=int, default=0, metavar="N", help="score on N rendered scenes instead")
    parser.add_argument("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="of the scenes (1280 1918)")
    add_tta(parser)
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="as PyTorch names it (cuda where there is one)"
    )
    return parser


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse options that do not go together, before anything is read."""
    if not args.synthetic and not (args.images and args.masks):
        parser.error("give --images and --masks, or --synthetic N")
    if args.synthetic and (args.images or args.masks):
        parser.error("--synthetic scores rendered scenes and --images photographs; give one, not both")
    if args.synthetic and (args.nonzero or args.mask_values or args.ignore is not None):
        parser.error("--nonzero, --mask-values and --ignore are for mask files, and scenes have none; leave them out")
    if args.size and not args.synthetic:
        parser.error("--size is that of the scenes of --synthetic, and photographs are scored at their own; leave it out")
    if args.nonzero and args.mask_values:
        parser.error("--nonzero is for masks of two classes and --mask-values names each class; give one, not both")
    if args.ignore is not None and not args.mask_values:
        parser.error(f"--ignore {args.ignore} needs the values of the classes, such as --mask-values 0 1")
    if args.mask_values and len({*args.mask_values} - {args.ignore}) < 2:
        left_out = "" if args.ignore is None else f" beside --ignore {args.ignore}"
        parser.error(f"--mask-values names fewer than two classes{left_out}, and scores need two; name both")
    try:
        whole("--synthetic", args.synthetic, 0)
        args.size = height_and_width(args.size or (1280, 1918), "--size")
        check_device(args.device)
    except ValueError as error:
        parser.error(str(error))
    if args.objects and importlib.util.find_spec("scipy") is None:
        parser.error("--objects needs scipy: pip install 'unetlib[metrics]'")


if __name__ == "__main__":
    main()
