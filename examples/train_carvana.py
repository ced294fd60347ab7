"""Train a U-Net on Carvana: the study's run by default, on CUDA or CPU, on the real folders or on rendered scenes.

    python examples/train_carvana.py --data carvana --out runs/study          # the study: 160x240, Adam 1e-4, BCE, 3 epochs
    python examples/train_carvana.py --synthetic 64 --epochs 1                # no data at hand: rendered scenes
    python examples/train_carvana.py --help

`--data` holds `train/` and `train_masks/`, and `val/` and `val_masks/` or else one car in ten is set aside for validation.
Kaggle's files of the Carvana Image Masking Challenge are `train_hq.zip` and `train_masks.zip`; accept the competition's rules
there to download them. Each epoch writes a checkpoint and a model folder to `--out`; `--resume` goes on from the checkpoint.
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, Dataset
from tqdm import tqdm

from unetlib import BCEDiceLoss, CarvanaDataset, Preprocessing, UNet, split_by_car
from unetlib.inference import evaluate
from unetlib.synthetic import write_carvana
from unetlib.transforms import Resize, train_transform
from unetlib.visualize import grid, mask_to_image


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    args.out.mkdir(parents=True, exist_ok=True)

    # Data: pictures are decoded and reduced once, then kept in memory as uint8; chance comes after.
    train_sets, val = load_data(args)
    augment = train_transform(
        size=None,
        rotation=args.rotation,
        horizontal_flip=args.horizontal_flip,
        vertical_flip=args.vertical_flip,
        color_jitter=args.color_jitter,
    )
    cached = [Cached(dataset, Resize(args.size), augment) for dataset in train_sets]
    loader = DataLoader(ConcatDataset(cached), args.batch_size, shuffle=True, drop_last=True, pin_memory=device.type == "cuda")
    print(f"{len(loader.dataset)} pictures to train on, {len(val)} to validate on, {device}")

    # Model, loss, optimizer: the study's unless asked otherwise.
    model = UNet.from_pretrained(args.init) if args.init else UNet(features=args.features, bottleneck=args.bottleneck)
    model.preprocessing = Preprocessing(size=tuple(args.size), class_names=("background", "car"))
    model.to(device, memory_format=torch.channels_last if args.channels_last else torch.contiguous_format)
    bce_dice = BCEDiceLoss(border_weight=args.border_weight, border_size=args.border_size)
    loss_fn = {"bce": torch.nn.BCEWithLogitsLoss(), "bce-dice": bce_dice}[args.loss]
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    steps = args.epochs * len(loader)
    schedule = (
        torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=args.lr, total_steps=steps, pct_start=args.warmup)
        if args.schedule == "onecycle"
        else torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    )
    precision = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": None}[args.precision]
    scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)

    checkpoint = args.out / "checkpoint.pt"
    first_epoch = 0
    if args.resume and checkpoint.is_file():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        scaler.load_state_dict(state["scaler"])
        first_epoch = state["epoch"]
        print(f"going on after epoch {first_epoch}")

    for epoch in range(first_epoch + 1, args.epochs + 1):
        torch.manual_seed(args.seed + epoch)  # a resumed run draws what an unbroken one would have drawn
        model.train()
        bar = tqdm(loader, desc=f"epoch {epoch}/{args.epochs}", mininterval=args.log_every)
        for step, (images, masks) in enumerate(bar):
            images = images.to(device, non_blocking=True)
            masks = masks.float().unsqueeze(1).to(device, non_blocking=True)
            with torch.autocast(device.type, dtype=precision, enabled=precision is not None):
                loss = loss_fn(model(images), masks)
            if not math.isfinite(loss.item()):
                raise SystemExit(
                    f"the loss is {loss.item()} in epoch {epoch}, step {step}; try a smaller --lr or --precision fp32"
                )
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
            bar.set_postfix(loss=f"{loss.item():.4f}", lr=f"{schedule.get_last_lr()[0]:.1e}", refresh=False)

        state = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
            "scaler": scaler.state_dict(),
            "epoch": epoch,
        }
        save_whole(state, checkpoint)
        model.save_pretrained(args.out / "model")
        if epoch % args.validate_every == 0 or epoch == args.epochs:
            scores = evaluate(model, val, progress=True)
            shown = ", ".join(f"{name} {scores[name]:.5f}" for name in ("dice", "iou", "accuracy"))
            print(f"epoch {epoch}: {shown}", flush=True)
            save_grid(model, val, args.out / "predictions.png")
    print(f"weights: {args.out / 'model'}; predictions beside the truth: {args.out / 'predictions.png'}")


def load_data(args: argparse.Namespace) -> tuple[list[CarvanaDataset], CarvanaDataset]:
    """The training sets, and the validation set, whose cars are in none of them."""
    train, val = [], None
    if args.synthetic:
        # Rendered once into a folder of its own, under the names that Kaggle gives its files.
        size = tuple(2 * side for side in args.size) if args.data else tuple(args.size)
        folder = args.out / f"synthetic_{args.synthetic}_{size[0]}x{size[1]}"
        if not folder.is_dir():
            print(f"rendering {args.synthetic} scenes into {folder}")
            with tempfile.TemporaryDirectory(dir=args.out) as partial:
                write_carvana(Path(partial) / "scenes", cars=math.ceil(args.synthetic / 4), views=(1, 6, 11, 16), size=size)
                os.replace(Path(partial) / "scenes", folder)
        train.append(CarvanaDataset(folder / "train", folder / "train_masks"))
    if args.data:
        real = CarvanaDataset(args.data / "train", args.data / "train_masks")
        if (args.data / "val").is_dir():
            val = CarvanaDataset(args.data / "val", args.data / "val_masks")
        else:
            real, val = split_by_car(real, val_fraction=0.1, seed=args.seed)
        train.append(real)
    else:
        train[0], val = split_by_car(train[0], val_fraction=0.25, seed=args.seed)
    return train, val


class Cached(Dataset):
    """A dataset whose pictures are read and reduced once; `augment` is applied afresh each time."""

    def __init__(self, dataset: CarvanaDataset, reduce: torch.nn.Module, augment: torch.nn.Module) -> None:
        dataset.transform = reduce
        self.dataset, self.augment, self.kept = dataset, augment, {}

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        if index not in self.kept:
            self.kept[index] = self.dataset[index]
        return self.augment(*self.kept[index])


def save_grid(model: UNet, dataset: CarvanaDataset, path: Path, rows: int = 8) -> None:
    """A PNG with a picture, its true mask and the prediction in each row."""
    tiles = []
    for index in range(0, len(dataset), max(1, len(dataset) // rows))[:rows]:
        image, mask = dataset[index]
        for array in (image, mask_to_image(mask > 0), mask_to_image(model.predict(image))):
            tiles.append(np.asarray(Image.fromarray(array).convert("RGB").resize((240, 160))))
    Image.fromarray(grid(tiles, columns=3)).save(path)


def save_whole(state: dict, path: Path) -> None:
    """Write beside and rename, so that a killed run leaves the checkpoint before or the new one, never half a file."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, help="folder with train/, train_masks/ and perhaps val/, val_masks/")
    add("--synthetic", type=int, default=0, metavar="N", help="render N scenes and train on them (too)")
    add("--out", type=Path, default=Path("runs/carvana"), help="folder for checkpoint, weights and pictures")
    add("--init", type=Path, help="start from the weights of this model folder instead of random ones")
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    add("--features", type=int, nargs="+", default=[64, 128, 256, 512])
    add("--bottleneck", type=int)
    add("--size", type=int, nargs=2, default=[160, 240], metavar=("HEIGHT", "WIDTH"))
    add("--epochs", type=int, default=3)
    add("--batch-size", type=int, default=32)
    add("--lr", type=float, default=1e-4)
    add("--weight-decay", type=float, default=0.0)
    add("--schedule", choices=("constant", "onecycle"), default="constant")
    add("--warmup", type=float, default=0.1, help="share of a one-cycle schedule spent rising")
    add("--loss", choices=("bce", "bce-dice"), default="bce")
    add("--border-weight", type=float, default=1.0, help="weight of pixels near a mask's edge in bce-dice")
    add("--border-size", type=int, default=41, metavar="PIXELS", help="odd side of the window that makes a pixel an edge pixel")
    add("--rotation", type=float, default=35.0, help="degrees either way")
    add("--horizontal-flip", type=float, default=0.5)
    add("--vertical-flip", type=float, default=0.1)
    add("--color-jitter", type=float, default=0.0)
    add("--precision", choices=("fp16", "bf16", "fp32"), default="fp16" if cuda else "fp32")
    add("--channels-last", action="store_true")
    add("--validate-every", type=int, default=1, metavar="EPOCHS")
    add("--log-every", type=float, default=0.5, metavar="SECONDS", help="least time between two updates of the bar")
    add("--device", default="cuda" if cuda else "cpu")
    add("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if not args.data and not args.synthetic:
        parser.error("give --data FOLDER, or --synthetic N to train on rendered scenes")
    return args


if __name__ == "__main__":
    main()
