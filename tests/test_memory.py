from __future__ import annotations

import gc
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from unetlib import UNet, UNetConfig, memory
from unetlib.memory import available_memory, bytes_per_pixel, pixels_in_one_pass


def container(root: Path, line: str, folder: str, **files: str) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(f"3:cpu:/a\n2:cpuset:/a:1\n{line}\n")  # containerd's groups have such names
    (root / folder).mkdir(parents=True)
    for name, text in files.items():
        (root / folder / name.replace("__", ".")).write_text(text + "\n")
    return root


def test_what_linux_calls_available_counts(tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal:  64 kB\nMemFree:  1 kB\nMemAvailable:   48 kB\n")
    assert memory._system_memory(tmp_path / "meminfo") == 48 * 1024
    (tmp_path / "old").write_text("MemTotal:  64 kB\nMemFree:  1 kB\n")
    for file in ("old", "nowhere"):
        assert memory._system_memory(tmp_path / file) > 2**20  # asked of the system instead


def test_windows_says_what_is_available(tmp_path, monkeypatch):
    class Kernel:
        works = 1

        def GlobalMemoryStatusEx(self, status):
            fields = np.frombuffer(status._obj, np.uint32)
            assert fields[:2].tolist() == [fields.nbytes, 0] == [64, 0]
            fields.view(np.uint64)[1:3] = 64 * 2**30, 48 * 2**30
            return self.works

    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(memory.ctypes, "windll", SimpleNamespace(kernel32=Kernel()), raising=False)
    monkeypatch.delattr(memory.os, "sysconf", raising=False)
    assert memory._system_memory(tmp_path / "nowhere") == 48 * 2**30
    Kernel.works = 0
    assert memory._system_memory(tmp_path / "nowhere") == 4 * 2**30


def test_the_limit_of_a_container_less_what_is_used(tmp_path):
    root = container(
        tmp_path,
        "0::/mine",
        "sys/fs/cgroup/mine",
        memory__max="1000",
        memory__current="600",
        memory__stat="anon 5\ninactive_file 100",
    )
    assert min(memory._container_room(root)) == 500


def test_the_nearest_limit_of_nested_groups_counts(tmp_path):
    root = container(
        tmp_path, "0::/outer/mine", "sys/fs/cgroup/outer", memory__max="1000", memory__current="990", memory__stat="anon 5"
    )
    (root / "sys/fs/cgroup/outer/mine").mkdir()
    for name, text in {"memory.max": "max", "memory.current": "3", "memory.stat": "anon 3"}.items():
        (root / "sys/fs/cgroup/outer/mine" / name).write_text(text)
    assert min(memory._container_room(root)) == 10


def test_version_1_and_a_path_of_the_machine_outside(tmp_path):
    root = container(
        tmp_path,
        "4:memory:/docker/abc",
        "sys/fs/cgroup/memory",
        memory__limit_in_bytes="2000",
        memory__usage_in_bytes="2100",
        memory__stat="total_inactive_file 200",
    )
    assert min(memory._container_room(root)) == 100
    assert list(memory._container_room(tmp_path / "no linux")) == [2**63]


def test_groups_of_other_controllers_say_nothing_of_memory(tmp_path):
    root = container(tmp_path, "4:memory:/mine", "sys/fs/cgroup/memory/mine")
    for group, limit in (("mine", 1000), ("a", 7)):  # the latter of the CPU's
        folder = root / "sys/fs/cgroup/memory" / group
        folder.mkdir(exist_ok=True)
        for name, text in zip(memory._VERSION_1, (limit, 0)):
            (folder / name).write_text(str(text))
        (folder / "memory.stat").write_text("total_inactive_file 0")
    assert min(memory._container_room(root)) == 1000


def test_the_least_of_all_limits_decides(monkeypatch):
    monkeypatch.setattr(memory, "_kept", False)  # whatever this process keeps
    monkeypatch.setattr(memory, "_system_memory", lambda path: 5000)
    monkeypatch.setattr(memory, "_container_room", lambda root: iter([7000, 4000]))
    assert available_memory() == 4000
    monkeypatch.setattr(memory, "_address_room", lambda statm: 3000)
    assert available_memory() == 3000


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from Linux's /proc")
def test_the_limit_of_a_process_less_what_it_has_taken():
    """In a process of its own, since a limit may not be raised again."""
    code = """
import mmap, resource
from unetlib.memory import available_memory
taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + 2**28, resource.RLIM_INFINITY))
before = available_memory()
block = mmap.mmap(-1, 2**27)
print(before, before - available_memory())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, difference = map(int, done.stdout.split())
    assert abs(before - 2**28) < 2**24
    assert abs(difference - 2**27) < 2**24


def test_where_there_is_no_limit_on_a_process_none_is_taken(tmp_path):
    assert memory._address_room(tmp_path / "no linux") == 2**63
    assert available_memory() > 2**20


def test_half_of_the_free_memory_and_no_map_of_2_to_the_31(monkeypatch):
    config = UNetConfig(features=(8, 16))
    monkeypatch.setattr(memory, "available_memory", lambda device: 10**9)
    assert pixels_in_one_pass(config) == 10**9 // 2 // bytes_per_pixel(config)
    assert pixels_in_one_pass(config, dtype=torch.bfloat16) == 10**9 // 2 // bytes_per_pixel(config, torch.bfloat16)
    assert pixels_in_one_pass(config, held=10**8) == (10**9 // 2 - 10**8) // bytes_per_pixel(config)
    assert pixels_in_one_pass(config, held=10**9) == 0
    monkeypatch.setattr(memory, "available_memory", lambda device: 10**15)
    assert pixels_in_one_pass(config) * 16 < 2**31 <= (pixels_in_one_pass(config) + 1) * 16
    assert pixels_in_one_pass(UNetConfig(features=(8, 256))) == (2**31 - 1) // (2 * 256 // 4)  # the second level's map
    for channels in ("in_channels", "out_channels"):
        assert pixels_in_one_pass(UNetConfig(features=(8, 16), **{channels: 150})) == (2**31 - 1) // 150


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read from Linux's /proc")
@pytest.mark.parametrize(
    ("options", "side", "run"),
    [
        ({"features": (16, 32)}, 768, "model(x)"),
        ({"features": (16, 32), "patch_size": 2}, 1024, "model(x)"),
        ({"features": (4,), "bottleneck": 512}, 320, "model(x)"),
        ({"features": (16, 512)}, 256, "model(x)"),
        ({"features": (16, 32), "up_features": (16, 256)}, 512, "model(x)"),
        ({"features": (8, 16), "out_channels": 150}, 512, "model.predict(x[0], tile=512, probabilities=True)"),
    ],
)
def test_the_estimate_is_above_what_is_taken_and_not_far(options, side, run):
    """It runs in a process of its own, whose high-water mark is set back before it."""
    code = """
import ast, re, sys, torch
from pathlib import Path
from unetlib import UNet
def resident(field): return 1024 * int(re.findall(rf"{field}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[0])
options, side = map(ast.literal_eval, sys.argv[1:3])
model, run = UNet(**options).eval(), eval("lambda x: " + sys.argv[3])
picture = torch.rand(1, 3, side, side)
with torch.inference_mode():
    run(picture[..., :64, :64])
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    run(picture)
print((resident("VmHWM") - before) / side**2)
"""
    arguments = [str(options), str(side), run]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    taken = float(re.findall(r"[\d.]+", done.stdout)[0])
    assert taken / 1.15 < bytes_per_pixel(UNetConfig(**options)) < 3 * taken


def test_elsewhere_than_on_linux_glibc_is_not_looked_for(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert memory._glibc.__wrapped__() is None


@pytest.mark.skipif(memory._glibc() is None, reason="needs glibc on Linux")
def test_after_a_release_blocks_are_used_again_as_they_were_before():
    code = """
import resource
import torch
from unetlib.memory import keep_freed, release_freed

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(2**21)  # 8 MiB, 2048 pages
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

keep_freed()
release_freed()
faults()  # first touches
print(faults())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 5 * 2048  # and not 20 * 2048


@pytest.mark.skipif(not hasattr(memory._glibc(), "mallinfo2"), reason="needs glibc 2.33 on Linux")
def test_what_is_kept_is_available():
    """In a process of its own, with a limit that no other one moves."""
    code = """
import resource, torch
from unetlib.memory import available_memory, keep_freed
torch.set_num_threads(1)  # each thread would take addresses of its own
taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + 2**30, resource.RLIM_INFINITY))
keep_freed()
before = available_memory()
block = torch.ones(2**26)  # 256 MiB
print(before - available_memory(), end=" ")
del block
print(before - available_memory())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    held, kept = map(int, done.stdout.split())
    assert abs(held - 2**28) < 2**24
    assert abs(kept) < 2**24


@pytest.mark.skipif(not hasattr(memory._glibc(), "mallinfo2"), reason="needs glibc 2.33 on Linux")
@pytest.mark.parametrize("by_hand", [False, True])
def test_what_one_picture_has_left_behind_is_there_for_the_next(by_hand):
    """Without an error that it does not fit; in a process of its own, with a limit that no other one moves."""
    code = """
import resource, sys, numpy as np
from unetlib import UNet
from unetlib.inference import optimize_for_inference, predict
from unetlib.memory import pixels_in_one_pass
model = UNet(features=(16, 32), norm="group").eval()
network = optimize_for_inference(model) if sys.argv[1] == "True" else model
predict(network, np.zeros((64, 64, 3), np.uint8))
taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + 2**29, resource.RLIM_INFINITY))
picture = np.zeros((512, int(0.8 * pixels_in_one_pass(model.config)) // 512, 3), np.uint8)
predict(network, [picture] * 3, batch_size=1)
predict(network, picture)
"""
    done = subprocess.run([sys.executable, "-c", code, str(by_hand)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not hasattr(memory._glibc(), "mallinfo2"), reason="needs glibc 2.33 on Linux")
def test_maps_of_smaller_pictures_make_room_for_larger_ones():
    """In a process of its own, with a limit that no other one moves."""
    code = """
import resource, numpy as np
from unetlib import UNet
from unetlib.memory import pixels_in_one_pass
model = UNet(features=(16, 32)).eval()
model.predict(np.zeros((64, 64, 3), np.uint8))
taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + 2**28, resource.RLIM_INFINITY))
most = pixels_in_one_pass(model.config)
model.predict([np.zeros((256, share * most // 20 // 256, 3), np.uint8) for share in range(4, 19)], batch_size=1)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(memory._glibc() is None, reason="needs glibc on Linux")
def test_what_is_freed_is_kept_until_it_is_released():
    code = """
import torch
from unetlib.memory import keep_freed, release_freed

def left():
    block = torch.ones(2**26)  # 256 MiB
    del block
    return int(open("/proc/self/statm").read().split()[1]) * 4 // 1024

print(left())
keep_freed()
print(left())
release_freed()
print(left())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, kept, after = map(int, done.stdout.split())
    assert kept > before + 240
    assert abs(after - before) < 16


@pytest.mark.skipif(memory._glibc() is None, reason="needs glibc on Linux")
def test_a_prediction_lets_go_of_what_it_kept_and_of_nothing_else():
    """A training run that keeps memory goes on doing so after it has validated."""
    gc.collect()  # copies of other tests that lie in cycles let go of it when they are collected
    model, picture = UNet(features=(8,)).eval(), np.zeros((16, 16, 3), np.uint8)
    memory.release_freed()
    model.predict(picture)
    assert memory.keep_freed()  # the prediction had begun it, and ended it
    try:
        model.predict(picture)
        assert not memory.keep_freed()
    finally:
        memory.release_freed()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda_what_pytorch_keeps_is_free():
    before = available_memory("cuda")
    block = torch.zeros(2**28, device="cuda")
    assert before - available_memory("cuda") >= 2**30
    del block
    assert abs(available_memory("cuda") - before) < 2**28
