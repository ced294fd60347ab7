"""Time `model.predict` on a picture file, beside the study's way and milesial's way to get a mask of the picture's own size.

    python benchmarks/predict.py                                  # a rendered scene of 1918x1280, as a JPEG file
    UNETLIB_DATA=... python benchmarks/predict.py                 # a photograph of its folder carvana/
    python benchmarks/predict.py --picture car.jpg --rounds 20 --json predict.json

All run the same weights in float32 at the same size, and must find nearly the same mask. They take turns; a ratio above 1
says that unetlib is faster. README.md beside this file says what the stages are.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from harness import (
    add_device,
    carvana_folder,
    check,
    command,
    machine,
    print_machine,
    print_row,
    ratios,
    spread,
    time_turns,
    wait,
    without_traceback,
    write_json,
)
from peers import Network, NotHere, load_network, milesial_module
from PIL import Image, ImageFile
from torch import nn
from torchvision.transforms.functional import to_tensor

from unetlib.fast.cached import fast_copy
from unetlib.imaging import image_size
from unetlib.synthetic import render_scene

Way = Callable[[Path], np.ndarray]
STAGES = ("decode", "resize", "forward", "back")
MOST_DIFFERENT = 0.01  # share of pixels; ways to resize move the edges of a mask by a pixel


def study_way(module: nn.Module, size: tuple[int, int], device: str, path: Path) -> np.ndarray:
    """Resize, tensor, sigmoid, threshold; and the mask resized back."""
    image = Image.open(path).convert("RGB")
    x = to_tensor(image.resize(size[::-1], Image.Resampling.BILINEAR)).unsqueeze(0).to(device)
    with torch.no_grad():
        mask = (torch.sigmoid(module(x)) > 0.5)[0, 0].cpu().numpy()
    return np.asarray(Image.fromarray(mask.astype(np.uint8)).resize(image.size, Image.Resampling.NEAREST))


def milesial_way(module: nn.Module, size: tuple[int, int], device: str, path: Path) -> np.ndarray:
    """Bicubic, an array over 255; and the logits resized back before the threshold."""
    image = Image.open(path).convert("RGB")
    array = np.asarray(image.resize(size[::-1], Image.Resampling.BICUBIC)).transpose(2, 0, 1) / 255.0
    x = torch.as_tensor(array, dtype=torch.float32).unsqueeze(0).to(device)
    with torch.no_grad():
        logits = nn.functional.interpolate(module(x).cpu(), image.size[::-1], mode="bilinear")
    return (torch.sigmoid(logits) > 0.5)[0, 0].numpy().astype(np.uint8)


def ways(network: Network, size: tuple[int, int], device: str) -> dict[str, tuple[nn.Module, Way]]:
    """The contestants whose layouts hold the weights, each with the module whose passes are its forward stage."""
    study, ours = network.study.to(device), network.ours.to(device)
    found: dict[str, tuple[nn.Module, Way]] = {"study": (study, functools.partial(study_way, study, size, device))}
    with contextlib.suppress(NotHere):
        milesial = milesial_module(network).to(device)
        found["milesial"] = milesial, functools.partial(milesial_way, milesial, size, device)
    return found | {"unetlib": (fast_copy(ours) or ours, ours.predict)}  # predict runs the copy where there is one


def staged(module: nn.Module, way: Way, path: Path, device: str) -> dict[str, float]:
    """Seconds of each stage of one prediction.

    "decode" is what Pillow's decoder takes, "forward" what the module takes, "resize" all else before it (colour, resizing,
    floats, the copy to the device), "back" all after it.
    """
    marks: list[float] = []
    decoding = 0.0
    load = ImageFile.ImageFile.load

    def mark(*_: object) -> None:
        wait(device)
        marks.append(time.perf_counter())

    def timed_load(file: ImageFile.ImageFile) -> Any:
        nonlocal decoding
        began = time.perf_counter()
        try:
            return load(file)
        finally:
            decoding += time.perf_counter() - began

    hooks = module.register_forward_pre_hook(mark), module.register_forward_hook(mark)
    try:
        with mock.patch.object(ImageFile.ImageFile, "load", timed_load):
            mark()
            way(path)
            mark()
    finally:
        for hook in hooks:
            hook.remove()
    start, before, after, end = marks
    return dict(zip(STAGES, (decoding, before - start - decoding, after - before, end - after)))


def find_picture(given: Path | None, folder: Path) -> Path:
    """The picture asked for, or a photograph of `UNETLIB_DATA`, or a rendered scene."""
    if given is not None:
        return given
    carvana = carvana_folder(None)
    if carvana is not None and (photographs := sorted((carvana / "val").glob("*.jpg"))):
        return photographs[0]
    image, _ = render_scene(7, view=4)
    Image.fromarray(image).save(folder / "scene.jpg", quality=92)
    return folder / "scene.jpg"


def measure(contestants: dict[str, tuple[nn.Module, Way]], path: Path, rounds: int, device: str) -> list[dict[str, Any]]:
    """A row for each contestant, after a check that their masks are alike."""
    masks = {name: way(path) for name, (_, way) in contestants.items()}
    different = {name: float((mask != masks["study"]).mean()) for name, mask in masks.items()}
    if max(different.values()) > MOST_DIFFERENT:
        raise SystemExit(f"the masks are not those of one network, so nothing is timed; pixels unlike the study's: {different}")
    stages: dict[str, list[dict[str, float]]] = {name: [] for name in contestants}

    turns: list[str] = []

    def predict(name: str) -> None:
        if turns[-1:] == [name]:  # a short call that is made again at once: the second counts
            stages[name].pop()
        turns.append(name)
        stages[name].append(staged(*contestants[name], path, device))

    calls = [functools.partial(predict, name) for name in contestants]
    seconds = dict(zip(contestants, time_turns(calls, rounds, device, queued=False).T.tolist()))
    return [
        {
            "way": name,
            "seconds": own,
            "ratio": ratios(own, seconds["unetlib"]),
            "different": different[name],
            "stages": {stage: [one[stage] for one in stages[name][-rounds:]] for stage in STAGES},  # warm-up left out
        }
        for name, own in seconds.items()
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_device(parser)
    parser.add_argument(
        "--model", default="carvana", help="what UNet.from_pretrained takes; it must have a size of its own (carvana)"
    )
    parser.add_argument("--picture", type=Path, help="a file; by default a photograph of UNETLIB_DATA, or a rendered scene")
    parser.add_argument("--rounds", type=int, default=10, help="timed pictures of each contestant (10)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")
    args = parser.parse_args(argv)
    check(parser, args)
    with without_traceback():
        network = load_network(args.model)
    preparation = network.ours.preprocessing
    if preparation.size is None or any(preparation.mean) or any(std != 1 for std in preparation.std):
        parser.error(
            f"the study's way needs a model with a size and without mean and standard deviation, {args.model!r} is none"
        )
    about = machine(args.device, ("pillow",))
    print_machine(about)
    with tempfile.TemporaryDirectory() as temporary:
        path = find_picture(args.picture, Path(temporary))
        with without_traceback():
            height, width = image_size(path)
        print(f"{path.name}, {width}x{height}, {path.stat().st_size / 1024:.0f} KiB, seen at {preparation.size}")
        rows = measure(ways(network, preparation.size, args.device), path, args.rounds, args.device)
    print_row("", "ms", "25%", "75%", *STAGES, "ratio", "25%", "75%", "unlike")
    for row in rows:
        times = [*spread(row["seconds"]), *(spread(row["stages"][stage]).median for stage in STAGES)]
        figures = [f"{1e3 * value:.1f}" for value in times] + [f"{value:.3f}" for value in spread(row["ratio"])]
        print_row(row["way"], *figures, f"{row['different']:.2%}")
    write_json(
        args.json,
        {"command": command(argv), "machine": about, "picture": [width, height], "seen": [*preparation.size], "rows": rows},
    )


if __name__ == "__main__":
    main()
