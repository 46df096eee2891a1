"""The executed notebook and its pictures on their way into the output, again and again while it runs.

In the output ``train.ipynb`` becomes

    train.ipynb                             the notebook with the outputs of all cells that ran
    train_files/cell-03-output-1.png        the first picture of the cell that Jupyter shows as [3]

Whoever stops the run, or takes its machine away, leaves what was saved last.
"""

from __future__ import annotations

import base64
import binascii
import io
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode
from PIL import Image

from sdtune import events
from sdtune.methods.notebooks import SUFFIX
from sdtune.training.components.files import publish
from sdtune.training.notebook_cells import numbered
from sdtune.training.outbox import Outbox

SECONDS_BETWEEN_SAVES = 10.0
SHARE_OF_TIME = 0.05
"""Of the run, for saving: a notebook full of pictures takes its time to write, and is written less often."""
SVG = "image/svg+xml"
PICTURES = ("image/png", "image/jpeg", "image/webp", "image/gif", "image/bmp", SVG)
"""In this order: an output that has several shows one thing in several forms."""
_IN_HTML = re.compile(r"data:image/(?:png|jpeg|webp|gif|bmp);base64,([A-Za-z0-9+/=\s]+)")
_OURS = re.compile(r"cell-\d+-output-\d+\.(?:png|svg)")


class Saver:
    """Writes ``notebook`` to ``folder`` as NAME.ipynb, and sends it on where the output is a bucket.

    place: the output, as the user calls it.
    """

    def __init__(self, notebook: NotebookNode, name: str, folder: Path, place: str, outbox: Outbox | None) -> None:
        self._notebook, self._folder, self._outbox = notebook, folder, outbox
        self.name = name
        self.place = f"{place}/{name}"
        self._place = place
        self._pictures_in = f"{name.removesuffix(SUFFIX)}_files"
        self._written: dict[str, str] = {}
        self._cannot: set[str] = set()
        self._next = 0.0

    def remove_earlier(self) -> None:
        """Take away what an earlier run of the same notebook left there, and nothing else."""
        for file in (self._folder / self._pictures_in).glob("*"):
            if _OURS.fullmatch(file.name):
                file.unlink()
        if self._outbox:
            start = f"{self._pictures_in}/"
            names = self._outbox.names()
            self._outbox.remove(
                name for name in names if name.startswith(start) and _OURS.fullmatch(name[len(start) :])
            )

    def save(self, now: bool) -> bool:
        """Save, ``now`` or if it is time to; whether it was."""
        if not now and (time.monotonic() < self._next or self._is_sending()):
            # A file that is being read for its upload is not replaced meanwhile.
            return False
        started = time.monotonic()
        self._save()
        ended = time.monotonic()
        self._next = ended + max(SECONDS_BETWEEN_SAVES, (ended - started) / SHARE_OF_TIME)
        return True

    def finish(self) -> None:
        """Save for the last time, and wait until all is there. PublishError: it could not be uploaded."""
        self._save()
        if gone := [name for name in self._written if name not in set(self._current())]:
            for name in gone:
                (self._folder / name).unlink(missing_ok=True)
        if self._outbox:
            self._outbox.send([self.name, *self._current()])
            self._outbox.finish()
            if gone:
                self._outbox.remove(gone)
        # In the end, when its content is what it was told for.
        for name in sorted(self._current()):
            events.emit(events.Artifact("picture", f"{self._place}/{name}"))
        events.emit(events.Artifact("notebook", self.place))

    def _current(self) -> list[str]:
        return [name for name, _, _ in self._pictures() if name in self._written]

    def _is_sending(self) -> bool:
        return self._outbox is not None and any(map(self._outbox.is_sending, [self.name, *self._written]))

    def _save(self) -> None:
        changed = [self.name]
        for name, data, is_text in self._pictures():
            if self._written.get(name) == data or name in self._cannot:
                continue
            try:
                content = data.encode() if is_text else as_png(data)
            except (OSError, ValueError, binascii.Error, Image.DecompressionBombError) as error:
                self._cannot.add(name)
                events.emit(events.Note(f"{name}: this picture cannot be read ({error}).", "warning"))
                continue
            with publish(self._folder / name, durable=False) as temporary:
                temporary.write_bytes(content)
            self._written[name] = data
            changed.append(name)
        with publish(self._folder / self.name, durable=False) as temporary:
            # JSON has the same way to write the halves of characters that UTF-8 has no bytes for.
            temporary.write_text(nbformat.v4.writes(self._notebook) + "\n", encoding="utf-8", errors="backslashreplace")
        if self._outbox:
            self._outbox.send(changed)

    def _pictures(self) -> Iterator[tuple[str, str, bool]]:
        """Name, content (base64, or SVG as it is) and whether it is SVG."""
        for number, _, cell in numbered(self._notebook):
            pictures = [picture for output in cell.get("outputs", []) for picture in pictures_of(output)]
            for place, (data, is_svg) in enumerate(pictures, start=1):
                kind = "svg" if is_svg else "png"
                yield f"{self._pictures_in}/cell-{number:02}-output-{place}.{kind}", data, is_svg


def pictures_of(output: Any) -> Iterator[tuple[str, bool]]:
    """The pictures that an output shows: each in base64, or as SVG, and whether it is that."""
    data = output.get("data") or {}
    for kind in PICTURES:
        if isinstance(data.get(kind), str):
            yield data[kind], kind == SVG
            return
    if isinstance(data.get("text/html"), str):
        for found in _IN_HTML.finditer(data["text/html"]):
            yield found[1], False


def as_png(data: str) -> bytes:
    """A picture in base64 as a PNG file; one that is PNG already as it is. OSError, ValueError: it is no picture."""
    content = base64.b64decode(re.sub(r"\s", "", data), validate=True)
    with Image.open(io.BytesIO(content)) as picture:
        if picture.format == "PNG":
            return content
        written = io.BytesIO()
        picture.save(written, format="PNG")
    return written.getvalue()
