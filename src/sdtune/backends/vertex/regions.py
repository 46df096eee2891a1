"""A project's regions of Vertex AI, and how they are asked: errors in the user's terms, pages as they are reached, and
what is made is made once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from google.api_core import exceptions as api

from sdtune.backends.vertex.once import make_once
from sdtune.backends.vertex.reasons import Place, explained, translate
from sdtune.errors import CapacityError
from sdtune.jobs.backend import Submitted
from sdtune.jobs.placement import Placement

Made = TypeVar("Made")


class Regions:
    """Those of ``placement``."""

    def __init__(self, placement: Placement) -> None:
        self.placement = placement.in_project()

    def __str__(self) -> str:
        return ", ".join(self.placement.region)

    def parent(self, region: str) -> str:
        """What jobs there belong to."""
        return f"projects/{self.placement.project}/locations/{region}"

    def place(self, region: str) -> Place:
        """What an advice may name."""
        return Place(self.placement.project or "", region, self.placement.effective_strategy)

    def asking(self, what: str, name: str) -> AbstractContextManager[None]:
        """Google's errors inside, as sdtune's. what: cannot be done; name: of a resource in the region."""
        return explained(what, self.place(name.split("/")[3]))

    def listed(self, what: str, region: str, ask: Callable[[str], Iterator[Mapping[str, Any]]]) -> Iterator[Any]:
        """All that ``ask`` gives of a region; each page is asked for as it is reached."""
        parent = self.parent(region)
        with self.asking(what, parent):
            found = ask(parent)
        while True:
            with self.asking(what, parent):
                one = next(found, None)
            if one is None:
                return
            yield one

    def first(self, what: str, collection: str, number: str, get: Callable[[str], Made]) -> Made | None:
        """What has this number in any of the regions."""
        for region in self.placement.region:
            name = f"{self.parent(region)}/{collection}/{number}"
            with self.asking(what, name):
                try:
                    return get(name)
                except api.NotFound:
                    continue
        return None

    def make_once(
        self,
        what: str,
        region: str,
        look: str,
        create: Callable[[], Submitted],
        find: Callable[[], Iterable[Submitted]],
        drop: Callable[[Submitted], None],
    ) -> Submitted:
        """See once.make_once. what: cannot be done.

        CapacityError: the region has no quota for it. JobError, ProjectError: it is refused, and why.
        """
        place = self.place(region)

        def ask() -> Submitted:
            try:
                return create()
            except api.GoogleAPICallError as error:
                reason = translate(str(error.message), place)
                if reason.no_capacity:
                    # Nor will it have any in a minute.
                    raise CapacityError(f"{what}: {reason.text}") from None
                raise

        return make_once(ask, find, drop, look, lambda: explained(what, place), time.sleep)
