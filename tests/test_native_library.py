from __future__ import annotations

import ctypes
import errno
import functools
import logging
import mmap
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from needs import COMPILER, needs_halves, needs_native

from unetlib.fast import native_library
from unetlib.fast.native_kernels import available, has_halves


@pytest.fixture
def unloaded(tmp_path, monkeypatch):
    """As in a process that has not compiled yet, with a cache and a folder for temporary files of its own; the cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(native_library, "load", functools.cache(native_library.load.__wrapped__))
    yield tmp_path / "unetlib"
    assert not list((tmp_path / "temporary").iterdir())


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """What the machine's compiler has made."""
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("XDG_CACHE_HOME", str(cache))
        native_library.load.__wrapped__()
    (kept,) = (cache / "unetlib").iterdir()  # and nothing beside it
    return kept


@pytest.fixture
def compilations(unloaded, compiled, tmp_path, monkeypatch):
    """Of a compiler that has them ready: a list with an entry for each."""
    compiler = tmp_path / "compiler" / "c++"
    compiler.parent.mkdir()
    compiler.write_text(f'#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\nexec {shutil.which("cp")} {compiled} "$2"\n')
    compiler.chmod(0o755)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(compiler.parent))
    commands, run = [], subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda command, **options: commands.append(command) or run(command, **options))
    return commands


@pytest.fixture
def no_room(monkeypatch):
    """For the file in the cache."""

    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(native_library, "whole_file", full)


def available_anew() -> bool:
    """As in another process."""
    native_library.load.cache_clear()
    return available.__wrapped__()


@needs_native
def test_is_compiled_once_and_kept(unloaded, compilations):
    assert available_anew()
    (kept,) = unloaded.iterdir()  # and nothing beside it
    assert kept.suffix == ".so"
    assert available_anew()
    assert len(compilations) == 1


@needs_native
@pytest.mark.parametrize("share", [0, 0.5, 0.999])
def test_what_is_cut_off_in_the_cache_is_compiled_anew(unloaded, compilations, share):
    assert available_anew()
    (kept,) = unloaded.iterdir()
    whole = kept.read_bytes()
    kept.unlink()  # as it is loaded: cut off in its place, it would end this process
    kept.write_bytes(whole[: int(share * len(whole))])
    assert available_anew()
    assert kept.read_bytes() == whole
    assert len(compilations) == 2


@needs_native
def test_what_is_in_the_cache_takes_no_compiler(compilations, monkeypatch):
    assert available_anew()
    monkeypatch.setenv("PATH", "")
    assert available_anew()


@needs_native
def test_a_full_cache_is_no_error(unloaded, compilations, no_room):
    assert available_anew()
    assert not list(unloaded.iterdir())


@needs_native
@pytest.mark.parametrize("refusing", ["unetlib", "temporary"])
def test_a_folder_from_which_nothing_may_be_loaded_is_no_error(compilations, tmp_path, monkeypatch, refusing):
    def load(path):
        if Path(path).is_relative_to(tmp_path / refusing):
            raise OSError("failed to map segment from shared object")
        return library(path)

    library = ctypes.CDLL
    monkeypatch.setattr(ctypes, "CDLL", load)
    assert available_anew()


@needs_native
def test_of_several_threads_one_compiles(compilations, no_room):
    start = threading.Barrier(3)
    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(lambda _: start.wait() >= 0 and available.__wrapped__(), range(3)))
    assert len(compilations) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked there")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_process_forked_while_a_thread_compiles_does_not_wait_for_it():
    compiling, lock = threading.Event(), native_library.one_at_a_time

    def compile():
        with lock:
            compiling.set()
            time.sleep(0.1)

    thread = threading.Thread(target=compile)
    thread.start()
    compiling.wait()
    if (child := os.fork()) == 0:
        os._exit(0 if lock.acquire(timeout=10) else 1)
    thread.join()
    assert os.waitpid(child, 0)[1] == 0


@needs_native
def test_files_in_memory_may_have_names_that_are_no_text(tmp_path):
    path = tmp_path / os.fsdecode(b"M\xfcller")
    path.write_bytes(b"1")
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ):
        assert native_library.openmp.__wrapped__() == native_library.openmp()


@needs_native
def test_another_compiler_or_other_code_is_compiled_anew(unloaded, compilations, tmp_path, monkeypatch):
    flags = native_library._FLAGS[torch.backends.cpu.get_cpu_capability()]
    native_library._loaded(flags)
    changed = tmp_path / "changed.cpp"
    changed.write_text(native_library._SOURCE.read_text() + "\n")
    monkeypatch.setattr(native_library, "_SOURCE", changed)
    native_library._loaded(flags)
    native_library._loaded((*flags, "-g"))
    monkeypatch.setenv("CXX", "c++ -g")
    native_library._loaded(flags)
    assert len(list(unloaded.iterdir())) == len(compilations) == 4


@needs_halves
def test_a_compiler_that_does_not_know_bfloat16_is_enough(unloaded, tmp_path, monkeypatch):
    compiler = tmp_path / "old"
    refusing = f'case "$*" in *{native_library._HALVES}*) exit 1;; esac'
    compiler.write_text(f'#!/bin/sh\n{refusing}\nexec {COMPILER} "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    assert not has_halves.__wrapped__()
    compiler.unlink()
    native_library.load.cache_clear()
    assert not has_halves.__wrapped__()  # from the cache


@needs_native
def test_a_cache_that_cannot_be_written_is_no_error(unloaded, compilations, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert available_anew()
    assert not unloaded.exists()


@needs_native
def test_a_user_without_a_home_has_no_cache(compilations, monkeypatch):
    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", home)
    assert available_anew()


@pytest.mark.parametrize("compiler", ["/no/such/compiler", "false", "true", 'c++ -DUNCLOSED="a'])
def test_without_a_compiler_that_works_there_are_other_ways(unloaded, monkeypatch, caplog, compiler):
    monkeypatch.setenv("CXX", compiler)
    with caplog.at_level(logging.INFO, logger="unetlib"):
        assert not available.__wrapped__()
    assert "no native operations" in caplog.text
    assert compiler != "/no/such/compiler" or compiler in caplog.text
    assert not unloaded.exists()


def test_without_any_compiler_there_are_other_ways(unloaded, monkeypatch, caplog):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    with caplog.at_level(logging.INFO, logger="unetlib"):
        assert not available.__wrapped__()
    assert "no C++ compiler" in caplog.text


def test_on_other_systems_there_are_other_ways(unloaded, monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not available.__wrapped__()


def test_on_cpus_without_avx2_there_are_other_ways(unloaded, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert not available.__wrapped__()
