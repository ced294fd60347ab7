"""Marks of tests that need a compiler, a library or data: by what is there, and not by whether our own code works with it."""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

COMPILER = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


def _nnpack_runs() -> bool:
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        return library.nnp_initialize() == 0
    except (OSError, AttributeError):
        return False


def _can_compile() -> bool:
    capability = torch.backends.cpu.get_cpu_capability()
    return sys.platform == "linux" and capability in ("AVX2", "AVX512") and COMPILER is not None


def _multiplies_halves() -> bool:
    """Whether the CPU does, as PyTorch is told to see it, and the compiler knows how."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.cpu._is_avx512_bf16_supported():
        return False
    return _can_compile() and _compiles("-mavx512bf16")


def _compiles(flag: str) -> bool:
    command = [*shlex.split(COMPILER or ""), flag, "-x", "c++", "-fsyntax-only", "/dev/null"]
    return subprocess.run(command, capture_output=True).returncode == 0


needs_native = pytest.mark.skipif(not _can_compile(), reason="no C++ compiler, or not Linux on a CPU with AVX2")
needs_halves = pytest.mark.skipif(
    not _multiplies_halves(),
    reason="no C++ compiler that knows AVX-512 BF16, or not Linux on a CPU with it",
)
needs_nnpack = pytest.mark.skipif(not _nnpack_runs(), reason="this PyTorch or CPU has no NNPACK")
needs_data = pytest.mark.skipif("UNETLIB_DATA" not in os.environ, reason="UNETLIB_DATA names no folder with real data")
