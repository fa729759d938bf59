import struct
import zlib

import numpy as np
import pytest
from PIL import Image, features

from vitarium.tools._common import read_image


def _pixels(path):
    image = read_image(str(path))
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr"])
def test_every_mode_becomes_the_rgb_that_a_viewer_shows(mode, photo, tmp_path):
    path = tmp_path / ("x.tif" if mode in ("CMYK", "YCbCr", "LA") else "x.png")
    saved = Image.open(photo).convert(mode)
    saved.save(path)
    try:
        Image.open(path).load()
    except OSError:  # before Pillow 13
        assert mode == "YCbCr"
        pytest.skip("this Pillow cannot read what it wrote")
    assert np.array_equal(_pixels(path), np.asarray(saved.convert("RGB")))


@pytest.mark.parametrize("name", ["x.png", "x.tif"])
def test_sixteen_bit_grey_is_scaled(name, tmp_path):
    deep = np.array([[0, 257, 128 * 257, 65535]], dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / name)
    assert _pixels(tmp_path / name).tolist() == [[[v] * 3 for v in (0, 1, 128, 255)]]


@pytest.mark.parametrize("palette", [False, True])
def test_what_is_transparent_lies_over_white(palette, tmp_path):
    image = Image.new("RGBA", (2, 1), (10, 20, 30, 255))
    image.putpixel((1, 0), (10, 20, 30, 0))
    if palette:
        image = image.quantize(4)
    image.save(tmp_path / "x.png")
    assert _pixels(tmp_path / "x.png").tolist() == [[[10, 20, 30], [255, 255, 255]]]


def test_orientation_is_respected(photo, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to view
    Image.open(photo).save(tmp_path / "x.png", exif=exif)
    turned = np.rot90(np.asarray(Image.open(photo)), k=-1)
    assert turned.shape == (72, 48, 3)
    assert np.array_equal(_pixels(tmp_path / "x.png"), turned)


def _png_without_width(path):
    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", 0, 4, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IEND", b""))


def test_bad_files_are_named_with_their_reason(photo, tmp_path):
    def refused(path):
        with pytest.raises(ValueError, match=f"^{path}: ") as found:
            read_image(str(path))
        return str(found.value).removeprefix(f"{path}: ")

    path = tmp_path / "x.png"
    assert refused(path) == "cannot read this image: No such file or directory"
    assert refused(tmp_path) == "cannot read this image: Is a directory"
    assert refused(photo / "x.png") == "cannot read this image: Not a directory"
    assert refused("x" * 300) == "cannot read this image: File name too long"
    path.write_bytes(b"")
    assert refused(path) == "cannot read this image: the file is empty"
    path.write_text("GIF87a, but not really")
    assert refused(path).startswith("cannot read this image: ")
    unknown = "cannot read this image: unknown format, damaged, or without pixels"
    path.write_text("no picture at all")
    assert refused(path) == unknown
    _png_without_width(path)
    assert refused(path) == unknown
    Image.fromarray(np.zeros((4, 4), dtype=np.float32)).save(tmp_path / "f.tif")
    assert "expected 8 or 16 bits per channel" in refused(tmp_path / "f.tif")
    Image.fromarray(np.full((4, 4), 70_000, dtype=np.int32)).save(tmp_path / "i.tif")
    assert "expected 8 or 16 bits per channel, got 32" in refused(tmp_path / "i.tif")


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "tif", "bmp", "avif"])
def test_a_cut_file_is_refused_and_a_damaged_one_is_no_crash(suffix, tmp_path):
    if suffix == "avif" and not features.check("avif"):
        pytest.skip("this Pillow writes no AVIF")
    whole = tmp_path / f"whole.{suffix}"
    noise = np.random.default_rng(0).integers(0, 256, (48, 72, 3), dtype=np.uint8)
    Image.fromarray(noise).save(whole)
    data = whole.read_bytes()
    path = tmp_path / f"cut.{suffix}"
    for share in (0.1, 0.5, 0.9):
        path.write_bytes(data[: int(share * len(data))])
        with pytest.raises(ValueError, match="cannot read this image"):
            read_image(str(path))
    reasons = []
    for seed in range(40):
        damaged = bytearray(data)
        for index in np.random.default_rng(seed).integers(8, min(len(data), 400), 6):
            damaged[index] ^= 0x5A
        path.write_bytes(damaged)
        try:
            read_image(str(path))
        except ValueError as error:
            reasons.append(str(error))
    assert all("cannot read this image" in reason for reason in reasons)


def test_a_decompression_bomb_is_refused(photo, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match="cannot read this image: Image size"):
        read_image(str(photo))
