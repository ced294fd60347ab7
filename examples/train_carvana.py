"""Train a U-Net on Carvana, on one CPU, one GPU or many machines, on the real folders or on rendered scenes.

    python examples/train_carvana.py --preset study --data carvana --out runs/study    # the study's run to the letter
    python examples/train_carvana.py --synthetic 64 --epochs 1                         # no data at hand: rendered scenes
    torchrun --nproc-per-node 8 examples/train_carvana.py --data carvana --batch-size 64
    python examples/train_carvana.py --help

`--data` holds `train/` and `train_masks/`, and `val/` and `val_masks/` or else one car in ten is set aside for validation.
Kaggle's files of the Carvana Image Masking Challenge are `train_hq.zip` and `train_masks.zip`; accept the competition's rules
there to download them. A run that was stopped, in whatever way, goes on with the same command and `--resume`.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.util
import math
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from training_options import (
    PRESETS,
    check_shares,
    ignored,
    make_augment,
    make_loss,
    make_schedule,
    parse_options,
    starting_model,
)
from training_runs import (
    CHECKPOINT,
    Losses,
    check_room,
    check_weights,
    command_typed,
    load_run,
    only_run,
    readable,
    room_asked_for,
    settings_of,
    without_traceback,
)

from unetlib import CarvanaDataset, ImageMaskDataset, SegmentationMetrics, UNet, dice_score, split_by_car
from unetlib.averaging import follow
from unetlib.cards import training_card
from unetlib.checkpoints import check_space, random_state, save_checkpoint, set_random_state
from unetlib.console import as_json, print_any_letter
from unetlib.distributed import Process, joined_processes, shared
from unetlib.inference import evaluate
from unetlib.loading import AugmentedBatches, ShuffledBatches
from unetlib.memory import keep_freed, release_freed
from unetlib.synthetic import write_carvana
from unetlib.transforms import eval_transform
from unetlib.visualize import comparison, learning_curves


def main(argv: list[str] | None = None) -> None:
    print_any_letter()
    args = parse_args(argv)
    with joined_processes(args.device) as process, only_run(args, process):
        torch.manual_seed(args.seed)
        with without_traceback():
            model = starting_model(args)
            train_sets, val_set = load_data(args, process)
        size = None if args.window else tuple(args.size)  # windows are cut out at the pictures' own scale
        class_names = ("background", "car")
        model.preprocessing = replace(model.preprocessing, size=size, scale=None, threshold=0.5, class_names=class_names)
        train(args, process, model, train_sets, val_set, "carvana", "Cuts a car out of a studio photograph.")


def train(
    args: argparse.Namespace,
    process: Process,
    model: UNet,
    train_sets: Sequence[ImageMaskDataset],
    val_set: ImageMaskDataset,
    name: str,
    description: str,
) -> dict[str, float]:
    """Train `model` as `args` (of `parse_options`) say, and return the best validation scores."""
    rank, world, device = process
    say = print if rank == 0 else lambda *_: None
    check_room(args, process, model)

    # Data: decoded once where memory allows; order and augmentation follow from the seed alone.
    names = [image for dataset in train_sets for image in dataset.images]
    with without_traceback(f"--batch-size {args.batch_size}: "):
        batches = ShuffledBatches(names, args.batch_size, seed=args.seed, rank=rank, world_size=world)
    with without_traceback():
        check_shares(args, model, world)
        loader = AugmentedBatches(
            train_sets, batches, make_augment(args, train_sets), device, augment_on=args.augment_on, cache_gib=args.cache_gib,
            size=None if args.crop or args.window else tuple(args.size), workers=args.workers, progress=rank == 0,
        )  # fmt: skip
    mean, std = (
        torch.tensor(part, device=device).view(-1, 1, 1) for part in (model.preprocessing.mean, model.preprocessing.std)
    )

    # Model, loss, optimizer, schedule.
    if device.type == "cpu":
        keep_freed()  # the maps of a step lie where those of the last one lay, and need no fresh pages
    model.to(device).to(memory_format=torch.channels_last if args.channels_last else torch.contiguous_format)
    if args.sync_batch_norm:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model.checkpoint_gradients = args.checkpoint_gradients
    average = copy.deepcopy(model) if args.ema else None
    forward: Any = DistributedDataParallel(model) if world > 1 else model
    if args.compile:
        forward = torch.compile(forward)
    loss_fn = make_loss(args)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.weight_decay, fused=True)
    schedule = make_schedule(args, optimizer, steps=args.epochs * len(batches))
    precision = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": None}[args.precision]
    autocast = torch.autocast(device.type, precision, enabled=precision is not None)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)

    def take_step(images: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        """One step of the optimizer: the loss of the batch, and the logits of its last share."""
        optimizer.zero_grad(set_to_none=True)
        shares = list(zip(images.chunk(args.accumulate), masks.chunk(args.accumulate)))
        total = torch.zeros((), device=device)
        for number, (inputs, targets) in enumerate(shares, 1):
            inputs = inputs.sub(mean).div_(std)
            # Gradients meet those of the other processes once a step, with the last share. Shares count by their pictures,
            # though with `--ignore` or `--border-weight` one loss of the whole batch would weigh pixels otherwise.
            with contextlib.nullcontext() if world == 1 or number == len(shares) else forward.no_sync():
                with autocast:
                    logits = forward(inputs)
                    loss = loss_fn(logits, targets) * (len(inputs) / len(images))
                scaler.scale(loss).backward()
            total += loss.detach()
        if args.clip:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
        return total, logits.detach()

    # Where the run stands: all that a checkpoint holds.
    stateful: dict[str, Any] = {"model": model, "optimizer": optimizer, "schedule": schedule, "scaler": scaler}
    stateful |= {"average": average} if average else {}
    history: dict[str, Any] = {"loss": [], "epochs": []}
    epoch = step = 0  # `step` counts within the epoch
    best: dict[str, float] = {"dice": -1.0}
    settings = settings_of(args, model, names, val_set.images)

    @room_asked_for(args.out)
    def save() -> None:
        states = shared(random_state())
        if rank == 0:
            state = {key: part.state_dict() for key, part in stateful.items()}
            state |= {"epoch": epoch, "step": step, "best": best, "history": history, "random": states, "settings": settings}
            save_checkpoint(state, args.out / CHECKPOINT)

    torch.manual_seed((args.seed + rank) % 2**64)  # or all processes would drop the same channels
    if args.resume:
        state = load_run(args.out / CHECKPOINT, settings)
        for key, part in stateful.items():
            part.load_state_dict(state[key])
        epoch, step, best, history = (state[key] for key in ("epoch", "step", "best", "history"))
        if len(state["random"]) == world:
            set_random_state(state["random"][rank])
        del state  # or the run would hold a second set of weights to its end
        if epoch < args.epochs:
            say(f"going on in epoch {epoch + 1} after step {step} of {len(batches)}")
        else:
            say(f"the run is finished: its {epoch} epochs are done, and only what its end writes is written again")
    losses = Losses(history["loss"], names, args.out)
    seen = f"{'windows of' if args.window else 'at'} {args.size[0]}x{args.size[1]}"
    say(f"{len(names)} pictures to train on, {len(val_set)} to validate on, {seen}, {world} x {device}, {args.precision}")

    writer = None
    if args.tensorboard and rank == 0:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(args.out / "tensorboard")

    while epoch < args.epochs:
        model.train()
        batches.epoch, batches.first = epoch, step
        started = time.perf_counter()
        with tqdm(
            total=len(batches) * args.batch_size, initial=step * args.batch_size, desc=f"epoch {epoch + 1}/{args.epochs}",
            unit="picture", mininterval=args.log_every, disable=rank > 0,
        ) as bar:  # fmt: skip
            for images, masks, draws in readable(loader):
                loss, logits = take_step(images, masks)
                if average:
                    follow(average, model, args.ema, steps=len(losses))
                losses.add(loss, draws)
                step += 1
                if bar.update(args.batch_size):  # once in `mininterval`, so that Dice costs nothing
                    losses.settle()  # Dice waits too, and would refuse logits of NaN without naming step and pictures
                    truth = masks[-len(logits) :]
                    truth = truth.round().long() if truth.is_floating_point() else truth
                    dice = dice_score(logits, truth, ignore_index=ignored(args)).item()
                    bar.set_postfix(loss=f"{losses.read[-1]:.4f}", dice=f"{dice:.4f}")
                if args.checkpoint_every and step % args.checkpoint_every == 0 and step < len(batches):
                    losses.share(last=step)
                    check_weights(model, len(losses), args.out)
                    save()
        losses.share(last=step)
        check_weights(model, len(losses), args.out)
        seconds, pictures = time.perf_counter() - started, (len(batches) - batches.first) * args.batch_size
        judge = (epoch + 1) % args.validate_every == 0 or epoch + 1 == args.epochs
        if judge and pictures:  # it may take as long as the epoch, and be stopped on the way
            save()
        epoch, step = epoch + 1, 0

        entry: dict[str, float] = {
            "epoch": epoch,
            "loss": sum(losses.read[-len(batches) :]) / len(batches),
            "lr": optimizer.param_groups[0]["lr"],
        }
        if pictures:  # none where a run goes on with the validation
            entry["pictures_per_second"] = pictures / seconds
        if judge:
            judged = average or model
            with without_traceback(f"validation of epoch {epoch}: "), autocast:  # finite weights may overflow in fp16
                scores = validate(args, process, judged, val_set)
            entry |= {key: scores[key] for key in ("dice", "iou", "accuracy")}
            say(f"epoch {epoch}: " + ", ".join(f"{key} {entry[key]:.5f}" for key in ("loss", "dice", "iou", "accuracy")))
            if math.isnan(entry["dice"]) or entry["dice"] > best["dice"]:  # nan: nothing to find, and nothing found
                best = entry
                if rank == 0:
                    counts, scored_at = (len(names), len(val_set)), args.size if args.validate_at == "size" else None
                    card = training_card(judged, name, description, best, command_typed(world), counts, scored_at, args.init)
                    with room_asked_for(args.out):
                        judged.save_pretrained(args.out / "model", dtype=torch.float16, card=card)
        history["epochs"].append(entry)
        if writer:
            for key, value in entry.items():
                writer.add_scalar(key, value, epoch)
        save()

    if rank == 0:
        write_results(args, history, val_set, device)
        say(f"best: Dice {best['dice']:.5f} in epoch {best['epoch']}; weights, card, curves and predictions: {args.out}")
    release_freed()
    return best


def validate(args: argparse.Namespace, process: Process, model: UNet, val_set: ImageMaskDataset) -> dict[str, float]:
    """Scores at the pictures' own size, or at the network's; each process counts its share."""
    if process.world_size > 1:  # each has batch-norm statistics of its own, and those of the first are saved
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, src=0)
    share = val_set.subset(range(process.rank, len(val_set), process.world_size))
    if args.validate_at == "size":
        resized = eval_transform(args.size)

        def at_size(*pair: Tensor) -> tuple[Tensor, Tensor]:
            picture, shares = resized(*pair)
            return picture, shares.round()  # shares of pixels: yes or no

        share.transform = at_size
    threshold = model.preprocessing.threshold
    metrics = SegmentationMetrics(model.config.out_channels, threshold=threshold, ignore_index=ignored(args))
    evaluate(model, share, metrics=metrics, progress=process.rank == 0)
    return metrics.all_gather().compute()


def write_results(args: argparse.Namespace, history: dict[str, Any], val_set: ImageMaskDataset, device: torch.device) -> None:
    """What a finished run has to show: its history, curves of it, and what the best weights predict."""
    with room_asked_for(args.out):
        (args.out / "history.json").write_text(as_json(history, indent=1))
        if importlib.util.find_spec("matplotlib"):
            learning_curves(history["loss"], history["epochs"], args.out / "curves.png")
        else:
            print("no curves.png without matplotlib: pip install 'unetlib[examples]'")
    model = UNet.from_pretrained(args.out / "model", device=device)
    shown = []
    for number in range(min(32, len(val_set))):
        image, mask = val_set[number]
        every = max(1, len(image) // 320)  # of its rows: all pictures at full size may be more than the memory
        shown.append([part[::every, ::every].copy() for part in (image, mask, model.predict(image))])
    images, masks, predicted = map(list, zip(*shown))
    if args.ignore is not None:  # what does not count is shown as background
        masks = [mask * (mask != ignored(args)) for mask in masks]
    sheet = comparison(images, masks, predicted, classes=max(2, model.config.out_channels))
    with room_asked_for(args.out):
        Image.fromarray(sheet).save(args.out / "predictions.png")


def load_data(args: argparse.Namespace, process: Process) -> tuple[list[CarvanaDataset], CarvanaDataset]:
    """The training sets, and the validation set, whose cars are in none of them."""
    sets = []
    if args.synthetic:
        # Rendered once into a folder of its own, under the names that Kaggle gives its files.
        size = tuple(args.size)
        folder = args.out / f"synthetic_{args.synthetic}_{size[0]}x{size[1]}"
        if not folder.is_dir() and process.rank == 0:
            print(f"rendering {args.synthetic} scenes into {folder}")
            check_space(args.out, needed=args.synthetic * size[0] * size[1])
            with tempfile.TemporaryDirectory(dir=args.out) as partial:
                write_carvana(Path(partial) / "scenes", cars=args.synthetic // 4, views=(1, 6, 11, 16), size=size)
                os.replace(Path(partial) / "scenes", folder)
        shared("rendered")  # the others wait
        sets.append(CarvanaDataset(folder / "train", folder / "train_masks"))
    if args.data:
        real = CarvanaDataset(args.data / "train", args.data / "train_masks")
        if (args.data / "val").is_dir():
            val = CarvanaDataset(args.data / "val", args.data / "val_masks")
        else:
            real, val = split_by_car(real, val_fraction=0.1, seed=args.seed)
        sets.append(real)
    else:
        sets[0], val = split_by_car(sets[0], val_fraction=0.25, seed=args.seed)
    val.check()  # a file that cannot be read would cost an epoch
    return sets, val


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--preset", choices=PRESETS, help="defaults of a whole recipe, not those in brackets; options given beside it win")
    add("--data", type=Path, help="folder with train/, train_masks/ and perhaps val/, val_masks/")
    add("--synthetic", type=int, default=0, metavar="N", help="train on N rendered scenes, made in fours, with --data or alone")
    args = parse_options(parser, argv)
    if args.synthetic < 0:
        parser.error(f"--synthetic must be 0 or more, not {args.synthetic}")
    if not args.data and args.synthetic < 5:
        scenes = f"8 or more (four views of a car, and two cars at least), not {args.synthetic}"
        parser.error(f"give --data FOLDER, or --synthetic N to train on rendered scenes: {scenes}")
    args.synthetic += -args.synthetic % 4
    return args


if __name__ == "__main__":
    main()
