"""One image file: what its header says, whether it can be decoded, and how every trainer opens it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import BinaryIO

from PIL import ExifTags, Image, UnidentifiedImageError

from sdtune.errors import SdtuneError
from sdtune.methods.sources import File

SUFFIXES: dict[str, str] = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".jfif": "JPEG",
    ".webp": "WEBP",
    ".bmp": "BMP",
    ".gif": "GIF",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".avif": "AVIF",
}
"""The names an image may have, in lower case, and the format each promises. The content decides, not the name."""

FORMATS = tuple(sorted(set(SUFFIXES.values())))
"""Pillow's other decoders stay shut, whatever a file claims to be."""

CONVERT = frozenset(
    ".heic .heif .jxl .jp2 .j2k .psd .xcf .svg .eps .dng .cr2 .cr3 .nef .arw .raf .orf .rw2".split()  # noqa: SIM905
)
"""Pictures to a person, but not to a trainer."""

MAX_PIXELS = 178_956_970
"""Pillow refuses to open more; a header may promise more than any memory holds."""
MIN_SIDE = 8
"""Pixels of one latent cell."""
LARGE = 24_000_000

_TURNS: dict[int, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SWAPS_SIDES = (5, 6, 7, 8)

# Decoded one at a time, however many threads there are: each may take half a gigabyte.
_one_large = Lock()


@dataclass(frozen=True, slots=True)
class Picture:
    """What the header says. width, height: upright, as open_image returns it."""

    format: str
    mode: str
    width: int
    height: int
    rotated: bool
    animated: bool
    transparent: bool

    @property
    def deep(self) -> bool:
        """Grey of more than 8 bits. (Pillow reads 16-bit colour as 8 bits by itself.)"""
        return self.mode == "F" or self.mode.startswith("I")

    @property
    def plain(self) -> bool:
        """Any program that reads images sees what open_image sees."""
        common = self.format in ("PNG", "JPEG", "MPO", "WEBP", "BMP")
        return common and not (self.rotated or self.transparent or self.deep or self.mode == "CMYK")


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a file cannot be used as an image; code and message as in a finding."""

    code: str
    message: str


def open_image(file: str | Path | BinaryIO) -> Image.Image:
    """The picture as RGB, upright, on white where it is see-through; 16-bit grey scaled to 8.

    The first picture of a file that holds several. May raise whatever Pillow raises; look() tells beforehand.
    """
    with Image.open(file, formats=FORMATS) as image:
        # Read before the pixels are: a PNG may carry a second EXIF block behind them that a header check cannot see.
        orientation = _orientation(image)
        image.load()
        upright = _to_rgb(image)
        if image.format != "TIFF" and orientation in _TURNS:  # Pillow turns a TIFF by itself
            upright = upright.transpose(_TURNS[orientation])
    upright.info.clear()
    return upright


def look(file: File, decode: bool) -> Picture | Fault:
    """What the file holds. With ``decode`` the pixels are read as well, so that a cut or damaged file is found.

    Without, only the header is read, except of WebP and AVIF, which Pillow reads whole.
    """
    if file.size == 0:
        return Fault("empty-file", "is empty (0 bytes). Copy it again or remove it.")
    try:
        stream = file.open()
    except OSError as error:
        return Fault("unreadable", f"cannot be opened ({error.strerror or error}).")
    with stream:
        try:
            with Image.open(stream, formats=FORMATS) as image:
                picture = _picture(image)
                fault = _refuse(picture)
                if fault is None and decode and not picture.animated:
                    _decode(image)
                return fault or picture
        except Image.DecompressionBombError:
            return _too_large("more pixels than any photo")
        except UnidentifiedImageError:
            return _not_an_image(stream, file.size)
        except SdtuneError:  # of a bucket that cannot be read: it says nothing of the picture
            raise
        # Fed with broken bytes, a decoder may raise anything: SyntaxError, struct.error, zlib.error, KeyError ...
        except Exception as error:  # noqa: BLE001
            if isinstance(error, MemoryError):
                return Fault("damaged", "needs more memory to decode than there is. Make it smaller.")
            return _cannot_be_decoded(stream, file.size, error)


def sniff(head: bytes) -> str:
    """The name of the image format these first 32 bytes belong to, or ""."""
    for start, name in _MAGIC:
        if head.startswith(start):
            return name
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[:2] == b"BM" and head[6:10] == b"\x00\x00\x00\x00":
        return "BMP"
    if head[4:8] == b"ftyp":
        return {b"avif": "AVIF", b"avis": "AVIF"}.get(head[8:12], "HEIC" if head[8:12] in _HEIC else "")
    return ""


_HEIC = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_MAGIC = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF8", "GIF"),
    (b"II*\x00", "TIFF"),
    (b"MM\x00*", "TIFF"),
    (b"8BPS", "PSD"),
    (b"\x00\x00\x00\x0cJXL ", "JPEG XL"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\x00\x00\x00\x0cjP  ", "JPEG 2000"),
)
_NOT_IMAGES = (
    (b"version https://git-lfs", "a Git LFS pointer, not the image itself. Run git lfs pull."),
    (b"%PDF", "a PDF. Save its picture as PNG or JPEG."),
    (b"PK\x03\x04", "a zip archive. Unpack it."),
    (b"<", "a web page or XML, not an image: the download may have failed. Fetch it again or remove it."),
)


def _picture(image: Image.Image) -> Picture:
    width, height = image.size
    orientation = _orientation(image)
    if orientation in _SWAPS_SIDES and image.format != "TIFF":
        width, height = height, width
    return Picture(
        format=image.format or "",
        mode=image.mode,
        width=width,
        height=height,
        rotated=orientation in _TURNS,
        # What phones write into .jpg is MPO, a JPEG with more pictures behind it (depth, gain map): the first counts.
        animated=image.format != "MPO" and bool(getattr(image, "is_animated", False)),
        transparent=image.has_transparency_data,
    )


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 where there is none or none that can be read."""
    try:
        # The base class's method: that of PNG would read all pixels to find a block behind them.
        value = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
        return value if value in _TURNS else 1
    except Exception:  # noqa: BLE001  as above: broken bytes
        return 1


def _refuse(picture: Picture) -> Fault | None:
    size = f"{picture.width} x {picture.height}"
    if picture.width * picture.height > MAX_PIXELS:
        return _too_large(f"{size} pixels")
    if min(picture.width, picture.height) < MIN_SIDE:
        return Fault("too-small", f"is {size} pixels, less than {MIN_SIDE} on a side. Remove it or use a larger one.")
    if picture.mode == "LAB":
        return Fault("colour-mode", f"is in the colour mode {picture.mode}. Save it as RGB.")
    return None


def _too_large(has: str) -> Fault:
    return Fault("too-large", f"has {has}; at most {MAX_PIXELS // 10**6} megapixels can be opened. Make it smaller.")


def _decode(image: Image.Image) -> None:
    """Read all of the image's data at the least cost that still finds a cut file."""
    if image.format == "PNG":
        # Checks the CRC of every chunk: finds every cut and flipped bit that decoding finds, 40 times faster.
        image.verify()
        return
    if image.format in ("JPEG", "MPO"):
        # At 1/8 of the size libjpeg still reads every bit of the entropy-coded data.
        image.draft(None, (1, 1))
    if image.width * image.height > LARGE:
        with _one_large:
            image.load()
    else:
        image.load()


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        return _grey_to_8_bits(image).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _grey_to_8_bits(image: Image.Image) -> Image.Image:
    """Mode L from a mode of 16 bits, 32 bits or floats; the range of the last two is told from their values."""
    if image.mode.startswith("I;16"):
        brightest = 65535.0
        image = image.convert("I")
    else:
        values = image.getextrema()
        assert isinstance(values[1], int | float)
        brightest = next((float(top) for top in (1, 255, 65535) if values[1] <= top), float(values[1]))
        if image.mode == "I" and brightest == 1.0:
            brightest = 255.0
    scale = 255.0 / brightest
    return image.point(lambda value: value * scale + 0.5).convert("L")


def _not_an_image(stream: BinaryIO, size: int) -> Fault:
    """What it is instead, told from its first bytes."""
    head = _read(stream, 0, 32)
    found = sniff(head)
    if found in SUFFIXES.values():
        return _cannot_be_decoded(stream, size, None)
    if found:
        return Fault("convert", f"is {found} inside, which no trainer reads. Convert it to PNG or JPEG.")
    for start, what in _NOT_IMAGES:
        if head.lstrip().startswith(start):
            return Fault("not-an-image", f"is {what}")
    if head.strip(b"\x00") == b"":
        return Fault("not-an-image", "holds only zero bytes. Copy it again or remove it.")
    what = "is text" if head.isascii() and b"\x00" not in head else "holds bytes of no known image format"
    return Fault("not-an-image", f"{what}, not an image. Remove it, or save it as PNG or JPEG.")


def _cannot_be_decoded(stream: BinaryIO, size: int, error: Exception | None) -> Fault:
    if "truncat" in str(error).lower() or _is_cut(stream, size):
        return Fault("truncated", "is cut off: its end is missing. Copy it again or remove it.")
    why = f" ({type(error).__name__}: {str(error)[:100]})" if error is not None else ""
    return Fault("damaged", f"is damaged and cannot be decoded{why}. Copy it again or remove it.")


def _is_cut(stream: BinaryIO, size: int) -> bool:
    """Whether a file that cannot be decoded lacks the end that its format demands."""
    head, tail = _read(stream, 0, 32), _read(stream, max(0, size - 64), 64)
    match sniff(head):
        case "JPEG":
            return not tail.rstrip(b"\x00").endswith(b"\xff\xd9")
        case "PNG":
            return b"IEND" not in tail
        case "GIF":
            return not tail.rstrip(b"\x00").endswith(b";")
        case "WEBP":
            return int.from_bytes(head[4:8], "little") + 8 > size
    return False


def _read(stream: BinaryIO, start: int, length: int) -> bytes:
    try:
        stream.seek(start)
        return stream.read(length)
    except (OSError, ValueError):  # also closed by the decoder that failed
        return b""
