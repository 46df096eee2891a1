"""What a run that goes on must have in common with its beginning, and how the two are compared.

Launcher and trainer ask the same questions of an output folder: does it hold this run, finished, or a part of it?
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import yaml

from sdtune import events
from sdtune.errors import RecipeError
from sdtune.methods.fields import CheckpointFields, CommonFields, PublishFields

CHECKPOINTS = "checkpoints"
"""The folder of checkpoints in an output, one folder in it for each."""
MANIFEST = "manifest.json"
"""Written last: what has none is no checkpoint."""
FORMAT = 2
_NAME = re.compile(r"step-(\d{6,})")

HARMLESS = {
    *PublishFields.model_fields,
    *CheckpointFields.model_fields,
    *("sample_prompt", "num_samples", "sample_every", "held_out_every", "save_precision", "save_bin"),
}
"""Settings that may be other ones when a run goes on: no weight is another for them."""
COMPUTING = {"torch_compile"}
"""What of a result these change are last digits, as another GPU does: told by the trainer, never refused."""
DRAWING = {"sample_steps", "guidance_scale"}
"""Harmless as well, unless class pictures are drawn with them."""
LEFT_TO_THE_RUN: dict[str, Any] = {"resolution": None, "mixed_precision": "auto", "sample_prompt": []}
"""Values in whose place a finished run writes down what it took."""
SAME_ON = ("constant", "constant_with_warmup")
"""Schedules that do not look at the number of steps, so that it may change."""


def name_of(step: int) -> str:
    """The folder of the checkpoint after so many steps."""
    return f"step-{step:06d}"


def step_of(name: str) -> int | None:
    """The step of a checkpoint by its folder's name; None if it is no such name."""
    found = _NAME.fullmatch(name)
    return int(found[1]) if found else None


@dataclass(frozen=True)
class Asked:
    """A run that is asked for, beside its method. dataset: as the training process is given it.

    token: another one each time that ``--overwrite`` is typed, and the same where the same job is started again.
    beside: what else decides the result, by its name for people, as far as it is known.
    """

    dataset: str = ""
    token: str | None = None
    beside: Mapping[str, Any] = field(default_factory=dict)

    def differences(self, dataset: str, beside: Mapping[str, Any]) -> Iterator[str]:
        """How a run was another one, one line for each difference."""
        if dataset != self.dataset:
            yield f"dataset: {dataset} then, {self.dataset} now"
            return
        for name, now in self.beside.items():
            if beside.get(name, now) != now:
                yield f"{name}: {beside[name]} then, {now} now"


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself.

    recipe: the settings as they were given, less those for publishing. dataset, beside, token: as in ``Asked``.
    files: size and SHA-256 by name. told: what the run has told and found so far.
    """

    step: int
    method: str
    recipe: Mapping[str, Any]
    dataset: str
    beside: Mapping[str, Any] = field(default_factory=dict)
    token: str | None = None
    files: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    told: Mapping[str, Any] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """As JSON, with its own hash."""
        said = {"format": FORMAT, **vars(self), "files": {name: list(about) for name, about in self.files.items()}}
        return json.dumps({**said, "sha256": _hash(said)}, indent=1).encode()

    @classmethod
    def of(cls, content: bytes) -> Self | None:
        """The manifest in ``content``; None if it is damaged, or not whole.

        RecipeError: it is whole, but of another version of sdtune.
        """
        try:
            said = json.loads(content)
            known = said.pop("sha256") == _hash(said)
            made = said.pop("format")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None
        if not known:
            return None
        if made != FORMAT:
            raise RecipeError(
                f"checkpoint: of format {made}, which this version of sdtune does not read; go on with the version "
                "that wrote it, or start anew with --overwrite."
            )
        try:
            files = {name: (size, digest) for name, (size, digest) in said.pop("files").items()}
            # A name that leads out of its folder was not written here.
            return cls(files=files, **said) if all(re.fullmatch(r"[\w-]+\.\w+", name) for name in files) else None
        except (KeyError, TypeError, ValueError, AttributeError):
            return None

    def differences(self, method: CommonFields, asked: Asked) -> list[str]:
        """Why ``method`` may not go on from here, one line for each reason."""
        found = differences(method, self.method, self.recipe, self.step)
        return [*found, *asked.differences(self.dataset, self.beside)]


@dataclass(frozen=True)
class FinishedRun:
    """What lies in an output beside a result. recipe: as it was written down, with the method; facts: of the mark."""

    recipe: Mapping[str, Any]
    facts: Mapping[str, Any]

    @classmethod
    def of(cls, recipe: bytes | None, mark: bytes | None) -> Self | None:
        """From both files; None if there is no finished run, or one that says too little of itself to be compared."""
        try:
            said = yaml.safe_load(recipe or b"")
        except (yaml.YAMLError, UnicodeDecodeError, RecursionError):
            return None
        facts = facts_in_mark(mark or b"")
        if not isinstance(said, dict):
            return None
        try:
            run = cls(said, facts)
            return run if run.finished and isinstance(run.measures, list) else None
        except (KeyError, TypeError):
            return None

    def differences(self, method: CommonFields, asked: Asked) -> list[str]:
        """How ``method`` would be another run, one line for each difference."""
        found = differences(method, str(self.recipe.get("method")), self.recipe)
        return [*found, *asked.differences(self.facts.get("dataset", ""), self.facts.get("beside", {}))]

    def is_replaced(self, asked: Asked) -> bool:
        """``--overwrite`` was typed, and not by the one that made this."""
        return asked.token is not None and asked.token != self.facts.get("token")

    @property
    def finished(self) -> events.Finished:
        """What it said at its end."""
        return events.Finished(**self.facts["finished"])

    @property
    def measures(self) -> list[events.Measure]:
        """What it measured."""
        return [events.Measure(**measure) for measure in self.facts.get("measures", [])]


def facts_in_mark(mark: bytes) -> dict[str, Any]:
    """What the mark of an output says of the run that has finished there: JSON, behind the first line's sentence."""
    first = mark.decode(errors="replace").partition("\n")[0]
    try:
        facts = json.loads(first[first.index(" {") :])
    except (ValueError, RecursionError):
        return {}
    return facts if isinstance(facts, dict) else {}


def _hash(said: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def differences(method: CommonFields, name: str, recipe: Mapping[str, Any], step: int | None = None) -> list[str]:
    """How ``method`` is not what a run was begun with, one line for each setting; empty if it may go on.

    name, recipe: of the method then. step: it came to; None if it has ended, and ``recipe`` is what it was resolved to.
    """
    if name != method.name:
        return [f"method: {name} then, {method.name} now"]
    now = method.recipe()
    allowed = {*HARMLESS, *(() if now.get("with_prior_preservation") else DRAWING)} if step is not None else set()
    # A finished run has drawn its samples, and they are part of its result; how it wrote checkpoints is not.
    allowed |= set(CheckpointFields.model_fields) | COMPUTING
    found = []
    for setting, value in now.items():
        then = recipe.get(setting, type(method).model_fields[setting].get_default(call_default_factory=True))
        then = list(then) if isinstance(then, tuple) else then
        if then == value or setting in allowed:
            continue
        if step is None and setting in LEFT_TO_THE_RUN and value == LEFT_TO_THE_RUN[setting]:
            continue
        if setting == "max_train_steps" and step is not None and now["lr_scheduler"] in SAME_ON and value >= step:
            continue
        found.append(f"{setting}: {_shown(then)} then, {_shown(value)} now")
    return found


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def refused(output: str, what: str, found: Iterable[str]) -> RecipeError:
    """The error of a run that cannot go on, because it is another one."""
    lines = "\n".join(f"  {line}" for line in found)
    return RecipeError(
        f"output: {output} holds {what} with other settings:\n{lines}\n"
        "Give what it was begun with to go on with it, --overwrite to begin anew, or another --output."
    )
