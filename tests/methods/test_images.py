"""One image: the header, the decoding and open_image must tell the same story."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image, ImageSequence

from sdtune.methods.images import MAX_PIXELS, Fault, Picture, look, open_image, sniff
from sdtune.methods.layouts import Layout, check
from sdtune.methods.sources import LocalFile

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")

RED, GREEN, WHITE = (255, 0, 0), (0, 128, 0), (255, 255, 255)


def as_file(path: Path) -> LocalFile:
    return LocalFile(path.name, path.stat().st_size, str(path))


def looked(path: Path, decode: bool = True) -> Picture:
    result = look(as_file(path), decode)
    assert isinstance(result, Picture), result
    return result


def fault(path: Path, decode: bool = True) -> Fault:
    result = look(as_file(path), decode)
    assert isinstance(result, Fault), result
    return result


def red_top_left(width: int = 32, height: int = 16) -> Image.Image:
    image = Image.new("RGB", (width, height), GREEN)
    image.paste(RED, (0, 0, 8, 8))
    return image


def near(pixel: object, colour: tuple[int, int, int], by: int = 12) -> bool:
    assert isinstance(pixel, tuple)
    return all(abs(a - b) <= by for a, b in zip(pixel, colour, strict=True))


def encoded(image: Image.Image, format_: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format_, **options)
    return stream.getvalue()


# the inverse of what each orientation asks a reader to do
STORED = {
    1: lambda image: image,
    2: lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    3: lambda image: image.transpose(Image.Transpose.ROTATE_180),
    4: lambda image: image.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
    5: lambda image: image.transpose(Image.Transpose.TRANSPOSE),
    6: lambda image: image.transpose(Image.Transpose.ROTATE_90),
    7: lambda image: image.transpose(Image.Transpose.TRANSVERSE),
    8: lambda image: image.transpose(Image.Transpose.ROTATE_270),
}


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", "avif"])
@pytest.mark.parametrize("orientation", STORED)
def test_every_orientation_is_upright_and_its_size_is_told_by_the_header(
    tmp_path: Path, suffix: str, orientation: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    STORED[orientation](red_top_left()).save(path, exif=exif, quality=95)

    upright = open_image(path)

    assert (upright.mode, upright.size) == ("RGB", (32, 16))
    assert near(upright.getpixel((3, 3)), RED, 40)
    assert near(upright.getpixel((29, 12)), GREEN, 40)
    for decode in (True, False):
        picture = looked(path, decode)
        assert (picture.width, picture.height) == upright.size
        assert picture.rotated == (orientation > 1)
        assert picture.plain == (orientation == 1 and suffix in ("jpg", "png", "webp"))


def test_an_exif_block_behind_the_pixels_of_a_png_counts_for_nobody(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(red_top_left(), "PNG")
    body = exif.tobytes().removeprefix(b"Exif\x00\x00")
    chunk = struct.pack(">I", len(body)) + b"eXIf" + body + struct.pack(">I", zlib.crc32(b"eXIf" + body))
    path = tmp_path / "a.png"
    path.write_bytes(data[:-12] + chunk + data[-12:])
    assert open_image(path).size == (looked(path).width, looked(path).height) == (32, 16)


def test_an_unreadable_exif_block_counts_as_none(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    red_top_left().save(path, exif=b"Exif\x00\x00MM\x00\x2a\xff\xff\xff\xff")
    assert open_image(path).size == (looked(path).width, looked(path).height) == (32, 16)


@pytest.mark.parametrize(
    ("mode", "format_", "colour", "wanted"),
    [
        ("1", "PNG", 1, WHITE),
        ("L", "PNG", 100, (100, 100, 100)),
        ("LA", "PNG", (0, 0), WHITE),
        ("LA", "PNG", (0, 255), (0, 0, 0)),
        ("RGBA", "PNG", (0, 0, 0, 0), WHITE),
        ("RGBA", "PNG", (255, 0, 0, 255), RED),
        ("RGBA", "PNG", (0, 0, 0, 128), (127, 127, 127)),
        ("RGBA", "WEBP", (0, 0, 0, 0), WHITE),
        ("RGBA", "TIFF", (0, 0, 0, 0), WHITE),
        ("CMYK", "JPEG", (0, 255, 255, 0), RED),
        ("CMYK", "TIFF", (0, 255, 255, 0), RED),
        ("I;16", "PNG", 0, (0, 0, 0)),
        ("I;16", "PNG", 32896, (128, 128, 128)),
        ("I;16", "PNG", 65535, WHITE),
        ("I;16", "TIFF", 32896, (128, 128, 128)),
        ("I;16B", "TIFF", 32896, (128, 128, 128)),
        ("F", "TIFF", 1.0, WHITE),
        ("F", "TIFF", 0.5, (128, 128, 128)),
        ("F", "TIFF", 200.0, (200, 200, 200)),
        ("F", "TIFF", 65535.0, WHITE),
        ("I", "TIFF", 40, (40, 40, 40)),
        ("I", "TIFF", 1, (1, 1, 1)),
        ("I", "TIFF", 65535, WHITE),
    ],
)
def test_open_image_makes_rgb_of_every_mode(
    tmp_path: Path, mode: str, format_: str, colour: object, wanted: tuple[int, int, int]
) -> None:
    path = tmp_path / "a"
    image = Image.new(mode, (16, 16), colour)  # type: ignore[arg-type]
    image.save(path, format_)
    opened = open_image(path)
    assert (opened.mode, opened.size) == ("RGB", (16, 16))
    assert near(opened.getpixel((8, 8)), wanted, 2)
    picture = looked(path)
    assert picture.plain == (mode in ("1", "L"))
    assert picture.deep == (mode[0] in "IF")


def test_16_bits_are_rounded_to_the_nearest_of_8(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    deep = [min(65535, max(0, x * 257 + (100 if x % 2 else -100))) for x in range(256)]
    image = Image.frombytes("I;16", (256, 8), struct.pack("<256H", *deep) * 8)
    image.save(path)
    assert list(open_image(path).getchannel("R").crop((0, 4, 256, 5)).tobytes()) == list(range(256))


def test_a_see_through_palette_goes_on_white(tmp_path: Path) -> None:
    image = Image.new("P", (16, 16), 0)
    image.putpalette([0, 0, 0, 255, 0, 0])
    image.putpixel((4, 4), 1)
    path = tmp_path / "a.png"
    image.save(path, transparency=0)
    opened = open_image(path)
    assert (opened.getpixel((0, 0)), opened.getpixel((4, 4))) == (WHITE, RED)
    assert looked(path).transparent
    image.save(path)
    assert not looked(path).transparent


@pytest.mark.parametrize(("mode", "key", "colour"), [("RGB", (0, 0, 0), (0, 0, 0)), ("L", 0, 0), ("1", 0, 0)])
def test_a_transparent_colour_goes_on_white(tmp_path: Path, mode: str, key: object, colour: object) -> None:
    path = tmp_path / "a.png"
    Image.new(mode, (16, 16), colour).save(path, transparency=key)  # type: ignore[arg-type]
    assert looked(path).transparent
    assert open_image(path).getpixel((0, 0)) == WHITE


def test_a_phone_picture_with_more_behind_it_is_one_picture(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    red_top_left().save(path, "MPO", save_all=True, append_images=[red_top_left(16, 8)])
    picture = looked(path)
    assert picture.format == "MPO"
    assert not picture.animated
    assert open_image(path).size == (32, 16)


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tif", "avif"])
def test_several_pictures_in_one_file_are_seen(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    frames = [Image.new("RGB", (16, 16), colour) for colour in (RED, GREEN, WHITE)]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    assert len(list(ImageSequence.Iterator(Image.open(path)))) == 3
    assert looked(path).animated
    frames[0].save(path)
    assert not looked(path).animated


FORMS = {
    "jpg": ("JPEG", {}),
    "progressive": ("JPEG", {"progressive": True}),
    "png": ("PNG", {}),
    "webp": ("WEBP", {}),
    "lossless": ("WEBP", {"lossless": True}),
    "bmp": ("BMP", {}),
    "gif": ("GIF", {}),
    "tif": ("TIFF", {}),
    "avif": ("AVIF", {}),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_file_cut_anywhere_is_found(tmp_path: Path, form: str) -> None:
    format_, options = FORMS[form]
    data = encoded(Image.effect_noise((64, 48), 60).convert("RGB"), format_, **options)
    path = tmp_path / "a"
    path.write_bytes(data)
    assert looked(path).format == format_
    for kept in range(16, len(data) - 32, max(1, len(data) // 40)):
        path.write_bytes(data[:kept])
        found = fault(path)
        assert found.code in ("truncated", "damaged", "not-an-image"), (kept, found)
        if format_ in ("JPEG", "PNG", "WEBP", "GIF"):
            assert found.code == "truncated", (kept, found)


def test_a_flipped_bit_in_a_png_is_found(tmp_path: Path) -> None:
    data = bytearray(encoded(Image.effect_noise((64, 48), 60).convert("RGB"), "PNG"))
    data[len(data) // 2] ^= 1
    path = tmp_path / "a.png"
    path.write_bytes(data)
    assert fault(path).code == "damaged"


@pytest.mark.parametrize("side", [14_000, 1_000_000])
def test_a_picture_too_large_for_any_memory_is_refused_by_its_header(tmp_path: Path, side: int) -> None:
    data = bytearray(encoded(Image.new("RGB", (16, 16)), "PNG"))
    data[16:24] = struct.pack(">II", side, side)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    path = tmp_path / "a.png"
    path.write_bytes(data)
    assert side * side > MAX_PIXELS
    assert fault(path, decode=False).code == "too-large"


def test_a_large_picture_below_the_limit_is_used_without_a_warning(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    Image.new("1", (12_000, 9_000)).save(tmp_path / "a.png")
    assert check(tmp_path, Layout.IMAGES).examples[0].width == 12_000
    assert not recwarn.list


@pytest.mark.parametrize(
    ("data", "code", "words"),
    [
        (b"", "empty-file", "0 bytes"),
        (b"hello, I am a caption\n", "not-an-image", "text"),
        (b"<!DOCTYPE html><html>", "not-an-image", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "not-an-image", "git lfs pull"),
        (b"%PDF-1.7 ...", "not-an-image", "PDF"),
        (b"PK\x03\x04" + b"\x00" * 40, "not-an-image", "zip"),
        (b"\x00" * 500, "not-an-image", "zero bytes"),
        (bytes(range(200, 256)) * 4, "not-an-image", "no known image format"),
        (b"\x00\x00\x00\x18ftypheic" + b"\x00" * 60, "convert", "HEIC"),
        (b"8BPS\x00\x01" + b"\x00" * 60, "convert", "PSD"),
        (b"\x89PNG\r\n\x1a\n", "truncated", "cut off"),
        (b"\xff\xd8\xff\xe0\x00\x10JFIF", "truncated", "cut off"),
    ],
)
def test_what_is_no_image_is_called_by_its_name(tmp_path: Path, data: bytes, code: str, words: str) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(data)
    for decode in (True, False):
        found = fault(path, decode)
        assert (found.code, words in found.message) == (code, True), found


def test_a_file_that_has_gone_is_unreadable(tmp_path: Path) -> None:
    assert look(LocalFile("a.png", 10, str(tmp_path / "a.png")), True) == Fault(
        "unreadable", "cannot be opened (No such file or directory)."
    )


@pytest.mark.parametrize("format_", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF"])
def test_sniff_knows_every_format_that_is_read(format_: str) -> None:
    assert sniff(encoded(red_top_left(), format_)[:32]) == format_
