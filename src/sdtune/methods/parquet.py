"""The rows of metadata.parquet, by pyarrow: large, so imported only where there is such a file."""

from __future__ import annotations

from typing import Any, BinaryIO

from sdtune.errors import ProjectError
from sdtune.methods.ledger import Draft
from sdtune.methods.sources import File

TEXT_COLUMNS = {"file_name": "bad-file-name", "text": "bad-caption"}
"""The columns that are read, and the code of a finding about one of another type. Others may hold whole images."""
MOST_ROWS, MOST_TEXT = 10_000_000, 2**30
"""Rows, and letters in them. A file of a few kilobytes may say one row so often that no memory holds them."""
AT_ONCE = 1024
"""Rows that are unpacked together."""


def read_parquet(file: File, draft: Draft) -> list[tuple[str, dict[str, Any]]]:
    """The rows, each after where it stands (``row 1``), with every column by name; what is not read is None.

    Faults are noted, and leave no rows. ProjectError: pyarrow is not installed.
    """
    try:
        from pyarrow import ArrowException
    except ImportError:
        raise ProjectError(
            f"{file.path} is read by pyarrow, which this Python does not have; install it with: "
            "pip install -e '.[parquet]' in sdtune's folder. Or write the same rows as metadata.jsonl."
        ) from None
    try:
        stream = file.open()
    except OSError as error:
        draft.find("unreadable", file.path, f"cannot be opened ({error.strerror or error}).")
        return []
    try:
        with stream:
            return _rows(stream, file.path, draft)
    # Damaged bytes end in any of these: OSError from a codec, KeyError from two columns of one name.
    except (ArrowException, OSError, ValueError, KeyError, MemoryError) as error:
        reason = str(error).strip("'\" .").splitlines() or [type(error).__name__]
        draft.find("bad-parquet", file.path, f"is no whole Parquet file ({reason[0]}). Write it again.")
        return []


def _rows(stream: BinaryIO, path: str, draft: Draft) -> list[tuple[str, dict[str, Any]]]:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(stream) as opened:
        schema = opened.schema_arrow
        wanted = [name for name in TEXT_COLUMNS if name in schema.names]
        wrong = {name: schema.field(name).type for name in wanted if not _is_text(schema.field(name).type)}
        for name, kind in wrong.items():
            draft.find(TEXT_COLUMNS[name], path, f"its column {name} is of the type {kind}; it must hold strings.")
        if wrong:
            return []
        if (rows := opened.metadata.num_rows) > MOST_ROWS:
            draft.find("metadata-size", path, f"has {rows:,} rows; a list of captions has {MOST_ROWS:,} at most.")
            return []
        unread = dict.fromkeys(schema.names)
        found: list[tuple[str, dict[str, Any]]] = []
        letters = 0
        for batch in opened.iter_batches(batch_size=AT_ONCE, columns=wanted):
            columns = {name: _strings(batch.column(name), name, len(found), path, draft) for name in wanted}
            if None in columns.values():
                return []
            letters += sum(len(text or "") for values in columns.values() for text in values or ())
            if letters > MOST_TEXT:
                draft.find("metadata-size", path, f"has more than {MOST_TEXT:,} letters of text.")
                return []
            for number in range(batch.num_rows):
                row = {name: values[number] for name, values in columns.items() if values}
                found.append((f"row {len(found) + 1}", {**unread, **row}))
        return found


def _is_text(kind: Any) -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):  # categories, as pandas calls them
        kind = kind.value_type
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


def _strings(column: Any, name: str, before: int, path: str, draft: Draft) -> list[str | None] | None:
    """The values of a column; None if one is not UTF-8, which Parquet promises but no writer need keep.

    before: rows that were read already.
    """
    values: list[str | None] = []
    for number, cell in enumerate(column, before + 1):
        try:
            values.append(cell.as_py())
        except UnicodeDecodeError:
            message = f"row {number}: {name} is not UTF-8 text. Write the file with text in UTF-8."
            draft.find("metadata-encoding", path, message)
            return None
    return values
