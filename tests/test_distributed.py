from __future__ import annotations

import contextlib
import os
import random
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from unetlib.distributed import joined_processes, shared

SCRIPT = Path(__file__).with_name("two_processes.py")


def free_port() -> int:
    """A port below those that the system gives to outgoing connections, one of which could take it before it is used."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as taken, contextlib.suppress(OSError):
            taken.bind(("127.0.0.1", port))
            return port


def run_processes(count: int, *command: str) -> str:
    """Start `count` processes as torchrun does, and return what the first printed."""
    port = free_port()
    common = {
        **os.environ,
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    started = [
        subprocess.Popen(
            [sys.executable, *command],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    results = [process.communicate(timeout=300) for process in started]
    for process, (_, problem) in zip(started, results):
        assert process.returncode == 0, problem
    return results[0][0]


def test_alone_there_is_nothing_to_join():
    with joined_processes("cpu") as (rank, world_size, device):
        assert (rank, world_size, device) == (0, 1, torch.device("cpu"))
        assert shared({"a": 1}) == [{"a": 1}]
        assert not torch.distributed.is_initialized()


def test_the_others_wait_for_hours_while_the_first_prepares_what_all_need(monkeypatch):
    given = {}
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, **options: given.update(options))
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    with joined_processes("cpu") as process:
        assert process.rank == 1
    assert given["timeout"] > timedelta(hours=1)


def test_a_launcher_that_does_not_number_gpus_is_told(monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(ValueError, match="not LOCAL_RANK"), joined_processes("cuda"):
        pass
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="cuda:2 is not to be had here, where PyTorch finds 2 GPUs"), joined_processes("cuda"):
        pass


def test_two_processes_have_the_gradients_and_scores_of_one(tmp_path):
    for count in (1, 2):
        run_processes(count, str(SCRIPT), str(tmp_path / f"{count}.pt"))
    one, two = (torch.load(tmp_path / f"{count}.pt", weights_only=True) for count in (1, 2))
    assert two["counts"].sum() == 5 * 40 * 56
    assert torch.equal(one["counts"], two["counts"])
    assert one["scores"] == two["scores"]
    for name, gradient in one["gradients"].items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(two["gradients"][name], gradient, rtol=1e-4, atol=1e-6)


def test_the_rank_is_that_of_all_machines_and_the_group_is_left_on_an_error(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, **_: calls.append(backend))
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: calls.append("left"))
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    with joined_processes("cpu") as process:
        calls.append((process.rank, process.world_size))
    with pytest.raises(ValueError, match="invalid literal"), joined_processes("cpu"):
        int("no number")
    assert calls == ["gloo", (3, 4), "left", "gloo", "left"]
    # Over NCCL leaving waits for the others, who may wait for this one.
    calls.clear()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    with joined_processes("cuda"):
        pass
    with pytest.raises(ValueError, match="invalid literal"), joined_processes("cuda"):
        int("no number")
    device = torch.device("cuda:1")
    assert calls == [device, "nccl", "left", device, "nccl"]
