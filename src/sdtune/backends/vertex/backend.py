"""The Vertex AI backend: runs as custom jobs. What asks Google something is in jobs.py and is imported for it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import yaml

from sdtune.backends.places import Places
from sdtune.backends.vertex.specs import custom_job
from sdtune.errors import CapacityError
from sdtune.jobs.backend import JobEnd, LogLine, StateChange, Submitted, Upload
from sdtune.jobs.placement import Placement
from sdtune.jobs.spec import JobSpec
from sdtune.methods.places import bucket_and_path, in_bucket

if TYPE_CHECKING:
    from sdtune.backends.uploads import Upload as PlannedUpload
    from sdtune.backends.vertex.claims import Claim
    from sdtune.backends.vertex.jobs import VertexJobs


@dataclass(frozen=True)
class Staged:
    """A planned upload, with Google's client to be opened when it is run."""

    planned: PlannedUpload

    @property
    def address(self) -> str:
        return self.planned.address

    @property
    def files(self) -> int:
        return len(self.planned.files)

    @property
    def size(self) -> int:
        return self.planned.size

    def run(self, progress: Callable[[int, int], None]) -> None:
        from sdtune.backends.storage import open_client

        self.planned.run(open_client(), progress)


class VertexBackend(Places):
    """Jobs in the project and the regions of ``placement``."""

    name: ClassVar[str] = "vertex"
    outlives: ClassVar[bool] = True

    def __init__(self, placement: Placement, offline: bool = False) -> None:
        super().__init__(offline)
        self.placement = placement
        self._tried = 0
        self._claim: Claim | None = None
        if not offline:
            # Google's client takes a second to import; so it happens while the dataset is looked at.
            threading.Thread(target=lambda: self._jobs, daemon=True).start()

    @property
    def region(self) -> str:
        """Where the next job goes."""
        return self.placement.region[self._tried]

    @property
    def place(self) -> str:
        return f"Vertex AI in {', then '.join(self.placement.region[self._tried :])}, project {self.placement.project}"

    def stage(self, path: str, names: Sequence[str], kind: str, output: str) -> Upload | None:
        if in_bucket(path):
            return None
        from sdtune.backends.uploads import plan_upload

        bucket = self.placement.bucket or f"gs://{bucket_and_path(output)[0]}"
        return Staged(plan_upload(Path(path).expanduser(), f"{bucket}/sdtune/{kind}", names))

    def why_not_written(self, folder: str) -> str | None:
        if in_bucket(folder) is None:
            return "is a folder of this machine, which a job cannot reach; wanted gs://bucket/path"
        if (reason := super().why_not_written(folder)) or self.offline:
            return reason
        from sdtune.backends.vertex.claims import taken_by

        return taken_by(folder)

    def render(self, job: JobSpec) -> dict[str, Any]:
        return custom_job(job, self.placement)

    def as_text(self, rendered: dict[str, Any]) -> str:
        text: str = yaml.safe_dump(rendered, sort_keys=False, allow_unicode=True, width=1_000_000)
        return text.rstrip()

    def submit(self, job: JobSpec) -> Submitted:
        if job.task == "train":
            from sdtune.backends.vertex.claims import claim_of, claimed

            claim = claim_of(job.output, self.placement, job.run_id)
            with claimed(claim, self._claim) as self._claim:
                return self._submit(job)
        return self._submit(job)

    def _submit(self, job: JobSpec) -> Submitted:
        while True:
            try:
                return self._jobs.submit(self.render(job), self.region, job.run_id)
            except CapacityError:
                if self.try_elsewhere() is None:
                    raise

    def try_elsewhere(self) -> str | None:
        if self._tried + 1 >= len(self.placement.region):
            return None
        self._tried += 1
        return self.region

    def follow(self, job_id: str) -> Iterator[LogLine | StateChange]:
        return self._jobs.read_logs(job_id)

    def wait(self, job_id: str) -> JobEnd:
        return self._jobs.wait(job_id)

    def cancel(self, job_id: str) -> None:
        self._jobs.cancel(job_id)

    @cached_property
    def _jobs(self) -> VertexJobs:
        from sdtune.backends.vertex.jobs import VertexJobs

        return VertexJobs(self.placement)
