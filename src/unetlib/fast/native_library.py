"""The code of `native_kernels.cpp`, compiled by the machine's C++ compiler in a second or two and kept in the user's cache.

And PyTorch's OpenMP, on whose threads it runs.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from ctypes import c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch

from ..files import whole_file

_SOURCE = Path(__file__).with_name("native_kernels.cpp")
_FLAGS = {  # by what PyTorch finds the CPU capable of; older compilers do not know the names of whole levels
    "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"),
    "AVX2": ("-mavx2", "-mfma"),
}
_HALVES = "-mavx512bf16"  # that still older ones do not know
_OPTIONS = ("-std=c++17", "-O3", "-shared", "-fPIC")
_CHECKSUM = hashlib.sha256().digest_size
_NO_CACHE = (OSError, RuntimeError)  # no file that is whole, no room, no right to write or to load there; or there is no home
_OPENMP = ("libgomp", "libiomp5", "libomp")
one_at_a_time = threading.RLock()  # of several threads one compiles, or makes trials, and the others wait
if sys.platform != "win32":  # a process forked meanwhile would wait for ever
    os.register_at_fork(
        before=one_at_a_time.acquire, after_in_parent=one_at_a_time.release, after_in_child=one_at_a_time.release
    )


@functools.cache
def load() -> Any:
    """The code for this CPU, once for the process, or an error that says why there is none."""
    if sys.platform != "linux":
        raise OSError(f"not tried on {sys.platform}")
    flags = _FLAGS[torch.backends.cpu.get_cpu_capability()]
    try:
        code = _loaded((*flags, _HALVES) if flags == _FLAGS["AVX512"] and torch.cpu._is_avx512_bf16_supported() else flags)
    except (OSError, subprocess.CalledProcessError):
        code = _loaded(flags)
    code.lanes.restype = code.tiles.restype = code.has_halves.restype = c_int64
    code.run.argtypes, code.run.restype = (c_void_p, c_int64, c_void_p), None
    return code


def _loaded(flags: tuple[str, ...]) -> ctypes.CDLL:
    """The code from the cache; where there is none that loads, compiled, and loaded from the cache if that takes it."""
    with suppress(*_NO_CACHE):
        return ctypes.CDLL(str(_checked(_cache_file(flags))))
    if (compiler := _compiler()) is None:
        raise FileNotFoundError("there is no C++ compiler")
    with tempfile.TemporaryDirectory(prefix="unetlib-", ignore_cleanup_errors=True) as folder:  # what is loaded outlives it
        built = Path(folder) / "native.so"
        subprocess.run([*compiler, *_OPTIONS, *flags, "-o", built, _SOURCE], check=True, capture_output=True)
        with suppress(*_NO_CACHE):
            return ctypes.CDLL(str(_store(built, _cache_file(flags))))
        return ctypes.CDLL(str(built))


def _compiler() -> list[str] | None:
    """The command of the C++ compiler."""
    command = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    return None if command is None else shlex.split(command)


def _cache_file(flags: tuple[str, ...]) -> Path:
    """Where the user's cache has the code, also that of a machine with a compiler for one without."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "unetlib"
    version = hashlib.sha256(_SOURCE.read_bytes() + repr((os.environ.get("CXX"), _OPTIONS, flags)).encode()).hexdigest()
    return cache / f"native-{version[:16]}.so"


def _store(built: Path, file: Path) -> Path:
    """Copy to the cache, with a checksum at the end, which loading passes over."""
    code = built.read_bytes()
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(file) as partial:  # two processes may compile at the same time
        partial.write_bytes(code + hashlib.sha256(code).digest())
    return file


def _checked(file: Path) -> Path:
    """A file of the cache, if it is as it was written: loading one that is cut off would end the process."""
    code = file.read_bytes()
    if code[-_CHECKSUM:] != hashlib.sha256(code[:-_CHECKSUM]).digest():
        raise OSError(f"{file} is damaged")
    return file


@functools.cache
def openmp() -> tuple[int | None, ...]:
    """The addresses of OpenMP's functions that have threads run a function, have them wait, and tell how many and which."""
    mapped = Path("/proc/self/maps").read_bytes().splitlines()  # bytes, as a path need not be text
    loaded = {Path(os.fsdecode(line.split(maxsplit=5)[-1])) for line in mapped}
    own = Path(torch.__file__).parent  # another library may have brought another OpenMP
    for path in sorted(loaded, key=lambda path: (not path.is_relative_to(own), path)):
        if path.name.startswith(_OPENMP):
            omp = ctypes.CDLL(str(path))
            functions = (omp.GOMP_parallel, omp.GOMP_barrier, omp.omp_get_num_threads, omp.omp_get_thread_num)
            return tuple(ctypes.cast(function, c_void_p).value for function in functions)
    raise OSError(f"PyTorch's OpenMP is none of {', '.join(_OPENMP)}")
