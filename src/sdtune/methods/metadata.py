"""metadata.jsonl, .csv and .parquet: which one there is, and its rows, as Hugging Face's imagefolder reads them."""

from __future__ import annotations

import csv
import difflib
import io
import json
import re
import unicodedata
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from posixpath import basename, dirname, normpath, splitext
from typing import Any

from sdtune.methods.folders import Folder, number_of
from sdtune.methods.ledger import Draft
from sdtune.methods.parquet import read_parquet
from sdtune.methods.sources import File

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
EXAMPLE_ROW = '{"file_name": "cat.png", "text": "a photo of a cat"}'

LARGEST_METADATA = 512 * 2**20
"""Bytes. A million captions of 500 letters; what is larger would fill the memory, and is no list of captions."""

_MISNAMED = re.compile(r"meta.?data.*|.*\.jsonl.*|(captions?|prompts?|train)\.(json|csv|parquet)")
_FILE_NAME_WORDS = (
    "file",
    "filename",
    "file-name",
    "filepath",
    "file_path",
    "image",
    "image_file",
    "image_path",
    "path",
)
_TEXT_WORDS = ("caption", "captions", "prompt", "description", "label", "txt", "tags", "sentence", "additional_feature")


@dataclass(frozen=True, slots=True)
class MetadataRow:
    """One row. where: such as ``line 3``. text: None where an error about it has been noted."""

    where: str
    file_name: str
    text: str | None


def find_metadata(folder: Folder, draft: Draft, required: bool) -> File | None:
    """The one metadata file at the top, if it can be used. ``required``: its lack is an error."""
    present = [name for name in METADATA if name in folder.others]
    if len(present) > 1:
        draft.find("two-metadata", "", f"holds {' and '.join(present)}; exactly one is wanted. Remove the others.")
        return None
    if not present:
        _explain_no_metadata(folder, draft, required)
        return None
    for path in folder.others:
        if "/" in path and basename(path) in METADATA:
            draft.reject("ignored-metadata", path, f"is not read: {present[0]} at the top of the dataset is.")
    draft.keep(present[0], "metadata")
    return folder.others[present[0]]


def _explain_no_metadata(folder: Folder, draft: Draft, required: bool) -> None:
    misnamed = [path for path in folder.others if "/" not in path and _MISNAMED.fullmatch(path.lower())]
    for path in misnamed:
        kind = next((kind for kind in ("csv", "parquet") if f".{kind}" in path.lower()), "jsonl")
        right = f"metadata.{kind}"
        lines = ", with one JSON object per line," if re.search(r"\.json(?!l)", path.lower()) else ""
        if required:
            draft.reject("misnamed-metadata", path, f"is not read under this name. Rename it{lines} to {right}.")
        else:
            message = f"is not read under this name. If it has the captions, rename it{lines} to {right}."
            draft.reject("ignored-metadata", path, message)
    if required and not misnamed:
        hint = f"Write one line per image, such as {EXAMPLE_ROW}"
        if nested := next((path for path in folder.others if basename(path) in METADATA), None):
            hint = f"There is one in {dirname(nested)!r}: give that folder as the dataset."
        elif folder.texts:
            hint += f". (Captions in {splitext(next(iter(folder.texts)))[1]} files are not read by this method.)"
        draft.find("no-metadata", "", f"{number_of(len(folder.images), 'image')} and no metadata.jsonl. {hint}")


def read_metadata(file: File, draft: Draft, images: Collection[str]) -> list[MetadataRow] | None:
    """The rows that name one of ``images``, as Hugging Face's imagefolder takes them; all faults are noted.

    None if the file as a whole could not be read. ProjectError: it needs a library that is not installed.
    """
    before = len(draft.findings)
    read = read_parquet if file.path.lower().endswith(".parquet") else _read_text
    records = read(file, draft)
    broken = len(draft.findings) > before
    if not records:
        if not broken:
            draft.find("no-rows", file.path, f"has no rows. Write one per image, such as {EXAMPLE_ROW}")
        return None
    if not (_has_column("file_name", _FILE_NAME_WORDS, "no-file-name", records, file.path, draft)):
        return None
    if not (_has_column("text", _TEXT_WORDS, "no-text", records, file.path, draft)):
        return None
    names = _Names(images)
    rows = [row for where, record in records if (row := _row(where, record, file.path, draft, names)) is not None]
    _find_named_twice(rows, file.path, draft)
    return rows


Record = tuple[str, dict[str, Any]]
"""Where it stands, such as ``line 3``, and the row."""


def _read_text(file: File, draft: Draft) -> list[Record]:
    if file.size > LARGEST_METADATA:
        message = f"is {file.size // 2**20:,} MB; a list of captions has {LARGEST_METADATA // 2**20} at most."
        draft.find("metadata-size", file.path, message)
        return []
    try:
        with file.open() as stream:
            data = stream.read()
    except OSError as error:
        draft.find("unreadable", file.path, f"cannot be opened ({error.strerror or error}).")
        return []
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        draft.find("metadata-encoding", file.path, f"line {line} is not UTF-8 text. Save the file as UTF-8.")
        return []
    read = _read_csv if file.path.lower().endswith(".csv") else _read_jsonl
    return list(read(text, file.path, draft))


def _read_jsonl(text: str, path: str, draft: Draft) -> Iterator[Record]:
    lines = re.split(r"\r\n|\r|\n", text)
    first = text.lstrip()[:1]
    if first == "[":
        message = (
            f"is one JSON array; it must have one JSON object per line, without brackets and commas: {EXAMPLE_ROW}"
        )
        draft.find("json-array", path, message)
        return
    if next((line.strip() for line in lines if line.strip()), "") == "{":
        message = f"spreads its JSON over several lines; each line must be one whole object: {EXAMPLE_ROW}"
        draft.find("bad-json", path, message)
        return
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            hint = " Remove the comma at its end." if line.rstrip().endswith("},") else ""
            draft.find("bad-json", path, f"line {number}, column {error.colno}: not JSON ({error.msg}).{hint}")
            continue
        except (ValueError, RecursionError) as error:  # a number of 5,000 digits, a thousand brackets
            draft.find("bad-json", path, f"line {number}: not to be read as JSON ({error}).")
            continue
        if isinstance(record, dict):
            yield f"line {number}", record
        else:
            draft.find("bad-json", path, f"line {number}: is no JSON object. Write lines such as {EXAMPLE_ROW}")


def _read_csv(text: str, path: str, draft: Draft) -> Iterator[Record]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] | None = None
    try:
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            if header is None:
                header = cells
                if len(cells) == 1 and (found := re.search(r"[;\t|]", cells[0])):
                    sign = {";": "semicolons", "\t": "tabs", "|": "bars"}[found.group()]
                    draft.find("bad-csv", path, f"separates its columns by {sign}; use commas.")
                    return
            elif len(cells) != len(header):
                draft.find(
                    "bad-csv",
                    path,
                    f"line {reader.line_num}: {len(cells)} columns where the header has {len(header)}."
                    " Put a text that holds a comma in double quotes.",
                )
            else:
                yield f"line {reader.line_num}", dict(zip(header, cells, strict=True))
    except csv.Error as error:
        draft.find("bad-csv", path, f"line {reader.line_num}: not CSV ({error}).")


def _has_column(column: str, alike: tuple[str, ...], code: str, records: list[Record], path: str, draft: Draft) -> bool:
    """Whether a row has the column; one finding if none has, one per row that lacks it otherwise."""
    lacking = [(where, record) for where, record in records if column not in record]
    if len(lacking) < len(records):
        for where, _ in lacking:
            draft.find(code, path, f"{where}: has no {column}.")
        return True
    found = list(records[0][1])
    rename = next((key for key in found if key.strip().lower() in (column, *alike)), None)
    shown = ", ".join(repr(key) for key in found[:6]) or "none"
    advice = f"Rename {rename!r} to {column!r}." if rename is not None else f"Add it, as in {EXAMPLE_ROW}"
    draft.find(code, path, f"has the columns {shown}, but no {column!r}. {advice}")
    return False


def _row(where: str, record: dict[str, Any], path: str, draft: Draft, names: _Names) -> MetadataRow | None:
    if "file_name" not in record:
        return None
    name, text = record["file_name"], record.get("text")
    if (wrong := _wrong_file_name(name)) is not None:
        draft.find("bad-file-name", path, f"{where}: file_name {wrong}.")
        return None
    name = normpath(name)
    if name not in names.images:
        draft.find("missing-file", path, f"{where}: there is no image {_short(name)}.{names.advice(name)}")
        return None
    caption = None
    if not isinstance(text, str):
        if "text" in record:
            draft.find("bad-caption", path, f"{where}: text is {_kind(text)}; it must be a string.")
    elif not text.strip():
        message = f"{where}: text is empty. Describe the image or remove the {where.split()[0]}."
        draft.find("empty-caption", path, message)
    elif not _is_text(text):
        draft.find("bad-caption", path, f"{where}: text holds half a character (a lone surrogate).")
    else:
        caption = text.strip()
    return MetadataRow(where, name, caption)


def _wrong_file_name(name: object) -> str | None:
    """What is wrong with it, if anything: it must stay inside the dataset."""
    if not isinstance(name, str):
        return f"is {_kind(name)}; it must be a string"
    if not name.strip():
        return "is empty"
    shown = _short(name)
    if "://" in name:
        return f"{shown} is an address; the image must lie in the dataset"
    if name.startswith("/") or re.match(r"[A-Za-z]:[\\/]", name):
        return f"{shown} is an absolute path; write it relative to the metadata file"
    if ".." in re.split(r"[\\/]", name):
        return f"{shown} leads out of the dataset ('..')"
    if "\\" in name:
        return f"{shown} has backslashes; write forward slashes"
    return None


class _Names:
    """The images there are, and which of them a wrong name may mean."""

    def __init__(self, images: Collection[str]) -> None:
        self.images = images
        self._searches_left = 20  # difflib is slow: of thousands of wrong names the first ones must do

    @cached_property
    def _by_shape(self) -> dict[str, str]:
        return {_shape(image): image for image in self.images}

    @cached_property
    def _by_base(self) -> dict[str, str]:
        return {_shape(basename(image)): image for image in self.images}

    def advice(self, name: str) -> str:
        if (same := self._by_shape.get(_shape(name))) is not None:
            if same.casefold() == name.casefold():
                return f" There is {_short(same)}: upper and lower case must be the same."
            return f" There is {_short(same)}, written with other Unicode characters that look alike (NFC, NFD)."
        near = self._by_base.get(_shape(basename(name)))
        if near is None and self._searches_left:
            self._searches_left -= 1
            near = next(iter(difflib.get_close_matches(name, self.images, 1, 0.7)), None)
        return f" Did you mean {_short(near)}?" if near is not None else ""


def _find_named_twice(rows: list[MetadataRow], path: str, draft: Draft) -> None:
    named: dict[str, list[str]] = {}
    for row in rows:
        named.setdefault(row.file_name, []).append(row.where)
    for name, places in named.items():
        if len(places) > 1:
            kind = places[0].split()[0]
            *first, last = (place.split()[1] for place in places)
            message = (
                f"{kind}s {', '.join(first)} and {last} name {_short(name)}: it is used {len(places)} times. "
                f"Keep one {kind} if that is wrong."
            )
            draft.find("named-twice", path, message)


def _shape(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")


def _kind(value: object) -> str:
    kinds: dict[type, str] = {
        list: "a list",
        dict: "an object",
        bool: "true or false",
        type(None): "null",
        str: "a string",
    }
    return kinds.get(type(value), "a number")


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
