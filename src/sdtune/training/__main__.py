"""``python -m sdtune.training train METHOD --dataset=... --output=... --recipe=...``: the entry point of containers.

Tells events on standard output (``sdtune.events``) and ends with 0 only if the result exists. A second task copies
models to NFS shares: ``python -m sdtune.training sync-nfs --from=... --nfs=...``; a third runs a notebook:
``python -m sdtune.training notebook --notebook=... --output=...``.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from sdtune import events
from sdtune.errors import INTERRUPTED, TERMINATED, PublishError, RecipeError, SdtuneError, TrainingError
from sdtune.methods.catalog import find_method
from sdtune.methods.fields import CommonFields
from sdtune.methods.resuming import Asked
from sdtune.training import interrupts, nfs, notebook
from sdtune.training.components.base_model_copy import fetch_base_model
from sdtune.training.components.fetch import fetch_drawn, folder_here
from sdtune.training.components.store import in_store
from sdtune.training.destinations import Destinations, destinations, find_output, folder_of_run
from sdtune.training.hypertune import open_reports, output_of_trial, seed_of_trial, trial_id
from sdtune.training.launch import (
    Machines,
    find_machines,
    is_first,
    is_one_of_several,
    number_of_gpus,
    run_in_processes,
)
from sdtune.training.libraries import import_ahead, import_trainer
from sdtune.training.restarts import Beginning, FinishedError, files_of_dataset, find_beginning
from sdtune.training.secrets import read_secrets

if TYPE_CHECKING:
    from sdtune.training.hub import HubRepository


def main(argv: Sequence[str] | None = None) -> int:
    """Run one job; its exit code."""
    words = sys.argv[1:] if argv is None else list(argv)
    job, settings = _parser().parse_known_args(words)
    interrupts.forget()
    try:
        match job.task:
            case "train":
                return train(job, settings, words)
            case "notebook":
                return notebook.run_notebook(job, settings)
            case _:
                return sync_nfs(job, settings)
    except SdtuneError as error:
        return interrupts.exit_code() if interrupts.wanted() else fail(error)
    except KeyboardInterrupt:
        return interrupts.exit_code()
    except Exception as error:  # noqa: BLE001
        if interrupts.wanted():
            return interrupts.exit_code()
        # Not one of ours, so the traceback is what a report needs; the launcher shows the last line on its own.
        traceback.print_exc()
        unexpected = TrainingError(f"unexpected {type(error).__name__}: {error}. The traceback is in the log above.")
        return fail(out_of_memory(error) or unexpected)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sdtune.training", allow_abbrev=False)
    tasks = parser.add_subparsers(dest="task", required=True)
    job = tasks.add_parser("train", allow_abbrev=False)
    job.add_argument("method")
    job.add_argument("--dataset", required=True, help="a folder, or gs://bucket/path")
    job.add_argument("--output", help="a folder, or gs://bucket/path; not given: AIP_MODEL_DIR, as Vertex AI sets it")
    job.add_argument("--nfs", action="append", default=[], help="also copy the models to this share; repeatable")
    job.add_argument(
        "--processes", type=int, help="processes of this machine that train together; not given: one for each GPU"
    )
    job.add_argument(
        "--trials", action="store_true", help="a trial of a search: the output is OUTPUT/trials/CLOUD_ML_TRIAL_ID"
    )
    job.add_argument("--seed-per-trial", action="store_true", help="with --trials: CLOUD_ML_TRIAL_ID is added to seed")
    job.add_argument(
        "--overwrite", metavar="TOKEN", help="begin anew, unless what the output holds was begun with the same token"
    )
    copy = tasks.add_parser("sync-nfs", allow_abbrev=False)
    copy.add_argument("--from", dest="source", required=True, help="the output of a run: gs://bucket/path, or a folder")
    copy.add_argument("--method", help="the folder on the share; not given: as the run's recipe says")
    copy.add_argument("--nfs", action="append", required=True, help="where a share is mounted; repeatable")
    notebook.add_arguments(tasks)
    return parser


def train(job: argparse.Namespace, settings: Sequence[str], words: Sequence[str]) -> int:
    """Train, in as many processes as there are GPUs; the exit code."""
    method = find_method(job.method).from_args(settings)
    if not is_one_of_several():
        # Before accounts are tried, and before processes are started, which find them in their environment.
        read_secrets()
    if job.seed_per_trial:
        method = method.model_copy(update={"seed": seed_of_trial(method.seed, trial_id())})
    output = find_output(job.output)
    # Where Vertex AI named the output, it is the trial's own already.
    if job.trials and job.output:
        output = output_of_trial(output, trial_id())
    wanted = destinations(output, job.nfs, named=job.output is not None)
    if is_first():
        nfs.check_shares(wanted.shares)
    # Before torch is imported: what is missing here is told at once.
    hub = open_accounts(method, Path(output)) if is_first() else None
    if job.processes is not None and job.processes < 1:
        raise RecipeError(f"processes: found {job.processes}, wanted at least 1, or nothing for one for each GPU.")
    machines = Machines() if is_one_of_several() else find_machines()
    if machines.count > 1 and method.container != "diffusers":
        raise RecipeError(
            f"{method.name} trains on one machine, and there are {machines.count}; use one with more GPUs."
        )
    interrupts.listen()
    with folder_of_run(output) as folder:
        fetched = [place for place in (job.dataset, method.base_model) if in_store(place)]
        if fetched:
            import_ahead(method)
        dataset = folder_here(job.dataset, "dataset")
        class_data_dir = getattr(method, "class_data_dir", None)
        if class_data_dir:
            folder_here(class_data_dir, "class_data_dir")
        if wanted.address and getattr(method, "with_prior_preservation", False) and not is_one_of_several():
            fetch_drawn(wanted.address, folder.path)
        processes = job.processes or number_of_gpus()
        # kohya's trainer starts them itself, in another Python.
        several = method.container == "diffusers" and (processes > 1 or machines.count > 1)
        together = int(os.environ["WORLD_SIZE"]) if is_one_of_several() else processes * machines.count
        beside = {"processes": together, "dataset's files": files_of_dataset(dataset)}
        asked = Asked(job.dataset, job.overwrite, beside)
        try:
            beginning = find_beginning(method, asked, folder.path, wanted, decided=is_one_of_several())
        except FinishedError as found:
            return already_finished(found, method, wanted)
        if method.base_model in fetched and not is_one_of_several():
            fetch_base_model(method)
        if several and not is_one_of_several():
            code = run_in_processes(processes, words, machines)
            folder.kept = code == PublishError.exit_code
            return code
        run_training(method, dataset, folder.path, hub, processes, wanted, beginning)
    return 0


def already_finished(found: FinishedError, method: CommonFields, to: Destinations) -> int:
    """Say that there is nothing to do, and say again what the run said at its end; the exit code.

    PublishError: the result was to be published then, and that failed.
    """
    if (method.push_to_hub or to.shares) and not found.published:
        raise PublishError(
            f"{found} It could not be published then: copy it to shares with sdtune sync-nfs, to the Hub with "
            "hf upload."
        )
    if reports := open_reports(method):
        for measure in found.measures:
            reports.report(measure.name, measure.value, measure.step)
    events.emit(events.Note(str(found)))
    for measure in found.measures:
        events.emit(measure)
    events.emit(found.finished)
    return 0


def sync_nfs(job: argparse.Namespace, unknown: Sequence[str]) -> int:
    """Copy the models of a run to NFS shares; the exit code."""
    if unknown:
        raise RecipeError(f"argument {unknown[0]!r}: sync-nfs has --from, --method and --nfs.")
    interrupts.listen()
    nfs.sync(job.source, job.method, job.nfs)
    return 0


def open_accounts(method: CommonFields, output: Path) -> HubRepository | None:
    """Prove that what is asked for outside of the output will be let in; the repository to upload to, if any."""
    from sdtune.training.hub import open_repository
    from sdtune.training.trackers import check_trackers

    check_trackers(method)
    return open_repository(method, output.name)


def run_training(
    method: CommonFields,
    dataset: Path,
    output: Path,
    hub: HubRepository | None = None,
    processes: int = 1,
    destinations: Destinations | None = None,
    beginning: Beginning | None = None,
) -> None:
    """Train by the method's own trainer; torch is imported here, after the arguments proved right."""
    trainer = import_trainer(method)
    from sdtune.training.run import Run

    with Run.open(method, dataset, output, hub, processes, destinations, beginning) as run:
        trainer.train(method, run)


def out_of_memory(error: Exception) -> TrainingError | None:
    """The error in the user's terms if the GPU's memory ran out, else None."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(error, torch.cuda.OutOfMemoryError):
        return None
    return TrainingError(
        "the GPU ran out of memory. What helps, most first: --train-batch-size 1 with "
        "--gradient-accumulation-steps, --gradient-checkpointing, --mixed-precision bf16 (or fp16), "
        f"a smaller --resolution, a GPU with more memory. CUDA said: {str(error).splitlines()[0]}"
    )


def fail(error: SdtuneError) -> int:
    """Tell the error and return its exit code."""
    events.emit(events.Failed(kind=error.kind, text=str(error)))
    return error.exit_code


def leave(code: int) -> NoReturn:
    """End the process, at once where it has trained or was stopped: all is closed by then, and Python would take two
    seconds to take torch apart while a GPU is paid for, or a machine taken away.

    Not after an error: of several processes that fail, the first tells it, and ends with the first that ends.
    """
    if "torch" in sys.modules and code in (0, INTERRUPTED, TERMINATED):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    leave(main())
