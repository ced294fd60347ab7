"""Files that appear whole or not at all, and folders with one writer."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import takewhile
from pathlib import Path
from uuid import uuid4


@contextmanager
def whole_file(path: Path, *, flush: bool = True) -> Iterator[Path]:
    """A hidden file to write beside `path`, which takes that name when all of it is on the disk, and goes on an error.

    Its name is no other's, on any machine that shares the folder, and keeps the suffix, which Pillow goes by. Others may read
    it, unlike what tempfile makes. Where `path` is a link, what it leads to is replaced. Without `flush` the disk may have the
    name before the bytes, for what can be made again.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with whole_file(Path(folder) / "a.txt") as partial:
        ...         _ = partial.write_text("all of it")
        ...     [path.name for path in Path(folder).iterdir()]
        ['a.txt']
    """
    target = Path(os.path.realpath(path))
    partial = target.with_name(f".{uuid4().hex}{path.suffix}")
    try:
        yield partial
        if flush:
            with open(partial, "rb+") as file:
                os.fsync(file.fileno())
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Keep other runs from writing to `folder`; where there are no locks, as on Windows, nothing.

    The folder is made where it is missing, with those above it, and then removed with them if nothing was written to it.

    The lock is the system's, on a hidden file: a killed run leaves none.

    Raises:
        BlockingIOError: another run is writing there.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with only_writer(Path(folder)):
        ...         (Path(folder) / "a.txt").touch()
        ...     [path.name for path in Path(folder).iterdir()]
        ['a.txt']
    """
    made = [*takewhile(lambda path: not path.exists(), (folder, *folder.parents))]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with _locked(folder):
            yield
    finally:
        with suppress(OSError):  # something was written
            for path in made:
                path.rmdir()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    if sys.platform == "win32":
        yield
        return
    import fcntl

    path = folder / ".unetlib-lock"
    with open(path, "ab") as file:
        os.register_at_fork(after_in_child=file.close)  # a worker that outlives its killed run would keep the lock
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            alone = os.fstat(file.fileno()).st_nlink > 0  # 0: the other run, which ends just now, has removed it
        except BlockingIOError:
            alone = False
        except OSError:  # a file system without locks
            alone = True
        if not alone:
            raise BlockingIOError(f"another run is writing to {folder}; wait for it, or give another folder")
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
