"""What is printed."""

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
