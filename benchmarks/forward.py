"""Time forward passes of the study's module, of unetlib's UNet with the same weights, and of pretrained models, in one run.

    python benchmarks/forward.py                                         # the GPU, or the CPU where there is none
    python benchmarks/forward.py --shapes 16x640x960 --precisions bfloat16 --layouts channels_last --json forward.json

README.md beside this file says what is measured, and how to read the table.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from study import StudyUNet, randomize
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from unetlib import UNet, list_pretrained
from unetlib.convert import convert

STUDY, OURS = "study", "unetlib"  # the same network with the same weights: the study's module, and UNet()
PRECISIONS = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
TOLERANCES = {"float32": 1e-3, "tf32": 1e-3, "bfloat16": 5e-2, "float16": 1e-2}  # of OURS from STUDY, relative; usually 0
DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {"shapes": "1x160x240 2x160x240 1x320x480", "precisions": "float32 bfloat16", "rounds": 5},
    "cuda": {
        "shapes": "1x320x480 1x640x960 16x640x960 1x1280x1918",
        "precisions": "float32 tf32 bfloat16 float16",
        "rounds": 50,
    },
}
WARM_UP = {"cpu": 1, "cuda": 5}  # passes of each network
ENVIRONMENT = ("OMP_NUM_THREADS", "LD_PRELOAD", "THP_MEM_ALLOC_ENABLE", "NVIDIA_TF32_OVERRIDE")  # what changes the figures


class Case(NamedTuple):
    """What a pass is timed with."""

    shape: str
    precision: str
    layout: str

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Batch, height and width."""
        batch, height, width = map(int, self.shape.split("x"))
        return batch, height, width


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", nargs="+", metavar="BATCHxHEIGHTxWIDTH", help="such as 4x320x480")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, help="dtype of weights and pictures; no autocast")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--models", nargs="*", help="what UNet.from_pretrained takes (default: carvana)")
    parser.add_argument("--rounds", type=int, help="timed passes of each network")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there, after each case")
    parser.add_argument("--peak-of", metavar="NETWORK", help="only print the peak memory of one pass on the CPU, in bytes")
    args = parser.parse_args(argv)
    for option, value in DEFAULTS[args.device].items():
        if getattr(args, option) is None:
            setattr(args, option, value.split() if isinstance(value, str) else value)
    for shape in args.shapes:
        if not re.fullmatch(r"[1-9]\d*x[1-9]\d*x[1-9]\d*", shape):
            parser.error(f"expected a shape BATCHxHEIGHTxWIDTH such as 4x320x480, got {shape!r}")
    if args.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {args.rounds}")
    if args.json and not args.json.absolute().parent.is_dir():
        parser.error(f"there is no folder {str(args.json.parent)!r} for --json: make it first")
    return args


def build(network: str) -> nn.Module:
    if network == STUDY:
        return randomize(StudyUNet())
    return UNet().eval() if network == OURS else UNet.from_pretrained(network)


def prepare(model: nn.Module, case: Case, device: str) -> tuple[nn.Module, Tensor]:
    """A copy of the model and a batch of noise, in the case's shape, precision and layout."""
    batch, height, width = case.sizes
    noise = torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(0))
    to: dict[str, Any] = {"dtype": PRECISIONS[case.precision], "memory_format": LAYOUTS[case.layout]}
    return copy.deepcopy(model).to(device, **to), noise.to(device, **to)


def unsupported(precision: str, device: str) -> str | None:
    """Why this machine cannot show this precision; None where it can."""
    if device == "cuda":
        old = torch.cuda.get_device_capability() < (8, 0) and precision in ("tf32", "bfloat16")
        return f"this GPU has no {precision} units" if old else None
    if precision == "tf32":
        return "tf32 is a mode of GPUs"
    query = {"bfloat16": "_is_mkldnn_bf16_supported", "float16": "_is_mkldnn_fp16_supported"}.get(precision)
    if query is None or (torch.backends.mkldnn.is_available() and getattr(torch.ops.mkldnn, query)()):
        return None
    return f"PyTorch has no fast {precision} convolution on this CPU: one pass would take minutes"


def flop(model: nn.Module, height: int, width: int) -> int:
    """Floating-point operations of one picture's convolutions, two for a multiply-add; nothing else is counted."""
    with FlopCounterMode(display=False) as counter:
        copy.deepcopy(model).to("meta")(torch.empty(1, 3, height, width, device="meta"))
    return counter.get_total_flops()


def time_passes(passes: Sequence[tuple[nn.Module, Tensor]], rounds: int, device: str) -> np.ndarray:
    """Seconds of each pass, (rounds, networks). Taken A B C A B C ..., so that a machine's drift falls on all alike."""
    for model, x in [*passes] * WARM_UP[device]:
        model(x)
    if device == "cuda":  # all is queued before any is waited for, so that the GPU waits for Python only where it must
        events = []
        for model, x in [*passes] * rounds:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            model(x)
            end.record()
            events.append((start, end))
        torch.cuda.synchronize()
        seconds = [start.elapsed_time(end) / 1e3 for start, end in events]
    else:
        seconds = []
        for model, x in [*passes] * rounds:
            began = time.perf_counter()
            model(x)
            seconds.append(time.perf_counter() - began)
    return np.array(seconds).reshape(rounds, len(passes))


def peak_on_cuda(model: nn.Module, x: Tensor) -> int:
    """Bytes of the weights, the pictures and the most that one pass holds at a time."""
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model(x)
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    return torch.cuda.max_memory_allocated() - held + weights + x.nbytes


def peak_on_cpu(network: str, case: Case) -> int | None:
    """The same, as resident memory of a fresh process beyond what its imports took; Linux only."""
    if sys.platform != "linux":
        return None
    command = [sys.executable, __file__, "--device", "cpu", "--peak-of", network]
    command += ["--shapes", case.shape, "--precisions", case.precision, "--layouts", case.layout]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


@torch.inference_mode()
def resident_peak(network: str, case: Case) -> int:
    def resident(field: str) -> int:
        return 1024 * int(re.findall(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[0])

    imported = resident("VmRSS")
    model, x = prepare(build(network), case, "cpu")
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to VmRSS: loading and converting is not the pass
    model(x)
    return resident("VmHWM") - imported  # and not ru_maxrss, which begins at the size of the process that started this one


@torch.inference_mode()
def measure(models: dict[str, nn.Module], case: Case, rounds: int, device: str) -> list[dict[str, Any]]:
    """A row for each network, after a check that STUDY and OURS compute the same."""
    torch.backends.cudnn.allow_tf32 = case.precision == "tf32"
    passes = [prepare(model, case, device) for model in models.values()]
    study, ours = (model(x).double() for model, x in passes[:2])
    difference = float((ours - study).norm() / study.norm())
    if not difference <= TOLERANCES[case.precision]:  # so written, NaN does not pass
        raise SystemExit(f"{' '.join(case)}: the logits of {OURS} and {STUDY} differ by {difference:.1e}; nothing is timed")
    seconds = time_passes(passes, rounds, device)
    rows = []
    for (name, model), (copied, x), own in zip(models.items(), passes, seconds.T):
        row = {"network": name, **case._asdict(), "difference": difference, "flop_per_picture": flop(model, *case.sizes[1:])}
        row["peak_bytes"] = peak_on_cuda(copied, x) if device == "cuda" else peak_on_cpu(name, case)
        rows.append(row | {"seconds": own.tolist(), "speedup": (seconds[:, 0] / own).tolist()})
    return rows


def show(row: dict[str, Any]) -> None:
    low, middle, high = 1e3 * np.percentile(row["seconds"], (25, 50, 75))
    pictures = 1e3 * int(row["shape"].split("x")[0]) / middle
    gflop = row["flop_per_picture"] / 1e9
    peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f}"
    speedup = (f"{ratio:.3f}" for ratio in np.percentile(row["speedup"], (50, 25, 75)))
    times = (f"{value:.2f}" for value in (middle, low, high, pictures))
    print_line(row["network"], f"{gflop:.3f}", *times, f"{gflop * pictures:.1f}", peak, *speedup)


def print_line(name: str, *cells: str) -> None:
    print(f"  {name:<20}" + "".join(f"{cell:>11}" for cell in cells), flush=True)


def machine(device: str) -> dict[str, Any]:
    """What the figures depend on beside the code."""
    found: dict[str, Any] = {"device": device, "python": platform.python_version()}
    found |= {package: version(package) for package in ("unetlib", "torch", "torchvision")}
    if device == "cuda":
        found |= {"name": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    else:
        names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if sys.platform == "linux" else []
        found |= {"name": names[0] if names else platform.processor(), "threads": torch.get_num_threads()}
        found |= {"cores": os.cpu_count(), "capability": torch.backends.cpu.get_cpu_capability()}
    return found | {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}


def write_json(path: Path | None, results: dict[str, Any]) -> None:
    if path is not None:
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        beside.write_text(json.dumps(results, indent=1) + "\n")
        os.replace(beside, path)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    cases = [Case(*case) for case in itertools.product(args.shapes, args.precisions, args.layouts)]
    if args.peak_of:
        print(resident_peak(args.peak_of, cases[0]))
        return
    torch.backends.cudnn.benchmark = True
    skipped = {precision: reason for precision in args.precisions if (reason := unsupported(precision, args.device))}
    if args.models is None:
        args.models = ["carvana"]
        if "carvana" not in list_pretrained():
            args.models, skipped["carvana"] = [], "not in the zoo of this version; --models takes a folder or file"
    models = {name: build(name) for name in (STUDY, OURS, *args.models)}
    models[OURS].load_state_dict(convert(models[STUDY].state_dict()).state_dict)
    results: dict[str, Any] = {"machine": machine(args.device), "skipped": skipped, "rows": []}
    print(*(f"{name}: {value}" for name, value in results["machine"].items()), sep="\n")
    print_line("", "GFLOP", "ms", "25%", "75%", "pictures/s", "GFLOP/s", "peak MiB", "speed-up", "25%", "75%")
    for case in cases:
        if case.precision in skipped:
            continue
        try:
            rows = measure(models, case, args.rounds, args.device)
        except torch.OutOfMemoryError:
            skipped[" ".join(case)] = "out of memory"
            continue
        print(f"{' '.join(case)}, logits of {OURS} and {STUDY} differ by {rows[0]['difference']:.1g}")
        for row in rows:
            show(row)
        results["rows"] += rows
        write_json(args.json, results)  # after each case, so that an interrupted run keeps what it has
    for what, reason in skipped.items():
        print(f"skipped {what}: {reason}")
    write_json(args.json, results)


if __name__ == "__main__":
    main()
