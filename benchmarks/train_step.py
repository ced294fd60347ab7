"""Time training steps: the study's (its module, Adam, BCE, half precision with a scaler) and those of train_carvana.py.

    python benchmarks/train_step.py                                   # the GPU, or the CPU where there is none
    python benchmarks/train_step.py --shape 32x160x240 --features 64 128 256 512 --rounds 20 --json train_step.json

A step is everything between a batch on the host and updated weights: copy, forward, loss, backward, optimizer, and reading
the loss. The contestants take turns of a few steps; the ratio is the study's time over theirs, in the same round. On a CPU
one of them also keeps the memory that is freed, as train_carvana.py does. The peak is what a step allocates beyond weights and
the state of the optimizer: on a CPU with the gradients, while on a GPU those of the last step are held before it.
"""

from __future__ import annotations

import argparse
import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import (
    LAYOUTS,
    add_device,
    check,
    command,
    is_cuda,
    machine,
    mebibytes,
    peak_allocated,
    print_machine,
    ratios,
    sizes,
    spread,
    time_turns,
    unsupported,
    without_traceback,
    write_json,
)
from study import StudyUNet
from torch import Tensor, nn

from unetlib import BCEDiceLoss, UNet, UNetConfig
from unetlib.convert import convert
from unetlib.memory import keep_freed, release_freed
from unetlib.unet import check_input

Step = Callable[[Tensor, Tensor], float]
TURN = 3  # steps in a row: memory kept by one of them counts from the second on
KEPT = ", memory kept"
AGAIN = ", maps computed again"  # gradient checkpointing


def study_step(model: nn.Module, device: str) -> Step:
    """The study's loop: half precision on CUDA, and the loss read at once for the progress bar."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    loss_fn = nn.BCEWithLogitsLoss()
    scaler = torch.amp.GradScaler(device, enabled=device == "cuda")

    def step(images: Tensor, masks: Tensor) -> float:
        images, masks = images.to(device), masks.float().unsqueeze(1).to(device)
        with torch.autocast(device, torch.float16, enabled=device == "cuda"):
            loss = loss_fn(model(images), masks)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss.item()

    return step


def our_step(
    model: UNet, device: str, precision: str, layout: str = "channels_last", *, loss: str = "bce", compiled: bool = False
) -> Step:
    """The example's loop, on a copy of the model: a loss is read one step later, when the device has it."""
    model = copy.deepcopy(model).to(memory_format=LAYOUTS[layout])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    bce = nn.BCEWithLogitsLoss()
    loss_fn = BCEDiceLoss() if loss == "bce-dice" else lambda logits, masks: bce(logits, masks.unsqueeze(1))
    forward = torch.compile(model) if compiled else model
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    scaler = torch.amp.GradScaler(device, enabled=precision == "fp16")
    unread: list[Tensor] = []

    def step(images: Tensor, masks: Tensor) -> float:
        optimizer.zero_grad(set_to_none=True)
        images, masks = images.to(device, non_blocking=True), masks.to(device, non_blocking=True)
        with torch.autocast(device, dtype, enabled=dtype is not None):
            loss = loss_fn(forward(images), masks)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        unread.append(loss.detach())
        return unread.pop(0).item() if len(unread) > (device == "cuda") else float("nan")

    return step


def contestants(device: str, features: list[int], compiled: bool) -> dict[str, Step]:
    study = StudyUNet(features=features)
    ours = UNet(features=features)
    ours.load_state_dict(convert(study.state_dict()).state_dict)  # the same weights for all
    study.to(device)
    ours.to(device)
    table = {"study": study_step(study, device)}
    half = [precision for precision, name in (("fp16", "float16"), ("bf16", "bfloat16")) if not unsupported(name, device)]
    for precision in ("fp32", *half):
        for layout in ("contiguous", "channels_last"):
            table[f"{precision} {layout}"] = our_step(ours, device, precision, layout)
    best = half[-1] if half else "fp32"
    table[f"{best} channels_last bce-dice"] = our_step(ours, device, best, loss="bce-dice")
    if device == "cpu":
        table[f"{best} channels_last bce-dice{KEPT}"] = our_step(ours, device, best, loss="bce-dice")
    again = copy.deepcopy(ours)
    again.checkpoint_gradients = True
    table[f"{best} channels_last bce-dice{AGAIN}"] = our_step(again, device, best, loss="bce-dice")
    if compiled:
        table[f"{best} channels_last compiled"] = our_step(ours, device, best, compiled=True)
    return table


def measure(table: dict[str, Step], shape: tuple[int, int, int], rounds: int, device: str) -> dict[str, dict[str, Any]]:
    batch, height, width = shape
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(batch, 3, height, width, generator=generator)
    masks = torch.rand(batch, height, width, generator=generator).round()
    if device == "cuda":
        images, masks = images.pin_memory(), masks.pin_memory()
    rows: dict[str, dict[str, Any]] = {}
    for name, step in table.items():  # warm-up, and the memory of a step
        losses = [step(images, masks) for _ in range(2 if is_cuda(device) else 1)]
        rows[name] = {"first_loss": next(loss for loss in [*losses, step(images, masks)] if loss == loss)}
        rows[name]["peak_bytes"] = peak_allocated(functools.partial(step, images, masks), device)

    def turn(name: str) -> None:
        keep_freed() if name.endswith(KEPT) else release_freed()
        for _ in range(TURN):
            table[name](images, masks)

    seconds = time_turns([functools.partial(turn, name) for name in table], rounds, device, warm_up=0, queued=False) / TURN
    release_freed()
    for row, own in zip(rows.values(), seconds.T.tolist()):
        row["seconds"] = own
    return rows


def main(argv: list[str] | None = None) -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_device(parser)
    parser.add_argument(
        "--shape", default="32x160x240" if cuda else "4x160x240", metavar="BATCHxHEIGHTxWIDTH", help="of a batch (%(default)s)"
    )
    parser.add_argument(
        "--features",
        type=int,
        nargs="+",
        default=[64, 128, 256, 512] if cuda else [16, 32, 64, 128],
        help="widths of the levels (64 128 256 512 on CUDA, else 16 32 64 128)",
    )
    parser.add_argument(
        "--rounds", type=int, default=30 if cuda else 7, help="timed turns of each contestant (30 on CUDA, else 7)"
    )
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=cuda, help="a compiled contestant too (on CUDA)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")
    args = parser.parse_args(argv)
    args.shapes = [args.shape]
    check(parser, args)
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    batch, height, width = shape = sizes(args.shape)
    with without_traceback():
        check_input(torch.empty(batch, 3, height, width, device="meta"), UNetConfig(features=args.features))
    rows = measure(contestants(args.device, args.features, args.compile), shape, args.rounds, args.device)
    about = machine(args.device)
    print_machine(about)
    print(f"{args.shape}, features {args.features}, {args.rounds} rounds")
    print(f"{'':48}{'ms':>10}{'pictures/s':>12}{'ratio':>8}{'quartiles':>14}{'peak MiB':>10}")
    for name, row in rows.items():
        middle, ratio = spread(row["seconds"]).median, spread(ratios(rows["study"]["seconds"], row["seconds"]))
        row["ratio"] = ratio.median
        figures = f"{1e3 * middle:10.1f}{shape[0] / middle:12.1f}{ratio.median:8.2f}{ratio.low:8.2f}{ratio.high:6.2f}"
        print(f"{name:48}{figures}{mebibytes(row['peak_bytes']):>10}")
    results = {"command": command(argv), "machine": about, "shape": args.shape, "features": args.features}
    write_json(args.json, results | {"rows": rows})


if __name__ == "__main__":
    main()
