"""How findings look: a line for each check, and the commands that mend what is bad, whole, to be copied."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import groupby

from rich.console import Console as RichConsole
from rich.console import Group, RenderableType
from rich.live import Live
from rich.spinner import Spinner
from rich.text import Text

from sdtune.cli.json_lines import json_line
from sdtune.jobs.findings import Check, Finding, Grade

SIGNS: dict[Grade, tuple[str, str]] = {
    "good": ("✓", "green"),
    "warning": ("!", "yellow"),
    "bad": ("✗", "bold red"),
    "unasked": ("·", "dim"),
}
WIDTH = 100
"""Lines longer than this are hard to read, however wide the terminal is."""
INDENT = 20


def show(
    out: RichConsole, title: str, checks: Sequence[Check], findings: Iterable[tuple[str, Finding]]
) -> list[Finding]:
    """Each check as it is answered, then all of them with what mends them. Returns the findings in order."""
    names = [check.name for check in checks]
    out.print(Text(title, style="bold"))
    out.print()
    found = _collect(out, names, findings)
    for common, group in groupby(names, lambda name: _same(found[name])):
        alike = list(group)
        if common and len(alike) > 1:
            _print(out, "the others", Finding("unasked", f"{', '.join(alike)}: {found[alike[0]].text}"))
        else:
            for name in alike:
                _print(out, name, found[name])
    out.print()
    return [found[name] for name in names]


def _same(finding: Finding) -> str:
    """What checks have in common that were not asked; empty for all others."""
    return finding.text if finding.grade == "unasked" else ""


def as_lines(findings: Iterable[tuple[str, Finding]]) -> list[Finding]:
    """The same for programs: an object for each check, as it is answered."""
    shown = []
    for name, finding in findings:
        shown.append(finding)
        json_line("check", name=name, **asdict(finding))
    return shown


def _collect(out: RichConsole, names: Sequence[str], findings: Iterable[tuple[str, Finding]]) -> dict[str, Finding]:
    """All of them. On a terminal a list fills in place, and goes when it is full: what stays must not be cut at the
    edge."""
    if not out.is_terminal:
        return dict(findings)
    found: dict[str, Finding] = {}
    spinner = Spinner("dots", style="cyan")

    def lines() -> Group:
        return Group(*(_line(name, found.get(name), spinner.render(time.monotonic())) for name in names))

    with Live(get_renderable=lines, console=out, transient=True, refresh_per_second=10):
        for name, finding in findings:
            found[name] = finding
    return found


def _line(name: str, finding: Finding | None, waiting: RenderableType) -> Text:
    if finding is None:
        assert isinstance(waiting, Text)
        line = Text.assemble(waiting, " ", (name, "dim"))
    else:
        line = _head(name, finding).append(finding.text, _style(finding))
    line.no_wrap, line.overflow = True, "ellipsis"
    return line


def _head(name: str, finding: Finding) -> Text:
    sign, style = SIGNS[finding.grade]
    return Text.assemble((f"{sign} ", style), (f"{name:<{INDENT - 2}}", _style(finding)))


def _print(out: RichConsole, name: str, finding: Finding) -> None:
    first, *rest = _folded(out, finding.text)
    out.print(_head(name, finding).append(first, _style(finding)))
    for line in rest:
        out.print(Text(" " * INDENT + line, _style(finding)))
    for command in finding.commands:
        for line in _folded_command(out, command):
            out.print(Text(" " * INDENT + line, "cyan"))
    for line in _folded(out, finding.note) if finding.note else ():
        # An address that does not fit there may fit further to the left.
        out.print(Text(" " * max(min(INDENT, out.width - len(line)), 0) + line, "dim"))


def _style(finding: Finding) -> str:
    return "dim" if finding.grade == "unasked" else ""


def _folded(out: RichConsole, text: str) -> list[str]:
    """On a terminal in its width; elsewhere one line, which programs may search. Addresses stay whole."""
    if not out.is_terminal:
        return [text]
    width = max(min(out.width, WIDTH) - INDENT, 30)
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False) or [""]


def _folded_command(out: RichConsole, command: str) -> list[str]:
    """The same for what a shell reads, which takes a backslash at the end of a line for "goes on"."""
    if not out.is_terminal:
        return [command]
    width = max(out.width - INDENT - 2, 30)
    lines = textwrap.wrap(command, width, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
    return [f"{line} \\" for line in lines[:-1]] + lines[-1:]
