"""How fast sdtune trains, beside the scripts that others train with: one table with ratios, and JSON of all of it.

    python benchmarks/train_speed.py [--diffusers-examples DIR] [--sd-scripts DIR] [--json FILE]

DIR: examples/ of a copy of huggingface/diffusers, and a copy of kohya-ss/sd-scripts. Each peer whose scripts are given
and sdtune train the same in turn on the same GPU, each by its own command line, in a process of its own, with
everything that a user's run does but samples. Models have random weights in the published shapes, Stable Diffusion
1.5's in float32 and SDXL's in float16; the pictures are five JPEGs of 1024 px, copied until a round of them is five
full batches.

Measured: the pace after the warm-up, between points at which the host had read a loss and so the GPU had done the step;
of the first row also the whole process; the GPU's memory at most, as torch allocated it and as the driver counted it.
The JSON is written after each process.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from random_pictures import make_pictures
from speed_process import Card, Seen, watch
from speed_table import markdown, seconds_per_step
from speed_work import (
    PICTURES,
    PROMPT,
    ROOT,
    WORKS,
    Command,
    Diffusers,
    Kohya,
    Places,
    Sdtune,
    Trainer,
    Work,
    git_blob,
    on_gpus,
    tiny,
)

LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "peft")
DTYPES = {"sd1": "float32", "sdxl": "float16"}
WARM_UP, TINY_WARM_UP = 20, 2
IMPORTED = (
    "torch.utils.tensorboard",
    "accelerate",
    "peft",
    "torchvision.transforms",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl",
    "tensorboard.backend.event_processing.event_accumulator",
)
READ_LIBRARIES = f"""
import contextlib, importlib, torch
for name in {IMPORTED}:
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
if torch.cuda.is_available():
    torch.nn.Conv2d(8, 8, 3, device="cuda")(torch.rand(1, 8, 64, 64, device="cuda")).sum().backward()
"""
"""What all trainers import, and the GPU's libraries. Else the first one would read them from a cold disk for all."""
REPEATS = 100
"""Of each picture in sd-scripts, which otherwise starts its loaders anew every few steps."""


@dataclass
class Bench:
    """Where everything lies, and how much time is left. until: of time.monotonic()."""

    options: argparse.Namespace
    card: Card
    models: Path
    scratch: Path
    report: dict[str, Any]
    until: float

    def read_libraries(self) -> None:
        """Have the disk's cache hold what is imported, before anything is timed."""
        pythons = [sys.executable, *([self.options.sd_scripts_python] if self.options.sd_scripts else [])]
        for python in dict.fromkeys(pythons):
            subprocess.run([python, "-c", READ_LIBRARIES], check=True, capture_output=True)

    def run(self, trainer: Trainer, work: Work) -> None:
        """Train it once and note what was seen."""
        places = self._places(trainer, work)
        command = trainer.command(work, places, self.options.warm_up)
        log = (self.options.logs or self.scratch) / f"{work.name}-{trainer.name}.log"
        print(f"{work.title}, {trainer.name}: {command.steps} steps", file=sys.stderr, flush=True)
        seen = watch(command, places.output, log, self.card, work.gpus, self.until, whole=work.whole)
        run = noted(trainer, work, command, seen, self.options.warm_up)
        self.report["runs"].append(run)
        told = run["failed"] or f"{run['seconds_per_step']} s/step, {seen.allocated} GiB, {seen.seconds} s in all"
        print(f"  {told}", file=sys.stderr, flush=True)
        self.write()

    def write(self) -> None:
        """All that was measured until now, whole or not at all."""
        if self.options.json:
            temporary = self.options.json.with_suffix(".part")
            temporary.write_text(json.dumps(self.report, indent=1) + "\n", encoding="utf-8")
            temporary.replace(self.options.json)

    def _places(self, trainer: Trainer, work: Work) -> Places:
        model, base = self._model(work, for_sd_scripts=isinstance(trainer, Kohya))
        output = self.scratch / "output" / f"{work.name}-{trainer.name}"
        output.mkdir(parents=True)
        pictures = self.scratch / f"pictures-{work.batch * work.gpus}"
        if not pictures.is_dir():
            make_pictures(pictures, PICTURES, copies=work.batch * work.gpus)
        layout = self.scratch / "kohya"
        if not layout.is_dir():
            make_pictures(layout / f"{REPEATS}_{PROMPT}", PICTURES)
        return Places(model, pictures, layout, base, output)

    def _model(self, work: Work, *, for_sd_scripts: bool) -> tuple[Path, Path]:
        """The model's folder, made if it is not there, and what sd-scripts needs of it.

        In a process of its own: it would keep a part of the GPU.
        """
        # sd-scripts builds the published UNets alone.
        family, small = work.family, self.options.tiny and not for_sd_scripts
        folder = self.models / (f"tiny-{family}" if small else family)
        if small and family == "sd1":
            folder = ROOT / "examples" / "base-model"
        base = self.models / f"{folder.name}-for-sd-scripts"
        if (folder / "model_index.json").is_file() and (not for_sd_scripts or (base / "base.json").is_file()):
            return folder, base
        words = ["benchmarks/random_models.py", family, str(folder), f"--dtype={DTYPES[family]}"]
        words += ["--tiny"] if small and family == "sdxl" else []
        words += [f"--sd-scripts={base}"] if for_sd_scripts else []
        path = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
        started = time.monotonic()
        subprocess.run([sys.executable, *words], cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, check=True)
        self.report["model_seconds"][folder.name] = round(time.monotonic() - started, 1)
        return folder, base


def noted(trainer: Trainer, work: Work, command: Command, seen: Seen, warm_up: int) -> dict[str, Any]:
    """One process as the JSON has it."""
    pace = seconds_per_step(seen.points, warm_up)
    script = None if isinstance(trainer, Sdtune) else trainer.script(work)
    failed = seen.failed
    if pace is None and not failed and seen.stopped != "time":
        failed = f"told only {len(seen.points)} points; wanted two after {warm_up} steps of warm-up: give more --steps"
    return {
        **asdict(work), "work": work.name, "title": work.title, "teraflop": work.teraflop, "trainer": trainer.name,
        "command": shlex.join(command.words), "script_blob": git_blob(script) if script else None,
        "steps": command.steps, "seconds_per_step": pace,
        "images_per_second": pace and work.batch * work.gpus / pace, **asdict(seen), "failed": failed,
    }  # fmt: skip


def found_versions() -> dict[str, str]:
    """Of Python and of what both sides train with."""
    found = {"Python": sys.version.split()[0]}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def trainers(options: argparse.Namespace, work: Work) -> Iterator[Trainer]:
    """Those whose scripts are given and that have one for the work, then ours. Several GPUs are for ours alone."""
    peers: list[Diffusers | Kohya] = []
    if options.diffusers_examples:
        peers.append(Diffusers(options.diffusers_examples.resolve(), options.peer_workers))
    # In an SDXL of its real size a step of a CPU takes minutes, and sd-scripts has no other.
    if options.sd_scripts and not (options.tiny and work.family == "sdxl"):
        peers.append(Kohya(options.sd_scripts.resolve(), options.sd_scripts_python))
    for peer in peers:
        if options.peers in ("all", peer.name) and work.gpus == 1 and peer.script(work):
            yield peer
    yield Sdtune()


def chosen(options: argparse.Namespace) -> list[Work]:
    """The rows that were asked for, as they were asked for."""
    works = [*WORKS, *on_gpus(options.gpus)]
    if options.only:
        works = [work for work in works if work.name in options.only]
    if options.tiny:
        works = [tiny(work) for work in works]
    if options.steps:
        works = [replace(work, ours=options.steps, theirs=options.steps) for work in works]
    return works


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The options, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--diffusers-examples", type=Path, metavar="DIR", help="examples/ of diffusers")
    parser.add_argument("--sd-scripts", type=Path, metavar="DIR", help="a copy of kohya-ss/sd-scripts")
    parser.add_argument(
        "--sd-scripts-python", default=sys.executable, metavar="PYTHON", help="the Python that has what it requires"
    )
    parser.add_argument(
        "--peers", choices=("all", "none", "diffusers", "kohya"), default="all", help="of those whose scripts are given"
    )
    parser.add_argument(
        "--peer-workers", type=int, default=0, metavar="N", help="data loader processes of diffusers' scripts"
    )
    parser.add_argument("--only", type=lambda names: names.split(","), metavar="ROWS", help="such as lora-1,full-4")
    parser.add_argument("--steps", type=int, metavar="N", help="to measure in every run, after those of the warm-up")
    parser.add_argument("--warm-up", type=int, metavar="N", help=f"steps that do not count; not given: {WARM_UP}")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="also train on 2, 4, 8 ... GPUs, up to N")
    parser.add_argument("--models", type=Path, metavar="DIR", help="keeps the models; not given: a temporary folder")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all that was measured, after each process")
    parser.add_argument("--logs", type=Path, metavar="DIR", help="keeps what the processes said")
    parser.add_argument(
        "--budget-seconds",
        type=float,
        default=float("inf"),
        metavar="S",
        help="nothing runs longer; what is under way ends",
    )
    parser.add_argument(
        "--tiny", action="store_true", help="small models, few steps: proves the command lines on a CPU"
    )
    options = parser.parse_args(argv)
    if options.warm_up is None:
        options.warm_up = TINY_WARM_UP if options.tiny else WARM_UP
    names = [work.name for work in [*WORKS, *on_gpus(options.gpus)]]
    if unknown := sorted(set(options.only or []) - set(names)):
        parser.error(f"--only: no row {', '.join(unknown)}; there are {', '.join(names)}")
    wanted = {
        "--diffusers-examples": (options.diffusers_examples, "dreambooth/train_dreambooth_lora.py"),
        "--sd-scripts": (options.sd_scripts, "train_network.py"),
    }
    for option, (folder, script) in wanted.items():
        if folder and not (folder / script).is_file():
            parser.error(f"{option}: {folder} has no {script}")
    return options


def main(argv: list[str] | None = None) -> int:
    """Measure, print the table; 1 if something failed."""
    options = parse(argv)
    until = time.monotonic() + options.budget_seconds
    if options.logs:
        options.logs.mkdir(parents=True, exist_ok=True)
    with Card(options.gpus) as card, tempfile.TemporaryDirectory() as name:
        report: dict[str, Any] = {
            "date": datetime.now(UTC).strftime("%Y-%m-%d"), "machine": card.name, "cores": os.cpu_count(),
            "versions": found_versions(), "warm_up": options.warm_up, "tiny": options.tiny, "model_seconds": {},
            "runs": [],
        }  # fmt: skip
        models = options.models.resolve() if options.models else Path(name) / "models"
        bench = Bench(options, card, models, Path(name), report, until)
        bench.read_libraries()
        for work in chosen(options):
            for trainer in trainers(options, work):
                if time.monotonic() < until:
                    bench.run(trainer, work)
    print(markdown(report))
    return 1 if any(run["failed"] for run in report["runs"]) else 0


if __name__ == "__main__":
    # So that what was started is ended, and nothing is left of the temporary folder.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    sys.exit(main())
