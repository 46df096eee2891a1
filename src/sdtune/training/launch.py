"""One process for each GPU: the entry point starts itself that often, by torch's own launcher."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

from sdtune.errors import INTERRUPTED


def is_one_of_several() -> bool:
    """This process was started as one of those that train together."""
    return "LOCAL_RANK" in os.environ


def is_first() -> bool:
    """This process is alone, or the one of several that tells, draws and writes."""
    return os.environ.get("RANK", "0") == "0"


def number_of_gpus() -> int:
    """How many this process may use (CUDA_VISIBLE_DEVICES narrows it), at least 1; without touching any."""
    import torch

    return max(1, torch.cuda.device_count())


def run_in_processes(count: int, argv: Sequence[str]) -> int:
    """``python -m sdtune.training`` with these arguments, ``count`` times; the exit code of the first that failed.

    One that fails ends the others.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # The process that failed has said why, as an event.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=count, rdzv_backend="c10d", rdzv_endpoint="127.0.0.1:0",
        run_id="sdtune", max_restarts=0, monitor_interval=0.2, signals_to_handle="SIGTERM,SIGINT,SIGHUP",
    )  # fmt: skip
    try:
        elastic_launch(config, sys.executable)("-m", "sdtune.training", *argv)
    except SignalException:
        return INTERRUPTED
    except ChildFailedError as error:
        return error.get_first_failure()[1].exitcode
    return 0
