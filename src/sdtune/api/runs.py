"""Run: a training or a copy that was started from Python; what it has said, drawn and left."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, cast

from sdtune import events
from sdtune.api import pages
from sdtune.api.going import PLANNED, Going
from sdtune.api.samples import Samples, as_jpeg, find_samples
from sdtune.api.screens import Screen
from sdtune.commands.plans import Rows
from sdtune.commands.running import Said
from sdtune.commands.words import MEANING, duration
from sdtune.errors import JobError
from sdtune.jobs.backend import Backend, LogLine, StateChange, Submitted
from sdtune.methods.base import RECIPE_FILE
from sdtune.methods.fields import CommonFields

MOST_NOTES = 8
FARTHEST = 2
"""Folders up from this one, beyond which a place is told in full."""
LORAS = ("lora", "kohya_lora", "peft")
"""Kinds of artifacts that are a LoRA, the one that diffusers reads first."""
LEFT = {
    "lora": "pytorch_lora_weights.safetensors",
    "contact_sheet": "contact_sheet.png",
    "card": "README.md",
    "recipe": RECIPE_FILE,
}
"""By kind, what an earlier run has left in its output."""
OUTCOMES = {"copied": "copied", "equal": "there already", "failed": "failed"}


@dataclass(frozen=True)
class Result:
    """What a run left. files: their places by kind, such as ``lora``, ``contact_sheet``, ``recipe``.

    loss: the last that was told; change: the largest entry of the LoRA's weight deltas; None where a job told none.
    copies: of a copy to shares, each file's place and what became of it.
    """

    output: str
    files: Mapping[str, str]
    steps: int = 0
    loss: float | None = None
    change: float | None = None
    seconds: float | None = None
    copies: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class About:
    """What a run is. title: its method or task; method: None where it is not known, or has none.

    goes_on_from: the step of a checkpoint, 0 where it begins; rendered: what would be started, if only that is shown.
    """

    title: str
    name: str
    output: str
    place: str
    rows: Rows = field(default_factory=list)
    notes: Sequence[str] = ()
    method: CommonFields | None = None
    rendered: str = ""
    goes_on_from: int = 0


class Stream(Protocol):
    """What is iterated over to run a job, or to follow one."""

    def __iter__(self) -> Iterator[Said]: ...


class Run(Going):
    """A run that goes on in the background. Read its state, losses, samples and files at any time.

    state: ``planned`` (by dry_run), ``starting``, ``running`` and what Vertex AI calls other states, ``succeeded``,
    ``failed``, ``cancelled``. losses, measures: (step, value) as they were told. files: places by kind, once saved.
    """

    def __init__(
        self, about: About, stream: Stream, backend: Backend, screen: Screen, cancel: Callable[[str], None]
    ) -> None:
        super().__init__(backend.outlives)
        self.about = about
        self.name, self.output = about.name, about.output
        self.losses: list[tuple[int, float]] = []
        self.measures: dict[str, list[tuple[int, float]]] = {}
        self.files: dict[str, str] = {}
        self.job: Submitted | None = None
        self._stream, self._backend, self._screen, self._cancel = stream, backend, screen, cancel
        self._notes = list(about.notes)
        self._lines: list[str] = []
        self._copies: list[tuple[str, str]] = []
        self._phase: events.Phase | None = None
        self._share: float | None = None
        self._step: events.Step | None = None
        self._finished: events.Finished | None = None
        self._rounds_of_samples = 0
        self._samples = Samples(())
        self._shown = threading.RLock()

    def __repr__(self) -> str:
        return f"<{self.about.title} {self.name}: {self.state}, {near(self.output)}>"

    # What is asked of it ----------------------------------------------------------------------------------------------

    def result(self, timeout: float | None = None) -> Result:
        """Wait for the end, and say what is there then; the run's own error if it failed.

        TimeoutError: it has not ended after ``timeout`` seconds. Interrupting this wait leaves the run alone.
        """
        self._await(timeout)
        self._raise_error()
        done = self._finished
        return Result(
            self.output, dict(self.files), done.steps if done else 0, done.loss if done else None,
            done.change if done else None, done.seconds if done else None, tuple(self._copies),
        )  # fmt: skip

    def logs(self, tail: int | None = None) -> Log:
        """What it has said so far beside events: warnings of libraries, tracebacks. tail: only so many lines."""
        lines = list(self._lines)
        return Log(lines if tail is None else lines[max(0, len(lines) - tail) :])

    @property
    def samples(self) -> Samples:
        """The pictures that it has drawn so far, from its output; shown side by side in a notebook."""
        self._look_at_samples()
        return self._samples

    @property
    def lora_path(self) -> str:
        """The LoRA's file, here or at gs://, for diffusers where there are several.

        JobError: it is not saved yet, or the method trains a whole model.
        """
        for kind in LORAS:
            if kind in self.files:
                return self.files[kind]
        if "model" in self.files:
            raise JobError(f"{self._what()} made a whole model and no LoRA: {self.files['model']}")
        raise JobError(f"{self._what()} has saved no LoRA ({self.state}); result() waits for the end and says why.")

    # What it shows ----------------------------------------------------------------------------------------------------

    def as_html(self) -> str:
        """See Showable."""
        with self._shown:
            ended = self.done or self.state == PLANNED or self._finished is not None
            made = [(kind, near(path), MEANING.get(kind, "")) for kind, path in self.files.items()]
            return pages.page(
                f"{self.about.title} {self.name}", self.about.place, self.state, [*self._rows(), *self._job_rows()],
                doing="" if ended or not self._phase else self._phase.text, share=self._share,
                figures=self._figures(), picture=pages.curves_picture(self.losses, self.measures),
                notes=self._notes[-MOST_NOTES:], trouble=self._trouble(),
                below=pages.table([*made, *self._copies]) + self._rendered_html(),
            )  # fmt: skip

    def as_text(self) -> str:
        """See Showable."""
        with self._shown:
            lines = [f"{self.about.title} {self.name} on {self.about.place}: {self.state}"]
            if self.done or self.state not in (PLANNED, "starting"):
                lines += [f"  {self._figures()}"] if self._figures() else []
                lines += [f"  {kind:<14}{near(path)}" for kind, path in self.files.items()]
                lines += [f"  {outcome:<14}{path}" for path, outcome in self._copies]
                lines += [f"  {self._trouble()}"] if self._trouble() else []
                lines += [f"  {note}" for note in self._notes[-1:] if self._ended.is_set() and not self._phase]
            else:
                lines += [f"  {name:<14}{value}" for name, value in self._rows() if value]
                lines += [f"  warning: {note}" for note in self._notes]
                lines += [self.about.rendered] if self.about.rendered else []
            return "\n".join(lines)

    def as_picture(self) -> bytes | None:
        """See Showable."""
        samples = self._samples
        return as_jpeg(samples.sheet(f"{self.name}: samples")) if samples else None

    def _rows(self) -> Rows:
        return [(name, near(value)) for name, value in self.about.rows]

    def _job_rows(self) -> Rows:
        return [("job", f"{self.job.number} in {self.job.region}"), ("browser", self.job.url)] if self.job else []

    def _figures(self) -> str:
        step, done = self._step, self._finished
        if done:
            return f"{done.steps} steps in {duration(done.seconds)}, loss {done.loss:.4f} at the end"
        if not step:
            return ""
        left = "" if step.step == step.steps else f"  {duration(step.seconds_left)} left"
        return f"{step.step}/{step.steps}  loss {step.loss:.4f}  {step.images_per_second:.1f} images/s{left}"

    def _trouble(self) -> str:
        return str(self._error) if self._error else ""

    def _rendered_html(self) -> str:
        return pages.code(self.about.rendered) if self.about.rendered else ""

    # How it goes ------------------------------------------------------------------------------------------------------

    def show_plan(self) -> Run:
        """Only that, of a run that is not started."""
        self._screen.begin(self)
        return self

    def start(self, wait: bool) -> Run:
        """Begin, and show it from now on. wait: until it ends."""
        self._screen.begin(self)
        return self._start(wait)

    def finished_earlier(self, finished: events.Finished) -> Run:
        """One whose result is there already: nothing is started."""
        names = self._backend.list_names(self.output)
        self.files = {
            kind: f"{self.output}/{name}"
            for kind, name in (*LEFT.items(), ("kohya_lora", f"{self.name}.safetensors"))
            if name in names
        }
        if "model_index.json" in names:
            self.files["model"] = self.output
        self._notes.append("This run has finished already; overwrite=True trains it anew.")
        self._finished, self.state = finished, "succeeded"
        self._ended.set()
        self._look_at_samples()
        self._screen.begin(self)
        self._screen.change(self, at_once=True)
        return self

    def _work(self) -> None:
        # Closing ends a process of this machine that has begun when it is cancelled.
        with closing(cast(Generator[Said, None, None], iter(self._stream))) as stream:
            for item in stream:
                if self._cancelled and not self.outlives:
                    break
                at_once = self._hear(item)
                self._screen.change(self, at_once=at_once)
        if self._cancelled and not self._finished:
            raise JobError("cancelled")

    def _hear(self, item: Said) -> bool:
        """Note it down; whether it should be seen at once."""
        with self._shown:
            if self.state == "starting":
                self.state = "running"
            match item:
                case LogLine(text=text):
                    self._lines.append(text)
                    self._screen.line(text)
                    return False
                case StateChange():
                    self.state = item.state
                    self._screen.line(f"{duration(item.seconds):>10}  {item.text}")
                case Submitted():
                    self.job = item
                    self._screen.line(f"Submitted job {item.number} in {item.region}: {item.url}")
                case events.Step():
                    self._step = item
                    self._share = item.step / item.steps
                    self.losses.append((item.step, item.loss))
                    self._screen.line(f"  step {self._figures()}", seldom=item.step < item.steps)
                    return item.step == item.steps
                case events.Progress():
                    self._share = item.done / item.total if item.total else None
                    return False
                case events.Phase():
                    self._begin_phase(item)
                case events.Measure(name=name, step=step, value=value):
                    self.measures.setdefault(name, []).append((step, value))
                    self._screen.line(f"  {name.replace('_', ' ')} after step {step}: {value:.4f}")
                case events.Note(text=text):
                    self._notes.append(text)
                    self._screen.line(text)
                case events.Artifact(kind=kind, path=path):
                    self.files[kind] = path
                case events.Copy(path=path, outcome=outcome, why=why):
                    self._copies.append((path, f"{OUTCOMES.get(outcome, outcome)} {why}".rstrip()))
                    self._screen.line(f"  {outcome}  {path}  {why}".rstrip())
                case events.Finished():
                    self._finished = item
            return True

    def _begin_phase(self, phase: events.Phase) -> None:
        drawn = self._phase is not None and self._phase.name == "sample"
        self._phase, self._share = phase, None
        self._screen.line(phase.text)
        if drawn:
            self._rounds_of_samples += 1
            # What a job draws is on its way to the bucket; there the latest is seen a round later, or at the end.
            self._look_at_samples()

    def _look_at_samples(self) -> None:
        method = self.about.method
        prompts = method.sample_prompts() if method else ()
        with suppress(OSError):
            self._samples = find_samples(self._backend, self.output, prompts, self._steps_of_samples())

    def _steps_of_samples(self) -> set[int] | None:
        """After how many steps this run has drawn by now; None where its schedule is not known."""
        method = self.about.method
        if method is None:
            return None
        every, last = method.sample_every, method.max_train_steps
        planned = sorted({0, *(range(every, last, every) if every else ()), last})
        start = self.about.goes_on_from
        earlier = sum(step <= start for step in planned) if start else 0
        return set(planned if self._finished else planned[: earlier + self._rounds_of_samples])

    def _stop(self) -> None:
        if job_id := self._job_id():
            # It may end just now by itself.
            with suppress(JobError, ProcessLookupError):
                self._cancel(job_id)

    def _job_id(self) -> str | None:
        """Of a process here as of a job in the cloud; None before there is one."""
        submitted = getattr(self._stream, "submitted", None) or self.job
        return submitted.job_id if submitted else None

    def _show_end(self) -> None:
        with suppress(Exception):
            self._look_at_samples()
        self._screen.end(self)

    def _what(self) -> str:
        return f"the run {self.name}" if not self.job else f"job {self.job.number} ({self.name})"

    def _left(self) -> str:
        if not self.outlives:
            return f"{self._what()} was ended and left no result."
        if not self.job:
            return f"{self._what()} goes on being submitted; sdtune.jobs.list() shows it then."
        return (
            f"{self._what()} goes on without this cell. See it again with sdtune.jobs.show({self.job.number!r}, "
            f"region={self.job.region!r}).follow(), end it with .cancel()."
        )


def near(place: str) -> str:
    """A folder or file of this machine as seen from where we are, if that is not far; so notebooks may be passed on.

    Also one that a text ends with: ``8 pictures from /data/cat``.
    """
    head, found, rest = place.rpartition(" from /")
    if found:
        return f"{head} from {near('/' + rest)}"
    if not Path(place).is_absolute():
        return place
    relative = os.path.relpath(place)
    return relative if relative.count("..") <= FARTHEST else place


class Log(list[str]):
    """Lines; shown as such."""

    def __str__(self) -> str:
        return "\n".join(self)

    def __repr__(self) -> str:
        return str(self)
