"""One program on one process or many: what `torchrun` started is joined, and small values are shared."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist

Value = TypeVar("Value")


class Process(NamedTuple):
    """This process among those of a run: its number from 0, how many there are, and its device."""

    rank: int
    world_size: int
    device: torch.device


@contextmanager
def joined_processes(device: str) -> Iterator[Process]:
    """Join the processes that torchrun started, over NCCL on CUDA and gloo elsewhere; alone, there is nothing to join.

    Args:
        device: "cpu", "cuda" (each process then takes the GPU of its local rank), or a device by number.

    Yields:
        Who this process is.

    Raises:
        ValueError: for "cuda" and several processes without a local rank, or without a GPU each.

    Example:
        >>> with joined_processes("cpu") as process:
        ...     process.rank, process.world_size, shared("mine")
        (0, 1, ['mine'])
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world_size == 1:
        yield Process(0, 1, torch.device(device))
        return
    if device == "cuda" and "LOCAL_RANK" not in os.environ:
        raise ValueError("WORLD_SIZE is set, but not LOCAL_RANK, which tells the GPUs apart; start with torchrun")
    own = torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" else device)
    if own.type == "cuda":
        if (own.index or 0) >= (count := torch.cuda.device_count()):
            raise ValueError(
                f"{own} is not to be had here, where PyTorch finds {count} GPUs; start as many processes a machine"
            )
        torch.cuda.set_device(own)
    # Hours, since the others wait while the first prepares what all need, such as scenes to render, a second each.
    dist.init_process_group("nccl" if own.type == "cuda" else "gloo", timeout=timedelta(hours=2))
    try:
        yield Process(rank, world_size, own)
    except BaseException:
        if own.type != "cuda":  # NCCL would wait here for the others, who wait for this one; its end is what torchrun acts on
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def shared(value: Value, group: dist.ProcessGroup | None = None) -> list[Value]:
    """The values of all processes, in the order of their ranks, in each process.

    Args:
        value: what can be pickled; it travels between the processes of this run only.
        group: the processes that share; None: all.

    Returns:
        One value for each process: `[value]` alone.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values = [value] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group)
    return values
