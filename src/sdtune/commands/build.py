"""Build: what is built, what is there already, and each build followed to its end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sdtune import __version__, events
from sdtune.commands.running import uploaded
from sdtune.errors import JobError, RecipeError, SdtuneError
from sdtune.jobs.backend import Submitted
from sdtune.jobs.builder import BuildEnd, Builder, BuildNews, ImageRecord
from sdtune.jobs.images import BASES, CONTAINERS, BuildSettings, ImageSpec, Target, image_name, plan_image, record_bases
from sdtune.jobs.placement import Placement


@dataclass(frozen=True)
class BuildPlan:
    """A build that can be started. rendered: the request."""

    spec: ImageSpec
    rendered: dict[str, Any]


@dataclass(frozen=True, slots=True)
class ImageFound:
    """Nothing is built: just this image is there. moved: tags that did not name it, and do now."""

    image: ImageRecord
    moved: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class BuildStarted:
    """A build that goes on by itself. tag: of the image that it makes."""

    image: str
    tag: str
    build: Submitted


Told = BuildNews | BuildStarted | ImageFound | events.Event


def plan_builds(
    containers: Sequence[str],
    builder: Builder,
    settings: BuildSettings,
    placement: Placement,
    *,
    every: bool = False,
    workbench: bool = False,
    cache: bool = True,
) -> list[BuildPlan]:
    """One build for each of ``containers``, or for all. Asks nobody. RecipeError: there is no such image."""
    if bool(containers) == every:
        there = " ".join(CONTAINERS)
        raise RecipeError(f"image: found {'a name and --all' if every else 'none'}, wanted some of {there}, or --all.")
    target: Target = "workbench" if workbench else "train"
    specs = [plan_image(name, target, placement) for name in dict.fromkeys(CONTAINERS if every else containers)]
    return [BuildPlan(spec, builder.render(spec, settings, cache=cache)) for spec in specs]


class BuildRun:
    """Iterate over it to build; what it yields is what the user sees.

    All builds are started before the first is followed, and run side by side. force: build what is there, too; detach:
    do not wait. started: what goes on when it is left. JobError, at the end: of the images that could not be built.
    """

    def __init__(
        self, plans: Sequence[BuildPlan], builder: Builder, *, force: bool = False, detach: bool = False
    ) -> None:
        self.started: list[BuildStarted] = []
        self._plans, self._builder, self._force, self._detach = plans, builder, force, detach

    def __iter__(self) -> Iterator[Told]:
        for plan in self._plans:
            # Asked for in any case: it tells, too, whether there is a repository to push to.
            found = self._builder.find(plan.spec)
            if found and not self._force:
                yield ImageFound(found, self._builder.point_tags(plan.spec, found.digest))
                continue
            if upload := self._builder.stage(plan.spec):
                yield from uploaded(upload)
            started = BuildStarted(plan.spec.name, plan.spec.tag, self._builder.start(plan.rendered))
            self.started.append(started)
            yield started
            if started.build.note:
                yield events.Note(started.build.note, "warning")
        if not self._detach:
            yield from follow_builds(self._builder, [started.build.job_id for started in self.started])


def follow_builds(builder: Builder, build_ids: Sequence[str]) -> Iterator[Told]:
    """What they say, one after the other. JobError, at the end: of those that made no image."""
    failed: list[BuildEnd] = []
    for build_id in build_ids:
        for item in builder.follow(build_id):
            if isinstance(item, BuildEnd) and not item.succeeded:
                failed.append(item)
            yield item
            if isinstance(item, BuildEnd) and (noted := record_bases(item.bases)):
                yield events.Note(f"{BASES} now has {', '.join(noted)}: the next build is on the same.")
    if failed:
        raise JobError("\n".join(map(explain, failed)))


def explain(end: BuildEnd) -> str:
    """Why there is no image, and what was said last."""
    tail = "".join(f"\n  | {line}" for line in end.last_lines)
    return f"{end.image} was not built: {end.reason}" + (f" Its last lines:{tail}" if tail else "")


def image_remark(
    placement: Placement | None, offline: bool, open_builder: Callable[[Placement], Builder]
) -> Callable[[str], str | None]:
    """What plans call for the image of a container: see image_note. Nothing is said where no image is needed, or nobody
    may be asked; open_builder: of a placement, called only when it is."""

    def remark(container: str) -> str | None:
        return None if placement is None or offline else image_note(open_builder(placement), placement, container)

    return remark


def image_note(builder: Builder, placement: Placement, container: str) -> str | None:
    """What should be known of the image that a job would run in; None: it is there, or not sdtune's."""
    if placement.image:
        return None
    uri = placement.image_of(container)
    offer = f"build it, or the job cannot start: sdtune build {container}"
    try:
        if builder.digest_of(uri):
            return None
        others = [image for image in builder.images() if image.name == image_name(container) and image.version]
    except SdtuneError as error:
        # Who may submit a job need not be one who may look at images.
        return f"whether the image {uri} is there is not known: {error}"
    if not others:
        return f"the image {uri} is not there; {offer}"
    return f"the newest image {others[0].name} is of sdtune {others[0].version}, and this is {__version__}; {offer}"
