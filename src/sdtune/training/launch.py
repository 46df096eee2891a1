"""One process for each GPU of each machine: the entry point starts itself that often, by torch's own launcher."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sdtune.errors import INTERRUPTED, TERMINATED, ProjectError, TrainingError

CLUSTER_SPEC = "CLUSTER_SPEC"
"""Set by Vertex AI: the addresses of all machines of a job, and which of them this is."""
SECONDS_TO_MEET = 3600
"""Each machine fetches the dataset first, and one may be slower than the others."""


@dataclass(frozen=True)
class Machines:
    """The machines that train together. number: of this one; meet_at: host:port of the first, where all meet."""

    count: int = 1
    number: int = 0
    meet_at: str = "127.0.0.1:0"


def find_machines(environment: Mapping[str, str] = os.environ) -> Machines:
    """As CLUSTER_SPEC says, or MASTER_ADDR, MASTER_PORT, NNODES and RANK, the number of the machine; else this alone.

    The first pool's machine is the first, as in Vertex AI's own trainers. ProjectError: what they say makes no sense.
    """
    if spec := environment.get(CLUSTER_SPEC):
        try:
            return _of_cluster(json.loads(spec))
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            raise ProjectError(
                f"{CLUSTER_SPEC}: found {spec[:300]!r}, wanted JSON with cluster.workerpool0 and task.type and index."
            ) from None
    try:
        count = int(environment.get("NNODES", "1"))
        if count == 1:
            return Machines()
        machines = Machines(
            count, int(environment["RANK"]), f"{environment['MASTER_ADDR']}:{int(environment['MASTER_PORT'])}"
        )
    except (ValueError, KeyError):
        machines = Machines(0)
    if not 0 <= machines.number < machines.count:
        raise ProjectError(
            "NNODES, RANK, MASTER_ADDR and MASTER_PORT: wanted the number of machines, that of this one (from 0), and "
            "where the first is."
        )
    return machines


def _of_cluster(spec: Any) -> Machines:
    pools: dict[str, list[str]] = dict(sorted(spec["cluster"].items()))
    all_machines = [(pool, index) for pool, addresses in pools.items() for index in range(len(addresses))]
    number = all_machines.index((spec["task"]["type"], int(spec["task"]["index"])))
    if len(all_machines) == 1:
        return Machines()
    host, colon, port = pools["workerpool0"][0].rpartition(":")
    return Machines(len(all_machines), number, f"{host}{colon}{int(port)}")


def is_one_of_several() -> bool:
    """This process was started as one of those that train together."""
    return "LOCAL_RANK" in os.environ


def is_first() -> bool:
    """This process is alone, or the one of several that tells, draws and writes."""
    return os.environ.get("RANK", "0") == "0" if is_one_of_several() else find_machines().number == 0


def number_of_gpus() -> int:
    """How many this process may use (CUDA_VISIBLE_DEVICES narrows it), at least 1; without touching any."""
    import torch

    return max(1, torch.cuda.device_count())


def run_in_processes(count: int, argv: Sequence[str], machines: Machines = Machines()) -> int:
    """``python -m sdtune.training`` with these arguments, ``count`` times; the exit code of the first that failed.

    One that fails ends the others. Each of several machines calls this, and all wait for each other. The number of a
    process goes by that of its machine, so that the first is on the first.
    """
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # The process that failed has said why, as an event.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    several: dict[str, Any] = {"rdzv_backend": "c10d"}
    if machines.count > 1:
        # torch's other ways to meet number the machines as they come.
        several = {
            "rdzv_backend": "static",
            "rdzv_configs": {"rank": machines.number, "timeout": SECONDS_TO_MEET},
        }
    config = LaunchConfig(
        min_nodes=machines.count, max_nodes=machines.count, nproc_per_node=count, rdzv_endpoint=machines.meet_at,
        run_id="sdtune", max_restarts=0, monitor_interval=0.2, signals_to_handle="SIGTERM,SIGINT,SIGHUP", **several,
    )  # fmt: skip
    try:
        elastic_launch(config, sys.executable)("-m", "sdtune.training", *argv)
    except SignalException as stopped:
        return TERMINATED if stopped.sigval == signal.SIGTERM else INTERRUPTED
    except ChildFailedError as error:
        return error.get_first_failure()[1].exitcode
    except DistError as error:
        if machines.count == 1:
            raise
        raise TrainingError(_not_met(machines, error)) from None
    return 0


def _not_met(machines: Machines, error: Exception) -> str:
    why = str(error).splitlines()[0]
    if machines.number == 0:
        return f"not all of the {machines.count} machines came to {machines.meet_at} ({why}); their logs may say why."
    return f"machine {machines.number} of {machines.count} could not reach the first at {machines.meet_at} ({why})."
