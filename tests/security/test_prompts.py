"""A prompt arrives in the trainer as it was written, whatever is in it: along every way that sdtune has."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from sdtune.backends.local.backend import LocalBackend
from sdtune.backends.local.optuna_study import _settings as settings_of_study
from sdtune.backends.vertex.specs import custom_job
from sdtune.commands.hpo import recipe_text
from sdtune.errors import RecipeError
from sdtune.jobs.machines import choose_machine
from sdtune.jobs.placement import Placement
from sdtune.jobs.search_space import Parameter, SearchSpace
from sdtune.jobs.spec import JobSpec, plan_training
from sdtune.jobs.study import StudyRecord, Trial
from sdtune.methods.base import MORE, RECIPE, recipe_in
from sdtune.methods.catalog import find_method
from sdtune.methods.dreambooth import DreamBoothLora
from sdtune.methods.fields import CommonFields
from sdtune.methods.kohya import KohyaDreamBoothLora, KohyaNativeLora
from sdtune.methods.settings import as_yaml, read_settings
from sdtune.training.__main__ import _parser as parser_of_containers
from sdtune.training.kohya.samples import KohyaSamples
from tests.conftest import ROOT
from tests.security.command_line import sdtune
from tests.security.profiles import examples
from tests.security.prompts import LONGEST, TYPED, prompts
from tests.servers.processes import expand

WORST = ["🐈" * LONGEST, "$(HOME) " * 1250, "\x01" * LONGEST]
"""12 letters of JSON each; what Vertex AI replaces; 6 each."""
CLOUD = ("--project", "my-project", "--dataset", "gs://my-bucket/pictures", "--output", "gs://my-bucket/out")


def in_the_container(args: Sequence[str]) -> CommonFields:
    """What the entry point makes of a container's arguments."""
    job, rest = parser_of_containers().parse_known_args(list(args))
    method = find_method(job.method).from_args(rest)
    assert isinstance(method, CommonFields)
    return method


def as_started(job: Mapping[str, Any], environment: Mapping[str, str]) -> list[str]:
    """The arguments that Vertex AI starts a job's container with: $(NAME) and $$ have been replaced."""
    spec = job["jobSpec"]["workerPoolSpecs"][0]["containerSpec"]
    names = {**environment, **{variable["name"]: variable["value"] for variable in spec["env"]}}
    return [expand(word, names) for word in spec["args"]]


def record_of(args: tuple[str, ...]) -> StudyRecord:
    """A search as its place remembers it."""
    space = SearchSpace((Parameter("rank", "discrete", values=(4, 8)),))
    return StudyRecord(
        "1", "1", "cat", "succeeded", "dreambooth-lora", "/o", space, "held_out_loss", "minimize", 1, 1, args=args
    )


@pytest.fixture(autouse=True)
def nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No settings of this machine, and a narrow terminal."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))


@examples(25)
@given(prompt=TYPED, sample=TYPED)
def test_from_the_command_line_to_a_container_of_vertex(prompt: str, sample: str) -> None:
    ended = sdtune(
        "train", "dreambooth-lora", *CLOUD, f"--instance-prompt={prompt}", f"--sample-prompt={sample}", "--env",
        "NOTE=$(HOME) $$", "--dry-run", "--json",
    )  # fmt: skip
    assert ended.code == 0, ended.said
    rendered = next(line for line in map(json.loads, ended.said.splitlines()) if line["event"] == "dry_run")
    words = as_started(rendered, {"HOME": "/root", "PATH": "/bin", "NAME": "x"})
    arrived = in_the_container(words)
    assert isinstance(arrived, DreamBoothLora)
    assert arrived.instance_prompt == prompt
    assert arrived.sample_prompt == (sample,)


@examples(40)
@given(prompt=prompts(), samples=st.lists(prompts(), max_size=3))
def test_from_a_job_to_its_processes(prompt: str, samples: list[str]) -> None:
    sent = DreamBoothLora.from_settings({"instance_prompt": prompt, "sample_prompt": samples})
    job = plan_training(sent, "/data", "/out", choose_machine("l4", 1, None))
    assert not any("$" in word or len(word) > 131_071 for word in job.args)
    placed = custom_job(job, Placement(project="my-project"))
    assert in_the_container(as_started(placed, {"HOME": "/root"})) == sent
    # A search: what Vertex AI and the local driver append comes after all of it, and wins.
    varied = in_the_container([*job.args, "--learning_rate=3e-05", "--rank=8"])
    assert (varied.learning_rate, varied.instance_prompt) == (3e-5, prompt)  # type: ignore[attr-defined]
    # What is remembered of a search is read back from the same arguments.
    assert recipe_in(job.args) == sent.settings()
    assert settings_of_study(job.args)["instance_prompt"] == prompt


@examples(40)
@given(prompt=prompts(), samples=st.lists(prompts(), max_size=2))
def test_through_recipes_in_yaml(prompt: str, samples: list[str], tmp_path: Path) -> None:
    sent = DreamBoothLora.from_settings({"instance_prompt": prompt, "sample_prompt": samples})
    file = tmp_path / "recipe.yaml"
    # As a run writes it; a search writes the recipe of its best trial in the same way.
    file.write_text(as_yaml(sent.recipe()), encoding="utf-8")
    assert DreamBoothLora.from_settings(read_settings(file, "config")) == sent
    record = record_of(("train", "dreambooth-lora", "--dataset=/d", "--output=/o", *sent.to_args()))
    file.write_text(recipe_text(record, Trial("1", "succeeded", {"rank": 5})), encoding="utf-8")
    applied = read_settings(file, "config")
    assert (applied["instance_prompt"], applied["rank"]) == (prompt, 5)


@examples(10)
@given(prompt=prompts())
def test_from_a_recipe_file_to_a_container(prompt: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({"instance_prompt": prompt}), encoding="utf-8")
    ended = sdtune("train", "dreambooth-lora", *CLOUD, "--config", str(file), "--dry-run", "--json")
    assert ended.code == 0, ended.said
    rendered = json.loads(ended.said.splitlines()[-1])
    assert in_the_container(as_started(rendered, {})).instance_prompt == prompt  # type: ignore[attr-defined]


class Echo(LocalBackend):
    """Starts, in place of the trainer, what says which settings have arrived in its process."""

    def render(self, job: JobSpec) -> dict[str, Any]:
        rendered = super().render(job)
        at = rendered["command"].index("-m")
        rendered["command"][at : at + 2] = ["-c", ECHO]
        return rendered


ECHO = """
import json, sys
from tests.security.test_prompts import in_the_container
print(json.dumps(in_the_container(sys.argv[1:]).settings()))
"""


@pytest.mark.parametrize("prompt", [*WORST, "a\n\"b\" 'c' $(id) `id` \\ 🐈, %s\t{x}"], ids=["emoji", "$", "x01", "all"])
def test_through_the_kernel_to_a_process_of_this_machine(prompt: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("LC_ALL", "C")
    # Three of the longest are more than Linux takes in one argument.
    sent = DreamBoothLora.from_settings({"instance_prompt": prompt, "sample_prompt": [prompt, prompt]})
    backend = Echo()
    job_id = backend.submit(plan_training(sent, "/data", "/out")).job_id
    said = [line.text for line in backend.follow(job_id)]
    assert backend.wait(job_id).exit_code == 0, said[-5:]
    assert DreamBoothLora.from_settings(json.loads(said[-1])) == sent


def test_more_than_a_program_can_be_told_is_refused_before_it_is_tried() -> None:
    sent = DreamBoothLora.from_settings({"instance_prompt": "x", "sample_prompt": ["🐈" * LONGEST] * 9})
    with pytest.raises(RecipeError, match=r"settings take 1,\d{3},\d{3} characters .* shorten the prompts"):
        plan_training(sent, "/data", "/out")


def test_a_long_recipe_is_cut_and_put_together() -> None:
    sent = DreamBoothLora.from_settings({"instance_prompt": "🐈" * LONGEST, "sample_prompt": ["$(x)" * 2500]})
    first, *others = sent.to_args()
    assert first.startswith(RECIPE)
    assert others
    assert all(other.startswith(MORE) for other in others)
    with pytest.raises(RecipeError, match="--recipe is not JSON"):
        DreamBoothLora.from_args([first])
    with pytest.raises(RecipeError, match="recipe_more: dreambooth-lora has no such setting"):
        DreamBoothLora.from_args(others)


# --- kohya ------------------------------------------------------------------------------------------------------------


@examples(40)
@given(samples=st.lists(prompts(), min_size=1, max_size=3))
def test_the_prompts_of_sd_scripts_are_in_a_file_that_it_takes_as_they_are(samples: list[str], tmp_path: Path) -> None:
    method = KohyaNativeLora.from_settings({"sample_prompt": samples, "num_samples": 2, "resolution": 512})
    file = KohyaSamples(method, None, tmp_path).write_prompts(tmp_path / "prompts.json")  # type: ignore[arg-type]
    assert file
    assert file.suffix == ".json"  # a .txt would be searched for options, such as --w 64
    asked = json.loads(file.read_text(encoding="utf-8"))
    assert [one["prompt"] for one in asked] == [prompt for prompt in samples for _ in range(2)]


@examples(60)
@given(argument=st.text(max_size=20) | TYPED.map(lambda text: f"weight_decay={text}"))
def test_no_argument_of_the_optimizer_is_an_option_of_sd_scripts(argument: str) -> None:
    try:
        method = KohyaDreamBoothLora.from_settings({"optimizer_args": [argument]})
    except RecipeError as error:
        assert "optimizer_args: found" in str(error)  # noqa: PT017
        return
    (kept,) = method.optimizer_args
    assert kept.partition("=")[0].isidentifier()
    assert not kept.startswith("-")
    assert " " not in kept
