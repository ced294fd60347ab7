"""The version of the library; by itself, so that asking for it loads nothing else."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def installed_version() -> str:
    """The version of unetlib that runs, "unknown" for a source tree that is not installed."""
    try:
        return version("unetlib")
    except PackageNotFoundError:
        return "unknown"
