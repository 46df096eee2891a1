"""Settings, arguments, variables and lines of log that nobody meant to write: each is taken, or refused by name."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from sdtune import events
from sdtune.backends.vertex.entries import EntryReader
from sdtune.cli import run_view
from sdtune.cli.terminal import Screen
from sdtune.commands.notebook import gather_parameters
from sdtune.commands.running import JobFollower
from sdtune.errors import ProjectError, SdtuneError
from sdtune.jobs.backend import JobEnd, LogLine
from sdtune.jobs.placement import Placement
from sdtune.jobs.project import gcloud_defaults
from sdtune.methods.catalog import METHODS
from sdtune.methods.settings import read_settings
from sdtune.training.__main__ import main as container
from sdtune.training.launch import find_machines
from tests.security.command_line import TABLE, ends_well
from tests.security.mutations import JSON, like, mutated
from tests.security.profiles import examples
from tests.security.prompts import AWKWARD

GOOD: dict[str, Any] = {
    "instance_prompt": "a photo of sks cat", "learning_rate": 1e-4, "rank": 8, "max_train_steps": 10,
    "sample_prompt": ["a cat"], "target_modules": ["to_q"], "mixed_precision": "no", "resolution": 512, "seed": 1,
    "lr_scheduler": "constant", "base_model": "a/b", "push_to_hub": False, "revision": "main", "optimizer": "adamw",
    "with_prior_preservation": True, "class_prompt": "a cat", "snr_gamma": 5.0, "held_out_images": 0,
}  # fmt: skip
PLACE: dict[str, Any] = {
    "project": "my-project", "region": ["us-central1"], "gpu": "l4", "gpus": 1, "machine_type": "g2-standard-8",
    "strategy": "spot", "timeout": "24h", "max_wait": "2h", "bucket": "gs://my-bucket", "labels": {"team": "art"},
    "env": {"NCCL_DEBUG": "INFO"}, "nfs": ["10.0.0.2:/vol1=/mnt/nfs/models"], "boot_disk_gb": 100, "replicas": 1,
    "network": "projects/123456789/global/networks/default", "image": "a/b:c", "hf_token_secret": "hf-token",
    "service_account": "a@my-project.iam.gserviceaccount.com", "backend": "vertex", "web_access": True,
    "tensorboard": "projects/p/locations/us-central1/tensorboards/1",
    "kms_key": "projects/p/locations/us-central1/keyRings/r/cryptoKeys/k",
}  # fmt: skip


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In an empty folder, without settings or credentials of this machine, and with no server to ask."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path / "gcloud"))
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    for name in [name for name in os.environ if name.startswith(("SDTUNE_", "GOOGLE_"))]:
        monkeypatch.delenv(name)


# --- settings ---------------------------------------------------------------------------------------------------------


@examples(100)
@given(method=st.sampled_from(list(METHODS)), settings=like(GOOD))
def test_settings_of_methods(method: str, settings: object) -> None:
    try:
        METHODS[method].from_settings(settings if isinstance(settings, dict) else {})
    except SdtuneError as error:
        assert str(error).startswith(f"{method}: ")  # noqa: PT017


@examples(100)
@given(settings=like(PLACE))
def test_settings_of_places(settings: object) -> None:
    try:
        found = Placement.from_settings(settings if isinstance(settings, dict) else {})
        assert found.mounts is not None
        assert found.image_of("diffusers")
    except SdtuneError as error:
        assert str(error).startswith("vertex: ")  # noqa: PT017


TAGS = [
    "!!python/object/apply:os.system ['id']", "!!int ''", "!!timestamp x", "!!binary x", "!!set {a, a}", "!!omap 3",
    "2026-13-45", "0x", "1:99:99", "0b", "&a *a", "{[]: 1}", "? {}", "!!float z", "!!bool 3", "<<: *x", "<<: 3",
]  # fmt: skip
YAML = st.one_of(
    like(GOOD).map(lambda value: yaml.safe_dump(value).encode()),
    st.deferred(lambda: mutated([yaml.safe_dump(GOOD).encode(), yaml.safe_dump(PLACE).encode()])),
    st.lists(st.sampled_from([*AWKWARD, *TAGS, "seed: ", "\n", "  ", "- "]), max_size=6).map(
        lambda p: "".join(p).encode()
    ),
    st.builds(lambda name, tag: f"{name}: {tag}".encode(), st.sampled_from(list(GOOD)), st.sampled_from(TAGS)),
)


@examples(120)
@given(data=YAML)
def test_recipes(data: bytes) -> None:
    Path("recipe.yaml").write_bytes(data)
    try:
        assert isinstance(read_settings(Path("recipe.yaml"), "config"), dict)
    except SdtuneError as error:
        assert "recipe.yaml" in str(error)  # noqa: PT017


@examples(60)
@given(text=YAML.map(lambda data: data.decode(errors="replace")), typed=st.lists(st.sampled_from(AWKWARD), max_size=3))
def test_parameters_of_notebooks(text: str, typed: list[str]) -> None:
    try:
        assert isinstance(gather_parameters(typed, texts=[text]), dict)
    except SdtuneError as error:
        assert "param" in str(error)  # noqa: PT017


DRY_RUN = ("--dataset", "gs://my-bucket/data", "--output", "gs://my-bucket/out", "--dry-run")


@examples(40)
@given(data=YAML, json_lines=st.booleans())
def test_recipes_by_the_command(data: bytes, json_lines: bool) -> None:
    Path("recipe.yaml").write_bytes(data)
    words = ["train", "dreambooth-lora", "--config", "recipe.yaml", "--project", "my-project", *DRY_RUN]
    ends_well([*words, *(["--json"] if json_lines else [])])


@examples(40)
@given(data=like(PLACE).map(lambda value: yaml.safe_dump(value).encode()) | YAML)
def test_files_of_projects(data: bytes) -> None:
    Path("sdtune.yaml").write_bytes(data)
    ends_well(["train", "dreambooth-lora", "--instance-prompt", "x", *DRY_RUN])


LETTERS = st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"]), max_size=12)
WORDS = st.sampled_from([word for word in AWKWARD if "\x00" not in word]) | LETTERS


@examples(40)
@given(
    values=st.dictionaries(
        st.sampled_from(sorted(PLACE)), WORDS | st.sampled_from(["1", "vertex", "local"]), max_size=3
    )
)
def test_variables(values: dict[str, str]) -> None:
    variables = {f"SDTUNE_{name.upper()}": value for name, value in values.items()}
    with mock.patch.dict(os.environ, variables):
        ends_well(["train", "dreambooth-lora", "--instance-prompt", "x", "--project", "my-project", *DRY_RUN])


@examples(40)
@given(active=st.binary(max_size=12), configuration=st.binary(max_size=60))
def test_configurations_of_gcloud(active: bytes, configuration: bytes) -> None:
    folder = Path("gcloud") / "configurations"
    folder.mkdir(parents=True, exist_ok=True)
    Path("gcloud/active_config").write_bytes(active)
    for name in ("config_default", "config_x"):
        (folder / name).write_bytes(configuration)
    assert isinstance(gcloud_defaults(), dict)
    Path("gcloud/active_config").write_text("x")
    assert isinstance(gcloud_defaults(), dict)


# --- what is typed ----------------------------------------------------------------------------------------------------


COMMANDS = [
    ("train", "dreambooth-lora"), ("train", "kohya-native-lora"), ("train",), ("validate", "dreambooth-lora"),
    ("validate",), ("machines",), ("convert",), ("init",), ("jobs", "show"), ("jobs", "logs"), ("jobs", "list"),
    ("hpo", "dreambooth-lora"), ("hpo", "status"), ("hpo", "apply"), ("build",), ("sync-nfs",), ("doctor",), ("setup",),
    (), ("nothing",),
]  # fmt: skip
OPTIONS = [
    "--dataset", "--output", "--instance-prompt", "--config", "--rank", "--learning-rate", "--tune", "--gpu", "--gpus",
    "--timeout", "--env", "--labels", "--nfs", "--region", "--project", "--bucket", "--backend", "--json", "--to",
    "--from", "--max-trials", "--early-stopping", "--seed", "--sample-prompt", "--resolution", "--machine-type", "--",
    "--save-nfs", "--network", "--state", "--tail", "--since", "--follow", "--list", "--cancel", "--all", "--help",
    "--version",
]  # fmt: skip
VALUES = [
    ".", "/", "gs://my-bucket/x", "gs://", "/gcs/x", "0", "-1", "1e400", "nan", "learning_rate=1e-5:1e-3:log",
    "rank=4,8", "a=b", "=", "local", "vertex", "l4", "24h", "kohya", "*", "~", "~nobody/x", "/dev/null",
    "/proc/self/mem", "x.yaml",
]  # fmt: skip
# Without an address of a server a call would go to Google's, so that what is asked there is not asked here.
NOT_ASKED = ("doctor", "setup", "build", "jobs", "sync-nfs")


@examples(100)
@given(
    command=st.sampled_from(COMMANDS),
    words=st.lists(st.sampled_from(OPTIONS) | st.sampled_from(VALUES) | WORDS, max_size=7),
)
def test_command_lines(command: tuple[str, ...], words: list[str]) -> None:
    typed = [*command, *words]
    if command[:1] in [(name,) for name in NOT_ASKED]:
        # Of these the options alone are looked at: a project that is none stops them before they ask.
        typed += ["--project", "NO PROJECT"]
    elif command:
        typed += ["--dry-run"] if command[0] in ("train", "hpo") else []
    ends_well(typed, TABLE - {1, 130})


@examples(10)
@given(
    words=st.lists(st.sampled_from(OPTIONS) | st.text(max_size=5), max_size=4), broken=st.binary(min_size=1, max_size=4)
)
def test_bytes_that_are_no_text(words: list[str], broken: bytes) -> None:
    typed = os.fsdecode(broken.replace(b"\x00", b"\xff"))
    ends_well(
        ["train", "dreambooth-lora", "--instance-prompt", typed, "--dataset", typed, "--dry-run", "--output", typed]
    )
    ends_well(["validate", "dreambooth-lora", typed])
    ends_well(["convert", typed, typed, "--to", "kohya"])


# --- in the container -------------------------------------------------------------------------------------------------


RECIPES = like(GOOD).map(json.dumps) | st.text(max_size=10) | st.sampled_from(["[" * 100_000, "{", "1" * 5000, "NaN"])


@examples(80)
@given(
    recipe=RECIPES, more=st.lists(st.sampled_from(["--rank=8", "--x", "-1", "--learning_rate=", "--", "x y", "--=1"]))
)
def test_arguments_of_a_container(recipe: str, more: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    # A dataset that is not there ends what is right before any model is loaded.
    words = ["train", "dreambooth-lora", "--dataset=nowhere", "--output=out", f"--recipe={recipe}", *more]
    with mock.patch("sdtune.training.__main__.run_training", side_effect=SdtuneError("nothing is trained here")):
        code = container(words)
    said = capsys.readouterr()
    assert code in TABLE
    assert "Traceback" not in said.out + said.err
    told = [events.parse(line) for line in said.out.splitlines()]
    assert any(isinstance(event, events.Failed) for event in told)


@examples(100)
@given(
    spec=like(
        {"cluster": {"workerpool0": ["h:1"], "workerpool1": ["h:2"]}, "task": {"type": "workerpool0", "index": 0}}
    )
)
def test_what_vertex_says_of_machines(spec: object) -> None:
    try:
        found = find_machines({"CLUSTER_SPEC": json.dumps(spec)})
        assert 0 <= found.number < found.count
    except ProjectError as error:
        assert "CLUSTER_SPEC" in str(error)  # noqa: PT017


# --- lines of log -----------------------------------------------------------------------------------------------------


ENTRY: dict[str, Any] = {
    "timestamp": "2026-11-25T10:00:00.123456789Z", "severity": "ERROR", "insertId": "a",
    "jsonPayload": {"message": "hello\n", "attrs": {"tag": "workerpool0-0"}}, "textPayload": "x",
    "resource": {"labels": {"task_name": "workerpool0-0"}},
}  # fmt: skip


@examples(100)
@given(entries=st.lists(like(ENTRY), max_size=4))
def test_entries_of_the_log(entries: list[object]) -> None:
    reader = EntryReader()
    for entry in entries:
        # What the service itself sends is an object with a time; all else in it is whatever a program has printed.
        sent = {**(entry if isinstance(entry, dict) else {}), "timestamp": ENTRY["timestamp"]}
        lines = reader.lines(sent)
        assert lines
        assert {line.severity for line in lines} <= {"info", "warning", "error"}


TEXTS = st.sampled_from([*AWKWARD, "[/]", "[bold]", "[/x]", ":cat:", "\x1b]0;title\x07", "\x9b2J", "‮abc", "a\\"])
FIGURES = st.integers() | st.floats() | st.none() | st.text(max_size=3) | st.booleans()


def said_by_a_program() -> st.SearchStrategy[str]:
    """Events with whatever values, and lines that look like some."""
    kinds = []
    for kind in events.KINDS.values():
        fields = {name: (TEXTS if hint == "str" else FIGURES) | JSON for name, hint in kind.__annotations__.items()}
        fields.pop("event", None)
        kinds.append(st.fixed_dictionaries({"event": st.just(kind.event), **fields}))
    lines = st.one_of(kinds).map(json.dumps)
    return (
        lines
        | TEXTS
        | st.just('{"event": ' + "[" * 20_000)
        | st.deferred(lambda: mutated([LINE])).map(lambda data: data.decode(errors="replace"))
    )


LINE = events.to_line(events.Step(1, 10, 0.5, 1e-4, 2.0, 3.0)).encode()


@pytest.mark.parametrize("terminal", [True, False])
@examples(60)
@given(lines=st.lists(said_by_a_program(), max_size=8), code=st.sampled_from([0, 1, 2, 5, -9, None]))
def test_a_run_may_say_anything(terminal: bool, lines: list[str], code: int | None) -> None:
    out = Screen(file=io.StringIO(), force_terminal=terminal, width=80, color_system=None)
    follower = JobFollower(trusted=False)
    run_view.follow(out, follower.watch(LogLine(line, "error") for line in lines))
    try:
        follower.raise_if_failed(JobEnd(code))
    except SdtuneError as error:
        assert error.exit_code in TABLE  # noqa: PT017
    shown = out.file.getvalue()  # type: ignore[attr-defined]
    assert not set("\x07\x9b\u202e") & set(shown)
    assert "\x1b]" not in shown
    if not terminal:
        assert "\x1b" not in shown


def test_a_terminal_obeys_nobody_but_us() -> None:
    out = Screen(file=io.StringIO(), force_terminal=True, width=80, color_system="standard")
    theirs = "\x1b]0;title\x07 \x1b[31mtheirs\x1b[0m :cat: \u202eabc \x9b2J a\tb\nnext \U0001f408 \xe9"
    out.print(f"[red]red[/] {theirs}")
    shown = out.file.getvalue()  # type: ignore[attr-defined]
    ours, _, rest = shown.partition(" ")
    assert ours == "\x1b[31mred\x1b[0m"
    assert rest == "\\x1b]0;title theirs :cat: \\u202eabc \\x9b2J a       b\nnext \U0001f408 \xe9\n"


def test_an_event_is_what_its_class_says_or_a_line_like_any_other() -> None:
    good = {
        "event": "step",
        "step": 1,
        "steps": 2,
        "loss": 1,
        "learning_rate": 1e-4,
        "images_per_second": 2,
        "seconds_left": 0,
    }
    assert events.parse(json.dumps(good)) == events.Step(1, 2, 1, 1e-4, 2, 0)
    for name, wrong in (("step", "1"), ("step", 1.5), ("step", True), ("loss", None), ("loss", "x"), ("steps", 10**30)):
        assert events.parse(json.dumps({**good, name: wrong})) is None
    assert events.parse(json.dumps({**good, "loss": float("nan")})) is None
    assert events.parse('{"event": "note", "text": 3}') is None
    assert events.parse('{"event": "note", "text": "x"}') == events.Note("x")
