"""Files that were good once: bytes changed, cut, doubled, for hypothesis."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence

from hypothesis import strategies as st

INTERESTING = [b"\x00", b"\xff", b"\x7f", b"\x80", b"\xff\xff\xff\xff", b"\x00\x00\x00\x80", b"\n", b'"', b"{", b"IEND"]


def mutated(originals: Sequence[bytes]) -> st.SearchStrategy[bytes]:
    """One of ``originals`` with one to six changes; now and then what was never one of them."""
    return st.one_of(st.builds(_changed, st.sampled_from(originals), CHANGES), st.binary(max_size=200))


CHANGES = st.lists(
    st.tuples(
        # Headers are where the beginning is: most changes should be there.
        st.floats(0, 1) | st.floats(0, 0.02),
        st.sampled_from(["set", "insert", "cut", "drop", "double"]),
        st.sampled_from(INTERESTING) | st.binary(min_size=1, max_size=4),
    ),
    min_size=1,
    max_size=6,
)


def _changed(original: bytes, changes: list[tuple[float, str, bytes]]) -> bytes:
    data = original
    for where, how, new in changes:
        at = min(int(where * len(data)), max(0, len(data) - 1))
        if how == "set":
            data = data[:at] + new + data[at + len(new) :]
        elif how == "insert":
            data = data[:at] + new + data[at:]
        elif how == "cut":
            data = data[:at]
        elif how == "drop":
            data = data[:at] + data[at + len(new) * 8 :]
        else:
            data = data[: at + 64] + data[at:]
    return data


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["", "a.png", 1e400]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
"""Any value that JSON can have, and a few that Python's can."""


def like(example: object) -> st.SearchStrategy[object]:
    """Values shaped as ``example``, with something else in some places."""
    if isinstance(example, dict):
        return JSON | st.fixed_dictionaries(
            {}, optional={name: like(value) for name, value in example.items()}
        ).flatmap(
            lambda found: st.dictionaries(st.text(max_size=5), JSON, max_size=1).map(lambda more: {**found, **more})
        )
    if isinstance(example, list):
        return JSON | st.lists(like(example[0]) if example else JSON, max_size=4)
    return st.just(example) | JSON


def safetensors(header: object, data: bytes, length: int | None = None) -> bytes:
    """A file of this header, true or not. length: what it says that the header takes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length % 2**64) + text + data
