"""sd-scripts' training as checkpoints know one: the state comes from the process that trains, and goes back to it."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from sdtune.training import interrupts
from sdtune.training.kohya.process import Talk
from sdtune.training.kohya.samples import KohyaSamples
from sdtune.training.kohya.state import read_state, write_state
from sdtune.training.run import Run


class KohyaTraining:
    """steps: to be made; step: made. file: by which the state comes and goes."""

    def __init__(self, run: Run, samples: KohyaSamples, steps: int, file: Path) -> None:
        self.run, self.samples, self.steps, self.file = run, samples, steps, file
        self.step = 0
        self._talk: Talk | None = None
        self._held: ExitStack | None = None

    def begins(self, talk: Talk) -> None:
        """Training is about to begin, or to go on."""
        self.samples.collect()
        self.run.checkpoints.restore(self)

    def stepped(self, talk: Talk, step: int, whole: bool) -> None:
        """A step was made; whole: and what follows on it. KeyboardInterrupt: the run is to stop, and can go on."""
        self._talk, self.step = talk, step
        if self._held is None:
            # From now on a signal waits for the end of the step that is being made.
            self._held = ExitStack()
            self._held.enter_context(interrupts.held())
        if whole:
            self.samples.collect()
        self.run.checkpoints.after(self, whole=whole)
        if step == self.steps:
            self.close()

    def close(self) -> None:
        """No more steps are made, and a signal is obeyed at once."""
        if self._held:
            self._held.close()

    def state_dict(self) -> dict[str, Any]:
        assert self._talk
        self._talk.save()
        state = read_state(self.file)
        # Its tensors stay; the disk gets the room back when they go.
        self.file.unlink()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        # As it was written: of each process that trains.
        write_state(self.file, state)
