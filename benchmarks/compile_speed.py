"""Does --torch-compile make a whole job shorter? Start to LoRA on disk, without it, with it, and with what it has kept.

    python benchmarks/compile_speed.py [--steps 500] [--json FILE] [--model DIR] [--budget-seconds S]

One process after the other, each as a user's run without samples: SD 1.5 LoRA at 512 px, batch 1, bf16, on random
weights unless --model names a folder. ``kept``: the same output once more, as a job that is started again finds it.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from random_pictures import make_pictures
from speed_process import Card, watch
from speed_table import seconds_per_step
from speed_work import PICTURES, PROMPT, ROOT, Command
from train_speed import found_versions

WARM_UP = 20
RUNS = ("default", "compiled", "kept")


def command(run: str, options: argparse.Namespace, model: Path, scratch: Path) -> Command:
    """The training process of one run."""
    settings = {
        "base_model": str(model), "instance_prompt": PROMPT, "max_train_steps": options.steps, "num_samples": 0,
        "mixed_precision": "no" if options.tiny else "bf16", "resolution": 64 if options.tiny else 512, "rank": 4,
        "torch_compile": run != "default",
    }  # fmt: skip
    words = [
        sys.executable, "-m", "sdtune.training", "train", "dreambooth-lora", "--processes=1", f"--overwrite={run}",
        f"--dataset={scratch / 'pictures'}", f"--output={output_of(run, scratch)}", f"--recipe={json.dumps(settings)}",
    ]  # fmt: skip
    path = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
    # Triton's own cache would be warm from run to run, which a machine that is started anew has not.
    environment = {
        "PYTHONPATH": path,
        "SDTUNE_CACHE": str(scratch / "cache"),
        "TRITON_CACHE_DIR": str(scratch / f"triton-{run}"),
    }
    return Command(words, environment, options.steps, None, "*.safetensors")


def output_of(run: str, scratch: Path) -> Path:
    """The same for the second compiled run."""
    return scratch / ("default" if run == "default" else "compiled")


def row(report: Mapping[str, Any], run: str) -> str:
    """One line of the table."""
    seen, first = report["runs"][run], report["runs"]["default"]
    if seen["failed"] or seen["stopped"]:
        return f"| {run} | {seen['failed'] or 'no time was left'} | | | |"
    pace = "" if seen["pace"] is None else f"{seen['pace']:.4f}"
    ratio = f"{seen['seconds'] / first['seconds']:.2f}" if first["seconds"] and not first["failed"] else ""
    return f"| {run} | {seen['on_disk']:.1f} | {seen['seconds']:.1f} | {ratio} | {pace} |"


def main(argv: list[str] | None = None) -> int:
    """Measure; 1 if something failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--model", type=Path, metavar="DIR", help="a diffusers folder of SD 1.x")
    parser.add_argument("--logs", type=Path, metavar="DIR", help="keeps what the processes said")
    parser.add_argument("--budget-seconds", type=float, default=3600.0, metavar="S")
    parser.add_argument("--tiny", action="store_true", help="the small base model: proves the command line on a CPU")
    options = parser.parse_args(argv)
    until = time.monotonic() + options.budget_seconds
    with Card(1) as card, tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        model = options.model or (ROOT / "examples" / "base-model" if options.tiny else scratch / "sd1")
        if not model.is_dir():
            words = ["benchmarks/random_models.py", "sd1", str(model), "--dtype=float16"]
            path = {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))}
            subprocess.run([sys.executable, *words], cwd=ROOT, env={**os.environ, **path}, check=True)
        make_pictures(scratch / "pictures", PICTURES)
        logs = options.logs or scratch
        logs.mkdir(parents=True, exist_ok=True)
        report: dict[str, Any] = {
            "machine": card.name, "versions": found_versions(), "steps": options.steps, "runs": {},
        }  # fmt: skip
        for run in RUNS:
            output = output_of(run, scratch)
            output.mkdir(exist_ok=True)
            seen = watch(command(run, options, model, scratch), output, logs / f"{run}.log", card, 1, until, whole=True)
            kept = [file.stat().st_size for file in (output / "cache" / "torch").glob("*")]
            report["runs"][run] = {
                "seconds": seen.seconds, "on_disk": seen.on_disk, "pace": seconds_per_step(seen.points, WARM_UP),
                "allocated": seen.allocated, "failed": seen.failed, "stopped": seen.stopped, "kept_bytes": sum(kept),
            }  # fmt: skip
            if options.json:
                options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    head = ["| run | LoRA on disk, s | process, s | of default | s/step |", "|---|---|---|---|---|"]
    print("\n".join([*head, *(row(report, run) for run in RUNS), "", f"{card.name}; {options.steps} steps; kept: "
          f"{report['runs']['kept']['kept_bytes'] / 2**20:.1f} MiB"]))  # fmt: skip
    return 1 if any(seen["failed"] or seen["stopped"] for seen in report["runs"].values()) else 0


if __name__ == "__main__":
    # So that what was started is ended, and nothing is left of the temporary folder.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    sys.exit(main())
