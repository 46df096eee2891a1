"""``sdtune.sync_nfs``: ``sdtune sync-nfs`` as a function."""

from __future__ import annotations

from typing import Unpack

from sdtune.api.arguments import Place, as_text, checked
from sdtune.api.options import PlacementOptions
from sdtune.api.runs import About, Run
from sdtune.api.screens import open_screen
from sdtune.backends.registry import BACKENDS, open_backend
from sdtune.commands.gathering import destination
from sdtune.commands.plans import copy_rows
from sdtune.commands.running import JobRun
from sdtune.commands.sync_nfs import NOT_FOR_COPIES, for_copies, plan_sync_nfs
from sdtune.errors import RecipeError
from sdtune.jobs.placement import Placement


def sync_nfs(
    source: Place | None,
    *,
    method: str | None = None,
    dry_run: bool = False,
    wait: bool = True,
    show: bool = True,
    **options: Unpack[PlacementOptions],
) -> Run:
    """Copy trained models from a bucket to Filestore shares, under <mount>/<method>/, by a small job without a GPU.

    source: the ``output`` of a training, at gs://; --from of the command. method: the folder of the share to copy to;
    not given: as the result's recipe says. options: ``nfs=["10.0.0.2:/vol1=/mnt/nfs/models"]``, ``network``,
    ``machine_type`` of a machine without a GPU (e2-standard-4), and where else the job runs; see PlacementOptions.
    dry_run, wait, show: as in ``train``. The result's ``copies`` says what became of each file.

    RecipeError: every mistake, told before anything is started.
    """
    given = checked(options, Placement)
    machine_type = given.pop("machine_type", None)
    if refused := [name for name in NOT_FOR_COPIES if given.get(name) is not None]:
        raise RecipeError(f"{refused[0]}: is for training alone, and a copy has no use for it; leave it out.")
    to = destination(given, {}, backend="vertex", output=None, dry_run=dry_run, backends=BACKENDS, placed=for_copies)
    assert to.placement  # a share is copied to by a job on Vertex AI
    where = open_backend(to.backend, to.placement, offline=to.offline)
    plan = plan_sync_nfs(as_text(source), method, where, to.placement, machine_type=machine_type, mistakes=to.mistakes)
    rendered = where.as_text(plan.rendered) if dry_run else ""
    about = About("sync-nfs", plan.job.name, plan.source, where.place, copy_rows(plan), rendered=rendered)
    run = Run(about, JobRun(plan.job, (), where), where, open_screen(show), where.cancel)
    return run.show_plan() if dry_run else run.start(wait)
