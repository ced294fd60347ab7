from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from unetlib import rasters
from unetlib.imaging import read_image
from unetlib.rasters import Raster, check_output, is_huge_tiff, is_read_from, open_raster, write_raster


@pytest.fixture
def picture():
    return np.random.default_rng(0).integers(0, 256, (300, 410, 3), np.uint8)


def without(monkeypatch, *modules):
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)


# --- reading


REGION = np.s_[70:150, 240:410]


def test_an_array_on_disk_is_mapped(picture, tmp_path):
    np.save(tmp_path / "a.npy", picture)
    raster = open_raster(tmp_path / "a.npy")
    assert isinstance(raster, np.memmap)
    assert isinstance(raster, Raster)
    np.testing.assert_array_equal(raster[REGION], picture[REGION])


@pytest.mark.parametrize(
    "options",
    [
        {"tile": (128, 128), "compression": "zlib"},
        {"tile": (64, 128), "compression": "lzw", "bigtiff": True},
        {"rowsperstrip": 16},
        {"planarconfig": "separate", "tile": (64, 64)},
    ],
)
def test_regions_of_a_tiff(picture, tmp_path, options):
    bigtiff = options.pop("bigtiff", False)
    planar = options.get("planarconfig") == "separate"
    pixels = np.moveaxis(picture, -1, 0).copy() if planar else picture
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="rgb", bigtiff=bigtiff, **options)
    raster = open_raster(str(tmp_path / "a.tif"))
    assert (raster.shape, raster.dtype) == (picture.shape, np.uint8)
    np.testing.assert_array_equal(raster[REGION], picture[REGION])
    np.testing.assert_array_equal(raster[:, :], picture)


def test_only_the_tiles_of_a_region_are_read(picture, tmp_path, monkeypatch):
    tifffile.imwrite(tmp_path / "a.tif", picture, photometric="rgb", tile=(64, 64), compression="zlib")
    decoded = []
    decode = tifffile.TiffPage.decode

    def counting(page):
        inner = decode.__get__(page)
        return lambda *args, **options: decoded.append(1) or inner(*args, **options)

    monkeypatch.setattr(tifffile.TiffPage, "decode", property(counting))
    open_raster(tmp_path / "a.tif")[0:64, 0:128]
    assert len(decoded) == 2


def test_jpeg_in_tiff_as_pillow_decodes_it(tmp_path):
    y, x = np.mgrid[:256, :256]
    smooth = np.stack([x, y, (x + y) // 2], axis=-1).astype(np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", smooth, photometric="rgb", tile=(128, 128), compression="jpeg")
    by_pillow = np.asarray(Image.open(tmp_path / "a.tif").convert("RGB")).astype(int)
    assert np.abs(open_raster(tmp_path / "a.tif")[:, :].astype(int) - by_pillow).max() <= 3


def test_grey_sixteen_bits_and_transparency(picture, tmp_path):
    grey = np.arange(0, 65536, 13, dtype=np.uint16)[:5000].reshape(50, 100)
    tifffile.imwrite(tmp_path / "grey.tif", grey)
    raster = open_raster(tmp_path / "grey.tif")
    assert (raster.shape, raster.dtype) == ((50, 100), np.uint8)
    np.testing.assert_array_equal(raster[:, :], np.rint(grey / 257).astype(np.uint8))
    rgba = np.concatenate([picture, picture[..., :1]], axis=-1)
    tifffile.imwrite(tmp_path / "rgba.tif", rgba, photometric="rgb", extrasamples=["unassalpha"])
    assert open_raster(tmp_path / "rgba.tif").shape == picture.shape
    np.testing.assert_array_equal(open_raster(tmp_path / "rgba.tif")[REGION], picture[REGION])


def test_alpha_may_be_any_band_beside_colour(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 5), np.uint8)
    for kinds, kept in ((["unassalpha", "unspecified"], [0, 1, 2, 4]), (["unspecified", "unassalpha"], [0, 1, 2, 3])):
        for planar in ("contig", "separate"):
            stored = pixels if planar == "contig" else np.moveaxis(pixels, -1, 0)
            tifffile.imwrite(tmp_path / "a.tif", stored, photometric="rgb", planarconfig=planar, extrasamples=kinds)
            raster = open_raster(tmp_path / "a.tif")
            assert raster.shape == (20, 30, 4)
            np.testing.assert_array_equal(raster[3:9, 2:5], pixels[3:9, 2:5, kept])


def test_transparency_is_multiplied_into_colours_alone(tmp_path):
    pixels = np.full((4, 5, 5), 100, np.uint8)
    pixels[..., 3:] = (200, 60)
    kinds = ["assocalpha", "unspecified"]
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="rgb", planarconfig="contig", extrasamples=kinds)
    assert open_raster(tmp_path / "a.tif")[0:1, 0:1].tolist() == [[[127, 127, 127, 60]]]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("bands", [2, 4])
def test_colours_that_transparency_was_multiplied_into_are_those_that_pillow_reads(tmp_path, dtype, bands):
    levels = np.random.default_rng(0).integers(0, 256, (20, 30, bands))
    levels[:4, :, -1] = 0
    levels[..., :-1] = levels[..., :-1] * levels[..., -1:] // 255
    levels[0] = 0
    pixels = (levels * (1 if dtype == np.uint8 else 257)).astype(dtype)
    if bands == 2 and dtype == np.uint16:
        pytest.skip("Pillow does not read it")
    photometric = "rgb" if bands == 4 else "minisblack"
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric=photometric, planarconfig="contig", extrasamples=["assocalpha"])
    expected = read_image(tmp_path / "a.tif", "RGB" if bands == 4 else "L")
    found = open_raster(tmp_path / "a.tif")[:, :]
    seen = levels[..., -1] > 0
    np.testing.assert_array_equal(found[seen], expected[seen])
    assert found.shape == (20, 30, bands - 1)


def test_a_slide_gives_its_full_resolution(picture, tmp_path):
    with tifffile.TiffWriter(tmp_path / "slide.tif") as file:
        file.write(picture, photometric="rgb", tile=(128, 128), subifds=1)
        file.write(picture[::2, ::2].copy(), photometric="rgb", tile=(128, 128), subfiletype=1)
        file.write(picture[:40, :50].copy(), photometric="rgb")  # a label
    raster = open_raster(tmp_path / "slide.tif")
    np.testing.assert_array_equal(raster[REGION], picture[REGION])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": np.zeros((3, 20, 30), np.uint8), "photometric": "minisblack"}, "axes IYX"),
        ({"data": np.zeros((20, 30), np.float32)}, "float32 pixels"),
        ({"data": np.zeros((20, 30), np.uint8), "photometric": "miniswhite"}, "MINISWHITE"),
        *(
            ({"data": np.zeros((20, 30, 3), np.uint8), "photometric": "ycbcr", "compression": how}, "YCBCR")
            for how in (None, "zlib")
        ),
        ({"data": np.zeros((20, 30), np.uint8), "extratags": [(274, "H", 1, 6, True)]}, "orientation 6"),
    ],
)
def test_what_has_no_single_reading_is_named(tmp_path, options, message):
    tifffile.imwrite(tmp_path / "a.tif", options.pop("data"), metadata=None, **options)
    with pytest.raises(ValueError, match=rf"a\.tif holds .*{message}.*save one picture"):
        open_raster(tmp_path / "a.tif")


@pytest.mark.parametrize("name", ["a.npy", "a.tif"])
def test_broken_and_missing_files_are_named(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=name):
        open_raster(tmp_path / name)
    (tmp_path / name).write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=rf"{name} cannot be read"):
        open_raster(tmp_path / name)


def test_an_empty_file_and_an_archive_are_named(tmp_path):
    (tmp_path / "empty.npy").touch()
    np.savez(tmp_path / "archive.npz", a=np.zeros(3))
    (tmp_path / "archive.npz").rename(tmp_path / "archive.npy")
    for name in ("empty", "archive"):
        with pytest.raises(ValueError, match=rf"{name}\.npy cannot be read as an array"):
            open_raster(tmp_path / f"{name}.npy")


def test_a_tile_that_cannot_be_decoded_is_an_error_that_names_the_file(picture, tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", picture, photometric="rgb", tile=(64, 64), compression="zlib")
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        place = file.pages.first.dataoffsets[-1]
    with open(tmp_path / "a.tif", "r+b") as file:
        file.seek(place)
        file.write(b"not compressed")
    raster = open_raster(tmp_path / "a.tif")
    np.testing.assert_array_equal(raster[:64, :64], picture[:64, :64])
    with pytest.raises(ValueError, match=r"a\.tif cannot be read as a TIFF"):
        raster[:, :]


@pytest.mark.parametrize("place", range(8, 24))
def test_a_broken_header_of_an_array_is_named(tmp_path, place):
    np.save(tmp_path / "a.npy", np.zeros((3, 4)))
    content = bytearray((tmp_path / "a.npy").read_bytes())
    content[place : place + 4] = b"(((("
    (tmp_path / "a.npy").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.npy cannot be read as an array .*numpy\.save"):
        open_raster(tmp_path / "a.npy")


def test_an_array_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    np.save(tmp_path / "a.npy", np.zeros((3, 4)))
    denied = PermissionError(13, "Permission denied")
    monkeypatch.setattr("builtins.open", lambda *args, **options: (_ for _ in ()).throw(denied))
    with pytest.raises(ValueError, match=r"a\.npy cannot be opened: Permission denied"):
        open_raster(tmp_path / "a.npy")


def test_nothing_is_unpickled(tmp_path):
    np.save(tmp_path / "a.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"a\.npy cannot be read as an array"):
        open_raster(tmp_path / "a.npy")


def test_other_suffixes_are_named(tmp_path):
    (tmp_path / "a.png").touch()
    with pytest.raises(ValueError, match=r"expected a \.npy, \.tif or \.tiff file to read by region, got .*a\.png"):
        open_raster(tmp_path / "a.png")


def test_12_bits_reach_white(tmp_path):
    levels = np.array([[0, 2048, 4095, 4095]], np.uint16)
    try:
        tifffile.imwrite(tmp_path / "a.tif", levels, bitspersample=12)
    except (ValueError, RuntimeError) as error:  # the latter of older ones
        pytest.skip(f"imagecodecs here does not write 12 bits: {error}")
    assert open_raster(tmp_path / "a.tif")[0:1, 0:4].tolist() == [[0, 128, 255, 255]]


def test_huge_tiffs_are_told_by_their_pixels(tmp_path, monkeypatch):
    tifffile.imwrite(tmp_path / "a.TIF", np.zeros((200, 300), np.uint8), compression="zlib", tile=(64, 64))
    (tmp_path / "broken.tif").write_bytes(b"II*\0")
    for reader in ("tifffile", "Pillow"):
        if reader == "Pillow":
            without(monkeypatch, "tifffile")
        monkeypatch.setattr(rasters, "_READ_WHOLE", 60_000)
        assert not is_huge_tiff(tmp_path / "a.TIF")
        monkeypatch.setattr(rasters, "_READ_WHOLE", 59_999)
        assert is_huge_tiff(tmp_path / "a.TIF")
        assert not any(is_huge_tiff(tmp_path / name) for name in ("a.npy", "nowhere.tif", "broken.tif"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20_000)
    assert is_huge_tiff(tmp_path / "a.TIF")


@pytest.mark.parametrize("module", ["tifffile", "zarr"])
def test_without_the_extra_the_error_says_what_to_install(tmp_path, monkeypatch, module):
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((20, 30), np.uint8))
    without(monkeypatch, module)
    with pytest.raises(ImportError, match=rf"{module} is not installed; .*pip install 'unetlib\[tiff\]'"):
        open_raster(tmp_path / "a.tif")


# --- writing


def in_bands(array: np.ndarray, *cuts: int):
    return np.split(array, cuts, axis=-2)


@pytest.mark.parametrize("name", ["mask.npy", "mask.tif"])
@pytest.mark.parametrize("size", [(1300, 700), (512, 1024), (5, 3)])
def test_bands_become_a_file(tmp_path, name, size):
    mask = np.random.default_rng(1).integers(0, 5, size, np.uint8)
    assert write_raster(tmp_path / name, size, in_bands(mask, 1, 2, max(3, size[0] // 2))) == tmp_path / name
    read = np.load(tmp_path / name) if name.endswith("npy") else tifffile.imread(tmp_path / name)
    np.testing.assert_array_equal(read, mask)
    np.testing.assert_array_equal(open_raster(tmp_path / name)[1:4, 1:3], mask[1:4, 1:3])
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_tiff_is_tiled_and_any_program_reads_it(tmp_path):
    mask = np.eye(600, 700, dtype=np.uint8)
    write_raster(tmp_path / "mask.tif", mask.shape, in_bands(mask, 100))
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "mask.tif")), mask)
    with tifffile.TiffFile(tmp_path / "mask.tif") as file:
        assert file.pages.first.is_tiled
    assert (tmp_path / "mask.tif").stat().st_size < mask.size / 20


def test_channels_go_into_an_array(tmp_path):
    probabilities = np.random.default_rng(2).random((3, 50, 20), np.float32)
    write_raster(tmp_path / "a.npy", (50, 20), in_bands(probabilities, 7, 30))
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), probabilities)
    with pytest.raises(ValueError, match=r"one value a pixel.*write a \.npy file"):
        write_raster(tmp_path / "a.tif", (50, 20), in_bands(probabilities, 7, 30))
    with pytest.raises(ValueError, match=r"\(2, 25, 20\) follows one of float32 \(3, 25, 20\)"):
        write_raster(tmp_path / "b.npy", (50, 20), [probabilities[:, :25], probabilities[:2, 25:]])


def interrupted():
    yield np.zeros((600, 30), np.uint8)
    raise RuntimeError("out of luck")


@pytest.mark.parametrize("name", ["mask.npy", "mask.tif"])
@pytest.mark.parametrize(
    ("bands", "error", "message"),
    [
        (interrupted, RuntimeError, "out of luck"),
        ([np.zeros((600, 30), np.uint8)] * 3, ValueError, "does not fit into the rest of 1000x30"),
        ([np.zeros((999, 30), np.uint8)], ValueError, "have 999 rows in all, and 1000"),
        ([np.zeros((1000, 31), np.uint8)], ValueError, "does not fit"),
        ([], ValueError, "no bands"),
        ([np.zeros((500, 30), np.uint8), np.zeros((500, 30))], ValueError, "of float64 .* follows one of uint8 .* one dtype"),
    ],
)
def test_nothing_is_written_half_and_what_was_there_stays(tmp_path, name, bands, error, message):
    (tmp_path / name).write_text("before")
    with pytest.raises(error, match=message):
        write_raster(tmp_path / name, (1000, 30), bands() if callable(bands) else bands)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, "before")]


@pytest.mark.parametrize("name", ["mask.npy", "mask.tif"])
def test_a_band_too_many_is_an_error_where_tiles_are_whole_before_it(tmp_path, name):
    with pytest.raises(ValueError, match="does not fit into the rest of 512x30"):
        write_raster(tmp_path / name, (512, 30), [np.zeros((512, 30), np.uint8)] * 2)
    assert not [*tmp_path.iterdir()]


def test_where_nothing_can_be_written_is_said_first(tmp_path, monkeypatch):
    assert check_output("mask.npy") == Path("mask.npy")
    with pytest.raises(ValueError, match=r"expected a \.npy, \.tif or \.tiff file to write, got 'mask\.png'"):
        check_output("mask.png")
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere"):
        check_output(tmp_path / "nowhere" / "mask.npy")
    (tmp_path / "folder.npy").mkdir()
    with pytest.raises(ValueError, match=r"got the folder '.*folder\.npy'; name a file in it"):
        check_output(tmp_path / "folder.npy")
    without(monkeypatch, "tifffile")
    with pytest.raises(ImportError, match=r"pip install 'unetlib\[tiff\]'"):
        check_output(tmp_path / "mask.tif")


def test_the_file_that_a_picture_is_read_from_is_known(picture, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("a.npy", picture)
    np.save("b.npy", picture)
    tifffile.imwrite("a.tif", picture, photometric="rgb")
    mapped = open_raster("a.npy")
    for source in ("a.npy", Path("a.npy"), tmp_path / "a.npy", mapped, mapped[10:20]):
        assert is_read_from(source, "a.npy")
        assert is_read_from(source, tmp_path / "a.npy")
    for source in ("a.tif", open_raster("a.tif"), Image.open("a.tif")):
        assert is_read_from(source, "a.tif")
    for source in ("b.npy", "nowhere.npy", open_raster("b.npy"), picture, Image.fromarray(picture)):
        assert not is_read_from(source, "a.npy")
    assert not is_read_from("a.npy", "nowhere.npy")


def test_a_mapped_array_cannot_be_written_to(picture, tmp_path):
    np.save(tmp_path / "a.npy", picture)
    assert not open_raster(tmp_path / "a.npy").flags.writeable


def test_bigtiff_begins_at_4_gib(tmp_path, monkeypatch):
    asked, writer = [], tifffile.TiffWriter
    monkeypatch.setattr(tifffile, "TiffWriter", lambda path, bigtiff: asked.append(bigtiff) or writer(path, bigtiff=bigtiff))

    def stopped():
        yield np.zeros((1, 2**16), np.int32)
        raise InterruptedError

    for height in (2**14, 2**13):
        with pytest.raises(InterruptedError):
            write_raster(tmp_path / "a.tif", (height, 2**16), stopped())
    assert asked == [True, False]


def test_bands_of_npy_files_may_lie_in_any_order_in_memory(tmp_path):
    band = np.arange(12).reshape(4, 3).T
    np.testing.assert_array_equal(np.load(write_raster(tmp_path / "a.npy", (3, 4), [band])), band)
