"""Tokens are planted wherever people keep them; then every request, log and file is searched for them.

What a token is for gets it, in the header that is for it, and nothing else does.
"""

from __future__ import annotations

import base64
import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import requests
from google.auth.credentials import AnonymousCredentials
from google.auth.transport.requests import AuthorizedSession
from PIL import Image

from sdtune.backends.connections import make_timely
from sdtune.jobs.images import CONTAINERS, OF_THE_TRAINER, find_source
from sdtune.methods.images import SUFFIXES
from sdtune.training.__main__ import main
from sdtune.training.kohya import process
from sdtune.training.trainers import kohya
from tests.conftest import BASE_MODEL, ROOT
from tests.kohya.test_trainer import FAKE, arguments
from tests.security.command_line import sdtune
from tests.security.wire import holds, holds_in_files, recorded
from tests.servers.build import BuildServer
from tests.servers.cloud import Cloud, loopback_cloud
from tests.servers.hub import TOKEN, Hub, running_hub
from tests.servers.storage import StorageServer

SDTUNE = str(Path(sys.executable).with_name("sdtune"))
SECRETS = {
    "HF_TOKEN": TOKEN,
    "the Hub's cache": "hf_PlantedInTheCacheOfTheHub0001",
    "WANDB_API_KEY": "5ec12e7a" * 5,
    "netrc": "PlantedInNetrc0002",
    "a remote of git": "PlantedInTheRemoteOfGit0003",
    "another variable": "PlantedInAnotherVariable0004",
    "a key of Google's": "PlantedPrivateKeyOfGoogle0005",
    "Secret Manager": "hf_PlantedInSecretManager0006",
    "W&B's key there": "a1b2c3d4" * 5,
}
"""By where each is kept."""


@dataclass
class Laptop:
    """A home folder as people have it. said: everything that commands printed; logged: that jobs did."""

    home: Path
    environment: dict[str, str]
    said: list[str] = field(default_factory=list)
    logged: list[str] = field(default_factory=list)

    @property
    def work(self) -> Path:
        return self.home / "work"

    def run(self, *words: Any, code: int = 0, **more: str) -> str:
        """A command, as a process of its own, with all that the user's environment has."""
        ran = subprocess.run(
            [SDTUNE, *map(str, words)], capture_output=True, text=True, cwd=self.work, timeout=500,
            env={**self.environment, **more},
        )  # fmt: skip
        self.said.append(ran.stdout + ran.stderr)
        assert ran.returncode == code, ran.stdout + ran.stderr
        return ran.stdout

    def found(self, *apart: str) -> dict[str, list[str]]:
        """Where secrets are that should be nowhere. apart: files that the user put them into."""
        kept = {".netrc", ".cache/huggingface/token", "work/.git/config", ".config/key.json", *apart}
        files = {name: found for name, found in holds_in_files(self.home, SECRETS).items() if name not in kept}
        texts = [*self.said, *self.logged]
        printed = {f"output {number}": holds(text.encode(), SECRETS) for number, text in enumerate(texts)}
        return files | {name: found for name, found in printed.items() if found}


@pytest.fixture
def laptop(tmp_path: Path) -> Laptop:
    home = tmp_path / "home"
    kept = {
        ".netrc": f"machine api.wandb.ai login user password {SECRETS['netrc']}\n"
        f"default login user password {SECRETS['netrc']}\n",
        ".cache/huggingface/token": SECRETS["the Hub's cache"],
        "work/.git/config": f'[remote "origin"]\n\turl = https://user:{SECRETS["a remote of git"]}@github.com/a/b\n',
        "work/.git/HEAD": "ref: refs/heads/main\n",
        ".config/key.json": json.dumps({"type": "service_account", "private_key": SECRETS["a key of Google's"]}),
    }
    for name, text in kept.items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(text)
        (home / name).chmod(0o600)
    (home / "tmp").mkdir()
    clean = {name: os.environ[name] for name in ("PATH", "LANG", "OMP_NUM_THREADS") if name in os.environ}
    environment = {
        **clean, "HOME": str(home), "TMPDIR": str(home / "tmp"), "HF_TOKEN": SECRETS["HF_TOKEN"],
        "WANDB_API_KEY": SECRETS["WANDB_API_KEY"], "MY_PRIVATE_NOTE": SECRETS["another variable"],
        "GOOGLE_APPLICATION_CREDENTIALS": str(home / ".config" / "key.json"), "WANDB_ERROR_REPORTING": "false",
    }  # fmt: skip
    return Laptop(home, environment)


@pytest.fixture
def wire() -> Iterator[dict[int, list[bytearray]]]:
    with recorded() as found:
        yield found


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running_hub() as hub:
        yield hub


@pytest.fixture
def secret_manager() -> Iterator[str]:
    """Its address. It has two secrets, by the names that jobs give."""
    kept = {"hf-token": SECRETS["Secret Manager"], "wandb-key": SECRETS["W&B's key there"]}

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *words: object) -> None: ...

        def do_GET(self) -> None:
            name = self.path.split("/secrets/")[1].partition("/")[0]
            self.send_response(200)
            self.end_headers()
            data = base64.b64encode(kept[name].encode()).decode()
            self.wfile.write(json.dumps({"payload": {"data": data}}).encode())

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture
def cloud(laptop: Laptop, wire: object) -> Iterator[Cloud[StorageServer]]:
    """Vertex AI, Cloud Logging, Cloud Storage and Cloud Build, which the laptop finds."""
    with loopback_cloud(StorageServer) as found:
        found.vertex.projects["my-project"] = "123456789012"
        found.vertex.nfs("10.0.0.2", "/vol1")
        found.storage.put("my-bucket", "there/already", b"")
        write = found.logging.write

        def written(job_id: str, text: str, **more: Any) -> str:
            laptop.logged.append(f"{text} {more}")
            return write(job_id, text, **more)

        found.logging.write = written  # type: ignore[method-assign]
        laptop.environment |= {**found.environment, "CLOUDSDK_CONFIG": str(laptop.home / "gcloud")}
        yield found


def port(address: str) -> int:
    return int(address.rstrip("/").rpartition(":")[2])


def sent(wire: dict[int, list[bytearray]], *, hub: Hub | None = None) -> list[str]:
    """The secrets in what servers were sent; what the Hub was sent is read without the header that is for it."""
    found: list[str] = []
    for at, connections in wire.items():
        for data in map(bytes, connections):
            if hub and at == port(hub.address):
                data = re.sub(rb"(?im)^authorization: bearer \S+\r\n", b"", data)
            found += [f"port {at}: {name}" for name in holds(data, SECRETS)]
    return found


def in_the_cloud(cloud: Cloud[StorageServer]) -> list[str]:
    """The secrets in everything that the cloud keeps: objects and jobs."""
    found: list[str] = []
    for bucket, objects in cloud.storage.buckets.items():
        for name, stored in objects.items():
            found += [f"{bucket}/{name}: {one}" for one in holds(name.encode() + b"\n" + stored.data, SECRETS)]
    for job in cloud.vertex.jobs.values():
        found += [f"job {job.id}: {one}" for one in holds(str(job.message).encode(), SECRETS)]
    return found


TINY = (
    "--base-model", str(BASE_MODEL), "--instance-prompt", "a photo of sks cat", "--max-train-steps", "2", "--rank", "2",
    "--num-samples", "1", "--sample-steps", "1", "--resolution", "64",
)  # fmt: skip


def test_the_search_finds_what_it_is_for(tmp_path: Path) -> None:
    secret = SECRETS["netrc"]
    for shift in range(5):
        hidden = (b"x" * shift + secret.encode(), base64.b64encode(b"x" * shift + secret.encode() + b"y"))
        for data in (*hidden, *map(gzip.compress, hidden)):
            assert holds(b"before " + data, SECRETS) == ["netrc"] or data[:2] == b"\x1f\x8b"
            assert holds(data, SECRETS) == ["netrc"]
    (tmp_path / "a").write_bytes(gzip.compress(secret.encode()))
    assert holds_in_files(tmp_path, SECRETS) == {"a": ["netrc"]}
    assert not holds(b"nothing here", SECRETS)


def test_a_run_on_this_machine(
    laptop: Laptop, hub: Hub, wire: dict[int, list[bytearray]], pictures: Callable[..., Path]
) -> None:
    around = {"HF_ENDPOINT": hub.address, "HF_HUB_DISABLE_XET": "1", "WANDB_MODE": "offline"}
    words = ["train", "dreambooth-lora", *TINY, "--dataset", pictures(), "--push-to-hub", "--wandb-project", "cats"]
    laptop.run(*words, "--dry-run", "--output", "out", **around)
    laptop.run(*words, "--json", "--output", "out", **around)
    names = {path.suffix for path in (laptop.work / "out").rglob("*") if path.is_file()}
    assert {".safetensors", ".yaml", ".md", ".png", ".wandb"} <= names  # the search has something to find it in
    assert list((laptop.work / "out" / "logs").glob("events.out.tfevents*"))
    assert not laptop.found()
    # The one token that the Hub needs came to it, in its header.
    assert any(f"authorization: bearer {TOKEN}".encode() in bytes(one).lower() for one in wire[port(hub.address)])
    assert not sent(wire, hub=hub)
    for repository in hub.repositories.values():
        for name, data in repository.files.items():
            assert not holds(name.encode() + b"\n" + data, SECRETS), name


def test_a_job_reads_its_tokens_in_the_container_alone(
    laptop: Laptop, cloud: Cloud[StorageServer], hub: Hub, secret_manager: str, wire: dict[int, list[bytearray]],
    pictures: Callable[..., Path],
) -> None:  # fmt: skip
    hub.fail["create"] = 401  # what the second job says when its token is refused is searched too
    of_jobs: Any = cloud.vertex.around.environment
    of_jobs |= {
        "CLOUDSDK_API_ENDPOINT_OVERRIDES_SECRETMANAGER": secret_manager, "HF_ENDPOINT": hub.address,
        "HF_HUB_DISABLE_XET": "1", "HOME": str(laptop.home / "tmp"), "WANDB_ERROR_REPORTING": "false",
    }  # fmt: skip
    words = [
        "train", "dreambooth-lora", *TINY, "--dataset", pictures(), "--wandb-project", "cats", "--env",
        "WANDB_MODE=offline", "--hf-token-secret", "hf-token", "--gpu", "l4", "--labels", "team=art",
        "--wandb-key-secret", "projects/my-project/secrets/wandb-key",
    ]  # fmt: skip
    laptop.run(*words, "--dry-run", "--output", "gs://my-bucket/out")
    laptop.run(*words, "--output", "gs://my-bucket/out")
    assert any(name.endswith(".wandb") for name in cloud.storage.buckets["my-bucket"])
    laptop.run(*words, "--push-to-hub", "--output", "gs://my-bucket/refused", code=3)
    assert "the Hub refuses the token" in laptop.said[-1]
    # It was the token of the container that the Hub was shown, and not one of the laptop's.
    shown = b"".join(map(bytes, wire[port(hub.address)]))
    assert f"Bearer {SECRETS['Secret Manager']}".encode() in shown
    assert TOKEN.encode() not in shown
    laptop.run("jobs", "list", "--json")
    laptop.run("jobs", "logs", "--json", code=3)  # the newest is the one that failed
    laptop.run("jobs", "show", "--json")
    (job, _) = cloud.vertex.jobs.values()
    names = {variable.name: variable.value for variable in job.message.job_spec.worker_pool_specs[0].container_spec.env}
    assert names["HF_TOKEN_SECRET"] == "projects/my-project/secrets/hf-token/versions/latest"
    assert names["WANDB_API_KEY_SECRET"] == "projects/my-project/secrets/wandb-key/versions/latest"
    assert not {"HF_TOKEN", "WANDB_API_KEY"} & set(names)
    assert not sent(wire, hub=hub)
    assert not in_the_cloud(cloud)
    assert laptop.logged
    assert not laptop.found()


def test_searches_copies_and_builds(
    laptop: Laptop, cloud: Cloud[StorageServer], wire: dict[int, list[bytearray]], pictures: Callable[..., Path]
) -> None:
    network = ["--network", "projects/123456789012/global/networks/vpc", "--nfs", "10.0.0.2:/vol1=/mnt/nfs/models"]
    cloud.storage.put("my-bucket", "out/recipe.yaml", b"method: dreambooth-lora\n")
    cloud.storage.put("my-bucket", "out/a.safetensors", b"x")
    laptop.run(
        "hpo", "dreambooth-lora", *TINY, "--dataset", pictures(), "--output", "gs://my-bucket/study", "--gpu", "l4",
        "--hf-token-secret", "hf-token", "--tune", "learning_rate=1e-5:1e-3:log", "--max-trials", "1", "--detach",
        "--parallel-trials", "1",
    )  # fmt: skip
    laptop.run("hpo", "status", "--json")
    laptop.run("sync-nfs", "--from", "gs://my-bucket/out", *network)
    assert (cloud.vertex.nfs("10.0.0.2", "/vol1") / "dreambooth-lora" / "a.safetensors").is_file()
    with BuildServer(cloud.storage) as server:
        server.services.enabled["my-project"] = {"cloudbuild.googleapis.com", "artifactregistry.googleapis.com"}
        server.registry.repository("my-project", "us-central1", "sdtune")
        cloud.storage.buckets.setdefault("my-project-sdtune", {})
        laptop.run("build", "diffusers", "--dry-run", **server.environment)
        laptop.run("build", "diffusers", "--detach", "--force", **server.environment)
        assert server.builds
    assert any(name.endswith(".tgz") for objects in cloud.storage.buckets.values() for name in objects)
    assert not sent(wire)
    assert not in_the_cloud(cloud)
    assert not laptop.found()


# --- what is typed where everybody reads it ---------------------------------------------------------------------------


LOOKS_LIKE_ONE = [
    ("HF_TOKEN", "x"), ("MY_API_KEY", "x"), ("DB_PASSWORD", "x"), ("AWS_SECRET_ACCESS_KEY", "x"), ("NETRC", "/x"),
    ("NOTE", "hf_abcdefghijklmnop"), ("NOTE", "ghp_abcdefghijklmnop"), ("NOTE", "github_pat_abcdefghijkl"),
    ("NOTE", "glpat-abcdefghijklmnop"), ("NOTE", "5ec12e7a" * 5), ("NOTE", "ya29.abcdefghijklmnop"),
    ("NOTE", "AIza" + "a" * 35), ("NOTE", "sk-proj-abcdefghijklmnop"), ("NOTE", "before hf_abcdefghijklmnop after"),
    ("NOTE", "https://user:password@host/x"), ("NOTE", "-----BEGIN PRIVATE KEY-----\nMII"),
    ("NOTE", "-----BEGIN RSA PRIVATE KEY-----"), ("NOTE", "wandb_v1_abcdefghijklmnop"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), LOOKS_LIKE_ONE)
@pytest.mark.parametrize("how", ["typed", "variable", "recipe", "sdtune.yaml"])
def test_a_token_as_a_variable_of_a_job_is_refused_and_not_repeated(
    name: str, value: str, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["train", "dreambooth-lora", "--instance-prompt", "x", "--project", "my-project", "--dry-run", "--dataset"]
    words += ["gs://my-bucket/data", "--output", "gs://my-bucket/out"]
    if how == "typed":
        words += ["--env", f"{name}={value}"]
    elif how == "variable":
        monkeypatch.setenv("SDTUNE_ENV", f"{name}={value}".splitlines()[0])
    else:
        file = tmp_path / ("sdtune.yaml" if how == "sdtune.yaml" else "recipe.yaml")
        file.write_text(json.dumps({"env": {name: value}}))
        words += ["--config", str(file)] if how == "recipe" else []
    ended = sdtune(*words)
    assert ended.code == 2, ended.said
    assert f"{name} looks like a secret" in ended.said
    assert len(value) < 4 or value.splitlines()[0] not in ended.said


@pytest.mark.parametrize("pair", ["hf-token=x", "note=hf_abcdefghijklmnop", "api_key=x", "note=ghp_abcdefghijklmno"])
def test_a_token_as_a_label_is_refused(pair: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["train", "dreambooth-lora", "--instance-prompt", "x", "--project", "my-project", "--dry-run", "--dataset"]
    ended = sdtune(*words, "gs://my-bucket/data", "--output", "gs://my-bucket/out", "--labels", pair)
    assert ended.code == 2
    assert "looks like a secret" in ended.said


@pytest.mark.parametrize("option", ["--hf-token-secret", "--wandb-key-secret"])
def test_a_token_in_place_of_its_name_is_refused_and_not_repeated(
    option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["train", "dreambooth-lora", "--instance-prompt", "x", "--project", "my-project", "--dry-run", "--dataset"]
    for token in ("hf_abcdefghijklmnop", "5ec12e7a" * 5):
        ended = sdtune(*words, "gs://my-bucket/data", "--output", "gs://my-bucket/out", option, token)
        assert ended.code == 2
        assert "looks like the token itself" in ended.said
        assert token not in ended.said


@pytest.mark.parametrize(("file", "text"), [
    ("sdtune.yaml", "hf_token: hf_abcdefghijklmnop\n"), ("sdtune.yaml", "wandb_api_key: 5ec12e7a\n"),
    ("recipe.yaml", "hf_token: hf_abcdefghijklmnop\n"), ("recipe.yaml", "token: hf_abcdefghijklmnop\n"),
])  # fmt: skip
def test_a_token_in_a_file_of_settings_is_refused_and_not_repeated(
    file: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(file).write_text(text)
    words = ["train", "dreambooth-lora", "--instance-prompt", "x", "--project", "my-project", "--dry-run", "--dataset"]
    more = ["--config", file] if file == "recipe.yaml" else []
    ended = sdtune(*words, "gs://my-bucket/data", "--output", "gs://my-bucket/out", *more)
    assert ended.code == 2
    assert text.partition(":")[0] in ended.said
    assert text.partition(": ")[2].strip() not in ended.said


# --- what a build uploads ---------------------------------------------------------------------------------------------


STRANGE = [
    "containers/diffusers/.env", "containers/diffusers/credentials.json", "containers/diffusers/id_rsa",
    "containers/kohya/notes.txt", "containers/key.json", "examples/base-model/token.txt", ".netrc", "sdtune.yaml",
    "examples/base-model/unet/key.json", "examples/base-model/my.safetensors", "examples/base-model/unet/.env",
]  # fmt: skip


def test_a_build_uploads_what_is_known_by_its_name_and_nothing_else(tmp_path: Path) -> None:
    """Of a checkout with secrets and strange files in every folder."""
    for name in ("containers", "examples/base-model"):
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True)
    before = {container: find_source(container, tmp_path) for container in CONTAINERS}
    secret = SECRETS["another variable"]
    for name in STRANGE:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(secret)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "requirements.txt").write_text(secret)
    for name in ("containers/diffusers/workbench.txt", "examples/base-model/unet/config.json"):
        (tmp_path / name).unlink()
        (tmp_path / name).symlink_to(outside / "requirements.txt")
    (tmp_path / "examples" / "base-model" / "vae2").symlink_to(outside)
    for container in CONTAINERS:
        after = find_source(container, tmp_path)
        assert not holds(after.pack(), SECRETS)
        left_out = {name for name, _ in before[container].files} - {name for name, _ in after.files}
        assert {name for name, _ in after.files} <= {name for name, _ in before[container].files}
        assert all(name.endswith(("workbench.txt", "unet/config.json")) for name in left_out)


def test_of_the_package_only_code_and_its_configurations_are_uploaded(tmp_path: Path) -> None:
    """The package itself is not copied, so that its files are asked for by name."""
    for name in ("key.json", "configs/key.json", "configs/sd1/unet/key.json", ".env", "components/a.pem", "a.py.bak",
                 "configs/sd1/secrets.yaml", "a.ipynb", "x.safetensors", "configs/clip/other.gz"):  # fmt: skip
        assert not OF_THE_TRAINER.fullmatch(name), name
    names = [name for name, _ in find_source("kohya").files]
    assert len(names) == len(set(names))
    kinds = {Path(name).suffix for name in names if name.startswith("src/")}
    assert kinds == {".py", ".json", ".gz"}
    assert not [name for name in names if Path(name).suffix in SUFFIXES]


# --- single places ----------------------------------------------------------------------------------------------------


def test_what_sd_scripts_is_given_has_no_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its arguments, and the files of the folder that is thrown away at the end."""
    kept = tmp_path / "kept"

    @contextmanager
    def folder(prefix: str = "") -> Iterator[str]:
        kept.mkdir()
        yield str(kept)

    monkeypatch.setattr(kohya.tempfile, "TemporaryDirectory", folder)
    for name in ("HF_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(name, SECRETS[name])
    monkeypatch.setenv("MY_PRIVATE_NOTE", SECRETS["another variable"])
    monkeypatch.setenv("SDTUNE_SD_SCRIPTS", str(FAKE))
    monkeypatch.setenv("SDTUNE_SD_SCRIPTS_PYTHON", sys.executable)
    monkeypatch.setenv("FAKE", "learn")
    started: list[tuple[list[str], dict[str, str]]] = []
    popen = process.subprocess.Popen

    def start(words: list[str], **named: Any) -> Any:
        started.append((words, named["env"]))
        return popen(words, **named)

    monkeypatch.setattr(process.subprocess, "Popen", start)
    dataset = tmp_path / "data" / "3_sks cat"
    dataset.mkdir(parents=True)
    Image.new("RGB", (96, 64), "red").save(dataset / "a.png")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        assert main(arguments(tmp_path, tmp_path / "data")) == 0
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert {path.name for path in kept.iterdir()} >= {"setup.json", "prompts.json", "dataset", "output"}
    ((words, environment),) = started
    assert not holds("\n".join(words).encode(), SECRETS)
    assert not {"HF_TOKEN", "WANDB_API_KEY"} & set(environment)
    assert not holds_in_files(tmp_path, SECRETS)


@pytest.mark.parametrize(
    "url", ["https://storage.googleapis.com/", "https://oauth2.googleapis.com/token", "http://[::1]/"]
)
def test_no_password_of_netrc_takes_the_place_of_a_token(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "netrc").write_text(f"default login user password {SECRETS['netrc']}\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    asked = requests.Request("GET", url)
    assert "Basic" in requests.Session().prepare_request(asked).headers["Authorization"]
    session = make_timely(AuthorizedSession(AnonymousCredentials()))
    for one in (session, session._auth_request_session):
        prepared = one.prepare_request(asked)
        assert "Authorization" not in prepared.headers
        # Sent on to another host it takes no token with it, and finds no password there.
        prepared.headers["Authorization"] = "Bearer x"
        answer = requests.Response()
        answer.request = requests.Request("GET", "https://example.com/").prepare()
        one.rebuild_auth(prepared, answer)
        assert "Authorization" not in prepared.headers
