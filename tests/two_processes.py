"""What each of several processes does for test_distributed.py: gradients and metrics of its share, written by the first.

Run alone it does the same on the whole.
"""

from __future__ import annotations

import sys

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from unetlib import BCEDiceLoss, SegmentationMetrics, UNet
from unetlib.distributed import joined_processes
from unetlib.inference import evaluate
from unetlib.loading import Augmented, ShuffledBatches
from unetlib.synthetic import render_scene
from unetlib.transforms import train_transform


class Scenes(torch.utils.data.Dataset):
    def __getitem__(self, index):
        from torchvision import tv_tensors

        image, mask = render_scene(index, size=(32, 48))
        return tv_tensors.Image(torch.from_numpy(image).permute(2, 0, 1)), tv_tensors.Mask(torch.from_numpy(mask))

    def __len__(self):
        return 9


def main(path: str) -> None:
    with joined_processes("cpu") as process:
        torch.manual_seed(process.rank)  # different weights: rank 0's must win
        model = UNet(features=(8, 16), norm="group")
        data = Augmented(Scenes(), train_transform((32, 48), color_jitter=0.2))
        batches = ShuffledBatches(data, batch_size=4, seed=1, rank=process.rank, world_size=process.world_size)
        forward = DistributedDataParallel(model) if process.world_size > 1 else model
        for images, masks, _ in DataLoader(data, batch_sampler=batches):
            BCEDiceLoss()(forward(images), masks).backward()  # two batches: gradients add up

        metrics = SegmentationMetrics(keep_pictures=True)
        share = [render_scene(100 + car, size=(40, 56)) for car in range(process.rank, 5, process.world_size)]
        evaluate(model, share, metrics=metrics)
        total = metrics.all_gather()
        if process.rank == 0:
            gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
            torch.save({"gradients": gradients, "scores": total.compute(), "counts": total.confusion}, path)


if __name__ == "__main__":
    main(sys.argv[1])
