from __future__ import annotations

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image, ImageSequence

from unetlib import UNet
from unetlib.imaging import class_of_value, image_size, read_image, read_labels, read_mask, to_tensor

RGB = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
GREY = RGB[..., 0]
SHAPE = np.array([[0, 0, 1, 1], [0, 1, 1, 0], [1, 1, 1, 1]], np.uint8)  # a mask, not symmetric in any direction


def as_the_study_reads_it(path: Path) -> np.ndarray:
    mask = np.array(Image.open(path).convert("L"), dtype=np.float32)
    mask[mask == 255.0] = 1.0
    return mask


def palette_mask(index: np.ndarray, *colors: tuple[int, int, int]) -> Image.Image:
    image = Image.fromarray(index.astype(np.uint8)).convert("L")
    image.putpalette([part for color in colors for part in color])
    return image


def png_16_bit_rgb(array: np.ndarray) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, _ = array.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


# --- pictures


def test_colour_and_grey_are_kept_byte_for_byte(tmp_path):
    Image.fromarray(RGB).save(tmp_path / "rgb.png")
    Image.fromarray(GREY).save(tmp_path / "grey.png")
    rgb, grey = read_image(tmp_path / "rgb.png"), read_image(str(tmp_path / "grey.png"), "L")
    assert rgb.dtype == grey.dtype == np.uint8
    np.testing.assert_array_equal(rgb, RGB)
    np.testing.assert_array_equal(grey, GREY[..., None])
    np.testing.assert_array_equal(read_image(tmp_path / "grey.png"), np.repeat(GREY[..., None], 3, axis=2))


def test_colour_becomes_luma(tmp_path):
    Image.fromarray(RGB).save(tmp_path / "rgb.png")
    luma = RGB @ np.array([0.299, 0.587, 0.114])
    assert np.abs(read_image(tmp_path / "rgb.png", "L")[..., 0] - luma).max() <= 1


def test_alpha_is_dropped_and_the_colour_under_it_stays(tmp_path):
    alpha = np.full(GREY.shape, 3, np.uint8)
    Image.fromarray(np.dstack([RGB, alpha])).save(tmp_path / "rgba.png")
    Image.fromarray(np.dstack([GREY, alpha])).save(tmp_path / "la.png")
    np.testing.assert_array_equal(read_image(tmp_path / "rgba.png"), RGB)
    np.testing.assert_array_equal(read_image(tmp_path / "la.png", "L")[..., 0], GREY)


def test_palette_with_transparency(tmp_path):
    colors = [(10, 20, 30), (200, 100, 50)]
    palette_mask(SHAPE, *colors).save(tmp_path / "p.png", transparency=b"\x00\x80")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = read_image(tmp_path / "p.png")
    np.testing.assert_array_equal(image, np.array(colors)[SHAPE])


def test_one_bit_and_cmyk(tmp_path):
    Image.fromarray(SHAPE.astype(bool)).save(tmp_path / "bit.png")
    Image.new("CMYK", (3, 2), (0, 255, 255, 0)).save(tmp_path / "ink.tif")
    np.testing.assert_array_equal(read_image(tmp_path / "bit.png", "L")[..., 0], SHAPE * 255)
    np.testing.assert_array_equal(read_image(tmp_path / "ink.tif"), np.full((2, 3, 3), (255, 0, 0)))


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_16_bit_grey_is_scaled_and_not_clipped(tmp_path, suffix):
    levels = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    if suffix == "pgm":  # Pillow 10.1 reads it, and does not write it
        (tmp_path / "deep.pgm").write_bytes(b"P5 256 256 65535\n" + levels.astype(">u2").tobytes())
    else:
        Image.fromarray(levels).save(tmp_path / f"deep.{suffix}")
    expected = np.round(levels / 65535 * 255)
    np.testing.assert_array_equal(read_image(tmp_path / f"deep.{suffix}", "L")[..., 0], expected)
    np.testing.assert_array_equal(read_image(tmp_path / f"deep.{suffix}"), np.repeat(expected[..., None], 3, axis=2))


def test_16_bit_big_endian_tiff(tmp_path):
    image = Image.frombytes("I;16B", (2, 1), struct.pack(">HH", 257, 65535))
    image.save(tmp_path / "big.tif")
    assert read_image(tmp_path / "big.tif", "L").tolist() == [[[1], [255]]]


def test_16_bit_colour_is_not_clipped(tmp_path):
    levels = np.random.default_rng(1).integers(0, 65536, (4, 5, 3))
    (tmp_path / "deep.png").write_bytes(png_16_bit_rgb(levels))
    np.testing.assert_array_equal(read_image(tmp_path / "deep.png"), levels >> 8)


def test_12_bit_grey_reaches_white(tmp_path):
    levels = np.array([[0, 2048, 4095]], "<u2")
    tags = {256: 3, 257: 1, 258: 16, 259: 1, 262: 1, 273: 8, 277: 1, 278: 1, 279: 6}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    for bits in (16, 12):  # 12 bits are packed: 000 800 FFF
        data = levels.tobytes() if bits == 16 else bytes.fromhex("000800FFF0")
        stored = entries.replace(struct.pack("<HHII", 258, 4, 1, 16), struct.pack("<HHII", 258, 4, 1, bits))
        head = b"II*\0" + struct.pack("<I", 16) + data.ljust(8, b"\0")
        (tmp_path / f"{bits}.tif").write_bytes(head + struct.pack("<H", len(tags)) + stored + bytes(4))
    assert read_image(tmp_path / "12.tif", "L")[..., 0].tolist() == [[0, 128, 255]]
    with pytest.warns(UserWarning, match="uses 12 or fewer of its 16 bits"):
        assert read_image(tmp_path / "16.tif", "L")[..., 0].tolist() == [[0, 8, 16]]
    with Image.open(tmp_path / "12.tif") as image:
        assert read_image(image, "L")[..., 0].tolist() == [[0, 128, 255]]


DEEP = np.arange(4096, dtype=np.uint16).reshape(64, 64)


@pytest.mark.parametrize("source", ["grey.png", "grey.tif", "colour.png", "colour.tif", Image.fromarray(DEEP)])
def test_12_bits_in_16_become_nearly_black_with_a_warning(tmp_path, source):
    def save(name: str, levels: np.ndarray) -> Path:
        if name == "colour.png":
            (tmp_path / name).write_bytes(png_16_bit_rgb(levels))
        else:
            tifffile.imwrite(tmp_path / name, levels) if name == "colour.tif" else Image.fromarray(levels).save(tmp_path / name)
        return tmp_path / name

    colour = np.repeat(DEEP[..., None], 3, axis=2)
    if isinstance(source, str):
        levels = colour if source.startswith("colour") else DEEP
        source = save(source, levels)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for other in (levels * 0, levels + (levels == 4095), levels * 16):
                read_image(save(source.name, other))
        save(source.name, levels)
    with pytest.warns(UserWarning, match=r"no value above 4095: it uses 12 .* torch\.from_numpy\(picture / 4095\)") as said:
        assert read_image(source).max() <= 16
    assert len(said) == 1


def test_one_bright_channel_is_no_dark_picture(tmp_path):
    levels = np.zeros((4, 5, 3), np.uint16)
    levels[..., 2] = 30000  # its share of the luma is 0.114
    (tmp_path / "blue.png").write_bytes(png_16_bit_rgb(levels))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_image(tmp_path / "blue.png", "L").max() < 16
        assert read_image(tmp_path / "blue.png").max() == 117


def test_predict_takes_the_tensor_that_the_warning_names():
    with pytest.warns(UserWarning, match="uses 12 or fewer") as said:
        read_image(Image.fromarray(DEEP))
    tensor = eval(str(said[0].message).rpartition("of a grey picture ")[2], {"torch": torch, "picture": DEEP})
    assert tensor.max() == 1
    for channels in (1, 3):
        assert UNet(in_channels=channels, features=(2,)).predict(tensor).shape == DEEP.shape


def test_a_picture_of_too_many_pixels_for_pillow_is_told_how_to_open_it(tmp_path, monkeypatch):
    Image.new("1", (200, 200)).save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    with pytest.raises(ValueError, match=r"x\.png has more pixels than Pillow opens.*MAX_IMAGE_PIXELS = None first") as error:
        read_mask(tmp_path / "x.png")
    assert "Replace" not in str(error.value)


@pytest.mark.parametrize(("dtype", "words"), [(np.float32, "floating-point"), (np.int32, "signed or 32-bit integers")])
def test_numbers_of_unknown_range_are_refused(tmp_path, dtype, words):
    Image.fromarray(np.full((2, 2), 300, dtype)).save(tmp_path / "x.tif")
    with pytest.raises(ValueError, match=rf"x\.tif holds {words}.*0\.\.255"):
        read_image(tmp_path / "x.tif")


def test_signed_bytes_are_no_bytes(tmp_path):
    labels = np.array([[-1, 0, 1], [1, 0, 0]], np.int8)
    for orientation, upright in ((1, labels), (6, np.rot90(labels, -1))):
        tifffile.imwrite(tmp_path / "x.tif", labels, extratags=[(274, 3, 1, orientation, True)])
        with pytest.raises(ValueError, match=r"x\.tif holds signed or 32-bit integers, whose range is unknown"):
            read_image(tmp_path / "x.tif")
        np.testing.assert_array_equal(read_mask(tmp_path / "x.tif", {-1: 255, 0: 0, 1: 1}), upright.astype(np.uint8))


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, lambda a: a),
        (2, lambda a: a[:, ::-1]),
        (3, lambda a: a[::-1, ::-1]),
        (4, lambda a: a[::-1]),
        (5, lambda a: a.swapaxes(0, 1)),
        (6, lambda a: np.rot90(a, -1)),
        (7, lambda a: a[::-1, ::-1].swapaxes(0, 1)),
        (8, lambda a: np.rot90(a)),
    ],
)
def test_exif_orientation(tmp_path, suffix, orientation, upright):
    stored = np.zeros((32, 48, 3), np.uint8)
    stored[:16, :24] = (255, 255, 255)  # whole JPEG blocks, so that JPEG keeps them exactly
    stored[16:, :16] = (128, 128, 128)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"turned.{suffix}"
    Image.fromarray(stored).save(path, exif=exif)
    np.testing.assert_allclose(read_image(path), upright(stored), atol=1)
    assert image_size(path) == upright(stored).shape[:2]
    with Image.open(path) as image:
        image.load()
        assert image_size(image) == upright(stored).shape[:2]
    Image.fromarray(stored[..., 0]).save(path, exif=exif)
    np.testing.assert_allclose(read_image(path, "L")[..., 0], upright(stored)[..., 0], atol=1)
    if suffix != "jpg":
        np.testing.assert_array_equal(read_mask(path, "nonzero"), upright(stored)[..., 0] > 0)


def exif_of(*entries: tuple[int, int, int, int]) -> bytes:
    """EXIF of tags, their types, counts and values, which Pillow would not write."""
    tags = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + tags + bytes(4)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize(
    ("exif", "turns"),
    [
        (exif_of((0x0112, 3, 1, 6), (296, 2, 2, 0x32)), -1),  # the unit of resolution as text
        (exif_of((0x0112, 3, 1, 8), (531, 4, 1, 2**16)), 1),
        (b"Exif\0\0no header", 0),
        (b"Exif\0\0II*\0", 0),
    ],
    ids=["text for a number", "too large a number", "no header", "cut off"],
)
def test_broken_exif_does_not_spoil_a_picture(tmp_path, suffix, exif, turns):
    image = Image.fromarray(np.kron(RGB[:2, :3], np.ones((16, 16, 1), np.uint8)))
    image.save(tmp_path / f"odd.{suffix}", exif=exif)
    image.save(tmp_path / f"plain.{suffix}")
    expected = np.rot90(read_image(tmp_path / f"plain.{suffix}"), turns)
    np.testing.assert_array_equal(read_image(tmp_path / f"odd.{suffix}"), expected)
    assert image_size(tmp_path / f"odd.{suffix}") == expected.shape[:2]


def test_an_open_picture_is_read_like_its_file_and_left_alone(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(RGB).save(tmp_path / "x.png", exif=exif)
    with Image.open(tmp_path / "x.png") as image:
        np.testing.assert_array_equal(read_image(image), np.rot90(RGB, -1))
        assert image.size == (7, 5)
        assert image.getexif()[0x0112] == 6


def test_the_array_is_writable():
    read_image(Image.fromarray(RGB))[0, 0] = 0


def test_a_tensor_may_be_written_to_and_shares_memory_that_may_be():
    fixed = RGB.copy()
    assert to_tensor(fixed)[0, 0, 0].data_ptr() == fixed.ctypes.data
    fixed.flags.writeable = False
    for array in (fixed, RGB[::-1], RGB[..., 0]):
        tensor = to_tensor(array)
        np.testing.assert_array_equal(tensor, array.transpose(2, 0, 1) if array.ndim == 3 else array[None])
        assert tensor.permute(1, 2, 0).is_contiguous()
    to_tensor(fixed).zero_()
    np.testing.assert_array_equal(fixed, RGB)


def test_several_frames_are_refused(tmp_path):
    frames = [Image.fromarray(np.full((4, 4), v, np.uint8)) for v in (0, 100, 200)]
    for name in ("stack.tif", "film.gif"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        with pytest.raises(ValueError, match=rf"{name} holds 3 frames; save each .*or give predict .*\.read_image\(frame\)"):
            read_image(tmp_path / name)
    with Image.open(tmp_path / "stack.tif") as stack:  # an open one is at the frame its owner chose
        stack.seek(1)
        assert (read_image(stack) == 100).all()


def test_a_phone_picture_with_a_preview_behind_it_is_one_picture(tmp_path):
    Image.new("RGB", (8, 8), "white").save(
        tmp_path / "x.jpg", format="MPO", save_all=True, append_images=[Image.new("RGB", (4, 4))]
    )
    np.testing.assert_array_equal(read_image(tmp_path / "x.jpg"), np.full((8, 8, 3), 255))


def test_unreadable_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*nothing\.png"):
        read_image(tmp_path / "nothing.png")
    (tmp_path / "text.png").write_text("not a picture")
    with pytest.raises(ValueError, match=r"text\.png cannot be read as a picture \(.*\)\. Replace or remove it\.$"):
        read_image(tmp_path / "text.png")
    Image.fromarray(np.random.default_rng(2).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(tmp_path / "half.jpg")
    whole = (tmp_path / "half.jpg").read_bytes()
    (tmp_path / "half.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"half\.jpg cannot be read.*truncated"):
        read_image(tmp_path / "half.jpg")
    with pytest.raises(ValueError, match="mode must be"):
        read_image(tmp_path / "half.jpg", "RGBA")


def test_masks_of_64_bit_integers_are_told_how_to_be_saved(tmp_path):
    labels, path = np.arange(12).reshape(3, 4), tmp_path / "labels.TIF"
    tifffile.imwrite(path, labels)
    with pytest.raises(ValueError, match=r"of 64 bits, .*, save array\.astype\(numpy\.uint16\) instead\.$"):
        read_mask(path, range(12))
    tifffile.imwrite(path, labels.astype(np.uint16))
    np.testing.assert_array_equal(read_mask(path, range(12)), labels)


def test_what_is_no_path_is_named_by_its_type():
    for source in (RGB, torch.zeros(3, 4, 5), None):
        for read in (read_image, read_mask, image_size):
            with pytest.raises(TypeError, match=rf"or a PIL picture, not a {type(source).__name__}; .*Image\.fromarray"):
                read(source)


def test_bytes_of_a_file_are_read_as_an_open_file():
    file = io.BytesIO()
    Image.fromarray(RGB).save(file, "PNG")
    assert image_size(file) == RGB.shape[:2]
    np.testing.assert_array_equal(read_image(file), RGB)  # again, from its beginning
    assert not file.closed
    with pytest.raises(ValueError, match=r"^the given file cannot be read as a picture"):
        read_image(io.BytesIO(b"no picture"))
    for data in (file.getvalue(), bytearray(file.getvalue())):
        with pytest.raises(TypeError, match=rf"not a {type(data).__name__}; of a file's bytes: io\.BytesIO\(them\)$"):
            read_image(data)


def test_files_that_may_be_sound_are_not_to_be_removed(tmp_path, monkeypatch):
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(ValueError, match=r"folder\.png is a folder; give a file in it"):
        read_image(tmp_path / "folder.png")

    def fail(source):
        raise errors.pop()

    errors = [MemoryError(), OSError(24, "Too many open files", "a.png")]
    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(ValueError, match=r"a\.png cannot be opened: Too many open files$"):
        read_image(tmp_path / "a.png")
    with pytest.raises(MemoryError, match=r"too little memory for .*a\.png; free some, or reduce the picture$"):
        read_image(tmp_path / "a.png")


def test_a_mode_without_a_reading_as_colour_is_named():
    with pytest.raises(ValueError, match=r"the given picture has the mode 'LAB'.*PNG"):
        read_image(Image.new("LAB", (2, 2)), "L")


def test_grey_that_transparency_was_multiplied_into_is_divided_by_it(tmp_path):
    image = Image.new("La", (1, 1))
    image.putpixel((0, 0), (50, 128))
    for mode in ("L", "RGB"):
        assert {*read_image(image, mode).flat} == {99}


@pytest.mark.parametrize("values", [None, "nonzero", (0, 1), ((0, 0, 0), (9, 9, 9))])
@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_a_mask_that_is_drawn_in_transparency_alone_is_not_empty(tmp_path, mode, values):
    mask = Image.new(mode, (4, 3))
    mask.putalpha(Image.fromarray(SHAPE * 255))
    mask.save(tmp_path / "x.png")
    with pytest.raises(ValueError, match=r"x\.png has its shape in its transparency alone.*getchannel\('A'\)$"):
        read_mask(tmp_path / "x.png", values)
    np.testing.assert_array_equal(read_mask(Image.open(tmp_path / "x.png").getchannel("A")), SHAPE)
    mask.putalpha(9)
    assert not read_mask(mask, values).any()


def test_what_a_palette_leaves_out_is_black():
    mask = Image.new("P", (2, 1))
    mask.putpalette([255, 255, 255])
    mask.putdata([0, 1])
    assert read_mask(mask).tolist() == [[1, 0]]


def test_an_index_counts_beside_transparency():
    mask = Image.new("P", (2, 1))
    mask.putpalette([0, 0, 0, 9, 9, 9, 0, 0, 0])
    mask.putdata([2, 1])
    assert read_mask(mask.convert("PA"), (0, 1, 2)).tolist() == [[2, 1]]


def test_an_index_counts_where_all_look_alike_beside_transparency(tmp_path):
    mask = palette_mask(np.array([[0, 1]]), (0, 0, 0), (0, 0, 0))
    mask.convert("PA").save(tmp_path / "mask.tif")
    for source in (mask, tmp_path / "mask.tif"):
        assert read_mask(source).tolist() == [[0, 1]]


@pytest.mark.parametrize("levels", [(0, 1000, 2048, 4095), (0, 20000, 65535)])
def test_the_pages_of_a_stack_are_read_as_files_of_their_own_would_be(tmp_path, levels):
    """By the way that the error names; `Image.copy` would lose what the tags say."""
    page = np.array([levels], np.uint16)
    kinds = {"photometric": "miniswhite" if max(levels) > 4095 else "minisblack"}
    tifffile.imwrite(tmp_path / "one.tif", page, **kinds)
    with tifffile.TiffWriter(tmp_path / "stack.tif") as stack:
        for pixels in (page, page[:, ::-1]):
            stack.write(pixels, contiguous=False, metadata=None, **kinds)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 12 of 16 bits are nearly black
        one = read_image(tmp_path / "one.tif", "L")
        pages = [read_image(frame, "L") for frame in ImageSequence.Iterator(Image.open(tmp_path / "stack.tif"))]
    assert [page.tolist() for page in pages] == [one.tolist(), one[:, ::-1].tolist()]


# --- reduced while decoding


def smooth_jpeg(path: Path, width: int, height: int, **options: object) -> Image.Image:
    coarse = Image.fromarray(np.random.default_rng(4).integers(0, 256, (9, 12, 3), dtype=np.uint8))
    coarse.resize((width, height), Image.Resampling.BICUBIC).save(path, quality=95, **options)
    return Image.open(path)


@pytest.mark.parametrize(
    ("min_size", "shape"),
    [
        ((240, 320), (240, 320)),
        ((241, 320), (480, 640)),
        ((121, 160), (121, 160)),
        ((120, 160), (120, 160)),
        ((60, 80), (60, 80)),
        ((15, 20), (15, 20)),
        ((30, 200), (30, 200)),
        ((5000, 1), (480, 640)),
    ],
)
def test_a_jpeg_is_decoded_no_larger_than_needed(tmp_path, min_size, shape):
    smooth_jpeg(tmp_path / "x.jpg", 640, 480)
    reduced = read_image(tmp_path / "x.jpg", min_size=min_size)
    assert reduced.shape == (*shape, 3)
    whole = Image.fromarray(read_image(tmp_path / "x.jpg")).resize(shape[::-1], Image.Resampling.BILINEAR)
    assert np.abs(reduced.astype(int) - np.asarray(whole)).mean() < 1.5


@pytest.mark.parametrize("orientation", [1, 3, 6])
@pytest.mark.parametrize(("shape", "size"), [((505, 505), (63, 63)), ((1280, 1918), (160, 240)), ((321, 481), (160, 240))])
def test_what_a_jpeg_shows_stays_in_its_place(tmp_path, shape, size, orientation):
    lines = np.zeros(shape, np.uint8)
    lines[:, int(0.9 * shape[1]) :] = 255
    lines[int(0.9 * shape[0]) :] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = {1: lines, 3: np.rot90(lines, 2), 6: np.rot90(lines)}[orientation]
    Image.fromarray(stored.copy()).save(tmp_path / "x.jpg", quality=100, exif=exif)
    assert image_size(tmp_path / "x.jpg") == shape
    reduced = read_image(tmp_path / "x.jpg", "L", min_size=size)[..., 0]
    dark = 1 - reduced / 255
    np.testing.assert_allclose(dark[0].sum(), size[1] * int(0.9 * shape[1]) / shape[1], atol=0.05)
    np.testing.assert_allclose(dark[:, 0].sum(), size[0] * int(0.9 * shape[0]) / shape[0], atol=0.05)


def test_a_turned_jpeg_is_reduced_as_it_will_lie(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    smooth_jpeg(tmp_path / "x.jpg", 640, 480, exif=exif)
    assert image_size(tmp_path / "x.jpg") == (640, 480)
    assert image_size(tmp_path / "x.jpg", upright=False) == (480, 640)
    assert read_image(tmp_path / "x.jpg", min_size=(320, 240)).shape == (320, 240, 3)
    assert read_image(tmp_path / "x.jpg", min_size=(240, 240)).shape == (240, 240, 3)
    assert read_image(tmp_path / "x.jpg", "L", min_size=(80, 60)).shape == (80, 60, 1)


def test_other_formats_and_open_pictures_stay_whole(tmp_path):
    with smooth_jpeg(tmp_path / "x.jpg", 640, 480) as image:
        assert read_image(image, min_size=(60, 80)).shape == (480, 640, 3)
        image.save(tmp_path / "x.png")
    np.testing.assert_array_equal(read_image(tmp_path / "x.png", min_size=(60, 80)), read_image(tmp_path / "x.jpg"))
    for size, error in (((0, 5), ValueError), ((5,), TypeError), ((5.0, 5), TypeError), (5, TypeError)):
        with pytest.raises(error, match="min_size="):
            read_image(tmp_path / "x.png", min_size=size)


def test_the_size_of_what_is_no_picture(tmp_path):
    (tmp_path / "x.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"x\.png cannot be read as a picture"):
        image_size(tmp_path / "x.png")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        image_size(tmp_path / "y.png")


# --- masks

MASKS = {
    "palette_0_1.png": palette_mask(SHAPE, (0, 0, 0), (255, 255, 255)),
    "palette_0_1.gif": palette_mask(SHAPE, (0, 0, 0), (255, 255, 255)),
    "palette_0_255.png": palette_mask(SHAPE * 255, *[(v, v, v) for v in range(256)]),
    "palette_0_255.gif": palette_mask(SHAPE * 255, *[(v, v, v) for v in range(256)]),
    "palette_white_first.png": palette_mask(1 - SHAPE, (255, 255, 255), (0, 0, 0)),
    "palette_white_first.gif": palette_mask(1 - SHAPE, (255, 255, 255), (0, 0, 0)),
    "grey_0_255.png": Image.fromarray(SHAPE * 255),
    "grey_0_255.gif": Image.fromarray(SHAPE * 255),
    "grey_0_1.png": Image.fromarray(SHAPE),
    "one_bit.png": Image.fromarray(SHAPE.astype(bool)),
    "one_bit.gif": Image.fromarray(SHAPE.astype(bool)),
    "one_bit.pbm": Image.fromarray(SHAPE.astype(bool)),
}
MASKS_THE_STUDY_MISREADS = {
    "grey_0_2.png": Image.fromarray(SHAPE * 2),
    "palette_dark_blue.png": palette_mask(SHAPE, (0, 0, 0), (0, 0, 1)),
    "palette_red.png": palette_mask(SHAPE, (0, 0, 0), (128, 0, 0)),
    "palette_all_black.png": palette_mask(SHAPE, (0, 0, 0), (0, 0, 0)),
    "rgb.png": Image.fromarray(SHAPE[..., None] * np.array([200, 10, 0], np.uint8)),
    "rgba.png": Image.fromarray(np.dstack([SHAPE * 255] * 3 + [np.full_like(SHAPE, 7)])),
    "red_brush.png": Image.fromarray(np.dstack([SHAPE * 200, SHAPE * 0, SHAPE * 0, SHAPE * 255])),
    "grey_alpha.png": Image.fromarray(np.dstack([SHAPE * 255, SHAPE])),
    "deep.png": Image.fromarray(SHAPE.astype(np.uint16) * 300),
    "float.tif": Image.fromarray(SHAPE.astype(np.float32) / 2),
    "long.tif": Image.fromarray(SHAPE.astype(np.int32) * -70000),
}


@pytest.mark.parametrize("name", MASKS)
def test_every_form_of_a_binary_mask(tmp_path, name):
    MASKS[name].save(tmp_path / name)
    mask = read_mask(tmp_path / name)
    assert mask.dtype == np.float32
    np.testing.assert_array_equal(mask, SHAPE)
    np.testing.assert_array_equal(mask, as_the_study_reads_it(tmp_path / name))
    np.testing.assert_array_equal(read_mask(tmp_path / name, "nonzero"), SHAPE)
    labels = read_labels(tmp_path / name)
    assert labels.dtype == np.bool_
    np.testing.assert_array_equal(labels, SHAPE)


@pytest.mark.parametrize("name", MASKS_THE_STUDY_MISREADS)
def test_forms_of_a_binary_mask_that_luma_misreads(tmp_path, name):
    MASKS_THE_STUDY_MISREADS[name].save(tmp_path / name)
    np.testing.assert_array_equal(read_mask(tmp_path / name), SHAPE)


@pytest.mark.parametrize("value", [0, 1])
@pytest.mark.parametrize("suffix", ["gif", "png"])
def test_a_mask_of_one_value(tmp_path, value, suffix):
    # Optimizing, Pillow writes a full mask with one palette entry, white, as index 0.
    image = palette_mask(np.full((3, 4), value), (0, 0, 0), (255, 255, 255))
    image.save(tmp_path / f"x.{suffix}", optimize=True)
    assert (read_mask(tmp_path / f"x.{suffix}") == value).all()


@pytest.mark.parametrize(
    ("image", "found"),
    [
        (Image.fromarray(np.array([[0, 1, 255]], np.uint8)), "the values 0, 1, 255, but"),
        (Image.fromarray(np.array([[7, 200]], np.uint8)), "the values 7, 200, but"),
        (Image.fromarray(np.arange(9, dtype=np.uint8)[None]), r"the values 0, 1, 2, 3, 4, 5, \.\.\. \(9 in all\), but"),
        (Image.fromarray(np.array([[0, 1, np.nan]], np.float32)), "the values 0.0, 1.0, nan, but"),
        (Image.fromarray(np.array([[0, -1, -2, 0]], np.int32)), "the values -2, -1, 0, but"),
        (
            Image.fromarray(np.array([[(0, 0, 0), (9, 0, 0), (0, 8, 0)]], np.uint8)),
            r"the colours \(0, 0, 0\), \(0, 8, 0",
        ),
        (palette_mask(np.array([[0, 1, 2]]), (0, 0, 0), (1, 2, 3), (4, 5, 6)), r"the colours \(0, 0, 0\), \(1, 2, 3\)"),
    ],
)
def test_a_binary_mask_of_three_values_is_refused(tmp_path, image, found):
    path = tmp_path / "odd.tif"
    image.save(path)
    with pytest.raises(ValueError, match=rf"odd\.tif holds {found}") as error:
        read_mask(path)
    assert ("(--mask-values, of numbers alone)" in str(error.value)) == ("colours" in found)
    np.testing.assert_array_equal(read_mask(path, "nonzero"), (np.array(image).reshape(1, image.width, -1) != 0).any(2))


def test_classes_by_value_for_any_depth_and_order(tmp_path):
    rng = np.random.default_rng(3)
    index = rng.integers(0, 3, (6, 5))
    for values in ([0, 128, 255], [255, 0, 7], [3, 300, 60000]):
        stored = np.array(values)[index].astype(np.uint16 if max(values) > 255 else np.uint8)
        Image.fromarray(stored).save(tmp_path / "x.png")
        classes = read_mask(tmp_path / "x.png", values)
        assert classes.dtype == np.int64
        np.testing.assert_array_equal(classes, index)


def test_classes_by_palette_index_or_by_colour(tmp_path):
    index = np.array([[0, 1, 2], [2, 1, 0]])
    colors = [(0, 0, 0), (128, 0, 0), (0, 128, 0)]
    palette_mask(index, *colors).save(tmp_path / "p.png")
    Image.fromarray(np.array(colors, np.uint8)[index]).save(tmp_path / "rgb.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "p.png", range(3)), index)
    np.testing.assert_array_equal(read_mask(tmp_path / "p.png", colors), index)
    np.testing.assert_array_equal(read_mask(tmp_path / "rgb.png", [list(color) for color in colors]), index)
    np.testing.assert_array_equal(
        read_mask(tmp_path / "rgb.png", dict(zip(colors, (5, 0, 5), strict=True))), index % 2 * -5 + 5
    )


@pytest.mark.parametrize("areas", [1, 7])
def test_classes_of_areas_and_of_single_pixels_in_every_form(areas):
    index = np.kron(np.random.default_rng(5).integers(0, 3, (6, 5)), np.ones((areas, areas), int))
    numbers, colors = (7, 0, 200), [(9, 0, 0), (0, 0, 9), (9, 0, 9)]
    grey = np.array(numbers, np.uint8)[index]
    palette, rgb = palette_mask(index, *colors), Image.fromarray(np.array(colors, np.uint8)[index])
    forms = [(Image.fromarray(grey), numbers), (Image.fromarray(np.repeat(grey[..., None], 3, axis=2)), numbers)]
    forms += [(Image.fromarray(grey), [(number,) * 3 for number in numbers]), (Image.fromarray(grey.astype(float)), numbers)]
    forms += [(Image.fromarray(grey * np.uint16(300)), [300 * number for number in numbers]), (palette, range(3))]
    forms += [(image, colors) for image in (palette, palette.convert("PA"), rgb, rgb.convert("RGBA"))]
    for image, values in forms:
        np.testing.assert_array_equal(read_labels(image, values), index, image.mode)


def test_what_a_palette_leaves_out_is_black_among_colours_of_classes():
    mask = palette_mask(np.array([[0, 1]]), (255, 255, 255))
    assert read_labels(mask, [(0, 0, 0), (255, 255, 255)]).tolist() == [[1, 0]]


@pytest.mark.parametrize(("aside", "dtype"), [(255, np.uint8), (256, np.int64)])
def test_labels_are_as_narrow_as_their_classes(aside, dtype):
    image = Image.fromarray(np.array([[0, 1, 255]], np.uint8))
    labels = read_labels(image, {0: 0, 1: 1, 255: aside})
    assert labels.dtype == dtype
    assert labels.tolist() == [[0, 1, aside]]


def test_several_colours_of_foreground_where_any_count():
    image = palette_mask(np.array([[0, 1, 2, 3]]), (0, 0, 0), (9, 0, 0), (0, 0, 0), (0, 9, 0))
    assert read_labels(image, "nonzero").tolist() == [[False, True, False, True]]


def test_classes_by_mapping_can_set_a_value_aside():
    image = Image.fromarray(np.array([[0, 1, 255]], np.uint8))
    assert read_mask(image, {0: 0, 1: 1, 255: 255}).tolist() == [[0, 1, 255]]


def test_grey_saved_as_rgb_has_numbers_and_colour_has_none():
    assert read_mask(Image.fromarray(np.array([[[1] * 3, [0] * 3]], np.uint8)), (0, 1)).tolist() == [[1, 0]]
    with pytest.raises(ValueError, match=r"colour \(1, 2, 3\), but mask_values names integers"):
        read_mask(Image.new("RGB", (2, 2), (1, 2, 3)), (0, 1))
    assert read_mask(Image.fromarray(SHAPE.astype(bool)), (0, 1)).tolist() == SHAPE.tolist()


def test_a_value_that_is_no_class_is_named(tmp_path):
    Image.fromarray(np.array([[0, 1, 3, 9]], np.uint8)).save(tmp_path / "x.png")
    with pytest.raises(ValueError, match=r"x\.png holds .* 3, 9, which mask_values=\(0, 1, 2\) does not name\. .*--ignore"):
        read_mask(tmp_path / "x.png", (0, 1, 2))
    with pytest.raises(ValueError, match=r"the given picture holds the colour \(9, 9, 9\), which"):
        read_mask(Image.new("L", (2, 2), 9), [(0, 0, 0), (1, 1, 1)])


def test_classes_are_never_guessed_from_rounded_numbers(tmp_path):
    deep = np.array([[0, 32896, 65535]], np.uint16)
    for mask in (Image.fromarray(deep), Image.fromarray(deep.astype(np.int32)), Image.fromarray(deep.astype(np.float32))):
        with pytest.raises(ValueError, match="holds numbers, but mask_values names colours"):
            read_mask(mask, ((0, 0, 0), (128, 128, 128), (255, 255, 255)))
    (tmp_path / "x.png").write_bytes(png_16_bit_rgb(np.array([[[0, 0, 0], [1, 1, 1]]])))  # Pillow would read 0 and 0
    for values in (None, "nonzero", (0, 1)):
        with pytest.raises(ValueError, match=r"x\.png has 16-bit colour.*16-bit grey"):
            read_mask(tmp_path / "x.png", values)


@pytest.mark.parametrize(("bands", "photometric"), [(4, "rgb"), (5, "rgb"), (2, "minisblack")])
def test_bands_beside_colour_and_alpha_are_not_dropped(tmp_path, bands, photometric):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, bands), np.uint8)
    kinds = {"photometric": photometric, "planarconfig": "contig"}
    tifffile.imwrite(tmp_path / "x.tif", pixels, extrasamples=["unspecified"] * (bands - (3 if bands > 3 else 1)), **kinds)
    reason = rf"has {bands} bands, of which not all would be read" + (bands == 2) * "|cannot be read"  # by Pillow 10.1
    for read in (read_image, read_mask):
        with pytest.raises(ValueError, match=rf"x\.tif ({reason})"):
            read(tmp_path / "x.tif")
    if bands == 4:
        tifffile.imwrite(tmp_path / "x.tif", pixels, extrasamples=["unassalpha"], **kinds)
        np.testing.assert_array_equal(read_image(tmp_path / "x.tif"), pixels[..., :3])


def test_bools_of_tifffile_are_not_turned_round(tmp_path):
    """It declares their 0 to be white, unlike that of other numbers, and unlike Pillow."""
    tifffile.imwrite(tmp_path / "x.tif", SHAPE.astype(bool))
    for values in (None, "nonzero", (0, 1)):
        with pytest.raises(ValueError, match=r"x\.tif holds bools of tifffile.*True would be background\. Save mask\.astype"):
            read_mask(tmp_path / "x.tif", values)
    tifffile.imwrite(tmp_path / "x.tif", SHAPE.astype(bool), photometric="minisblack")
    np.testing.assert_array_equal(read_mask(tmp_path / "x.tif"), SHAPE)
    Image.fromarray(SHAPE.astype(bool)).save(tmp_path / "x.tif", tiffinfo={262: 0})  # scanners' way: white is the shape
    np.testing.assert_array_equal(read_mask(tmp_path / "x.tif"), SHAPE)


def test_numpy_gives_values_and_classes():
    mask = Image.fromarray(np.array([[0, 128, 255]], np.uint8))
    assert read_mask(mask, np.unique(np.asarray(mask))).tolist() == [[0, 1, 2]]
    assert read_mask(mask, dict(zip((0, 128, 255), np.arange(3), strict=True))).tolist() == [[0, 1, 2]]
    with pytest.raises(TypeError, match="mask_values must hold integers"):
        read_mask(mask, np.array([0.5, 1.5]))


def test_binary_values_have_no_classes():
    assert class_of_value(None) is None
    assert class_of_value("nonzero") is None


@pytest.mark.parametrize(
    ("mask_values", "error", "message"),
    [
        ("binary", TypeError, "'binary'"),
        (3, TypeError, "3"),
        ((0, 1.5), TypeError, "1.5"),
        (((0, 0, 0), (0, 0, 256)), TypeError, "256"),
        (((0, 0), (1, 1)), TypeError, r"\(0, 0\)"),
        ((0, 0), ValueError, "twice"),
        ((0,), ValueError, "two or more"),
        ((0, (1, 2, 3)), ValueError, "all integers or all colours"),
        ({0: 0, 1: -1}, ValueError, "class -1"),
        ({0: 0, 1: 0.5}, ValueError, "class 0.5"),
    ],
)
def test_impossible_mask_values(mask_values, error, message):
    with pytest.raises(error, match=message):
        class_of_value(mask_values)


@pytest.mark.parametrize("mode", ["L", "I;16", "RGBA"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_open_tiff_is_turned_as_its_file_is(tmp_path, mode, orientation):
    pixels = np.arange(6, dtype=np.uint16 if mode == "I;16" else np.uint8).reshape(2, 3) * (9000 if mode == "I;16" else 40)
    pixels = np.stack([pixels] * 3 + [np.full_like(pixels, 255)], axis=-1) if mode == "RGBA" else pixels
    Image.fromarray(pixels).save(tmp_path / "a.tif", tiffinfo={274: orientation})
    with Image.open(tmp_path / "a.tif") as image:
        np.testing.assert_array_equal(read_image(image), read_image(tmp_path / "a.tif"))
        assert image.filename == str(tmp_path / "a.tif")


def test_sixteen_bits_that_pillow_reads_wrongly_are_mended_or_refused(tmp_path):
    grey, colour = np.arange(6, dtype=np.uint16).reshape(2, 3) * 9000, np.ones((3, 2, 3), np.uint16)
    tifffile.imwrite(tmp_path / "white.tif", grey, photometric="miniswhite")
    tifffile.imwrite(tmp_path / "planes.tif", colour, photometric="rgb", planarconfig="separate")
    np.testing.assert_array_equal(read_mask(tmp_path / "white.tif", mask_values=range(65536)), 65535 - grey.astype(int))
    assert read_image(tmp_path / "white.tif", "L")[0, 0, 0] == 255
    for read in (read_image, read_mask):
        with pytest.raises(ValueError, match=r"planes\.tif has 16-bit colour"):
            read(tmp_path / "planes.tif")
