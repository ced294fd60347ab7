"""Score a model on pictures with masks, at the pictures' own size.

python examples/evaluate.py --images carvana/val --masks carvana/val_masks
python examples/evaluate.py --synthetic 50                  # freshly rendered scenes; no data needed
python examples/evaluate.py --model runs/carvana/model --synthetic 50
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from unetlib import CarvanaDataset, UNet
from unetlib.inference import evaluate
from unetlib.synthetic import render_scene


class Scenes:
    """Rendered scenes of one car each, under a seed that training does not use."""

    def __init__(self, count: int, size: tuple[int, int], seed: int = 2026) -> None:
        self.count, self.size, self.seed = count, size, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int):
        if index >= self.count:
            raise IndexError(index)
        return render_scene(index, 1 + 5 * index % 16, size=self.size, seed=self.seed)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="carvana", help="zoo name, folder, file or Hub repository")
    parser.add_argument("--images", type=Path)
    parser.add_argument("--masks", type=Path)
    parser.add_argument("--synthetic", type=int, metavar="N", help="score on N rendered scenes instead")
    parser.add_argument("--size", type=int, nargs=2, default=[1280, 1918], metavar=("HEIGHT", "WIDTH"), help="of the scenes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    if not args.synthetic and not (args.images and args.masks):
        parser.error("give --images and --masks, or --synthetic N")

    dataset = Scenes(args.synthetic, tuple(args.size)) if args.synthetic else CarvanaDataset(args.images, args.masks)
    model = UNet.from_pretrained(args.model, device=args.device)
    start = time.perf_counter()
    scores = evaluate(model, dataset, batch_size=1, progress=True)
    seconds = (time.perf_counter() - start) / len(dataset)
    print(json.dumps({"pictures": len(dataset), **scores, "seconds a picture with reading and scoring": seconds}, indent=2))


if __name__ == "__main__":
    main()
