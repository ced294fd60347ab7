"""What float32, bfloat16 and int8 cost on a CPU: time of a forward pass, and the mean Dice that is left.

    UNETLIB_DATA=... python benchmarks/precisions.py               # its folder carvana/; without it scenes are rendered
    python benchmarks/precisions.py --data carvana --every 3 --json precisions.json
    python benchmarks/precisions.py --data carvana --model ./my_model --calibrate 64

All run the same weights on the same pictures, at the size at which the model sees them. They take turns; a ratio above 1 says
how many times as fast as float32 in unetlib's own way the row is. int8 takes its ranges from pictures of train/; every picture
of val/ is scored.
"""

from __future__ import annotations

import argparse
import functools
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from harness import (
    carvana_folder,
    check,
    command,
    machine,
    print_machine,
    print_row,
    ratios,
    spread,
    time_turns,
    unsupported,
    without_traceback,
    write_json,
)

from unetlib import CarvanaDataset, UNet
from unetlib.inference import evaluate, network_inputs, optimize_for_inference
from unetlib.synthetic import write_carvana

BASE = "float32"


def contestants(model: UNet, calibration: list[torch.Tensor]) -> dict[str, Any]:
    """The copies of the network: in unetlib's own way and in OpenVINO, in the precisions that the machine is fast in."""
    found = {BASE: optimize_for_inference(model), "openvino float32": optimize_for_inference(model, backend="openvino")}
    if not unsupported("bfloat16", "cpu"):
        found["bfloat16"] = optimize_for_inference(model, dtype=torch.bfloat16)
        found["openvino bfloat16"] = optimize_for_inference(model, dtype=torch.bfloat16, backend="openvino")
    found["openvino int8"] = optimize_for_inference(model, dtype=torch.int8, backend="openvino", calibration=calibration)
    return found


def spaced(dataset: CarvanaDataset, count: int) -> CarvanaDataset:
    """So many pictures, or fewer, from all over the data set."""
    return dataset.subset(range(0, len(dataset), math.ceil(len(dataset) / count)))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with train/, train_masks/, val/, val_masks/ ($UNETLIB_DATA/carvana)")
    parser.add_argument("--model", default="carvana", help="what UNet.from_pretrained takes (carvana)")
    parser.add_argument("--calibrate", type=int, default=32, metavar="N", help="pictures for the ranges of int8 (32)")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="score each Nth picture of val/ only (1)")
    parser.add_argument("--rounds", type=int, default=10, help="timed passes of each (10)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")
    args = parser.parse_args(argv)
    check(parser, args)
    for option in ("calibrate", "every"):
        if getattr(args, option) < 1:
            parser.error(f"--{option} must be at least 1, got {getattr(args, option)}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    about = machine("cpu", ("openvino", "nncf"))
    with without_traceback():
        model = UNet.from_pretrained(args.model)
    with tempfile.TemporaryDirectory() as temporary:
        folder = carvana_folder(args.data)
        if folder is None:
            folder = Path(temporary)
            for split, cars in (("train", range(2)), ("val", range(2, 4))):
                write_carvana(folder, cars=cars, views=4, split=split)
        train, val = (CarvanaDataset(folder / part, folder / f"{part}_masks") for part in ("train", "val"))
        val = val.subset(range(0, len(val), args.every))
        calibration = list(network_inputs(model, [image for image, _ in spaced(train, args.calibrate)]))
        with without_traceback():
            copies = contestants(model, calibration)
        [x] = network_inputs(model, [val[0][0]])
        print_machine(about)
        height, width = x.shape[2:]
        print(f"{args.model} at {height}x{width}, {len(val)} pictures scored, {len(calibration)} for the ranges of int8")
        calls = [functools.partial(fast, x) for fast in copies.values()]
        seconds = dict(zip(copies, time_turns(calls, args.rounds, "cpu", queued=False).T.tolist()))
        scores = {name: evaluate(fast, val)["dice"] for name, fast in copies.items()}
    print_row("", "ms", "25%", "75%", "speed-up", "25%", "75%", "Dice", "change")
    rows = []
    for name, own in seconds.items():
        ratio = ratios(seconds[BASE], own)
        rows.append({"way": name, "seconds": own, "speedup": ratio, "dice": scores[name]})
        figures = [f"{1e3 * value:.1f}" for value in spread(own)] + [f"{value:.2f}" for value in spread(ratio)]
        print_row(name, *figures, f"{scores[name]:.5f}", f"{scores[name] - scores[BASE]:+.5f}")
    write_json(
        args.json,
        {"command": command(argv), "machine": about, "shape": [*x.shape], "pictures": len(val), "rows": rows},
    )


if __name__ == "__main__":
    main()
