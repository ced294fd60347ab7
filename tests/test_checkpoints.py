from __future__ import annotations

import os
import pickle
import random
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch

from unetlib.checkpoints import check_space, load_checkpoint, random_state, save_checkpoint, set_random_state


def test_a_checkpoint_comes_back_and_the_one_before_is_kept(tmp_path):
    path = tmp_path / "checkpoint.pt"
    for step in (1, 2, 3):
        save_checkpoint({"step": step, "weight": torch.full((2,), float(step)), "names": ["a"], "pair": (1, 2.5)}, path)
    state = load_checkpoint(path)
    assert (state["step"], state["names"], state["pair"]) == (3, ["a"], (1, 2.5))
    assert torch.equal(state["weight"], torch.tensor([3.0, 3.0]))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["checkpoint.pt", "checkpoint.pt.previous"]
    path.unlink()
    assert load_checkpoint(path)["step"] == 2


def test_the_checkpoint_of_a_running_training_is_read_at_any_moment(tmp_path, monkeypatch, caplog):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint({"step": 1}, path)
    opens = Path.open

    def open_too_late(file, *args):  # the first of the two renames of save_checkpoint comes between
        if path.exists():
            path.rename(f"{path}.previous")
        return opens(file, *args)

    monkeypatch.setattr(Path, "open", open_too_late)
    assert load_checkpoint(path)["step"] == 1
    assert not path.exists()
    assert not caplog.text


@pytest.mark.parametrize("left", [0, 10, 300])
def test_a_damaged_checkpoint_is_passed_over_and_said_so(tmp_path, caplog, left):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint({"step": 1}, path)
    save_checkpoint({"step": 2}, path)
    path.write_bytes(path.read_bytes()[:left])
    assert load_checkpoint(path)["step"] == 1
    assert str(path) in caplog.text
    (tmp_path / "checkpoint.pt.previous").write_bytes(b"")
    with pytest.raises(ValueError, match="no checkpoint can be read"):
        load_checkpoint(path)


@pytest.mark.parametrize("damage", [lambda whole: whole[:-10], lambda whole: whole.replace(b"step", b"stop"), lambda _: b""])
def test_a_damaged_checkpoint_does_not_replace_the_whole_one_before(tmp_path, monkeypatch, damage):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint({"step": 1}, path)
    save_checkpoint({"step": 2}, path)
    path.write_bytes(damage(path.read_bytes()))
    replace = os.replace

    def killed(source, target):
        replace(source, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(load_checkpoint(path) | {"step": 3}, path)
    assert load_checkpoint(path)["step"] == 3
    assert load_checkpoint(tmp_path / "checkpoint.pt.previous")["step"] == 1


@pytest.mark.parametrize("seed", range(3))
def test_a_checkpoint_of_which_bytes_changed_is_passed_over(tmp_path, seed):
    path, generator = tmp_path / "checkpoint.pt", random.Random(seed)
    save_checkpoint({"step": 1, "names": ["a", "b"], "pair": (1, 2.5)}, path)
    save_checkpoint({"step": 2, "names": ["a", "b"], "pair": (1, 2.5)}, path)
    whole = path.read_bytes()
    start = whole.index(b"\x80\x02")  # the pickle in the archive
    for _ in range(100):
        spoilt = bytearray(whole)
        spoilt[start + generator.randrange(2, 60)] ^= 1 << generator.randrange(8)
        path.write_bytes(spoilt)
        assert load_checkpoint(path) == {"step": 1, "names": ["a", "b"], "pair": (1, 2.5)}


def test_the_cause_is_told_and_checksums_are_written_whatever_is_set(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    torch.serialization.set_crc32_options(False)
    try:
        save_checkpoint({"step": 1}, path)
        assert not torch.serialization.get_crc32_options()
    finally:
        torch.serialization.set_crc32_options(True)
    assert load_checkpoint(path) == {"step": 1}
    monkeypatch.setattr(torch, "load", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("no such device\nmore")))
    with pytest.raises(ValueError, match=r"checkpoint\.pt cannot be read: no such device\);"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    "value", [np.float64(0.97), np.zeros(2), Path("x"), {1: [np.int64(3)]}, lambda: 0, (member for member in "a")]
)
def test_what_could_not_be_read_again_is_not_written(tmp_path, value):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint({"dice": 0.5}, path)
    with pytest.raises(TypeError, match=r"checkpoint\.pt holds more than plain values .*float\(x\)"):
        save_checkpoint({"dice": value}, path)
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]
    assert load_checkpoint(path) == {"dice": 0.5}


def test_no_checkpoint_is_one_clear_error(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"there is no checkpoint .*checkpoint\.pt; expected a file that save_checkpoint wrote"
    ):
        load_checkpoint(tmp_path / "checkpoint.pt")


class Spy:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_code_in_a_checkpoint_does_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"step": Spy()}, tmp_path / "checkpoint.pt")
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # with which torch.load runs code unless told not to
    with pytest.raises(ValueError, match=r"no checkpoint can be read \(.*checkpoint\.pt asks for the code posix\.mkdir\)"):
        load_checkpoint(tmp_path / "checkpoint.pt")
    assert not (tmp_path / "ran").exists()
    pickle.loads(pickle.dumps(Spy()))  # the trap is armed: unpickling does run it
    assert (tmp_path / "ran").exists()


def test_a_failed_write_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint({"step": 1}, path)

    def full(state, file):
        file.write(b"half of it")
        raise RuntimeError("PytorchStreamWriter failed writing file: No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"No space left on device.*the one before it is kept"):
        save_checkpoint({"step": 2}, path)
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]
    assert load_checkpoint(path)["step"] == 1
    path.rename(tmp_path / "checkpoint.pt.previous")
    with pytest.raises(OSError, match=r"No space left on device.*the one before it is kept"):
        save_checkpoint({"step": 2}, path)


def test_stopped_by_hand_nothing_half_written_stays(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint({"step": 1}, path)

    def stopped(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", stopped)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint({"step": 2}, path)
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]
    assert load_checkpoint(path)["step"] == 1


def test_a_real_full_disk_is_an_os_error(tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    (tmp_path / "checkpoint.pt.partial").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"checkpoint\.pt could not be written: \[Errno 28\] No space left on device$"):
        save_checkpoint({"weight": torch.zeros(10**6)}, tmp_path / "checkpoint.pt")
    assert not (tmp_path / "checkpoint.pt").exists()


WRITER = """
import sys, torch
from unetlib.checkpoints import save_checkpoint
step = 0
while True:
    step += 1
    save_checkpoint({"step": step, "weight": torch.full((200_000,), float(step))}, sys.argv[1])
    print(step, flush=True)
"""


def test_killed_at_any_moment_a_whole_checkpoint_is_left(tmp_path):
    path = tmp_path / "checkpoint.pt"
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    for written in writer.stdout:
        if int(written) == 20:
            break
    writer.kill()
    writer.wait()
    state = load_checkpoint(path)
    assert state["step"] >= 19
    assert torch.equal(state["weight"], torch.full((200_000,), float(state["step"])))


def test_space_and_permission_are_checked_before(tmp_path, monkeypatch):
    check_space(tmp_path / "new" / "run", needed=1)
    assert list((tmp_path / "new" / "run").iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="give another folder"):
        check_space(tmp_path / "file" / "run", needed=1)
    usage = namedtuple("usage", "total used free")(10**9, 10**9 - 5_000_000, 5_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    check_space(tmp_path, needed=5_000_000)
    with pytest.raises(OSError, match="has 5 MB left and the run writes up to 8 MB"):
        check_space(tmp_path, needed=8_000_000)


def test_a_full_disk_is_told_as_one_and_nothing_is_left_where_writing_fails(tmp_path, monkeypatch):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))  # as a full disk or a quota
    try:
        with pytest.raises(OSError, match="cannot be written to"):
            check_space(tmp_path, needed=1)
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: namedtuple("usage", "total used free")(10**9, 10**9, 0))
        with pytest.raises(OSError, match="has 0 MB left and the run writes up to 8 MB; free some space"):
            check_space(tmp_path, needed=8_000_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_random_states_come_back_through_a_file(tmp_path):
    def drawn():
        return torch.rand(3).tolist(), np.random.rand(3).tolist(), random.gauss(0, 1), np.random.standard_normal()  # noqa: NPY002

    random.gauss(0, 1)  # leaves a second value behind, which is part of the state
    np.random.standard_normal()  # noqa: NPY002
    save_checkpoint(random_state(), tmp_path / "random.pt")
    expected = drawn()
    assert drawn() != expected
    set_random_state(load_checkpoint(tmp_path / "random.pt"))
    assert drawn() == expected


def test_the_random_state_of_a_gpu_that_is_not_here_is_passed_over(monkeypatch):
    given, state = [], torch.arange(5, dtype=torch.uint8)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: given.append((device, *state.tolist())))
    set_random_state(random_state() | {"cuda": [state, state + 1, state + 2]})
    assert given == [(0, 0, 1, 2, 3, 4), (1, 1, 2, 3, 4, 5)]


def test_tensors_go_to_the_device_that_is_named(tmp_path):
    save_checkpoint({"weight": torch.ones(2)}, tmp_path / "checkpoint.pt")
    assert load_checkpoint(tmp_path / "checkpoint.pt", map_location="meta")["weight"].is_meta


def test_the_random_state_of_mps_comes_back_where_it_is(monkeypatch):
    without = random_state()
    given, state = [], torch.arange(5, dtype=torch.uint8)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: state)
    monkeypatch.setattr(torch.mps, "set_rng_state", given.append)
    kept = random_state()
    set_random_state(kept)
    assert torch.equal(torch.stack(given), state[None])
    set_random_state(without)
    set_random_state({name: value for name, value in without.items() if name != "mps"})
    assert len(given) == 1
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    set_random_state(kept)
    assert len(given) == 1
