"""Samples drawn by sd-scripts: what it is asked for, and its files sorted by step and prompt."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from sdtune.methods.images import open_image
from sdtune.methods.kohya import KohyaFields
from sdtune.training.components.contact_sheet import MOST_TRAINING_PICTURES, contact_sheet
from sdtune.training.components.dataset import Picture, open_cut
from sdtune.training.run import Run

FOLDER = "sample"
"""Where sd-scripts puts them in its --output_dir."""


class KohyaSamples:
    """The samples of one run. method: with its prompts and resolution resolved."""

    def __init__(self, method: KohyaFields, run: Run, output_dir: Path) -> None:
        self.method, self.run, self.folder = method, run, output_dir / FOLDER
        self.prompts = method.sample_prompt if method.num_samples else ()
        self.drawn: dict[int, list[list[Image.Image]]] = {}

    def write_prompts(self, path: Path) -> Path | None:
        """The file for --sample_prompts: each prompt num_samples times. Picture i always starts from the same noise."""
        if not self.prompts:
            return None
        asked = [
            {
                "prompt": prompt,
                "width": self.method.resolution,
                "height": self.method.resolution,
                "seed": self.method.seed + number,
                "sample_steps": self.method.sample_steps,
                "scale": self.method.guidance_scale,
            }
            for prompt in self.prompts
            for number in range(self.method.num_samples)
        ]
        path.write_text(json.dumps(asked, ensure_ascii=False, indent=1), encoding="utf-8")
        return path

    def recall(self) -> None:
        """Those that were drawn before the run was stopped, as far as the same are wanted now."""
        for step, rows in list(self.run.record.samples.items()):
            if list(rows) == list(self.prompts) and {len(row) for row in rows.values()} == {self.method.num_samples}:
                self.drawn[step] = [[open_image(self.run.output / name) for name in row] for row in rows.values()]
            else:
                del self.run.record.samples[step]

    def collect(self) -> None:
        """Keep what has been drawn, as the other methods keep theirs. Called while sd-scripts waits, or has ended."""
        files = self._files()
        for step in sorted(files.keys() - self.drawn.keys()):
            pictures = [open_image(files[step][number]) for number in sorted(files[step])]
            count = self.method.num_samples
            self.drawn[step] = [pictures[start : start + count] for start in range(0, len(pictures), count)]
            self.run.save_samples(step, self.prompts, self.drawn[step])

    def save_contact_sheet(self, pictures: Sequence[Picture]) -> None:
        """Write training pictures and the first and last samples as one picture."""
        if not self.drawn:
            return
        side = self.method.resolution or 512
        steps = sorted(self.drawn)
        labels = {steps[0]: "before", steps[-1]: "after"}
        shown = [open_cut(picture.path, (side, side)) for picture in pictures[:MOST_TRAINING_PICTURES]]
        sheet = contact_sheet(
            f"{self.run.output.name}: {self.method.name}, {steps[-1]} steps",
            shown,
            [
                (f"“{prompt}”", [(labels.get(step, f"step {step}"), self.drawn[step][number]) for step in steps])
                for number, prompt in enumerate(self.prompts)
            ],
        )
        self.run.save_picture("contact_sheet", "contact_sheet.png", sheet)

    def _files(self) -> dict[int, dict[int, Path]]:
        """By step and number: sd-scripts names them <output_name>_<step>_<number>_<time>_<seed>.png."""
        found: dict[int, dict[int, Path]] = {}
        for path in self.folder.glob("*.png"):
            _, step, number, _, _ = path.stem.rsplit("_", 4)
            found.setdefault(int(step), {})[int(number)] = path
        return found
