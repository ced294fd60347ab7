"""The options of training, which train_carvana.py and finetune.py share, whole recipes of them, and what they make."""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import shlex
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LinearLR, LRScheduler, OneCycleLR, SequentialLR
from torchvision.transforms import v2

from unetlib import BCEDiceLoss, CrossEntropyLoss, ImageMaskDataset, UNet
from unetlib.adapt import grow
from unetlib.arguments import at_least, check_device, height_and_width, whole
from unetlib.config import MATCHES
from unetlib.console import printable
from unetlib.imaging import class_of_value, image_size
from unetlib.transforms import train_transform

PRESETS: dict[str, dict[str, Any]] = {
    # The study: half precision with a scaler where there is CUDA, no schedule, validation at the network's size.
    "study": {
        "features": [64, 128, 256, 512], "size": [160, 240], "epochs": 3, "batch_size": 32, "lr": 1e-4, "weight_decay": 0.0,
        "schedule": "constant", "loss": "bce", "clip": 0.0, "ema": 0.0, "rotation": 35.0, "horizontal_flip": 0.5,
        "vertical_flip": 0.1, "color_jitter": 0.0, "channels_last": False, "validate_at": "size",
        "precision": "fp16" if torch.cuda.is_available() else "fp32",
    },
    # For one large GPU: full resolution in patches, weighted borders, a long cosine, averaged weights. `--init carvana` begins
    # with the zoo's weights, which have these widths.
    "full": {
        "features": [32, 48, 64, 96, 128, 192], "bottleneck": 192, "patch_size": 2, "match": "replicate", "size": [1280, 1918],
        "epochs": 30, "batch_size": 8, "lr": 1e-3, "weight_decay": 0.01, "schedule": "cosine", "clip": 1.0, "ema": 0.998,
        "loss": "bce-dice", "border_weight": 3.0, "border_size": 25, "rotation": 0.0, "vertical_flip": 0.0,
        "color_jitter": 0.25, "low_resolution": 0.25, "least_resolution": 0.1, "validate_every": 5, "cache_gib": 12.0,
    },
}  # fmt: skip

# Options of `unetlib.transforms.train_transform`.
AUGMENTATION = (
    "rotation", "horizontal_flip", "vertical_flip", "color_jitter", "grayscale", "invert", "crop", "scale", "elastic",
    "quarter_turns", "reflect", "low_resolution", "least_resolution", "jpeg", "noise",
)  # fmt: skip

IGNORED = 255  # the class of pixels that do not count

# The least that whole numbers may be.
LEAST = {"features": 1, "bottleneck": 1, "patch_size": 1, "epochs": 1, "batch_size": 1, "accumulate": 1, "border_size": 1}
LEAST |= {"validate_every": 1, "checkpoint_every": 0, "workers": 0}


def parse_options(parser: argparse.ArgumentParser, argv: Sequence[str] | None, **defaults: Any) -> argparse.Namespace:
    """Parse the options that `parser` has and those of training, with other `defaults`; what cannot be right is an error."""
    add_training_options(parser)
    parser.set_defaults(**{"ignore": None, **defaults})
    given = parser.parse_args(argv)
    recipe = dict(PRESETS[given.preset]) if getattr(given, "preset", None) else {}
    if given.features:
        recipe.pop("bottleneck", None)  # which goes with the recipe's features
    parser.set_defaults(**recipe)
    args = parser.parse_args(argv)
    try:
        check(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def add_training_options(parser: argparse.ArgumentParser) -> None:
    """Everything about the loop: model, augmentation, optimizer, precision, output."""
    cuda = torch.cuda.is_available()
    half = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    precision, place = (half, "device") if cuda else ("fp32", "workers")
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/carvana"), help="folder for checkpoint, weights and pictures (%(default)s)")
    add("--init", help="start from these weights: a zoo name, model folder, checkpoint file or Hub repository")
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    add("--features", type=int, nargs="+", help="width of each level (64 128 256 512); with --init, to grow to")
    add("--bottleneck", type=int, help="width of the deepest block (twice the last of --features, or that of --init); likewise")
    add("--patch-size", type=int, metavar="PIXELS", help="side of the squares that the first level takes as one pixel (1)")
    add("--match", choices=MATCHES, help="how the decoder meets odd sizes (resize)")
    add("--size", type=int, nargs=2, default=[160, 240], metavar=("HEIGHT", "WIDTH"), help="of the network's input (160 240)")
    add("--epochs", type=int, default=3, help="how often each picture is trained on (%(default)s)")
    add("--batch-size", type=int, default=32, help="pictures in a step, all processes together (%(default)s)")
    add("--accumulate", type=int, default=1, metavar="N", help="take a batch in N shares, for want of memory (1)")
    add("--lr", type=float, default=1e-3, help="learning rate, the highest of a schedule (0.001)")
    add("--weight-decay", type=float, default=0.01, help="of AdamW (0.01)")
    add("--schedule", choices=("constant", "cosine", "onecycle"), default="cosine", help="of the learning rate (cosine)")
    add("--warmup", type=float, default=0.1, help="share of a schedule that is not constant spent rising (0.1)")
    add("--clip", type=float, default=0.0, metavar="NORM", help="largest norm of the gradients (0: no limit)")
    add("--ema", type=float, default=0.99, metavar="DECAY", help="validate and keep an average of the weights (0.99; 0: none)")
    add("--loss", choices=("bce", "bce-dice"), default="bce-dice", help="cross-entropy alone, or with Dice (bce-dice)")
    add("--border-weight", type=float, default=1.0, help="weight of pixels near a mask's edge in bce-dice (1)")
    add("--border-size", type=int, default=41, metavar="PIXELS", help="odd side of the window that finds edge pixels (41)")
    add("--rotation", type=float, default=0.0, help="degrees either way (0)")
    add("--horizontal-flip", type=float, default=0.5, metavar="P", help="probability of a left-right flip (0.5)")
    add("--vertical-flip", type=float, default=0.0, metavar="P", help="probability of an upside-down flip (0)")
    add("--color-jitter", type=float, default=0.2, help="strength of random brightness, contrast and saturation, 0 to 1 (0.2)")
    add("--grayscale", type=float, default=0.0, metavar="P", help="probability of losing colour (0)")
    add("--invert", type=float, default=0.0, metavar="P", help="probability of the negative (0)")
    add("--crop", type=float, nargs=2, metavar=("LEAST", "LARGEST"), help="train on parts that cover such shares of a picture")
    add("--window", action="store_true", help="train on parts of --size pixels, cut out at the picture's own scale")
    add("--scale", type=float, nargs=2, metavar=("LEAST", "LARGEST"), help="factors of a random zoom")
    add("--elastic", type=float, default=0.0, metavar="PIXELS", help="strength of random bends (0)")
    add("--quarter-turns", action="store_true", help="turn by 0, 90, 180 or 270 degrees")
    add("--reflect", action="store_true", help="mirror the picture where turns, zoom and bends reach beyond it")
    add("--low-resolution", type=float, default=0.0, metavar="P", help="probability of losing detail (0)")
    add("--least-resolution", type=float, default=0.2, help="least share of its sides that it then keeps (0.2)")
    add("--jpeg", type=float, default=0.0, metavar="P", help="probability that what --low-resolution reduces is a JPEG (0)")
    add("--noise", type=float, default=0.0, metavar="STD", help="Gaussian noise on half of the pictures, pixels 0 to 1 (0)")
    add("--precision", choices=("bf16", "fp16", "fp32"), default=precision, help="(bf16; fp16 before Ampere; fp32 on CPUs)")
    add("--channels-last", action=argparse.BooleanOptionalAction, default=cuda, help="layout for tensor cores (on CUDA)")
    add("--compile", action="store_true", help="torch.compile")
    add("--checkpoint-gradients", action="store_true", help="compute maps again instead of keeping them: slower, less memory")
    add("--sync-batch-norm", action="store_true", help="statistics over all GPUs")
    add("--cache-gib", type=float, default=8.0, metavar="GIB", help="memory for decoded pictures; others are decoded again (8)")
    add("--workers", type=int, default=8 if cuda else 0, help="processes that prepare pictures (8 on CUDA, else 0)")
    add("--augment-on", choices=("workers", "device"), default=place, help="where pictures are augmented (device on CUDA)")
    add("--checkpoint-every", type=int, default=0, metavar="STEPS", help="besides each epoch's end (0: only there)")
    add("--validate-every", type=int, default=1, metavar="EPOCHS", help="and after the last one (1)")
    add("--validate-at", choices=("original", "size"), default="original", help="size at which pictures are scored (original)")
    add("--log-every", type=float, default=0.5, metavar="SECONDS", help="least time between two updates of the bar (0.5)")
    add("--tensorboard", action="store_true", help="write the scores of each epoch for TensorBoard too, into --out")
    add("--device", default="cuda" if cuda else "cpu", help="as PyTorch names it (cuda where there is one)")
    add("--seed", type=int, default=0, help="of new weights, order and augmentation (0)")


def check(args: argparse.Namespace) -> None:
    """Refuse what would fail later, when pictures are read and rendered, or an epoch is over."""
    for name, least in LEAST.items():
        value = getattr(args, name)
        for number in value if isinstance(value, list) else [value]:
            if number is not None:
                whole(typed(name), number, least)
    whole("--seed", args.seed, -(2**63), 2**64 - 1)  # what PyTorch takes
    for name in ("lr", "weight_decay", "border_weight", "log_every"):
        at_least(typed(name), getattr(args, name), 0)
    for name in ("clip", "cache_gib"):
        at_least(typed(name), getattr(args, name), 0, endless=True)
    at_least("--warmup", args.warmup, 0, 1)
    height_and_width(args.size, "--size")
    if not 0 <= args.ema < 1:
        raise ValueError(f"--ema must be 0 or more and below 1, such as 0.99, not {args.ema}")
    if args.border_size % 2 == 0:
        raise ValueError(f"--border-size must be odd, such as {args.border_size + 1}, not {args.border_size}")
    if args.loss == "bce" and args.border_weight != 1:
        raise ValueError(
            f"--border-weight {args.border_weight:g} is for bce-dice and not for --loss bce; give --border-weight 1, or "
            "--loss bce-dice"
        )
    if args.reflect and not (args.rotation or args.scale or args.elastic):
        raise ValueError(
            "--reflect mirrors the picture where --rotation, --scale or --elastic reach beyond it; give one of these, or leave "
            "it out"
        )
    if args.crop and args.window:
        raise ValueError("--crop resizes the parts that it cuts out, --window keeps their scale; give one of the two")
    if args.validate_at == "size" and (args.window or getattr(args, "own_size", False)):
        raise ValueError(
            "with --window and --own-size the model predicts at the pictures' own size; give --validate-at original beside them"
        )
    try:
        os.fsencode(args.out).decode()
    except UnicodeDecodeError:
        name = printable(str(args.out))
        raise ValueError(f"--out {name} is not UTF-8, and weights in such a folder cannot be read; give another name") from None
    check_device(args.device)
    if args.sync_batch_norm and torch.device(args.device).type != "cuda":
        raise ValueError(f"--sync-batch-norm is for GPUs, not for --device {args.device}; leave it out")
    if args.tensorboard and not importlib.util.find_spec("tensorboard"):
        raise ValueError("--tensorboard needs tensorboard: pip install 'unetlib[examples]'")
    make_augment(args, datasets=())


def typed(name: str, value: Any = True) -> str:
    """An option as one types it."""
    option = f"--{name.replace('_', '-')}"
    if value is None or value is False:
        return "--no-channels-last" if name == "channels_last" else f"without {option}"
    return option if value is True else shlex.join([option, *map(str, value if isinstance(value, list) else [value])])


def starting_model(args: argparse.Namespace, in_channels: int = 3, out_channels: int = 1) -> UNet:
    """A new network, or a trained one, which grows where that is asked for."""
    names = ("features", "bottleneck", "patch_size", "match")
    shape = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.init is not None:  # an empty name, as of a variable that is not set, is an error and no random weights
        model = grow(UNet.from_pretrained(args.init, in_channels=in_channels, out_channels=out_channels), **shape)
    else:
        model = UNet(in_channels, out_channels, **shape)
    if min(args.size) < (least := model.config.stride):
        fewer = "" if args.init else ", or fewer --features"  # trained weights keep their levels
        raise ValueError(
            f"--size {args.size[0]} {args.size[1]} is too small for the network, which takes {least}x{least} pixels or more; "
            f"give a larger --size{fewer}"
        )
    return model


def make_augment(args: argparse.Namespace, datasets: Sequence[ImageMaskDataset]) -> v2.Compose:
    """What pictures and masks of `datasets` go through; with `--window` parts of them, for which all must be large enough."""
    options = {name: getattr(args, name) for name in AUGMENTATION} | {"outside": ignored(args) or 0}
    if not args.window:
        return train_transform(args.size, **options)
    check_windows(args.size, datasets)
    window = v2.RandomCrop(args.size, pad_if_needed=True, padding_mode="reflect")
    return v2.Compose([window, train_transform(None, **options)])


def check_windows(size: Sequence[int], datasets: Sequence[ImageMaskDataset]) -> None:
    """End where a picture is too small for `--window`: a mirror image beside it has one pixel less than it on each side."""
    for dataset in datasets:
        for path, _ in map(dataset.paths, range(len(dataset))):
            if max(size) < 2 * min(image_size(path, upright=False)):
                continue  # large enough either way round, which some formats tell only when they are read
            height, width = image_size(path)
            if size[0] >= 2 * height or size[1] >= 2 * width:
                raise SystemExit(
                    f"{path} has {width}x{height} pixels (width x height), too few for --window with "
                    f"--size {size[0]} {size[1]}; "
                    f"give --size {min(size[0], 2 * height - 1)} {min(size[1], 2 * width - 1)} or less, or leave out --window"
                )


def check_shares(args: argparse.Namespace, model: UNet, world_size: int) -> None:
    """Refuse shares of a batch that leave batch norm one value of each channel, of which there is no variance."""
    batch = args.batch_size // world_size
    largest = math.ceil(batch / args.accumulate)  # as `Tensor.chunk` cuts
    smallest = batch % largest or largest
    together = world_size if args.sync_batch_norm else 1
    deepest = [side // model.config.stride for side in args.size]
    if model.config.norm == "batch" and deepest == [1, 1] and smallest * together == 1:
        raise ValueError(
            f"--size {args.size[0]} {args.size[1]} leaves one pixel at the network's deepest level, and batch norm needs more "
            f"than one value there; give --size {2 * args.size[0]} {2 * args.size[1]}, or a larger --batch-size than "
            f"{args.batch_size} or a smaller --accumulate than {args.accumulate}, so that each part has two pictures or more"
        )


def make_loss(args: argparse.Namespace) -> Callable[[Tensor, Tensor], Tensor]:
    if args.loss == "bce":
        return CrossEntropyLoss(ignore_index=ignored(args))
    return BCEDiceLoss(border_weight=args.border_weight, border_size=args.border_size, ignore_index=ignored(args))


def ignored(args: argparse.Namespace) -> int | None:
    """The class of pixels that do not count, as finetune.py's `--ignore` asks for."""
    return None if args.ignore is None else IGNORED


def set_aside(values: Iterable[Any], ignore: int) -> dict[Any, int]:
    """The `mask_values` of classes, value by value in their order, but of one whose pixels do not count."""
    return {**(class_of_value([*values]) or {}), ignore: IGNORED}


def mask_suffix(given: str | None, masks: Path) -> str:
    """What a mask's name has after its picture's: as given, or else Carvana's where a file in the folder of masks has it."""
    if given is not None:
        return given
    return "_mask" if masks.is_dir() and any(path.stem.endswith("_mask") for path in masks.iterdir()) else ""


def make_schedule(args: argparse.Namespace, optimizer: torch.optim.Optimizer, steps: int) -> LRScheduler:
    if args.schedule == "constant":
        return ConstantLR(optimizer, factor=1.0)
    if args.schedule == "onecycle":
        steps = max(2, steps)
        # PyTorch divides by zero where the rise takes exactly one step, or all of them.
        share = min(args.warmup * (1.001 if args.warmup * steps == 1 else 1.0), 0.999)
        return OneCycleLR(optimizer, max_lr=args.lr, total_steps=steps, pct_start=share)
    if not args.warmup:
        return CosineAnnealingLR(optimizer, steps)
    rising = max(1, round(args.warmup * steps))
    parts = [LinearLR(optimizer, 0.01, total_iters=rising), CosineAnnealingLR(optimizer, max(1, steps - rising))]
    return SequentialLR(optimizer, parts, milestones=[rising])
