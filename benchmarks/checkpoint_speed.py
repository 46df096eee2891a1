"""What checkpoints of a whole model cost: a copy in memory, files on the disk, training meanwhile, the way back.

    python benchmarks/checkpoint_speed.py [--folder DIR] [--gigabytes N] [--budget SECONDS] [--json FILE]

The state has the shape of Stable Diffusion 1.5 with AdamW: three flat float32 tensors, on the GPU if there is one. What
would not fit into the budget any more, by the rates measured until then, is left out, and that is said. DIR must be on
the disk that is meant: /tmp is memory on some machines.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sdtune.methods.resuming import Manifest, name_of
from sdtune.training.components.checkpoint_background import IN_BACKGROUND, Background
from sdtune.training.components.checkpoint_files import AT_ONCE, DISK, ShortLivedDisk, damage, read_manifest
from sdtune.training.components.checkpoint_memory import Copies, free_memory, has_room
from sdtune.training.components.checkpoint_shards import CHUNK, SHARD
from sdtune.training.components.checkpoint_state import read_state, size_of, write_checkpoint

SD15 = 859_520_964 * 3 * 4 / 1e9
"""Gigabytes: float32 weights of the UNet and both moments of AdamW."""
WRITERS = (1, 4, 8, 16)


@dataclass
class Table:
    """What was measured, and said at once. budget: seconds for all of it."""

    budget: float
    began: float = field(default_factory=time.perf_counter)
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, what: str, seconds: float, gigabytes: float = 0.0, **more: Any) -> None:
        rate = round(gigabytes / seconds, 2) if gigabytes else None
        row = {"what": what, "seconds": round(seconds, 3), "gigabytes": round(gigabytes, 2), "rate": rate, **more}
        self.rows.append(row)
        extra = ", ".join(f"{name} {value}" for name, value in more.items())
        print(f"{what:<58} {seconds:8.2f} s  {'' if rate is None else f'{rate:7.2f} GB/s'}  {extra}", flush=True)

    def fits(self, what: str, seconds: float) -> bool:
        """So many seconds more are in the budget; told if not."""
        left = self.budget - (time.perf_counter() - self.began)
        if left < seconds:
            print(f"{what:<58} left out: it would take {seconds:.0f} s, and {max(0, left):.0f} s are left", flush=True)
        return left >= seconds

    @contextmanager
    def timed(self, what: str, gigabytes: float = 0.0, **more: Any) -> Iterator[None]:
        synchronize()
        began = time.perf_counter()
        yield
        synchronize()
        self.add(what, time.perf_counter() - began, gigabytes, **more)

    def rate(self, what: str) -> float:
        """Gigabytes a second, of the row that begins so."""
        return next(float(row["rate"]) for row in self.rows if row["what"].startswith(what))


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def a_state(gigabytes: float, device: str) -> dict[str, Any]:
    entries = int(gigabytes * 1e9 / 12)
    masters, first, second = (torch.empty(entries, device=device).uniform_(-1, 1) for _ in range(3))
    moments = {"step": torch.tensor(7.0), "exp_avg": first, "exp_avg_sq": second}
    groups = [{"lr": 1e-6, "betas": (0.9, 0.999), "params": [0]}]
    return {
        "weights": {"masters": [masters]}, "optimizer": {"state": {0: moments}, "param_groups": groups},
        "random": {"cpu": [torch.get_rng_state()]}, "step": 7,
    }  # fmt: skip


def a_manifest(step: int) -> Manifest:
    return Manifest(step, "dreambooth", {}, "/pictures")


class Loop:
    """Steps of matrix products, as many in the queue as sdtune's own loop has; some tenths of a second each."""

    def __init__(self, device: str) -> None:
        self._size, self._products = (8192, 60) if device == "cuda" else (768, 8)
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self._matrix = torch.rand(self._size, self._size, device=device, dtype=dtype) / self._size
        self._events: list[Any] = []

    def run(self, goes_on: Callable[[float], bool]) -> float:
        """Steps a second, for as long as ``goes_on`` says of the seconds that have passed."""
        steps, began = 0, time.perf_counter()
        while goes_on(time.perf_counter() - began):
            for _ in range(self._products):
                self._matrix @ self._matrix
            steps += 1
            if torch.cuda.is_available():
                self._events.append(torch.cuda.current_stream().record_event())
                if len(self._events) > 8:
                    self._events.pop(0).synchronize()
        synchronize()
        return steps / (time.perf_counter() - began)


def forget_cached(folder: Path) -> None:
    """So that they are read from the disk, as after a restart."""
    for file in folder.iterdir():
        opened = os.open(file, os.O_RDONLY)
        os.fsync(opened)
        os.posix_fadvise(opened, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(opened)


def in_background(table: Table, state: dict[str, Any], copies: Copies, folder: Path, device: str) -> None:
    """A checkpoint while steps are made, and what they lose."""
    loop, background = Loop(device), Background()
    loop.run(lambda seconds: seconds < 0.5)
    alone = loop.run(lambda seconds: seconds < 3)
    synchronize()
    began = time.perf_counter()
    copy = copies.of(state)
    copied = time.perf_counter() - began
    background.start(2, lambda stopped: write_checkpoint(folder, a_manifest(2), copy, DISK, IN_BACKGROUND, stopped))
    beside: list[Any] = []

    def goes_on(_: float) -> bool:
        if ended := background.ended():
            beside.append(ended)
        return not beside

    rate = loop.run(goes_on)
    if beside[0].error:
        raise beside[0].error
    slower = max(0.0, 1 - rate / alone)
    table.add(
        f"written in the background, {IN_BACKGROUND} at once", beside[0].seconds, size_of(state) / 1e9,
        steps_alone=f"{alone:.2f}/s", steps_meanwhile=f"{rate:.2f}/s", slower=f"{100 * slower:.1f} %",
    )  # fmt: skip
    table.add("what training loses by it: the copy, and slower steps", copied + slower * beside[0].seconds)


def raw_disk(table: Table, folder: Path, gigabytes: float) -> None:
    """Writers of files of a shard's size, without hashes and states."""
    block = os.urandom(CHUNK)
    files = max(WRITERS[-1], int(gigabytes * 1e9 / SHARD))
    size = files * SHARD / 1e9

    def write(number: int, durable: bool) -> None:
        with (folder / f"raw-{number}").open("wb", buffering=0) as stream:
            for _ in range(SHARD // CHUNK):
                stream.write(block)
            if durable:
                os.fsync(stream.fileno())

    slowest = table.rate("written while all wait")
    for durable in (True, False):
        for writers in WRITERS:
            what = f"raw, {writers} at once{'' if durable else ', not waiting for the disk'}"
            # What is not waited for must still be on the disk before the next is measured.
            if not table.fits(what, 1.5 * size / slowest):
                continue
            with table.timed(what, size), ThreadPoolExecutor(writers) as pool:
                list(pool.map(write, range(files), [durable] * files))
            for number in range(files):
                (folder / f"raw-{number}").unlink()
            os.sync()


def measure(table: Table, folder: Path, gigabytes: float, device: str) -> None:
    state = a_state(gigabytes, device)
    size = size_of(state) / 1e9
    # Libraries, pinned buffers and threads are there before the clock runs.
    write_checkpoint(folder, a_manifest(1), {"weights": state["weights"]["masters"][0][:1000]})
    copies = Copies()
    if has_room(int(size * 1e9)):
        for which in ("that is new", "of the one before"):
            with table.timed(f"copied into memory {which}", size):
                copies.of(state)
    else:
        print(f"no room for a copy: {free_memory() / 1e9:.1f} GB are free")
    with table.timed(f"written while all wait, {AT_ONCE} at once (a signal)", size):
        write_checkpoint(folder, a_manifest(1), state)
    shutil.rmtree(folder / name_of(1))
    if copies.held and table.fits("written in the background", 2 * size / table.rate("written while")):
        in_background(table, state, copies, folder, device)
    else:
        write_checkpoint(folder, a_manifest(2), state)
    copies.forget()
    read_back(table, state, folder / name_of(2), size, device)
    shutil.rmtree(folder / name_of(2))
    what = f"written for a bucket, {AT_ONCE} at once, not waiting"
    if table.fits(what, size):
        with table.timed(what, size):
            write_checkpoint(folder, a_manifest(3), state, ShortLivedDisk())
        shutil.rmtree(folder / name_of(3))
        os.sync()
    what = "a third of it, one file after the other"
    if table.fits(what, size / 3 / 0.3):
        with table.timed(what, size / 3):
            write_checkpoint(folder, a_manifest(4), {"weights": state["weights"]}, threads=1)
        shutil.rmtree(folder / name_of(4))
    raw_disk(table, folder, min(2.0, size / 2))


def read_back(table: Table, state: dict[str, Any], folder: Path, size: float, device: str) -> None:
    manifest = read_manifest(folder)
    assert manifest
    forget_cached(folder)
    for which in ("from the disk", "from memory"):
        with table.timed(f"checked, {which}, {AT_ONCE} at once", size):
            assert damage(folder, manifest) is None
    with table.timed("checked, from memory, one file after the other", size):
        assert damage(folder, manifest, threads=1) is None
    with table.timed(f"read, from memory, {AT_ONCE} at once", size):
        found = read_state(folder)
    masters = state["weights"]["masters"][0]
    with table.timed(f"its weights to the {device}", size / 3):
        back = found["weights"]["masters"][0].to(device, copy=True)
    assert torch.equal(back, masters)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to write; not given: a temporary folder")
    parser.add_argument("--gigabytes", type=float, default=SD15)
    parser.add_argument("--budget", type=float, default=90.0)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory(prefix="checkpoint-speed-", dir=asked.folder) as name:
        folder = Path(name)
        free = shutil.disk_usage(folder).free / 1e9
        if free < 1.2 * asked.gigabytes:
            raise SystemExit(f"{folder} has {free:.1f} GB free, wanted {1.2 * asked.gigabytes:.1f}; give --folder.")
        machine = {
            "on": torch.cuda.get_device_name() if device == "cuda" else "CPU", "cores": os.cpu_count(),
            "memory": round(free_memory() / 1e9, 1), "torch": torch.__version__, "disk": str(folder.parent),
        }  # fmt: skip
        print(", ".join(f"{key} {value}" for key, value in machine.items()), flush=True)
        table = Table(asked.budget)
        measure(table, folder, asked.gigabytes, device)
    text = json.dumps({**machine, "rows": table.rows})
    if asked.json:
        asked.json.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
