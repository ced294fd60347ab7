"""Compare the losses with segmentation-models-pytorch and MONAI: time of forward + backward, and peak memory.

All contestants run in one process, taking turns, on the same logits and the same int64 masks; a ratio above 1 says that
unetlib is faster, or needs less memory.

    pip install "unetlib[bench]"
    python benchmarks/losses.py                                   # CUDA if there, else CPU
    python benchmarks/losses.py --batch 8 --size 512 --classes 21 --json losses.json
    python benchmarks/losses.py --batch 1 --size 32 --rounds 1    # does it run?
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from harness import add_device, check, command, machine, peak_allocated, print_machine, spread, time_turns, write_json
from torch import Tensor

from unetlib import losses

Loss = Callable[[Tensor, Tensor], Tensor]
LIBRARIES = ("unetlib", "smp", "monai")


def contestants() -> dict[tuple[str, str], dict[str, Loss]]:
    """The same loss from every library that has it; Dice and its kin are pooled over the batch, as smp always does."""
    import segmentation_models_pytorch.losses as smp
    from monai import losses as monai

    sigmoid: dict[str, Any] = {"sigmoid": True, "batch": True}
    softmax: dict[str, Any] = {"softmax": True, "to_onehot_y": True, "batch": True}

    def channel(loss: Loss) -> Loss:
        """MONAI wants (N, 1, H, W) masks."""
        return lambda x, y: loss(x, y.unsqueeze(1))

    table: dict[tuple[str, str], dict[str, Loss]] = {}
    for kind, monai_options in (("binary", sigmoid), ("multiclass", softmax)):
        alone = {key: value for key, value in monai_options.items() if key != "batch"}
        table |= {
            ("dice", kind): {
                "unetlib": losses.DiceLoss(batch=True),
                "smp": smp.DiceLoss(kind, smooth=1.0),
                "monai": channel(monai.DiceLoss(**monai_options)),
            },
            ("jaccard", kind): {
                "unetlib": losses.JaccardLoss(batch=True),
                "smp": smp.JaccardLoss(kind, smooth=1.0),
                "monai": channel(monai.DiceLoss(jaccard=True, **monai_options)),
            },
            ("tversky", kind): {
                "unetlib": losses.TverskyLoss(alpha=0.3, beta=0.7, batch=True),
                "smp": smp.TverskyLoss(kind, alpha=0.3, beta=0.7, smooth=1.0),
                "monai": channel(monai.TverskyLoss(alpha=0.3, beta=0.7, **monai_options)),
            },
            ("mcc", kind): {
                "unetlib": losses.MCCLoss(batch=True),
                "monai": channel(monai.MCCLoss(**monai_options)),
            },
            ("lovasz", kind): {"unetlib": losses.LovaszLoss(batch=True), "smp": smp.LovaszLoss(kind)},
            ("cross-entropy + dice", kind): {
                "unetlib": losses.BCEDiceLoss(batch=True),
                "monai": channel(monai.DiceCELoss(**monai_options)),
            },
            ("clDice", kind): {
                "unetlib": losses.SoftCLDiceLoss(),
                "monai": channel(monai.SoftclDiceLoss(**alone)),
            },
        }
    table["cross-entropy", "binary"] = {
        "unetlib": losses.CrossEntropyLoss(),
        "smp": lambda x, y: smp.SoftBCEWithLogitsLoss(ignore_index=None)(x, y.unsqueeze(1).float()),
    }
    table["cross-entropy", "multiclass"] = {
        "unetlib": losses.CrossEntropyLoss(),
        "smp": smp.SoftCrossEntropyLoss(smooth_factor=0.0),
    }
    table["focal", "binary"] = {
        "unetlib": losses.FocalLoss(),
        "smp": smp.FocalLoss("binary"),
        "monai": channel(monai.FocalLoss()),
    }
    table["focal", "multiclass"] = {  # smp's is another loss here: a sigmoid for each class, in a loop
        "unetlib": losses.FocalLoss(),
        "monai": channel(monai.FocalLoss(to_onehot_y=True, use_softmax=True)),
    }
    table["generalized dice", "multiclass"] = {
        "unetlib": losses.GeneralizedDiceLoss(batch=True),
        "monai": channel(monai.GeneralizedDiceLoss(**softmax)),
    }
    smp_mcc = smp.MCCLoss()
    table["mcc", "binary"]["smp"] = lambda x, y: smp_mcc(x.sigmoid(), y)
    return dict(sorted(table.items(), key=lambda item: (item[0][1], item[0][0])))


def step(loss: Loss, logits: Tensor, target: Tensor) -> None:
    logits.grad = None
    loss(logits, target).backward()


def compare(args: argparse.Namespace) -> list[dict[str, Any]]:
    device = torch.device(args.device)
    shape = (args.size, args.size)
    rows: list[dict[str, Any]] = []
    table = contestants()
    names = sorted({name for name, _ in table})
    if unknown := sorted({*(args.only or ())}.difference(names)):
        raise SystemExit(f"there is no loss {unknown[0]!r}; there are {', '.join(names)}")
    for (name, kind), entries in table.items():
        if args.only and name not in args.only:
            continue
        channels = 1 if kind == "binary" else args.classes
        logits = torch.randn(args.batch, channels, *shape, device=device, requires_grad=True)
        target = torch.randint(0, max(channels, 2), (args.batch, *shape), device=device)
        calls = {library: functools.partial(step, loss, logits, target) for library, loss in entries.items()}
        seconds = time_turns([*calls.values()], args.rounds, args.device, warm_up=1, queued=False)
        times = dict(zip(calls, seconds.T.tolist()))
        memory = {}
        for library, call in calls.items():
            logits.grad = None  # so that the pass makes it, and it counts
            memory[library] = peak_allocated(call, args.device)
        median = {library: spread(values).median for library, values in times.items()}
        rows.append({"loss": name, "kind": kind, "seconds": median, "all_seconds": times, "peak_bytes": memory})
        print(line(rows[-1]), flush=True)
    return rows


def line(row: dict[str, Any]) -> str:
    median, memory = row["seconds"], row["peak_bytes"]
    cells = [f"{row['loss']} ({row['kind']})", f"{median['unetlib'] * 1e3:.2f}"]
    cells += [f"{median[other] / median['unetlib']:.2f}" if other in median else "" for other in LIBRARIES[1:]]
    cells += [f"{memory['unetlib'] / 2**20:.1f}"]
    cells += [f"{memory[other] / memory['unetlib']:.2f}" if other in memory else "" for other in LIBRARIES[1:]]
    return "| " + " | ".join(cells) + " |"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_device(parser)
    parser.add_argument("--batch", type=int, default=4, help="pictures in a batch (4)")
    parser.add_argument("--size", type=int, default=256, help="side of the square pictures (256)")
    parser.add_argument("--classes", type=int, default=8, help="channels of the multiclass losses (8)")
    parser.add_argument("--rounds", type=int, default=11, help="timed steps of each contestant (11)")
    parser.add_argument("--only", nargs="+", help="names of losses, such as dice")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    args = parser.parse_args(argv)
    check(parser, args)
    for option, least in (("batch", 1), ("size", 1), ("classes", 2)):
        if getattr(args, option) < least:
            parser.error(f"--{option} must be at least {least}, got {getattr(args, option)}")
    torch.manual_seed(0)

    about = machine(args.device, ("segmentation-models-pytorch", "monai"))
    settings = {name: getattr(args, name) for name in ("batch", "size", "classes", "rounds")}
    print_machine(about | settings)
    print("\n| loss | unetlib, ms | smp, times as long | MONAI | unetlib, MiB | smp, times as much | MONAI |")
    print("|---|---|---|---|---|---|---|")
    write_json(args.json, {"command": command(argv), "machine": about, **settings, "rows": compare(args)})


if __name__ == "__main__":
    main()
