"""What a check of a dataset finds: one row per file, every finding, and the examples a trainer will read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any, Literal

from sdtune.errors import DatasetError

SHOWN_PER_CODE = 20


class Layout(StrEnum):
    """How the folder of a dataset is laid out."""

    IMAGES = "images"
    """One flat folder of images; captions, if any, in <stem>.txt beside the image or in one metadata.jsonl."""
    CAPTIONED = "captioned"
    """Images and one metadata.jsonl (csv, parquet) with file_name and text, as Hugging Face's imagefolder reads it."""
    KOHYA = "kohya"
    """A folder of folders named <repeats>_<name>, as kohya's sd-scripts reads it."""


class Severity(StrEnum):
    ERROR = "error"
    """Training would break, or do something else than the user believes."""
    WARNING = "warning"
    """It can be trained on, but look."""
    NOTE = "note"


ERROR, WARNING, NOTE = Severity.ERROR, Severity.WARNING, Severity.NOTE

SEVERITY: dict[str, Severity] = {
    # the folder
    "empty": ERROR,
    "no-images": ERROR,
    "only-sub-folders": ERROR,
    "sub-folder": WARNING,
    "unreadable": ERROR,
    "bad-name": ERROR,
    "link-outside": ERROR,
    "link-broken": ERROR,
    "link-folder": WARNING,
    "special-file": ERROR,
    "archive": WARNING,
    "no-suffix": WARNING,
    # the kohya folders
    "itself-a-repeats-folder": ERROR,
    "flat-images": ERROR,
    "no-repeats": ERROR,
    "bad-repeats": ERROR,
    "many-repeats": WARNING,
    "no-caption": WARNING,
    "kohya-suffix": WARNING,
    "empty-repeats-folder": WARNING,
    # an image
    "empty-file": ERROR,
    "not-an-image": ERROR,
    "convert": ERROR,
    "truncated": ERROR,
    "damaged": ERROR,
    "too-large": ERROR,
    "too-small": ERROR,
    "colour-mode": ERROR,
    "animated": WARNING,
    "alpha": WARNING,
    "cmyk": WARNING,
    "deep-colour": WARNING,
    "small": WARNING,
    "narrow": WARNING,
    "duplicate": WARNING,
    "rotated": NOTE,
    "wrong-suffix": NOTE,
    # captions beside the images
    "empty-caption": ERROR,
    "caption-encoding": ERROR,
    "multi-line-caption": WARNING,
    "caption-without-image": WARNING,
    "unused-caption": WARNING,
    "mixed-captions": WARNING,
    # metadata.jsonl and its kin
    "no-metadata": ERROR,
    "misnamed-metadata": ERROR,
    "ignored-metadata": WARNING,
    "two-metadata": ERROR,
    "metadata-encoding": ERROR,
    "metadata-size": ERROR,
    "json-array": ERROR,
    "bad-json": ERROR,
    "bad-csv": ERROR,
    "bad-parquet": ERROR,
    "no-rows": ERROR,
    "no-file-name": ERROR,
    "no-text": ERROR,
    "bad-file-name": ERROR,
    "missing-file": ERROR,
    "bad-caption": ERROR,
    "named-twice": WARNING,
    "no-row": WARNING,
}
"""Every code a finding can carry; a code has one severity and keeps its name."""


@dataclass(frozen=True, slots=True)
class Example:
    """One image the trainer will read. ``image`` is relative to the dataset, with forward slashes."""

    image: str
    caption: str | None
    """None: the method's own prompt."""
    width: int
    height: int
    """After EXIF rotation."""
    repeats: int = 1
    plain: bool = True
    """Any program sees in the file what open_image sees: a common format, 8 bits, opaque, not rotated by EXIF."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Something the user should know. ``path`` is relative to the dataset; "" is the whole dataset."""

    severity: Severity
    code: str
    path: str
    message: str


@dataclass(frozen=True, slots=True)
class Row:
    """What becomes of one file; ``reason`` is a word such as the code of a finding, or ""."""

    path: str
    fate: Literal["used", "dropped", "caption", "metadata"]
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Counts:
    files: int
    used: int
    dropped: dict[str, int]
    """By reason, the most frequent first."""


@dataclass(frozen=True)
class Ledger:
    """The account of one dataset: every file has its row."""

    root: str
    layout: Layout
    rows: tuple[Row, ...]
    findings: tuple[Finding, ...]
    examples: tuple[Example, ...]

    @property
    def errors(self) -> tuple[Finding, ...]:
        return self._of(ERROR)

    @property
    def warnings(self) -> tuple[Finding, ...]:
        return self._of(WARNING)

    @property
    def notes(self) -> tuple[Finding, ...]:
        return self._of(NOTE)

    @property
    def ok(self) -> bool:
        """There is something to train on and nothing is wrong with it; warnings do not count."""
        return not self.errors

    def counts(self) -> Counts:
        dropped = Counter(row.reason for row in self.rows if row.fate == "dropped")
        by_number = sorted(dropped.items(), key=lambda item: (-item[1], item[0]))
        return Counts(len(self.rows), sum(row.fate == "used" for row in self.rows), dict(by_number))

    def to_json(self) -> dict[str, Any]:
        """Only str, int, bool, None, list and dict."""
        return {
            "root": printable(self.root),
            "layout": self.layout.value,
            "ok": self.ok,
            "counts": asdict(self.counts()),
            "findings": [asdict(finding) | {"severity": finding.severity.value} for finding in self.findings],
            "rows": [asdict(row) for row in self.rows],
            "examples": [asdict(example) for example in self.examples],
        }

    def raise_for_errors(self) -> None:
        """DatasetError that tells all errors, if there is one."""
        errors = self.errors
        if not errors:
            return
        number = "1 error" if len(errors) == 1 else f"{len(errors)} errors"
        lines = [f"{printable(self.root)}: {number} in the dataset (layout: {self.layout})."]
        told: Counter[str] = Counter()
        of_code = Counter(finding.code for finding in errors)
        for finding in errors:
            told[finding.code] += 1
            if told[finding.code] <= SHOWN_PER_CODE:
                lines.append(f"  {finding.path}: {finding.message}" if finding.path else f"  {finding.message}")
            elif told[finding.code] == of_code[finding.code]:
                lines.append(f"  ... and {told[finding.code] - SHOWN_PER_CODE} more of this kind ({finding.code})")
        raise DatasetError("\n".join(lines))

    def _of(self, severity: Severity) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.severity is severity)


@dataclass
class Draft:
    """A ledger while it is being written."""

    rows: dict[str, Row] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    def find(self, code: str, path: str, message: str) -> None:
        self.findings.append(Finding(SEVERITY[code], code, printable(path), printable(message)))

    def has_errors(self, path: str | None = None) -> bool:
        """Anywhere, or about this file."""
        return any(found.severity is ERROR and path in (None, found.path) for found in self.findings)

    def drop(self, path: str, reason: str) -> None:
        self.rows[path] = Row(printable(path), "dropped", reason)

    def reject(self, code: str, path: str, message: str) -> None:
        """A finding about a file that is dropped for it."""
        self.find(code, path, message)
        self.drop(path, code)

    def keep(self, path: str, fate: Literal["used", "caption", "metadata"]) -> None:
        self.rows[path] = Row(printable(path), fate)

    def finish(self, root: str, layout: Layout, paths: Iterable[str], examples: Iterable[Example]) -> Ledger:
        """The ledger; a file of ``paths`` without a row of its own is a stray."""
        for path in paths:
            if path not in self.rows:
                self.drop(path, "stray")
        order = list(Severity)
        return Ledger(
            root,
            layout,
            rows=tuple(self.rows[path] for path in sorted(self.rows)),
            findings=tuple(sorted(self.findings, key=lambda found: (order.index(found.severity), found.path))),
            examples=tuple(examples),
        )


def printable(text: str) -> str:
    """``text`` with what no terminal and no JSON reader should meet (lone surrogates, control characters) escaped."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() or char == " " else char.encode("unicode_escape").decode("ascii") for char in text
    )
