"""Whose output a folder of a bucket is: a mark, so that no two people send jobs to one folder unawares.

The mark lies in the bucket of the output, where everyone meets who could write there, whatever their projects:
sdtune/outputs/HASH.json, apart from the output, in which a trainer suffers no strange files. It is written only where
there is none, or over the one that was read (Cloud Storage's if_generation_match): of two at the same moment one is
refused. It names the submission, not the job, which is not there yet; whether that still goes on, Vertex AI is asked by
the submission's label. So a mark that was left behind hinders nobody.

What this does not see: jobs that were not sent by sdtune, and runs on somebody's own machine that write to the bucket.
"""

from __future__ import annotations

import getpass
import hashlib
import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from google.api_core import exceptions as api

from sdtune.backends.storage import RETRY, WRITER, explained, open_client
from sdtune.backends.vertex.google import JobsClient, StudiesClient
from sdtune.backends.vertex.once import InDoubtError
from sdtune.backends.vertex.reasons import Place
from sdtune.backends.vertex.reasons import explained as asked
from sdtune.backends.vertex.records import state_of
from sdtune.backends.vertex.specs import RUN_LABEL
from sdtune.backends.vertex.study_specs import COLLECTION
from sdtune.errors import JobError, SdtuneError
from sdtune.jobs.archive import ENDED
from sdtune.jobs.placement import Placement
from sdtune.methods.places import BUCKETS, bucket_and_path

FOLDER = "sdtune/outputs"
SUBMITTING = timedelta(minutes=15)
"""For which a submission without a job counts as under way: longer than anyone waits for it."""
TRIES = 5


@dataclass(frozen=True, slots=True)
class Claim:
    """A mark. collection: what it submits; by: a user and a machine; at: ISO 8601; generation: of its object."""

    output: str
    project: str
    regions: tuple[str, ...]
    collection: str
    run_id: str
    by: str
    at: str
    generation: int = 0

    @property
    def address(self) -> str:
        """Where it lies."""
        bucket, path = bucket_and_path(self.output.rstrip("/"))
        return f"{BUCKETS}{bucket}/{FOLDER}/{hashlib.sha256(path.encode()).hexdigest()[:16]}.json"


def claim_of(output: str, placement: Placement, run_id: str, collection: str = "customJobs") -> Claim:
    """The mark of a submission that is about to be made."""
    try:
        by = f"{getpass.getuser()}@{socket.gethostname()}"
    except (OSError, KeyError):  # an account without a name
        by = socket.gethostname()
    at = datetime.now(UTC).isoformat(timespec="seconds")
    return Claim(output, placement.project or "", tuple(placement.region), collection, run_id, by, at)


@contextmanager
def claimed(claim: Claim, mine: Claim | None = None) -> Iterator[Claim]:
    """Submit what ``claim`` is of, inside: see take(). The mark stays if something was submitted, or may have been."""
    taken = take(claim, mine)
    try:
        yield taken
    except BaseException as error:
        # Ctrl-C says something only where it left a doubt.
        if not isinstance(error, InDoubtError) and not (isinstance(error, KeyboardInterrupt) and error.args):
            give_back(taken)
        raise


def take(claim: Claim, mine: Claim | None = None) -> Claim:
    """Put the mark where no other is in force; returns it as it lies there.

    mine: one of an earlier try of the same command, which gives way. JobError: the output is somebody else's now, and
    whose. ProjectError: the bucket.
    """
    content = json.dumps({name: value for name, value in asdict(claim).items() if name != "generation"})
    replaces = mine.generation if mine else 0
    for _ in range(TRIES):
        blob = _blob(claim)
        try:
            with explained(claim.address, WRITER, let_through=(api.PreconditionFailed,)):
                blob.upload_from_string(
                    content, content_type="application/json", if_generation_match=replaces, checksum="crc32c",
                    retry=RETRY,
                )  # fmt: skip
            return replace(claim, generation=blob.generation)
        except api.PreconditionFailed:
            there = _read(claim)
        if there is None:
            replaces = 0
        elif there.run_id == claim.run_id:
            # Put there by a request whose answer was lost.
            return there
        elif reason := in_force(there):
            raise JobError(f"{claim.output} {reason}; choose another --output.")
        else:
            replaces = there.generation
    raise JobError(f"{claim.output} is being taken by several at this moment; try again, or choose another --output.")


def give_back(claim: Claim) -> None:
    """Take the mark away: nothing was submitted. As far as that can be done: see SUBMITTING."""
    with suppress(Exception):
        _blob(claim).delete(if_generation_match=claim.generation, retry=RETRY)


def taken_by(output: str) -> str | None:
    """Why no job should be sent to write to ``output`` now, ending the sentence "OUTPUT ..."; None if one may."""
    there = _read(Claim(output, "", (), "", "", "", ""))
    return in_force(there) if there else None


def in_force(claim: Claim) -> str | None:
    """The same of a mark that lies there."""
    sent = f"{claim.by} sent at {claim.at} (project {claim.project})"
    submitted = False
    try:
        for job in _jobs_of(claim):
            submitted = True
            _, _, _, region, _, number = job["name"].split("/")
            if (state := state_of(job)) not in ENDED:
                command = "hpo" if claim.collection == COLLECTION else "jobs"
                return (
                    f"is written to by job {number}, {state}, which {sent}. This ends it: sdtune {command} cancel "
                    f"{number} --region {region} --project {claim.project}"
                )
    except SdtuneError as error:
        return (
            f"was taken for a job that {sent}, and {error} If it does not run any more, remove the mark: "
            f"gcloud storage rm {claim.address}"
        )
    age = datetime.now(UTC) - datetime.fromisoformat(claim.at)
    if submitted or age > SUBMITTING:
        return None
    return (
        f"was taken for a job that {sent}, and that is being submitted. If it is not, remove the mark: "
        f"gcloud storage rm {claim.address}"
    )


def _jobs_of(claim: Claim) -> Iterator[dict[str, Any]]:
    """What was submitted with the claim's label."""
    client = StudiesClient() if claim.collection == COLLECTION else JobsClient()
    for region in claim.regions:
        with asked("whether it still runs cannot be seen from here", Place(claim.project, region)):
            yield from client.list(f"projects/{claim.project}/locations/{region}", f"labels.{RUN_LABEL}={claim.run_id}")


def _blob(claim: Claim) -> Any:
    bucket, name = bucket_and_path(claim.address)
    return open_client().bucket(bucket).blob(name)


def _read(claim: Claim) -> Claim | None:
    """The mark of the same output that lies there; None: there is none, or none that can be read."""
    blob = _blob(claim)
    try:
        with explained(claim.address, let_through=(api.NotFound,)):
            blob.reload(retry=RETRY)
            content = blob.download_as_bytes(retry=RETRY)
    except api.NotFound:
        return None
    try:
        found = json.loads(content)
        return Claim(
            claim.output, found["project"], tuple(found["regions"]), found["collection"], found["run_id"], found["by"],
            datetime.fromisoformat(found["at"]).astimezone(UTC).isoformat(timespec="seconds"), blob.generation,
        )  # fmt: skip
    except (ValueError, KeyError, TypeError):
        # Somebody's own file, or of another version: it says nothing, and is replaced.
        return Claim(claim.output, "", (), "", "", "", "1970-01-01T00:00:00+00:00", blob.generation)
