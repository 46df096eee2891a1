"""Doctor: what jobs need, asked before one is sent."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Sequence
from queue import SimpleQueue

from sdtune.errors import ProjectError
from sdtune.jobs.findings import Check, Finding


def examine(checks: Sequence[Check]) -> Iterator[tuple[str, Finding]]:
    """The findings, each with its check's name, as they come: all that can be asked is asked at once."""
    found: dict[str, Finding] = {}
    answers: SimpleQueue[tuple[str, Finding | Exception]] = SimpleQueue()
    waiting = list(checks)
    while len(found) < len(checks):
        for check in [check for check in waiting if all(name in found for name in check.needs)]:
            waiting.remove(check)
            if missing := [name for name in check.needs if found[name].grade in ("bad", "unasked")]:
                answers.put((check.name, Finding("unasked", f"not asked until this is mended: {missing[0]}")))
            else:
                # Ctrl-C does not wait for answers, nor does the end of the process.
                threading.Thread(target=_ask, args=(check, answers), daemon=True).start()
        name, answer = answers.get()
        if isinstance(answer, Exception):
            raise answer
        found[name] = answer
        yield name, answer


def _ask(check: Check, answers: SimpleQueue[tuple[str, Finding | Exception]]) -> None:
    try:
        answers.put((check.name, check.ask()))
    except Exception as error:  # noqa: BLE001  # a mistake of ours, told where it can be seen
        answers.put((check.name, error))


def raise_for_bad(findings: Collection[Finding]) -> None:
    """ProjectError if one of them is bad."""
    bad = [finding for finding in findings if finding.grade == "bad"]
    if not bad:
        return
    what = "the commands above mend" if all(finding.commands for finding in bad) else "what stands above mends"
    what += " it" if len(bad) == 1 else " them"
    raise ProjectError(f"{len(bad)} of {len(findings)} checks failed; {what}.")
