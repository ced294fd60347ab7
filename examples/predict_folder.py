"""Segment a whole folder of pictures: a mask for each, at the same place in another folder.

    python examples/predict_folder.py pictures/ masks/ --model carvana           # pictures/a/b.jpg -> masks/a/b.png
    python examples/predict_folder.py pictures/ masks/ --model carvana           # stopped half-way? Again: it goes on
    python examples/predict_folder.py pictures/ masks/ --precision int8          # the fastest on a CPU (unetlib[int8])
    python examples/predict_folder.py pictures/ masks/ --model carvana --ray     # on all machines of a Ray cluster

A mask holds 0 and 255 for a model of one output channel, and the index of the class for one of several (in 16 bits beyond 256).
Pictures that cannot be read do not stop the run: `masks/failed.json` has the reason for each, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import platform
import stat
import sys
import uuid
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from unetlib import UNet, list_pretrained
from unetlib.arguments import check_device
from unetlib.console import add_tta, print_any_letter, printable
from unetlib.datasets import IMAGE_SUFFIXES
from unetlib.files import only_writer
from unetlib.imaging import read_image
from unetlib.inference import Network, network_inputs, optimize_for_inference, predict
from unetlib.rasters import Raster, is_huge_tiff, open_raster
from unetlib.tiling import plan_tiles
from unetlib.visualize import mask_to_image

Item = TypeVar("Item")
Result = TypeVar("Result")

PARTIAL = ".unetlib-partial-"  # how the names of files begin that are being written; no suffix, as glob takes hidden files too
FAILED = "failed.json"
CALIBRATION = 32  # pictures that int8 takes its ranges from
BATCHES = 16  # in a block, the piece of work for a Ray actor: many hide its overhead, few are lost with an actor


def main(argv: list[str] | None = None) -> int:
    """Write the masks that are missing; 0 where every picture has one now, 1 where some failed, 130 after Ctrl-C."""
    print_any_letter()
    args = parse_args(argv)
    model = checked_model(args)
    written = 0
    try:
        with only_writer(args.masks):  # another run would take what this one is writing for what was left of a killed one
            names, present, failed = find_pictures(args.pictures, args.masks, args.overwrite)
            if not (names or present or failed):
                sys.exit(f"there are no pictures ({', '.join(IMAGE_SUFFIXES)}) in {args.pictures}")
            write_failed(args.masks, failed)  # finds out at once whether the folder can be written to
            if args.ray:  # whose actors prepare the model themselves
                outcomes = predict_with_ray(model, names, args)
            else:
                outcomes = predict_files(prepared(model, names, args) if names else model, names, args)
            try:
                for name, reason in tqdm(outcomes, total=len(names), unit=" pictures"):
                    if reason:
                        failed[name] = reason
                    else:
                        written += 1
            finally:
                write_failed(args.masks, failed)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130
    except (BlockingIOError, Unprepared) as error:
        sys.exit(str(error))
    except OSError as error:
        sys.exit(f"cannot write to {args.masks}: {error}. Make room, or name another folder; the same command then goes on.")

    print(f"{written} masks written to {args.masks}, {present} were there, {len(failed)} pictures failed")
    for name, reason in islice(failed.items(), 10):
        print(printable(f"  {name}: {reason}"), file=sys.stderr)
    if not failed:
        (args.masks / FAILED).unlink()
        return 0
    print(f"the reasons are in {args.masks / FAILED}", file=sys.stderr)
    return 1


def checked_model(args: argparse.Namespace) -> UNet:
    """The model; the run ends where it cannot segment pictures into files, or not with these options."""
    try:
        model = UNet.from_pretrained(args.model)
    except (ValueError, OSError) as error:
        sys.exit(str(error))
    if model.config.in_channels not in (1, 3):
        sys.exit(f"{args.model} takes {model.config.in_channels} channels, but a picture has 1 (grey) or 3 (colour)")
    if model.preprocessing.multilabel:
        sys.exit(f"{args.model} is multilabel, and one file cannot hold masks that overlap; use model.predict(picture)")
    if args.threshold is not None and model.config.out_channels > 1:
        sys.exit("--threshold is for one output channel; several are decided by the largest logit, so leave it out")
    size = model.preprocessing.size
    if args.tile and size and max(size) > args.tile:  # all pictures are brought to this size, which takes tiles
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # they come again with the pictures
                plan_tiles(model.config, size, (args.tile, args.tile), args.overlap, mirrored=bool(args.tta))
        except ValueError as error:
            reason = str(error).partition(";")[0]
            sys.exit(f"--tile {args.tile}: {reason}; give a larger --tile, or a smaller --overlap for an approximate result")
    return model


def find_pictures(pictures: Path, masks: Path, overwrite: bool) -> tuple[list[str], int, dict[str, str]]:
    """Names below `pictures` that need a mask, the number of those that have one, and what fails before it is read.

    Links to folders elsewhere are followed; what they lead to is listed once, as all below `pictures` is, by its own name. The
    masks' folder of each is listed once, and what a killed run was just writing is removed there.
    """
    names: list[str] = []
    present = 0
    failed: dict[str, str] = {}

    def unreadable(error: OSError) -> None:
        failed[os.path.relpath(error.filename, pictures)] = f"the folder cannot be read: {error.strerror}"

    same = str.casefold if sys.platform in ("darwin", "win32") else str  # there X.png is x.png
    roots = (pictures.resolve(), masks.resolve())
    elsewhere: set[Path] = set()
    for folder, subfolders, files in os.walk(pictures, onerror=unreadable, followlinks=True):
        below, real = os.path.relpath(folder, pictures), Path(folder).resolve()
        if real != roots[0] / below:  # reached by a link
            if real in elsewhere or any(real.is_relative_to(root) for root in roots):
                subfolders.clear()
                continue
            elsewhere.add(real)
        subfolders[:] = sorted(subfolder for subfolder in subfolders if not subfolder.startswith("."))
        of_mask: dict[str, list[str]] = {}
        for file in sorted(files):
            stem, suffix = os.path.splitext(file)
            if suffix.lower() in IMAGE_SUFFIXES and not file.startswith("."):
                of_mask.setdefault(same(f"{stem}.png"), []).append(os.path.normpath(os.path.join(below, file)))
        whole = {same(name) for name in finished(masks / below)}
        for mask, sharing in of_mask.items():
            if len(sharing) > 1:
                failed |= dict.fromkeys(sharing, f"{' and '.join(sharing)} would share the mask {mask}; rename all but one")
            elif mask in whole and not overwrite:
                present += 1
            else:
                names += sharing
    return names, present, failed


def finished(folder: Path) -> set[str]:
    """Names of the files in a folder of masks, cleared of what a killed run left."""
    if not folder.is_dir():
        return set()
    with os.scandir(folder) as entries:
        files = {entry.name for entry in entries if entry.is_file()}
    for name in files:
        if name.startswith(PARTIAL):
            (folder / name).unlink(missing_ok=True)
    return files


def mask_path(masks: Path, name: str) -> Path:
    return masks / f"{os.path.splitext(name)[0]}.png"


class Unprepared(Exception):
    """The model cannot compute in the precision, or on the device, that was asked for."""


# What ends the whole run, by the name that a Ray actor gives it; no picture has one that begins with a slash.
ENDS = {"/Unprepared": Unprepared, "/OSError": OSError}


def prepared(model: UNet, names: Sequence[str], args: argparse.Namespace) -> Network:
    """The model on its device, or a fast copy; int8 takes its ranges from the first pictures to be read."""
    try:
        model.to(args.device)
    except (RuntimeError, AssertionError) as error:  # the second where PyTorch is one for CPUs
        raise Unprepared(f"--device {args.device}: {error}") from error
    if args.precision == "float32" and torch.device(args.device).type != "cpu":
        return model
    dtype = getattr(torch, args.precision)
    options: dict[str, Any] = {}
    if dtype == torch.int8:
        pictures = (read(args.pictures, mode_of(model), name)[1] for name in names)
        first = list(islice((picture for picture in pictures if isinstance(picture, np.ndarray)), CALIBRATION))
        if not first and any(is_huge_tiff(args.pictures / name) for name in names):
            raise Unprepared(
                "--precision int8: it takes its ranges from pictures that are read whole, and all are huge TIFFs; give another"
            )
        if not first:  # nothing to segment
            return model
        options = {"backend": "openvino", "calibration": network_inputs(model, first)}
    try:
        return optimize_for_inference(model, dtype=dtype, **options)
    except (ImportError, ValueError) as error:
        raise Unprepared(f"--precision {args.precision}: {error}") from error


def predict_files(model: Network, names: Iterable[str], args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Write the masks of pictures; yields each name with the reason why it has none, or "".

    Threads read pictures ahead of the model and write masks behind it. Only `ahead` of each are under way, so that memory
    does not grow with the number of pictures.
    """
    ahead = args.threads + args.batch_size
    classes = model.config.out_channels
    with ThreadPoolExecutor(args.threads) as pool:
        pictures = in_turn(pool, partial(read, args.pictures, mode_of(model)), names, ahead)
        options = {name: getattr(args, name) for name in ("threshold", "tile", "overlap", "tta")}
        masks = segment(model, pictures, args.batch_size, options)
        yield from in_turn(pool, partial(write, args.masks, classes), masks, ahead)


def in_turn(pool: ThreadPoolExecutor, work: Callable[[Item], Result], items: Iterable[Item], ahead: int) -> Iterator[Result]:
    """`map(work, items)`, of which the pool does the next `ahead` while the caller is busy."""
    waiting: deque[Future[Result]] = deque()
    for item in items:
        waiting.append(pool.submit(work, item))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def mode_of(model: Network) -> Literal["RGB", "L"]:
    return "L" if model.config.in_channels == 1 else "RGB"


def read(pictures: Path, mode: Literal["RGB", "L"], name: str) -> tuple[str, np.ndarray | Raster | str]:
    """A picture, to be read by region if it is huge, or the reason why there is none."""
    path = pictures / name
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ValueError(f"{path} is no file but a pipe or a device, which could keep the run waiting for ever")
        return name, open_raster(path) if is_huge_tiff(path) else read_image(path, mode)
    except (ValueError, OSError, MemoryError, ImportError) as error:
        return name, str(error) or type(error).__name__


def segment(
    model: Network, pictures: Iterator[tuple[str, np.ndarray | Raster | str]], batch_size: int, options: dict[str, Any]
) -> Iterator[tuple[str, np.ndarray | str]]:
    """The masks of pictures, in batches; reasons pass through."""
    while batch := list(islice(pictures, batch_size)):
        whole = [picture for _, picture in batch if not isinstance(picture, str)]
        masks = iter(predict_each(model, whole, options))
        for name, picture in batch:
            yield name, picture if isinstance(picture, str) else next(masks)


def predict_each(model: Network, pictures: list[np.ndarray | Raster], options: dict[str, Any]) -> list[np.ndarray | str]:
    """Masks of one batch, of its pictures apart if that fails, and a reason for one that alone does.

    A batch may be too much for the memory; a huge picture may be broken where it is read only now, or need tiles that the
    model cannot do.
    """
    reason, memory = "", "of the GPU; use --device cpu for it"
    try:
        masks: list[np.ndarray | str] = predict(model, pictures, batch_size=max(1, len(pictures)), **options)
        return masks
    except ValueError as error:
        reason = str(error)
    except torch.OutOfMemoryError:
        pass
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "DefaultCPUAllocator" not in str(error):
            raise
        memory = "that is free; give --tile 512 --overlap 64 for an approximate mask"
    # Only out here, without the error and its stack, is the memory of the attempt free.
    if len(pictures) == 1:
        height, width = pictures[0].shape[:2]
        return [reason or f"{width}x{height} pixels are too many for the memory {memory}"]
    return [predict_each(model, [picture], options)[0] for picture in pictures]


def write(masks: Path, classes: int, item: tuple[str, np.ndarray | str]) -> tuple[str, str]:
    """Write a mask; the outcome."""
    name, mask = item
    if isinstance(mask, str):
        return name, mask
    if classes > 256:
        mask = mask.astype(np.uint16)  # PNG has no wider integers
    image = Image.fromarray(mask_to_image(mask) if classes == 1 else mask)
    encoded = io.BytesIO()
    image.save(encoded, "PNG")
    try:
        write_whole(mask_path(masks, name), encoded.getvalue())
    except (FileExistsError, IsADirectoryError, NotADirectoryError) as error:  # a/b.jpg beside a folder a/b.png/
        return name, f"its mask cannot be written: {error}"
    return name, ""


def write_whole(path: Path, data: bytes) -> None:
    """Write a file under another name and then rename it, so that it is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{PARTIAL}{uuid.uuid4().hex}")
    try:
        with open(beside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # a rename may reach the disk before the bytes do
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_failed(masks: Path, failed: dict[str, str]) -> None:
    write_whole(masks / FAILED, json.dumps(failed, indent=2).encode())


def predict_with_ray(model: UNet, names: list[str], args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """As `predict_files`, on the machines of a Ray cluster, to which the model travels."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anybody
    try:
        import ray.data
    except ImportError:
        sys.exit('--ray needs Ray: pip install "unetlib[ray]"')
    if not names:
        return
    if not ray.is_initialized():
        try:
            ray.init(args.ray_address)
        except ConnectionError as error:
            sys.exit(f"no Ray cluster answers: {error}. `ray start --head` starts one")
    needed = {"CPU": args.threads, "GPU": int(torch.device(args.device).type == "cuda")}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    room = sum(min(int(node.get(kind, 0) // count) for kind, count in needed.items() if count) for node in nodes)
    if not room:
        sys.exit(f"no machine of the cluster has what an actor needs: {needed} (--threads, --device)")
    ray.data.DataContext.get_current().enable_progress_bars = False
    # Every block is one task of an actor. Ray starts an actor that dies again, on another machine if need be, and its task too.
    size = BATCHES * args.batch_size
    blocks = [b"\0".join(map(os.fsencode, names[start : start + size])) for start in range(0, len(names), size)]
    rows = ray.data.from_items([{"names": block} for block in blocks], override_num_blocks=len(blocks))
    outcomes = rows.flat_map(
        RayActor,
        fn_constructor_args=(model, names[: 2 * CALIBRATION], args),
        # One block at a time for each, so that none queues at one actor while another has nothing to do.
        compute=ray.data.ActorPoolStrategy(size=min(room, len(blocks), args.actors or room), max_tasks_in_flight_per_actor=1),
        num_cpus=needed["CPU"],
        num_gpus=needed["GPU"],
    )
    for row in outcomes.iter_rows():
        name = os.fsdecode(row["name"])
        if name in ENDS:
            raise ENDS[name](row["reason"])
        yield name, row["reason"]


class RayActor:
    """The model in a process of its own, on any machine that sees the folders."""

    def __init__(self, model: UNet, first: list[str], args: argparse.Namespace) -> None:
        self.args, self.unprepared = args, ""
        try:
            self.model = prepared(model, first, args)
        except Unprepared as error:
            self.unprepared = str(error)

    def __call__(self, block: dict[str, bytes]) -> list[dict[str, Any]]:
        try:
            if not (self.args.pictures.is_dir() and (self.args.masks / FAILED).is_file()):
                raise FileNotFoundError(f"{platform.node()} does not see both folders; share them, at one path on each machine")
            if self.unprepared:
                raise Unprepared(self.unprepared)
            outcomes = self.predict([os.fsdecode(name) for name in block["names"].split(b"\0")])
        except tuple(ENDS.values()) as error:
            outcomes = [(next(name for name, end in ENDS.items() if isinstance(error, end)), str(error))]
        return [{"name": os.fsencode(name), "reason": printable(reason)} for name, reason in outcomes]

    def predict(self, names: list[str]) -> list[tuple[str, str]]:
        """The outcomes of one block.

        Ray starts a block again whenever its actor dies. From the second time on the pictures go one by one, and a file
        beside the masks says which was the last: one that kills its actor twice fails, and the others still get their masks.
        """
        journal = self.args.masks / f"{PARTIAL}{hashlib.sha256(repr(names).encode()).hexdigest()}"
        if not journal.is_file():
            write_whole(journal, b"")
            outcomes = list(predict_files(self.model, names, self.args))
        else:
            deadly = set(journal.read_bytes().split(b"\0"))
            outcomes = []
            for name in names:
                if not self.args.overwrite and mask_path(self.args.masks, name).is_file():
                    outcomes.append((name, ""))
                elif os.fsencode(name) in deadly:
                    outcomes.append((name, "the worker that had it died, twice"))
                else:
                    write_whole(journal, b"\0".join([*deadly, os.fsencode(name)]))
                    outcomes += predict_files(self.model, [name], self.args)
        journal.unlink()
        return outcomes


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, cuda = parser.add_argument, torch.cuda.is_available()
    add("pictures", type=Path, help="folder of pictures, with folders in it if you like, linked ones too")
    add("masks", type=Path, help="folder for the masks; made where there is none")
    add("--model", default="carvana", help=f"{', '.join(list_pretrained())}, a folder, a file or a Hub repository (carvana)")
    add("--overwrite", action="store_true", help="segment again what has a mask")
    add("--device", default="cuda" if cuda else "cpu", help="as PyTorch names it (cuda where there is one)")
    precisions = ("float32", "bfloat16", "float16", "int8")
    add("--precision", choices=precisions, default="float32", help="float16: on GPUs; int8: on CPUs, by OpenVINO (float32)")
    add("--threshold", type=float, metavar="P", help="probability above which a pixel is foreground; else the model's own")
    add("--tile", type=int, metavar="PIXELS", help="side of what the network sees at a time; as memory allows if left out")
    add("--overlap", type=int, metavar="PIXELS", help="of tiles; as much as the whole picture's result takes if left out")
    add_tta(parser)
    add("--batch-size", type=int, default=4, help="pictures in one forward pass (4)")
    add("--threads", type=int, default=min(8, os.cpu_count() or 1), help="that read and write, cores of an actor (%(default)s)")
    add("--ray", action="store_true", help="work in the actors of a Ray cluster, or of this machine where there is none")
    add("--ray-address", metavar="HOST:PORT", help="of the cluster, where this machine is part of several")
    add("--actors", type=int, metavar="N", help="at most so many; else one for each GPU, or as many as there are cores for")
    args = parser.parse_args(argv)
    if args.threshold is not None and not 0 < args.threshold < 1:
        parser.error(f"--threshold must be a probability between 0 and 1, got {args.threshold}")
    if args.overlap is not None and args.overlap < 0:
        parser.error(f"--overlap must be 0 or more, got {args.overlap}")
    for option in ("batch_size", "threads", "actors", "tile"):
        if (value := getattr(args, option)) is not None and value < 1:
            parser.error(f"--{option.replace('_', '-')} must be at least 1, got {value}")
    try:
        check_device(args.device, here=not args.ray)  # the machines of a cluster may have one that this has not
    except ValueError as error:
        parser.error(str(error))
    if not args.pictures.is_dir():
        parser.error(f"there is no folder {str(args.pictures)!r}")
    if args.ray and torch.device(args.device).index is not None:
        parser.error(f"--ray gives each actor a GPU of its own; give --device cuda, got {args.device}")
    if not args.ray and (args.ray_address or args.actors):
        parser.error("--ray-address and --actors are for --ray; add that, or leave them out")
    if args.masks.exists() and not args.masks.is_dir():
        parser.error(f"{str(args.masks)!r} is a file; name the folder that gets the masks, which is made where missing")
    args.pictures, args.masks = args.pictures.resolve(), args.masks.resolve()  # for actors, which work elsewhere
    if args.pictures.is_relative_to(args.masks) or args.masks.is_relative_to(args.pictures):
        parser.error(f"{args.pictures} and {args.masks} lie in one another; keep masks in a folder apart")
    return args


if __name__ == "__main__":
    sys.exit(main())
