"""Is the fast path the same mathematics? What a GPU trains, beside the same in plain float32: one table, and JSON.

    python benchmarks/equal_math.py [--json FILE] [--only CASES] [--model DIR] [--budget-seconds S]

Every case is trained in these arms by the product's own parts, from the same weights, latents, captions, noise and
timesteps:

- eager float32: no kernels of ours, no CUDA graph, no TF32;
- captured, in half precision with the layers of diffusers;
- captured and fused: what users get, with a checkpoint after half of the steps;
- undisturbed, another process: the same once more, because a GPU adds up in another order every time;
- resumed, another process: from that checkpoint, which is all that a kill would leave.

Held against ``LIMITS``: losses of all steps; the first gradients of the untouched weights, of step 1 (which runs as it
is) and of step 2 (which is the first one that a CUDA graph gives; step 1 has a learning rate of 0); the losses after
going on. Of AdamW's first update: which share of it bfloat16 weights would have lost, and which share of that the
float32 masters got. Exit code 1 if a limit is not kept, or a case is missing.

Models have random weights in the published shapes and are made anew, unless --model names one.
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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).parent.parent
DATASET = ROOT / "examples" / "datasets" / "captioned"
BASE_MODEL = ROOT / "examples" / "base-model"
LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "peft")
MODEL_INDEX = "model_index.json"
STEPS, TINY_STEPS = 50, 8
STEPS_TO_LOOK_AT = (1, 2)
LIMITS = {"loss": 0.01, "cosine": 0.999, "survived": 0.99, "resumed": 0.001}
TINY_LIMITS = {**LIMITS, "loss": 0.03, "cosine": 0.998}
"""loss: the most that a step's is off, of the float32 one's. cosine: of gradients, at least. survived: of the updates
that bfloat16 would lose, at least. resumed: as loss, against the run that was not interrupted; or twice what two runs
are apart that nothing interrupted, if that is more. What is tiny has few numbers that errors could cancel out over."""
REFERENCE, OURS = "eager float32", "captured and fused"
HEAD = (
    "case", "arm", "against", "loss, largest", "loss, mean", "cosine, step 1", "step 2", "least of a weight",
    "largest change", "largest apart", "lost in bf16", "of it kept", "graphs", "fused", "",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One training of captioned pictures. whole: all of the UNet, else a LoRA."""

    name: str
    family: str
    resolution: int
    batch: int
    precision: str
    whole: bool = False
    learning_rate: float = 1e-4

    @property
    def process(self) -> int:
        """Which of two processes trains it first; they have about as much to do."""
        return int(self.batch > 1)

    @property
    def inputs(self) -> str:
        """What latents and captions hang on."""
        return f"{self.family}-{self.resolution}-{self.process}"


CASES = (
    Case("lora-1", "sd1", 512, 1, "bf16"),
    Case("lora-4", "sd1", 512, 4, "bf16", learning_rate=1e-3),
    Case("lora-4-fp16", "sd1", 512, 4, "fp16", learning_rate=1e-3),
    Case("sdxl-1", "sdxl", 1024, 1, "bf16"),
    Case("full-4", "sd1", 512, 4, "bf16", whole=True, learning_rate=1e-5),
)


@dataclass(frozen=True)
class Plan:
    """What the processes are told. models: a folder for each family. until: of time.time(), no case begins later."""

    cases: Sequence[Case]
    steps: int
    models: Mapping[str, Path]
    scratch: Path
    until: float
    tiny: bool

    def to_json(self) -> str:
        return json.dumps(asdict(self), default=str)

    @classmethod
    def from_json(cls, text: str) -> Self:
        said = json.loads(text)
        models = {family: Path(folder) for family, folder in said["models"].items()}
        cases = [Case(**case) for case in said["cases"]]
        return cls(**said | {"cases": cases, "models": models, "scratch": Path(said["scratch"])})


def loss_errors(arm: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[float, float]:
    """Largest and mean relative difference of the losses of all steps that both have made."""
    both = [step for step in arm["losses"] if step in other["losses"]]
    errors = [abs(arm["losses"][step] / other["losses"][step] - 1) for step in both]
    return max(errors), sum(errors) / len(errors)


def rows_of(case: str, arms: Mapping[str, Any], limits: Mapping[str, float], *, gpu: bool) -> Iterator[dict[str, Any]]:
    """Every comparison of a case, and why it has ``failed`` its limits, if it has.

    gpu: whether arms that are to be captured and fused can be.
    """
    others = [name for name in arms if name not in (REFERENCE, OURS)]
    of_processes = [name for name in others if name.endswith("another process")]
    for name in [OURS, *others]:
        against = [OURS] if name in of_processes else [REFERENCE]
        if name.startswith("resumed"):
            against.append(of_processes[0])
        for other in against:
            yield _row(case, name, other, arms, limits, gpu=gpu)


def _row(
    case: str, name: str, other: str, arms: Mapping[str, Any], limits: Mapping[str, float], *, gpu: bool
) -> dict[str, Any]:
    arm = arms[name]
    largest, mean = loss_errors(arm, arms[other])
    row = {"case": case, "arm": name, "against": other, "largest": largest, "mean": mean, "limit": limits["loss"]}
    row |= {key: arm[key] for key in arm if key not in ("losses", "seconds")}
    failed = list(arm["warnings"])
    if name.startswith("resumed"):
        undisturbed = next(one for one in arms if one.startswith("undisturbed"))
        row["limit"] = max(limits["resumed"], 2 * loss_errors(arms[undisturbed], arms[OURS])[0])
    if not largest <= row["limit"]:
        failed.append(f"loss off by {largest:.2%}, more than {row['limit']:.2%}")
    # fp16 finds its scale: a step whose gradients overflow is left out, and has none to compare.
    cosines = {step: found for step, found in arm.get("cosines", {}).items() if int(step) not in arm["overflowed"]}
    failed += [
        f"cosine at step {step} is {found:.5f}, less than {limits['cosine']}"
        for step, found in cosines.items()
        if not found >= limits["cosine"]
    ]
    if arm.get("cosines") and not cosines:
        failed.append("the gradients of all steps that are looked at overflowed")
    if arm["below"] is not None and not arm["survived"] >= limits["survived"]:
        failed.append(f"{arm['survived']:.2%} of small updates kept, fewer than {limits['survived']:.0%}")
    if arm["below"] == 0:
        failed.append("no update was smaller than bf16 resolves: nothing is shown")
    if gpu and not arm["graphs"]:
        failed.append("no CUDA graph was recorded")
    if gpu and name != "captured" and not arm["fused"]:
        failed.append("the kernels are not in the UNet")
    return {**row, "failed": failed}


def markdown(report: Mapping[str, Any]) -> str:
    """The table, below it what failed, and what it was found on."""
    table = [HEAD, *(_cells(row) for row in report["rows"])]
    widths = [max(len(line[column]) for line in table) for column in range(len(HEAD))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in table
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    failed = [
        f"FAILED {row['case']}, {row['arm']}: {'; '.join(row['failed'])}" for row in report["rows"] if row["failed"]
    ]
    missing = [f"MISSING {name}: {why}" for name, why in report["missing"].items()]
    versions = ", ".join(f"{name} {found}" for name, found in report["versions"].items())
    return "\n".join([*lines, "", *failed, *missing, f"{report['on']}; {report['steps']} steps; {versions}"])


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    cosines, least = row.get("cosines", {}), row.get("least_cosines", {})

    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    return (
        row["case"], row["arm"], row["against"], f"{row['largest']:.3%}", f"{row['mean']:.3%}",
        *(number(cosines.get(str(step)), ".5f") for step in STEPS_TO_LOOK_AT),
        number(min(least.values(), default=None), ".4f"), number(row["change"], ".1e"), number(row.get("apart"), ".1e"),
        number(row["below"], ".1%"), number(row["survived"], ".2%"), str(row["graphs"]),
        "yes" if row["fused"] else "no", "failed" if row["failed"] else "passed",
    )  # fmt: skip


def run(plan: Plan, seconds: float) -> int:
    """Train everything, in two processes at once; the worse of their exit codes. They end when the time is up.

    So that one computes while the other loads, compiles or starts kernels from Python.
    """
    path = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path}
    script = str(Path(__file__).with_name("equal_arms.py"))
    until = time.monotonic() + seconds
    started: list[subprocess.Popen[bytes]] = []
    try:
        for number in ("0", "1"):
            started.append(subprocess.Popen([sys.executable, script, number, plan.to_json()], env=environment))
        while any(process.poll() is None for process in started) and time.monotonic() < until:
            if any(process.poll() for process in started):
                break
            time.sleep(0.1)
    finally:
        for process in started:
            process.kill()
            process.wait()
    return max(abs(process.returncode) for process in started)


def report_of(plan: Plan) -> dict[str, Any]:
    """What both processes have found, as the JSON has it."""
    report: dict[str, Any] = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"), "on": "", "steps": plan.steps, "tiny": plan.tiny,
        "versions": {name: version(name) for name in LIBRARIES}, "limits": TINY_LIMITS if plan.tiny else LIMITS,
        "cases": {}, "rows": [], "missing": {},
    }  # fmt: skip
    for case in plan.cases:
        arms: dict[str, Any] = {}
        for which in ("first", "second"):
            file = plan.scratch / case.name / f"{which}.json"
            if file.is_file():
                said = json.loads(file.read_text(encoding="utf-8"))
                report["on"] = said["on"]
                arms |= said["arms"]
            else:
                report["missing"].setdefault(case.name, "was not trained to its end")
        report["cases"][case.name] = {**asdict(case), "arms": arms}
        if OURS in arms:
            report["rows"] += rows_of(case.name, arms, report["limits"], gpu=report["on"] != "CPU")
    return report


def tiny(case: Case) -> Case:
    """The case as a CPU trains it in seconds."""
    return replace(case, resolution=64, learning_rate=1e-3 if not case.whole else 1e-4)


def family_of(model: Path) -> str:
    """Of a diffusers folder: sdxl or sd1."""
    index = json.loads((model / MODEL_INDEX).read_text(encoding="utf-8"))
    return "sdxl" if index["_class_name"] == "StableDiffusionXLPipeline" else "sd1"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The options, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="all that was found")
    parser.add_argument("--only", type=lambda names: names.split(","), metavar="CASES", help="such as lora-1,sdxl-1")
    parser.add_argument("--steps", type=int, metavar="N", help=f"of every training, an even number; not given: {STEPS}")
    parser.add_argument(
        "--model", type=Path, action="append", default=[], metavar="DIR",
        help="a diffusers folder in place of random weights; repeatable, one for each family",
    )  # fmt: skip
    parser.add_argument(
        "--budget-seconds", type=float, default=3600.0, metavar="S", help="what is not done by then is missing"
    )
    parser.add_argument("--tiny", action="store_true", help="small models and pictures, few steps: what a CPU can do")
    options = parser.parse_args(argv)
    options.steps = options.steps or (TINY_STEPS if options.tiny else STEPS)
    if options.steps < 2 * max(STEPS_TO_LOOK_AT) or options.steps % 2:
        parser.error(f"--steps: found {options.steps}, wanted an even number from {2 * max(STEPS_TO_LOOK_AT)} on")
    names = [case.name for case in CASES]
    if unknown := sorted(set(options.only or []) - set(names)):
        parser.error(f"--only: no case {', '.join(unknown)}; there are {', '.join(names)}")
    for model in options.model:
        if not (model / MODEL_INDEX).is_file():
            parser.error(f"--model: {model} has no {MODEL_INDEX}; wanted a diffusers folder")
    return options


def main(argv: list[str] | None = None) -> int:
    """Train, print the table; 1 if a limit is not kept."""
    options = parse(argv)
    cases = [case for case in CASES if not options.only or case.name in options.only]
    if options.tiny:
        # accelerate has fp16 for GPUs alone.
        if left_out := [case.name for case in cases if case.precision == "fp16"]:
            print(f"left out, because fp16 is for GPUs: {', '.join(left_out)}", file=sys.stderr)
        cases = [tiny(case) for case in cases if case.precision != "fp16"]
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        models = {"sd1": BASE_MODEL if options.tiny else scratch / "sd1", "sdxl": scratch / "sdxl"}
        models |= {family_of(model): model.resolve() for model in options.model}
        plan = Plan(cases, options.steps, models, scratch, time.time() + options.budget_seconds, options.tiny)
        code = run(plan, options.budget_seconds)
        report = report_of(plan)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(markdown(report))
    return 1 if code or report["missing"] or any(row["failed"] for row in report["rows"]) else 0


if __name__ == "__main__":
    # So that what was started is ended, and nothing is left of the temporary folder.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    sys.exit(main())
