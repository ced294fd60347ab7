from __future__ import annotations

import errno
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from unetlib import Preprocessing, UNet, inference, rasters
from unetlib.fast import FastUNet, planner
from unetlib.fast.onednn import OnednnLevel
from unetlib.files import only_writer
from unetlib.imaging import read_image

SCRIPT = Path(__file__).parents[1] / "examples" / "predict_folder.py"


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("predict_folder", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    torch.manual_seed(0)
    network = UNet(features=(4, 8))
    with torch.no_grad():
        noise = torch.rand(1, 3, 32, 32)
        network.head.bias -= network.eval()(noise).median()  # masks hold both classes
    return str(network.save_pretrained(tmp_path_factory.mktemp("weights") / "model"))


def draw(path: Path, seed: int = 0, size: tuple[int, int] = (24, 32)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)


@pytest.fixture
def pictures(tmp_path) -> Path:
    for seed, name in enumerate(["a.png", "b.JPG", "c.d.bmp", "deep/er/a.png", "deep/f.tif", "deep/g.png"]):
        draw(tmp_path / "pictures" / name, seed, size=(24 + 3 * (seed % 3), 32))
    (tmp_path / "pictures/notes.txt").write_text("no picture")
    (tmp_path / "pictures/.hidden.png").write_text("no picture either")
    return tmp_path / "pictures"


MASKS = ["a.png", "b.png", "c.d.png", "deep/er/a.png", "deep/f.png", "deep/g.png"]


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def assert_masks_are_those_of_predict(pictures: Path, masks: Path, model: str, names: list[str], scale: int = 255) -> None:
    network = UNet.from_pretrained(model)
    for name in names:
        found = np.asarray(Image.open(masks / f"{os.path.splitext(name)[0]}.png"))
        np.testing.assert_array_equal(found, network.predict(read_image(pictures / name)) * scale, err_msg=name)


def pngs(pictures: Path) -> list[str]:
    return [name for name in files(pictures) if not name.endswith(".txt") and not name.startswith(".")]


# ---- what is written -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", ["1", "4"])
def test_masks_are_those_of_predict_in_a_tree_of_the_same_shape(script, pictures, model, tmp_path, batch_size, capsys):
    masks = tmp_path / "new" / "masks"
    arguments = [str(pictures), str(masks), "--model", model, "--device", "cpu", "--batch-size", batch_size, "--threads", "2"]
    assert script.main(arguments) == 0
    assert files(masks) == MASKS
    assert_masks_are_those_of_predict(pictures, masks, model, pngs(pictures))
    assert set(np.unique(Image.open(masks / "a.png"))) == {0, 255}
    assert "6 masks written" in capsys.readouterr().out


def test_options_go_to_predict(script, pictures, model, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(script, "predict", lambda *_, **options: asked.append(options) or inference.predict(*_, **options))
    options = ["--threshold", "0.7", "--tile", "32", "--overlap", "4", "--tta", "mirror", "--batch-size", "1"]
    assert script.main([str(pictures), str(tmp_path / "masks"), "--model", model, "--device", "cpu", *options]) == 0
    assert asked[0] == {"batch_size": 1, "threshold": 0.7, "tile": 32, "overlap": 4, "tta": "mirror"}
    for all_of_them in (["--tta"], ["--tta", "all"]):
        assert script.parse_args([str(pictures), str(tmp_path / "masks"), *all_of_them]).tta is True


def test_a_threshold_that_cannot_be_is_said_before_the_work(script, pictures, model, tmp_path, capsys):
    with pytest.raises(SystemExit):
        script.main([str(pictures), str(tmp_path / "masks"), "--model", model, "--threshold", "1.5"])
    assert "--threshold must be a probability between 0 and 1, got 1.5" in capsys.readouterr().err
    model = str(UNet(out_channels=3, features=(4,)).save_pretrained(tmp_path / "model"))
    with pytest.raises(SystemExit, match="--threshold is for one output channel"):
        script.main([str(pictures), str(tmp_path / "masks"), "--model", model, "--threshold", "0.5"])
    assert not (tmp_path / "masks").exists()


def test_several_classes_are_written_as_their_indices(script, pictures, tmp_path):
    model = str(UNet(in_channels=3, out_channels=5, features=(4,)).save_pretrained(tmp_path / "model"))
    assert script.main([str(pictures), str(tmp_path / "masks"), "--model", model, "--device", "cpu"]) == 0
    assert_masks_are_those_of_predict(pictures, tmp_path / "masks", model, pngs(pictures), scale=1)


def test_more_classes_than_a_byte_has_are_written_in_sixteen_bits(script, pictures, tmp_path):
    torch.manual_seed(0)
    network = UNet(in_channels=3, out_channels=300, features=(4,))
    with torch.no_grad():
        network.head.bias[:270] -= 9.0
    model = str(network.save_pretrained(tmp_path / "model"))
    assert script.main([str(pictures), str(tmp_path / "masks"), "--model", model, "--device", "cpu"]) == 0
    assert np.asarray(Image.open(tmp_path / "masks/a.png")).min() >= 270
    assert_masks_are_those_of_predict(pictures, tmp_path / "masks", model, pngs(pictures), scale=1)


def test_huge_tiffs_are_read_by_region_and_a_broken_one_fails_alone(script, pictures, model, tmp_path, monkeypatch, capsys):
    pixels = np.random.default_rng(5).integers(0, 256, (64, 96, 3), np.uint8)
    for name in ("huge.tif", "torn.tif"):
        tifffile.imwrite(pictures / name, pixels, photometric="rgb", tile=(32, 32), compression="zlib")
    with tifffile.TiffFile(pictures / "torn.tif") as file:
        place = file.pages.first.dataoffsets[-1]
    with open(pictures / "torn.tif", "r+b") as file:
        file.seek(place)
        file.write(b"not compressed")
    monkeypatch.setattr(rasters, "_READ_WHOLE", 64 * 96 - 1)
    whole = []
    monkeypatch.setattr(script, "read_image", lambda path, mode: whole.append(path.name) or read_image(path, mode))
    masks = tmp_path / "masks"
    assert script.main([str(pictures), str(masks), "--model", model, "--device", "cpu"]) == 1
    assert sorted(whole) == ["a.png", "a.png", "b.JPG", "c.d.bmp", "f.tif", "g.png"]
    assert_masks_are_those_of_predict(pictures, masks, model, [*pngs(pictures)[:3], "huge.tif"])
    failed = json.loads((masks / "failed.json").read_text())
    assert list(failed) == ["torn.tif"]
    assert "cannot be read as a TIFF" in failed["torn.tif"]


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_a_device_that_is_not_there_is_said_before_anything_is_written(script, pictures, model, tmp_path, capsys, device):
    arguments = [str(pictures), str(tmp_path / "masks"), "--model", model, "--device", device]
    with pytest.raises(SystemExit):
        script.main(arguments)
    assert f"device {device} is not to be had here; give cpu" in capsys.readouterr().err
    assert not (tmp_path / "masks").exists()


def test_ray_takes_a_device_that_is_not_here_and_chooses_among_gpus(script, pictures, tmp_path, monkeypatch, capsys):
    arguments = [str(pictures), str(tmp_path / "masks"), "--ray", "--device"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert script.parse_args([*arguments, "cuda"]).device == "cuda"  # another machine may have it
    with pytest.raises(SystemExit):
        script.parse_args([*arguments, "cuda:1"])
    assert "--ray gives each actor a GPU of its own; give --device cuda, got cuda:1" in capsys.readouterr().err


def test_grey_models_and_names_that_are_no_text(script, tmp_path):
    model = str(UNet(in_channels=1, features=(4,)).save_pretrained(tmp_path / "model"))
    name = os.fsdecode(b"\xff.png")
    try:
        draw(tmp_path / "pictures" / name)
    except OSError:
        pytest.skip("this file system takes names in UTF-8 only")
    (tmp_path / "pictures" / os.fsdecode(b"\xfe.png")).write_text("broken")
    assert script.main([str(tmp_path / "pictures"), str(tmp_path / "masks"), "--model", model, "--device", "cpu"]) == 1
    expected = UNet.from_pretrained(model).predict(read_image(tmp_path / "pictures" / name, "L")) * 255
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "masks" / name)), expected)
    assert list(json.loads((tmp_path / "masks/failed.json").read_text())) == [os.fsdecode(b"\xfe.png")]


def test_only_so_many_pictures_are_under_way(script):
    begun, taken = [], 0
    with ThreadPoolExecutor(2) as pool:
        for result in script.in_turn(pool, lambda item: begun.append(item) or item, iter(range(100)), 5):
            assert result == taken
            taken += 1
            assert len(begun) <= taken + 5
    assert taken == 100


# ---- going on ----------------------------------------------------------------------------------------------------------


def test_what_is_there_is_kept_and_overwrite_writes_it_again(script, pictures, model, tmp_path, capsys):
    masks = tmp_path / "masks"
    arguments = [str(pictures), str(masks), "--model", model, "--device", "cpu"]
    script.main(arguments)
    first = {name: (masks / name).read_bytes() for name in MASKS}
    (masks / "b.png").unlink()
    (masks / "a.png").write_bytes(b"of somebody else")
    (masks / "deep" / f"{script.PARTIAL}1234").write_bytes(b"left by a run that was killed")
    before = {name: (masks / name).stat().st_mtime_ns for name in MASKS if name != "b.png"}
    assert script.main(arguments) == 0
    assert "1 masks written" in (said := capsys.readouterr().out)
    assert "5 were there" in said
    assert {name: (masks / name).stat().st_mtime_ns for name in before} == before
    assert files(masks) == MASKS
    assert script.main([*arguments, "--overwrite"]) == 0
    assert {name: (masks / name).read_bytes() for name in files(masks)} == first


def test_a_killed_run_leaves_only_whole_masks_and_the_next_one_writes_the_rest(script, model, tmp_path):
    pictures, masks = tmp_path / "pictures", tmp_path / "masks"
    for seed in range(60):
        draw(pictures / f"{seed % 3}" / f"{seed}.png", seed, size=(100, 150))
    arguments = [str(pictures), str(masks), "--model", model, "--device", "cpu", "--batch-size", "1", "--threads", "2"]
    killed = subprocess.Popen([sys.executable, str(SCRIPT), *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while killed.poll() is None:
        time.sleep(0.01)
        if len(list(masks.rglob("*.png"))) >= 5:
            killed.send_signal(signal.SIGKILL)
            killed.wait()
    assert killed.returncode == -signal.SIGKILL
    written = [name for name in files(masks) if name.endswith(".png")]
    assert 5 <= len(written) < 60
    assert_masks_are_those_of_predict(pictures, masks, model, written)
    assert script.main(arguments) == 0
    assert files(masks) == files(pictures)
    assert_masks_are_those_of_predict(pictures, masks, model, files(pictures)[::10])


def test_an_interrupted_run_says_what_failed_until_then_and_goes_on(script, pictures, model, tmp_path, monkeypatch, capsys):
    (pictures / "a.png").write_text("no picture")

    calls = iter(range(4))

    def interrupt(*args, **options):
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return inference.predict(*args, **options)

    monkeypatch.setattr(script, "predict", interrupt)
    options = ["--model", model, "--device", "cpu", "--batch-size", "1", "--threads", "1"]
    arguments = [str(pictures), str(tmp_path / "masks"), *options]
    assert script.main(arguments) == 130
    assert capsys.readouterr().err.endswith("interrupted; the same command goes on\n")
    assert list(json.loads((tmp_path / "masks/failed.json").read_text())) == ["a.png"]
    monkeypatch.undo()
    assert script.main(arguments) == 1
    assert files(tmp_path / "masks") == ["b.png", "c.d.png", "deep/er/a.png", "deep/f.png", "deep/g.png", "failed.json"]


# ---- what fails --------------------------------------------------------------------------------------------------------


def test_a_second_run_leaves_the_first_alone(script, pictures, model, tmp_path):
    partial = tmp_path / "masks" / f"{script.PARTIAL}of-the-first"
    with only_writer(tmp_path / "masks"):
        partial.touch()
        with pytest.raises(SystemExit, match=r"another run is writing to .*masks; wait for it, or give another folder"):
            script.main([str(pictures), str(tmp_path / "masks"), "--model", model])
        assert partial.exists()
    script.main([str(pictures), str(tmp_path / "masks"), "--model", model])
    assert not partial.exists()


def test_bad_pictures_are_reported_and_do_not_stop_the_run(script, pictures, model, tmp_path, capsys):
    whole = (pictures / "b.JPG").read_bytes()
    bad = ["cut.jpg", "deep/empty.png", "film.gif", "text.png"]
    (pictures / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (pictures / "deep/empty.png").touch()
    (pictures / "text.png").write_text("no picture")
    frames = [Image.new("L", (8, 8), level) for level in (0, 255)]
    frames[0].save(pictures / "film.gif", save_all=True, append_images=frames[1:])
    masks = tmp_path / "masks"
    arguments = [str(pictures), str(masks), "--model", model, "--device", "cpu", "--batch-size", "1"]
    assert script.main(arguments) == 1
    assert files(masks) == sorted([*MASKS, "failed.json"])
    failed = json.loads((masks / "failed.json").read_text())
    assert sorted(failed) == bad
    assert "cannot be read as a picture" in failed["text.png"]
    assert "2 frames" in failed["film.gif"]
    said = capsys.readouterr()
    assert "6 masks written" in said.out
    assert all(f"  {name}: " in said.err for name in bad)

    (pictures / "cut.jpg").write_bytes(whole)
    assert script.main(arguments) == 1
    assert sorted(json.loads((masks / "failed.json").read_text())) == bad[1:]
    for name in bad[1:]:
        (pictures / name).unlink()
    assert script.main(arguments) == 0
    assert files(masks) == sorted([*MASKS, "cut.png"])


def test_two_pictures_with_one_mask_are_both_refused(script, pictures, model, tmp_path):
    draw(pictures / "deep/f.jpg", seed=9)
    masks = tmp_path / "masks"
    assert script.main([str(pictures), str(masks), "--model", model, "--device", "cpu"]) == 1
    failed = json.loads((masks / "failed.json").read_text())
    assert list(failed) == ["deep/f.jpg", "deep/f.tif"]
    assert all("deep/f.jpg and deep/f.tif would share the mask f.png" in reason for reason in failed.values())
    assert files(masks) == sorted({*MASKS, "failed.json"} - {"deep/f.png"})


def test_a_folder_in_the_place_of_a_mask_fails_one_picture(script, pictures, model, tmp_path):
    draw(pictures / "a.png.d/x.png")
    (tmp_path / "masks/a.png").mkdir(parents=True)
    (tmp_path / "masks/deep").mkdir()
    (tmp_path / "masks/deep/er").touch()
    assert script.main([str(pictures), str(tmp_path / "masks"), "--model", model, "--device", "cpu"]) == 1
    failed = json.loads((tmp_path / "masks/failed.json").read_text())
    assert sorted(failed) == ["a.png", "deep/er/a.png"]
    assert all(reason.startswith("its mask cannot be written") for reason in failed.values())


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_linked_folders_are_followed_and_each_once(script, pictures, model, tmp_path):
    elsewhere, masks = tmp_path / "elsewhere", tmp_path / "masks"
    draw(elsewhere / "g.jpg")
    (elsewhere / "back").symlink_to(pictures)
    (pictures / "linked").symlink_to(elsewhere)
    (pictures / "again").symlink_to(pictures)
    (pictures / "masks").symlink_to(masks)
    (pictures / "a link to deep").symlink_to(pictures / "deep")  # which comes first by its name
    (pictures / "twice").symlink_to(elsewhere)
    for _ in range(2):
        assert script.main([str(pictures), str(masks), "--model", model, "--device", "cpu"]) == 0
        assert files(masks) == sorted([*MASKS, "linked/g.png"])


def test_names_that_differ_in_capitals_share_a_mask_where_the_system_has_it_so(script, tmp_path, monkeypatch):
    pictures, masks = tmp_path / "pictures", tmp_path / "masks"
    for seed, name in enumerate(["X.jpg", "x.png", "Y.png"]):
        draw(pictures / name, seed)
    masks.mkdir()
    (masks / "Y.png").touch()
    monkeypatch.setattr(sys, "platform", "linux")
    assert script.find_pictures(pictures, masks, overwrite=False) == (["X.jpg", "x.png"], 1, {})
    monkeypatch.setattr(sys, "platform", "darwin")
    names, present, failed = script.find_pictures(pictures, masks, overwrite=False)
    assert (names, present) == ([], 1)
    assert failed == dict.fromkeys(["X.jpg", "x.png"], "X.jpg and x.png would share the mask x.png; rename all but one")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="has no named pipes")
def test_a_pipe_among_the_pictures_fails_and_is_not_waited_for(script, pictures, model, tmp_path):
    pipe = pictures / "x.png"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_bytes(b""), daemon=True)  # who opens the pipe waits for the other
    writer.start()
    assert script.main([str(pictures), str(tmp_path / "masks"), "--model", model, "--device", "cpu"]) == 1
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    writer.join(timeout=60)
    os.close(reader)
    failed = json.loads((tmp_path / "masks/failed.json").read_text())
    assert failed == {"x.png": f"{pipe} is no file but a pipe or a device, which could keep the run waiting for ever"}


def test_options_of_ray_without_it_are_refused(script, pictures, tmp_path, capsys):
    for option in (["--actors", "3"], ["--ray-address", "10.0.0.1:6379"]):
        with pytest.raises(SystemExit):
            script.main([str(pictures), str(tmp_path / "masks"), *option])
        assert "--ray-address and --actors are for --ray; add that, or leave them out" in capsys.readouterr().err


def test_a_folder_that_cannot_be_listed_is_reported(script, pictures, model, tmp_path, monkeypatch):
    listing = os.scandir

    def refused(path):
        if Path(path) == pictures.resolve() / "deep":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return listing(path)

    monkeypatch.setattr(os, "scandir", refused)
    assert script.main([str(pictures), str(tmp_path / "masks"), "--model", model, "--device", "cpu"]) == 1
    failed = json.loads((tmp_path / "masks/failed.json").read_text())
    assert failed == {"deep": "the folder cannot be read: Permission denied"}


def out_of_memory_on_a_gpu():
    raise torch.OutOfMemoryError("CUDA out of memory")


def out_of_memory_in_numpy():
    raise MemoryError("Unable to allocate 9. TiB")


def out_of_memory_on_a_cpu():
    torch.empty(2**50, device="cpu")  # PyTorch's own error


@pytest.mark.parametrize(
    ("fail", "reason"),
    [
        (out_of_memory_on_a_gpu, "of the GPU; use --device cpu for it"),
        (out_of_memory_in_numpy, "that is free; give --tile 512 --overlap 64 for an approximate mask"),
        (out_of_memory_on_a_cpu, "that is free; give --tile 512 --overlap 64 for an approximate mask"),
    ],
)
def test_pictures_too_large_for_the_memory_fail_alone(script, pictures, model, tmp_path, monkeypatch, fail, reason):
    predict, asked = script.predict, []

    def within(model, images, **options):
        asked.append(len(images))
        if sum(image[..., 0].size for image in images) > 28 * 32:
            fail()
        return predict(model, images, **options)

    monkeypatch.setattr(script, "predict", within)
    masks = tmp_path / "masks"
    assert script.main([str(pictures), str(masks), "--model", model, "--device", "cpu"]) == 1
    monkeypatch.undo()
    failed = json.loads((masks / "failed.json").read_text())
    too_large = [name for name in pngs(pictures) if Image.open(pictures / name).height > 28]
    assert sorted(failed) == too_large
    assert failed[too_large[0]] == f"32x30 pixels are too many for the memory {reason}"
    assert asked == [4, 1, 1, 1, 1, 2, 1, 1]
    assert_masks_are_those_of_predict(pictures, masks, model, [name for name in pngs(pictures) if name not in failed])


def test_an_error_that_concerns_every_picture_stops_the_run(script, pictures, model, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(script, "predict", fail)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        script.main([str(pictures), str(tmp_path / "masks"), "--model", model, "--device", "cpu"])


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_other_precisions_find_nearly_the_same_masks(script, pictures, model, tmp_path, monkeypatch, precision):
    if precision == "int8":
        pytest.importorskip("nncf", reason="needs the extra int8")
    elif not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this CPU has no fast bfloat16 convolutions")
    monkeypatch.setattr(planner, "fastest_ways", lambda *_: (OnednnLevel,))  # which computes in the precision asked for
    (pictures / "0.png").write_text("no picture, and the first to be read")
    for masks, options in (("exact", []), ("masks", ["--precision", precision])):
        assert script.main([str(pictures), str(tmp_path / masks), "--model", model, "--device", "cpu", *options]) == 1
    exact, found = ([np.asarray(Image.open(tmp_path / masks / name)) for name in MASKS] for masks in ("exact", "masks"))
    different = [(one != other).mean() for one, other in zip(exact, found, strict=True)]
    assert 0 < np.mean(different) < 0.1
    assert script.main([str(pictures), str(tmp_path / "masks"), "--model", model, "--device", "cpu", *options]) == 1  # again


def test_on_a_cpu_a_fast_copy_keeps_its_memory_between_batches(script, model):
    plain = UNet.from_pretrained(model)
    args = SimpleNamespace(device="cpu", precision="float32")
    assert isinstance(script.prepared(plain, [], args), FastUNet)
    args.device = "meta"  # stands for a GPU, where the copy has not been tried
    assert script.prepared(plain, [], args) is plain


def test_a_precision_that_is_not_to_be_had_stops_the_run(script, pictures, model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "nncf", None)
    with pytest.raises(SystemExit, match=r"--precision int8: nncf is not installed; .*unetlib\[int8\]"):
        script.main([str(pictures), str(tmp_path / "masks"), "--model", model, "--device", "cpu", "--precision", "int8"])
    assert files(tmp_path / "masks") == ["failed.json"]


def test_a_full_disk_stops_the_run_and_leaves_no_part_of_a_mask(script, pictures, model, tmp_path, monkeypatch):
    calls = []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > 3:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    masks = tmp_path / "masks"
    arguments = [str(pictures), str(masks), "--model", model, "--device", "cpu", "--threads", "1"]
    with pytest.raises(SystemExit, match=r"cannot write to .*No space left on device.*the same command then goes on"):
        script.main(arguments)
    monkeypatch.undo()
    assert len(files(masks)) == 3  # failed.json and two masks
    assert script.main(arguments) == 0
    assert files(masks) == MASKS


def test_a_place_that_cannot_be_written_to_is_found_before_the_first_picture(
    script, pictures, model, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(script, "predict_files", lambda *_: pytest.fail("began"))
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match=r"cannot write to .*masks"):
        script.main([str(pictures), str(tmp_path / "file" / "masks"), "--model", model, "--device", "cpu"])
    with pytest.raises(SystemExit):
        script.main([str(pictures), str(tmp_path / "file"), "--model", model, "--device", "cpu"])
    assert "file' is a file; name the folder that gets the masks" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("network", "size", "options", "message"),
    [
        ({}, (48, 48), ["--tile", "32"], r"^--tile 32: a tile that sees .*, or a smaller --overlap for an approximate result$"),
        ({"match": "zeros"}, (49, 48), ["--tile", "48", "--tta"], r"^--tile 48: a tile that sees 28 pixels more"),
        ({"norm": "group"}, (48, 48), ["--tile", "16", "--overlap", "8"], r"^--tile 16: a tile that sees 8 pixels more"),
        ({"norm": "group"}, (48, 48), ["--tile", "32"], r"^--tile 32: tiles cannot give the whole picture's result, because"),
        ({}, (32, 32), ["--tile", "32"], None),  # pictures stay whole, at this size
        ({"norm": "group"}, None, ["--tile", "32"], None),
        ({}, None, ["--tile", "96"], None),
    ],
)
def test_tiles_that_the_network_cannot_do_are_found_before_the_first_picture(
    script, pictures, tmp_path, recwarn, network, size, options, message
):
    model = UNet(features=(4, 8), **network)
    model.preprocessing = Preprocessing(size=size)
    arguments = [str(pictures), str(tmp_path / "masks"), "--model", str(model.save_pretrained(tmp_path / "model")), *options]
    if message is None:
        assert script.main([*arguments, "--device", "cpu"]) == 0
    else:
        with pytest.raises(SystemExit, match=message):
            script.main([*arguments, "--device", "cpu"])
        assert not (tmp_path / "masks").exists()
    assert not [warning for warning in recwarn if "approximate" in str(warning.message)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "masks"], "there is no folder 'nowhere'"),
        (["pictures", "pictures"], "lie in one another"),
        (["pictures", "pictures/masks"], "lie in one another"),
        (["pictures/deep", "pictures"], "lie in one another"),
        (["pictures", "masks", "--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["pictures", "masks", "--threads", "0"], "--threads must be at least 1, got 0"),
        (["pictures", "masks", "--actors", "-1"], "--actors must be at least 1, got -1"),
    ],
)
def test_bad_options(script, pictures, arguments, message, monkeypatch, capsys):
    monkeypatch.chdir(pictures.parent)
    with pytest.raises(SystemExit):
        script.main(arguments)
    assert message in capsys.readouterr().err
    assert not (pictures.parent / "masks").exists()


def test_a_folder_without_pictures_and_a_model_for_other_channels(script, pictures, model, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match=r"there are no pictures \(\.jpg, .*empty"):
        script.main([str(tmp_path / "empty"), str(tmp_path / "masks"), "--model", model])
    with pytest.raises(SystemExit, match="Did you mean 'carvana'"):
        script.main([str(pictures), str(tmp_path / "masks"), "--model", "carvanna"])
    five = str(UNet(in_channels=5, features=(4,)).save_pretrained(tmp_path / "five"))
    with pytest.raises(SystemExit, match="takes 5 channels, but a picture has 1"):
        script.main([str(pictures), str(tmp_path / "masks"), "--model", five])
    assert not (tmp_path / "masks").exists()


def test_the_page_in_the_documentation_has_every_option(script, capsys):
    page = (SCRIPT.parents[1] / "docs" / "folders.md").read_text(encoding="utf-8")
    with pytest.raises(SystemExit):
        script.parse_args(["--help"])
    options = re.findall(r"^ +(--[a-z-]+)", capsys.readouterr().out, re.MULTILINE)
    assert len(options) > 5
    assert re.findall(r"^\| `(--[a-z-]+)` \|", page, re.MULTILINE) == options


# ---- Ray ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def actor(script, pictures, model, tmp_path):
    """What runs inside a Ray actor, here without one."""
    args = script.parse_args([str(pictures), str(tmp_path / "masks"), "--device", "cpu"])
    script.write_failed(args.masks, {})
    return script.RayActor(UNet.from_pretrained(model), [], args)


def outcomes(actor, *names: str) -> dict[str, str]:
    rows = actor({"names": b"\0".join(map(os.fsencode, names))})
    return {os.fsdecode(row["name"]): row["reason"] for row in rows}


def test_an_actor_computes_in_the_precision_that_was_asked_for(script, pictures, model, tmp_path):
    pytest.importorskip("nncf", reason="needs the extra int8")
    args = script.parse_args([str(pictures), str(tmp_path / "masks"), "--device", "cpu", "--precision", "int8"])
    script.write_failed(args.masks, {})
    actor = script.RayActor(UNet.from_pretrained(model), ["a.png", "b.JPG"], args)
    assert actor.model.dtype == torch.int8
    assert outcomes(actor, "a.png", "deep/f.tif") == {"a.png": "", "deep/f.tif": ""}
    assert files(args.masks) == ["a.png", "deep/f.png", "failed.json"]


def test_an_actor_that_dies_twice_on_one_picture_gives_it_up(script, actor, pictures, tmp_path, model, monkeypatch):
    read, reads = script.read, []

    def deadly(folder, mode, name):
        reads.append(name)
        if name == "deep/g.png":
            raise KeyboardInterrupt  # no OSError: nothing after this line runs, as in a process that dies
        return read(folder, mode, name)

    monkeypatch.setattr(script, "read", deadly)
    names = ["a.png", "deep/g.png", "b.JPG"]
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            outcomes(actor, *names)
    assert outcomes(actor, *names) == {"a.png": "", "deep/g.png": "the worker that had it died, twice", "b.JPG": ""}
    assert reads.count("deep/g.png") == 2
    assert files(tmp_path / "masks") == ["a.png", "b.png", "failed.json"]
    assert_masks_are_those_of_predict(pictures, tmp_path / "masks", model, ["a.png", "b.JPG"])


def test_an_actor_stops_the_run_where_it_cannot_write_or_does_not_see_the_folders(actor, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
        assert outcomes(actor, "a.png") == {"/OSError": "[Errno 28] No space left on device"}
    (tmp_path / "masks/failed.json").unlink()
    assert "does not see both folders" in outcomes(actor, "a.png")["/OSError"]


def test_an_actor_says_that_a_precision_is_not_to_be_had(script, pictures, model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "nncf", None)
    args = script.parse_args([str(pictures), str(tmp_path / "masks"), "--device", "cpu", "--precision", "int8"])
    script.write_failed(args.masks, {})
    actor = script.RayActor(UNet.from_pretrained(model), ["a.png"], args)
    assert "nncf is not installed" in outcomes(actor, "a.png")["/Unprepared"]


@pytest.mark.parametrize("error", [RuntimeError("No CUDA GPUs are available"), AssertionError("Torch not compiled with CUDA")])
def test_an_actor_says_that_a_device_is_not_to_be_had(script, pictures, model, tmp_path, monkeypatch, error):
    args = script.parse_args([str(pictures), str(tmp_path / "masks"), "--device", "cuda", "--ray"])
    script.write_failed(args.masks, {})
    network = UNet.from_pretrained(model)
    monkeypatch.setattr(network, "to", lambda _: (_ for _ in ()).throw(error))
    actor = script.RayActor(network, ["a.png"], args)
    assert outcomes(actor, "a.png") == {"/Unprepared": f"--device cuda: {error}"}


def test_ray_is_asked_for_where_it_is_missing(script, pictures, model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SystemExit, match=r'--ray needs Ray: pip install "unetlib\[ray\]"'):
        script.main([str(pictures), str(tmp_path / "masks"), "--model", model, "--device", "cpu", "--ray"])


@pytest.fixture(scope="module")
def cluster():
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_memory_monitor_refresh_ms"] = "0"  # noqa: SIM112 - it ends actors where others fill the memory
    ray = pytest.importorskip("ray", reason='Ray is not installed; `pip install ".[ray]"` has it')
    options = {"include_dashboard": False, "object_store_memory": 100 * 2**20, "log_to_driver": False}
    ray.init("local", num_cpus=2, num_gpus=1, **options)  # Ray counts what it is told
    yield ray
    ray.shutdown()


def test_a_precision_that_no_actor_has_is_one_clear_error(cluster, script, pictures, model, tmp_path):
    arguments = [str(pictures), str(tmp_path / "masks"), "--model", model, "--device", "cpu", "--ray", "--actors", "1"]
    with pytest.raises(SystemExit, match=r"^--precision float16: "):
        script.main([*arguments, "--precision", "float16"])


def test_two_actors_of_which_one_is_killed_write_all_masks(cluster, script, model, tmp_path, monkeypatch):
    pictures, masks, seen = tmp_path / "pictures", tmp_path / "masks", tmp_path / "seen"
    for seed in range(24):
        draw(pictures / f"{seed % 2}" / f"{seed}.png", seed)
    (pictures / "text.png").write_text("no picture")
    read, end = script.read, time.time() + 300
    seen.mkdir()

    def slow(folder, mode, name):
        (seen / str(os.getpid())).touch()
        while len(list(seen.iterdir())) < 2 and time.time() < end:  # both work before one is killed
            time.sleep(0.05)
        time.sleep(0.1)
        return read(folder, mode, name)

    def kill():
        while len(actors := list(seen.iterdir())) < 2:
            time.sleep(0.05)
        os.kill(int(actors[0].name), signal.SIGKILL)

    monkeypatch.setattr(script, "read", slow)
    monkeypatch.setattr(script, "BATCHES", 4)  # more blocks than actors
    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    arguments = [str(pictures), str(masks), "--model", model, "--device", "cpu", "--threads", "1", "--batch-size", "2", "--ray"]
    assert script.main(arguments) == 1
    killer.join(timeout=10)
    assert len(list(seen.iterdir())) == 3
    assert list(json.loads((masks / "failed.json").read_text())) == ["text.png"]
    assert files(masks) == sorted([*(name for name in files(pictures) if name != "text.png"), "failed.json"])
    assert_masks_are_those_of_predict(pictures, masks, model, [name for name in files(pictures) if name != "text.png"])


def test_an_actor_on_a_gpu_gets_whole_blocks(cluster, script, pictures, model, tmp_path, monkeypatch):
    predict_files, blocks = script.predict_files, tmp_path / "blocks"
    blocks.mkdir()

    def noted(network, names, args):
        (blocks / f"{len(names)} from {names[0].replace('/', '-')}").touch()
        return predict_files(network, names, args)

    monkeypatch.setattr(script, "prepared", lambda network, *_: network)  # on the CPU
    monkeypatch.setattr(script, "predict_files", noted)
    monkeypatch.setattr(script, "BATCHES", 2)
    masks, options = tmp_path / "masks", ["--device", "cuda", "--threads", "1", "--batch-size", "2", "--ray"]
    assert script.main([str(pictures), str(masks), "--model", model, *options]) == 0
    assert files(blocks) == ["2 from deep-g.png", "4 from a.png"]
    assert_masks_are_those_of_predict(pictures, masks, model, pngs(pictures))


def test_an_actor_needs_room(cluster, script, pictures, model, tmp_path, monkeypatch):
    arguments = [str(pictures), str(tmp_path / "masks"), "--model", model, "--device", "cpu", "--ray"]
    with pytest.raises(SystemExit, match=r"no machine of the cluster has what an actor needs: \{'CPU': 3, 'GPU': 0\}"):
        script.main([*arguments, "--threads", "3"])
    monkeypatch.setattr(cluster, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 2.0}}])
    with pytest.raises(SystemExit, match=r"'GPU': 1"):
        script.main([*arguments, "--threads", "1", "--device", "cuda"])
