"""Batches for training: the order of the pictures, and the random numbers of their augmentation, from a seed alone.

Both are the same on any number of processes and loader workers, and from any step on: a run that goes on from a checkpoint,
or on more machines, sees what an unbroken run on one would have seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Sized
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Sampler, default_collate

from .arguments import whole
from .cache import CachedDataset
from .datasets import ImageMaskDataset
from .memory import available_memory
from .transforms import PerPicture, check_one_size, seeded


class AugmentedBatches:
    """Batches for training, augmented and on their device, of pictures that are decoded once where memory allows.

    Pictures that are augmented on the device and fit into half of its free memory are kept there as bytes (`Resident`); others
    are kept in memory that the workers share (`CachedDataset`). What they are augmented to does not depend on that. Iterating
    gives pictures and masks on the device, as `augment` gives them and stacked, and the list of their draws.

    Args:
        datasets: their pictures and masks, one data set after the other.
        batches: which pictures make a batch, and the chance for each.
        augment: takes (`tv_tensors.Image`, `tv_tensors.Mask`) and gives a picture and a mask, of one size for all.
        device: where the batches are to be.
        size: height and width to which pictures are reduced before they are kept; None keeps their own.
        augment_on: "workers", or "device", in batches of bytes.
        cache_gib: memory for decoded pictures in each process, or on the device; what does not fit is decoded again each time.
        workers: processes that decode and augment; 0: this one.
        progress: show a bar while pictures are decoded for the device.

    Raises:
        ValueError: for another `augment_on`, or `batches` of another number of pictures.

    Example:
        >>> import tempfile
        >>> from unetlib import CarvanaDataset
        >>> from unetlib.synthetic import write_carvana
        >>> from unetlib.transforms import train_transform
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = write_carvana(folder, cars=4, views=1, size=(64, 96))
        ...     scenes = CarvanaDataset(f"{folder}/train", f"{folder}/train_masks")
        ...     order = ShuffledBatches(scenes, batch_size=4)
        ...     [(images, masks, draws)] = AugmentedBatches([scenes], order, train_transform((32, 48)), torch.device("cpu"))
        >>> images.shape, masks.shape, len(draws)
        (torch.Size([4, 3, 32, 48]), torch.Size([4, 32, 48]), 4)
    """

    def __init__(
        self,
        datasets: Sequence[ImageMaskDataset],
        batches: ShuffledBatches,
        augment: torch.nn.Module,
        device: torch.device | str,
        *,
        size: tuple[int, int] | None = None,
        augment_on: str = "workers",
        cache_gib: float = 8.0,
        workers: int = 0,
        progress: bool = False,
    ) -> None:
        """Choose where pictures are kept; those that are kept on the device are decoded at once."""
        if augment_on not in ("workers", "device"):
            raise ValueError(f'augment_on must be "workers" or "device", got {augment_on!r}')
        if (pictures := sum(map(len, datasets))) != batches.length:
            raise ValueError(f"batches are of {batches.length} pictures, and datasets have {pictures}; give both the same")
        self.device = device = torch.device(device)
        self.augment = PerPicture(augment) if augment_on == "device" else None

        def data_in(gib: float) -> Augmented:
            sets = [CachedDataset(dataset, size, budget_gib=gib / len(datasets)) for dataset in datasets]
            return Augmented(ConcatDataset(sets), None if self.augment else augment)

        self.loader: Resident | DataLoader[Any]
        if self.augment and Resident.nbytes(data := data_in(0)) <= min(cache_gib * 2**30, available_memory(device) / 2):
            self.loader = Resident(data, batches, device, workers=workers, progress=progress)
        else:
            # A generator of its own, so that the loader takes nothing from the one that dropout draws from.
            self.loader = DataLoader(
                data_in(cache_gib), batch_sampler=batches, num_workers=workers, persistent_workers=workers > 0,
                pin_memory=device.type == "cuda", collate_fn=listed if self.augment else stacked, generator=torch.Generator(),
            )  # fmt: skip

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, list[Draw]]]:
        """The batches of `ShuffledBatches`, from its `first` on."""
        images: Any
        masks: Any
        soon = self.device.type == "cuda"  # MPS may read a batch before it is there (PyTorch issue 189690)
        for images, masks, draws in self.loader:
            if self.augment:
                images, masks = ([part.to(self.device, non_blocking=soon) for part in parts] for parts in (images, masks))
                images, masks = self.augment(images, masks, [draw.seed for draw in draws])
            yield images.to(self.device, non_blocking=soon), masks.to(self.device, non_blocking=soon), draws


class Draw(NamedTuple):
    """One training picture: which, and the seed of its augmentation."""

    item: int  # its number in the data set
    seed: int


class ShuffledBatches(Sampler[list[Draw]]):
    """Batches of a data set in a random order that differs between epochs; the incomplete last one is left out.

    Set `epoch` before each pass, and `first` to go on in the middle of one. With several processes each takes its share of
    every batch.

    Args:
        dataset: what has a length; its items are drawn as `Augmented` takes them.
        batch_size: pictures in a batch, all processes together.
        seed: decides the order and the seeds of the augmentation, together with the epoch.
        rank: number of this process, from 0.
        world_size: number of processes; divides `batch_size`.

    Attributes:
        epoch: number of the coming pass, from 0.
        first: number of the batch with which that pass begins, from 0.

    Raises:
        ValueError: if `batch_size` is below 1, above the number of pictures, or no multiple of `world_size`; or `rank` is
            none of 0 to `world_size` - 1.

    Example:
        >>> batches = ShuffledBatches(range(8), batch_size=4, seed=1)
        >>> first, second = batches
        >>> sorted(draw.item for draw in first + second)
        [0, 1, 2, 3, 4, 5, 6, 7]
        >>> batches.first = 1
        >>> list(batches) == [second]
        True
    """

    def __init__(self, dataset: Sized, batch_size: int, *, seed: int = 0, rank: int = 0, world_size: int = 1) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be from 0 to world_size - 1, got rank={rank!r} and world_size={world_size!r}")
        if whole("batch_size", batch_size, 1) % world_size:
            raise ValueError(f"batch_size must be a multiple of the {world_size} processes, got {batch_size!r}")
        if len(dataset) < batch_size:
            raise ValueError(f"a batch takes {batch_size} pictures, and there are {len(dataset)}; give a smaller batch_size")
        self.length, self.batch_size, self.seed = len(dataset), batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.epoch = self.first = 0

    def __len__(self) -> int:
        """Batches in a whole pass."""
        return self.length // self.batch_size

    def __iter__(self) -> Iterator[list[Draw]]:
        """The batches from `first` on."""
        base = self.seed * 1_000_003 + self.epoch
        order = torch.randperm(self.length, generator=torch.Generator().manual_seed(base % 2**63), device="cpu").tolist()
        for start in range(self.first * self.batch_size, len(self) * self.batch_size, self.batch_size):
            batch = order[start + self.rank : start + self.batch_size : self.world_size]
            yield [Draw(index, (base * self.length + index) % 2**63) for index in batch]


class Augmented(Dataset[tuple[Any, Any, Draw]]):
    """A data set with augmentation whose chance comes from the `Draw` alone; the random state outside stays as it was.

    An item, for a `Draw`, is the transformed picture, its mask, and the draw.

    Args:
        dataset: its items are pairs of picture and mask, as `transform` takes them: tensors for a preset.
        transform: takes and returns such a pair, and draws its chance from torch's global generator, as
            `torchvision.transforms.v2` does; None where pictures are augmented later, on their device:
            `unetlib.transforms.PerPicture` takes the seeds of the draws.

    Example:
        >>> dataset = Augmented([(torch.zeros(1), torch.zeros(1))], lambda image, mask: (image + torch.rand(1), mask))
        >>> dataset[Draw(0, seed=7)] == dataset[Draw(0, seed=7)], dataset[Draw(0, seed=7)] == dataset[Draw(0, seed=8)]
        (True, False)
    """

    def __init__(self, dataset: Any, transform: Callable[[Any, Any], tuple[Any, Any]] | None) -> None:
        self.dataset, self.transform = dataset, transform

    def __len__(self) -> int:
        """Pictures in the data set."""
        return len(self.dataset)

    def __getitem__(self, draw: Draw) -> tuple[Any, Any, Draw]:
        """One picture, its mask and the draw."""
        pair = self.dataset[draw.item]
        if self.transform is not None:
            with seeded(draw.seed):
                pair = self.transform(*pair)
        return *pair, draw


def stacked(samples: Sequence[tuple[Tensor, Tensor, Draw]]) -> tuple[Tensor, Tensor, list[Draw]]:
    """A loader's `collate_fn` for items of `Augmented`: pictures and masks of one size as batches, draws as they are.

    Raises:
        ValueError: for pictures of several sizes.

    Example:
        >>> images, masks, draws = stacked([(torch.zeros(3, 4, 5), torch.zeros(4, 5), Draw(n, seed=7)) for n in range(2)])
        >>> images.shape, masks.shape, [draw.item for draw in draws]
        (torch.Size([2, 3, 4, 5]), torch.Size([2, 4, 5]), [0, 1])
    """
    images, masks, draws = zip(*samples)
    check_one_size(images)
    return default_collate([*images]), default_collate([*masks]), [*draws]


def listed(samples: Sequence[tuple[Tensor, Tensor, Draw]]) -> list[list[Any]]:
    """A loader's `collate_fn` for items of `Augmented` of any sizes: lists instead of batches, to be augmented on their device.

    Example:
        >>> small, large = (torch.zeros(3, *size) for size in ((2, 3), (4, 5)))
        >>> images, masks, draws = listed([(small, small[0], Draw(0, seed=7)), (large, large[0], Draw(1, seed=8))])
        >>> [image.shape for image in images], [draw.item for draw in draws]
        ([torch.Size([3, 2, 3]), torch.Size([3, 4, 5])], [0, 1])
    """
    return [[*part] for part in zip(*samples)]


def padded(samples: Sequence[tuple[Tensor, Tensor]], *, ignore_index: int = 255) -> tuple[Tensor, Tensor]:
    """A loader's `collate_fn` for pictures of different sizes: rows below and columns at the right make them one batch.

    Pictures hold zeros there and masks `ignore_index`, also where they are floats, so that losses and metrics with the same
    `ignore_index` leave these pixels out. Another value is bound by `functools.partial(padded, ignore_index=...)`.

    Args:
        samples: pairs of a picture (C, H, W) and its mask (H, W) or (C, H, W), all masks of one type.
        ignore_index: a number that the type of the masks holds; bool masks become uint8, since bools hold none but 0 and 1.

    Returns:
        Pictures and masks, stacked, of the largest height and the largest width.

    Raises:
        TypeError: for arrays.
        ValueError: for a mask of another size than its picture, or an `ignore_index` that masks cannot hold.

    Example:
        >>> one, other = (torch.ones(3, 2, 3), torch.zeros(2, 3)), (torch.ones(3, 1, 4), torch.ones(1, 4))
        >>> images, masks = padded([one, other])
        >>> images.shape, masks[1].tolist()
        (torch.Size([2, 3, 2, 4]), [[1.0, 1.0, 1.0, 1.0], [255.0, 255.0, 255.0, 255.0]])
    """
    for image, mask in samples:
        if not (isinstance(image, Tensor) and isinstance(mask, Tensor)):
            raise TypeError(
                f"padded takes tensors, got {type(image).__name__} and {type(mask).__name__}; give the data set a transform, "
                "such as eval_transform(size=None)"
            )
        if image.shape[-2:] != mask.shape[-2:]:
            raise ValueError(f"a picture has the size {(*image.shape[-2:],)} and its mask {(*mask.shape[-2:],)}; give both one")
    images = [image for image, _ in samples]
    masks = [mask.byte() if mask.dtype == torch.bool else mask for _, mask in samples]
    if torch.tensor(ignore_index, device="cpu").to(masks[0].dtype).item() != ignore_index:
        raise ValueError(
            f"masks of {masks[0].dtype} cannot hold ignore_index={ignore_index}; give one that they can, such as 127"
        )
    height, width = (max(image.shape[side] for image in images) for side in (-2, -1))

    def grown(part: Tensor, value: int) -> Tensor:
        return F.pad(part, (0, width - part.shape[-1], 0, height - part.shape[-2]), value=value)

    return torch.stack([grown(image, 0) for image in images]), torch.stack([grown(mask, ignore_index) for mask in masks])


class Resident:
    """The batches that a loader with `listed` would give, of pictures that lie on the device: decoded and sent there once.

    Args:
        data: `Augmented` without a transform.
        batches: its `ShuffledBatches`.
        device: where all is kept as bytes; masks of shares of pixels in steps of 1/255, as `CachedDataset` keeps them.
        workers: processes that decode.
        progress: show a bar meanwhile.

    Example:
        >>> data = Augmented([(torch.zeros(3, 8, 8, dtype=torch.uint8), torch.ones(8, 8)) for _ in range(4)], None)
        >>> [(images, masks, draws)] = Resident(data, ShuffledBatches(data, batch_size=4), torch.device("cpu"))
        >>> len(images), images[0].dtype, masks[0].dtype
        (4, torch.uint8, torch.float32)
    """

    def __init__(
        self, data: Augmented, batches: ShuffledBatches, device: torch.device, *, workers: int = 0, progress: bool = False
    ) -> None:
        """Decode everything."""
        from tqdm.auto import tqdm

        self.batches = batches
        # A generator of its own, so that the loader takes nothing from the one that dropout draws from.
        loader = DataLoader(_Bytes(data), batch_size=None, num_workers=workers, generator=torch.Generator())
        self.images, self.masks, self.shares = [], [], []
        for image, mask, share in tqdm(loader, "decoding", unit="picture", disable=not progress):
            # Copies on a CPU too: what a worker sends lies in shared memory, and holds a file open as long as it lives.
            self.images.append(image.to(device, copy=True))
            self.masks.append(mask.to(device, copy=True))
            self.shares.append(share)

    @staticmethod
    def nbytes(data: Augmented) -> int:
        """What all pictures and masks take, by the mean of up to eight from all over the set."""
        few = min(len(data), 8)
        pairs = (_Bytes(data)[number * len(data) // few] for number in range(few))
        return sum(image.nbytes + mask.nbytes for image, mask, _ in pairs) * len(data) // few

    def __iter__(self) -> Iterator[list[list[Any]]]:
        """The batches of the sampler."""
        for draws in self.batches:
            items = [draw.item for draw in draws]
            masks = [self.masks[item].float().div_(255) if self.shares[item] else self.masks[item] for item in items]
            yield [[self.images[item] for item in items], masks, draws]


class _Bytes(Dataset[tuple[Tensor, Tensor, bool]]):
    """Pictures, masks as bytes, and whether these are shares of pixels, in steps of 1/255; other masks are as they were."""

    def __init__(self, data: Augmented) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, item: int) -> tuple[Tensor, Tensor, bool]:
        image, mask, _ = self.data[Draw(item, seed=0)]
        image, mask = image.as_subclass(Tensor), mask.as_subclass(Tensor)
        if not mask.is_floating_point():
            return image, mask, False
        return image, mask.mul(255).round_().to(torch.uint8), True
