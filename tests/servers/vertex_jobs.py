"""The life of one custom job behind the loopback Vertex AI: its states, its containers, what it says of itself.

QUEUED, PENDING, RUNNING, then SUCCEEDED, FAILED, CANCELLED (after CANCELLING) or EXPIRED (after its timeout).
"""

from __future__ import annotations

import re
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

from google.cloud.aiplatform_v1.types import AcceleratorType, JobState, Scheduling
from google.protobuf.timestamp_pb2 import Timestamp

from tests.servers.processes import GRACE, Running, StartError, replicas_of, start_error, stop

State = JobState
TERMINAL = {State.JOB_STATE_SUCCEEDED, State.JOB_STATE_FAILED, State.JOB_STATE_CANCELLED, State.JOB_STATE_EXPIRED}
DEFAULT_WAIT, DEFAULT_TIMEOUT = 86_400.0, 7 * 86_400.0
CANCELLED, INVALID_ARGUMENT, RESOURCE_EXHAUSTED = 1, 3, 8
"""Of google.rpc.Code."""
RESTARTS = 6
PROVISIONING = (
    "Waiting for job to be provisioned.",
    "Vertex AI is provisioning job running framework. First time usage might take couple of minutes, and subsequent "
    "runs can be much faster.",
    "Vertex AI is setting up this job.",
    "Waiting for training program to start.",
    "Job is preparing.",
)


class LogSink(Protocol):
    """What is needed of a Cloud Logging: tests.servers.logging_server has a whole one."""

    def write(
        self, job_id: str, text: str, *, replica: str = "workerpool0-0", severity: str = "INFO"
    ) -> object: ...  # fmt: skip


@dataclass(frozen=True)
class Doom:
    """What ends a job before its time. after: the state that it still reaches; lasting: FLEX_START waits first."""

    applies: Callable[[Job], bool]
    code: int
    message: Callable[[Job], str]
    after: JobState = State.JOB_STATE_PENDING
    lasting: bool = False


@dataclass
class Surroundings:
    """What jobs get of the server that they run on. delays: seconds in a state, by its name.

    grace: seconds between SIGTERM and SIGKILL.
    """

    logging: LogSink | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    delays: Mapping[str, float] = field(default_factory=dict)
    entry_points: Mapping[str, Sequence[str]] = field(default_factory=dict)
    shares: dict[tuple[str, str], Path] = field(default_factory=dict)
    gcs: Path | None = None
    dooms: list[Doom] = field(default_factory=list)
    grace: float = GRACE


class Job:
    """message: the CustomJob as it is answered, under ``lock``; states: those it went through, by name."""

    def __init__(self, message: Any, project: str, number: str, region: str, job_id: str, around: Surroundings) -> None:
        self.message, self.project, self.number, self.region, self.id = message, project, number, region, job_id
        self.states: list[str] = []
        self.lock = threading.Condition()
        self._around = around
        self._stopping, self._closing, self._preempted = threading.Event(), threading.Event(), threading.Event()
        message.name = f"projects/{number}/locations/{region}/customJobs/{job_id}"
        message.create_time.CopyFrom(now())
        self._to(State.JOB_STATE_QUEUED)
        self._thread = threading.Thread(target=self._live, name=f"job-{job_id}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def state(self) -> str:
        with self.lock:
            return str(JobState(self.message.state).name)

    @property
    def ended(self) -> bool:
        return self.message.state in TERMINAL

    def wait(self, *states: str, timeout: float = 60) -> str:
        """Until the job is in one of the states, or has ended; the state. AssertionError after ``timeout`` seconds."""
        with self.lock:
            reached = self.lock.wait_for(lambda: self.ended or JobState(self.message.state).name in states, timeout)
        assert reached, f"job {self.id} is still in {self.state} after {timeout} s"
        return self.state

    def cancel(self) -> None:
        with self.lock:
            if not self.ended and not self._stopping.is_set():
                self._to(State.JOB_STATE_CANCELLING)
                self._stopping.set()

    def preempt(self) -> None:
        """Take the machines away, as those of a Spot job; the job is started again."""
        self._preempted.set()

    def close(self) -> None:
        """End the job with the server; it says nothing more."""
        self._closing.set()
        self._stopping.set()

    def join(self) -> None:
        if self._thread.is_alive():
            self._thread.join(timeout=30)

    def say(self, text: str, severity: str = "INFO") -> None:
        """An entry of the service itself."""
        self._write(text, "service", severity)

    def _write(self, text: str, replica: str, severity: str) -> None:
        if self._around.logging is not None and not self._closing.is_set():
            self._around.logging.write(self.id, text, replica=replica, severity=severity)

    # States ----------------------------------------------------------------------------------------------------------

    def _to(self, state: JobState, code: int = 0, text: str = "") -> None:
        with self.lock:
            self.message.state = int(state)
            moment = now()
            self.message.update_time.CopyFrom(moment)
            if state is State.JOB_STATE_RUNNING and not self.message.HasField("start_time"):
                self.message.start_time.CopyFrom(moment)
            if state in TERMINAL:
                self.message.end_time.CopyFrom(moment)
            if code:
                self.message.error.code, self.message.error.message = code, text
            self.states.append(state.name)
            self.lock.notify_all()

    def _fail(self, code: int, text: str) -> None:
        self.say(text, "ERROR")
        self.say("Job failed.")
        self._to(State.JOB_STATE_FAILED, code, text)

    def _live(self) -> None:
        with tempfile.TemporaryDirectory(prefix="vertex-", ignore_cleanup_errors=True) as folder:
            for attempt in range(RESTARTS + 1):
                self._preempted.clear()
                if self._prepare() or self._work(Path(folder) / str(attempt)):
                    break
            else:
                self._fail(RESOURCE_EXHAUSTED, no_machines(self.region))
        if self._stopping.is_set() and not self.ended:
            self._closing.wait(self._around.delays.get("JOB_STATE_CANCELLING", 0))
            self.say("Job is cancelled.")
            self._to(State.JOB_STATE_CANCELLED, CANCELLED, "CANCELED")

    def _doomed(self, state: JobState) -> bool:
        """Whether the job ended here, as it was told to."""
        doom = next((doom for doom in self._around.dooms if doom.after is state and doom.applies(self)), None)
        if doom is None:
            return False
        scheduling = self.message.job_spec.scheduling
        if doom.lasting and scheduling.strategy == Scheduling.Strategy.FLEX_START:
            # Waits for its machines; 0 means for ever.
            seconds = scheduling.max_wait_duration.seconds if scheduling.HasField("max_wait_duration") else DEFAULT_WAIT
            if self._stopping.wait(seconds or None):
                return True
        self._fail(doom.code, doom.message(self))
        return True

    def _prepare(self) -> bool:
        """Through QUEUED and PENDING. Whether the job ended on the way."""
        for state in (State.JOB_STATE_QUEUED, State.JOB_STATE_PENDING):
            if self.message.state != state:
                with self.lock:
                    if self._stopping.is_set():
                        return True
                    self._to(state)
            if state is State.JOB_STATE_PENDING:
                for line in PROVISIONING:
                    self.say(line)
            if self._stopping.wait(self._around.delays.get(state.name, 0)) or self._doomed(state):
                return True
        return False

    def _work(self, folder: Path) -> bool:
        """RUNNING, to the end. False if the job is to be started again."""
        try:
            replicas = replicas_of(
                self.message,
                job_id=self.id,
                project_number=self.number,
                region=self.region,
                entry_points=self._around.entry_points,
                shares=self._around.shares,
                gcs=self._around.gcs,
                more=self._around.environment,
            )
        except StartError as error:
            self._fail(INVALID_ARGUMENT, str(error))
            return True
        with self.lock:
            if self._stopping.is_set():
                return True
            for replica in replicas if self.message.job_spec.enable_web_access else ():
                host = f"{self.id}-{replica.name}-dot-{self.region}.aiplatform-training.googleusercontent.com"
                self.message.web_access_uris[replica.name] = f"https://{host}"
            self._to(State.JOB_STATE_RUNNING)
        self.say("Job is running.")
        if self._stopping.wait(self._around.delays.get("JOB_STATE_RUNNING", 0)) or self._doomed(
            State.JOB_STATE_RUNNING
        ):
            return True
        running: list[Running] = []
        try:
            for replica in replicas:
                running.append(Running(replica, folder / replica.name, self._write))
            return self._follow(running)
        except OSError as error:
            self._fail(INVALID_ARGUMENT, start_error(replicas[len(running)].name, str(error)))
            return True
        finally:
            stop(running, 0)

    def _follow(self, running: Sequence[Running]) -> bool:
        timeout = self.message.job_spec.scheduling.timeout
        deadline = time.monotonic() + (timeout.seconds + timeout.nanos / 1e9 or DEFAULT_TIMEOUT)
        chief = running[0]
        while not self._stopping.wait(0.02):
            failed = next((one for one in running if one.status), None)
            if failed is not None:
                stop(running, self._around.grace)
                self._fail(INVALID_ARGUMENT, self._exit_text(failed))
                return True
            if chief.status == 0:
                # The job is its chief's; the other machines get a moment, then they are taken away.
                self._let_finish(running)
                self.say("Finished tearing down training program.")
                self.say("Job completed successfully.")
                self._to(State.JOB_STATE_SUCCEEDED)
                return True
            if time.monotonic() > deadline:
                stop(running, self._around.grace)
                self.say("Job exceeded its timeout.", "ERROR")
                self._to(State.JOB_STATE_EXPIRED)
                return True
            if self._preempted.is_set():
                stop(running, self._around.grace)
                self.say("The machines of the job were preempted. The job is restarted.", "WARNING")
                return False
        stop(running, self._around.grace)
        return True

    def _let_finish(self, running: Sequence[Running]) -> None:
        deadline = time.monotonic() + 2
        while any(one.status is None for one in running) and time.monotonic() < deadline:
            time.sleep(0.02)
        stop(running, self._around.grace)

    def _exit_text(self, failed: Running) -> str:
        reason = "OOMKilled" if failed.status == 137 else "Error"
        where = f'resource.type="ml_job"\nresource.labels.job_id="{self.id}"'
        logs = (
            f"https://console.cloud.google.com/logs/viewer?project={self.number}&resource=ml_job%2Fjob_id%2F{self.id}"
            f"&advancedFilter={quote(where, safe='')}"
        )
        return (
            f"The replica {failed.replica.name} exited with a non-zero status of {failed.status}. Termination reason: "
            f"{reason}. \n{failed.tail}\n\nTo find out more about why your job exited please check the logs: {logs}"
        )


def now() -> Timestamp:
    """This moment, in microseconds, as the service's times are."""
    moment = Timestamp()
    moment.GetCurrentTime()
    moment.nanos -= moment.nanos % 1000
    return moment


def no_machines(region: str) -> str:
    """What a job says when it got none."""
    return (
        f"Resources are insufficient in region: {region}. Please try a different region or use a different accelerator."
    )


def uses_accelerator(job: Job, accelerator: str | None) -> bool:
    """Whether the job wants this accelerator; None: whatever it wants."""
    pools = job.message.job_spec.worker_pool_specs
    return accelerator is None or any(
        AcceleratorType(pool.machine_spec.accelerator_type).name == accelerator for pool in pools
    )


def images_match(job: Job, pattern: str) -> bool:
    return any(re.search(pattern, pool.container_spec.image_uri) for pool in job.message.job_spec.worker_pool_specs)
