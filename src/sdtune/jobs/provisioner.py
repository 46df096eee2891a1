"""Provisioner: what a project must have so that jobs can run in it, and a place that makes it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

Outcome = Literal["there", "creating", "created"]


@dataclass(frozen=True, slots=True)
class Resource:
    """Something that a project has or lacks. kind: in words; command: what makes it by hand."""

    kind: str
    name: str
    command: str


@dataclass(frozen=True, slots=True)
class Provisioned:
    """What became of a resource. note: what else should be known of it."""

    resource: Resource
    outcome: Outcome
    note: str = ""


class Provisioner(Protocol):
    """A place where projects are set up."""

    @property
    def place(self) -> str:
        """In words, for the user."""

    def resources(self) -> tuple[Resource, ...]:
        """What there will be, in the order in which it is made. Asks nobody."""
        ...

    def set_up(self) -> Iterator[Provisioned]:
        """Look at each resource, and make what is not there. May be done as often as one likes."""
        ...
