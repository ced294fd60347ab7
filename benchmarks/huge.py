"""Segment a picture far larger than a network's memory, from file to file, and say what memory that took.

    python benchmarks/huge.py                                  # 16384x16384, 768 MiB of pixels
    python benchmarks/huge.py --size 4096x8192 --out mask.tif

The picture is noise in a temporary .npy file, which is mapped into memory. The mask goes to another, or to --out.
"""

from __future__ import annotations

import argparse
import re
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from harness import add_device, resident, without_traceback

from unetlib import UNet


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="16384x16384", metavar="HEIGHTxWIDTH", help="of the picture (%(default)s)")
    parser.add_argument(
        "--features", type=int, nargs="+", default=[8, 16, 32, 64], help="widths of the network's levels (8 16 32 64)"
    )
    parser.add_argument("--tile", type=int, help="side of a tile (default: as predict chooses)")
    add_device(parser)
    parser.add_argument("--out", type=Path, help="keep the mask there: .npy or .tif")
    args = parser.parse_args(argv)
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", args.size):
        parser.error(f"expected a size HEIGHTxWIDTH such as 4096x8192, got {args.size!r}")
    return args


def write_noise(path: Path, height: int, width: int) -> None:
    """Rows of noise, a few at a time."""
    rng = np.random.default_rng(0)
    picture = np.lib.format.open_memmap(path, "w+", np.uint8, (height, width, 3))
    for top in range(0, height, 256):
        rows = picture[top : top + 256]
        rows[:] = rng.integers(0, 256, rows.shape, np.uint8)
    picture.flush()


@contextmanager
def peak_of(field: str, every: float = 0.02) -> Iterator[list[int]]:
    """The most that a field of /proc/self/status reads inside, looked at every few milliseconds; Linux only."""
    peak, done = [0], threading.Event()

    def watch() -> None:
        while Path("/proc/self/status").exists():
            peak[0] = max(peak[0], resident(field))
            if done.wait(every):
                return

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    height, width = map(int, args.size.split("x"))
    torch.manual_seed(0)
    with without_traceback(), tempfile.TemporaryDirectory() as folder:
        model = UNet(features=args.features).eval().to(args.device)
        picture = Path(folder) / "picture.npy"
        write_noise(picture, height, width)
        # Pages of mapped files are not counted: the system drops them where memory is short.
        with peak_of("RssAnon") as peak:
            start = time.perf_counter()
            model.predict(picture, tile=args.tile, out=args.out or Path(folder) / "mask.npy", progress=True)
            seconds = time.perf_counter() - start
    print(f"picture: {height}x{width}x3 uint8, {height * width * 3 / 2**20:.0f} MiB; network: features {args.features}")
    print(f"device: {args.device}, {torch.get_num_threads()} threads; torch {torch.__version__}")
    print(f"time: {seconds:.1f} s, {height * width / seconds / 1e6:.2f} million pixels a second")
    print(f"peak memory of the process, mapped files left out: {peak[0] / 2**20:.0f} MiB" if peak[0] else "peak memory: -")
    if args.device == "cuda":
        print(f"peak memory of the GPU: {torch.cuda.max_memory_allocated() / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
