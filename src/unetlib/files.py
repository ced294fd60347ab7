"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A hidden file to write beside `path`, which takes that name when all of it is written, and goes on an error.

    Its name is no other's, on any machine that shares the folder, and keeps the suffix, which Pillow goes by. Others may read
    it, unlike what tempfile makes.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with whole_file(Path(folder) / "a.txt") as partial:
        ...         _ = partial.write_text("all of it")
        ...     [path.name for path in Path(folder).iterdir()]
        ['a.txt']
    """
    partial = path.with_name(f".{uuid4().hex}-{path.name}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
