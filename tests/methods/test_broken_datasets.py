"""A table of broken datasets: what is built, how it is read, and what the user is told."""

from __future__ import annotations

import json
import os
import socket
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from sdtune.errors import DatasetError
from sdtune.methods.layouts import Layout, check
from sdtune.methods.ledger import SEVERITY, Severity

IMAGES, CAPTIONED, KOHYA = Layout.IMAGES, Layout.CAPTIONED, Layout.KOHYA
ERROR, WARNING, NOTE = Severity.ERROR, Severity.WARNING, Severity.NOTE

Build = Callable[[Path], object]

_seed = iter(range(1, 256))


def image(path: Path, size: tuple[int, int] = (16, 16), mode: str = "RGB", **options: object) -> Path:
    """A picture unlike any other of this process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.effect_noise(size, 40 + next(_seed, 1)).convert(mode)
    picture.save(path, **options)
    return path


def text(path: Path, content: str | bytes = "a cat") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def rows(path: Path, *records: object, name: str = "metadata.jsonl") -> Path:
    return text(path / name, "".join(json.dumps(record) + "\n" for record in records))


def table(path: Path, **columns: Any) -> Path:
    """metadata.parquet with two rows; a column that is None is left out."""
    whole = {"file_name": ["a.png", "a.png"], "text": ["a cat", "another"], **columns}
    parquet.write_table(
        pyarrow.table({name: values for name, values in whole.items() if values is not None}),
        path / "metadata.parquet",
    )
    return path / "metadata.parquet"


def column_twice(path: Path) -> None:
    columns = [pyarrow.array(["a.png"]), pyarrow.array(["a cat"]), pyarrow.array(["another"])]
    parquet.write_table(pyarrow.table(columns, names=["file_name", "text", "text"]), path / "metadata.parquet")


def strings(*values: str) -> pyarrow.Array:
    return pyarrow.array(values, pyarrow.string())


def latin_1() -> pyarrow.Array:
    """Two strings, the second of which is not the UTF-8 that its type promises."""
    ends = pyarrow.py_buffer(struct.pack("<3i", 0, 5, 9))
    return pyarrow.StringArray.from_buffers(2, ends, pyarrow.py_buffer(b"a catcaf\xe9"))


def row(file_name: object = "a.png", caption: object = "a cat") -> dict[str, object]:
    return {"file_name": file_name, "text": caption}


def cut(path: Path, share: float = 0.6) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


def one(*steps: Build) -> Build:
    """a.png and what the steps add."""

    def build(folder: Path) -> None:
        image(folder / "a.png")
        for step in steps:
            step(folder)

    return build


def huge(path: Path) -> None:
    data = bytearray(image(path).read_bytes())
    data[16:24] = struct.pack(">II", 50_000, 50_000)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    path.write_bytes(data)


def rotated(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image(path, (32, 16), exif=exif)


def animated(path: Path) -> None:
    frames = [Image.new("L", (16, 16), shade) for shade in (0, 90, 180)]
    frames[0].save(path, save_all=True, append_images=frames[1:])


def copied(folder: Path) -> None:
    text(folder / "b.png", (folder / "a.png").read_bytes())


def linked(target: str, name: str = "b.png") -> Build:
    return lambda folder: (folder / name).symlink_to(target)


def outside(folder: Path) -> None:
    image(folder.parent / "other" / "secret.png")
    (folder / "b.png").symlink_to(folder.parent / "other" / "secret.png")


def bound_socket(folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        before = Path.cwd()
        os.chdir(folder)  # the name of a socket may be 108 bytes long
        try:
            server.bind("b.png")
        finally:
            os.chdir(before)


BROKEN: list[tuple[str, Build, Layout, str, Severity, str, tuple[str, ...]]] = [
    # name, builder, layout, code, severity, path of the finding, words of the message
    # --- any layout: the folder
    ("empty", lambda d: None, IMAGES, "empty", ERROR, "", ("empty", "Put the images")),
    ("no image", lambda d: text(d / "notes.md"), IMAGES, "no-images", ERROR, "", ("1 file", ".png")),
    ("only system files", lambda d: text(d / ".DS_Store"), KOHYA, "no-images", ERROR, "", ("1 file",)),
    ("only an archive", lambda d: text(d / "cats.zip"), IMAGES, "no-images", ERROR, "", ("Unpack 'cats.zip'",)),
    ("an archive too", one(lambda d: text(d / "b.tar.gz")), IMAGES, "archive", WARNING, "b.tar.gz", ("Unpack",)),
    ("link outside", one(outside), IMAGES, "link-outside", ERROR, "b.png", ("out of the dataset",)),
    ("broken link", one(linked("gone.png")), IMAGES, "link-broken", ERROR, "b.png", ("not there",)),
    ("link to itself", one(linked("b.png")), IMAGES, "link-broken", ERROR, "b.png", ("not there",)),
    ("linked folder", one(linked(".", "again")), IMAGES, "link-folder", WARNING, "again", ("not followed",)),
    ("pipe", one(lambda d: os.mkfifo(d / "b.png")), IMAGES, "special-file", ERROR, "b.png", ("pipe",)),
    ("socket", one(bound_socket), IMAGES, "special-file", ERROR, "b.png", ("Remove it",)),
    ("name not UTF-8", one(lambda d: copy_as(d, b"\xff.png")), IMAGES, "bad-name", ERROR, "\\udcff.png", ("Rename",)),
    ("name with a line", one(lambda d: copy_as(d, b"b\n.png")), IMAGES, "bad-name", ERROR, "b\\n.png", ("Rename",)),
    ("no suffix", one(lambda d: image(d / "b", format="PNG")), IMAGES, "no-suffix", WARNING, "b", ("PNG", ".png")),
    # --- any layout: an image
    ("zero bytes", one(lambda d: text(d / "b.jpg", "")), IMAGES, "empty-file", ERROR, "b.jpg", ("0 bytes",)),
    ("text as .jpg", one(lambda d: text(d / "b.jpg")), IMAGES, "not-an-image", ERROR, "b.jpg", ("is text",)),
    ("cut JPEG", one(lambda d: cut(image(d / "b.jpg"))), IMAGES, "truncated", ERROR, "b.jpg", ("cut off",)),
    ("cut PNG", one(lambda d: cut(image(d / "b.png"))), IMAGES, "truncated", ERROR, "b.png", ("end is missing",)),
    ("cut WebP", one(lambda d: cut(image(d / "b.webp"))), IMAGES, "truncated", ERROR, "b.webp", ("Copy it again",)),
    ("cut BMP", one(lambda d: cut(image(d / "b.bmp"))), IMAGES, "truncated", ERROR, "b.bmp", ("cut off",)),
    ("cut GIF", one(lambda d: cut(image(d / "b.gif"))), IMAGES, "truncated", ERROR, "b.gif", ("cut off",)),
    ("bomb", one(lambda d: huge(d / "b.png")), IMAGES, "too-large", ERROR, "b.png", ("megapixels", "smaller")),
    ("a dot", one(lambda d: image(d / "b.png", (1, 1))), IMAGES, "too-small", ERROR, "b.png", ("1 x 1", "8")),
    ("HEIC", one(lambda d: text(d / "b.HEIC")), IMAGES, "convert", ERROR, "b.HEIC", ("Convert", "JPEG")),
    ("HEIC as .jpg", one(lambda d: heic(d / "b.jpg")), IMAGES, "convert", ERROR, "b.jpg", ("HEIC inside", "Convert")),
    ("animation", one(lambda d: animated(d / "b.gif")), IMAGES, "animated", WARNING, "b.gif", ("not used",)),
    ("animated PNG", one(lambda d: animated(d / "b.png")), IMAGES, "animated", WARNING, "b.png", ("several",)),
    ("only animations", lambda d: animated(d / "b.gif"), IMAGES, "no-images", ERROR, "", ("warnings say why",)),
    ("CMYK", one(lambda d: image(d / "b.jpg", mode="CMYK")), IMAGES, "cmyk", WARNING, "b.jpg", ("RGB",)),
    ("alpha", one(lambda d: image(d / "b.png", mode="RGBA")), IMAGES, "alpha", WARNING, "b.png", ("white",)),
    ("16 bits", one(lambda d: image(d / "b.png", mode="I;16")), IMAGES, "deep-colour", WARNING, "b.png", ("8 bits",)),
    ("turned", one(lambda d: rotated(d / "b.jpg")), IMAGES, "rotated", NOTE, "b.jpg", ("upright",)),
    ("PNG as .jpg", one(lambda d: image(d / "b.jpg", format="PNG")), IMAGES, "wrong-suffix", NOTE, "b.jpg", ("PNG",)),
    ("small", one(), IMAGES, "small", WARNING, "a.png", ("16 x 16", "enlarged", "64")),
    ("narrow", one(lambda d: image(d / "b.png", (64, 16))), IMAGES, "narrow", WARNING, "b.png", ("64 x 16",)),
    ("twice", one(copied), IMAGES, "duplicate", WARNING, "b.png", ("'a.png'", "not used")),
    (
        "twice, two captions",
        one(copied, lambda d: text(d / "a.txt", "one"), lambda d: text(d / "b.txt", "two")),
        *(IMAGES, "duplicate", WARNING, "b.png", ("another caption", "both are used")),
    ),
    # --- images
    ("only deeper", lambda d: image(d / "cats" / "a.png"), IMAGES, "only-sub-folders", ERROR, "", ("'cats' (1)",)),
    ("kohya's", lambda d: image(d / "10_sks" / "a.png"), IMAGES, "only-sub-folders", ERROR, "", ("kohya", "'10_sks'")),
    (
        "some deeper",
        one(lambda d: image(d / "b" / "c.png")),
        IMAGES,
        "sub-folder",
        WARNING,
        "b",
        ("1 image", "not used"),
    ),
    ("empty caption", one(lambda d: text(d / "a.txt", " \n")), IMAGES, "empty-caption", ERROR, "a.txt", ("is empty",)),
    (
        "blank first line",
        one(lambda d: text(d / "a.txt", "\na cat")),
        *(IMAGES, "empty-caption", ERROR, "a.txt", ("blank line",)),
    ),
    ("Latin-1", one(lambda d: text(d / "a.txt", b"caf\xe9")), IMAGES, "caption-encoding", ERROR, "a.txt", ("UTF-8",)),
    (
        "UTF-16",
        one(lambda d: text(d / "a.txt", "a cat".encode("utf-16"))),
        *(IMAGES, "caption-encoding", ERROR, "a.txt", ("Save it as UTF-8",)),
    ),
    (
        "UTF-16 without a mark",
        one(lambda d: text(d / "a.txt", "a cat".encode("utf-16-le"))),
        *(IMAGES, "caption-encoding", ERROR, "a.txt", ("not UTF-8",)),
    ),
    (
        "two lines",
        one(lambda d: text(d / "a.caption", "a cat\nand more")),
        *(IMAGES, "multi-line-caption", WARNING, "a.caption", ("2 lines", "first")),
    ),
    ("no image", one(lambda d: text(d / "b.txt")), IMAGES, "caption-without-image", WARNING, "b.txt", ("'b'",)),
    (
        "two captions",
        one(lambda d: text(d / "a.txt"), lambda d: text(d / "a.caption")),
        *(IMAGES, "unused-caption", WARNING, "a.caption", ("another file",)),
    ),
    (
        "sidecar and metadata",
        one(lambda d: text(d / "a.txt"), lambda d: rows(d, row())),
        *(IMAGES, "unused-caption", WARNING, "a.txt", ("metadata.jsonl",)),
    ),
    (
        "some captioned",
        one(lambda d: text(d / "a.txt"), lambda d: image(d / "b.png")),
        *(IMAGES, "mixed-captions", WARNING, "", ("1 of 2", "prompt")),
    ),
    (
        "captions.jsonl",
        one(lambda d: rows(d, row(), name="captions.jsonl")),
        *(IMAGES, "ignored-metadata", WARNING, "captions.jsonl", ("rename it to metadata.jsonl",)),
    ),
    # --- captioned: which file
    ("no metadata", one(), CAPTIONED, "no-metadata", ERROR, "", ("1 image", "metadata.jsonl", '"file_name"')),
    ("sidecars", one(lambda d: text(d / "a.txt")), CAPTIONED, "no-metadata", ERROR, "", (".txt files are not read",)),
    ("one level up", lambda d: one(lambda d: rows(d, row()))(d / "t"), CAPTIONED, "no-metadata", ERROR, "", ("'t'",)),
    ("no images", lambda d: rows(d, row()), CAPTIONED, "no-images", ERROR, "", ("1 file",)),
    *(
        (
            name,
            one(lambda d, name=name: rows(d, row(), name=name)),
            CAPTIONED,
            "misnamed-metadata",
            ERROR,
            name,
            (right,),
        )
        for name, right in [
            ("metadata.json", "with one JSON object per line, to metadata.jsonl"),
            ("metadata.jsonl.txt", "Rename it to metadata.jsonl"),
            ("metadata.json1", "to metadata.jsonl"),
            ("Metadata.jsonl", "to metadata.jsonl"),
            ("captions.jsonl", "to metadata.jsonl"),
            ("captions.csv", "to metadata.csv"),
            ("captions.parquet", "Rename it to metadata.parquet"),
        ]
    ),
    (
        "two metadata",
        one(lambda d: rows(d, row()), lambda d: rows(d, row(), name="metadata.csv")),
        *(CAPTIONED, "two-metadata", ERROR, "", ("metadata.jsonl and metadata.csv",)),
    ),
    (
        "metadata below",
        one(lambda d: rows(d, row()), lambda d: text(d / "b" / "metadata.csv")),
        *(CAPTIONED, "ignored-metadata", WARNING, "b/metadata.csv", ("not read",)),
    ),
    # --- captioned: its rows
    *(
        (
            name,
            one(lambda d, data=data: text(d / "metadata.jsonl", data)),
            CAPTIONED,
            code,
            ERROR,
            "metadata.jsonl",
            words,
        )
        for name, data, code, words in [
            ("no rows", "\n\n", "no-rows", ("no rows",)),
            ("Latin-1 rows", b'{"file_name": "a.png",\n "text": "caf\xe9"}', "metadata-encoding", ("line 2", "UTF-8")),
            ("array", json.dumps([row()]), "json-array", ("one JSON array", "per line")),
            ("indented", json.dumps(row(), indent=1), "bad-json", ("several lines",)),
            ("comma", json.dumps(row()) + "\n" + json.dumps(row()) + ",", "bad-json", ("line 2, column 40", "comma")),
            ("no quotes", "{file_name: a.png}", "bad-json", ("line 1, column 2",)),
            ("no object", '"a.png"\n', "bad-json", ("line 1", "no JSON object")),
            ("deep", "[" * 10 + "{" * 0 + "\n", "json-array", ("array",)),
            ("nested", '{"a":' * 100_000 + "\n", "bad-json", ("line 1",)),
            ("digits", '{"a": ' + "9" * 5000 + "}\n", "bad-json", ("line 1",)),
            ("caption column", '{"file_name": "a.png", "caption": "x"}', "no-text", ("Rename 'caption' to 'text'",)),
            ("only names", '{"file_name": "a.png"}', "no-text", ("no 'text'", "Add it")),
            ("image column", '{"image": "a.png", "text": "x"}', "no-file-name", ("Rename 'image' to 'file_name'",)),
        ]
    ),
    *(
        (name, one(lambda d, record=record: rows(d, row(), record)), CAPTIONED, code, ERROR, "metadata.jsonl", words)
        for name, record, code, words in [
            ("a row without text", {"file_name": "a.png"}, "no-text", ("line 2", "no text")),
            ("a row without name", {"text": "x"}, "no-file-name", ("line 2", "no file_name")),
            ("missing", row("aa.png"), "missing-file", ("line 2", "'aa.png'", "Did you mean 'a.png'?")),
            ("other case", row("A.PNG"), "missing-file", ("There is 'a.png'", "upper and lower case")),
            ("other folder", row("x/y/z/a.png"), "missing-file", ("Did you mean 'a.png'?",)),
            ("absolute", row("/data/a.png"), "bad-file-name", ("absolute", "relative")),
            ("drive", row("C:\\data\\a.png"), "bad-file-name", ("absolute",)),
            ("parent", row("../x/a.png"), "bad-file-name", ("leads out",)),
            ("hidden parent", row("x/../../a.png"), "bad-file-name", ("leads out",)),
            ("scheme", row("file:///etc/passwd"), "bad-file-name", ("address",)),
            ("backslash", row("x\\a.png"), "bad-file-name", ("forward slashes",)),
            ("name is a number", row(7), "bad-file-name", ("a number", "string")),
            ("name is empty", row(""), "bad-file-name", ("empty",)),
            ("empty text", row(caption=" "), "empty-caption", ("line 2", "empty")),
            ("null text", row(caption=None), "bad-caption", ("null",)),
            ("list of texts", row(caption=["a", "b"]), "bad-caption", ("a list",)),
            ("half a character", row(caption="\ud800"), "bad-caption", ("surrogate",)),
        ]
    ),
    (
        "other Unicode form",
        lambda d: (image(d / "caf\u00e9.png"), rows(d, row("cafe\u0301.png"))),
        *(CAPTIONED, "missing-file", ERROR, "metadata.jsonl", ("look alike",)),
    ),
    (
        "named twice",
        one(lambda d: rows(d, row(), row(caption="another"))),
        *(CAPTIONED, "named-twice", WARNING, "metadata.jsonl", ("lines 1 and 2", "2 times")),
    ),
    (
        "no row",
        one(lambda d: rows(d, row()), lambda d: image(d / "b.png")),
        *(CAPTIONED, "no-row", WARNING, "b.png", ("no row", "not used")),
    ),
    *(
        (name, one(lambda d, data=data: text(d / "metadata.csv", data)), CAPTIONED, code, ERROR, "metadata.csv", words)
        for name, data, code, words in [
            ("semicolons", "file_name;text\na.png;a cat\n", "bad-csv", ("semicolons", "commas")),
            ("bare comma", "file_name,text\na.png,a cat, grey\n", "bad-csv", ("line 2", "3 columns", "double quotes")),
            ("open quote", 'file_name,text\na.png,"a cat\n', "bad-csv", ("line", "not CSV")),
            ("csv caption", "file_name,prompt\na.png,a cat\n", "no-text", ("Rename 'prompt' to 'text'",)),
            ("only a header", "file_name,text\n", "no-rows", ("no rows",)),
        ]
    ),
    *(
        (
            f"parquet: {name}",
            one(lambda d, columns=columns: table(d, **columns)),
            *(CAPTIONED, code, severity, "metadata.parquet", words),
        )
        for name, columns, code, severity, words in [
            ("missing", {"file_name": ["a.png", "aa.png"]}, "missing-file", ERROR, ("row 2", "mean 'a.png'?")),
            ("null name", {"file_name": ["a.png", None]}, "bad-file-name", ERROR, ("row 2", "null")),
            ("null text", {"text": ["a cat", None]}, "bad-caption", ERROR, ("row 2", "null")),
            ("empty text", {"text": ["a cat", " "]}, "empty-caption", ERROR, ("row 2", "remove the row")),
            ("only nulls", {"text": [None, None]}, "bad-caption", ERROR, ("column text", "type null", "strings")),
            ("numbers", {"file_name": [1, 2]}, "bad-file-name", ERROR, ("column file_name", "int64")),
            ("lists", {"text": [["a", "b"], ["c"]]}, "bad-caption", ERROR, ("list<", "must hold strings")),
            ("bytes", {"text": [b"a", b"b"]}, "bad-caption", ERROR, ("type binary",)),
            ("not UTF-8", {"text": latin_1()}, "metadata-encoding", ERROR, ("row 2", "UTF-8")),
            ("no rows", {"file_name": strings(), "text": strings()}, "no-rows", ERROR, ("no rows",)),
            ("no text", {"text": None, "prompt": ["a", "b"]}, "no-text", ERROR, ("Rename 'prompt' to 'text'",)),
            ("no name", {"file_name": None, "id": [1, 2]}, "no-file-name", ERROR, ("'text', 'id'", "no 'file_name'")),
            ("twice", {}, "named-twice", WARNING, ("rows 1 and 2", "Keep one row")),
        ]
    ),
    *(
        (
            f"parquet: {name}",
            one(lambda d, damage=damage: damage(table(d, file_name=["a.png"], text=["a cat"]))),
            *(CAPTIONED, "bad-parquet", ERROR, "metadata.parquet", words),
        )
        for name, damage, words in [
            ("is text", lambda file: text(file, json.dumps(row())), ("magic bytes", "Write it again")),
            ("empty file", lambda file: text(file, b""), ("0 bytes",)),
            ("cut", cut, ("no whole Parquet file",)),
            ("damaged", lambda file: text(file, file.read_bytes().replace(b"a.png", b"\xff" * 5, 1)[4:]), ("whole",)),
        ]
    ),
    ("parquet: a column twice", one(column_twice), CAPTIONED, "bad-parquet", ERROR, "metadata.parquet", ("text",)),
    # --- kohya
    ("flat", one(), KOHYA, "flat-images", ERROR, "", ("1 image", "'a.png'", "<repeats>_<name>")),
    ("no number", lambda d: image(d / "sks" / "a.png"), KOHYA, "no-repeats", ERROR, "sks", ("silently", "'10_sks'")),
    ("a space", lambda d: image(d / "10 sks" / "a.png"), KOHYA, "no-repeats", ERROR, "10 sks", ("'10_sks'",)),
    (
        "no repeats",
        lambda d: image(d / "0_sks" / "a.png"),
        KOHYA,
        "bad-repeats",
        ERROR,
        "0_sks",
        ("0 repeats", "'10_sks'"),
    ),
    ("negative", lambda d: image(d / "-1_sks" / "a.png"), KOHYA, "bad-repeats", ERROR, "-1_sks", ("-1 repeats",)),
    (
        "level",
        lambda d: image(d / "t" / "10_sks" / "a.png"),
        KOHYA,
        "no-repeats",
        ERROR,
        "t",
        ("Give 't' as the dataset",),
    ),
    ("a year", lambda d: image(d / "2023_sks" / "a.png"), KOHYA, "many-repeats", WARNING, "2023_sks", ("2023 times",)),
    (
        "no caption",
        lambda d: image(d / "10" / "a.png"),
        KOHYA,
        "no-caption",
        WARNING,
        "10",
        ("1 image with", "<caption>"),
    ),
    (
        "empty kohya caption",
        lambda d: (image(d / "10_sks" / "a.png"), text(d / "10_sks" / "a.txt", "")),
        *(KOHYA, "empty-caption", ERROR, "10_sks/a.txt", ("is empty",)),
    ),
    (
        "kohya Latin-1",
        lambda d: (image(d / "10_sks" / "a.png"), text(d / "10_sks" / "a.txt", b"\xe9")),
        *(KOHYA, "caption-encoding", ERROR, "10_sks/a.txt", ("UTF-8",)),
    ),
    (
        ".caption",
        lambda d: (image(d / "10_sks" / "a.png"), text(d / "10_sks" / "a.caption")),
        *(KOHYA, "unused-caption", WARNING, "10_sks/a.caption", (".txt",)),
    ),
    (
        "deeper",
        lambda d: (image(d / "10_sks" / "a.png"), image(d / "10_sks" / "old" / "b.png")),
        *(KOHYA, "sub-folder", WARNING, "10_sks/old", ("1 image", "not used")),
    ),
    (
        "gif",
        lambda d: (image(d / "10_sks" / "a.png"), image(d / "10_sks" / "b.gif")),
        *(KOHYA, "kohya-suffix", WARNING, "10_sks/b.gif", (".gif", "Convert")),
    ),
    (
        "only gif",
        lambda d: (image(d / "10_sks" / "b.gif"), image(d / "1_dog" / "a.png")),
        *(KOHYA, "empty-repeats-folder", WARNING, "10_sks", ("no image",)),
    ),
    (
        "cut in a kohya folder",
        lambda d: cut(image(d / "10_sks" / "a.jpg")),
        *(KOHYA, "truncated", ERROR, "10_sks/a.jpg", ("cut off",)),
    ),
]


def copy_as(folder: Path, name: bytes) -> None:
    with open(os.fsencode(folder) + b"/" + name, "wb") as file:  # noqa: PTH123  a Path has no bytes
        file.write(b"whatever")


def heic(path: Path) -> None:
    text(path, b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic" + bytes(64))


@pytest.mark.parametrize(
    ("build", "layout", "code", "severity", "path", "words"),
    [broken[1:] for broken in BROKEN],
    ids=[f"{broken[2]}: {broken[0]}" for broken in BROKEN],
)
def test_a_broken_dataset(
    tmp_path: Path,
    build: Build,
    layout: Layout,
    code: str,
    severity: Severity,
    path: str,
    words: tuple[str, ...],
) -> None:
    folder = tmp_path / "my data"
    folder.mkdir()
    build(folder)
    before = _tree(folder)

    ledger = check(folder, layout, resolution=64 if code == "small" else None)

    found = [finding for finding in ledger.findings if (finding.code, finding.path) == (code, path)]
    assert len(found) == 1, ledger.findings
    assert found[0].severity is severity
    for word in words:
        assert word in found[0].message
    # nothing else is wrong, and no other error hides this one
    assert {finding.code for finding in ledger.errors} == ({code} if severity is ERROR else set()), ledger.errors
    assert len(ledger.rows) == len(before)
    json.dumps(ledger.to_json()).encode()
    if severity is ERROR:
        with pytest.raises(DatasetError, match="error") as error:
            ledger.raise_for_errors()
        assert all(word in str(error.value) for word in words)
    else:
        ledger.raise_for_errors()
        assert ledger.examples
    assert _tree(folder) == before


def test_every_code_has_its_broken_dataset() -> None:
    elsewhere = {"unreadable", "damaged", "colour-mode", "itself-a-repeats-folder", "metadata-size"}
    assert {broken[3] for broken in BROKEN} | elsewhere == set(SEVERITY)
    assert len(BROKEN) > 100


def test_the_repeats_folder_itself(tmp_path: Path) -> None:
    folder = image(tmp_path / "10_sks dog" / "a.png").parent
    [error] = check(folder, KOHYA).errors
    assert error.code == "itself-a-repeats-folder"
    assert "Give the folder that it lies in" in error.message


def test_a_photoshop_colour_mode(tmp_path: Path) -> None:
    Image.new("LAB", (16, 16)).save(tmp_path / "a.tif")
    [error] = check(tmp_path, IMAGES).errors
    assert (error.code, "Save it as RGB" in error.message) == ("colour-mode", True)


def test_a_flipped_bit(tmp_path: Path) -> None:
    path = image(tmp_path / "a.png")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    [error] = check(tmp_path, IMAGES).errors
    assert error.code == "damaged"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read(tmp_path: Path) -> None:
    image(tmp_path / "a.png").chmod(0)
    image(tmp_path / "b" / "c.png").parent.chmod(0)
    assert [error.code for error in check(tmp_path, IMAGES).errors] == ["unreadable", "unreadable"]


@pytest.mark.parametrize(
    ("name", "words"),
    [("gone", "no such folder"), ("a.png", "is a file"), ("a.zip", "Unpack it first"), ("a\x00b", "cannot be opened")],
)
def test_no_folder_at_all(tmp_path: Path, name: str, words: str) -> None:
    image(tmp_path / "a.png")
    text(tmp_path / "a.zip")
    with pytest.raises(DatasetError, match=words):
        check(tmp_path / name, IMAGES)


def test_all_errors_are_told_at_once(tmp_path: Path) -> None:
    for number in range(30):
        text(tmp_path / f"{number:02}.jpg", "")
    text(tmp_path / "x.heic")
    with pytest.raises(DatasetError) as error:
        check(tmp_path, IMAGES).raise_for_errors()
    told = str(error.value)
    assert "31 errors" in told
    assert "19.jpg" in told
    assert "20.jpg" not in told
    assert "and 10 more of this kind (empty-file)" in told
    assert "x.heic" in told


def _tree(folder: Path) -> dict[bytes, object]:
    """Every entry but folders, with what it holds."""
    tree: dict[bytes, object] = {}
    for parent, folders, files in os.walk(os.fsencode(folder)):
        for name in [*files, *(name for name in folders if os.path.islink(os.path.join(parent, name)))]:  # noqa: PTH114, PTH118
            path = Path(os.fsdecode(parent)) / os.fsdecode(name)
            status = path.lstat()
            content: object = path.read_bytes() if path.is_file() and not path.is_symlink() else None
            tree[os.fsencode(path)] = (status.st_mode, status.st_mtime_ns, content)
    return tree
