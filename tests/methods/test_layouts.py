"""The three layouts: what is read, what is said about it, and that nothing is ever touched."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sdtune.errors import DatasetError
from sdtune.methods.images import open_image
from sdtune.methods.layouts import Layout, check, check_source
from sdtune.methods.ledger import Example, Ledger, Row
from sdtune.methods.sources import File, Obstacle
from sdtune.methods.threads import in_threads

SEED = iter(range(10**6))


def png(size: tuple[int, int] = (16, 16), mode: str = "RGB", **options: object) -> bytes:
    """A picture unlike any other."""
    shade = next(SEED)
    image = Image.new("RGB", size, (shade % 256, shade // 256, 0)).convert(mode)
    stream = io.BytesIO()
    image.save(stream, "PNG", **options)
    return stream.getvalue()


def write(folder: Path, files: dict[str, bytes | str]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def metadata(*rows: tuple[str, str]) -> str:
    return "".join(json.dumps({"file_name": name, "text": text}) + "\n" for name, text in rows)


def captions(ledger: Ledger) -> dict[str, str | None]:
    return {example.image: example.caption for example in ledger.examples}


def fates(ledger: Ledger) -> dict[str, str]:
    return {row.path: row.reason or row.fate for row in ledger.rows}


def test_images_with_captions_beside_them(tmp_path: Path) -> None:
    folder = write(
        tmp_path,
        {
            "a.png": png((20, 30)),
            "a.txt": "\ufeff a cat \r\n",
            "b.PNG": png(),
            "b.caption": "a dog",
            "c.jpeg": png(),
            "c.TXT": "a bird",
            ".DS_Store": "",
            "._a.png": "AppleDouble",
            "Thumbs.db": "",
            ".ipynb_checkpoints/a-checkpoint.png": png(),
            "__MACOSX/a.png": "",
            "info.json": "{}",
            "movie.mp4": "",
        },
    )
    ledger = check(folder, Layout.IMAGES)
    assert ledger.ok
    assert captions(ledger) == {"a.png": "a cat", "b.PNG": "a dog", "c.jpeg": "a bird"}
    assert ledger.examples[0] == Example("a.png", "a cat", 20, 30)
    assert fates(ledger) == {
        "a.png": "used",
        "b.PNG": "used",
        "c.jpeg": "used",
        "a.txt": "caption",
        "b.caption": "caption",
        "c.TXT": "caption",
        **dict.fromkeys([".DS_Store", "._a.png", "Thumbs.db", "__MACOSX/a.png"], "system-file"),
        ".ipynb_checkpoints/a-checkpoint.png": "system-file",
        "info.json": "stray",
        "movie.mp4": "stray",
    }
    counts = ledger.counts()
    assert (counts.files, counts.used, counts.dropped) == (13, 3, {"system-file": 5, "stray": 2})
    assert [finding.code for finding in ledger.findings] == ["wrong-suffix"]


def test_images_without_captions_leave_them_to_the_prompt(tmp_path: Path) -> None:
    ledger = check(write(tmp_path, {"b.png": png(), "a.png": png()}), Layout.IMAGES)
    assert captions(ledger) == {"a.png": None, "b.png": None}
    assert not ledger.findings


def test_images_with_metadata_need_no_row_each(tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {"a.png": png(), "b.png": png(), "sub/c.png": png()}
    files["metadata.jsonl"] = metadata(("a.png", "a cat"), ("sub/c.png", "a dog"))
    ledger = check(write(tmp_path, files), Layout.IMAGES)
    assert captions(ledger) == {"a.png": "a cat", "b.png": None}
    assert [finding.code for finding in ledger.findings] == ["mixed-captions", "sub-folder"]
    assert "1 of 2" in ledger.findings[0].message


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (
            "metadata.jsonl",
            '\ufeff{"file_name": "a.png", "text": " x "}\r\n\r\n  {"text": "y, z", "file_name": "s/b.png", "n": 1}',
        ),
        ("metadata.csv", '\ufefffile_name,n,text\r\na.png,1,x\r\n\r\n./s/b.png,2,"y, z"\r\n'),
    ],
)
def test_captioned(tmp_path: Path, name: str, content: str) -> None:
    ledger = check(write(tmp_path, {"a.png": png(), "s/b.png": png(), "c.png": png(), name: content}), Layout.CAPTIONED)
    assert captions(ledger) == {"a.png": "x", "s/b.png": "y, z"}
    assert fates(ledger) == {"a.png": "used", "s/b.png": "used", "c.png": "no-row", name: "metadata"}
    assert [(finding.code, finding.path) for finding in ledger.findings] == [("no-row", "c.png")]


def test_captioned_line_breaks_inside_a_csv_text(tmp_path: Path) -> None:
    content = 'file_name,text\na.png,"a ""cat""\non a mat"\nb.png,\n'
    ledger = check(write(tmp_path, {"a.png": png(), "b.png": png(), "metadata.csv": content}), Layout.CAPTIONED)
    assert ledger.examples[0].caption == 'a "cat"\non a mat'
    assert [(error.code, error.message[:7]) for error in ledger.errors] == [("empty-caption", "line 4:")]


def test_one_picture_may_have_two_captions(tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {"a.png": png(), "metadata.jsonl": metadata(("a.png", "x"), ("a.png", "y"))}
    ledger = check(write(tmp_path, files), Layout.CAPTIONED)
    assert [example.caption for example in ledger.examples] == ["x", "y"]
    assert [row.path for row in ledger.rows] == ["a.png", "metadata.jsonl"]


def test_an_error_in_the_metadata_is_not_blamed_on_the_images(tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {"a.png": png(), "b.png": png(), "metadata.jsonl": metadata(("a.png", "x")) + "{"}
    ledger = check(write(tmp_path, files), Layout.CAPTIONED)
    assert [finding.code for finding in ledger.findings] == ["bad-json"]


def test_kohya(tmp_path: Path) -> None:
    folder = write(
        tmp_path,
        {
            "10_sks dog/a.png": png((20, 30)),
            "10_sks dog/a.txt": "a sks dog, running",
            "10_sks dog/b.PNG": png(),
            "10_sks dog/face_1_100_200_300.png": png(),
            "10_sks dog/face.txt": "a face",
            "2_a_b/c.Png": png(),
            "3/d.png": png(),
            "3/d.txt": "a day",
            "3/d_sd.npz": "a cache",
            "logs/run.txt": "nothing",
            "README.md": "",
        },
    )
    ledger = check(folder, Layout.KOHYA)
    assert not ledger.findings
    assert ledger.examples == (
        Example("10_sks dog/a.png", "a sks dog, running", 20, 30, 10),
        Example("10_sks dog/b.PNG", "sks dog", 16, 16, 10),
        Example("10_sks dog/face_1_100_200_300.png", "a face", 16, 16, 10),
        Example("2_a_b/c.Png", "a_b", 16, 16, 2, plain=False),
        Example("3/d.png", "a day", 16, 16, 3),
    )
    assert fates(ledger)["logs/run.txt"] == fates(ledger)["3/d_sd.npz"] == "stray"


def test_kohya_tells_of_every_wrong_folder(tmp_path: Path) -> None:
    folder = write(tmp_path, {"10_a/a.png": png(), "b/b.png": png(), "0_c/c.png": png(), "d.png": png()})
    ledger = check(folder, Layout.KOHYA)
    assert [(error.path, error.code) for error in ledger.errors] == [
        ("", "flat-images"),
        ("0_c", "bad-repeats"),
        ("b", "no-repeats"),
    ]
    assert fates(ledger)["d.png"] == "flat-images"


@pytest.mark.parametrize("layout", Layout)
def test_the_trainer_reads_what_was_checked(tmp_path: Path, layout: Layout) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    same = png()
    pictures = {
        "a.png": png((40, 20), exif=exif),
        "b.png": png(mode="RGBA"),
        "c.png": png(mode="I;16"),
        "d.png": same,
        "e.png": same,
        "f.png": png((80, 16)),
    }
    files: dict[str, bytes | str] = dict(pictures)
    if layout is Layout.CAPTIONED:
        files["metadata.jsonl"] = metadata(*((name, "x") for name in reversed(pictures)))
    if layout is Layout.KOHYA:
        files = {f"4_x/{name}": content for name, content in pictures.items()}
    folder = write(tmp_path, files)
    checked = check(folder, layout, resolution=512)
    read = check(folder, layout, decode=False, workers=1)
    assert checked.ok
    assert checked.examples == read.examples
    assert checked.rows == read.rows
    assert [Path(example.image).stem for example in read.examples] == ["a", "b", "c", "d", "f"]
    assert [example.plain for example in read.examples] == [False, False, False, True, True]
    for example in read.examples:
        opened = open_image(folder / example.image)
        assert (opened.mode, opened.width, opened.height) == ("RGB", example.width, example.height)


@pytest.mark.parametrize(
    "name",
    ["a b c", "Katze und Hündin", unicodedata.normalize("NFD", "Hündin"), "猫の写真", "🐈", "x" * 200, "-rf", "[b]*?"],
)
def test_any_name_will_do(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name / ("y" * 200)
    write(folder, {f"{name}.png": png(), f"{name}.txt": name})
    assert captions(check(folder, Layout.IMAGES)) == {f"{name}.png": name.strip()}
    write(folder, {"metadata.jsonl": metadata((f"{name}.png", name))})
    assert captions(check(folder, Layout.CAPTIONED)) == {f"{name}.png": name.strip()}
    write(tmp_path / "k", {f"7_{name}/a.png": png()})
    assert captions(check(tmp_path / "k", Layout.KOHYA)) == {f"7_{name}/a.png": name}


def test_a_path_relative_to_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, {"10_sks/a.png": png()})
    monkeypatch.chdir(tmp_path / "10_sks")
    assert check(Path(), Layout.IMAGES).ok
    assert check(Path(), Layout.KOHYA).errors[0].code == "itself-a-repeats-folder"
    assert check(Path(".."), Layout.KOHYA).ok


def test_a_link_inside_the_dataset_is_a_file_like_any_other(tmp_path: Path) -> None:
    write(tmp_path / "data", {"a.png": png(), "c.txt": "a cat"})
    (tmp_path / "data" / "a.txt").symlink_to("c.txt")
    (tmp_path / "link").symlink_to("data")
    assert captions(check(tmp_path / "link", Layout.IMAGES)) == {"a.png": "a cat"}


def test_the_ledger_as_json(tmp_path: Path) -> None:
    ledger = check(write(tmp_path, {"a.png": png(), "b.jpg": "text"}), Layout.IMAGES)
    told = json.loads(json.dumps(ledger.to_json()))
    assert told["ok"] is False
    assert told["counts"] == {"files": 2, "used": 1, "dropped": {"not-an-image": 1}}
    assert told["rows"][1] == {"path": "b.jpg", "fate": "dropped", "reason": "not-an-image"}
    assert told["findings"][0]["severity"] == "error"
    assert told["examples"][0]["image"] == "a.png"
    assert ledger.errors + ledger.warnings + ledger.notes == ledger.findings


def test_progress_ends_at_all_and_is_not_told_too_often(tmp_path: Path) -> None:
    write(tmp_path, {f"{number:03}.png": png() for number in range(200)})
    told: list[tuple[int, int]] = []
    check(tmp_path, Layout.IMAGES, progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (200, 200)
    assert told == sorted(told)
    assert len(told) < 50


def test_progress_is_told_ten_times_a_second_at_most() -> None:
    told: list[tuple[int, int]] = []
    started = time.monotonic()
    results = in_threads(str, range(5000), 2, lambda done, total: told.append((done, total)))
    assert results == [str(number) for number in range(5000)]
    assert len(told) <= 1 + (time.monotonic() - started) / 0.1


@pytest.mark.parametrize(("side", "told"), [(63, True), (64, False), (65, False)])
def test_small_is_what_must_be_enlarged(tmp_path: Path, side: int, told: bool) -> None:
    write(tmp_path, {"a.png": png((side, 100))})
    assert [finding.code for finding in check(tmp_path, Layout.IMAGES, resolution=64).findings] == ["small"] * told


def test_an_error_of_the_caller_comes_through(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": png()})

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        check(tmp_path, Layout.IMAGES, progress=stop)


@pytest.mark.parametrize("how", ["-c", "-"])
def test_it_works_without_a_script(tmp_path: Path, how: str) -> None:
    """As in a REPL or a notebook: no file holds the code, and nothing of the caller's is run twice."""
    write(tmp_path, {f"{number}.png": png() for number in range(40)})
    code = (
        "from pathlib import Path; from sdtune.methods.layouts import Layout, check; print('once');"
        f"print(len(check(Path({str(tmp_path)!r}), Layout.IMAGES, workers=4).examples))"
    )
    command = [sys.executable, "-W", "error", "-c", code] if how == "-c" else [sys.executable, "-W", "error", "-"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(command, input=code, capture_output=True, text=True, env=environment, check=False)
    assert (result.stdout, result.stderr) == ("once\n40\n", "")


# --- another source than a local folder -------------------------------------------------------------------------------


@dataclass
class ObjectInBucket:
    path: str
    content: bytes
    reads: list[int] = field(default_factory=list)

    @property
    def size(self) -> int:
        return len(self.content)

    def open(self) -> BinaryIO:
        reads = self.reads

        class Counted(io.BytesIO):
            def read(self, size: int | None = -1) -> bytes:
                data = super().read(size)
                reads.append(len(data))
                return data

        return Counted(self.content)

    def digest(self) -> bytes:
        return b"md5 of " + self.content


@dataclass
class Bucket:
    objects: list[ObjectInBucket]
    root: str = "gs://bucket/10_sks"
    name: str = "10_sks"
    workers: int | None = None

    def files(self) -> Iterator[File | Obstacle]:
        yield from self.objects


def test_a_bucket_is_read_by_listing_and_headers() -> None:
    noise = io.BytesIO()
    Image.effect_noise((600, 400), 50).save(noise, "JPEG")
    objects = [ObjectInBucket("b.jpg", noise.getvalue()), ObjectInBucket("a.png", png()), ObjectInBucket("c.png", b"x")]
    ledger = check_source(Bucket(objects), Layout.IMAGES, decode=False)
    assert ledger.examples == (Example("a.png", None, 16, 16), Example("b.jpg", None, 600, 400))
    assert [error.path for error in ledger.errors] == ["c.png"]
    assert sum(objects[0].reads) < 4096 < objects[0].size
    with pytest.raises(DatasetError, match="gs://bucket/10_sks: 1 error"):
        ledger.raise_for_errors()
    assert check_source(Bucket(objects), Layout.KOHYA).errors[0].code == "itself-a-repeats-folder"


# --- whatever the bytes -----------------------------------------------------------------------------------------------

whole = {
    format_: (lambda stream: (Image.effect_noise((16, 16), 40).save(stream, format_), stream.getvalue())[1])(
        io.BytesIO()
    )
    for format_ in ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")
}


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A real image with a few bytes changed, taken away or put in."""
    data = bytearray(draw(st.sampled_from(sorted(whole.values()))))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        data[at : at + draw(st.integers(0, 8))] = draw(st.binary(max_size=8))
    return bytes(data)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200) | damaged(), st.sampled_from(["x.jpg", "x.png", "x.tif", "x"]), st.booleans())
def test_no_bytes_of_an_image_break_the_check(data: bytes, name: str, decode: bool) -> None:
    ledger = check_source(Bucket([ObjectInBucket(name, data)]), Layout.IMAGES, decode=decode)
    assert [row.path for row in ledger.rows] == [name]
    assert ledger.ok == bool(ledger.examples)
    json.dumps(ledger.to_json()).encode()
    if ledger.ok and decode and not data.startswith(b"\x89PNG"):
        opened = open_image(io.BytesIO(data))
        assert (opened.width, opened.height) == (ledger.examples[0].width, ledger.examples[0].height)


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.sampled_from(["a.png", "../a.png", "s/b.png"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["file_name", "text", "x"]), inner),
    max_leaves=6,
)
lines = st.lists(json_like.map(json.dumps) | st.text(max_size=20), max_size=5).map("\n".join)


@settings(max_examples=300, deadline=None)
@given(
    st.binary(max_size=100) | lines.map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.sampled_from(["metadata.jsonl", "metadata.csv", "a.txt"]),
    st.sampled_from(list(Layout)),
)
def test_no_bytes_of_a_caption_break_the_check(data: bytes, name: str, layout: Layout) -> None:
    files = [ObjectInBucket("a.png", whole["PNG"]), ObjectInBucket("s/b.png", whole["PNG"][:-1] + b"x")]
    ledger = check_source(Bucket([*files, ObjectInBucket(name, data)]), layout)
    assert len(ledger.rows) == 3
    assert ledger.examples or not ledger.ok
    json.dumps(ledger.to_json()).encode()
    for finding in ledger.findings:
        assert (finding.path + finding.message).isprintable()
    for example in ledger.examples:
        assert example.caption is None or example.caption.encode()
    for row in ledger.rows:
        assert isinstance(row, Row)
