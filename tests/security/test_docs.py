"""docs/security.md lists the roles that sdtune doctor asks for, and names tests that are there."""

from __future__ import annotations

import re

from sdtune.backends.storage import WRITER
from sdtune.backends.vertex.account_checks import BROAD, USER
from sdtune.backends.vertex.build_checks import KEEPER, PUSHER
from sdtune.backends.vertex.checks import vertex_checks
from sdtune.backends.vertex.project_checks import ROLES
from sdtune.backends.vertex.secret_checks import ACCESSOR
from sdtune.jobs.placement import Placement
from tests.conftest import ROOT

TEXT = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
TO_SET_UP = {"roles/serviceusage.serviceUsageAdmin", "roles/artifactregistry.admin", "roles/storage.admin"}


def test_the_roles_are_those_that_doctor_asks_for() -> None:
    listed = set(re.findall(r"roles/[A-Za-z.]+[A-Za-z]", TEXT))
    asked = {*ROLES, WRITER, USER, ACCESSOR, PUSHER, KEEPER}
    assert asked <= listed
    assert listed - asked <= TO_SET_UP | set(BROAD)
    # What a job or a build needs in one place is too much in a whole project.
    assert {ACCESSOR, KEEPER} <= set(BROAD)
    assert WRITER not in BROAD


def test_the_checks_that_are_named_are_there() -> None:
    names = {check.name for check in vertex_checks(Placement(project="my-project"))}
    rows = [line.split("|")[3].strip() for line in TEXT.splitlines() if line.startswith("| `roles/")]
    assert rows
    assert {row for row in rows if row} <= names


def test_the_files_that_are_named_are_there() -> None:
    for name in re.findall(r"`(test_\w+\.py)`", TEXT):
        assert (ROOT / "tests" / "security" / name).is_file(), name
    for name in re.findall(r"\]\(([\w.]+\.md)", TEXT):
        assert (ROOT / "docs" / name).is_file(), name
