"""Time forward passes: the study's network in every way to run it that is installed, and unetlib's, with the same weights.

    python benchmarks/forward.py                                         # the GPU, or the CPU where there is none
    python benchmarks/forward.py --quick                                 # one or two minutes on a CPU
    python benchmarks/forward.py --shapes 16x640x960 --precisions bfloat16 --peers compiled optimized --json forward.json

README.md beside this file says what is measured, and how to read the table.
"""

from __future__ import annotations

import argparse
import functools
import gc
import itertools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import (
    PRECISIONS,
    WARM_UP,
    add_device,
    check,
    command,
    flop,
    free,
    in_fresh_process,
    is_cuda,
    machine,
    mebibytes,
    print_machine,
    print_row,
    ratios,
    resident,
    resident_peak,
    roofs,
    set_precision,
    sizes,
    spread,
    time_turns,
    traffic,
    unsupported,
    without_traceback,
    write_json,
)
from peers import OTHER_FUNCTION, OURS, PEERS, STUDY, Case, Forward, Network, NotHere, example, load_network
from torch import Tensor

from unetlib.unet import check_input

DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {"shapes": "1x160x240 1x320x480 1x640x960", "precisions": "float32 bfloat16", "rounds": 5},
    "cuda": {
        "shapes": "1x160x240 1x320x480 1x640x960 1x1280x1918 4x640x960 16x640x960",
        "precisions": "float32 tf32 bfloat16 float16",
        "rounds": 50,
    },
}
QUICK: dict[str, Any] = {"shapes": "1x160x240", "precisions": "float32", "rounds": 3}
SLOW_TO_BUILD = ("compiled", "optimized_compiled")  # left out of --quick
TOLERANCES = {"float32": 1e-3, "tf32": 1e-2, "bfloat16": 1e-1, "float16": 2e-2}  # relative; a wrong connection gives about 1
PACKAGES = ("monai", "onnx", "onnxruntime", "openvino", "triton")
COLUMNS = ("GFLOP", "ms", "25%", "75%", "pictures/s", "GFLOP/s", "of roof", "error", "peak MiB", "speed-up", "25%", "75%")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_device(parser)
    parser.add_argument(
        "--networks", nargs="+", default=[STUDY, "carvana"], help="study, narrow, or a name for UNet.from_pretrained"
    )
    parser.add_argument("--shapes", nargs="+", metavar="BATCHxHEIGHTxWIDTH", help="such as 4x320x480")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, help="of the passes")
    parser.add_argument("--peers", nargs="+", choices=PEERS, help="the contestants beside study (default: all)")
    parser.add_argument("--rounds", type=int, help="timed passes of each contestant")
    parser.add_argument("--memory", action="store_true", help="measure peak memory on a CPU too, a process for each row")
    parser.add_argument("--quick", action="store_true", help="one shape, few rounds, nothing compiled")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there, after each case")
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="draw the figures there (pip install 'unetlib[bench]')")
    parser.add_argument("--peak-of", nargs=2, metavar=("PEER", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    for option, value in (DEFAULTS[args.device] | (QUICK if args.quick else {})).items():
        if getattr(args, option) is None:
            setattr(args, option, value.split() if isinstance(value, str) else value)
    if args.peers is None:
        args.peers = [peer for peer in PEERS if not (args.quick and peer in SLOW_TO_BUILD)]
    check(parser, args)
    if args.plot and not args.plot.is_dir():
        parser.error(f"there is no folder {str(args.plot)!r} for --plot: make it first")
    return args


def relative_error(logits: Tensor, reference: Tensor) -> float:
    """Norm of the difference over the norm of the reference."""
    return float((logits.double() - reference.double()).norm() / reference.double().norm())


def build(
    peers: Sequence[str], network: Network, case: Case, device: str, folder: Path, skipped: dict[str, str]
) -> dict[str, tuple[Forward, float | None, int | None]]:
    """Each contestant that computes the right logits, its relative error, and on CUDA the most memory that it needs."""
    x = example(case).to(device)
    set_precision("float32")
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False):  # it is not timed, so not tuned either
        reference = PEERS[STUDY](network, case._replace(precision="float32"), device, folder)(x)
    set_precision(case.precision)
    found = {}
    for peer in peers:
        where = " ".join((*case, peer))
        before = held_on_cuda() if is_cuda(device) else (0, 0)
        try:
            forward = PEERS[peer](network, case, device, folder)
            logits = forward(x)
        except NotHere as reason:
            skipped[where] = str(reason)
            continue
        except torch.OutOfMemoryError:
            skipped[where] = "out of memory"
            continue
        error = None if peer in OTHER_FUNCTION else relative_error(logits, reference)
        del logits
        if error is not None and not error <= TOLERANCES[case.precision]:  # so written, NaN does not pass
            skipped[where] = f"refused: its logits are {error:.1e} from the study's in float32"
            continue
        found[peer] = (forward, error, peak_on_cuda(forward, x, *before) if is_cuda(device) else None)
    return found


def held_on_cuda() -> tuple[int, int]:
    """Bytes allocated and reserved, without what others left to be used again: it would hide what a graph takes."""
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()


def peak_on_cuda(forward: Forward, x: Tensor, allocated: int, reserved: int) -> int:
    """Bytes beyond what was held before the contestant was built: its weights, and the most that one pass needs at a time.

    What CUDA graphs keep for themselves is reserved but not allocated, hence both.
    """
    for _ in range(WARM_UP["cuda"]):
        forward(x)
    kept = held_on_cuda()[1] - reserved
    torch.cuda.reset_peak_memory_stats()
    forward(x)
    return max(kept, torch.cuda.max_memory_allocated() - allocated)


@torch.inference_mode()
def resident_peak_of(peer: str, folder: Path, case: Case) -> int:
    """The same on a CPU, as resident memory of this process beyond what its imports took."""
    imported = resident("VmRSS")
    forward = PEERS[peer](load_network(case.network), case, "cpu", folder)
    x = example(case)
    forward(x)
    return resident_peak(lambda: forward(x)) - imported


def peak_on_cpu(peer: str, folder: Path, case: Case) -> int | None:
    options = ["--networks", case.network, "--shapes", case.shape, "--precisions", case.precision]
    return in_fresh_process(__file__, "--device", "cpu", "--peak-of", peer, str(folder), *options)


@torch.inference_mode()
def measure(
    network: Network, case: Case, args: argparse.Namespace, folder: Path, skipped: dict[str, str]
) -> list[dict[str, Any]]:
    """A row for each contestant, the study's module first."""
    peers = [STUDY, *(peer for peer in args.peers if peer != STUDY)]
    found = build(peers, network, case, args.device, folder, skipped)
    if STUDY not in found:
        return []
    x = example(case).to(args.device)
    seconds = time_turns([functools.partial(forward, x) for forward, _, _ in found.values()], args.rounds, args.device)
    peaks = {peer: (error, peak) for peer, (_, error, peak) in found.items()}
    del found
    free(args.device)
    rows = []
    for (peer, (error, peak)), own in zip(peaks.items(), seconds.T.tolist()):
        module = OTHER_FUNCTION[peer](network) if peer in OTHER_FUNCTION else network.study
        row: dict[str, Any] = {**case._asdict(), "peer": peer, "error": error}
        row["flop_per_picture"] = flop(module, *sizes(case.shape)[1:])
        row["bytes_per_pass"] = traffic(module, *sizes(case.shape)) * PRECISIONS[case.precision].itemsize
        row["peak_bytes"] = peak_on_cpu(peer, folder, case) if args.memory and not is_cuda(args.device) else peak
        rows.append(row | {"seconds": own, "speedup": ratios(seconds[:, 0].tolist(), own)})
    return rows


def best_against_best(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The fastest of unetlib's against the fastest other that computes the same; None where one of the two is missing."""

    def fastest(peers: Sequence[str]) -> dict[str, Any] | None:
        own = [row for row in rows if row["peer"] in peers and row["peer"] not in OTHER_FUNCTION]
        return min(own, key=lambda row: np.median(row["seconds"]), default=None)

    ours, other = fastest([*OURS]), fastest([row["peer"] for row in rows if row["peer"] not in OURS])
    if ours is None or other is None:
        return None
    case = {name: ours[name] for name in Case._fields}
    return case | {"ours": ours["peer"], "peer": other["peer"], "ratio": ratios(other["seconds"], ours["seconds"])}


def show(row: dict[str, Any], roof: dict[str, Any]) -> None:
    time = spread(row["seconds"])
    pictures = sizes(row["shape"])[0] / time.median
    speed = pictures * row["flop_per_picture"]
    cells = [f"{row['flop_per_picture'] / 1e9:.3f}", *(f"{1e3 * value:.2f}" for value in time), f"{pictures:.2f}"]
    cells += [f"{speed / 1e9:.1f}", f"{speed / roof['flop_per_second'][row['precision']]:.2f}"]
    cells += ["-" if row["error"] is None else f"{row['error']:.1e}", mebibytes(row["peak_bytes"])]
    print_row(row["peer"], *cells, *(f"{value:.3f}" for value in spread(row["speedup"])))


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    cases = [Case(*case) for case in itertools.product(args.networks, args.shapes, args.precisions)]
    if args.peak_of:
        peer, folder = args.peak_of
        print(resident_peak_of(peer, Path(folder), cases[0]))
        return
    with without_traceback():  # before the first is measured, which takes minutes
        networks = {name: load_network(name) for name in args.networks}
        for case in cases:
            batch, height, width = sizes(case.shape)
            check_input(torch.empty(batch, 3, height, width, device="meta"), networks[case.network].ours.config)
    torch.backends.cudnn.benchmark = True
    skipped = {precision: reason for precision in args.precisions if (reason := unsupported(precision, args.device))}
    usable = [precision for precision in args.precisions if precision not in skipped]
    results: dict[str, Any] = {"command": command(argv), "machine": machine(args.device, PACKAGES)}
    results |= {"roofs": roofs(args.device, usable), "skipped": skipped, "rows": [], "best": []}
    print_machine(results["machine"])
    for precision, speed in results["roofs"]["flop_per_second"].items():
        print(f"roof, {precision} matrix product: {speed / 1e9:.1f} GFLOP/s")
    print(f"roof, copy: {results['roofs']['bytes_per_second'] / 1e9:.2f} GB/s")
    print_row("", *COLUMNS)
    with tempfile.TemporaryDirectory() as folder:
        for case in cases:
            if case.precision in skipped:
                continue
            rows = measure(networks[case.network], case, args, Path(folder), skipped)
            free(args.device)
            print(" ".join(case), flush=True)
            for row in rows:
                show(row, results["roofs"])
            if best := best_against_best(rows):
                results["best"].append(best)
                ratio = "{:.3f} ({:.3f} to {:.3f})".format(*spread(best["ratio"]))
                print(f"  {best['ours']} runs {ratio} times as fast as {best['peer']}, the best peer")
            results["rows"] += rows
            write_json(args.json, results)  # after each case, so that an interrupted run keeps what it has
    for what, reason in skipped.items():
        print(f"skipped {what}: {reason}")
    write_json(args.json, results)
    if args.plot:
        from plots import draw_forward

        draw_forward(results, args.plot)
    if refused := [what for what, reason in skipped.items() if reason.startswith("refused")]:
        raise SystemExit(f"wrong logits, so not timed: {', '.join(refused)}")


if __name__ == "__main__":
    main()
