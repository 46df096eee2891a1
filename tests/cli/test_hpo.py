"""``sdtune hpo`` as it is typed and seen, against a Vertex AI of this machine that runs the trials."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from rich.console import Console as RichConsole

from sdtune.cli import hpo, hpo_view
from sdtune.commands.hpo_picture import draw
from sdtune.errors import JobError, ProjectError
from sdtune.jobs.search_space import Parameter, SearchSpace
from sdtune.jobs.study import Measurement, StudyRecord, Trial
from sdtune.methods.catalog import ALIASES, METHODS
from tests.conftest import BASE_MODEL, Command
from tests.servers.cloud import Cloud, loopback_cloud

# A trainer that knows its loss: least at a learning rate of 1e-4. What else it does, its prompt says.
TRAINER = """
import json, math, os, sys, time
options = dict(word[2:].split("=", 1) for word in sys.argv[1:] if "=" in word)
settings = {**json.loads(options["recipe"]), **options}
if "--trials" in sys.argv:
    if "fail" in settings["instance_prompt"] and os.environ["CLOUD_ML_TRIAL_ID"] != "1":
        print(json.dumps({"event": "failed", "kind": "training", "text": "the loss is not finite"}), flush=True)
        sys.exit(5)
    loss = (math.log10(float(settings["learning_rate"])) + 4) ** 2 + 0.01
    with open(os.environ["CLOUD_ML_HP_METRIC_FILE"], "a") as file:
        for step in (2, 4):
            said = {"held_out_loss": str(loss / step), "global_step": str(step)}
            file.write(json.dumps({"trial": os.environ["CLOUD_ML_TRIAL_ID"], **said}) + "\\n")
    while "forever" in settings["instance_prompt"]:
        time.sleep(0.05)
"""


@pytest.fixture(scope="module")
def server() -> Iterator[Cloud[Any]]:
    with loopback_cloud(delays={}) as found:
        found.vertex.projects["my-project"] = "123456789012"
        found.storage.put("bkt", "placeholder", b"")
        yield found


@pytest.fixture
def cloud(server: Cloud[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Cloud[Any]:
    monkeypatch.chdir(tmp_path)
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sdtune.backends.vertex.studies.SOONEST", 0.05)
    server.vertex.requests.clear()
    return server


@pytest.fixture
def quick(cloud: Cloud[Any], monkeypatch: pytest.MonkeyPatch) -> Cloud[Any]:
    """With trials that last no time."""
    monkeypatch.setattr("sdtune.backends.vertex.specs.COMMAND", ("python", "-c", TRAINER))
    return cloud


def search(dataset: Path, name: str, *more: Any, prompt: str = "a photo of sks cat") -> list[Any]:
    return [
        "hpo", "dreambooth-lora", "--base-model", BASE_MODEL, "--dataset", dataset, "--output", f"gs://bkt/{name}",
        "--instance-prompt", prompt, "--max-train-steps", "4", "--held-out-images", "1", "--held-out-every", "2",
        "--resolution", "64", "--num-samples", "0", "--gpu", "l4", *more,
    ]  # fmt: skip


def told(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.splitlines()]


def by_event(out: str, event: str) -> list[dict[str, Any]]:
    return [line for line in told(out) if line["event"] == event]


# Before anything is sent ----------------------------------------------------------------------------------------------


def test_no_method_is_called_like_a_command() -> None:
    commands = [command.name or command.callback.__name__ for command in hpo.app.registered_commands if command]
    assert len(set(commands)) == len(commands)
    assert not {"status", "trials", "best", "picture", "apply", "cancel"} & {*METHODS, *ALIASES}


def test_a_dry_run_shows_the_search_and_sends_nothing(
    cloud: Cloud[Any], sdtune: Command, pictures: Callable[..., Path]
) -> None:
    tune = ["--tune", "learning_rate=1e-5:1e-3:log", "--tune", "rank=4,8,16,32", "--max-failed-trials", "2"]
    code, out, _ = sdtune(*search(pictures(), "dry", *tune, "--parallel-trials", "3"), "--dry-run")
    assert code == 0
    assert "trials         12, 3 at a time, until 2 have failed" in out
    assert "judged by      held_out_loss, lower is better; the last of each trial" in out
    assert "learning_rate  1e-05 to 0.001, log" in out
    assert "rank           4, 8, 16, 32" in out
    rendered = yaml.safe_load(out.partition("This would run:\n")[2])
    assert (rendered["maxTrialCount"], rendered["parallelTrialCount"], rendered["maxFailedTrialCount"]) == (12, 3, 2)
    assert [one["parameterId"] for one in rendered["studySpec"]["parameters"]] == ["learning_rate", "rank"]
    assert "--trials" in rendered["trialJobSpec"]["workerPoolSpecs"][0]["containerSpec"]["args"]
    assert not cloud.vertex.requests


def test_without_tune_the_methods_own_space_is_searched(
    cloud: Cloud[Any], sdtune: Command, pictures: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "recipe.yaml").write_text("tune: [snr_gamma]\nmax_trials: 5\nalgorithm: random\nrank: 8\n")
    dataset = pictures()
    (plan,) = by_event(sdtune(*search(dataset, "own"), "--dry-run", "--json")[1], "study_plan")
    assert [one["name"] for one in plan["space"]] == ["learning_rate", "rank"]
    # A recipe may say what is searched; what is typed wins over it.
    words = [*search(dataset, "own", "--config", tmp_path / "recipe.yaml", "--max-trials", "6"), "--dry-run", "--json"]
    (plan,) = by_event(sdtune(*words)[1], "study_plan")
    assert [one["name"] for one in plan["space"]] == ["snr_gamma"]
    assert (plan["max_trials"], plan["algorithm"], plan["parallel_trials"]) == (6, "random", 3)


def test_all_mistakes_are_told_before_anything_is_sent(
    cloud: Cloud[Any], sdtune: Command, pictures: Callable[..., Path]
) -> None:
    words = search(
        pictures(), "wrong", "--tune", "seed=1,2", "--tune", "rank=64:4", "--max-trials", "2", "--parallel-trials", "3",
        "--machine-type", "n1-standard-8", "--adam-beta1", "7",
    )  # fmt: skip
    code, _, err = sdtune(*words)
    assert code == 2
    for mistake in ("parallel_trials: found 3", "tune seed:", "tune rank: found 64:4", "adam_beta1: found '7'"):
        assert mistake in err
    assert "n1-standard-8" in err
    assert not cloud.vertex.requests


@pytest.mark.parametrize(
    ("more", "mistake"),
    [
        (["--metric", "avr_loss"], "metric: found 'avr_loss', which dreambooth-lora does not report"),
        (["--algorithm", "grid"], "algorithm: found grid, but learning_rate can be any number"),
        (["--early-stopping", "median", "--held-out-every", "0"], "early_stopping: found median, but the held-out"),
        (["--push-to-hub", "--hf-token-secret", "s"], "push_to_hub: every trial would upload"),
        (["--nfs", "10.0.0.2:/vol1=/mnt/nfs/models", "--network", "projects/1/global/networks/vpc", "--save-nfs"],
         "save_nfs: every trial would copy"),
        (["--tune", "train_text_encoder=true,false", "--text-encoder-lr", "1e-5", "--train-text-encoder"],
         "a trial with train_text_encoder false would be refused"),
        (["--backend", "local"], "gpu: is for jobs in Google Cloud"),
    ],
)  # fmt: skip
def test_a_search_that_cannot_succeed_is_refused(
    more: list[str], mistake: str, cloud: Cloud[Any], sdtune: Command, pictures: Callable[..., Path]
) -> None:
    code, _, err = sdtune(*search(pictures(), "refused", *more), "--dry-run")
    assert (code, mistake in err) == (2, True), err


def test_what_makes_a_search_doubtful_is_said(
    cloud: Cloud[Any], sdtune: Command, pictures: Callable[..., Path]
) -> None:
    code, out, _ = sdtune(*search(pictures(), "doubt", "--held-out-images", "0"), "--dry-run")
    assert code == 0
    assert "no picture is held out" in out
    large = ["--base-model", "stable-diffusion-v1-5/stable-diffusion-v1-5", "--resolution", "512", "--gpu", "t4"]
    code, out, err = sdtune(
        *search(pictures(name="more"), "doubt", *large, "--tune", "train_batch_size=1,64"), "--dry-run"
    )
    assert code == 0, err
    assert "of the trial with train_batch_size 64:" in out


# A whole study --------------------------------------------------------------------------------------------------------


def test_from_a_search_to_the_recipe_of_its_best_trial(
    quick: Cloud[Any], sdtune: Command, pictures: Callable[..., Path], tmp_path: Path
) -> None:
    tune = ["--tune", "learning_rate=1e-6:1e-2:log", "--tune", "rank=4,8", "--max-trials", "4", "--seed-per-trial"]
    code, out, err = sdtune(*search(pictures(), "whole", *tune, "--parallel-trials", "2"), "--json")
    assert code == 0, err + out
    (submitted,) = by_event(out, "submitted")
    assert quick.vertex.studies.made[submitted["number"]].most == 2
    assert {trial["id"] for trial in by_event(out, "trial")} == {"1", "2", "3", "4"}
    (study,) = by_event(out, "study")
    assert (study["state"], len(study["trials"]), study["max_trials"]) == ("succeeded", 4, 4)
    values = {trial["id"]: trial["value"] for trial in study["trials"]}
    assert values[study["best"]] == min(values.values())

    # The newest, if none is named.
    code, out, _ = sdtune("hpo", "trials", "--json")
    assert [line["value"] for line in told(out)] == sorted(values.values())
    (best,) = told(sdtune("hpo", "best", "gs://bkt/whole", "--json")[1])
    assert (best["id"], best["output"]) == (study["best"], f"gs://bkt/whole/trials/{study['best']}")
    code, out, _ = sdtune("hpo", "status", submitted["number"])
    assert code == 0
    assert re.search(rf"★ +{study['best']} +succeeded", out)
    assert f"Best: trial {study['best']}, held_out_loss {best['value']:.5g}" in out

    file = tmp_path / "best.yaml"
    assert sdtune("hpo", "apply", "whole", "-o", file)[0] == 0
    recipe = yaml.safe_load(file.read_text())
    assert recipe["learning_rate"] == best["parameters"]["learning_rate"]
    assert recipe["rank"] == best["parameters"]["rank"]
    assert recipe["seed"] == 42 + int(best["id"])
    code, out, err = sdtune("train", "dreambooth-lora", "--config", file, "--dry-run", "--json")
    assert code == 0, err
    (plan,) = by_event(out, "plan")
    assert plan["settings"]["learning_rate"] == best["parameters"]["learning_rate"]
    assert plan["output"] == "gs://bkt/whole/best"
    code, _, err = sdtune("hpo", "apply", "whole", "-o", file)
    assert (code, "is there already" in err) == (2, True)
    assert sdtune("hpo", "apply", "whole", "-o", file, "--overwrite", "--trial", "3")[0] == 0
    assert yaml.safe_load(file.read_text())["seed"] == 45
    assert sdtune("hpo", "apply", "whole", "-o", tmp_path / "no.yaml", "--trial", "9")[0] == 2

    code, out, _ = sdtune("hpo", "picture", "whole", "-o", tmp_path / "drawn")
    assert code == 0
    assert {path.name for path in (tmp_path / "drawn").iterdir()} == {"whole.png", "whole.html"}

    # A folder here of the same name is no study.
    (tmp_path / "whole").mkdir()
    assert sdtune("hpo", "status", "whole")[0] == 0
    code, _, err = sdtune("hpo", "status", "./whole")
    assert (code, "no search is kept in" in err) == (4, True)
    code, _, err = sdtune("hpo", "cancel", "whole")
    assert (code, "has ended already (succeeded)" in err) == (4, True)
    code, _, err = sdtune("hpo", "status", "unheard-of")
    assert (code, "no study of sdtune is called 'unheard-of'" in err) == (4, True)


def test_a_failed_study_says_why_and_keeps_its_best(
    quick: Cloud[Any], sdtune: Command, pictures: Callable[..., Path]
) -> None:
    few = ["--max-trials", "4", "--parallel-trials", "1", "--max-failed-trials", "2"]
    code, out, err = sdtune(*search(pictures(), "fails", *few, prompt="a photo of sks that will fail"))
    assert code == 4
    assert "the study ended as failed: the loss is not finite" in err
    assert "trial 2: the loss is not finite" in out
    logs = re.findall(r"all that it said: sdtune (jobs logs \d+ --region us-central1)", out)
    assert len(logs) == 2
    said = sdtune(*logs[0].split())
    assert "the loss is not finite" in said[1] + said[2]
    assert re.search(r"trial 1 +active .*held_out_loss [\d.e+-]+ at step 4|trial 1 +succeeded", out)
    assert told(sdtune("hpo", "best", "fails", "--json")[1])[0]["id"] == "1"
    # To ask of it is no failure; to follow it is.
    assert sdtune("hpo", "status", "fails")[0] == 0
    assert sdtune("hpo", "status", "fails", "-f")[0] == 4


def test_a_study_that_was_left_is_looked_at_and_cancelled(
    quick: Cloud[Any], sdtune: Command, pictures: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    two = ["--max-trials", "2", "--parallel-trials", "2"]
    words = search(pictures(), "left", *two, prompt="forever sks")
    assert sdtune(*words, "--detach")[0] == 0

    looked = hpo_view.HumanView._lines

    def leave(self: Any, record: StudyRecord, last: StudyRecord | None) -> None:
        looked(self, record, last)
        if sum(bool(trial.measurements) for trial in record.trials) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(hpo_view.HumanView, "_lines", leave)
    code, out, _ = sdtune("hpo", "status", "left", "--follow")
    assert code == 130
    assert "goes on without this terminal" in out
    assert "sdtune hpo cancel" in out
    code, _, err = sdtune("hpo", "best", "left")
    assert (code, "the study still runs" in err) == (4, True)
    assert sdtune("hpo", "trials", "left")[0] == 0
    assert sdtune("hpo", "cancel", "left")[0] == 0
    monkeypatch.setattr(hpo_view.HumanView, "_lines", looked)
    code, _, err = sdtune("hpo", "status", "left", "-f")
    assert (code, "the study was cancelled" in err) == (4, True)


def test_trials_of_the_real_trainer_reach_a_best_setting(
    cloud: Cloud[Any], sdtune: Command, pictures: Callable[..., Path], tmp_path: Path
) -> None:
    """Real processes train real LoRAs side by side; each in a folder of its own, each measured on what is held out."""
    tune = ["--tune", "learning_rate=1e-5:1e-2:log", "--tune", "rank=4,8"]
    two = ["--max-trials", "2", "--parallel-trials", "2"]
    code, out, err = sdtune(*search(pictures(side=64), "real", *tune, *two), "--json")
    assert code == 0, err + out[-3000:]
    (study,) = by_event(out, "study")
    assert cloud.vertex.studies.made[study["number"]].most == 2
    there = cloud.storage.buckets["bkt"]
    for trial in study["trials"]:
        assert trial["state"] == "succeeded"
        assert trial["step"] == 4
        assert 0 < trial["value"] < 2
        files = {name.rpartition("/")[2] for name in there if name.startswith(f"real/trials/{trial['id']}/")}
        assert {"pytorch_lora_weights.safetensors", "recipe.yaml"} <= files
    assert not [name for name in there if name.startswith("real/") and not name.startswith("real/trials/")]
    assert sdtune("hpo", "apply", "real", "-o", tmp_path / "best.yaml")[0] == 0
    recipe = yaml.safe_load((tmp_path / "best.yaml").read_text())
    best = next(trial for trial in study["trials"] if trial["id"] == study["best"])
    assert best["value"] == min(trial["value"] for trial in study["trials"])
    # What the best trial trained with, as it wrote it down itself.
    trained = yaml.safe_load(there[f"real/trials/{best['id']}/recipe.yaml"].data)
    assert trained["learning_rate"] == recipe["learning_rate"] == best["parameters"]["learning_rate"]
    assert trained["rank"] == recipe["rank"] == best["parameters"]["rank"]
    # Filled in by a run alone.
    known = {name for name in trained if name not in ("mixed_precision", "sample_prompt", "resolution")}
    assert {name: recipe[name] for name in known} == {name: trained[name] for name in known}


# How it looks ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def record() -> StudyRecord:
    """A study in which one trial won, one runs, and one has failed."""
    space = SearchSpace((
        Parameter("learning_rate", "double", low=1e-5, high=1e-2, scale="log"),
        Parameter("rank", "integer", low=4, high=64),
        Parameter("optimizer", "categorical", values=("adamw", "lion")),
        Parameter("adam_beta1", "discrete", values=(0.8, 0.9)),
    ))  # fmt: skip
    steps = tuple(Measurement(step, {"held_out_loss": 1 / step}) for step in (10, 20))
    first = {"learning_rate": 1e-4, "rank": 8, "optimizer": "adamw", "adam_beta1": 0.9}
    trials = (
        Trial("1", "succeeded", first, steps, steps[-1]),
        Trial("2", "active", {"learning_rate": 1e-3, "rank": 16, "optimizer": "lion"}, steps[:1]),
        Trial(
            "3", "infeasible", {"learning_rate": 1e-2, "rank": 4, "optimizer": "lion"}, reason="out of [memory]\nmore"
        ),
    )
    return StudyRecord(
        "projects/p/locations/r/hyperparameterTuningJobs/7", "7", "my study", "running", "dreambooth-lora",
        "gs://bkt/x", space, "held_out_loss", "minimize", 12, 2, trials=trials, region="us-central1",
    )  # fmt: skip


def test_on_a_terminal_the_table_moves(record: StudyRecord) -> None:
    screen = io.StringIO()
    view = hpo_view.HumanView()
    view.out = RichConsole(file=screen, force_terminal=True, width=160, highlight=False)
    succeeded = replace(record, state="succeeded")
    assert view.follow([record, succeeded]) is succeeded
    shown = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", screen.getvalue())
    assert "\x1b[2K" in screen.getvalue()  # lines were drawn over
    assert shown.count("my study (7)  running") >= 1
    assert "my study (7)  succeeded: 0 of 12 trials ended, 2 at a time" in shown
    assert re.search(r"★ +1 +succeeded +0\.0001 +8 +adamw +0\.9 +0\.05 +20", shown)
    assert re.search(r"2 +active +0\.001 +16 +lion +- +0\.1 +10", shown)
    assert "trial 3: out of [memory]" in shown


def test_a_table_is_never_larger_than_its_terminal(record: StudyRecord) -> None:
    """Else it could not be drawn over."""
    ended = datetime(2026, 11, 25, tzinfo=UTC)
    many = tuple(
        replace(record.trials[0], id=str(number), ended=ended, final=Measurement(20, {"held_out_loss": 1 / number}))
        for number in range(1, 41)
    )
    running = replace(record.trials[1], id="41", started=ended)
    screen = io.StringIO()
    view = hpo_view.HumanView()
    view.out = RichConsole(file=screen, force_terminal=True, width=60, height=12, soft_wrap=True, highlight=False)
    view.follow([replace(record, trials=(*many, running))])
    live, _, final = screen.getvalue().partition("\x1b[?25h")
    shown = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", live).replace("\r", "\n")
    assert max(map(len, shown.splitlines())) <= 60
    head, *rows = shown.rpartition("my study")[2].strip().splitlines()
    assert "40 of 12 trials ended" in head
    assert len(rows) <= 12 - 2
    # The best of those that have ended, and what runs.
    assert [row.split()[-1] for row in rows if "act" in row] == ["0.1"]
    assert any(f"{1 / 40:.5g}" in row for row in rows)
    assert not any(f"{1 / 3:.5g}" in row for row in rows)
    # What is left on the screen in the end is all of it.
    assert len([line for line in final.splitlines() if "succeeded" in line]) == 40


def test_pictures_show_every_setting_and_need_no_network(record: StudyRecord, tmp_path: Path) -> None:
    png, html = draw(record, tmp_path / "made" / "for it")
    with Image.open(png) as picture:
        assert picture.format == "PNG"
        assert picture.width > 1000
        reds = sum(count for count, (red, green, blue) in _colours(picture) if red > 180 and green < 80 and blue < 80)
    assert reds > 100  # the best trial
    text = html.read_text()
    for name in (*(one.name for one in record.space), "held_out_loss", "my study"):
        assert name in text
    assert not re.search(r"<(script|link)[^>]+(src|href)=", text)
    with pytest.raises(JobError, match="nothing to draw"):
        draw(replace(record, trials=record.trials[2:]), tmp_path)


def _colours(picture: Any) -> list[tuple[int, tuple[int, int, int]]]:
    found = picture.convert("RGB").getcolors(1 << 24)
    assert found
    return list(found)


def test_without_the_library_the_way_to_get_it_is_told(
    record: StudyRecord, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "altair", None)
    with pytest.raises(ProjectError, match=r"pip install -e '\.\[hpo\]'"):
        draw(record, tmp_path)
