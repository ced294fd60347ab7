"""How large a picture may be for the memory there is, and how a CPU's memory is used again from pass to pass."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from .config import UNetConfig

_SHARE = 2  # half of what is free: it is an estimate, and others live here too
_LIBRARY = 1.75  # what convolution libraries hold besides: measured on a CPU, 0.9 to 1.75 times the maps alone
_LOGITS = 8  # bytes for each class: float32, and beside it either the same in the maps' type, or probabilities
_MOST_NUMBERS = 2**31 - 1  # in one map; kernels that count in 32 bits fail or slow down beyond
_UNKNOWN = 4 * 2**30  # bytes; taken for the memory of a system that does not say
_UNLIMITED = 2**63
# Files of a control group: its limit, what it uses, and the field of memory.stat that says how much of that can be dropped.
_VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_VERSION_2 = ("memory.max", "memory.current", "inactive_file")
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # parameters of glibc's mallopt
# The thresholds as far as glibc moves them by itself, which it gives up once one is set; and its default.
_LARGEST_TRIM_THRESHOLD, _LARGEST_MMAP_THRESHOLD, _MOST_MAPPINGS = 2**26, 2**25, 2**16
_kept, _free_before = False, 0  # whether glibc keeps what is freed, and what it had free before it began to


def pixels_in_one_pass(
    config: UNetConfig,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    held: int = 0,
    kept: int = 0,
) -> int:
    """Pixels, of one picture or of several, that go through the network in half of the memory that is free.

    Args:
        config: the network's.
        dtype: of its weights.
        device: where it is.
        held: bytes that it will hold whatever the picture's size.
        kept: bytes that it has kept for maps.

    Example:
        >>> pixels_in_one_pass(UNetConfig(features=(8, 16))) > 160 * 240
        True
    """
    concatenations = (sum(widths) / 4**level for level, widths in enumerate(zip(config.features, config.up_features)))
    widest = max(max(concatenations) / config.patch_size**2, config.in_channels, config.out_channels)
    room = max(0, (available_memory(device) + kept) // _SHARE - held)
    return min(room // bytes_per_pixel(config, dtype), int(_MOST_NUMBERS / widest))


def bytes_per_pixel(config: UNetConfig, dtype: torch.dtype = torch.float32) -> int:
    """Memory of a forward pass and of what follows from it, for each pixel of the picture, an estimate on the high side.

    The most is held at a level of the decoder, mostly the last: all skips, the map below, the concatenation, and either the
    doubled map or the outputs of a convolution and its norm. In networks that are wide at depth it is held at the bottleneck.
    Logits and probabilities come on top, as a fast copy keeps the memory of its maps.

    Args:
        config: the network's.
        dtype: of its maps.

    Example:
        >>> bytes_per_pixel(UNetConfig()), bytes_per_pixel(UNetConfig(), torch.bfloat16)
        (2864, 1436)
    """
    skips = sum(width / 4**level for level, width in enumerate(config.features))
    deeper = (*config.decoder_features[1:], config.bottleneck)
    most = (config.features[-1] + 2 * config.bottleneck) / 4**config.depth
    for level, (skip, doubled, middle, out, below) in enumerate(
        zip(config.features, config.up_features, config.mid_features, config.decoder_features, deeper)
    ):
        most = max(most, (below / 4 + skip + doubled + max(doubled, 2 * middle, 2 * out)) / 4**level)
    maps = (skips + most) / config.patch_size**2
    patches = config.in_channels + config.out_channels if config.patch_size > 1 else 0  # copies in another order
    return int(_LIBRARY * (maps + patches) * dtype.itemsize) + _LOGITS * config.out_channels


def available_memory(device: str | torch.device = "cpu") -> int:
    """Bytes that can be asked for now.

    On CUDA what the driver has free and PyTorch keeps unused. On the CPU what the system calls available, or less, where the
    limit of a container or of the process (`ulimit -v`) is nearer, and what `keep_freed` has had kept.

    Args:
        device: whose memory: a GPU on CUDA; for all others it is the system's.

    Example:
        >>> available_memory() > 0
        True
    """
    device = torch.device(device)
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    room = min(_system_memory(Path("/proc/meminfo")), *_container_room(Path("/")), _address_room(Path("/proc/self/statm")))
    return room + (max(0, _free_in_glibc() - _free_before) if _kept else 0)


def keep_freed() -> bool:
    """Have glibc keep what this process frees, large blocks too, and hand it out again, until `release_freed`.

    Without it a large map goes back to the system, and the next one comes anew, page by page as it is first written to, which
    for large pictures takes longer than many an operation on them. For loops on a CPU that make maps of the same sizes again
    and again, such as training. It holds for the whole process; elsewhere than on Linux with glibc it does nothing.

    Returns:
        Whether this call began it: who finds it kept already should leave `release_freed` to whoever began.

    Example:
        >>> began = keep_freed()
        >>> keep_freed()
        False
        >>> if began:
        ...     release_freed()
    """
    global _kept, _free_before
    if _kept or (libc := _glibc()) is None:
        return False
    _free_before = _free_in_glibc()
    libc.mallopt(_MMAP_MAX, 0)
    libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    _kept = True
    return True


def release_freed() -> None:
    """Give what `keep_freed` has kept back to the system, and go on as before it."""
    global _kept
    _kept = False
    if (libc := _glibc()) is not None:
        libc.mallopt(_MMAP_MAX, _MOST_MAPPINGS)
        libc.mallopt(_TRIM_THRESHOLD, _LARGEST_TRIM_THRESHOLD)
        libc.mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
        libc.malloc_trim(0)


@functools.cache
def _glibc() -> ctypes.CDLL | None:
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "gnu_get_libc_version") else None


class _Mallinfo(ctypes.Structure):
    _fields_ = (("numbers", ctypes.c_size_t * 10),)


def _free_in_glibc() -> int:
    """What is free of the addresses that glibc has taken, whether it lies in memory or was given back."""
    libc = _glibc()
    if libc is None or not hasattr(libc, "mallinfo2"):  # before glibc 2.33
        return 0
    libc.mallinfo2.restype = _Mallinfo
    return int(libc.mallinfo2().numbers[8])


def _system_memory(meminfo: Path) -> int:
    if meminfo.is_file():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        if "MemAvailable" in fields:
            return 1024 * int(fields["MemAvailable"].split()[0])
    if sys.platform == "win32":
        status = (ctypes.c_uint64 * 8)(64)  # a MEMORYSTATUSEX: its length in bytes, all memory, what is free, ...
        if ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):
            return status[2]
    try:  # macOS: all there is, since it does not say what is free
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return _UNKNOWN


def _address_room(statm: Path) -> int:
    """What the limit on this process's addresses leaves, which some batch systems set."""
    if sys.platform == "win32" or not statm.is_file():
        return _UNLIMITED
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(statm.read_text().split()[0]) * resource.getpagesize()
    return _UNLIMITED if limit == resource.RLIM_INFINITY else max(0, limit - taken)


def _container_room(root: Path) -> Iterator[int]:
    """What the limit of each control group around this process leaves; file pages that can be dropped do not count as used."""
    yield _UNLIMITED
    groups = root / "proc/self/cgroup"
    for line in groups.read_text().splitlines() if groups.is_file() else ():
        _, controllers, path = line.split(":", 2)  # version 2 names no controllers
        if controllers and "memory" not in controllers.split(","):
            continue
        limit, usage, droppable = _VERSION_1 if controllers else _VERSION_2
        top = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        group = top / path.lstrip("/")
        # In a container the path may be one that only the machine outside has; the top is then the container's own group.
        for folder in {top, group, *(parent for parent in group.parents if parent.is_relative_to(top))}:
            try:
                stat = dict(entry.split() for entry in (folder / "memory.stat").read_text().splitlines())
                used = int((folder / usage).read_text()) - int(stat.get(droppable, 0))
                yield max(0, int((folder / limit).read_text()) - used)
            except (OSError, ValueError):  # no such group, or its limit is "max"
                continue
