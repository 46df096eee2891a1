"""``sdtune.build``: ``sdtune build`` as a function; and the images that are there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

from sdtune import events
from sdtune.api import pages
from sdtune.api.arguments import checked
from sdtune.api.going import Going
from sdtune.api.options import BuildOptions
from sdtune.api.runs import Log
from sdtune.api.screens import Screen, open_screen
from sdtune.backends.registry import open_builder
from sdtune.commands.build import BuildPlan, BuildRun, BuildStarted, ImageFound, Told, plan_builds
from sdtune.commands.gathering import open_placement
from sdtune.commands.words import duration
from sdtune.errors import JobError
from sdtune.jobs.backend import StateChange
from sdtune.jobs.builder import BuildEnd, Builder, ImageRecord, StepChange, StepLine
from sdtune.jobs.images import BuildSettings
from sdtune.jobs.placement import Placement


def build(
    *image_names: str,
    every: bool = False,
    workbench: bool = False,
    force: bool = False,
    cache: bool = True,
    dry_run: bool = False,
    wait: bool = True,
    show: bool = True,
    project: str | None = None,
    region: str | None = None,
    repository: str | None = None,
    bucket: str | None = None,
    **options: Unpack[BuildOptions],
) -> Build:
    """Build the images that jobs run in, with Cloud Build: ``build("diffusers")``, ``build(every=True)`` for all.

    image_names: some of diffusers, kohya.
    workbench: the image for Workbench instances, not that for jobs. force: also what is there already. cache: take what
    has not changed from the last image. dry_run: show the build config, and make not one call. wait: return at the end;
    else at once, builds go on by themselves. show: in the cell, or as lines. project, region, repository, bucket: as in
    ``sdtune.yaml``, where not given. options: machine and disk of the build; see BuildOptions.

    RecipeError: there is no such image. JobError, from the cell that waits or from ``result()``: what was not built.
    """
    given = checked(options, BuildSettings)
    builder, placement = _builder(project=project, region=region, repository=repository, bucket=bucket)
    settings = BuildSettings.from_settings({name: value for name, value in given.items() if value is not None})
    plans = plan_builds(list(image_names), builder, settings, placement, every=every, workbench=workbench, cache=cache)
    started = Build(plans, builder, open_screen(show), force=force, rendered=dry_run)
    return started.show_plan() if dry_run else started.start(wait)


def images(
    *, project: str | None = None, region: str | None = None, repository: str | None = None
) -> list[ImageRecord]:
    """sdtune's images in the repository, newest first."""
    builder, _ = _builder(project=project, region=region, repository=repository)
    return list(builder.images())


def _builder(**given: str | None) -> tuple[Builder, Placement]:
    placement = open_placement({name: value for name, value in given.items() if value})
    return open_builder(placement), placement


class Build(Going):
    """Builds of one or several images, side by side. images: their addresses by name, as far as they are there."""

    def __init__(
        self, plans: Sequence[BuildPlan], builder: Builder, screen: Screen, *, force: bool, rendered: bool
    ) -> None:
        super().__init__(outlives=True)
        self.images: dict[str, str] = {}
        self._plans, self._builder, self._screen = plans, builder, screen
        self._running = BuildRun(plans, builder, force=force)
        self._rendered = "\n---\n".join(builder.as_text(plan.rendered) for plan in plans) if rendered else ""
        self._lines: list[str] = []
        self._steps: list[tuple[str, str]] = []
        self._notes: list[str] = []
        self._doing = ""

    def __repr__(self) -> str:
        return f"<build {', '.join(self._names())}: {self.state}>"

    def result(self, timeout: float | None = None) -> dict[str, str]:
        """Wait for the end; the images' addresses by name. JobError: what was not built, and why."""
        self._await(timeout)
        self._raise_error()
        return dict(self.images)

    def logs(self, tail: int | None = None) -> Log:
        """What the builds have said so far. tail: only so many lines."""
        return Log(self._lines if tail is None else self._lines[max(0, len(self._lines) - tail) :])

    def as_html(self) -> str:
        """See Showable."""
        return pages.page(
            f"build {', '.join(self._names())}", self._builder.place, self.state,
            [*((one.image, f"build {one.build.number}  {one.build.url}") for one in self._running.started),
             *self._steps],
            doing="" if self.done else self._doing, notes=self._notes, trouble=str(self._error or ""),
            below=pages.table(list(self.images.items())) + (pages.code(self._rendered) if self._rendered else ""),
        )  # fmt: skip

    def as_text(self) -> str:
        """See Showable."""
        head = f"build {', '.join(self._names())} on {self._builder.place}: {self.state}"
        return "\n".join([head, *(f"  {name:<24}{uri}" for name, uri in self.images.items()), self._rendered]).rstrip()

    def as_picture(self) -> None:
        """There is none."""

    def show_plan(self) -> Build:
        """Only that, of a build that is not started."""
        self._screen.begin(self)
        return self

    def start(self, wait: bool) -> Build:
        """Begin, and show it from now on. wait: until it ends."""
        self._screen.begin(self)
        return self._start(wait)

    def _names(self) -> list[str]:
        return [plan.spec.name for plan in self._plans]

    def _work(self) -> None:
        for item in self._running:
            self._hear(item)
            self._screen.change(self)
        if self._cancelled:
            raise JobError("cancelled")

    def _hear(self, item: Told) -> None:
        match item:
            case BuildStarted(image=image, build=build):
                self._screen.line(f"Building {image}, build {build.number}: {build.url}")
            case ImageFound(image=image):
                self.images[image.name] = image.uri
                self._notes.append(f"{image.name} is there already; force=True builds it anew.")
            case StateChange(state=state, text=text):
                self.state, self._doing = state, text
                self._screen.line(text)
            case StepChange(step=step, state=state, seconds=seconds):
                self._doing = step if state == "working" else self._doing
                if state != "working":
                    self._steps.append((step, f"{state} after {duration(seconds)}"))
                    self._screen.line(f"  {step}: {state} after {duration(seconds)}")
            case StepLine(text=text):
                self._lines.append(text)
                self._screen.line(text)
            case BuildEnd() if item.succeeded:
                self.images[item.image] = item.uris[0] if item.uris else item.digest
            case events.Note(text=text):
                self._notes.append(text)
            case events.Phase(text=text):
                self._doing = text
                self._screen.line(text)

    def _stop(self) -> None:
        for one in self._running.started:
            self._builder.cancel(one.build.job_id)

    def _show_end(self) -> None:
        self._screen.end(self)

    def _what(self) -> str:
        return f"the build of {', '.join(self._names())}"

    def _left(self) -> str:
        return f"{self._what()} goes on without this cell; sdtune.images() shows what is there."
