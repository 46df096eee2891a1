"""How much memory is free, on a machine and in containers of both kinds; and a copy of a state is a copy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sdtune.training.components.checkpoint_memory import Copies, free_memory, has_room
from tests.survival.test_checkpoint_files import STATE, equal

MB = 2**20
GB = 2**30


def machine(root: Path, available: int, cgroup: str = "", files: dict[str, int | str] | None = None) -> Path:
    """What the kernel says in ``root``; files: by their paths below /sys/fs/cgroup."""
    for name, content in {
        "proc/meminfo": f"MemTotal:       999999999 kB\nMemAvailable:   {available // 1024} kB\nHugePages_Total:  0\n",
        "proc/self/cgroup": cgroup,
        **{f"sys/fs/cgroup/{name}": content for name, content in (files or {}).items()},
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(str(content))
    return root


STAT = "anon 1\nactive_file {active}\ninactive_file {inactive}\nfile_dirty {dirty}\nfile_writeback 0\n"
OLD_STAT = "cache 1\ninactive_file 7\ntotal_active_file {active}\ntotal_inactive_file {inactive}\ntotal_dirty {dirty}\n"
HELD = {"active": GB, "inactive": 2 * GB, "dirty": GB}
"""Files in the cache of a container: 3 GB, of which 1 GB has to be written first."""


@pytest.mark.parametrize(
    ("cgroup", "files", "free"),
    [
        ("", {}, 30 * GB),
        # Version 2, seen from inside of a container, and from outside.
        ("0::/\n", {"memory.max": "max", "memory.current": GB, "memory.stat": STAT.format(**HELD)}, 30 * GB),
        ("0::/\n", {"memory.max": 16 * GB, "memory.current": 10 * GB, "memory.stat": STAT.format(**HELD)}, 8 * GB),
        (
            "0::/pod/one\n",
            {
                "pod/one/memory.max": "max", "pod/one/memory.current": GB, "pod/one/memory.stat": "",
                "pod/memory.max": 5 * GB, "pod/memory.current": 2 * GB, "pod/memory.stat": "",
            },
            3 * GB,
        ),
        ("0::/../other\n", {"other/memory.max": GB, "other/memory.current": 0, "other/memory.stat": ""}, GB),
        # Version 1: with the name of the host, mounted at the top; and without a limit.
        (
            "12:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n",
            {
                "memory/memory.limit_in_bytes": 16 * GB, "memory/memory.usage_in_bytes": 10 * GB,
                "memory/memory.stat": OLD_STAT.format(**HELD),
            },
            8 * GB,
        ),
        (
            "4:memory:/\n",
            {"memory/memory.limit_in_bytes": 9223372036854771712, "memory/memory.usage_in_bytes": 10 * GB},
            30 * GB,
        ),
        # More than there may be: it has been made smaller.
        ("0::/\n", {"memory.max": GB, "memory.current": 2 * GB, "memory.stat": ""}, 0),
        ("0::/\n", {"memory.max": "what", "memory.current": GB, "memory.stat": ""}, 30 * GB),
    ],
)  # fmt: skip
def test_what_is_free(tmp_path: Path, cgroup: str, files: dict[str, int | str], free: int) -> None:
    assert free_memory(machine(tmp_path, 30 * GB, cgroup, files)) == free


def test_where_nobody_says_it_nothing_is(tmp_path: Path) -> None:
    assert free_memory(tmp_path) == 0
    assert not has_room(1, root=tmp_path)


def test_this_machine_has_some() -> None:
    said = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    assert 0 < free_memory() <= int(said["MemTotal"].split()[0]) * 1024


def test_others_are_left_some(tmp_path: Path) -> None:
    root = machine(tmp_path, 6 * GB)
    assert has_room(4 * GB, root=root)
    assert not has_room(4 * GB + MB, root=root)
    # What is held already takes no more.
    assert has_room(8 * GB, held=6 * GB, root=root)
    assert not has_room(8 * GB, held=5 * GB, root=root)
    root = machine(tmp_path, GB + 10 * MB)
    assert has_room(10 * MB, root=root)
    assert not has_room(10 * MB + 1, root=root)


def test_a_copy_does_not_change_with_what_it_was_made_of() -> None:
    state: dict[str, Any] = {**STATE, "more": {"list": [1, {"a": torch.zeros(5)}]}}
    kept = {**STATE, "more": {"list": [1, {"a": torch.zeros(5)}]}}
    copy = Copies().of(state)
    assert equal(copy, kept)
    state["more"]["list"][1]["a"] += 1
    state["more"]["list"].append(2)
    assert equal(copy, kept)


def places(state: Any) -> list[int]:
    return [tensor.data_ptr() for tensor in state["weights"]]


def test_the_next_copy_takes_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    state = {"weights": [torch.randn(1000), torch.randn(30, 5).t(), torch.zeros(0)]}
    copies = Copies()
    first = copies.of(state)
    assert copies.held == 4600
    where = places(first)
    state["weights"][0] += 1
    second = copies.of(state)
    assert places(second) == where
    assert equal(second, {"weights": [tensor.contiguous() for tensor in state["weights"]]})
    # A state of another shape takes of it what fits.
    state["weights"][1] = torch.randn(7)
    third = copies.of(state)
    assert places(third)[0] == where[0]
    assert equal(third, state)
    assert copies.held == 4028
    copies.forget()
    assert copies.held == 0
    assert equal(third, state)
