"""The cells of a notebook, run one after the other in a kernel of its own by nbclient.

One event loop does all of it: messages of the kernel, the clock of a cell, the signal to stop, and the saving, so that
nothing is written while it changes. nbclient's own ``execute`` is not used, because it takes the signals for itself.
"""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from nbformat import NotebookNode

from sdtune import events
from sdtune.errors import NotebookError, ProjectError
from sdtune.training.notebook_lines import Lines, say

SECONDS_TO_START = 300
"""For a kernel: on a machine that has just come, the first start reads Python from a cold disk."""
SECONDS_TO_YIELD = 2.0
"""For a cell that is interrupted: its traceback says where it was."""
SECONDS_TO_END = 5.0
"""For a kernel, before it is killed."""
SECONDS_OF_OUTPUT = 30
"""How long what a cell printed may come after its end."""
LONGEST_STREAM = 1 << 16
"""Characters in one output of a cell; what is printed after that begins the next one."""
LAST_LINES = 30
TICK = 1.0


class Recorder(NotebookClient):
    """nbclient, which keeps outputs in the cells, with an ear for what comes.

    Streams are joined as they come and a redrawn line is kept once, as Jupyter does: a training prints for hours.
    nbclient would join them when the cell has ended, and move outputs that a display still updates.
    """

    def __init__(self, notebook: NotebookNode, lines: Lines, changed: Callable[[], None], **options: Any) -> None:
        super().__init__(notebook, **options)
        self._lines, self._changed = lines, changed

    def process_message(self, msg: dict[str, Any], cell: NotebookNode, cell_index: int) -> NotebookNode | None:
        self._changed()
        self._lines.take(msg["msg_type"], msg["content"])
        return super().process_message(msg, cell, cell_index)

    def output(
        self, outs: list[NotebookNode], msg: dict[str, Any], display_id: str | None, cell_index: int
    ) -> NotebookNode | None:
        hooked = self.output_hook_stack[msg["parent_header"].get("msg_id")]
        last = outs[-1] if outs and not hooked and not self.clear_before_next_output else None
        if (
            last is not None
            and msg["msg_type"] == last.output_type == "stream"
            and last.name == msg["content"]["name"]
            and len(last.text) < LONGEST_STREAM
        ):
            last.text = redrawn(last.text + msg["content"]["text"])
            return last
        made = super().output(outs, msg, display_id, cell_index)
        if made is not None and made.output_type == "stream":
            made.text = redrawn(made.text)
        return made


def redrawn(text: str) -> str:
    """``text`` as a terminal shows it that goes back to the beginning of its line."""
    return re.sub(r"[^\n]*\r(?=[^\n\r])", "", text.replace("\r\n", "\n")) if "\r" in text else text


class Stop:
    """The wish to stop, which a signal may utter at any time. signal: that one, or 0."""

    def __init__(self) -> None:
        self.signal = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._event: asyncio.Event | None = None

    def __call__(self, signal_number: int, frame: object = None) -> None:
        self.signal = signal_number
        if self._loop and self._event:
            # Nothing listens any more where the loop has just been closed.
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._event.set)

    def heard(self) -> asyncio.Event:
        """The same for the running loop."""
        self._loop, self._event = asyncio.get_running_loop(), asyncio.Event()
        if self.signal:
            self._event.set()
        return self._event


def numbered(notebook: NotebookNode) -> Iterator[tuple[int, int, NotebookNode]]:
    """The cells that run: the number that Jupyter shows of each, its place among all cells, itself."""
    number = 0
    for index, cell in enumerate(notebook.cells):
        tags = cell.metadata.get("tags", [])
        if cell.cell_type == "code" and cell.source.strip() and "skip-execution" not in tags:
            number += 1
            yield number, index, cell


class Cells:
    """One run of a notebook.

    kernel: its name. folder: where it runs. limit: seconds for each cell. save: called every second while there is
    something new, and with True where it must not wait; tells whether it has saved.
    """

    def __init__(
        self, notebook: NotebookNode, *, kernel: str, folder: Path, limit: int | None, save: Callable[[bool], bool]
    ) -> None:
        self._lines, self._save, self._limit, self._folder = Lines(), save, limit, folder
        self._notebook = notebook
        self._changed = True
        # What a kernel says before it can send messages: why it does not start.
        self._aside = tempfile.TemporaryFile()  # noqa: SIM115  closed when run() is over
        # The clock of a cell is kept here, so that its traceback can be waited for.
        self._client = Recorder(
            notebook, self._lines, self._touch, kernel_name=kernel, startup_timeout=SECONDS_TO_START,
            iopub_timeout=SECONDS_OF_OUTPUT, timeout=None,
        )  # fmt: skip
        self._client.log.setLevel("CRITICAL")  # it would say again what we say

    def run(self, stop: Stop) -> int:
        """Run all; the number of cells that ran.

        NotebookError: a cell failed, took too long or ended the kernel. ProjectError: the kernel does not start.
        KeyboardInterrupt: ``stop`` was called. Whatever it was, the notebook has what there is, and was saved.
        """
        with self._aside:
            return asyncio.run(self._run(stop))

    async def _run(self, stop: Stop) -> int:
        stopping, ran = stop.heard(), 0
        manager: Any = self._client.create_kernel_manager()
        # Other users of this machine are not to read along. Only newer versions can.
        if manager.has_trait("transport_encryption"):
            manager.transport_encryption = "auto"
        try:
            await self._start(manager, stopping)
            cells = list(numbered(self._notebook))
            for number, index, cell in cells:
                events.emit(events.Progress("cells", number - 1, len(cells)))
                say(f"[{number}] {first_line(cell.source)}")
                try:
                    await self._one(manager, number, index, cell, stopping)
                except _EndedError:
                    break
                finally:
                    self._lines.end()
                    self._touch()
                    ran = number
            else:
                events.emit(events.Progress("cells", len(cells), len(cells)))
            self._client.set_widgets_metadata()
        finally:
            # Before the kernel is given its time to end.
            self._save(True)
            await self._end(manager, at_once=stopping.is_set())
        return ran

    async def _start(self, manager: Any, stopping: asyncio.Event) -> None:
        async def start() -> None:
            await self._client.async_start_new_kernel(
                cwd=str(self._folder), stdout=subprocess.DEVNULL, stderr=self._aside
            )
            client = await self._client.async_start_new_kernel_client()
            reply: Any = await client.kernel_info(reply=True, timeout=SECONDS_TO_START)
            self._notebook.metadata["language_info"] = reply["content"]["language_info"]

        starting = asyncio.ensure_future(start())
        await self._until(starting, stopping, None)
        if stopping.is_set():
            await _cancelled(starting)
            raise KeyboardInterrupt
        try:
            starting.result()
        except (RuntimeError, OSError) as error:
            self._say_aside()
            raise ProjectError(
                f"kernel: {self._client.kernel_name} does not start ({error}); its own words, if any, are in the log "
                "above."
            ) from None

    async def _one(self, manager: Any, number: int, index: int, cell: NotebookNode, stopping: asyncio.Event) -> None:
        """One cell. _EndedError: it ended the notebook, and well."""
        started = time.monotonic()
        running = asyncio.ensure_future(self._client.async_execute_cell(cell, index, execution_count=number))
        deadline = started + self._limit if self._limit else None
        await self._until(running, stopping, deadline)
        if not running.done():
            if stopping.is_set():
                self._save(True)  # whoever sent the signal may not wait for long
            await manager.interrupt_kernel()
            await asyncio.wait({running}, timeout=SECONDS_TO_YIELD)
            await _cancelled(running)
            if stopping.is_set():
                self._note(cell, "Interrupted", "the run was stopped here")
                raise KeyboardInterrupt
            self._note(cell, "TimeoutError", f"took longer than {self._limit} seconds")
            raise NotebookError(
                f"cell [{number}], {first_line(cell.source)!r}, took longer than the {self._limit} seconds of "
                f"--cell-timeout{_last_place(cell)}."
            )
        try:
            running.result()
        except CellExecutionError as error:
            # sys.exit() is how a notebook says that it has nothing more to do; papermill has it so.
            if error.ename == "SystemExit" and error.evalue in ("", "0", "None"):
                raise _EndedError from None
            raise NotebookError(
                f"cell [{number}], {first_line(cell.source)!r}, failed: {error.ename}: "
                f"{_shortened(error.evalue).rstrip('.')}{_last_place(cell)}"
            ) from None
        except DeadKernelError:
            code = await manager.provisioner.poll() if manager.provisioner else None
            how = _how_it_ended(code)
            self._note(cell, "DeadKernelError", f"the kernel {how}")
            raise NotebookError(f"cell [{number}], {first_line(cell.source)!r}: its kernel {how}.") from None

    async def _until(self, task: asyncio.Future[Any], stopping: asyncio.Event, deadline: float | None) -> None:
        """Wait for ``task``, to the deadline or the wish to stop at most, and save meanwhile."""
        stopped = asyncio.ensure_future(stopping.wait())
        try:
            while not task.done() and not stopped.done():
                left = TICK if deadline is None else min(TICK, deadline - time.monotonic())
                if left <= 0:
                    return
                await asyncio.wait({task, stopped}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
                if self._changed:
                    self._changed = not self._save(False)
        finally:
            stopped.cancel()

    async def _end(self, manager: Any, at_once: bool) -> None:
        manager.shutdown_wait_time = SECONDS_TO_END
        try:
            if manager.has_kernel and await manager.is_alive():
                await manager.shutdown_kernel(now=at_once)
        finally:
            if self._client.kc is not None:
                self._client.kc.stop_channels()
            await manager.cleanup_resources()

    def _say_aside(self) -> None:
        self._aside.seek(max(0, self._aside.seek(0, os.SEEK_END) - LONGEST_STREAM))
        for line in self._aside.read().decode(errors="replace").splitlines()[-LAST_LINES:]:
            say(line)

    def _touch(self) -> None:
        self._changed = True

    def _note(self, cell: NotebookNode, name: str, text: str) -> None:
        """Where a cell ended without a word of its own, the notebook says it."""
        if not any(output.output_type == "error" for output in cell.outputs):
            said = NotebookNode(output_type="error", ename=name, evalue=text, traceback=[f"{name}: {text}"])
            cell.outputs.append(said)
        self._touch()


class _EndedError(Exception):
    """A cell has ended the notebook by sys.exit()."""


async def _cancelled(task: asyncio.Future[Any]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def first_line(source: str, limit: int = 60) -> str:
    """What a cell is known by: its first line that is code."""
    lines = [line.strip() for line in source.splitlines() if line.strip()]
    line = next((line for line in lines if not line.startswith("#")), lines[0] if lines else "")
    return line if len(line) <= limit else line[: limit - 3] + "..."


def _shortened(text: str, limit: int = 2000) -> str:
    return text if len(text) <= limit else text[:limit] + " ..."


def _last_place(cell: NotebookNode) -> str:
    """Of a traceback the line of the cell that it came from: ``; at line 3: loss.backward()``."""
    for output in cell.outputs:
        text = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(output.get("traceback", [])))
        # IPython: "Cell In[3], line 2", its lines, and an arrow at the one that was run; the innermost frame is last.
        frames = re.findall(
            r"^Cell In\s?\[\d+\], line (\d+)[^\n]*\n(?:(?!Cell In|File ).*\n)*?-+> ?\d+ (.*)$", text, re.M
        )
        if frames:
            return f"; at line {frames[-1][0]}: {frames[-1][1].strip()}"
    return ""


def _how_it_ended(code: int | None) -> str:
    if code == -9:
        return "was killed (signal 9), most often because the machine ran out of memory"
    if code is not None and code < 0:
        return f"was ended by signal {-code}"
    return "ended" + (f" with exit code {code}" if code is not None else "") + " in the middle of it"
