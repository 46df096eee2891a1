"""Files that promise more than any memory holds, or lead where they should not: small to write, dear to believe."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

from PIL import Image

ZEROS = zlib.compress(bytes(300 * 2**20), 9)
"""300 MB in 300 kB."""


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, more: bytes = b"", pixels: bytes = b"") -> bytes:
    """An RGB PNG. more: chunks before the pixels; pixels: compressed already."""
    head = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    body = _chunk(b"IDAT", pixels or zlib.compress(bytes(100)))
    return b"\x89PNG\r\n\x1a\n" + head + more + body + _chunk(b"IEND", b"")


def tiff(width: int, height: int, pages: int = 1) -> bytes:
    """A grey TIFF whose pages all use the same 64 bytes as their pixels."""
    size = 2 + 9 * 12 + 4
    found = b"II*\0" + struct.pack("<I", 8)
    for page in range(pages):
        tags = (
            (256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 8),
            (277, 3, 1, 1), (278, 4, 1, height), (279, 4, 1, 64),
        )  # fmt: skip
        following = 8 + (page + 1) * size if page < pages - 1 else 0
        found += struct.pack("<H", 9) + b"".join(struct.pack("<HHII", *tag) for tag in tags)
        found += struct.pack("<I", following)
    return found


def webp(*chunks: tuple[bytes, bytes]) -> bytes:
    """A WebP file of these chunks."""
    body = b"WEBP" + b"".join(
        name + struct.pack("<I", len(data)) + data + bytes(len(data) % 2) for name, data in chunks
    )
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _side(side: int) -> bytes:
    return struct.pack("<I", side - 1)[:3]


def _gif(side: int) -> bytes:
    screen = struct.pack("<HHBBB", side, side, 0x80, 0, 0) + bytes(6)
    return b"GIF89a" + screen + b"," + struct.pack("<HHHHB", 0, 0, side, side, 0) + b"\x02\x02\x44\x01\x00;"


def _bmp(side: int) -> bytes:
    head = struct.pack("<IHHI", 54, 0, 0, 54)
    return b"BM" + head + struct.pack("<IiiHHIIiiII", 40, side, side, 1, 24, 0, 0, 0, 0, 0, 0)


def bombs() -> dict[str, bytes]:
    """By file name: pictures that no photo is as large as, or whose notes fill the memory."""
    flat = io.BytesIO()
    Image.new("RGB", (16383, 16383)).save(flat, "WEBP", lossless=True)
    return {
        "declared.png": png(100_000, 100_000),
        "declared.tiff": tiff(2**31 - 1, 2**31 - 1),
        "declared.gif": _gif(65_535),
        "declared.bmp": _bmp(2**30),
        "declared.webp": webp((b"VP8L", b"\x2f" + struct.pack("<I", 16383 | 16383 << 14) + bytes(40))),
        "canvas.webp": webp((b"VP8X", b"\x02\0\0\0" + _side(2**24) + _side(2**8)), (b"ANIM", bytes(6))),
        "flat.webp": flat.getvalue(),  # 268 megapixels of one colour, in 10 kB
        "text.png": png(64, 64, _chunk(b"zTXt", b"a\0\0" + ZEROS)),
        "words.png": png(64, 64, _chunk(b"iTXt", b"a\0\1\0\0\0" + ZEROS)),
        "profile.png": png(64, 64, _chunk(b"iCCP", b"a\0\0" + ZEROS)),
    }


def write_bombs(folder: Path) -> list[str]:
    """Put them into ``folder``; their names."""
    found = bombs()
    for name, data in found.items():
        (folder / name).write_bytes(data)
    return sorted(found)
