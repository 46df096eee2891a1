"""Tokens out of a Secret Manager on the loopback: what is asked, what is put where, what is never shown."""

from __future__ import annotations

import base64
import json
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from sdtune.errors import ProjectError
from sdtune.training import secrets
from sdtune.training.__main__ import main
from sdtune.training.secrets import ENDPOINT, read_secrets

TOKEN = "hf_this_is_never_shown"
NAME = "projects/my-project/secrets/hf-token/versions/latest"


@dataclass
class SecretManager:
    """answers: what is answered next, a status or the payload of a secret; the last one stays."""

    address: str = ""
    answers: list[int | bytes] = field(default_factory=lambda: [TOKEN.encode() + b"\n"])
    requests: list[tuple[str, str | None]] = field(default_factory=list)


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[SecretManager]:
    found = SecretManager()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None: ...

        def do_GET(self) -> None:
            found.requests.append((self.path, self.headers["Authorization"]))
            answer = found.answers.pop(0) if len(found.answers) > 1 else found.answers[0]
            if isinstance(answer, int):
                status, content = answer, {"error": {"code": answer, "message": f"secret {TOKEN}", "status": "X"}}
            else:
                status, content = 200, {"name": NAME, "payload": {"data": base64.b64encode(answer).decode()}}
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(content).encode())

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        found.address = f"http://127.0.0.1:{server.server_port}/"
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        monkeypatch.setenv(ENDPOINT, found.address)
        for name in ("HF_TOKEN", "WANDB_API_KEY"):
            monkeypatch.setenv(name, "")
        monkeypatch.setenv("HF_TOKEN_SECRET", NAME)
        monkeypatch.delenv("WANDB_API_KEY_SECRET", raising=False)
        yield found
        server.shutdown()


def test_a_token_is_put_where_its_library_looks(service: SecretManager, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY_SECRET", NAME.replace("hf-token", "wandb"))
    read_secrets()
    assert (os.environ["HF_TOKEN"], os.environ["WANDB_API_KEY"]) == (TOKEN, TOKEN)
    assert service.requests == [(f"/v1/{NAME}:access", None), (f"/v1/{NAME.replace('hf-token', 'wandb')}:access", None)]


def test_no_secret_asks_nobody(service: SecretManager, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN_SECRET")
    read_secrets()
    assert not service.requests


def test_what_passes_is_asked_again(service: SecretManager) -> None:
    service.answers = [503, 429, TOKEN.encode()]
    read_secrets()
    assert (os.environ["HF_TOKEN"], len(service.requests)) == (TOKEN, 3)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (403, "may not be read; give the account of this run the role roles/secretmanager.secretAccessor: gcloud "
              "secrets add-iam-policy-binding hf-token"),
        (401, "roles/secretmanager.secretAccessor"),
        (404, f"there is no secret {NAME}; make it with: gcloud secrets create hf-token"),
        (400, "cannot be read .BadRequest, 400.; is Secret Manager in reach"),
        (503, "cannot be read .RetryError"),
        (b"", "holds no token; wanted one line of text"),
        (f"{TOKEN}\n{TOKEN}".encode(), "holds no token"),
        (f"{TOKEN} x".encode(), "holds no token"),
        (b"\xff\xfe", "holds no token"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_without_the_token(
    service: SecretManager, answer: int | bytes, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(secrets, "SECONDS_TO_RETRY", 0.1)
    service.answers = [answer]
    with pytest.raises(ProjectError, match=words) as raised:
        read_secrets()
    assert str(raised.value).startswith("HF_TOKEN_SECRET: ")
    assert TOKEN not in str(raised.value)
    assert os.environ["HF_TOKEN"] == ""


@pytest.mark.parametrize(
    "name", ["hf-token", "projects/p/secrets/s", f"{NAME}/../x", f"{NAME}?x=1", f"https://x/{NAME}"]
)
def test_a_name_that_is_none(service: SecretManager, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN_SECRET", name)
    with pytest.raises(ProjectError, match="wanted projects/PROJECT/secrets/NAME/versions/latest"):
        read_secrets()
    assert not service.requests


@pytest.mark.parametrize("address", ["http://example.com/", "http://127.0.0.1.example.com/", "ftp://127.0.0.1/"])
def test_plain_http_is_for_this_machine_alone(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("HF_TOKEN_SECRET", NAME)
    monkeypatch.setenv(ENDPOINT, address)
    with pytest.raises(ProjectError, match="plain http is for this machine alone"):
        read_secrets()


def test_without_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_TOKEN_SECRET", NAME)
    monkeypatch.delenv(ENDPOINT, raising=False)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "none.json"))
    with pytest.raises(ProjectError, match=r"needs Google Cloud credentials.*gcloud auth application-default login"):
        read_secrets()


def test_a_run_reads_it_before_it_tries_accounts(service: SecretManager, capsys: pytest.CaptureFixture[str]) -> None:
    service.answers = [404]
    words = ["--dataset=/nowhere", "--output=/nowhere/out", '--recipe={"instance_prompt": "x", "push_to_hub": true}']
    assert main(["train", "dreambooth-lora", *words]) == 3
    printed = capsys.readouterr()
    assert "there is no secret" in printed.out
    assert TOKEN not in printed.out + printed.err
