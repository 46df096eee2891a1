"""metadata.parquet: the same captions as its jsonl, whatever wrote it; damaged bytes are a finding."""

from __future__ import annotations

import builtins
import io
from typing import Any

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from sdtune.errors import ProjectError
from sdtune.methods.layouts import Layout, check_source
from sdtune.methods.ledger import Ledger
from tests.methods.test_layouts import Bucket, ObjectInBucket, captions, png, whole


def written(columns: dict[str, Any], **options: Any) -> bytes:
    stream = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), stream, **options)
    return stream.getvalue()


ROWS = {"file_name": ["a.png", "./s/b.png"], "text": [" x ", "y, z"]}


def checked(metadata: bytes, layout: Layout = Layout.CAPTIONED) -> tuple[Ledger, ObjectInBucket]:
    file = ObjectInBucket("metadata.parquet", metadata)
    return check_source(Bucket([ObjectInBucket("a.png", png()), ObjectInBucket("s/b.png", png()), file]), layout), file


@pytest.mark.parametrize(
    "metadata",
    [
        written(ROWS),
        written({name: pyarrow.array(values, pyarrow.large_string()) for name, values in ROWS.items()}),
        written({name: pyarrow.array(values).dictionary_encode() for name, values in ROWS.items()}),
        written({"n": [1, 2], **ROWS}, compression="gzip", row_group_size=1),
    ],
    ids=["strings", "large strings", "categories", "row groups"],
)
def test_what_it_says_is_read_from_any_source(metadata: bytes) -> None:
    ledger, _ = checked(metadata)
    assert captions(ledger) == {"a.png": "x", "s/b.png": "y, z"}
    assert not ledger.findings
    assert [row.fate for row in ledger.rows] == ["used", "metadata", "used"]


def test_it_gives_the_captions_of_a_flat_folder_too() -> None:
    ledger, _ = checked(written({"file_name": ["a.png"], "text": ["a cat"]}), Layout.IMAGES)
    assert captions(ledger) == {"a.png": "a cat"}


def test_pictures_inside_it_are_not_read() -> None:
    _, file = checked(written({**ROWS, "image": [bytes(1_000_000), bytes(range(256)) * 4000]}, compression="none"))
    assert sum(file.reads) < 200_000 < file.size


def test_without_pyarrow_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    imported = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.partition(".")[0] == "pyarrow":
            raise ImportError(name)
        return imported(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ProjectError, match=r"pip install -e '\.\[parquet\]' in sdtune's folder\. Or write"):
        checked(written(ROWS))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_no_damage_breaks_the_check(data: st.DataObject) -> None:
    damaged = bytearray(data.draw(st.sampled_from([written(ROWS), written(ROWS, compression="gzip")])))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(damaged)))
        damaged[at : at + data.draw(st.integers(0, 8))] = data.draw(st.binary(max_size=8))
    files = [ObjectInBucket("a.png", whole["PNG"]), ObjectInBucket("metadata.parquet", bytes(damaged))]
    ledger = check_source(Bucket(files), Layout.CAPTIONED)
    assert ledger.examples or not ledger.ok
    for finding in ledger.findings:
        assert (finding.path + finding.message).isprintable()
