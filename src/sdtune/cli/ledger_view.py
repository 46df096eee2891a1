"""How the check of a dataset looks: counts first, then what to look at, the same advice said once."""

from __future__ import annotations

from itertools import groupby

from rich.console import Console as RichConsole
from rich.markup import escape

from sdtune.commands.words import count
from sdtune.methods.ledger import Finding, Ledger, Severity

FILES_PER_FINDING = 3
STYLE = {Severity.ERROR: "bold red", Severity.WARNING: "yellow", Severity.NOTE: "dim"}


def show(out: RichConsole, ledger: Ledger, every_file: bool) -> None:
    """Print the ledger; of errors only the count, since the error that ends the command tells them in full."""
    counts = ledger.counts()
    dropped = sum(counts.dropped.values())
    reasons = ", ".join(f"{number} {reason}" for reason, number in counts.dropped.items())
    out.print(
        f"[bold]Dataset[/] {escape(ledger.root)} ({ledger.layout}): {count(counts.files, 'file')}, "
        f"{counts.used} used, {dropped} dropped" + (f" ({escape(reasons)})" if reasons else "")
    )
    if every_file:
        width = max((len(row.path) for row in ledger.rows), default=0)
        for row in ledger.rows:
            style = "dim" if row.fate == "used" else "yellow"
            out.print(f"  [{style}]{escape(row.path):<{width}}  {row.fate:<8} {escape(row.reason)}[/]")
    for severity in (Severity.WARNING, Severity.NOTE):
        found = [finding for finding in ledger.findings if finding.severity is severity]
        for _, group in groupby(sorted(found, key=lambda finding: finding.code), lambda finding: finding.code):
            _group(out, severity, list(group))


def _group(out: RichConsole, severity: Severity, findings: list[Finding]) -> None:
    """Findings of one code: the first few in full, then how many more there are."""
    for finding in findings[:FILES_PER_FINDING]:
        where = f"{escape(finding.path)}: " if finding.path else ""
        out.print(f"  [{STYLE[severity]}]{severity}:[/] {where}{escape(finding.message)}")
    more = len(findings) - FILES_PER_FINDING
    if more > 0:
        out.print(
            f"  [{STYLE[severity]}]{severity}:[/] ... and {count(more, 'more file')} of this kind ({findings[0].code})"
        )
