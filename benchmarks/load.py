"""Time and memory to load a network: `UNet.from_pretrained` against `torch.load` and huggingface_hub's mixin.

The same weights, in the same types, lie on disk three times. The contestants take turns in one process, and end with equal
networks in evaluation mode; a ratio above 1 says that unetlib is faster, or needs less memory.

    python benchmarks/load.py                                     # carvana, and the study's 31 million parameters
    python benchmarks/load.py --models ./my_model --rounds 30 --json load.json
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import (
    check,
    command,
    in_fresh_process,
    machine,
    print_machine,
    ratios,
    resident,
    resident_peak,
    spread,
    time_turns,
    write_json,
)
from huggingface_hub import PyTorchModelHubMixin
from safetensors.torch import load_file

from unetlib import UNet, UNetConfig, list_pretrained
from unetlib.pretrained import ZOO

STUDY = "study"


class MixinUNet(PyTorchModelHubMixin, UNet):  # type: ignore[misc]  # the mixin's methods take other arguments than ours
    """Our network as the mixin saves and loads it."""

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__(**options)


def folder_of(model: str) -> Path:
    """Of a model in the zoo, or else the folder itself."""
    return ZOO / model if (ZOO / model).is_dir() else Path(model)


def prepare(model: str, folder: Path) -> None:
    """Write a model's weights for each contestant, in the types in which they are stored."""
    if model == STUDY:
        torch.manual_seed(0)
        source = UNet().save_pretrained(folder / "unetlib")
    else:
        source = folder_of(model)
        (folder / "unetlib").symlink_to(source.resolve())
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))["model"]
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    torch.save(load_file(source / "model.safetensors"), folder / "weights.pth")
    (folder / "mixin").mkdir()
    (folder / "mixin" / "config.json").write_text(json.dumps({"options": config}), encoding="utf-8")
    (folder / "mixin" / "model.safetensors").symlink_to((source / "model.safetensors").resolve())


def load_unetlib(folder: Path) -> UNet:
    return UNet.from_pretrained(folder / "unetlib")


def load_torch(folder: Path) -> UNet:
    """The usual lines: build, read, copy."""
    model = UNet.from_config(UNetConfig.from_json((folder / "config.json").read_text(encoding="utf-8")))
    model.load_state_dict(torch.load(folder / "weights.pth", map_location="cpu", weights_only=True))
    return model.eval()


def load_mixin(folder: Path) -> UNet:
    with contextlib.redirect_stdout(io.StringIO()):  # it prints
        return MixinUNet.from_pretrained(str(folder / "mixin"), strict=True)


CONTESTANTS: dict[str, Callable[[Path], UNet]] = {"unetlib": load_unetlib, "torch.load": load_torch, "mixin": load_mixin}


def check_equal(folder: Path) -> None:
    """All contestants end with the same tensors, or nothing is timed."""
    states = {name: load(folder).state_dict() for name, load in CONTESTANTS.items()}
    for name, state in states.items():
        for key, tensor in states["unetlib"].items():
            if not torch.equal(tensor, state[key]):
                raise SystemExit(f"{key} of {name} is not that of unetlib")


def time_loads(folder: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds of each load; the contestants take turns."""
    seconds = time_turns([functools.partial(load, folder) for load in CONTESTANTS.values()], rounds, "cpu", warm_up=0)
    return dict(zip(CONTESTANTS, seconds.T.tolist()))


def peak_bytes(loader: str, folder: Path, warm: Path) -> dict[str, int] | None:
    """Resident memory that one load adds in a process of its own; None where there is no /proc.

    Args:
        loader: a name in `CONTESTANTS`.
        folder: what `prepare` wrote.
        warm: a tiny model, which is loaded first so that imports and the like are not counted.

    Returns:
        "peak": the most at any time, pages of mapped files included; "private": what stays afterwards without those pages.
    """
    return in_fresh_process(__file__, "--peak-of", loader, str(warm), str(folder), OMP_NUM_THREADS="1")


def measure_peak(loader: str, warm: Path, folder: Path) -> dict[str, int]:
    """Memory of one load in this process."""
    CONTESTANTS[loader](warm)
    loaded: list[UNet] = []
    before, private = resident("VmRSS"), resident("RssAnon")
    peak = resident_peak(lambda: loaded.append(CONTESTANTS[loader](folder)))
    return {"peak": peak - before, "private": resident("RssAnon") - private}


def measure(model: str, rounds: int, warm: Path) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(model, folder)
        check_equal(folder)
        seconds = time_loads(folder, rounds)
        numbers = sum(tensor.numel() * 4 for tensor in load_unetlib(folder).state_dict().values())
        return {
            "model": model,
            "stored_bytes": (folder / "unetlib" / "model.safetensors").stat().st_size,
            "float32_bytes": numbers,
            "seconds": seconds,
            "ratio": {name: spread(ratios(times, seconds["unetlib"])).median for name, times in seconds.items()},
            "memory": {name: peak_bytes(name, folder, warm) for name in CONTESTANTS},
        }


def table(row: dict[str, Any]) -> str:
    lines = []
    for name in CONTESTANTS:
        memory, ours = row["memory"][name], row["memory"]["unetlib"]
        cells = [row["model"], name, f"{1e3 * spread(row['seconds'][name]).median:.1f}", f"{row['ratio'][name]:.2f}"]
        if memory is None:
            cells += ["-"] * 4
        else:
            for kind in ("peak", "private"):
                cells += [f"{memory[kind] / 2**20:.1f}", f"{memory[kind] / max(ours[kind], 1):.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["carvana", STUDY], help=f"zoo names, model folders, or {STUDY!r}")
    parser.add_argument("--rounds", type=int, default=20, help="timed loads of each contestant (20)")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    parser.add_argument("--peak-of", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.peak_of:
        loader, warm, folder = args.peak_of
        print(json.dumps(measure_peak(loader, Path(warm), Path(folder))))
        return
    check(parser, args)
    for model in args.models:
        if model != STUDY and not (folder_of(model) / "config.json").is_file():
            parser.error(f"--models must be {', '.join(list_pretrained())}, {STUDY} or a model's folder, not {model!r}")
    about = machine("cpu", ("huggingface-hub",))
    print_machine(about)
    print("\n| model | loader | ms | times as long | peak MiB | times as much | private MiB | times as much |")
    print("|---|---|---|---|---|---|---|---|")
    rows = []
    with tempfile.TemporaryDirectory() as name:
        warm = Path(name)
        tiny = UNet(features=(2,)).save_pretrained(warm / "tiny")
        (warm / "prepared").mkdir()
        prepare(str(tiny), warm / "prepared")
        for model in args.models:
            rows.append(measure(model, args.rounds, warm / "prepared"))
            print(table(rows[-1]), flush=True)
    write_json(args.json, {"command": command(arguments), "machine": about, "rows": rows})


if __name__ == "__main__":
    main()
