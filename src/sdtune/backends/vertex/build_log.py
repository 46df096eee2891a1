"""The log of a build, read from its bucket while it grows: whole lines, each with the step that wrote it.

One object, log-<id>.txt, which grows by pieces that end anywhere. As Cloud Build writes it:

    FETCHSOURCE
    Fetching storage object: gs://...
    BUILD
    Starting Step #0 - "build"
    Step #0 - "build": #1 [internal] load build definition from Dockerfile
    Finished Step #0 - "build"
    PUSH
    Pushing us-central1-docker.pkg.dev/...
    DONE
"""

from __future__ import annotations

import re
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping
from typing import Any

from google.api_core import exceptions as api

from sdtune.backends.storage import RETRY, explained, open_client
from sdtune.errors import ProjectError
from sdtune.jobs.builder import StepChange, StepLine
from sdtune.methods.places import BUCKETS, bucket_and_path

PATIENCE = RETRY.with_timeout(900)
"""For what goes on meanwhile: a line that is down for a while is no reason to leave it."""
LAST_LINES = 30
_ENDS = ("DONE", "ERROR", "CANCELLED", "TIMEOUT")
_HEADINGS = {"FETCHSOURCE": "source", "BUILD": "", "PUSH": "push", **dict.fromkeys(_ENDS, "")}
"""What stands alone on a line, and the step whose lines follow."""
_OF_A_STEP = re.compile(r'Step #(\d+)(?: - "([^"]*)")?: ?(.*)')
_BASE = re.compile(r"\bFROM (\S+@sha256:[0-9a-f]{64})")
"""BuildKit: #5 [train 1/6] FROM docker.io/library/python:3.11.15-slim-bookworm@sha256:..."""
_EDGE = re.compile(r'(Starting|Finished) Step #(\d+)(?: - "([^"]*)")?$')


class BuildLog:
    """The log of ``build``, as Cloud Build describes it.

    is_complete: it has come to its end. bases: the images that others were built on, with the digests that their tags
    had then.
    """

    def __init__(self, build: Mapping[str, Any]) -> None:
        self.is_complete = False
        self.bases: dict[str, None] = {}
        self._address = build.get("logsBucket", "").removeprefix(BUCKETS)
        self._name = f"log-{build['id']}.txt"
        self._steps = [step.get("id") or f"step {number}" for number, step in enumerate(build.get("steps", ()))]
        self._section = ""
        self._at = 0
        self._rest = b""
        self._last: dict[str, deque[str]] = defaultdict(lambda: deque(maxlen=LAST_LINES))
        self._client: Any = None

    def read(self) -> Iterator[StepLine | StepChange]:
        """What has come since the last call. ProjectError: it cannot be read."""
        *lines, self._rest = (self._rest + self._fetch()).split(b"\n")
        for line in lines:
            yield from self._told(line)

    def rest(self) -> Iterator[StepLine | StepChange]:
        """The beginning of a line that nothing will end any more."""
        rest, self._rest = self._rest, b""
        yield from self._told(rest)

    def last_lines(self, step: str) -> tuple[str, ...]:
        """The last ones that ``step`` wrote; "": those of Cloud Build itself."""
        return tuple(self._last[step])

    def _fetch(self) -> bytes:
        if not self._address:
            raise ProjectError("the build keeps its log in no bucket, so that it cannot be read here.")
        bucket, folder = bucket_and_path(self._address)
        name = f"{folder.rstrip('/')}/{self._name}" if folder else self._name
        # Before its first line there is no object, and at its end there are no bytes yet.
        absent = (api.NotFound, api.RequestRangeNotSatisfiable)
        with explained(f"{BUCKETS}{bucket}/{name}", let_through=absent):
            self._client = self._client or open_client()
            # A new one each time: it would remember the generation that it read first, and ask for that alone.
            blob = self._client.bucket(bucket).blob(name)
            try:
                data: bytes = blob.download_as_bytes(start=self._at, raw_download=True, checksum=None, retry=PATIENCE)
            except absent:
                return b""
        self._at += len(data)
        return data

    def _told(self, line: bytes) -> Iterator[StepLine | StepChange]:
        text = line.decode(errors="replace").rstrip("\r")
        if text in _HEADINGS:
            self._section = _HEADINGS[text]
            self.is_complete = self.is_complete or text in _ENDS
            if text == "PUSH":
                yield StepChange("push", "working")
            return
        if found := _EDGE.match(text):
            yield StepChange(found[3] or self._steps[int(found[2])], "working" if found[1] == "Starting" else "done")
            return
        step = self._section
        if found := _OF_A_STEP.match(text):
            step, text = found[2] or self._steps[int(found[1])], found[3]
        elif not text.strip() or text.startswith('starting build "'):
            return
        text = text.rpartition("\r")[2]  # of a bar that was redrawn, its last state
        if found := _BASE.search(text):
            self.bases[found[1]] = None
        self._last[step].append(text)
        yield StepLine(step, text)
