"""What torch.compile has made, kept in a run's output: a later process of it loads that instead of compiling anew.

That is torch's own blob (``torch.compiler.save_cache_artifacts``): graphs, and the kernels that Triton has compiled of
them. Of a CPU it holds the graphs alone, and g++ compiles them again.

It is code, and is read as such: torch's caches are pickles and machine code, and whoever can write one can run programs
here. So nothing of it is looked at without ``torch_compile``; on this machine only what sdtune has written here itself
under this user's account; and from a bucket what lies in the run's own output (docs/security.md).
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import re
import tempfile
from importlib.metadata import version
from pathlib import Path
from threading import Thread

import torch

from sdtune import __version__, events
from sdtune.training.components.copying import cache
from sdtune.training.components.files import publish
from sdtune.training.run import Run

FOLDER = "cache/torch"
"""In an output."""
INDUCTOR_FOLDER = "TORCHINDUCTOR_CACHE_DIR"


class CompiledCode:
    """The code of one run and one GPU. found: something was there that fits. place: where it is kept, for people."""

    def __init__(self, run: Run) -> None:
        """Load what is kept. torch compiles into a folder of the run's own, which goes with it."""
        self._run, self._file = run, run.output / FOLDER / f"{key(run.device)}.bin"
        self.place = f"{run.destinations.address or run.output}/{FOLDER}"
        self._missed = missed()
        self._writing: Thread | None = None
        # torch itself sets the variable when it is asked to compile, to a folder that stays.
        run.opened.callback(_set_folder, os.environ.get(INDUCTOR_FOLDER))
        folder = tempfile.TemporaryDirectory(prefix="sdtune-compile-", ignore_cleanup_errors=True)
        _set_folder(run.opened.enter_context(folder))
        run.opened.callback(self._end)
        # The first process of a machine fetches them all, the others find them there.
        with run.accelerator.local_main_process_first():
            if run.outbox:
                of_each = range(run.share_of_machine.of)
                run.outbox.bring(f"{FOLDER}/{key(run.device, number)}.bin" for number in of_each)
        self.found = self._load()

    def keep(self) -> None:
        """Write down all of it if something was compiled since the last call, while the run goes on."""
        if missed() == self._missed:
            return
        self._missed = missed()
        self._join()
        if made := torch.compiler.save_cache_artifacts():
            # A daemon: a run that is stopped at once does not wait for it.
            self._writing = Thread(target=self._write, args=(made[0],), daemon=True)
            self._writing.start()

    def _load(self) -> bool:
        try:
            content = self._file.read_bytes()
        except OSError:
            return False
        if not self._run.destinations.address and not _note_of(content).is_file():
            self._run.tell(
                events.Note(
                    f"{self._file} was not written by sdtune on this machine, so it is not read: it could run any "
                    "program. The UNet is compiled anew.",
                    "warning",
                )
            )
            return False
        try:
            return torch.compiler.load_cache_artifacts(content) is not None
        except Exception as error:  # noqa: BLE001
            # torch promises nothing of what a damaged one does.
            self._run.tell(events.Note(f"{self._file} cannot be read ({error}); compiling anew.", "warning"))
            return False

    def _write(self, content: bytes) -> None:
        """For a bucket, the outbox takes it along with curves and samples."""
        try:
            note = _note_of(content)
            note.parent.mkdir(parents=True, exist_ok=True)
            note.touch()
            with publish(self._file) as temporary:
                temporary.write_bytes(content)
        except OSError as error:
            self._run.tell(
                events.Note(f"What was compiled cannot be kept in {self._file} ({error}); training goes on.", "warning")
            )

    def _join(self) -> None:
        if self._writing:
            self._writing.join()

    def _end(self) -> None:
        self._join()
        # Another run of this process begins with nothing compiled, and keeps what is its own.
        torch.compiler.reset()
        torch.compiler._cache.CacheArtifactManager.clear()


def key(device: torch.device, number: int | None = None) -> str:
    """What code is good for: where any of it is another, it is compiled anew. Of GPU ``number``, if not of ``device``.

    A GPU's number is in the code.
    """
    on = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu-{platform.machine()}"
    versions = [version(name) for name in ("triton", "diffusers", "peft") if _is_here(name)]
    rest = [__version__, platform.python_version(), *versions]
    digest = hashlib.sha256("\n".join(rest).encode()).hexdigest()[:8]
    index = (device.index or 0) if number is None else number
    return re.sub(r"[^\w.+-]+", "-", f"{on}-{index}-torch-{torch.__version__}-{digest}")


def missed() -> int:
    """How many graphs this process has compiled that it did not find."""
    counters = torch._dynamo.utils.counters
    return counters["inductor"]["fxgraph_cache_miss"] + counters["aot_autograd"]["autograd_cache_miss"]


def _set_folder(folder: str | None) -> None:
    """Where inductor compiles; None: where it likes."""
    if folder is None:
        os.environ.pop(INDUCTOR_FOLDER, None)
    else:
        os.environ[INDUCTOR_FOLDER] = folder


def _is_here(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _note_of(content: bytes) -> Path:
    """Where it is noted that sdtune has written this content on this machine. Only this user can write there."""
    return cache("compiled") / hashlib.sha256(content).hexdigest()
