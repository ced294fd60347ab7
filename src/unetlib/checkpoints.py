"""Training checkpoints: tensors and plain values, written whole or not at all, and read without running code."""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import random
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from .trust import code_asked_for

logger = logging.getLogger("unetlib")


def save_checkpoint(state: Mapping[str, Any], path: str | PathLike[str]) -> None:
    """Write a checkpoint beside the old one and rename it; the old one stays as `<name>.previous`.

    Killed at any moment, it leaves at least one whole checkpoint for `load_checkpoint`, if there was one before.

    Args:
        state: tensors, numbers, strings, and lists, tuples and dictionaries of them.
        path: the file.

    Raises:
        TypeError: the state holds something else, such as a number of NumPy's, which cannot be read without running code.
        OSError: the file cannot be written, for want of space or permission; what was there before stays.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_checkpoint({"step": 3, "weight": torch.ones(2)}, Path(folder) / "checkpoint.pt")
        ...     load_checkpoint(Path(folder) / "checkpoint.pt")
        {'step': 3, 'weight': tensor([1., 1.])}
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}.partial")
    try:
        with open(partial, "wb") as file, _checksums():
            torch.save(dict(state), file)
            file.flush()
            os.fsync(file.fileno())  # a rename may reach the disk before the bytes do
        if code := torch.serialization.get_unsafe_globals_in_checkpoint(partial):
            raise pickle.PicklingError(f"it needs {', '.join(code)} to be read")
        if _is_whole(path):  # a damaged one would take the place of the whole one that the run went on from
            os.replace(path, _previous(path))
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # torch hides what the system says behind a RuntimeError of its own
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        kept = "; the one before it is kept" if path.exists() or _previous(path).exists() else ""
        raise OSError(f"the checkpoint {path} could not be written: {cause}{kept}") from error
    except (pickle.PicklingError, AttributeError, TypeError) as error:  # the latter two of what pickle cannot take
        raise TypeError(
            f"the state for {path} holds more than plain values ({error}); expected tensors, numbers, strings, and lists, "
            "tuples and dictionaries of them: float(x) for a number of NumPy's, x.tolist() for an array, str(x) for a path"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def load_checkpoint(path: str | PathLike[str], *, map_location: str | torch.device = "cpu") -> dict[str, Any]:
    """Read what `save_checkpoint` wrote; the previous checkpoint where the newest is damaged or missing.

    Args:
        path: the file.
        map_location: where tensors go.

    Returns:
        The state.

    Raises:
        FileNotFoundError: there is neither the file nor a previous one.
        ValueError: neither can be read, or one holds anything but tensors and plain values.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "checkpoint.pt"
        ...     for step in (1, 2):
        ...         save_checkpoint({"step": step}, path)
        ...     newest = load_checkpoint(path)
        ...     path.unlink()
        ...     newest, load_checkpoint(path)  # the one before it
        ({'step': 2}, {'step': 1})
    """
    path = Path(path)
    problems = []
    for candidate in (path, _previous(path)):
        try:
            with candidate.open("rb") as file:
                _check(file)
                file.seek(0)
                state: dict[str, Any] = torch.load(file, map_location=map_location, weights_only=True)
        except FileNotFoundError:  # for a moment, too, while a running training renames it to the previous one
            continue
        except Exception as error:  # torch.load raises many kinds for a damaged file
            code = code_asked_for(error)
            reason = str(error).partition("\n")[0] or type(error).__name__
            problems.append(f"{candidate} " + (f"asks for the code {code}" if code else f"cannot be read: {reason}"))
            continue
        if problems:
            logger.warning("%s; going on from %s", problems[0], candidate)
        return state
    if not problems:
        raise FileNotFoundError(f"there is no checkpoint {path}; expected a file that save_checkpoint wrote")
    raise ValueError(f"no checkpoint can be read ({'; '.join(problems)}); expected a file that save_checkpoint wrote")


def _check(file: Path | BinaryIO) -> None:
    """See that a checkpoint is whole; torch does not look at the checksums that it has."""
    with zipfile.ZipFile(file) as archive:
        if spoilt := archive.testzip():
            raise zipfile.BadZipFile(f"the bytes of {spoilt} have changed")


def _is_whole(path: Path) -> bool:
    try:
        _check(path)
    except Exception:  # there is none, or zipfile raises one of many kinds
        return False
    return True


@contextlib.contextmanager
def _checksums() -> Iterator[None]:
    """Have them written, whatever the program has set."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(True)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def check_space(folder: str | PathLike[str], needed: int) -> None:
    """Make a folder and see that files can be written there and have room, before hours are spent.

    Args:
        folder: the folder; made where missing.
        needed: bytes to come.

    Raises:
        OSError: the folder cannot be made or written to, or its disk has less than `needed` bytes left.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     check_space(Path(folder) / "run", needed=1000)
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if free >= needed:
            with tempfile.NamedTemporaryFile(dir=folder, prefix=".") as probe:
                probe.write(b"probe")
    except OSError as error:
        raise OSError(f"{folder} cannot be written to ({error}); give another folder") from error
    if free < needed:
        raise OSError(
            f"{folder} has {free / 1e6:,.0f} MB left and the run writes up to {needed / 1e6:,.0f} MB; "
            "free some space or give a folder on another disk"
        )


def random_state() -> dict[str, Any]:
    """The states of the generators of torch (every device), NumPy and Python, as tensors and plain values.

    Returns:
        What `set_random_state` takes and `save_checkpoint` stores.

    Example:
        >>> state = random_state()
        >>> drawn = torch.rand(1)
        >>> set_random_state(state)
        >>> torch.rand(1) == drawn
        tensor([True])
    """
    name, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002  # the generator that other libraries draw from
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "mps": [torch.mps.get_rng_state()] if torch.backends.mps.is_available() else [],
        "numpy": [str(name), torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        "python": random.getstate(),
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Put the generators back to what `random_state` gave.

    Args:
        state: from `random_state`. States of devices that this machine lacks are passed over.
    """
    torch.set_rng_state(state["torch"].cpu())
    for device, device_state in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(device_state.cpu(), device)
    for device_state in state.get("mps", []) if torch.backends.mps.is_available() else []:  # older checkpoints have none
        torch.mps.set_rng_state(device_state.cpu())
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), *rest))  # noqa: NPY002
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))


def _previous(path: Path) -> Path:
    return path.with_name(f"{path.name}.previous")
