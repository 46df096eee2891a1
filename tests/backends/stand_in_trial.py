"""Stands for a training process: the same arguments, environment, events and reports, in a blink.

Its loss is least at learning_rate 1e-3. STAND_IN says what else it does: a JSON object by trial, or by ``*``.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from pathlib import Path

from sdtune import events
from sdtune.methods.catalog import find_method
from sdtune.training.hypertune import open_reports, output_of_trial, seed_of_trial, trial_id


def main() -> int:
    _, name, *words = sys.argv[1:]
    flags = {word.partition("=")[0]: word.partition("=")[2] for word in words}
    ours = ("--trials", "--seed-per-trial", "--dataset", "--output")
    method = find_method(name).from_args([word for word in words if word.partition("=")[0] not in ours])
    trial = trial_id()
    if "--seed-per-trial" in flags:
        method = method.model_copy(update={"seed": seed_of_trial(method.seed, trial)})
    output = Path(output_of_trial(flags["--output"], trial) if "--trials" in flags else flags["--output"])
    output.mkdir(parents=True, exist_ok=True)
    with (output / "starts.txt").open("a") as starts:
        starts.write(f"{os.getpid()} {os.environ.get('CUDA_VISIBLE_DEVICES')} {method.learning_rate} {method.seed}\n")
    told = json.loads(os.environ.get("STAND_IN", "{}"))
    does = told.get(trial, told.get("*", {}))
    if "fail" in does:
        events.emit(events.Failed("training", does["fail"]))
        return 5
    if "crash" in does:
        sys.stdout.write("about to crash\n")
        return int(does["crash"])
    reports = open_reports(method)
    assert reports
    loss = 0.0
    for step in range(method.held_out_every or method.max_train_steps, method.max_train_steps + 1,
                      method.held_out_every or method.max_train_steps):  # fmt: skip
        if does.get("wait_at") == step:
            # Until the test has seen enough, or for ever.
            while not Path(does["for"]).exists():
                time.sleep(0.01)
        loss = abs(math.log10(method.learning_rate) + 3) + 1 / step + does.get("worse", 0.0)
        if not does.get("silent"):
            reports.report("held_out_loss", loss, step)
        events.emit(events.Measure("held_out_loss", step, loss))
    events.emit(events.Finished(seconds=0.1, steps=method.max_train_steps, loss=loss, change=0.1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
