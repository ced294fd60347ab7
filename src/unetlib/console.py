"""What is printed, and written for people."""

from __future__ import annotations

import io
import sys


def print_any_letter() -> None:
    r"""Have `print` write letters that the output's encoding lacks, in a file's name perhaps, as escapes such as `\u8f66`.

    Example:
        >>> print_any_letter()
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # a notebook's is none, and takes all letters
        sys.stdout.reconfigure(errors="backslashreplace")


def printable(text: str) -> str:
    r"""Text that any file and terminal take, though a file's name need not be text.

    Example:
        >>> printable("car\udce9.jpg")
        'car\\udce9.jpg'
    """
    return text.encode(errors="backslashreplace").decode()
