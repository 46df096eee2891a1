"""Pictures: the samples that a run has drawn, found in its output; and pictures side by side."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import overload

from PIL import Image

from sdtune.errors import SdtuneError
from sdtune.jobs.backend import Backend
from sdtune.methods.sources import File, Obstacle
from sdtune.training.components.contact_sheet import contact_sheet

FOLDER = "samples"
NAME = re.compile(r"step-(\d+)/prompt-(\d+)-sample-(\d+)\.png")
"""As training/run.py writes them."""
JPEG_QUALITY = 85
"""Of what notebooks keep: a fifth of PNG's bytes."""


@dataclass(frozen=True)
class Sample:
    """One picture. step: after so many steps of training; prompt: empty where it is not known; number: of its seed."""

    step: int
    prompt: str
    number: int
    path: str
    content: Callable[[], bytes]

    @cached_property
    def image(self) -> Image.Image:
        """The picture itself, read when it is asked for."""
        with Image.open(io.BytesIO(self.content())) as picture:
            return picture.convert("RGB")

    def _repr_jpeg_(self) -> bytes:
        return as_jpeg(self.image)


class Samples(Sequence[Sample]):
    """The pictures by step, prompt and number; in a notebook, those before training and the latest."""

    def __init__(self, found: Sequence[Sample]) -> None:
        self._found = sorted(found, key=lambda sample: (sample.step, sample.path))

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> Samples: ...
    def __getitem__(self, index: int | slice) -> Sample | Samples:
        return Samples(self._found[index]) if isinstance(index, slice) else self._found[index]

    def __len__(self) -> int:
        return len(self._found)

    def __repr__(self) -> str:
        return f"<{len(self)} samples after steps {', '.join(map(str, self.steps)) or 'none'}>"

    @property
    def steps(self) -> list[int]:
        """After how many steps there are pictures."""
        return sorted({sample.step for sample in self})

    def at(self, step: int) -> Samples:
        """Those drawn after ``step`` steps; -1 for the latest."""
        wanted = self.steps[step] if step < 0 and self else step
        return Samples([sample for sample in self if sample.step == wanted])

    @property
    def before(self) -> Samples:
        """Those of the untrained model."""
        return self.at(0)

    @property
    def latest(self) -> Samples:
        """Those of the last step."""
        return self.at(-1)

    def sheet(self, title: str = "samples") -> Image.Image:
        """One picture: for each prompt a row before training and one of now."""
        shown = list(dict.fromkeys((self.steps[0], self.steps[-1]))) if self else []
        blocks = []
        for prompt in dict.fromkeys(sample.prompt for sample in self):
            rows = [
                (
                    "before" if step == 0 else f"step {step}",
                    [sample.image for sample in self if (sample.step, sample.prompt) == (step, prompt)],
                )
                for step in shown
            ]
            blocks.append((f"“{prompt}”" if prompt else "samples", [row for row in rows if row[1]]))
        return contact_sheet(title, [], blocks)

    def _repr_jpeg_(self) -> bytes | None:
        return as_jpeg(self.sheet()) if self else None


class Picture:
    """A picture that a notebook keeps small. image: as Pillow has it."""

    def __init__(self, image: Image.Image) -> None:
        self.image = image

    def _repr_jpeg_(self) -> bytes:
        return as_jpeg(self.image)


def compare(rows: Mapping[str, Sequence[tuple[str, Sequence[Image.Image]]]], title: str = "side by side") -> Picture:
    """Pictures side by side: under each prompt, rows of a label and what was drawn, as on a run's contact sheet."""
    return Picture(contact_sheet(title, [], [(f"“{prompt}”", blocks) for prompt, blocks in rows.items()]))


def find_samples(
    backend: Backend, output: str, prompts: Sequence[str], steps: Collection[int] | None = None
) -> Samples:
    """The samples at ``output``; none where it cannot be looked at now. steps: those that count, None for all.

    What an earlier run left in the folder, and this one has not written over yet, does not count.
    """
    found = []
    try:
        source = backend.dataset(f"{output}/{FOLDER}")
        for file in source.files() if source else ():
            matched = NAME.fullmatch(file.path)
            if isinstance(file, Obstacle) or not matched:
                continue
            step, prompt, number = map(int, matched.groups())
            if steps is None or step in steps:
                text = prompts[prompt] if prompt < len(prompts) else ""
                place = f"{output}/{FOLDER}/{file.path}"
                found.append(Sample(step, text, number, place, lambda file=file: _read(file)))  # type: ignore[misc]
    except SdtuneError:
        # No folder yet, or a bucket that does not answer just now: the run goes on, and is asked again later.
        return Samples(())
    return Samples(found)


def as_jpeg(picture: Image.Image) -> bytes:
    """For a notebook, which keeps what it shows."""
    written = io.BytesIO()
    picture.convert("RGB").save(written, "JPEG", quality=JPEG_QUALITY, optimize=True)
    return written.getvalue()


def _read(file: File) -> bytes:
    with file.open() as stream:
        return stream.read()
