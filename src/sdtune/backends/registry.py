"""The backends by name. A backend's module is imported when it is opened: Google's clients take seconds."""

from __future__ import annotations

from sdtune.errors import ProjectError
from sdtune.jobs.archive import JobArchive
from sdtune.jobs.backend import Backend
from sdtune.jobs.builder import Builder
from sdtune.jobs.findings import Check
from sdtune.jobs.placement import Placement
from sdtune.jobs.provisioner import Provisioner
from sdtune.jobs.study import StudyBackend
from sdtune.jobs.workbench import Workbenches

BACKENDS = ("local", "vertex")


def open_backend(name: str, placement: Placement, *, offline: bool = False) -> Backend:
    """The backend called ``name``; offline: it makes no call."""
    if name == "local":
        from sdtune.backends.local.backend import LocalBackend

        return LocalBackend(offline)
    if name == "vertex":
        from sdtune.backends.vertex.backend import VertexBackend

        return VertexBackend(placement.in_project(), offline)
    raise ProjectError(f"no backend is called {name!r}; there are: {', '.join(BACKENDS)}.")


def open_archive(placement: Placement) -> JobArchive:
    """The jobs that were sent to Vertex AI."""
    from sdtune.backends.vertex.jobs import VertexJobs

    return VertexJobs(placement)


def open_checks(name: str, placement: Placement, build_account: str = "") -> list[Check]:
    """What can be asked about the backend called ``name``. build_account: see vertex_checks()."""
    if name == "local":
        from sdtune.backends.local.checks import local_checks

        return local_checks()
    from sdtune.backends.vertex.checks import vertex_checks

    return vertex_checks(placement.in_project(), build_account)


def open_builder(placement: Placement) -> Builder:
    """Where images are built."""
    from sdtune.backends.vertex.builds import VertexBuilder

    return VertexBuilder(placement.in_project())


def open_provisioner(placement: Placement) -> Provisioner:
    """Where a project is set up."""
    from sdtune.backends.vertex.setup import VertexSetup

    return VertexSetup(placement.in_project())


def open_studies(name: str, placement: Placement) -> StudyBackend:
    """Where searches run: the backend called ``name``."""
    if name == "local":
        from sdtune.backends.local.studies import LocalStudies

        return LocalStudies()
    from sdtune.backends.vertex.studies import VertexStudies

    return VertexStudies(placement)


def open_workbenches(placement: Placement) -> Workbenches:
    """Where notebooks run on machines of their own."""
    from sdtune.backends.vertex.workbench import VertexWorkbenches

    return VertexWorkbenches(placement.in_project())
