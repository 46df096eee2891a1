"""Containers of a custom job as processes of this machine: command, arguments, environment, lines, and their end.

An image is not pulled: what it would run is the command that the job gives, or the entry point that the server was told
for the image. A process gets a folder, a home and an environment of its own, and no GPU.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from google.protobuf import json_format

LineSink = Callable[[str, str, str], None]
"""Gets a line, the replica's name and the severity."""
GRACE = 3.0
"""Seconds between SIGTERM and SIGKILL, unless a server has others."""
TAIL = 2048
"""Characters of output that stand in the error of a job, as many as Kubernetes keeps."""


@dataclass(frozen=True)
class Replica:
    """One container, ready to start. hidden: folder of this machine -> the path that the job knows it by."""

    name: str
    argv: Sequence[str]
    environment: Mapping[str, str]
    hidden: Mapping[str, str] = field(default_factory=dict)


class StartError(Exception):
    """A replica cannot start: the text is what the service reports of it."""


def expand(text: str, environment: Mapping[str, str]) -> str:
    """``$(NAME)`` by its value, ``$$`` by ``$``; a name that is not there stays as it is. As Kubernetes does it."""

    def value(found: re.Match[str]) -> str:
        return "$" if found[0] == "$$" else environment.get(found[1], found[0])

    return re.sub(r"\$\$|\$\(([A-Za-z_][A-Za-z0-9_.-]*)\)", value, text)


def replicas_of(
    job: Any,
    *,
    job_id: str,
    project_number: str,
    region: str,
    entry_points: Mapping[str, Sequence[str]],
    shares: Mapping[tuple[str, str], Path],
    gcs: Path | None,
    more: Mapping[str, str],
) -> list[Replica]:
    """The containers of a job, a CustomJob message. StartError if one of them cannot start.

    entry_points: pattern of an image -> its ENTRYPOINT; shares: (server, path) -> folder; gcs: folder with a folder for
    each bucket, in place of /gcs; more: environment of all.
    """
    spec = job.job_spec
    names = [(f"workerpool{number}", index, pool) for number, pool in enumerate(spec.worker_pool_specs)
             for index in range(pool.replica_count)]  # fmt: skip
    cluster: dict[str, list[str]] = {}
    if len(names) > 1:
        for (pool_name, _, _), port in zip(names, free_ports(len(names)), strict=True):
            cluster.setdefault(pool_name, []).append(f"127.0.0.1:{port}")
    service = {
        "CLOUD_ML_JOB_ID": job_id, "CLOUD_ML_PROJECT_ID": project_number, "CLOUD_ML_REGION": region, **_outputs(spec),
    }  # fmt: skip
    if spec.tensorboard:
        service["AIP_TENSORBOARD_RESOURCE_NAME"] = spec.tensorboard
        service["AIP_TENSORBOARD_API_URI"] = f"https://{region}-aiplatform.googleapis.com"
    made = []
    for pool_name, index, pool in names:
        own = dict(service)
        if cluster:
            task = {"type": pool_name, "index": index}
            described = json_format.MessageToDict(spec, preserving_proto_field_name=True)
            about = {"cluster": cluster, "environment": "cloud", "task": task, "job": described}
            own["CLUSTER_SPEC"] = json.dumps(about)
        made.append(_replica(f"{pool_name}-{index}", pool, {**more, **own}, entry_points, _mounts(pool, shares, gcs)))
    return made


def _outputs(spec: Any) -> dict[str, str]:
    base = spec.base_output_directory.output_uri_prefix.rstrip("/")
    if not base:
        return {}
    folders = {"MODEL_DIR": "model", "CHECKPOINT_DIR": "checkpoints", "TENSORBOARD_LOG_DIR": "logs"}
    return {f"AIP_{name}": f"{base}/{folder}/" for name, folder in folders.items()}


def _mounts(pool: Any, shares: Mapping[tuple[str, str], Path], gcs: Path | None) -> dict[str, str]:
    """Path in the container -> folder of this machine."""
    mounts = {"/gcs": str(gcs)} if gcs else {}
    for mount in pool.nfs_mounts:
        share = shares.get((mount.server, mount.path.rstrip("/") or "/"))
        if share is None:
            raise StartError(f"Failed to mount NFS share {mount.server}:{mount.path}: No such file or directory.")
        mounts[f"/mnt/nfs/{mount.mount_point.removeprefix('/mnt/nfs/')}"] = str(share)
    return mounts


def _replica(
    name: str,
    pool: Any,
    service: Mapping[str, str],
    entry_points: Mapping[str, Sequence[str]],
    mounts: Mapping[str, str],
) -> Replica:
    container = pool.container_spec

    def here(text: str) -> str:
        for path, folder in mounts.items():
            text = re.sub(rf"(?<![\w./-]){re.escape(path)}(?![\w.-])", lambda _, to=folder: to, text)  # type: ignore[misc]
        return text

    environment = dict(service)
    for variable in container.env:
        environment[variable.name] = here(expand(variable.value, environment))
    command = list(container.command) or next(
        (list(words) for pattern, words in entry_points.items() if re.search(pattern, container.image_uri)), []
    )
    argv = [here(expand(word, environment)) for word in (*command, *container.args)]
    if not argv:
        raise StartError(start_error(name, "no command specified: unknown."))
    if re.fullmatch(r"python(3(\.\d+)?)?", argv[0]):
        argv[0] = sys.executable
    elif shutil.which(argv[0], path=_path()) is None:
        raise StartError(start_error(name, f'exec: "{argv[0]}": executable file not found in $PATH: unknown.'))
    return Replica(name, argv, environment, {folder: path for path, folder in mounts.items()})


def start_error(name: str, text: str) -> str:
    """What the service says of a container that did not start."""
    return (
        f"The replica {name} exited with a non-zero status of 128. Termination reason: StartError. \n"
        f"Termination log message: failed to create containerd task: failed to create shim task: {text}"
    )


def _path() -> str:
    return os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody listens at just now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


class Running:
    """A replica as a process. on_line gets what it prints, line by line."""

    def __init__(self, replica: Replica, folder: Path, on_line: LineSink) -> None:
        self.replica = replica
        self._on_line = on_line
        self._tail: deque[str] = deque(maxlen=80)
        for name in ("home", "tmp", "work"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        clean = {
            "PATH": _path(), "HOME": str(folder / "home"), "TMPDIR": str(folder / "tmp"), "LANG": "C.UTF-8",
            "CUDA_VISIBLE_DEVICES": "",
        }  # fmt: skip
        # Every process of the container inherits it, and no other process has it.
        self._mark = f"cmle-training-{uuid.uuid4()}"
        self._process = subprocess.Popen(
            replica.argv,
            env={**clean, **replica.environment, "HOSTNAME": self._mark},
            cwd=folder / "work",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        # A container's standard error is ERROR in the service's logs, whatever it says.
        streams = ((self._process.stdout, "INFO"), (self._process.stderr, "ERROR"))
        self._readers = [threading.Thread(target=self._read, args=stream, daemon=True) for stream in streams]
        for reader in self._readers:
            reader.start()

    def _read(self, stream: IO[bytes], severity: str) -> None:
        for raw in stream:
            line = raw.decode(errors="replace").rstrip("\r\n")
            for folder, path in self.replica.hidden.items():
                line = line.replace(folder, path)
            self._tail.append(line)
            self._on_line(line, self.replica.name, severity)

    @property
    def status(self) -> int | None:
        """Exit status as a container has it, 128 and the signal's number for a signal; None while it runs."""
        code = self._process.poll()
        return code if code is None or code >= 0 else 128 - code

    @property
    def tail(self) -> str:
        return "\n".join(self._tail)[-TAIL:]

    def terminate(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGTERM)

    def end(self) -> None:
        """End what is left of the container, and read what it still says."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._kill_others()
        self._process.wait()
        for reader in self._readers:
            reader.join(timeout=5)

    def _kill_others(self) -> None:
        """Children that made sessions of their own, as those of torch's launcher."""
        for entry in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if f"HOSTNAME={self._mark}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                    os.kill(int(entry.name), signal.SIGKILL)


def stop(running: Iterable[Running], grace: float) -> None:
    """SIGTERM to all, SIGKILL to what is left after ``grace`` seconds."""
    running = list(running)
    for one in running:
        one.terminate()
    deadline = time.monotonic() + grace
    while any(one.status is None for one in running) and time.monotonic() < deadline:
        time.sleep(0.02)
    for one in running:
        one.end()
