"""A training run in its folder: the only one there, started anew or gone on with, and ended in words for people."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import os
import re
import shlex
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from training_options import typed

from unetlib import UNet
from unetlib.checkpoints import check_space, load_checkpoint
from unetlib.distributed import Process, shared
from unetlib.files import only_writer
from unetlib.loading import Draw

CHECKPOINT = "checkpoint.pt"  # in `--out`

ANEW = "give another --out without --resume"  # where a run cannot go on

# What may differ between the parts of a resumed run; everything else decides where it ends.
FREE = {"out", "resume", "data", "preset", "cache_gib", "workers", "checkpoint_every", "log_every", "device", "tensorboard"}
FREE |= {"checkpoint_gradients"}


@contextlib.contextmanager
def only_run(args: argparse.Namespace, process: Process) -> Iterator[None]:
    """Keep other runs out of `--out`, see that this one may start there, and explain an end by Ctrl-C or for want of memory."""
    with contextlib.ExitStack() as stack:
        problem = None
        if process.rank == 0:  # which alone writes
            try:
                stack.enter_context(only_writer(args.out))
            except BlockingIOError as error:
                problem = str(error)
            except OSError as error:
                problem = f"{args.out} cannot be written to ({error}); give another folder"
        end_all(problem)
        check_start(args)
        try:
            yield
        except KeyboardInterrupt:
            if os.environ.get("LOCAL_RANK", "0") == "0":  # Ctrl-C reaches all processes of one machine
                print(f"interrupted; the same command {again(args.out)}", file=sys.stderr)
            raise SystemExit(130) from None  # as the shell has it
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
                raise
            raise SystemExit(
                f"the device has not enough memory for a step ({str(error).splitlines()[0]}); try --checkpoint-gradients, "
                "--accumulate 2 or more, or a smaller --batch-size, --size or --features"
            ) from error


def end_all(problem: str | None) -> None:
    """End all processes where the first one has a problem."""
    if found := shared(problem)[0]:
        raise SystemExit(found)


def check_start(args: argparse.Namespace) -> None:
    """End where a run would start over in the place of an earlier one, or write over its weights, or has none to go on with."""
    seen = shared(earlier_run(args.out))
    if len({*seen}) > 1:
        raise SystemExit(f"{args.out} has an earlier run for some processes and none for others; give a folder that all share")
    if seen[0] and not args.resume:
        raise SystemExit(f"{args.out / CHECKPOINT} is of an earlier run; add --resume to go on with it, or give another --out")
    if args.resume and not seen[0]:
        raise SystemExit(f"there is no {args.out / CHECKPOINT}; leave out --resume, or give --out of an earlier run")
    if not args.resume and shared(has_weights(args.out))[0]:
        raise SystemExit(f"{args.out / 'model'} has the weights of an earlier run; give another --out, or move them elsewhere")


def earlier_run(out: Path) -> bool:
    return any((out / name).is_file() for name in (CHECKPOINT, f"{CHECKPOINT}.previous"))


def has_weights(out: Path) -> bool:
    return (out / "model" / "model.safetensors").is_file()


def again(out: Path) -> str:
    """What the command of a run that ends now will do."""
    return "with --resume goes on" if earlier_run(out) else "starts anew"


def check_room(args: argparse.Namespace, process: Process, model: UNet) -> None:
    """End where `--out` has no room for what the run writes."""
    problem = None
    if process.rank == 0:
        # Three checkpoints of weights, average and moments, two of which a resumed run has; weights in half precision.
        there = sum(path.stat().st_size for path in args.out.glob(f"{CHECKPOINT}*"))
        try:
            check_space(args.out, needed=55 * sum(tensor.numel() for tensor in model.parameters()) - there)
        except OSError as error:
            problem = str(error)
    end_all(problem)


@contextlib.contextmanager
def without_traceback(about: str = "") -> Iterator[None]:
    """End with what the library says is wrong with a file or an option, after what it is `about`."""
    try:
        yield
    except (ValueError, OSError) as error:
        said = re.split(r"\n[\w.]+Error: ", str(error))[-1].strip()  # in a worker of a loader, at the end of its traceback
        raise SystemExit(f"{about}{said}") from error


def readable(batches: Iterable[Any]) -> Iterator[Any]:
    """The batches, whose files are read on the way; the errors of what is done with them stay as they are."""
    with without_traceback():
        yield from batches


def settings_of(args: argparse.Namespace, model: UNet, train: Sequence[str], val: Sequence[str]) -> dict[str, Any]:
    """All that decides where a run ends, in plain values for its checkpoint, with the names of the pictures on each side.

    `network` is what `--init` gave.
    """
    statistics = {name: getattr(model.preprocessing, name) for name in ("mean", "std")}
    settings = {name: value for name, value in vars(args).items() if name not in FREE}
    pictures = hashlib.sha256(json.dumps([train, val]).encode()).hexdigest()[:16]
    found = {"pictures": pictures, "classes": list(model.preprocessing.class_names or ())}
    return settings | found | {"network": model.config.to_dict() | statistics}


def load_run(checkpoint: Path, now: Mapping[str, Any]) -> dict[str, Any]:
    """The state of the run to go on with, where its settings are still these."""
    try:
        state = load_checkpoint(checkpoint)
    except ValueError as error:
        raise SystemExit(f"{error}; {ANEW}") from error
    check_same(checkpoint, state, now)
    if "epoch" in state["best"] and not (weights := checkpoint.with_name("model")).is_dir():
        raise SystemExit(
            f"{weights} is missing, with the weights of epoch {state['best']['epoch']}, the best so far; bring back model/ "
            f"beside {checkpoint.name}, or {ANEW}"
        )
    return state


def check_same(checkpoint: Path, state: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """End where a run would go on with other settings; weights to start from may have moved, and count by what they gave."""
    if "settings" not in state:
        raise SystemExit(f"{checkpoint} is not from this script; {ANEW}")
    was = state["settings"]
    data = ("pictures", "classes")
    # An option that is off has no part in it: the script of the run may have been an older one, without it.
    changed = [name for name in now if now[name] != was.get(name) and (now[name] or name in was) and name not in data]
    moved = changed == ["init"] and None not in (now["init"], was.get("init"))
    if changed and not moved:
        words = [typed(name, was.get(name)) for name in changed if name != "network"] or [typed("init", was.get("init"))]
        raise SystemExit(f"{checkpoint} is from a run with other options: {', '.join(words)}; resume with those, or {ANEW}")
    for name in data:
        if was.get(name, now[name]) != now[name]:
            raise SystemExit(f"{checkpoint}: the {name} of --data are no longer those of the run; bring those back, or {ANEW}")


@contextlib.contextmanager
def room_asked_for(out: Path) -> Iterator[None]:
    """End with what to do where something could not be written, mostly for want of space."""
    try:
        yield
    except OSError as error:
        raise SystemExit(f"{error}; make room in {out}, then the same command {again(out)}") from error


class Losses:
    """The losses of a run's steps, each of which is read a step later, since reading waits for the device.

    Args:
        read: those of the steps before, to which the others are added.
        names: the pictures to train on.
        out: the run's folder.
    """

    def __init__(self, read: list[float], names: Sequence[str], out: Path) -> None:
        self.read, self.names, self.out = read, names, out
        self.unread: deque[tuple[Tensor, list[Draw]]] = deque()

    def __len__(self) -> int:
        return len(self.read) + len(self.unread)

    def add(self, loss: Tensor, draws: list[Draw]) -> None:
        """Take the loss of a batch of these pictures, and read the one before it."""
        self.unread.append((loss, draws))
        self.settle(leave=1)

    def settle(self, leave: int = 0) -> None:
        """Read all but the last `leave`; end where one is not finite."""
        while len(self.unread) > leave:
            loss, draws = self.unread.popleft()
            self.read.append(loss.item())
            if not math.isfinite(self.read[-1]):
                raise SystemExit(
                    f"the loss is {self.read[-1]} in step {len(self.read)}, pictures "
                    f"{', '.join(self.names[draw.item] for draw in draws)}; look at these, or {calmer(self.out)}"
                )

    def share(self, last: int) -> None:
        """Make the `last` ones, each of this process's share of a batch, those of the whole batches."""
        self.settle()
        self.read[-last:] = [sum(losses) / len(losses) for losses in zip(*shared(self.read[-last:]))]


def check_weights(model: UNet, steps: int, out: Path) -> None:
    """End where weights are not finite in half precision, in which model/ holds them."""
    stored = (tensor.half() if tensor.dim() > 1 else tensor for tensor in model.state_dict().values())
    if not all(tensor.isfinite().all() for tensor in stored):
        raise SystemExit(f"after step {steps} the weights are not finite in half precision; {calmer(out)}")


def calmer(out: Path) -> str:
    """What to try where numbers are no longer finite."""
    found = "; --init takes this run's best model/" if (out / "model").is_dir() else ""
    return f"start anew with another --out and a smaller --lr, a --clip such as 1, or --precision fp32{found}"


def command_typed(world_size: int) -> str:
    """The command that started this run, for a new one."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))  # processes on this machine, by torchrun
    machines = f" --nnodes {world_size // here}" if here < world_size else ""
    launcher = "python" if world_size == 1 else f"torchrun{machines} --nproc-per-node {here}"
    return f"{launcher} {shlex.join(word for word in sys.argv if word != '--resume')}"
