"""``sdtune build`` and ``sdtune setup`` as a user meets them, and the same build by the real gcloud."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from google.cloud.devtools.cloudbuild_v1 import types
from rich.console import Console as RichConsole

from sdtune import __version__
from sdtune.backends.vertex import builds
from sdtune.cli import build_view
from tests.conftest import Command
from tests.servers.build import BucketServer, BuildServer, Script

BUCKET = "my-project-sdtune"
ACCOUNT = "builder@my-project.iam.gserviceaccount.com"


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Small sources; the current folder has no sdtune.yaml."""
    for container in ("diffusers", "kohya"):
        folder = tmp_path / "root" / "containers" / container
        folder.mkdir(parents=True)
        (folder / "Dockerfile").write_text(f"FROM scratch AS {container}")
    monkeypatch.setattr("sdtune.jobs.images.source_root", lambda: tmp_path / "root")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "root"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[BuildServer]:
    with BucketServer() as storage, BuildServer(storage) as found:
        storage.buckets[BUCKET] = {}
        found.registry.repository("my-project", "us-central1", "sdtune")
        surroundings = {
            **found.environment,
            "CLOUDSDK_CORE_PROJECT": "my-project",
            "CLOUDSDK_CONFIG": str(tmp_path / "gcloud"),
            "CLOUDSDK_AUTH_DISABLE_CREDENTIALS": "true",
            "CLOUDSDK_CORE_DISABLE_PROMPTS": "1",
            "NO_GCE_CHECK": "true",
        }
        for name, value in surroundings.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(builds, "SECONDS_BETWEEN_POLLS", 0.01)
        yield found


def storage_of(server: BuildServer) -> BucketServer:
    assert isinstance(server.storage, BucketServer)
    return server.storage


def calls(server: BuildServer) -> int:
    return len(server.requests) + len(storage_of(server).requests)


def sent(server: BuildServer) -> list[dict[str, Any]]:
    """The builds that were asked for, in the published type; without the tag that is another one each time."""
    found = []
    for request in server.requests:
        if request.method == "POST" and request.path.endswith("/builds"):
            build = types.Build.to_dict(
                types.Build.from_json(json.dumps(request.body)),
                preserving_proto_field_name=False,
                always_print_fields_with_no_presence=False,
            )
            build["tags"] = [tag for tag in build["tags"] if not tag.startswith("run-")]
            found.append(build)
    return found


def test_an_image_is_built_and_its_digest_told(server: BuildServer, sdtune: Command) -> None:
    code, out, err = sdtune("build", "diffusers")
    assert (code, err) == (0, "")
    (build,) = server.builds.values()
    digest = build.results.images[0].digest
    assert f"digest    {digest}" in out
    assert f"Building sdtune-diffusers:{__version__}-" in out
    assert f"sdtune build --cancel {build.id} --region us-central1" in out
    assert re.search(r"Step build\nbuild: build says ü\n✓ build done after 0 s\nStep smoke-test\n", out)
    assert f"gs://{BUCKET}/sdtune/builds/" in out

    # The same source is the same image.
    before = len(server.builds), len(storage_of(server).buckets[BUCKET])
    code, out, _ = sdtune("build", "diffusers")
    assert (code, len(server.builds), len(storage_of(server).buckets[BUCKET])) == (0, *before)
    assert "There already" in out
    assert digest in out
    assert sdtune("build", "diffusers", "--force")[0] == 0
    assert len(server.builds) == 2


def test_a_changed_source_is_another_image(server: BuildServer, sdtune: Command, root: Path) -> None:
    sdtune("build", "diffusers")
    (root / "containers/diffusers/Dockerfile").write_text("FROM another")
    sdtune("build", "diffusers")
    tags = server.registry.tags("us-central1-docker.pkg.dev/my-project/sdtune/sdtune-diffusers")
    assert len(server.builds) == 2
    assert sorted(map(len, tags)) == sorted(map(len, [*["0.1.0-0123456789ab"] * 2, __version__, "latest"]))
    assert len(set(tags.values())) == 2


def test_all_images_are_built_side_by_side_and_what_failed_is_told_in_the_end(
    server: BuildServer, sdtune: Command
) -> None:
    server.script("smoke-test", Script(["BROKEN train dreambooth: no"], exit_code=1), image="diffusers")
    code, out, err = sdtune("build", "--all")
    assert code == 4
    assert out.index("Building sdtune-diffusers") < out.index("Building sdtune-kohya") < out.index("Step build")
    assert "Built sdtune-kohya" in out
    assert err.startswith("error: sdtune-diffusers was not built: step smoke-test failed (exit code 1): ")
    assert err.endswith("Its last lines:\n  | BROKEN train dreambooth: no\n")
    assert "kohya" not in err


def test_detach_starts_and_leaves_and_the_build_is_found_again(server: BuildServer, sdtune: Command) -> None:
    hold = threading.Event()
    server.script("build", Script(["at work"], hold=hold))
    code, out, _ = sdtune("build", "kohya", "--detach")
    assert (code, "at work" in out) == (0, False)
    (build_id,) = server.builds
    assert f"sdtune build --follow {build_id} --region us-central1" in out
    hold.set()
    code, out, _ = sdtune("build", "--follow", build_id)
    assert code == 0
    assert "build: at work" in out
    assert "Built sdtune-kohya" in out


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """It is heard, also by tests in a shell's background, where it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_leaves_the_build_and_says_how_to_end_it(server: BuildServer, sdtune: Command) -> None:
    hold = threading.Event()
    server.script("build", Script(["at work"], hold=hold))

    def interrupt() -> None:
        while not any(step.status == types.Build.Status.WORKING for b in server.builds.values() for step in b.steps):
            time.sleep(0.01)
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    code, out, _ = sdtune("build", "diffusers")
    ((build_id, build),) = server.builds.items()
    assert code == 130
    assert f"Build {build_id} goes on without this terminal." in out
    assert out.count(f"sdtune build --cancel {build_id} --region us-central1") == 2
    assert build.status == types.Build.Status.WORKING

    code, out, _ = sdtune("build", "--cancel", build_id)
    assert (code, out) == (0, f"Build {build_id} is being cancelled.\n")
    assert build.status == types.Build.Status.CANCELLED
    code, _, err = sdtune("build", "--cancel", build_id)
    assert (code, "has ended already" in err) == (4, True)


def test_ctrl_c_before_a_build_is_started_says_so(
    server: BuildServer, sdtune: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*given: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(builds.StagedSource, "run", interrupted)
    code, out, _ = sdtune("build", "diffusers")
    assert (code, out.splitlines()[-1]) == (130, "Stopped. No build was started.")
    assert not server.builds


def test_json_is_one_object_per_line(server: BuildServer, sdtune: Command) -> None:
    code, out, err = sdtune("build", "diffusers", "--json")
    told = [json.loads(line) for line in out.splitlines()]
    assert (code, err) == (0, "")
    kinds = [line["event"] for line in told if line["event"] not in ("progress", "state")]
    assert kinds[:2] == ["phase", "build_started"]
    assert kinds[-1] == "build_end"
    assert [(line["step"], line["state"]) for line in told if line["event"] == "step"] == [
        ("build", "working"), ("build", "done"), ("smoke-test", "working"), ("smoke-test", "done"),
        ("push", "working"), ("push", "done"),
    ]  # fmt: skip
    assert told[-1]["digest"] == next(iter(server.builds.values())).results.images[0].digest
    listed = [json.loads(line) for line in sdtune("build", "--list", "--json")[1].splitlines()]
    assert [(line["event"], line["name"], line["version"]) for line in listed] == [
        ("image", "sdtune-diffusers", __version__)
    ]
    assert listed[0]["uploaded"].startswith("20")
    found = [json.loads(line) for line in sdtune("build", "diffusers", "--json")[1].splitlines()]
    assert [(line["event"], line["image"]["digest"]) for line in found] == [("image_found", told[-1]["digest"])]


def test_images_are_listed(server: BuildServer, sdtune: Command) -> None:
    assert sdtune("build", "--list")[1] == "There are no images of sdtune here yet; sdtune build --all makes them.\n"
    sdtune("build", "--all")
    code, out, _ = sdtune("build", "--list")
    head, *rows = out.splitlines()
    assert code == 0
    assert head.split() == ["image", "sdtune", "digest", "size", "age", "tags"]
    assert {row.split()[0] for row in rows} == {"sdtune-diffusers", "sdtune-kohya"}
    row = re.compile(rf"sdtune-\w+ +{__version__} +sha256:[0-9a-f]{{12}}  3.10 GB  \d+ s +[\w.-]+, [\w.]+, latest ?")
    assert all(map(row.fullmatch, rows))


def test_on_a_terminal_running_steps_stand_below_with_their_times(
    server: BuildServer, sdtune: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = io.StringIO()
    terminal = RichConsole(file=screen, force_terminal=True, width=120, highlight=False, soft_wrap=True)
    monkeypatch.setattr(build_view, "_out", lambda: terminal)
    server.script("build", Script(["at work"], seconds=0.4))
    assert sdtune("build", "diffusers")[0] == 0
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    assert re.search(r"[⠀-⣿] build \d s", shown)  # a spinner, the step, its time
    assert "✓ build done after 0 s" in shown
    assert shown.index("build: at work") < shown.index("✓ build done")


MISTAKES = {
    ("build",): "image: found none, wanted some of diffusers kohya, or --all.",
    ("build", "diffusers", "--all"): "image: found a name and --all, wanted some of diffusers kohya, or --all.",
    ("build", "sd"): "there is no image 'sd'; there are: diffusers, kohya.",
    ("build", "kohya", "--list"): "--list: stands alone; leave the image out.",
    ("build", "--list", "--cancel", "1"): "--list: stands alone; leave --cancel out.",
    ("build", "kohya", "--machine-type", "n2", "--disk-gb", "9"): "build: these 2 settings cannot be used:",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_mistakes_are_told_before_anything_is_asked(
    words: tuple[str, ...], server: BuildServer, sdtune: Command
) -> None:
    code, out, err = sdtune(*words)
    assert (code, out) == (2, "")
    assert MISTAKES[words] in err
    assert calls(server) == 0


def test_a_project_that_is_not_set_up_is_told(server: BuildServer, sdtune: Command) -> None:
    code, _, err = sdtune("build", "kohya", "--repository", "other")
    assert code == 3
    assert "there is no repository other in us-central1 of project my-project" in err
    code, _, err = sdtune("build", "kohya", "--bucket", "no-such-bucket")
    assert code == 3
    assert "there is no bucket no-such-bucket" in err
    assert not server.builds


# --- dry runs, and gcloud --------------------------------------------------------------------------------------------

WORDS = ("build", "diffusers", "--service-account", ACCOUNT, "--disk-gb", "300", "--timeout", "90m", "--no-cache")


def test_a_dry_run_prints_what_would_be_sent_and_makes_no_call(server: BuildServer, sdtune: Command) -> None:
    code, out, err = sdtune(*WORDS, "--dry-run")
    assert (code, err, calls(server)) == (0, "", 0)
    sdtune(*WORDS)
    (build,) = sent(server)
    source = build.pop("source")["storageSource"]
    printed = types.Build.from_json(json.dumps(yaml.safe_load(out)))
    assert build == types.Build.to_dict(
        printed, preserving_proto_field_name=False, always_print_fields_with_no_presence=False
    )
    assert f"gcloud builds submit gs://{source['bucket']}/{source['object']} --config=FILE --region=us-central1" in out

    code, out, _ = sdtune("build", "--all", "--workbench", "--dry-run")
    assert [config["images"][0].rpartition("/")[2].partition(":")[0] for config in yaml.safe_load_all(out)] == [
        "sdtune-diffusers-workbench",
        "sdtune-kohya-workbench",
    ]


def test_without_a_project_the_dry_run_says_how_to_give_one(
    sdtune: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path))
    for name in ("CLOUDSDK_CORE_PROJECT", "GOOGLE_CLOUD_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    code, _, err = sdtune("build", "--all", "--dry-run")
    assert (code, "give --project" in err) == (2, True)


needs_gcloud = pytest.mark.skipif(not shutil.which("gcloud"), reason="gcloud is not installed")


def gcloud(*words: str) -> str:
    ran = subprocess.run(["gcloud", *words], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@needs_gcloud
def test_gcloud_takes_the_printed_file_and_sends_the_same_build(
    server: BuildServer, sdtune: Command, tmp_path: Path
) -> None:
    sdtune(*WORDS)
    text = sdtune(*WORDS, "--dry-run")[1]
    file = tmp_path / "build.yaml"
    file.write_text(text)
    # As the file itself says; the bucket is the one that gcloud keeps sources in.
    storage_of(server).buckets["my-project_cloudbuild"] = {}
    by_hand = re.search(r"gcloud (builds submit .*)", text)
    assert by_hand
    gcloud(*by_hand[1].replace("FILE", str(file)).split(), "--async")
    ours, theirs = sent(server)
    copied = theirs.pop("source")["storageSource"]
    ours_at = ours.pop("source")["storageSource"]
    assert theirs == ours
    packed = storage_of(server).buckets
    assert packed[copied["bucket"]][copied["object"]].data == packed[ours_at["bucket"]][ours_at["object"]].data

    gcloud("builds", "submit", "--no-source", f"--config={file}", "--region=us-central1", "--async")
    assert sent(server)[2] == ours


@needs_gcloud
def test_gcloud_sees_and_ends_what_sdtune_started(server: BuildServer, sdtune: Command) -> None:
    hold = threading.Event()
    server.script("build", Script(hold=hold))
    sdtune("build", "diffusers", "--detach")
    (build_id,) = server.builds
    listed = json.loads(gcloud("builds", "list", "--region=us-central1", "--format=json"))
    assert [(build["id"], build["status"]) for build in listed] == [(build_id, "WORKING")]
    gcloud("builds", "cancel", build_id, "--region=us-central1")
    code, _, err = sdtune("build", "--follow", build_id)
    assert (code, "sdtune-diffusers was not built: it was cancelled." in err) == (4, True)


# --- setup -----------------------------------------------------------------------------------------------------------


def test_setup_makes_a_project_ready_to_build(server: BuildServer, sdtune: Command) -> None:
    storage_of(server).buckets.clear()
    server.registry.repositories.clear()
    server.services.enabled["my-project"] = set()
    words = ("setup", "--region", "europe-west4", "--repository", "images", "--bucket", "my-things")
    server.operations.slow = 0

    code, out, _ = sdtune(*words, "--dry-run")
    assert (code, calls(server)) == (0, 0)
    assert "gcloud artifacts repositories create images --repository-format=docker --location=europe-west4" in out
    assert "gcloud storage buckets create gs://my-things --location=europe-west4 --uniform-bucket-level-access" in out
    assert out.count("gcloud services enable ") == 7

    code, out, _ = sdtune(*words)
    assert code == 0
    assert out.count(" created\n") == 9
    assert "sdtune init --project my-project --bucket gs://my-things" in out
    code, out, _ = sdtune(*words, "--json")
    told = [json.loads(line) for line in out.splitlines()]
    assert [line["outcome"] for line in told] == ["there"] * 9
    assert [line["kind"] for line in told] == ["API"] * 7 + ["repository", "bucket"]
    assert sdtune("build", "kohya", *words[1:])[0] == 0
    assert "europe-west4-docker.pkg.dev/my-project/images/sdtune-kohya" in server.builds.popitem()[1].images[0]
