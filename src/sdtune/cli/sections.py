"""A command whose help has its options under headings."""

from __future__ import annotations

from typing import Any, ClassVar

from typer.core import TyperCommand


class SectionedCommand(TyperCommand):
    """Subclasses say which options stand under which heading; all others stand under the last."""

    sections: ClassVar[dict[str, frozenset[str]]] = {}

    def format_options(self, ctx: Any, formatter: Any) -> None:
        shown = {param.name: param.get_help_record(ctx) for param in self.get_params(ctx)}
        rest = set(shown)
        for number, (heading, names) in enumerate(self.sections.items(), start=1):
            under = rest if number == len(self.sections) else rest & names
            rows = [record for name, record in shown.items() if name in under and record is not None]
            rest -= under
            if rows:
                with formatter.section(heading):
                    formatter.write_dl(rows)


def sectioned(sections: dict[str, set[str]]) -> type[SectionedCommand]:
    """The class of a command with these headings, each with the names of its options."""
    frozen = {heading: frozenset(names) for heading, names in sections.items()}
    return type("Sectioned", (SectionedCommand,), {"sections": frozen})
