"""Bombs, links and names that lead out of their folder: refused, the file named, and nothing outside is touched."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from sdtune.commands.notebook import gather_parameters
from sdtune.errors import DatasetError, RecipeError
from sdtune.methods.base_models import locate_base_model
from sdtune.methods.layouts import Layout, check
from sdtune.methods.ledger import Ledger
from sdtune.methods.places import in_bucket, is_bucket
from sdtune.training import nfs
from sdtune.training.components.fetch import folder_here
from sdtune.training.results import remove_result
from tests.conftest import ROOT
from tests.security.command_line import ends_well
from tests.security.hostile import png, tiff, write_bombs
from tests.security.profiles import examples
from tests.servers.storage import StorageServer

opened: list[str] = []
"""Every file that this process has opened while ``watched`` runs."""
_watching = threading.Event()


def _on_audit(event: str, args: tuple[Any, ...]) -> None:
    if event == "open" and _watching.is_set() and isinstance(args[0], str | bytes):
        opened.append(args[0].decode() if isinstance(args[0], bytes) else args[0])


@contextmanager
def watched() -> Iterator[list[str]]:
    """Python tells every file that it opens, whoever asks for it."""
    opened.clear()
    _watching.set()
    try:
        yield opened
    finally:
        _watching.clear()


@pytest.fixture(scope="module", autouse=True)
def audit() -> None:
    # A hook cannot be taken away again, so that this one looks only when it is told to.
    sys.addaudithook(_on_audit)


def about(ledger: Ledger, path: str) -> str:
    return " ".join(found.message for found in ledger.errors if found.path == path)


# --- bombs ------------------------------------------------------------------------------------------------------------


LOOK = """
import json, re, sys
from pathlib import Path
from sdtune.methods.layouts import Layout, check

def peak():
    # Of this program alone: getrusage would tell that of the process which started it.
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

before = peak()
ledger = check(Path(sys.argv[1]), Layout.IMAGES)
print(json.dumps({"mb": (peak() - before) // 1024, "errors": {found.path: found.message for found in ledger.errors}}))
"""


def test_a_bomb_is_named_and_costs_no_memory(tmp_path: Path, pictures: Callable[..., Path]) -> None:
    folder = pictures()
    names = write_bombs(folder)
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LOOK, str(folder)],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    told = json.loads(ran.stdout)
    assert sorted(told["errors"]) == names
    assert all("megapixels" in text or "damaged" in text for text in told["errors"].values()), told["errors"]
    assert told["mb"] < 100, told["mb"]  # 8 when written; the largest of them would take 40 GB, a note 300 MB


def test_bombs_are_told_by_the_command(pictures: Callable[..., Path]) -> None:
    folder = pictures()
    (folder / "big.png").write_bytes(png(100_000, 100_000))
    ended = ends_well(["validate", "dreambooth-lora", str(folder)])
    assert ended.code == 2
    assert "big.png" in ended.said
    assert "at most 178 megapixels" in ended.said


def test_twenty_thousand_pages_are_not_counted(tmp_path: Path) -> None:
    (tmp_path / "a.tiff").write_bytes(tiff(64, 64, pages=20_000))
    assert [found.code for found in check(tmp_path, Layout.IMAGES).warnings] == ["animated"]


def test_a_table_that_repeats_itself_fills_no_memory(
    pictures: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet as written

    from sdtune.methods import metadata, parquet

    folder = pictures()
    # Ten million rows of one caption: 40 MB as a table, some kB as a file.
    rows = 10_000
    column = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * rows, pyarrow.int32()), ["x" * 100_000])
    names = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * rows, pyarrow.int32()), ["0.png"])
    written.write_table(pyarrow.table({"file_name": names, "text": column}), folder / "metadata.parquet")
    assert (folder / "metadata.parquet").stat().st_size < 100_000
    monkeypatch.setattr(parquet, "MOST_TEXT", 10_000_000)
    found = about(check(folder, Layout.CAPTIONED), "metadata.parquet")
    assert found == "has more than 10,000,000 letters of text."
    monkeypatch.setattr(parquet, "MOST_ROWS", 5_000)
    assert "has 10,000 rows; a list of captions has 5,000 at most" in about(
        check(folder, Layout.CAPTIONED), "metadata.parquet"
    )
    (folder / "metadata.parquet").unlink()
    monkeypatch.setattr(metadata, "LARGEST_METADATA", 2**20)
    for name in ("metadata.jsonl", "metadata.csv"):
        with (folder / name).open("wb") as stream:
            stream.truncate(2**20 + 1)
        assert "a list of captions has 1 at most" in about(check(folder, Layout.CAPTIONED), name)
        (folder / name).unlink()


@pytest.mark.parametrize("depth", [10, 30])
def test_settings_that_hold_themselves_are_refused(depth: int, tmp_path: Path) -> None:
    """Each line names the one before ten times: 30 lines stand for 10^30 values."""
    lines = ["a0: &a0 [x, x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, depth))]
    recipe = tmp_path / "laughs.yaml"
    recipe.write_text("\n".join([*lines, f"instance_prompt: *a{depth - 1}"]))
    words = ["train", "dreambooth-lora", "--dataset", str(tmp_path), "--output", str(tmp_path / "o"), "--config"]
    ended = ends_well([*words, str(recipe)])
    assert ended.code == 2
    assert "laughs.yaml holds more than 100,000 values" in ended.said
    with pytest.raises(RecipeError, match="holds more than 100,000 values"):
        gather_parameters(files=[str(recipe)])
    recipe.write_text("seed: &a [*a]\n")
    with pytest.raises(RecipeError, match="or one that holds itself"):
        gather_parameters(files=[str(recipe)])
    assert "or one that holds itself" in ends_well([*words, str(recipe)]).said


# --- links and names --------------------------------------------------------------------------------------------------


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A folder beside the dataset, which nobody named."""
    folder = tmp_path / "private"
    folder.mkdir()
    (folder / "secret.png").write_bytes(png(64, 64))
    (folder / "secret.txt").write_text("my password")
    (folder / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "my password"}\n')
    return folder


@pytest.mark.parametrize("layout", [Layout.IMAGES, Layout.CAPTIONED])
@pytest.mark.parametrize(
    ("name", "target"),
    [("b.png", "secret.png"), ("0.txt", "secret.txt"), ("metadata.jsonl", "metadata.jsonl"), ("more", "")],
)
@pytest.mark.parametrize("how", ["absolute", "relative", "by another link"])
def test_links_that_lead_out_are_named_and_not_opened(
    layout: Layout, name: str, target: str, how: str, secret: Path, pictures: Callable[..., Path]
) -> None:
    folder = pictures()
    place = secret / target if how == "absolute" else Path("..") / secret.name / target
    if how == "by another link":
        (folder / ".hidden").symlink_to(place)
        place = Path(".hidden")
    (folder / name).symlink_to(place)
    with watched() as files:
        ledger = check(folder, layout)
    assert "leads out of the dataset" in about(ledger, name)
    assert not [file for file in files if "private" in str(Path(file).resolve())]
    ended = ends_well(["validate", "dreambooth-lora", str(folder)])
    assert name in ended.said
    assert "my password" not in ended.said


NAMES = [
    "../private/secret.png", "a/../../private/secret.png", "./../private/secret.png", "{secret}/secret.png",
    "..\\private\\secret.png", "C:\\secret.png", "\\\\host\\secret.png", "file://{secret}/secret.png",
    "https://example.com/a.png", "gs://bucket/a.png", "~/secret.png", "/proc/self/environ", "/dev/zero",
    "0.png\u0000/../../private/secret.png", "..", ".", "//", "%2e%2e/private/secret.png", "..\u2215private",
]  # fmt: skip


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("name", NAMES)
def test_file_names_that_lead_out_are_refused_and_not_opened(
    kind: str, name: str, secret: Path, pictures: Callable[..., Path]
) -> None:
    folder = pictures()
    named = name.format(secret=secret)
    write_metadata(folder, kind, [{"file_name": named, "text": "a cat"}, {"file_name": "0.png", "text": "a cat"}])
    with watched() as files:
        ledger = check(folder, Layout.CAPTIONED)
    assert about(ledger, f"metadata.{kind}"), ledger.findings
    assert not [file for file in files if "private" in str(Path(file.replace("\0", "")).resolve())]
    assert [example.image for example in ledger.examples] in (["0.png"], [])
    with pytest.raises(DatasetError, match=f"metadata.{kind}: (line|row) \\d"):
        ledger.raise_for_errors()


def write_metadata(folder: Path, kind: str, rows: list[dict[str, Any]]) -> None:
    """metadata.jsonl, .csv or .parquet."""
    file = folder / f"metadata.{kind}"
    if kind == "jsonl":
        file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    elif kind == "csv":
        quoted = [[value.replace('"', '""') for value in row.values()] for row in rows]
        lines = [",".join(f'"{value}"' for value in row) for row in quoted]
        file.write_text("\n".join(["file_name,text", *lines]), encoding="utf-8")
    else:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), file)


def test_pictures_and_paths_inside_a_table_are_not_read(secret: Path, pictures: Callable[..., Path]) -> None:
    """Hugging Face's tables may hold the pictures themselves, with the path that each had."""
    folder = pictures()
    image = {"bytes": png(100_000, 100_000), "path": str(secret / "secret.png")}
    write_metadata(folder, "parquet", [{"file_name": "0.png", "text": "a cat", "image": image}])
    with watched() as files:
        ledger = check(folder, Layout.CAPTIONED)
    assert ledger.ok
    assert [example.image for example in ledger.examples] == ["0.png"]
    assert not [file for file in files if "private" in file]


# --- buckets ----------------------------------------------------------------------------------------------------------


OBJECTS = ["../../evil.png", "a/../../evil.png", "/etc/evil.png", "./evil.png", "a//evil.png", "a/./evil.png", ".."]


@pytest.mark.parametrize("name", OBJECTS)
def test_objects_whose_names_lead_out_of_the_copy(
    name: str, storage: StorageServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "deep" / "er" / "cache"
    monkeypatch.setenv("SDTUNE_CACHE", str(cache))
    monkeypatch.delenv("SDTUNE_FETCHED", raising=False)
    storage.put("my-bucket", "data/0.png", png(64, 64))
    storage.put("my-bucket", f"data/{name}", png(64, 64))
    with pytest.raises(DatasetError, match="which is no path in a folder; rename it") as caught:
        folder_here("gs://my-bucket/data", "dataset")
    assert repr(name) in str(caught.value)
    ended = ends_well(["validate", "dreambooth-lora", "gs://my-bucket/data"])
    assert "evil" not in " ".join(str(path) for path in tmp_path.rglob("*"))
    # What the container would refuse is refused here, before a machine is paid for.
    assert ended.code == 2
    assert f"  {name}: has" in ended.said


def test_models_whose_names_lead_out_of_the_share(storage: StorageServer, tmp_path: Path) -> None:
    share = tmp_path / "deep" / "share"
    share.mkdir(parents=True)
    for name in ("model_index.json", "unet/../../../../evil.safetensors", "recipe.yaml"):
        storage.put("my-bucket", f"out/{name}", b"method: dreambooth\n")
    with pytest.raises(DatasetError, match=r"evil.safetensors', which is no path in a folder"):
        nfs.sync("gs://my-bucket/out", "dreambooth", [str(share)])
    assert not list(tmp_path.rglob("evil*"))


PLACES = st.text(st.sampled_from("ab-._/\\.$(){}~%:?#*[]\n\t\x00 é🐈\x7f\u2028A1"), max_size=30)


@examples(300)
@given(st.sampled_from(["gs://", "gs:///gcs/", "/gcs/", "gs://my-bucket/", "/gcs/my-bucket/"]), PLACES)
def test_a_place_in_a_bucket_is_one_or_is_refused(start: str, rest: str) -> None:
    try:
        address = in_bucket(start + rest)
    except RecipeError as error:
        assert repr(start + rest) in str(error)  # noqa: PT017
        return
    assert address is not None
    bucket, _, path = address.removeprefix("gs://").partition("/")
    assert is_bucket(bucket)
    assert not {"", ".", ".."} & set(path.split("/")) or not path
    assert path.isprintable()
    assert "$(" not in path
    assert in_bucket(address) == address


@pytest.mark.parametrize(
    "name",
    ["ab", "a" * 64, "My-Bucket", "my..bucket", "my.-bucket", "-bucket", "bucket-", "10.0.0.1", "goog-x", "my-google-x",
     "a b", "a\n", "bücket", "b/../c", "x" * 223, "a%2fb"],
)  # fmt: skip
@pytest.mark.parametrize("option", ["--output", "--dataset", "--base-model", "--bucket", "--class-data-dir"])
def test_names_of_buckets_are_looked_at_before_any_call(
    name: str, option: str, storage: StorageServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    given_all = {
        "--project": "my-project", "--dataset": "gs://my-bucket/data", "--output": "gs://my-bucket/out",
        "--instance-prompt": "x", "--class-prompt": "y", option: f"gs://{name}/x" if option != "--bucket" else name,
    }  # fmt: skip
    words = ["train", "dreambooth-lora", "--with-prior-preservation", "--dry-run"]
    ended = ends_well([*words, *(word for pair in given_all.items() for word in pair)])
    assert ended.code == 2
    assert "is no place in Cloud Storage" in ended.said
    assert not storage.requests


@pytest.mark.parametrize(
    "model",
    ["gs://b/../x", "gs://my-bucket/../x", "gs://my-bucket/a/./b", "gs://my-bucket/$(HOME)", "gs://my-bucket//x"],
)
def test_base_models_in_buckets_are_looked_at_as_all_places_are(model: str) -> None:
    with pytest.raises(RecipeError, match=r"base_model: .*(is no place in Cloud Storage|something else in place of)"):
        locate_base_model(model)


@pytest.mark.parametrize("revision", ["../../../evil", "/etc", "a//b", "a/../b", "a b", "-x", "a\nb", "refs/pr/../1"])
def test_a_revision_names_no_file_elsewhere(revision: str, pictures: Callable[..., Path], tmp_path: Path) -> None:
    """The Hub's client keeps refs/<revision> in its cache."""
    words = ["train", "dreambooth-lora", "--dataset", str(pictures()), "--output", str(tmp_path / "o"), "--dry-run"]
    ended = ends_well([*words, "--instance-prompt", "x", "--base-model", "a/b", f"--revision={revision}"])
    assert ended.code == 2
    assert "wanted a branch, tag or commit" in ended.said


# --- what is written and taken away -----------------------------------------------------------------------------------


def test_names_of_tensors_are_no_names_of_files(tmp_path: Path) -> None:
    tensors = {
        f"unet.{name}.lora_{side}.weight": torch.ones(4, 4)
        for name in ("../../../evil", "/etc/evil", "down_blocks.0/../evil", "a\nb")
        for side in "AB"
    }
    save_file(tensors, tmp_path / "lora.safetensors", {"../../x": "y"})
    for form, to in (("peft", "deep/out"), ("diffusers", "deep/other"), ("kohya", "deep/x.safetensors")):
        out = tmp_path / to
        ended = ends_well(["convert", str(tmp_path / "lora.safetensors"), str(out), "--to", form, "--family", "sd1"])
        assert ended.code in (0, 2)
    assert not [path for path in tmp_path.rglob("*") if "evil" in path.name]
    assert {path.name for path in tmp_path.iterdir()} <= {"lora.safetensors", "deep"}


def test_a_mark_takes_away_nothing_outside_of_its_folder(tmp_path: Path) -> None:
    """.sdtune of a folder that came from elsewhere lists what an earlier run is said to have left."""
    kept = tmp_path / "kept.txt"
    kept.write_text("mine")
    out = tmp_path / "out"
    (out / "inside").mkdir(parents=True)
    (out / "inside" / "old.safetensors").write_text("old")
    (out / "link").symlink_to(tmp_path)
    names = ["../kept.txt", str(kept), "link/kept.txt", "inside/../../kept.txt", "inside/old.safetensors", "a\0b", ""]
    (out / ".sdtune").write_text("\n".join(["The output of a run of sdtune.", *names]))
    remove_result(out)
    assert kept.read_text() == "mine"
    assert not (out / "inside" / "old.safetensors").exists()


def test_the_checkout_has_no_file_that_leads_out_of_it() -> None:
    tops = [ROOT / name for name in ("src", "containers", "examples", "tests", "tools")]
    links = [path for top in tops for path in top.rglob("*") if path.is_symlink()]
    assert not [path for path in links if not path.resolve().is_relative_to(ROOT)]
