"""The checkpoints of one run: when they are due, what is in them, and how long they are kept.

Where memory has room, a checkpoint is copied there between two steps, and is written to this machine's disk, and from
there to a bucket, while training goes on; elsewhere, and when a signal has come, training waits for the disk. All
processes call the same functions after the same steps; the first alone writes.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol, Self

import diffusers
import torch

from sdtune import __version__, events
from sdtune.errors import SdtuneError, TrainingError
from sdtune.methods.fields import CheckpointFields, CommonFields
from sdtune.methods.resuming import Manifest, name_of, refused
from sdtune.training import interrupts
from sdtune.training.agreement import Agreement, of_all
from sdtune.training.components.checkpoint_background import IN_BACKGROUND, Background, Ended, Stopped
from sdtune.training.components.checkpoint_files import AT_ONCE, DISK, Disk, remove_others, steps_in
from sdtune.training.components.checkpoint_memory import Copies, has_room
from sdtune.training.components.checkpoint_state import read_state, size_of, write_checkpoint
from sdtune.training.components.checkpoint_store import Uploads
from sdtune.training.components.nested import loading
from sdtune.training.components.processes import Share
from sdtune.training.restarts import Beginning

RANDOM = "random"
"""The part of a state that is another one in each process."""
SECONDS_TO_STOP = 10.0
"""Between a signal and the end, as far as the disk can: a machine that is taken away gives half a minute, for uploads
as well."""


class Stateful(Protocol):
    """What moves while a model is trained, all of it; step: optimizer steps made."""

    step: int

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Checkpoints:
    """folder: where they are on this machine. uploads: to a bucket.

    tell: says an event; told: what the run has told so far, as JSON. As a context it waits at its end for what is being
    written: whatever has gone wrong, the newest checkpoint is whole.
    """

    tell: Callable[[events.Event], None] = staticmethod(events.emit)
    told: Callable[[], Mapping[str, Any]] = dict

    def __init__(
        self,
        method: CommonFields,
        beginning: Beginning,
        folder: Path,
        share: Share,
        device: torch.device,
        precision: str,
        disk: Disk = DISK,
    ) -> None:
        self.goes_on, self.folder = beginning.goes_on, folder
        self.uploads: Uploads | None = None
        self._method, self._asked, self._share, self._device = method, beginning.asked, share, device
        self._beside = {**beginning.asked.beside, "precision": precision}
        self._disk, self._background, self._copies = disk, Background(), Copies()
        self._agreement = Agreement(share.number == 0, share.of, device)
        self._newest = self.goes_on.step if self.goes_on else 0
        self._saved_at = time.monotonic()
        if self.goes_on and (then := self.goes_on.beside.get("precision", precision)) != precision:
            raise refused(str(folder.parent), "an unfinished run", [f"mixed_precision: {then} then, {precision} now"])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        # The signal that ends the run has been; another Ctrl-C ends the waiting.
        with nullcontext() if interrupts.wanted() else interrupts.held():
            self._take_note(self._background.end(), stop=True)

    def agree(self) -> None:
        """All processes go on from the same step. TrainingError: machines have found different checkpoints."""
        steps = of_all(torch.tensor([self._newest]), self._share.of, self._device)
        if len({int(step) for step in steps}) > 1:
            raise TrainingError(
                f"checkpoint: the machines found those of steps {', '.join(str(int(step)) for step in steps)}; all "
                "must see the same: give an --output in a bucket, or on a disk that they share."
            )

    def begin(self) -> None:
        """The run begins: what is not its own, or damaged, makes room. The first process alone calls it."""
        kept = [step for step in steps_in(self.folder) if step <= self._newest]
        remove_others(self.folder, kept, self._disk)
        if self.uploads:
            self.uploads.begin(self._newest)

    def restore(self, training: Stateful) -> None:
        """Make ``training`` what it was, if the run goes on. TrainingError: the checkpoint does not fit."""
        self._saved_at = time.monotonic()
        if self.goes_on is None:
            return
        state = read_state(self.folder / name_of(self.goes_on.step))
        state[RANDOM] = {name: of_each[self._share.number] for name, of_each in state[RANDOM].items()}
        with loading(self.goes_on.step):
            training.load_state_dict(state)
        self._note()

    @property
    def owes(self) -> bool:
        """The run was stopped while it drew or measured, and goes on with that."""
        return bool(self.goes_on and not self.goes_on.told.get("whole", True))

    def _note(self) -> None:
        assert self.goes_on
        step, steps = self.goes_on.step, self._method.max_train_steps
        self.tell(events.Note(f"Going on from the checkpoint of step {step:,} of {steps:,}."))
        then, now = self.goes_on.told.get("made_by", {}), made_by(self._device)
        if changed := [f"{name} {then.get(name)}, now {now[name]}" for name in now if then.get(name) != now[name]]:
            text = f"It was written by {'; '.join(changed)}: the rest may come out different in the last digits."
            self.tell(events.Note(text, "warning"))

    def after(
        self, training: Stateful, settle: Callable[[], object] = bool, *, ask: bool = False, whole: bool = True
    ) -> None:
        """Called by all processes after each step and what follows on it; KeyboardInterrupt if they are to stop.
        TrainingError: a checkpoint, this one or that of an earlier step, cannot be written.

        settle: called before a checkpoint is written, to make the state what it says. ask: all know that this step took
        long. whole: what follows on it (samples, measures) was done by this process; if not by the first, that is done
        when the run goes on.
        """
        step, method = training.step, self._method
        assert isinstance(method, CheckpointFields)
        last = step >= method.max_train_steps
        by_clock = bool(
            method.checkpointing_minutes and time.monotonic() - self._saved_at >= 60 * method.checkpointing_minutes
        )
        by_number = bool(method.checkpointing_steps and step % method.checkpointing_steps == 0)
        agreed = self._agreement.after(step, save=by_clock, stop=interrupts.wanted(), ask=ask or last)
        stop = agreed is not None and agreed.stop
        due = last or stop or by_number or (agreed is not None and agreed.save)
        if not stop:
            self._take_note(self._background.ended())
        # The same in all processes: writing one is an exchange.
        if due and method.checkpointing and (step > self._newest or stop):
            settle()
            self._save(training, whole, stop, last)
        if stop:
            # Whoever ends first makes torch's launcher end the others.
            of_all(torch.zeros(1), self._share.of, self._device)
            raise KeyboardInterrupt

    def _save(self, training: Stateful, whole: bool, stop: bool, last: bool) -> None:
        state = training.state_dict()
        random = {name: of_all(tensor, self._share.of, self._device) for name, tensor in state[RANDOM].items()}
        self._newest, self._saved_at = training.step, time.monotonic()
        if self._share.number:
            return
        began, before = time.monotonic(), self._background.end()
        self._take_note(before, stop)
        if stop and before and not before.error and time.monotonic() - began + before.seconds > SECONDS_TO_STOP:
            # It is of a few seconds ago: better than one that may not become whole.
            self.tell(
                events.Note(
                    f"The checkpoint of step {before.step} took {before.seconds:.0f} s; for another one there is no "
                    f"time, so what follows on it, up to step {training.step}, is done again."
                )
            )
            return
        manifest, state = self._manifest(training.step, whole), {**state, RANDOM: random}
        if not stop and has_room(size_of(state), self._copies.held):
            copy = self._copies.of(state)
            if last:
                self._copies.forget()
            self._background.start(manifest.step, lambda stopped: self._write(manifest, copy, IN_BACKGROUND, stopped))
            return
        self._copies.forget()
        began, error = time.monotonic(), None
        try:
            self._write(manifest, state)
        except OSError as what:
            error = what
        self._take_note(Ended(manifest.step, error, time.monotonic() - began), stop)

    def _take_note(self, ended: Ended | None, stop: bool = False) -> None:
        """Tell of a checkpoint that was written, or could not be: a TrainingError, if training is not ending anyway."""
        if ended is None:
            return
        if ended.error is None:
            self.tell(events.Checkpoint(ended.step, self._place(ended.step)))
            return
        if not isinstance(ended.error, OSError):
            raise ended.error
        good = max((step for step in steps_in(self.folder) if step != ended.step), default=0)
        kept = f"that of step {good} is kept" if good else "there is none yet"
        why = f"checkpoint: that of step {ended.step} cannot be written to {self.folder} ({ended.error}); {kept}."
        if stop:
            self.tell(events.Note(why, "warning"))
            return
        raise TrainingError(
            f"{why} Make room there, or choose another --output; the same command goes on. "
            "--checkpointing-minutes 0 trains without checkpoints."
        )

    def _write(
        self, manifest: Manifest, state: Mapping[str, Any], threads: int = AT_ONCE, stopped: Stopped = bool
    ) -> None:
        """The checkpoint; where the disk is full, older ones make room for it first, all but the newest."""
        try:
            write_checkpoint(self.folder, manifest, state, self._disk, threads, stopped)
        except OSError:
            newest = steps_in(self.folder)[:1]
            if len(steps_in(self.folder)) <= len(newest) or self._is_needed(set(steps_in(self.folder)) - {*newest}):
                raise
            remove_others(self.folder, newest, self._disk)
            write_checkpoint(self.folder, manifest, state, self._disk, threads, stopped)
        if self.uploads:
            self.uploads.put(manifest.step)
        self._prune(manifest.step)

    def _is_needed(self, steps: set[int]) -> bool:
        return bool(self.uploads and self.uploads.needed & steps)

    def _prune(self, step: int) -> None:
        assert isinstance(self._method, CheckpointFields)
        newest = [one for one in steps_in(self.folder) if one <= step][: self._method.checkpoints_total_limit]
        try:
            remove_others(self.folder, {*newest, *(self.uploads.needed if self.uploads else ())}, self._disk)
        except OSError as error:
            self.tell(events.Note(f"Older checkpoints in {self.folder} cannot be removed ({error}).", "warning"))

    def _manifest(self, step: int, whole: bool) -> Manifest:
        told = {**self.told(), "made_by": made_by(self._device), "whole": whole}
        if not whole:
            # It is drawn and measured again.
            told["samples"] = {at: drawn for at, drawn in told["samples"].items() if int(at) != step}
            told["measures"] = [measure for measure in told["measures"] if measure["step"] != step]
        return Manifest(
            step=step, method=self._method.name, recipe=self._method.recipe(), dataset=self._asked.dataset,
            beside=self._beside, token=self._asked.token, told=told,
        )  # fmt: skip

    def _place(self, step: int) -> str:
        return f"{self.uploads.address if self.uploads else self.folder}/{name_of(step)}"

    def finish(self) -> None:
        """The result is safe: take the checkpoints away, unless they were to be kept. The first process calls it."""
        keep = isinstance(self._method, CheckpointFields) and self._method.keep_checkpoints
        self._take_note(self._background.end() if keep else self._background.ended(), stop=True)
        self._background.drop()
        try:
            if keep:
                if self.uploads:
                    self.uploads.drain()
                return
            remove_others(self.folder, (), self._disk)
            if self.uploads:
                self.uploads.clear()
        except (OSError, SdtuneError) as error:
            self.tell(events.Note(f"The checkpoints, needed no more, cannot be removed: {error}", "warning"))

    def facts(self) -> dict[str, Any]:
        """What a later run needs to know whether it is this one."""
        return {"dataset": self._asked.dataset, "token": self._asked.token, "beside": self._beside}


def made_by(device: torch.device) -> dict[str, str]:
    """What decides the last digits of a result."""
    what = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {"sdtune": __version__, "torch": torch.__version__, "diffusers": diffusers.__version__, "on": what}
