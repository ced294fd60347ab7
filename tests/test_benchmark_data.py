from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from types import SimpleNamespace

import data
import pytest
import torch

from unetlib import CarvanaDataset, UNet
from unetlib.synthetic import write_carvana

pytest.importorskip("albumentations", reason="the study's augmentation is albumentations; `pip install .[test]` has it")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("carvana")
    write_carvana(made, cars=1, views=4, size=(64, 96))
    return made


def test_table_and_json(folder, tmp_path, capsys):
    options = ("--sizes", "32x48", "full", "--files", "3", "--repeats", "2", "--device", "cpu", "--steps", "0")
    data.main(["--data", str(folder), *options, "--json", str(tmp_path / "figures.json")])
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]
    results = json.loads((tmp_path / "figures.json").read_text())
    rows = results["rows"]
    assert [(row["size"], row["data"]) for row in rows] == [(size, name) for size in ("32x48", "full") for name in data.ROWS]
    for row, study in zip(rows, [rows[0]] * 8 + [rows[8]] * 8, strict=True):
        assert len(row["cpu_seconds"]) == 2
        ratios = [a / b for a, b in zip(study["wall_seconds"], row["wall_seconds"])]
        assert row["wall_ratio"] == pytest.approx(sum(ratios) / 2)  # the median of two
    for first, later, first_bytes, later_bytes, *means in (rows[1:8], rows[9:]):
        for row, count, a_of, b_of in zip(
            means, (3, 10, 3), (first, first, first_bytes), (later, later, later_bytes), strict=True
        ):
            expected = [(a + (count - 1) * b) / count for a, b in zip(a_of["cpu_seconds"], b_of["cpu_seconds"])]
            assert row["cpu_seconds"] == pytest.approx(expected)
    printed = capsys.readouterr().out
    assert "3 photographs, 2 repeats, 0 workers" in printed
    assert printed.count("unetlib, later epochs") == 2
    assert "no training steps" in printed


def test_without_a_comparison_there_are_steps_alone(folder, capsys):
    options = ("--sizes", "32x48", "--files", "2", "--repeats", "0", "--device", "cpu", "--steps", "1", "--batch", "2")
    data.main(["--data", str(folder), *options])
    printed = capsys.readouterr().out
    assert printed.count("the network computes") == 2
    assert data.LATER not in printed


def test_the_contestants_give_the_same_kind_of_samples(folder):
    carvana = CarvanaDataset(folder / "train", folder / "train_masks")
    for size in ((32, 48), None):
        found = data.contestants(carvana, size)
        shape = size or (64, 96)
        for name, dataset in found.items():
            image, mask = dataset[0]
            assert image.shape == (3, *shape)
            assert mask.shape == shape
            assert image.dtype == (torch.uint8 if "bytes" in name else torch.float32)
            assert len(dataset) == 4
    plain = data.StudyDataset(
        carvana.image_dir, carvana.mask_dir, carvana.images, lambda image, mask: {"image": image, "mask": mask}
    )
    for left, right in zip(plain[1], carvana[1], strict=True):
        assert (left == right).all()


def test_first_epochs_begin_empty_and_later_ones_full(folder):
    carvana = CarvanaDataset(folder / "train", folder / "train_masks")
    found = data.contestants(carvana, None)
    full = {name: all(found[name]._store._shapes[:, 0] > 0) for name in (data.LATER, data.LATER_BYTES)}
    empty = {name: not found[name]._store._shapes.any() for name in (data.FIRST, data.FIRST_BYTES)}
    assert all({**full, **empty}.values())


def test_workers_are_timed_by_the_clock_on_the_wall(folder):
    carvana = CarvanaDataset(folder / "train", folder / "train_masks")
    spent = data.time_epoch({"a": carvana, "b": carvana}, workers=1)
    assert all(wall > 0 and math.isnan(cpu) for wall, cpu in spent.values())


def test_without_data_scenes_are_rendered(tmp_path, monkeypatch):
    monkeypatch.delenv("UNETLIB_DATA", raising=False)
    monkeypatch.setattr(data, "write_carvana", functools.partial(write_carvana, size=(32, 48)))
    found, what = data.find_files(data.parse(["--files", "3"]), tmp_path)
    assert what == "rendered scenes"
    assert len(found) == 3
    assert found[0][0].shape == (32, 48, 3)


@pytest.mark.parametrize("on_device", [True, False])
def test_the_busy_share_is_the_time_of_steps_over_that_with_loading(folder, on_device, monkeypatch):
    clock = iter([1.0, 5.0, 6.0, 9.0])  # two steps take 4 seconds with loading, and 3 alone
    monkeypatch.setattr(data, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    carvana = CarvanaDataset(folder / "train", folder / "train_masks")
    args = data.parse(["--device", "cpu", "--steps", "2", "--batch", "2"])
    assert data.busy_share(carvana, (32, 48), args, UNet(features=(4,)), on_device) == 0.75
    assert next(clock, None) is None


@pytest.mark.parametrize("workers", [1, 4, 8])
def test_batches_that_workers_load_ahead_do_not_count(folder, workers, monkeypatch):
    """A machine with a clock of its own: a step takes a second, and the workers together load a batch in two."""
    now = 0
    left = []

    class Step(torch.nn.Conv2d):
        def forward(self, images):
            nonlocal now
            now += 1
            return super().forward(images)

    class Loader:
        def __init__(self, dataset, batch, *, sampler, num_workers, **_):
            self.batches = [dataset[0]] * (len(sampler) // batch)
            assert num_workers == workers

        def __iter__(self):
            nonlocal now
            asked = [now] * 2 * workers  # each reading asks for one more, two for each worker at first
            loaded = [now] * workers
            for index, (image, mask) in enumerate(self.batches, start=1):
                loaded.append(max(asked[index - 1], loaded[-workers]) + 2 * workers)
                now = max(now, loaded[-1])
                asked.append(now)
                left.append(len(self.batches) - index)
                yield image[None], mask[None]

    monkeypatch.setattr(data, "time", SimpleNamespace(perf_counter=lambda: now))
    monkeypatch.setattr(data, "DataLoader", Loader)
    args = data.parse(["--device", "cpu", "--steps", "40", "--batch", "1", "--workers", str(workers)])
    carvana = CarvanaDataset(folder / "train", folder / "train_masks")
    assert data.busy_share(carvana, (32, 48), args, Step(3, 1, 1), on_device=False) == 0.5
    assert left[-1] == 2 * workers  # to the last step none is without work


def test_figures_that_are_not_known_are_a_dash_and_null(folder, tmp_path, capsys):
    options = ("--sizes", "32x48", "--files", "2", "--repeats", "1", "--workers", "1", "--device", "cpu", "--batch", "2")
    data.main(["--data", str(folder), *options, "--steps", "1", "--json", str(tmp_path / "figures.json")])
    printed = capsys.readouterr().out
    assert printed.count("  - ") == 2 * len(data.ROWS)
    assert "nan" not in printed
    results = json.loads((tmp_path / "figures.json").read_text(), parse_constant=pytest.fail)
    assert [row["cpu_seconds"] for row in results["rows"]] == [[None]] * len(data.ROWS)
    assert all(0 < busy["share"] < 10 for busy in results["busy"])  # of steps with a real worker


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--sizes", "160"), "--sizes must be HEIGHTxWIDTH such as 160x240, or full, not 160"),
        (("--files", "0"), "--files must be at least 1, and --repeats at least 0"),
        (("--json", "no/such/folder/figures.json"), "there is no folder 'no/such/folder' for --json"),
    ],
)
def test_bad_options(arguments, message, capsys):
    with pytest.raises(SystemExit):
        data.parse(arguments)
    assert message in capsys.readouterr().err


def test_a_folder_without_data(tmp_path):
    with pytest.raises(SystemExit, match="--data must hold train/ and train_masks/"):
        data.main(["--data", str(tmp_path)])
