from __future__ import annotations

import os
import subprocess
import sys

import pytest

from unetlib.files import only_writer, whole_file

if sys.platform != "win32":
    import fcntl

locks = pytest.mark.skipif(sys.platform == "win32", reason="has no such locks")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_when_it_is_whole_and_replaces_the_one_before(tmp_path):
    (tmp_path / "a.txt").write_text("before")
    with whole_file(tmp_path / "a.txt") as partial:
        partial.write_text("after")
        assert (partial.name[0], partial.suffix, partial.parent) == (".", ".txt", tmp_path)
        assert (tmp_path / "a.txt").read_text() == "before"
    assert (tmp_path / "a.txt").read_text() == "after"
    assert names(tmp_path) == ["a.txt"]


def test_all_of_it_is_on_the_disk_before_it_has_the_name(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda file: flushed.append((os.fstat(file).st_size, names(tmp_path))))
    with whole_file(tmp_path / "a.txt") as partial:
        partial.write_text("all of it")
    assert flushed == [(9, [partial.name])]
    with whole_file(tmp_path / "a.txt", flush=False) as partial:
        partial.write_text("again")
    assert len(flushed) == 1
    assert names(tmp_path) == ["a.txt"]


def test_a_name_may_be_as_long_as_the_system_takes(tmp_path):
    path = tmp_path / f"{'a' * 250}.txt"
    with whole_file(path) as partial:
        partial.write_text("all of it")
    assert path.read_text() == "all of it"


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_what_a_link_leads_to_is_replaced(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link.txt").symlink_to(tmp_path / "elsewhere" / "a.txt")
    for text in ("first", "second"):
        with whole_file(tmp_path / "link.txt") as partial:
            partial.write_text(text)
        assert (tmp_path / "elsewhere" / "a.txt").read_text() == text
    assert (tmp_path / "link.txt").is_symlink()
    assert names(tmp_path / "elsewhere") == ["a.txt"]


def write_half(path, error):
    with whole_file(path) as partial:
        partial.write_text("half")
        raise error


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_after_an_error_there_is_what_was_there(tmp_path, error):
    (tmp_path / "a.txt").write_text("before")
    with pytest.raises(error):
        write_half(tmp_path / "a.txt", error)
    assert (tmp_path / "a.txt").read_text() == "before"
    assert names(tmp_path) == ["a.txt"]


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    with whole_file(tmp_path / "a.txt") as one, whole_file(tmp_path / "a.txt") as other:
        one.write_text("one")
        other.write_text("other")
    assert (tmp_path / "a.txt").read_text() == "one"  # the last to be whole
    assert names(tmp_path) == ["a.txt"]


@locks
def test_a_folder_has_one_writer_at_a_time(tmp_path):
    folder = tmp_path / "new" / "run"
    with only_writer(folder):
        with pytest.raises(BlockingIOError) as caught, only_writer(folder):
            pass
        assert str(caught.value) == f"another run is writing to {folder}; wait for it, or give another folder"
        with only_writer(tmp_path):
            pass
        assert names(folder) == [".unetlib-lock"]
    assert names(tmp_path) == []  # the folder above it was not there before, either
    with only_writer(folder):
        (tmp_path / "new" / "kept").touch()
    assert names(tmp_path / "new") == ["kept"]


@locks
def test_who_opened_the_file_that_the_last_writer_removes_does_not_write(tmp_path, monkeypatch):
    lock = fcntl.flock

    def late(file, how):
        (tmp_path / ".unetlib-lock").unlink()
        lock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(BlockingIOError), only_writer(tmp_path):
        pass


@locks
def test_where_a_file_system_has_no_locks_all_may_write(tmp_path, monkeypatch):
    def without(file, how):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", without)
    with only_writer(tmp_path), only_writer(tmp_path):
        pass
    assert names(tmp_path) == []


KILLED = """
import os, signal, sys, time
from pathlib import Path
from unetlib.files import only_writer
with only_writer(Path(sys.argv[1])):
    if os.fork() == 0:
        print(os.getpid(), flush=True)  # the worker's, which has let go of the lock by now
        time.sleep(60)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@locks
def test_a_killed_writer_leaves_no_lock_though_a_worker_lives_on(tmp_path):
    run = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    worker = int(run.stdout.readline())
    run.wait()
    try:
        with only_writer(tmp_path):
            pass
    finally:
        os.kill(worker, 9)


def test_a_folder_made_for_nothing_is_removed(tmp_path):
    with only_writer(tmp_path / "new"):
        assert (tmp_path / "new").is_dir()
    assert not (tmp_path / "new").exists()
    (tmp_path / "old").mkdir()
    with only_writer(tmp_path / "old"):
        pass
    assert (tmp_path / "old").is_dir()
