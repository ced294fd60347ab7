"""Pictures a second, from files to masks in files: `examples/predict_folder.py` against a plain loop, in one run.

    UNETLIB_DATA=... python benchmarks/folder.py            # its folder carvana/val; without it scenes are rendered
    python benchmarks/folder.py --pictures photos --model ./my_model --threads 8 --batch-size 8 --json folder.json
    python benchmarks/folder.py --files 2 --rounds 1        # does it run?

The loop reads a picture, predicts, saves the mask, and goes on to the next. Both take turns on the same files, round by round,
and the masks must be the same but for one pixel in 10,000. A ratio above 1 says that the script is faster.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from harness import carvana_folder, check, command, machine, print_machine, without_traceback, write_json
from PIL import Image

from unetlib import UNet
from unetlib.synthetic import write_carvana
from unetlib.visualize import mask_to_image

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import predict_folder


def plain_loop(model: UNet, names: Sequence[str], pictures: Path, masks: Path) -> None:
    for name in names:
        mask = model.predict(pictures / name)
        image = mask_to_image(mask) if model.config.out_channels == 1 else mask
        path = predict_folder.mask_path(masks, name)
        path.parent.mkdir(parents=True, exist_ok=True)  # a picture may lie in a subfolder
        Image.fromarray(image).save(path)


def measure(model: UNet, names: Sequence[str], args: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Seconds of both on the same files; the one that begins has no warmer files than the other."""
    for name in names:
        (args.pictures / name).read_bytes()
    start = time.perf_counter()
    plain_loop(model, names, args.pictures, folder / "loop")
    middle = time.perf_counter()
    options = ["--device", args.device, "--batch-size", str(args.batch_size), "--threads", str(args.threads)]
    settings = predict_folder.parse_args([str(args.pictures), str(folder / "script"), *options])
    outcomes = list(predict_folder.predict_files(predict_folder.prepared(model, names, settings), names, settings))
    end = time.perf_counter()
    if wrong := [reason for _, reason in outcomes if reason]:
        sys.exit(wrong[0])
    for name in names:
        loop, script = (np.asarray(Image.open(predict_folder.mask_path(folder / side, name))) for side in ("loop", "script"))
        if (different := (loop != script).mean()) > 1e-4:  # batches may round the last bits otherwise
            sys.exit(f"{different:.2%} of the pixels of {name} have another mask; nothing is compared")
    return {"loop": middle - start, "predict_folder.py": end - middle}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, help="one folder; UNETLIB_DATA's carvana/val, or rendered scenes")
    parser.add_argument("--model", default="carvana", help="what UNet.from_pretrained takes (carvana)")
    parser.add_argument("--files", type=int, default=90, help="pictures in a round, at most (90)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of both (3)")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="as PyTorch names it (cuda where there is one)"
    )
    parser.add_argument("--batch-size", type=int, default=4, help="pictures in a forward pass of the script (4)")
    parser.add_argument("--threads", type=int, default=min(8, os.cpu_count() or 1), help="of the script (%(default)s)")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    args = parser.parse_args(argv)
    check(parser, args)
    if args.files < 1:
        parser.error(f"--files must be at least 1, got {args.files}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    with without_traceback():
        model = UNet.from_pretrained(args.model, device=args.device)
    about = machine(args.device, ("pillow",))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.pictures is None:
            carvana = carvana_folder(None)
            if carvana is None:
                write_carvana(folder, cars=1, views=min(args.files, 16), split="val")
            args.pictures = (carvana or folder) / "val"
        names, _, _ = predict_folder.find_pictures(args.pictures, folder / "none", overwrite=False)
        if not names:
            sys.exit(f"there is no picture in {args.pictures}")
        names = names[: args.files]
        measure(model, names[:1], args, folder)  # warms up
        rounds = [measure(model, names, args, folder) for _ in range(args.rounds)]
    ratios = [seconds["loop"] / seconds["predict_folder.py"] for seconds in rounds]
    print_machine(about)
    print(f"{len(names)} pictures, {args.rounds} rounds, batches of {args.batch_size}, {args.threads} threads")
    for side in rounds[0]:
        print(f"{side:<18}{len(names) / statistics.median(seconds[side] for seconds in rounds):8.2f} pictures/s")
    print(f"{'times as fast':<18}{statistics.median(ratios):8.2f}   ({min(ratios):.2f} to {max(ratios):.2f})")
    results = {"command": command(argv), "machine": about, "files": len(names), "seconds": rounds, "ratio": ratios}
    write_json(args.json, results)


if __name__ == "__main__":
    main()
