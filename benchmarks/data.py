"""Samples a second from the same files, in one run: the study's data set with albumentations, and unetlib's.

    pip install "unetlib[bench]"
    UNETLIB_DATA=... python benchmarks/data.py              # its folder carvana/; without it scenes are rendered
    python benchmarks/data.py --data carvana --sizes 160x240 --files 48 --workers 4 --json data.json
    python benchmarks/data.py --files 2 --repeats 1         # does it run?

The contestants take turns, an epoch each, so that a machine's drift falls on all alike. unetlib's keep memory that is freed,
as its training does (`unetlib.memory.keep_freed`); the study's runs as it is. Every figure is the median over the repeats.
CPU time is that of this process; a machine with other work to do shows in the wall time alone. On CUDA it also trains for a
few steps, with and without loading, and shows the share of time in which the network computes. docs/data.md says how to read
the table.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import carvana_folder, check, command, machine, print_machine, wait, write_json
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset

from unetlib import CarvanaDataset, UNet
from unetlib.cache import CachedDataset
from unetlib.memory import keep_freed, release_freed
from unetlib.synthetic import write_carvana
from unetlib.transforms import PerPicture, train_transform

Size = tuple[int, int] | None  # None: each picture's own
STUDY = "study"
FIRST, LATER = "unetlib, first epoch", "unetlib, later epochs"
FIRST_BYTES, LATER_BYTES = "unetlib, bytes for the device, first epoch", "unetlib, bytes for the device, later epochs"
MEANS = {  # of one first epoch and later ones
    "unetlib, mean of the study's 3 epochs": (3, FIRST, LATER),
    "unetlib, mean of 10 epochs": (10, FIRST, LATER),
    "unetlib, bytes for the device, mean of 3": (3, FIRST_BYTES, LATER_BYTES),
}
ROWS = (STUDY, FIRST, LATER, FIRST_BYTES, LATER_BYTES, *MEANS)


class StudyDataset(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """The study's data set as it is described: everything decoded each time, 255 of the grey mask made 1."""

    def __init__(self, images: Path, masks: Path, names: Sequence[str], transform: Any) -> None:
        """Keep the folders, the pictures' names and the albumentations pipeline."""
        self.images, self.masks, self.names, self.transform = images, masks, names, transform

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Picture, float32 (3, H, W), and mask, float32 (H, W)."""
        name = self.names[index]
        image = np.array(Image.open(self.images / name).convert("RGB"))
        mask = np.array(Image.open(self.masks / name.replace(".jpg", "_mask.gif")).convert("L"), dtype=np.float32)
        mask[mask == 255.0] = 1.0
        found = self.transform(image=image, mask=mask)
        return found["image"], found["mask"]


def study_transform(size: Size) -> Any:
    """The study's augmentation in albumentations; without its resize for pictures of their own size."""
    import albumentations as A
    from albumentations.pytorch import ToTensorV2

    resize = [] if size is None else [A.Resize(height=size[0], width=size[1])]
    augment = [A.Rotate(limit=35, p=1.0), A.HorizontalFlip(p=0.5), A.VerticalFlip(p=0.1)]
    return A.Compose([*resize, *augment, A.Normalize(mean=[0.0] * 3, std=[1.0] * 3, max_pixel_value=255.0), ToTensorV2()])


def contestants(carvana: CarvanaDataset, size: Size) -> dict[str, StudyDataset | CachedDataset]:
    """Each as it is at the start of an epoch: the first epoch's caches are empty, those of later ones full."""
    found: dict[str, StudyDataset | CachedDataset] = {
        STUDY: StudyDataset(carvana.image_dir, carvana.mask_dir, carvana.images, study_transform(size)),
        FIRST: CachedDataset(carvana, size, transform=train_transform(None)),
        LATER: CachedDataset(carvana, size, transform=train_transform(None)),
        FIRST_BYTES: CachedDataset(carvana, size),
        LATER_BYTES: CachedDataset(carvana, size),
    }
    for name in (LATER_BYTES, LATER):
        for index in range(len(carvana)):
            found[name][index]
    return found


def time_epoch(datasets: dict[str, StudyDataset | CachedDataset], workers: int) -> dict[str, tuple[float, float]]:
    """Wall and CPU seconds a sample of each data set; the CPU time of workers is not known."""
    pairs = len(next(iter(datasets.values())))
    spent: dict[str, tuple[float, float]] = {}
    for name, dataset in datasets.items():
        release_freed() if name == STUDY else keep_freed()
        wall, cpu = time.perf_counter(), time.process_time()
        if workers:
            for _ in DataLoader(dataset, batch_size=8, num_workers=workers):
                pass
        else:
            for index in range(pairs):
                dataset[index]
        spent[name] = (time.perf_counter() - wall) / pairs, math.nan if workers else (time.process_time() - cpu) / pairs
    release_freed()
    return spent


def compare(carvana: CarvanaDataset, size: Size, repeats: int, workers: int) -> list[dict[str, Any]]:
    epochs = []
    for _ in range(repeats):
        spent = time_epoch(contestants(carvana, size), workers)
        for name, (count, first, later) in MEANS.items():
            wall, cpu = ((one + (count - 1) * other) / count for one, other in zip(spent[first], spent[later]))
            spent[name] = wall, cpu
        epochs.append(spent)
    rows = []
    for name in ROWS:
        row: dict[str, Any] = {"size": "full" if size is None else f"{size[0]}x{size[1]}", "data": name}
        for number, clock in enumerate(("wall", "cpu")):
            row[f"{clock}_seconds"] = [epoch[name][number] for epoch in epochs]
            row[f"{clock}_ratio"] = statistics.median(epoch[STUDY][number] / epoch[name][number] for epoch in epochs)
        rows.append(row)
    return rows


def busy_share(carvana: CarvanaDataset, size: Size, args: argparse.Namespace, model: nn.Module, on_device: bool) -> float:
    """Time of training steps on a batch that is there, over that of the steps with loading and augmentation.

    Args:
        carvana: where the pairs are; decoded before the clock starts.
        size: of the pictures.
        args: `device`, `workers`, `batch` and `steps`.
        model: the network.
        on_device: the augmentation runs there, and not in the workers.
    """
    device, augment = torch.device(args.device), train_transform(None)
    dataset = CachedDataset(carvana, size, transform=None if on_device else augment)
    for index in range(len(dataset)):
        dataset[index]
    ahead = 2 * args.workers  # batches that the workers load before they are asked for
    count = args.batch * (2 + ahead + args.steps + ahead)
    sampler = torch.utils.data.RandomSampler(dataset, replacement=True, num_samples=count)
    loader = DataLoader(dataset, args.batch, sampler=sampler, num_workers=args.workers, pin_memory=device.type == "cuda")
    per_picture = PerPicture(augment)
    model = model.to(device).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def load(batch: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        images, masks = (tensor.to(device, non_blocking=True) for tensor in batch)
        return per_picture(images, masks) if on_device else (images, masks)

    def step(images: torch.Tensor, masks: torch.Tensor) -> None:
        with torch.autocast(device.type, torch.bfloat16):
            loss = nn.functional.binary_cross_entropy_with_logits(model(images).float(), masks.float().unsqueeze(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def clock() -> float:
        wait(args.device)
        return time.perf_counter()

    # With loading first, since workers load ahead during steps alone, and those batches would cost nothing later. The first
    # that they have loaded are read before the clock starts, and some are left at its end, so that no worker is idle by then.
    batches = iter(loader)
    for batch in islice(batches, 2 + ahead):  # warm up
        ready = load(batch)
        step(*ready)
    began = clock()
    for batch in islice(batches, args.steps):
        step(*load(batch))
    loading = clock() - began
    del batches  # ends the workers, which would take the CPU from what follows
    began = clock()
    for _ in range(args.steps):
        step(*ready)
    return (clock() - began) / loading


def find_files(args: argparse.Namespace, temporary: Path) -> tuple[CarvanaDataset, str]:
    """The data set, and what it is."""
    folder, what = carvana_folder(args.data), "photographs"
    if folder is None:
        write_carvana(temporary, cars=math.ceil(args.files / 4), views=(1, 6, 11, 16))
        folder, what = temporary, "rendered scenes"
    carvana = CarvanaDataset(folder / "train", folder / "train_masks")
    return carvana.subset(range(min(args.files, len(carvana)))), what


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with train/ and train_masks/ (default: $UNETLIB_DATA/carvana)")
    parser.add_argument("--sizes", nargs="+", default=["160x240", "full"], metavar="HEIGHTxWIDTH", help="full: no resize")
    parser.add_argument("--files", type=int, default=24, help="pairs in an epoch (24)")
    parser.add_argument("--repeats", type=int, default=3, help="epochs of each contestant (3); 0: no comparison")
    parser.add_argument("--workers", type=int, default=0, help="processes of the loader (0: this one alone)")
    parser.add_argument("--device", default="cuda" if cuda else "cpu", help="as PyTorch names it (cuda where there is one)")
    parser.add_argument(
        "--steps", type=int, default=50 if cuda else 0, help="training steps for the busy share (50 on CUDA, else 0: none)"
    )
    parser.add_argument("--batch", type=int, default=16, help="pictures in a training step (16)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")
    args = parser.parse_args(argv)
    if args.files < 1 or args.repeats < 0:
        parser.error("--files must be at least 1, and --repeats at least 0")
    check(parser, args)
    asked = " ".join(args.sizes)
    try:
        args.sizes = [None if size == "full" else tuple(map(int, size.split("x", 1))) for size in args.sizes]
        if not all(size is None or (len(size) == 2 and min(size) > 0) for size in args.sizes):
            raise ValueError
    except ValueError:
        parser.error(f"--sizes must be HEIGHTxWIDTH such as 160x240, or full, not {asked}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    about = machine(args.device, ("pillow", "albumentations"))
    results: dict[str, Any] = {"command": command(argv), "machine": about, "workers": args.workers, "rows": [], "busy": []}
    with tempfile.TemporaryDirectory() as temporary:
        carvana, results["files"] = find_files(args, Path(temporary))
        print_machine(about)
        print(f"{len(carvana)} {results['files']}, {args.repeats} repeats, {args.workers} workers")
        print(f"{'size':<9}{'data':<46}{'ms CPU':>9}{'ms wall':>9}{'samples/s':>11}{'x CPU':>8}{'x wall':>8}")
        for size in args.sizes if args.repeats else ():
            for row in compare(carvana, size, args.repeats, args.workers):
                results["rows"].append(row)
                cpu, wall = (1e3 * statistics.median(row[f"{clock}_seconds"]) for clock in ("cpu", "wall"))
                figures = f"{cpu:>9.2f}{wall:>9.2f}{1e3 / wall:>11.1f}{row['cpu_ratio']:>8.2f}{row['wall_ratio']:>8.2f}"
                figures = figures.replace("nan", "  -")  # the CPU time of workers is not known
                print(f"{row['size']:<9}{row['data']:<46}{figures}", flush=True)
        if args.steps:
            for size in args.sizes:
                for place in ("workers", "device"):
                    share = busy_share(carvana, size, args, UNet(), on_device=place == "device")
                    results["busy"].append({"size": size, "augmentation": place, "share": share})
                    print(f"the network computes {share:.0%} of the time at {size or 'full size'}, augmentation in: {place}")
        else:
            print("no training steps: there is no CUDA device here, or --steps 0")
    write_json(args.json, results)


if __name__ == "__main__":
    main()
