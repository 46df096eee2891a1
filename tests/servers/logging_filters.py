"""Filters of Cloud Logging, of which this server knows a part: comparisons, AND, OR, parentheses.

Grammar: the logging query language, in which OR binds closer than AND, and AND may be left out. What is not known here
is refused, so that no test passes by a filter that lets everything through.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any, NamedTuple

SECOND = 1_000_000_000


class Stored(NamedTuple):
    """One entry. time, received: nanoseconds since 1970."""

    time: int
    insert_id: str
    data: bytes
    job: str
    task: str
    received: int


_TOKEN = re.compile(
    r"""\s*(?:(?P<mark>[()])|(?P<word>AND|OR)\b|(?P<field>[A-Za-z_][\w.]*)\s*(?P<op>>=|<=|!=|=|>|<)\s*"""
    r"""(?P<value>"(?:[^"\\]|\\.)*"|[\w.:+-]+))"""
)
_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "=": lambda a, b: a == b, "!=": lambda a, b: a != b, "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b, ">": lambda a, b: a > b, ">=": lambda a, b: a >= b,
}  # fmt: skip
_FIELDS: dict[str, Callable[[Stored], Any]] = {
    "timestamp": lambda stored: stored.time,
    "receiveTimestamp": lambda stored: stored.received,
    "insertId": lambda stored: stored.insert_id,
    "resource.type": lambda stored: "ml_job",
    "resource.labels.job_id": lambda stored: stored.job,
    "resource.labels.task_name": lambda stored: stored.task,
}
Test = Callable[[Stored], bool]


class Query:
    """A filter; what a list sorted by time and job can answer is taken out of ``rest``, None if nothing is left."""

    def __init__(self) -> None:
        self.earliest, self.latest = 0, 1 << 63
        self.job: str | None = None
        self.mentions_time = False
        self.rest: Test | None = None


def parse(text: str) -> Query:
    """A filter, read. ValueError: it is wrong, or beyond this server."""
    query, tokens = Query(), _tokens(text)
    query.mentions_time = bool(re.search(r"\b(timestamp|receiveTimestamp)\b", text))
    tests: list[Test] = []
    while tokens:
        tests.append(_either(tokens, query))
        if tokens and tokens[0]["word"] == "AND":
            tokens.pop(0)
            if not tokens:
                raise ValueError("it ends with AND.")
    needed = [test for test in tests if test is not _always]
    query.rest = (lambda stored: all(test(stored) for test in needed)) if needed else None
    return query


def _either(tokens: list[re.Match[str]], query: Query | None) -> Test:
    """Terms joined by OR, which binds closer than AND here."""
    alone = len(tokens) == 1 or tokens[1]["word"] != "OR"
    tests = [_term(tokens, query if alone else None)]
    while tokens and tokens[0]["word"] == "OR":
        tokens.pop(0)
        tests.append(_term(tokens, None))
    return tests[0] if len(tests) == 1 else lambda stored: any(test(stored) for test in tests)


def _term(tokens: list[re.Match[str]], query: Query | None) -> Test:
    token = tokens.pop(0) if tokens else None
    if token is not None and token["mark"] == "(":
        tests = [_either(tokens, None)]
        while tokens and tokens[0]["mark"] != ")":
            if tokens[0]["word"] == "AND":
                tokens.pop(0)
            tests.append(_either(tokens, None))
        if not tokens:
            raise ValueError("a parenthesis is not closed.")
        tokens.pop(0)
        return lambda stored: all(test(stored) for test in tests)
    if token is None or not token["field"]:
        raise ValueError("a comparison is missing.")
    return _comparison(token["field"], token["op"], token["value"], query)


def _comparison(name: str, op: str, value: str, query: Query | None) -> Test:
    text = json.loads(value) if value.startswith('"') else value
    wanted = nanoseconds(text) if name in ("timestamp", "receiveTimestamp") else text
    if query and name == "timestamp" and op in (">", ">="):
        query.earliest = max(query.earliest, wanted + (op == ">"))
        return _always
    if query and name == "timestamp" and op in ("<", "<="):
        query.latest = min(query.latest, wanted + (op == "<="))
        return _always
    if query and name == "resource.labels.job_id" and op == "=" and query.job is None:
        query.job = text
        return _always
    if name == "resource.type" and op == "=" and text == "ml_job":
        return _always
    if name not in _FIELDS and not name.startswith("resource.labels."):
        raise ValueError(f'this server does not know the field "{name}".')
    read, compare = _FIELDS.get(name, lambda stored: None), _OPERATORS[op]
    return lambda stored: (found := read(stored)) is not None and compare(found, wanted)


def _always(stored: Stored) -> bool:
    return True


def _tokens(text: str) -> list[re.Match[str]]:
    def read() -> Iterator[re.Match[str]]:
        at, end = 0, len(text.rstrip())
        while at < end:
            found = _TOKEN.match(text, at)
            if not found:
                raise ValueError(f"syntax error at column {at}: {text[at : at + 40]!r}.")
            yield found
            at = found.end()

    return list(read())


def nanoseconds(text: str) -> int:
    """Since 1970; ValueError if ``text`` is no timestamp of RFC 3339."""
    found = re.fullmatch(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?(Z|[+-]\d\d:\d\d)", text)
    if not found:
        raise ValueError(f'"{text}" is no timestamp.')
    return int(datetime.fromisoformat(found[1] + found[3]).timestamp()) * SECOND + int((found[2] or "").ljust(9, "0"))
