"""Uploads by the real client to a Hub on the loopback: what arrives, what does not, and what is told when it fails."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sdtune import events
from sdtune.errors import PublishError, RecipeError
from sdtune.jobs.spec import plan_training
from sdtune.methods.catalog import METHODS
from sdtune.methods.dreambooth import DreamBoothLora
from sdtune.training.components.base_facts import License, base_facts
from sdtune.training.hub import HubRepository, published_names
from tests.servers.hub import READ_ONLY, TOKEN, Hub, Repository, running_hub


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running_hub() as hub:
        yield hub


Train = Callable[..., tuple[int, list[events.Event], str]]


@pytest.fixture
def train(hub: Hub, settings: dict[str, Any], pictures: Callable[..., Path], tmp_path: Path) -> Train:
    """Trains into ``my cat`` and uploads: exit code, events, everything printed."""
    dataset = pictures()

    def run(method: str = "dreambooth-lora", environment: dict[str, str] | None = None, **more: Any) -> Any:
        wanted = {**settings, "push_to_hub": True, "max_train_steps": 2, **more}
        fields = METHODS[method].model_fields
        recipe = METHODS[method].from_settings({name: wanted[name] for name in wanted if name in fields})
        job = plan_training(recipe, str(dataset), str(tmp_path / "my cat"))
        around = {**os.environ, "HF_HOME": str(tmp_path / "home"), **hub.environment, **(environment or {})}
        ran = subprocess.run(
            [sys.executable, "-m", "sdtune.training", *job.args], capture_output=True, text=True, env=around
        )
        told = [event for line in ran.stdout.splitlines() if (event := events.parse(line))]
        assert TOKEN not in ran.stdout + ran.stderr
        return ran.returncode, told, ran.stdout + ran.stderr

    return run


def test_the_result_arrives_in_one_commit(hub: Hub, train: Train, tmp_path: Path) -> None:
    (tmp_path / "my cat").mkdir()
    for stray in (".sdtune", "notes.txt", "checkpoint.safetensors"):
        (tmp_path / "my cat" / stray).write_text("of another day")
    code, told, printed = train()
    assert code == 0, printed
    repository = hub.repositories["alice/my-cat"]
    assert len(repository.commits) == 1
    # No curves, no training pictures, no file that the run has not made, no recipe that tells a folder's name.
    assert set(repository.files) == {
        "README.md", "my cat.safetensors", "pytorch_lora_weights.safetensors",
        "samples/step-000000/prompt-0-sample-0.png", "samples/step-000002/prompt-0-sample-0.png",
    }  # fmt: skip
    for name, content in repository.files.items():
        assert (tmp_path / "my cat" / name).read_bytes() == content
        assert str(tmp_path).encode() not in content
        assert TOKEN.encode() not in content
    assert b'load_lora_weights("alice/my-cat"' in repository.files["README.md"]
    assert b"contact_sheet.png" not in repository.files["README.md"]
    assert events.Artifact("hub", f"{hub.address}/alice/my-cat") in told
    assert isinstance(told[-1], events.Finished)
    recipe = (tmp_path / "my cat" / "recipe.yaml").read_text()
    assert not [word for word in ("push_to_hub", "hub_", "wandb", TOKEN) if word in recipe]


def test_a_whole_model_arrives_whole(hub: Hub, train: Train, tmp_path: Path) -> None:
    code, _, printed = train("dreambooth", num_samples=0, hub_model_id="alice/models.v2", hub_private=True)
    assert code == 0, printed
    repository = hub.repositories["alice/models.v2"]
    assert repository.private
    output = tmp_path / "my cat"
    made = {path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()}
    expected = {name for name in made if not name.startswith(("logs/", ".", "recipe"))}
    assert set(repository.files) == expected >= {"model_index.json", "unet/config.json", "my cat.safetensors"}
    assert not [name for name, content in repository.files.items() if str(tmp_path.parents[2]).encode() in content]


@pytest.mark.parametrize(
    ("environment", "more", "words"),
    [
        ({"HF_TOKEN": ""}, {}, "there is no Hugging Face token here. Log in with: hf auth login"),
        ({"HF_TOKEN": "hf_wrong"}, {}, "the Hub refuses the token (Invalid user token"),
        ({"HF_TOKEN": READ_ONLY}, {}, "You don't have the rights"),
        ({"HF_TOKEN": READ_ONLY}, {"hub_model_id": "alice/old"}, "the Hub refuses the token"),
        ({}, {"hub_model_id": "bob/cat"}, "You don't have the rights"),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, {}, "the Hub cannot be reached"),
        ({"HF_HUB_OFFLINE": "1"}, {}, "the Hub cannot be reached"),
    ],
)
def test_what_cannot_be_uploaded_is_not_trained(
    environment: dict[str, str], more: dict[str, Any], words: str, hub: Hub, train: Train, tmp_path: Path
) -> None:
    hub.repositories["alice/old"] = Repository()
    started = time.monotonic()
    code, told, printed = train(environment=environment, **more)
    assert code == 3, printed
    assert [type(event) for event in told] == [events.Failed]
    assert told[0].kind == "project"  # type: ignore[union-attr]
    assert words in told[0].text  # type: ignore[union-attr]
    assert "Traceback" not in printed
    assert not (tmp_path / "my cat").exists()
    assert time.monotonic() - started < 15


def test_a_failing_hub_is_told_before_training(hub: Hub, train: Train) -> None:
    hub.fail["/api/repos/create"] = 500
    code, told, _ = train()
    assert code == 3
    assert "the Hub answered with an error (" in told[-1].text  # type: ignore[union-attr]


def test_what_is_public_already_cannot_be_made_private(hub: Hub, train: Train) -> None:
    hub.repositories["alice/my-cat"] = Repository()
    code, told, _ = train(hub_private=True)
    assert code == 2
    assert "is on the Hub already, for everyone to see" in told[-1].text  # type: ignore[union-attr]


def test_a_failed_upload_loses_nothing_and_says_how_to_go_on(hub: Hub, train: Train, tmp_path: Path) -> None:
    hub.repositories["alice/my-cat"] = Repository(files={"README.md": b""})
    hub.fail["/commit/"] = 503
    code, told, printed = train(num_samples=0)
    assert code == 6, printed
    assert [event.text for event in told if isinstance(event, events.Note)] == [
        "alice/my-cat is on the Hub already; files of the result will replace those of the same name there."
    ]
    failed = told[-1]
    assert isinstance(failed, events.Failed)
    assert failed.kind == "publish"
    assert f"the result is whole in {tmp_path / 'my cat'}, but its upload to alice/my-cat failed" in failed.text
    assert (tmp_path / "my cat" / "recipe.yaml").exists()
    assert not [event for event in told if isinstance(event, events.Finished)]

    hub.fail.clear()
    words = shlex.split(failed.text.splitlines()[-1])
    words[0] = str(Path(sys.executable).with_name(words[0]))
    ran = subprocess.run(words, capture_output=True, text=True, env={**os.environ, **hub.environment})
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert set(hub.repositories["alice/my-cat"].files) == {
        "README.md", "my cat.safetensors", "pytorch_lora_weights.safetensors",
    }  # fmt: skip


@pytest.fixture
def here(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The same Hub for the client in this process."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.address)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return hub


@pytest.mark.parametrize(
    ("where", "status", "words"),
    [
        ("/preupload/", 401, "401 Unauthorized"),
        ("/commit/", 403, "403 Forbidden"),
        ("/validate-yaml", 400, "Invalid metadata in README.md"),
    ],
)
def test_every_refusal_of_an_upload_is_one_error(
    where: str, status: int, words: str, here: Hub, tmp_path: Path
) -> None:
    here.repositories["alice/cat"] = Repository()
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    here.fail[where] = status
    with pytest.raises(PublishError, match="failed") as raised:
        HubRepository("alice/cat").upload(tmp_path, ["README.md"])
    assert words in str(raised.value)
    assert str(raised.value).endswith(f"\n  hf upload alice/cat {tmp_path} . --include README.md")


def test_a_result_in_a_bucket_is_uploaded_from_there_again(here: Hub, tmp_path: Path) -> None:
    here.repositories["alice/cat"] = Repository()
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "README.md").write_text("---\nlicense: mit\n---\n")
    here.fail["/commit/"] = 403
    with pytest.raises(PublishError, match="the result is whole in gs://pets/a/cat, but") as raised:
        HubRepository("alice/cat").upload(tmp_path / "cat", ["README.md"], "gs://pets/a/cat")
    assert str(raised.value).endswith(
        "\n  gcloud storage cp --recursive gs://pets/a/cat .\n  hf upload alice/cat cat . --include README.md"
    )


@pytest.mark.parametrize("place", ["gs://pets/model", "/gcs/pets/model"])
def test_a_recipe_that_names_a_bucket_is_not_uploaded(place: str, tmp_path: Path) -> None:
    files = {"lora": ["a.safetensors"], "recipe": ["recipe.yaml"]}
    assert published_names(tmp_path, files, {"base_model": place}) == ["a.safetensors", "samples/*"]


def test_a_recipe_without_folders_is_uploaded(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    for name in ("adapter_config.json", "notes.txt"):
        (tmp_path / "unet" / name).write_text("{}")
    files = {
        "lora": ["a[1].safetensors"], "peft": ["unet"], "recipe": ["recipe.yaml"],
        "tensorboard": ["logs"], "contact_sheet": ["sheet.png"],
    }  # fmt: skip
    assert published_names(
        tmp_path, files, {"base_model": "someone/model", "class_data_dir": None}, {tmp_path / "unet" / "notes.txt"}
    ) == [
        "a[[]1].safetensors", "unet/adapter_config.json", "recipe.yaml", "samples/*",
    ]  # fmt: skip
    assert "recipe.yaml" not in published_names(tmp_path, files, {"base_model": str(tmp_path)})


@pytest.mark.parametrize(
    "settings",
    [
        {"hub_model_id": "alice/cat"},
        {"hub_private": True},
        {"push_to_hub": True, "hub_model_id": "cat"},
        {"push_to_hub": True, "hub_model_id": "alice/my cat"},
        {"push_to_hub": True, "hub_model_id": "alice/a--b"},
        {"push_to_hub": True, "hub_model_id": "alice/cat.git"},
        {"push_to_hub": True, "hub_model_id": "alice/-cat"},
        {"wandb_project": "a/b"},
    ],
)
def test_wrong_names_are_told_without_the_network(settings: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="this setting cannot be used"):
        DreamBoothLora.from_settings({"instance_prompt": "a cat", **settings})


def test_a_licence_comes_from_the_hub_if_it_answers(here: Hub) -> None:
    card = b"---\nlicense: other\nlicense_name: artists-only\nlicense_link: https://a.b/c\n---\n# Text\n"
    here.repositories["alice/base"] = Repository(files={"README.md": card})
    assert base_facts("alice/base").license == License("other", "artists-only", "artists-only", "https://a.b/c")
    here.fail["/api/models"] = 500
    assert base_facts("alice/base").license is None
