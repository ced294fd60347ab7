"""What the benchmarks share: the machine and its roofs, fair timing, statistics, memory, tables, JSON files and plots."""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from unetlib.console import as_json
from unetlib.files import whole_file

PRECISIONS = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
REST = 0.05  # seconds before a timed call on a CPU: threads of other runtimes go on spinning for a while after their work
SHORT = 0.1  # seconds: a call that takes less is timed when it is made again at once, its threads awake and its data near
WARM_UP = {"cpu": 1, "cuda": 5}  # calls of each contestant before the clock starts
ENVIRONMENT = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "LD_PRELOAD", "THP_MEM_ALLOC_ENABLE", "NVIDIA_TF32_OVERRIDE")
Call = Callable[[], object]


# ---- the machine -----------------------------------------------------------------------------------------------------


def machine(device: str, packages: Sequence[str] = ()) -> dict[str, Any]:
    """What figures depend on beside the code: device, threads, versions, and environment variables that change them."""
    found: dict[str, Any] = {"device": device, "system": sys.platform, "python": platform.python_version()}
    for package in ("unetlib", "torch", "torchvision", *packages):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if sys.platform == "linux" else []
    found |= {"cpu": names[0] if names else platform.processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    found["capability"] = torch.backends.cpu.get_cpu_capability()
    if is_cuda(device):
        found |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    found |= {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
    return found | ({"UNETLIB_DATA": "set"} if os.environ.get("UNETLIB_DATA") else {})  # where it lies is nobody's business


def print_machine(about: dict[str, Any]) -> None:
    print(", ".join(f"{name} {value}" for name, value in about.items()))


def is_cuda(device: str) -> bool:
    return torch.device(device).type == "cuda"


def unsupported(precision: str, device: str) -> str | None:
    """Why this machine cannot show this precision; None where it can."""
    if is_cuda(device):
        old = torch.cuda.get_device_capability() < (8, 0) and precision in ("tf32", "bfloat16")
        return f"this GPU has no {precision} units" if old else None
    if precision == "tf32":
        return "tf32 is a mode of GPUs"
    query = {"bfloat16": "_is_mkldnn_bf16_supported", "float16": "_is_mkldnn_fp16_supported"}.get(precision)
    if query is None or (torch.backends.mkldnn.is_available() and getattr(torch.ops.mkldnn, query)()):
        return None
    return f"PyTorch has no fast {precision} convolution on this CPU: one pass would take minutes"


def set_precision(precision: str) -> None:
    """TF32 only where it is asked for; PyTorch's own default turns it on for convolutions."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"


def roofs(device: str, precisions: Iterable[str], side: int | None = None) -> dict[str, Any]:
    """What this machine reaches where nothing stands in its way: the lines above all bars of a roofline plot.

    Args:
        device: "cpu" or "cuda".
        precisions: names in `PRECISIONS` that it supports.
        side: of the square matrices, and of the square of float32 numbers copied; by default large enough to be full speed.

    Returns:
        "flop_per_second": for each precision, of a product of two large matrices, by the fastest of PyTorch's ways to it: its
        matrix product, or a convolution of 1x1, which other libraries carry out. "bytes_per_second": read and written by a
        large copy. Each from the fastest of five.
    """
    side = side or (8192 if is_cuda(device) else 2048)

    def fastest(*calls: Call) -> float:
        return float(time_turns(calls, 5, device).min())

    speeds = {}
    for precision in precisions:
        set_precision(precision)
        left, right = torch.rand(2, side, side, device=device).to(PRECISIONS[precision])
        pixels = right.view(1, side, side // 32, 32).contiguous(memory_format=torch.channels_last)
        weight = left.view(side, side, 1, 1)
        products = (lambda a=left, b=right: a @ b), (lambda x=pixels, w=weight: nn.functional.conv2d(x, w))
        speeds[precision] = 2 * side**3 / fastest(*products)
    source = torch.rand(4 * side, 4 * side, device=device)
    target = torch.empty_like(source)
    return {"flop_per_second": speeds, "bytes_per_second": 2 * source.nbytes / fastest(lambda: target.copy_(source))}


# ---- time ------------------------------------------------------------------------------------------------------------


def wait(device: str) -> None:
    """Until the device has done what it was asked."""
    if is_cuda(device):
        torch.cuda.synchronize()


def time_turns(
    calls: Sequence[Call], rounds: int, device: str, *, warm_up: int | None = None, queued: bool = True
) -> np.ndarray:
    """Seconds of each call, (rounds, contestants), taken A B C A B C ..., so that a machine's drift falls on all alike.

    Args:
        calls: the contestants.
        rounds: timed calls of each.
        device: where they work.
        warm_up: calls of each before the clock starts; None: `WARM_UP`.
        queued: on a GPU, ask for all before waiting for any, so that the GPU waits for Python only where it must. Without it
            each call is waited for, and one that takes less than `SHORT` is made twice, of which the second counts.
    """
    for call in [*calls] * (WARM_UP[torch.device(device).type] if warm_up is None else warm_up):
        call()
    if is_cuda(device) and queued:
        events = []
        for call in [*calls] * rounds:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            events.append((start, end))
        wait(device)
        seconds = [start.elapsed_time(end) / 1e3 for start, end in events]
    else:
        seconds = []
        for call in [*calls] * rounds:
            wait(device)
            time.sleep(REST)
            taken = _timed(call, device)
            seconds.append(_timed(call, device) if taken < SHORT else taken)
    return np.array(seconds).reshape(rounds, len(calls))


def _timed(call: Call, device: str) -> float:
    began = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - began


class Spread(NamedTuple):
    """The middle of some figures, and the quarters below and above it."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float] | np.ndarray) -> Spread:
    """Median and quartiles."""
    return Spread(*(float(value) for value in np.percentile(values, (50, 25, 75))))


def ratios(base: Sequence[float], own: Sequence[float]) -> list[float]:
    """How many times as long as `own` the `base` took, round by round: above 1, `own` is faster."""
    return [one / other for one, other in zip(base, own)]


# ---- operations, bytes and memory --------------------------------------------------------------------------------------


def flop(model: nn.Module, height: int, width: int) -> int:
    """Floating-point operations of one picture's convolutions, two for a multiply-add; nothing else is counted."""
    with FlopCounterMode(display=False) as counter:
        copy.deepcopy(model).to("meta")(torch.empty(1, 3, height, width, device="meta"))
    return counter.get_total_flops()


def traffic(model: nn.Module, batch: int, height: int, width: int) -> int:
    """Numbers that the convolutions must read and write in one pass: each input, weight and output once, all else fused."""
    moved = 0

    def count(module: nn.Conv2d | nn.ConvTranspose2d, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal moved
        moved += inputs[0].numel() + output.numel() + module.weight.numel()

    model = copy.deepcopy(model).to("meta")
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            module.register_forward_hook(count)
    model(torch.empty(batch, 3, height, width, device="meta"))
    return moved


def peak_allocated(call: Call, device: str) -> int:
    """Most bytes that PyTorch's allocator held at a time during a call, beyond what it held before."""
    gc.collect()  # what the collector freed during the call would be taken off
    if is_cuda(device):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    held = peak = 0
    for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


def resident(field: str) -> int:
    """A line of Linux's /proc/self/status, such as VmRSS, in bytes."""
    return 1024 * int(re.findall(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[0])


def resident_peak(call: Call) -> int:
    """Most resident bytes of this process during a call; what lies before it in the process's life is not counted.

    `ru_maxrss` would not do: it begins at the size of the process that started this one.
    """
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to VmRSS
    call()
    return resident("VmHWM")


def in_fresh_process(*command: str, **environment: str) -> Any:
    """Run a script of these benchmarks and return the JSON of its last line; None where memory cannot be read (not Linux)."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    environment = {**os.environ, **environment}
    done = subprocess.run([sys.executable, *command], check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def free(device: str) -> None:
    """Give back what nobody holds any more, compiled code included."""
    if "torch._dynamo" in sys.modules:  # else nothing is compiled, and asking would load the compiler
        torch.compiler.reset()
    gc.collect()
    if is_cuda(device):
        torch.cuda.empty_cache()


# ---- in and out --------------------------------------------------------------------------------------------------------


def sizes(shape: str) -> tuple[int, int, int]:
    """Batch, height and width of a shape such as 4x320x480."""
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*x[1-9]\d*", shape):
        raise ValueError(f"expected a shape BATCHxHEIGHTxWIDTH such as 4x320x480, got {shape!r}")
    batch, height, width = map(int, shape.split("x"))
    return batch, height, width


def add_device(parser: argparse.ArgumentParser) -> None:
    """The option where to run, of the benchmarks that know both kinds of machine."""
    there = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cuda", "cpu"), default=there, help="(cuda where there is one)")


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with an error where `--shapes`, `--rounds`, `--json` or `--device` cannot be right."""
    try:
        for shape in getattr(args, "shapes", ()):
            sizes(shape)
    except ValueError as error:
        parser.error(str(error))
    if getattr(args, "rounds", 1) < 1:
        parser.error(f"--rounds must be at least 1, got {args.rounds}")
    if args.json and not args.json.absolute().parent.is_dir():
        parser.error(f"there is no folder {str(args.json.parent)!r} for --json: make it first")
    try:
        torch.empty(0, device=getattr(args, "device", "cpu"))
    except (RuntimeError, AssertionError):  # the latter where PyTorch is built without
        parser.error(f"there is no device {args.device!r} here; give --device cpu, or cuda where PyTorch finds a GPU")


@contextmanager
def without_traceback() -> Iterator[None]:
    """End with what the library says is wrong with a model's name, its files or an option, or lacks."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(str(error)) from error


def command(arguments: Sequence[str] | None = None) -> str:
    """The command that runs this, to stand beside its figures."""
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *(sys.argv[1:] if arguments is None else arguments)])


def carvana_folder(given: Path | None) -> Path | None:
    """The folder with Carvana's train/: the given one, else that of UNETLIB_DATA; None where scenes must be rendered."""
    known = os.environ.get("UNETLIB_DATA")
    folder = given or (Path(known, "carvana") if known else None)
    if folder is not None and (folder / "train").is_dir():
        return folder
    if given is not None:
        raise SystemExit(f"there is no folder {str(given / 'train')!r}; --data must hold train/ and train_masks/")
    return None


def print_row(name: str, *cells: str) -> None:
    """One line of a table, flushed: the name to the left, the cells to the right of their columns."""
    print(f"  {name:<22}" + "".join(f"{cell:>11}" for cell in cells), flush=True)


def mebibytes(count: int | None) -> str:
    """Bytes for a table; a dash where nothing is known."""
    return "-" if count is None else f"{count / 2**20:.0f}"


def write_json(path: Path | None, results: dict[str, Any]) -> None:
    """Replace the file whole, or leave it as it was; nothing for None. JSON has no NaN, for which null stands."""
    if path is not None:
        with whole_file(path) as partial:
            partial.write_text(as_json(results, indent=1) + "\n", encoding="utf-8")


def file_part(network: str) -> str:
    """A network's name as a part of a file's, with its folders: "study" stays, "runs/a/model" becomes "runs-2Fa-2Fmodel"."""
    return quote(network, safe="").replace("%", "-")


def new_plot(x: str, y: str, panels: Sequence[str]) -> tuple[Any, list[Any]]:
    """A figure and its axes, one for each title, side by side, all logarithmic; it needs matplotlib, and no display."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise SystemExit("plots need matplotlib: pip install 'unetlib[bench]'") from error
    figure = Figure(figsize=(2 + 4 * len(panels), 4), layout="constrained")
    axes = [*figure.subplots(1, len(panels), squeeze=False)[0]]
    for panel, title in zip(axes, panels):
        panel.set(title=title, xlabel=x, ylabel=y, xscale="log", yscale="log")
        panel.grid(True, which="both", alpha=0.2)
    return figure, axes


def save_plot(figure: Any, path: Path) -> None:
    """Write an SVG whose bytes depend on nothing but the plot; its text stays text."""
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "unetlib"}):
        figure.savefig(path, metadata={"Date": None})
