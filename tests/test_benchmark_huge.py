from __future__ import annotations

import gc
import re
import sys
import time

import huge
import numpy as np
import pytest
import tifffile

from unetlib.memory import release_freed


def test_a_small_run_prints_time_and_memory(tmp_path, capsys):
    huge.main(["--size", "100x70", "--features", "2", "--tile", "32", "--device", "cpu", "--out", str(tmp_path / "mask.tif")])
    printed = capsys.readouterr().out
    assert "picture: 100x70x3 uint8" in printed
    assert re.search(r"time: [\d.]+ s, [\d.]+ million pixels a second", printed)
    assert re.search(r"peak memory.*: (\d+ MiB|-)", printed)
    assert tifffile.imread(tmp_path / "mask.tif").shape == (100, 70)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from Linux's /proc")
def test_the_peak_is_that_of_the_block():
    gc.collect()
    release_freed()  # memory that the process kept would be taken first
    before = huge.resident("RssAnon")
    with huge.peak_of("RssAnon", every=0.001) as peak:
        block = np.ones(50 * 2**20, np.uint8)
        deadline = time.monotonic() + 30  # on a busy machine the thread that looks has its turn late
        while peak[0] - before < 40 * 2**20 and time.monotonic() < deadline:
            time.sleep(0.01)
        del block
    assert 40 * 2**20 < peak[0] - before < 80 * 2**20


@pytest.mark.parametrize(
    ("options", "message"),
    [(("--features", "0"), "features"), (("--tile", "8"), "give a larger tile="), (("--out", "mask.txt"), "mask.txt")],
)
def test_what_the_library_refuses_is_one_line(options, message):
    with pytest.raises(SystemExit, match=message):
        huge.main(["--size", "64x64", "--features", "2", "--device", "cpu", *options])


def test_a_bad_size_is_named(capsys):
    with pytest.raises(SystemExit):
        huge.parse(["--size", "16384"])
    assert "such as 4096x8192, got '16384'" in capsys.readouterr().err
