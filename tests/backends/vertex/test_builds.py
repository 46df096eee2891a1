"""Builds by Google's own client, on a server that checks them as Cloud Build does and plays them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from google.cloud.devtools.cloudbuild_v1 import types

from sdtune import events
from sdtune.backends.vertex import builds as builds_module
from sdtune.backends.vertex.build_log import BuildLog
from sdtune.backends.vertex.build_specs import as_file, build_request, escaped
from sdtune.backends.vertex.builds import VertexBuilder
from sdtune.errors import JobError, ProjectError
from sdtune.jobs.backend import StateChange
from sdtune.jobs.builder import BuildEnd, BuildNews, StepChange, StepLine
from sdtune.jobs.images import BuildSettings, ImageSpec, Source, plan_image
from sdtune.jobs.placement import Placement
from tests.conftest import ROOT
from tests.servers.build import DEFAULT_ACCOUNT, BucketServer, BuildServer, Push, Script

PLACEMENT = Placement(project="my-project")
BUCKET = "my-project-sdtune"
ACCOUNT = "builder@my-project.iam.gserviceaccount.com"
SETTINGS = BuildSettings()


@pytest.fixture
def spec(tmp_path: Path) -> ImageSpec:
    dockerfile = tmp_path / "containers" / "diffusers" / "Dockerfile"
    dockerfile.parent.mkdir(parents=True)
    dockerfile.write_text("FROM scratch")
    return plan_image("diffusers", "train", PLACEMENT, tmp_path)


@pytest.fixture
def storage() -> Iterator[BucketServer]:
    with BucketServer() as server:
        server.buckets[BUCKET] = {}
        yield server


@pytest.fixture
def server(storage: BucketServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[BuildServer]:
    with BuildServer(storage) as found:
        found.registry.repository("my-project", "us-central1", "sdtune")
        for name, value in found.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(builds_module, "SECONDS_BETWEEN_POLLS", 0.01)
        yield found


@pytest.fixture
def builder(server: BuildServer) -> VertexBuilder:
    return VertexBuilder(PLACEMENT)


def run(builder: VertexBuilder, spec: ImageSpec, settings: BuildSettings = SETTINGS) -> list[BuildNews]:
    if staged := builder.stage(spec):
        staged.run(lambda done, total: None)
    return list(builder.follow(builder.start(builder.render(spec, settings)).job_id))


def end_of(news: list[BuildNews]) -> BuildEnd:
    assert isinstance(news[-1], BuildEnd)
    return news[-1]


# --- the request -----------------------------------------------------------------------------------------------------


def test_the_request_is_one_that_the_published_type_knows(spec: ImageSpec) -> None:
    settings = BuildSettings(service_account=ACCOUNT, disk_gb=300, timeout=5400, machine_type="E2_HIGHCPU_32")
    build = types.Build.from_json(json.dumps(build_request(spec, settings, PLACEMENT)), ignore_unknown_fields=False)
    options = types.BuildOptions
    assert build.service_account == f"projects/my-project/serviceAccounts/{ACCOUNT}"
    assert build.options.machine_type == options.MachineType.E2_HIGHCPU_32
    assert build.options.disk_size_gb == 300
    assert build.options.logging == options.LoggingMode.GCS_ONLY
    assert build.options.requested_verify_option == options.VerifyOption.VERIFIED
    assert build.timeout == timedelta(minutes=90)
    assert build.logs_bucket == f"gs://{BUCKET}/sdtune/builds/logs"
    assert build.source.storage_source.object_ == f"sdtune/builds/{spec.source.digest}.tgz"
    # The smoke test runs in the image that was just built, and before anything is pushed.
    image, smoke = build.steps
    assert [step.id for step in build.steps] == ["build", "smoke-test"]
    assert smoke.name == spec.uri
    assert f"--tag={spec.uri}" in image.args
    assert not [arg for step in build.steps for arg in step.args if arg == "push"]
    assert list(build.images) == list(spec.uris)
    assert "DOCKER_BUILDKIT=1" in image.env


def test_a_base_is_the_one_that_was_recorded() -> None:
    spec = ImageSpec("diffusers", "train", "us-central1-docker.pkg.dev/p/r", Source(()), {"BASE": "python:3@sha256:01"})
    assert "--build-arg=BASE=python:3@sha256:01" in build_request(spec, SETTINGS, PLACEMENT)["steps"][0]["args"]


def test_in_the_image_for_notebooks_the_smoke_test_runs_as_their_kernel_does() -> None:
    kohya = ["SDTUNE_SD_SCRIPTS=/opt/sd-scripts", "SDTUNE_SD_SCRIPTS_PYTHON=/opt/sd-scripts-python/bin/python"]
    for container, more in (("diffusers", []), ("kohya", kohya)):
        spec = ImageSpec(container, "workbench", "us-central1-docker.pkg.dev/p/r", Source(()))
        smoke = build_request(spec, SETTINGS, PLACEMENT)["steps"][1]
        assert smoke["env"] == ["HOME=/tmp", "HF_HUB_OFFLINE=1", "PYTHONPATH=/opt/sdtune", *more]
        # The environment that the Dockerfile makes, and its kernel's variables.
        dockerfile = (ROOT / "containers" / container / "Dockerfile").read_text()
        assert smoke["entrypoint"] in dockerfile
        assert all(f"--env {variable.replace('=', ' ')}" in dockerfile for variable in smoke["env"][2:])


def test_the_smoke_test_takes_the_arguments_that_it_is_given(spec: ImageSpec) -> None:
    _, module, *arguments = build_request(spec, SETTINGS, PLACEMENT)["steps"][1]["args"]
    ran = subprocess.run(
        [sys.executable, "-m", module, *arguments, "--help"], capture_output=True, text=True, timeout=60
    )
    assert (ran.returncode, "--base-model" in ran.stdout) == (0, True), ran.stderr


def test_the_cache_is_the_last_image_or_none(spec: ImageSpec) -> None:
    args = build_request(spec, SETTINGS, PLACEMENT)["steps"][0]["args"]
    assert f"--cache-from={spec.address}:latest" in args
    assert "--build-arg=BUILDKIT_INLINE_CACHE=1" in args
    anew = build_request(spec, SETTINGS, PLACEMENT, cache=False)["steps"][0]["args"]
    assert "--no-cache" in anew
    assert not [arg for arg in anew if arg.startswith("--cache-from")]


def test_nothing_of_it_is_taken_for_a_variable(server: BuildServer, builder: VertexBuilder, spec: ImageSpec) -> None:
    assert escaped({"args": ["$HOME", "${A}$$"], "n": 1}) == {"args": ["$$HOME", "$${A}$$$$"], "n": 1}
    request = builder.render(spec, SETTINGS)
    request["steps"][0]["args"].append("--label=price=$MONEY")
    with pytest.raises(JobError, match="not a valid built-in substitution"):
        builder.start(request)
    assert builder.start({**request, "steps": escaped(request["steps"])}).number in server.builds


def test_as_a_file_it_leaves_the_source_to_the_command_line(spec: ImageSpec) -> None:
    import yaml

    request = build_request(spec, SETTINGS, PLACEMENT)
    text = as_file(request, PLACEMENT)
    assert f"gcloud builds submit gs://{BUCKET}/sdtune/builds/{spec.source.digest}.tgz --config=FILE" in text
    del request["source"]
    assert yaml.safe_load(text) == request


def test_the_server_refuses_an_account_without_a_place_for_logs(
    server: BuildServer, builder: VertexBuilder, spec: ImageSpec
) -> None:
    request = builder.render(spec, BuildSettings(service_account=ACCOUNT))
    assert builder.start(request).number in server.builds
    del request["logsBucket"]
    with pytest.raises(JobError, match=r"must either \(a\) specify 'build.logs_bucket'"):
        builder.start(request)
    request["options"]["machineType"] = "N2_STANDARD_4"
    with pytest.raises(Exception, match="N2_STANDARD_4"):
        builder.start(request)


# --- from its start to its end ---------------------------------------------------------------------------------------


def test_a_build_is_told_in_the_order_of_its_log(server: BuildServer, builder: VertexBuilder, spec: ImageSpec) -> None:
    base = f"docker.io/library/python:3.11@sha256:{'0123456789abcdef' * 4}"
    server.script("build", Script(["#1 [internal] load ✓", "#2 10%\r#2 100%", f"#5 [train 1/6] FROM {base}"]))
    news = run(builder, spec)
    told = [item for item in news if isinstance(item, StepChange | StepLine)]
    assert told[0] == StepLine(
        "source", f"Fetching storage object: gs://{BUCKET}/sdtune/builds/{spec.source.digest}.tgz#1"
    )
    assert [(item.step, getattr(item, "state", "") or getattr(item, "text", "")) for item in told[1:]] == [
        ("build", "working"),
        ("build", "#1 [internal] load ✓"),
        ("build", "#2 100%"),
        ("build", f"#5 [train 1/6] FROM {base}"),
        ("build", "done"),
        ("smoke-test", "working"),
        ("smoke-test", "smoke-test says ü"),
        ("smoke-test", "done"),
        ("push", "working"),
        *(("push", f"Pushing {uri}") for uri in spec.uris),
        ("push", "done"),
    ]
    end = end_of(news)
    assert end.succeeded
    assert (end.image, end.uris, end.bases) == ("sdtune-diffusers", spec.uris, (base,))
    assert set(server.registry.tags(spec.address)) == set(spec.tags)
    assert set(server.registry.tags(spec.address).values()) == {end.digest}
    assert builder.digest_of(spec.uri) == end.digest


def test_lines_come_while_the_build_goes_on_and_steps_have_their_times(
    server: BuildServer, builder: VertexBuilder, spec: ImageSpec
) -> None:
    hold = threading.Event()
    server.script("build", Script(["#1 at work"], hold=hold, seconds=0.2))
    for item in (news := builder.follow(_start(builder, spec))):
        if item == StepLine("build", "#1 at work"):
            break
    assert not hold.is_set()
    hold.set()
    rest = list(news)
    done = next(item for item in rest if isinstance(item, StepChange) and item.step == "build")
    assert (done.state, 0.2 <= done.seconds < 5) == ("done", True)
    # What is written later is read, too: an object that grows is a new one each time.
    assert StepLine("smoke-test", "smoke-test says ü") in rest


def _start(builder: VertexBuilder, spec: ImageSpec) -> str:
    if staged := builder.stage(spec):
        staged.run(lambda done, total: None)
    return builder.start(builder.render(spec, SETTINGS)).job_id


def test_a_build_that_is_over_is_told_again(server: BuildServer, builder: VertexBuilder, spec: ImageSpec) -> None:
    first = [item for item in run(builder, spec) if not isinstance(item, StateChange)]
    name = builder.full_name(next(iter(server.builds)))
    assert [item for item in builder.follow(name) if not isinstance(item, StateChange)] == first


def test_a_log_that_cannot_be_read_is_told_once_and_the_build_is_followed(
    server: BuildServer, storage: BucketServer, builder: VertexBuilder, spec: ImageSpec
) -> None:
    storage.fail("GET", "log-", 403)
    news = run(builder, spec)
    notes = [item for item in news if isinstance(item, events.Note)]
    assert len(notes) == 1
    assert "roles/storage.objectViewer" in notes[0].text
    assert "console.cloud.google.com/cloud-build" in notes[0].text
    assert [(item.step, item.state) for item in news if isinstance(item, StepChange)] == [
        ("build", "working"), ("build", "done"), ("smoke-test", "working"), ("smoke-test", "done"),
    ]  # fmt: skip
    assert end_of(news).succeeded


def test_a_log_that_grows_by_torn_letters_is_told_in_whole_lines(server: BuildServer, storage: BucketServer) -> None:
    log = BuildLog({"id": "1", "logsBucket": f"gs://{BUCKET}/logs", "steps": [{"id": "build"}, {}]})
    assert list(log.read()) == []  # before its first line there is no object
    text = 'BUILD\nStep #0 - "build": größer ✓\r\nStep #1: ✓✓\nDONE\nthe end'.encode()
    told = []
    for end in range(1, len(text) + 1):
        storage.put(BUCKET, "logs/log-1.txt", text[:end])
        told.append(list(log.read()))
    assert [line for lines in told for line in lines] == [StepLine("build", "größer ✓"), StepLine("step 1", "✓✓")]
    assert told[text.index(b"\r\n") + 1] == [StepLine("build", "größer ✓")]
    assert log.is_complete
    assert list(log.read()) == []
    assert list(log.rest()) == [StepLine("", "the end")]
    assert log.last_lines("") == ("the end",)
    # Each byte was asked for once.
    asked = [request for request in storage.requests if "alt=media" in request]
    assert len(asked) == len(text) + 2


def test_a_line_that_breaks_for_a_moment_does_not_end_the_following(
    server: BuildServer, storage: BucketServer, builder: VertexBuilder, spec: ImageSpec
) -> None:
    server.fail("GET", "/builds/", 503, times=1)
    storage.cut("log-", after=10, times=1)
    news = run(builder, spec)
    assert end_of(news).succeeded
    lines = [item.text for item in news if isinstance(item, StepLine)]
    assert len(lines) == len(set(lines)) == 6  # each once: the source, two steps, three tags


def test_a_log_whose_end_comes_late_is_read_to_its_end(
    server: BuildServer, storage: BucketServer, builder: VertexBuilder, spec: ImageSpec
) -> None:
    name = _start(builder, spec)
    for _ in builder.follow(name):
        pass
    log = next(object for object in storage.buckets[BUCKET] if "log-" in object)
    whole = storage.buckets[BUCKET][log].data
    storage.put(BUCKET, log, whole[:-20])
    pauses = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        storage.put(BUCKET, log, whole)

    told = [item for item in VertexBuilder(PLACEMENT, pause).follow(name) if isinstance(item, StepLine)]
    assert told[-1] == StepLine("push", f"Pushing {spec.uris[-1]}")
    assert len(pauses) == 1


MORE = "THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE."
FAILURES: dict[str, tuple[str, list[str], int, str]] = {
    "disk": ("build", ["write /x: no space left on device"], 1, "the build's disk of 200 GB is full.*--disk-gb 400"),
    "memory": ("build", ["Killed"], 137, "E2_HIGHCPU_8.*ran out of memory.*--machine-type E2_HIGHCPU_32"),
    "memory, by its code alone": ("smoke-test", ["step 1"], 137, "ran out of memory"),
    "hashes": ("build", [MORE], 1, "not the one that the lock"),
    "a version that is gone": ("build", ["ERROR: No matching distribution found for torch==2"], 1, "no longer on its"),
    "a base that is gone": ("build", ["python:3: failed to resolve source metadata"], 1, "the base image"),
    "no training": ("smoke-test", ["ModuleNotFoundError: No module named 'peft'"], 1, "built but does not train"),
    "no training, as a line of the Dockerfile": (
        "build",
        ["BROKEN train dreambooth: no", 'process "/bin/sh -c python -m sdtune.training.smoke" did not complete'],
        1,
        "built but does not train",
    ),
    "no sdtune": ("smoke-test", ["No module named sdtune"], 1, "the image has no sdtune in it"),
    "anything else": ("build", ["what is this"], 2, r"build step 0 .* failed: step exited with non-zero status: 2"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_failed_step_is_explained_with_its_last_lines(
    case: str, server: BuildServer, builder: VertexBuilder, spec: ImageSpec
) -> None:
    step, lines, code, reason = FAILURES[case]
    server.script(step, Script([*(f"line {number}" for number in range(40)), *lines], code))
    news = run(builder, spec)
    end = end_of(news)
    assert end.reason.startswith(f"step {step} failed (exit code {code}): ")
    assert re.search(reason, end.reason), end.reason
    assert end.last_lines[-1] == lines[-1]
    assert len(end.last_lines) == 30
    assert StepChange(step, "failed", seconds=0.0).state in [i.state for i in news if isinstance(i, StepChange)]
    # What fails leaves the image that was there as it was.
    assert not server.registry.tags(spec.address)


@pytest.mark.parametrize(
    ("push", "reason"),
    [
        (
            Push("PUSH_NOT_AUTHORIZED", ['denied: Permission "artifactregistry.repositories.uploadArtifacts" denied']),
            rf"step push failed: {ACCOUNT} may not push images.* gcloud artifacts repositories add-iam-policy-binding "
            rf"sdtune --location=us-central1 .*--member=serviceAccount:{ACCOUNT} --role=roles/artifactregistry.writer",
        ),
        (Push("PUSH_FAILED", ["something"]), "step push failed: Build failed during push"),
    ],
)
def test_a_failed_push_is_explained(
    push: Push, reason: str, server: BuildServer, builder: VertexBuilder, spec: ImageSpec
) -> None:
    server.push = push
    news = run(builder, spec, BuildSettings(service_account=ACCOUNT))
    assert re.search(reason, end_of(news).reason), end_of(news).reason
    assert news[-2] == StepChange("push", "failed", news[-2].seconds)  # type: ignore[union-attr]


def test_a_source_that_cannot_be_fetched_is_explained(
    server: BuildServer, builder: VertexBuilder, spec: ImageSpec
) -> None:
    news = list(builder.follow(builder.start(builder.render(spec, SETTINGS)).job_id))
    end = end_of(news)
    # The build named no account, so the one that it acted as is asked for.
    assert end.reason == (
        f"step source failed: {DEFAULT_ACCOUNT} may not read the source; allow it with: gcloud storage buckets "
        f"add-iam-policy-binding gs://{BUCKET} --member=serviceAccount:{DEFAULT_ACCOUNT} "
        "--role=roles/storage.objectViewer"
    )
    assert end.last_lines[0].startswith("Fetching storage object")


def test_time_and_cancelling_are_explained(server: BuildServer, builder: VertexBuilder, spec: ImageSpec) -> None:
    hold = threading.Event()
    server.script("build", Script(hold=hold))
    name = _start(builder, spec)
    builder.cancel(name)
    assert end_of(list(builder.follow(name))).reason == "it was cancelled."
    with pytest.raises(JobError, match=r"has ended already \(cancelled\)"):
        builder.cancel(name)
    with server.lock:
        server.builds[name.rpartition("/")[2]].status = types.Build.Status.TIMEOUT
    assert end_of(list(builder.follow(name))).reason == "it did not end within 2h; give it more: --timeout 4h"
    with pytest.raises(JobError, match="there is no build 123 in us-central1 of project my-project"):
        builder.cancel(builder.full_name("123"))


# --- what can go wrong on the way there ------------------------------------------------------------------------------


def test_an_answer_that_was_lost_makes_no_second_build(
    server: BuildServer, spec: ImageSpec, builder: VertexBuilder
) -> None:
    pauses: list[float] = []
    builder = VertexBuilder(PLACEMENT, pauses.append)
    server.cut("POST", "/builds$")
    assert builder.start(builder.render(spec, SETTINGS)).number == next(iter(server.builds))
    assert len(server.builds) == 1
    server.fail("POST", "/builds$", 503, times=2)
    assert builder.start(builder.render(spec, SETTINGS)).number == list(server.builds)[1]
    assert len(server.builds) == 2
    assert all(least <= pause <= 2 * least for least, pause in zip((0.5, 0.5, 1.0), pauses, strict=True))


REFUSALS = {
    (403, "Permission 'cloudbuild.builds.create' denied on resource 'projects/my-project'"): (
        ProjectError,
        "roles/cloudbuild.builds.editor",
    ),
    (400, f"caller does not have permission to act as service account {ACCOUNT}"): (
        JobError,
        f"gcloud iam service-accounts add-iam-policy-binding {ACCOUNT}",
    ),
    (400, "due to quota restrictions, cannot run builds in this region"): (JobError, "--machine-type E2_STANDARD_2"),
    (403, "Cloud Build API has not been used in project 123 before or it is disabled. cloudbuild.googleapis.com"): (
        ProjectError,
        "gcloud services enable cloudbuild.googleapis.com --project=my-project",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_say_what_mends_them(
    case: tuple[int, str], server: BuildServer, builder: VertexBuilder, spec: ImageSpec
) -> None:
    error, advice = REFUSALS[case]
    server.fail("POST", "/builds$", case[0], message=case[1])
    with pytest.raises(error) as raised:
        builder.start(builder.render(spec, BuildSettings(service_account=ACCOUNT)))
    assert str(raised.value).startswith("the build cannot be started: ")
    assert advice in str(raised.value)
    assert len([request for request in server.requests if request.method == "POST"]) == 1


def test_a_source_is_uploaded_once_and_whole(
    server: BuildServer, storage: BucketServer, builder: VertexBuilder, spec: ImageSpec
) -> None:
    staged = builder.stage(spec)
    assert staged
    reports: list[tuple[int, int]] = []
    staged.run(lambda done, total: reports.append((done, total)))
    name = f"sdtune/builds/{spec.source.digest}.tgz"
    assert staged.address == f"gs://{BUCKET}/{name}"
    assert storage.buckets[BUCKET][name].data == spec.source.pack()
    assert reports == [(0, staged.size), (staged.size, staged.size)]
    generation = storage.buckets[BUCKET][name].generation
    assert builder.stage(spec) is None
    # Another run that was as quick has put the same there.
    staged.run(lambda done, total: None)
    assert storage.buckets[BUCKET][name].generation == generation


def test_what_is_not_set_up_is_told_with_the_command(
    server: BuildServer, storage: BucketServer, builder: VertexBuilder, spec: ImageSpec
) -> None:
    storage.buckets.clear()
    with pytest.raises(ProjectError, match=rf"there is no bucket {BUCKET}.*sdtune setup"):
        builder.stage(spec)
    server.registry.repositories.clear()
    for ask in (lambda: builder.find(spec), lambda: list(builder.images())):
        with pytest.raises(ProjectError, match=r"there is no repository sdtune in us-central1.*sdtune setup"):
            ask()


# --- images that are there -------------------------------------------------------------------------------------------


def test_an_image_is_found_by_its_source_and_gets_the_tags_back(
    server: BuildServer, builder: VertexBuilder, spec: ImageSpec, tmp_path: Path
) -> None:
    assert builder.find(spec) is None
    first = end_of(run(builder, spec)).digest
    changed = tmp_path / "Dockerfile"
    changed.write_text("FROM another")
    other = ImageSpec("diffusers", "train", spec.registry, Source((("containers/diffusers/Dockerfile", changed),)))
    second = end_of(run(builder, other)).digest
    assert server.registry.tags(spec.address)["latest"] == second != first

    found = builder.find(spec)
    assert found
    assert (found.digest, found.uri) == (first, f"{spec.address}@{first}")
    assert builder.point_tags(spec, first) == (spec.version, "latest")
    assert builder.point_tags(spec, first) == ()
    tags = server.registry.tags(spec.address)
    assert (tags["latest"], tags[spec.version], tags[other.tag]) == (first, first, second)
    del tags
    for image in server.registry.images.values():
        image["tags"] = [tag for tag in image["tags"] if tag != "latest"]
    server.cut("POST", "/tags$")
    assert builder.point_tags(spec, first) == ("latest",)
    assert builder.point_tags(spec, first) == ()


def test_images_are_listed_newest_first(server: BuildServer, builder: VertexBuilder, spec: ImageSpec) -> None:
    now = datetime.now(UTC)
    for age in range(600):
        server.registry.image(
            f"{spec.address}", now - timedelta(days=age), tags=[f"0.1.0-{age:012x}", "latest"][: 1 + (not age)]
        )
    server.registry.image(f"{spec.registry}/mine", now)
    found = list(builder.images())
    assert [image.tags[0] for image in found] == [f"0.1.0-{age:012x}" for age in range(600)]
    assert (found[0].version, found[0].size, found[0].name) == ("0.1.0", 3_000_000_000, "sdtune-diffusers")
    assert found[0].uploaded == now
