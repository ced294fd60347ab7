"""What scripts read from a command line, and print for people."""

from __future__ import annotations

import argparse
import io
import json
import math
import sys
from typing import Any


def add_tta(parser: argparse.ArgumentParser) -> None:
    """The option `--tta`, in the form that `predict` takes: False, "mirror" or True.

    Example:
        >>> parser = argparse.ArgumentParser()
        >>> add_tta(parser)
        >>> [parser.parse_args(words).tta for words in ([], ["--tta", "mirror"], ["--tta", "all"], ["--tta"])]
        [False, 'mirror', True, True]
    """

    class AsPredictTakesIt(argparse.Action):
        def __call__(self, _parser: Any, namespace: argparse.Namespace, given: Any, _option: str | None = None) -> None:
            namespace.tta = given == "all" or given

    parser.add_argument(
        "--tta",
        action=AsPredictTakesIt,
        nargs="?",
        const="all",
        default=False,
        choices=("mirror", "all"),
        help="average over the mirrored picture, or turned ones too; all where neither is named",
    )


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


def as_json(value: Any, indent: int, digits: int | None = None) -> str:
    """JSON of scores, rounded to so many `digits` after the point; it has no NaN, for which null stands.

    Example:
        >>> as_json([0.5, math.nan], indent=0).split()
        ['[', '0.5,', 'null', ']']
        >>> as_json({"dice": 2 / 3}, indent=0, digits=5).split()
        ['{', '"dice":', '0.66667', '}']
    """

    def readable(part: Any) -> Any:
        if isinstance(part, dict):
            return {key: readable(inner) for key, inner in part.items()}
        if isinstance(part, list):
            return [readable(inner) for inner in part]
        if not isinstance(part, float):
            return part
        return None if math.isnan(part) else part if digits is None else round(part, digits)

    return json.dumps(readable(value), indent=indent, allow_nan=False)
