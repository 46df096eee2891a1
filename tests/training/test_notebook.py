"""Notebooks run by the container's entry point, in real kernels: what is left, what is said, and how it ends."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sdtune import events
from sdtune.training import notebook_cells, notebook_output
from sdtune.training.__main__ import main
from sdtune.training.destinations import RUN_FOLDER
from sdtune.training.notebook_cells import redrawn
from sdtune.training.notebook_lines import LONGEST_LINE, SECONDS_BETWEEN_STATES, Lines, say
from tests.conftest import BASE_MODEL
from tests.notebooks import printed, read, write
from tests.servers.storage import StorageServer

RED = "from PIL import Image\nImage.new('RGB', (16, 8), 'red')"
WAIT = "import time\nprint('begun', flush=True)\ntime.sleep(600)"


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("SDTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv(RUN_FOLDER, "")
    monkeypatch.delenv(RUN_FOLDER)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, list[str]]]:
    """Writes a notebook and runs it into ``out``: the exit code, and the lines that were said."""

    def run(*cells: Any, output: str = "", words: tuple[str, ...] = (), **parameters: Any) -> tuple[int, list[str]]:
        file = write(tmp_path / "here" / "train.ipynb", *cells)
        given = [f"--parameters={json.dumps(parameters)}"] if parameters else []
        # With it in their environment, kernels do not hear what the programs print that they start.
        os.environ.pop("PYTEST_CURRENT_TEST", None)
        code = main(["notebook", f"--notebook={file}", f"--output={output or tmp_path / 'out'}", *given, *words])
        return code, capsys.readouterr().out.splitlines()

    return run


def told(lines: list[str], kind: type[events.Event]) -> list[Any]:
    return [event for line in lines if isinstance(event := events.parse(line), kind)]


def said(lines: list[str]) -> list[str]:
    """What is no event."""
    return [line for line in lines if events.parse(line) is None]


# --- what is left, and what is said -----------------------------------------------------------------------------------


def test_a_notebook_runs_with_its_parameters(run: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "beside.txt").write_text("found beside it")
    text = 'a "quoted"\nline 🐈 $(HOME)'
    code, lines = run(
        ("steps = 1\nprompt = 'x'", "parameters"),
        "print(steps, prompt)",
        "import sys\nprint('aside', file=sys.stderr)\nopen('beside.txt').read()",
        steps=7,
        prompt=text,
    )
    assert code == 0, lines
    left = read(tmp_path / "out" / "train.ipynb")
    assert [cell.metadata.get("tags") for cell in left.cells[:2]] == [["parameters"], ["injected-parameters"]]
    assert printed(left.cells[2]) == f"7 {text}\n"
    assert printed(left.cells[3]) == "aside\n'found beside it'"
    assert [cell.execution_count for cell in left.cells] == [1, 2, 3, 4]
    assert left.metadata.language_info.name == "python"
    assert left.metadata.sdtune.finished is True
    assert left.metadata.sdtune.parameters == {"steps": 7, "prompt": text}
    assert said(lines) == [
        "[1] steps = 1", "[2] steps = 7", "[3] print(steps, prompt)", '7 a "quoted"', "line 🐈 $(HOME)",
        "[4] import sys", "aside", "'found beside it'",
    ]  # fmt: skip
    assert [(event.done, event.total) for event in told(lines, events.Progress)] == [(n, 4) for n in range(5)]
    assert told(lines, events.Executed)[0].cells == 4
    assert told(lines, events.Artifact) == [events.Artifact("notebook", str(tmp_path / "out" / "train.ipynb"))]


def test_pictures_lie_beside_the_notebook_as_png(run: Callable[..., Any], tmp_path: Path) -> None:
    code, lines = run(
        RED,
        "import io\nfrom IPython.display import HTML, SVG, Image as Shown, display\nfile = io.BytesIO()\n"
        "Image.new('RGB', (8, 8), 'blue').save(file, 'JPEG')\ndisplay(Shown(file.getvalue()))\n"
        "display(SVG('<svg xmlns=\"http://www.w3.org/2000/svg\"/>'))\nprint('text')",
        "import base64\nfile = io.BytesIO()\nImage.new('RGB', (4, 4), 'lime').save(file, 'WEBP', lossless=True)\n"
        "HTML(f'<p>loss <img src=\"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}\"></p>')",
        "handle = display(Image.new('RGB', (2, 2), 'red'), display_id=True)\nprint('between')\n"
        "handle.update(Image.new('RGB', (2, 2), 'white'))",
        "handle.update(Image.new('RGB', (2, 2), 'black'))",
        "class Broken:\n    def _repr_mimebundle_(self, **more): return {'image/png': 'bm8gcGljdHVyZQ=='}\nBroken()",
    )
    assert code == 0, lines
    files = tmp_path / "out" / "train_files"
    assert sorted(path.name for path in files.iterdir()) == [
        "cell-01-output-1.png", "cell-02-output-1.png", "cell-02-output-2.svg", "cell-03-output-1.png",
        "cell-04-output-1.png",
    ]  # fmt: skip

    def first_pixel(name: str) -> Any:
        with Image.open(files / name) as picture:
            assert picture.format == "PNG"
            return picture.convert("RGB").getpixel((0, 0))

    assert first_pixel("cell-01-output-1.png") == (255, 0, 0)
    assert first_pixel("cell-02-output-1.png")[2] > 240
    assert first_pixel("cell-03-output-1.png") == (0, 255, 0)
    assert first_pixel("cell-04-output-1.png") == (0, 0, 0)  # as the display was last, by a later cell
    assert [event.kind for event in told(lines, events.Artifact)] == ["picture"] * 5 + ["notebook"]
    assert lines.count("(a picture)") == 5
    (warning,) = told(lines, events.Note)
    assert "train_files/cell-06-output-1.png: this picture cannot be read" in warning.text


def test_an_earlier_runs_pictures_make_room_and_nothing_else(run: Callable[..., Any], tmp_path: Path) -> None:
    assert run(RED, RED)[0] == 0
    files = tmp_path / "out" / "train_files"
    (files / "mine.png").write_bytes(b"x")
    (tmp_path / "out" / "other.ipynb").write_text("{}")
    assert run("1 + 1", RED)[0] == 0
    assert sorted(path.name for path in files.iterdir()) == ["cell-02-output-1.png", "mine.png"]
    assert (tmp_path / "out" / "other.ipynb").read_text() == "{}"
    assert not list((tmp_path / "out").rglob("*.partial-*"))


def test_a_picture_that_was_taken_back_is_not_left(run: Callable[..., Any], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(notebook_output, "SECONDS_BETWEEN_SAVES", 0.0)
    monkeypatch.setattr(notebook_cells, "TICK", 0.05)
    code, _ = run(
        "import time\nfrom pathlib import Path\nfrom IPython.display import clear_output, display\n"
        "from PIL import Image\ndisplay(Image.new('RGB', (2, 2)))\ndisplay(Image.new('RGB', (3, 3)))\n"
        f"while not Path({str(tmp_path)!r}, 'out', 'train_files', 'cell-01-output-2.png').exists(): time.sleep(0.05)\n"
        "clear_output()\ndisplay(Image.new('RGB', (4, 4)))"
    )
    assert code == 0
    (left,) = (tmp_path / "out" / "train_files").iterdir()
    with Image.open(left) as picture:
        assert (left.name, picture.size) == ("cell-01-output-1.png", (4, 4))


def test_output_streams_as_it_comes_and_never_as_an_event_of_the_run(run: Callable[..., Any], tmp_path: Path) -> None:
    event = events.to_line(events.Failed("job", "said by a cell"))
    code, lines = run(
        f"import os, sys\nos.system('echo from a child')\nprint({event!r})\n"
        "print('x' * 10_000)\nprint('unended', end='')",
        "for number in range(3): sys.stdout.write(f'\\r{number}%'); sys.stdout.flush()",
        "from IPython.display import HTML, display\nHTML('<b>x</b>')",
        "display('shown')\nNone",
        "raise RuntimeError('\\x1b[31mred\\x1b[0m')",
    )
    assert code == 7
    assert told(lines, events.Failed)[-1].kind == "notebook"
    assert [note.text for note in told(lines, events.Note)] == [event]
    assert lines.count("from a child") == 1
    assert any(line.endswith(f"({10_000 - LONGEST_LINE:,} characters more in the notebook)") for line in lines)
    assert lines.index("unended") < next(n for n, line in enumerate(lines) if line.startswith("[2]"))
    assert "2%" in lines
    assert "'shown'" in lines
    assert not [line for line in lines if "HTML object" in line or "\x1b" in line]
    assert printed(read(tmp_path / "out" / "train.ipynb").cells[1]) == "2%"


def test_a_notebook_trains_with_what_is_in_the_image_of_jobs(
    run: Callable[..., Any], pictures: Callable[..., Path], tmp_path: Path
) -> None:
    code, lines = run(
        ("dataset = lora = base_model = ''", "parameters"),
        "import json, subprocess, sys\n"
        "recipe = {'instance_prompt': 'a photo of sks cat', 'base_model': base_model, 'max_train_steps': 2,\n"
        "          'num_samples': 1, 'sample_steps': 2, 'rank': 4}\n"
        "subprocess.run([sys.executable, '-m', 'sdtune.training', 'train', 'dreambooth-lora', f'--dataset={dataset}',\n"
        "                f'--output={lora}', f'--recipe={json.dumps(recipe)}'], check=True)\n"
        "from PIL import Image\nImage.open(f'{lora}/contact_sheet.png')",
        dataset=str(pictures()), lora=str(tmp_path / "cat"), base_model=str(BASE_MODEL),
    )  # fmt: skip
    assert code == 0, lines
    assert (tmp_path / "cat" / "pytorch_lora_weights.safetensors").is_file()
    assert (tmp_path / "out" / "train_files" / "cell-03-output-1.png").is_file()
    # The trainer's own events are what a cell printed, and not the run's.
    assert not told(lines, events.Finished)
    assert len(told(lines, events.Executed)) == 1


# --- how it ends ------------------------------------------------------------------------------------------------------


def test_a_cell_that_fails_is_named_and_what_was_before_it_is_left(run: Callable[..., Any], tmp_path: Path) -> None:
    code, lines = run(
        "print('before')",
        RED,
        "# set up\ndef f():\n    x = 1\n    raise ValueError('of the cell')\n\nf()",
        "print('never')",
    )
    assert code == 7
    (failed,) = told(lines, events.Failed)
    assert failed.kind == "notebook"
    assert failed.text == (
        "cell [3], 'def f():', failed: ValueError: of the cell; at line 4: raise ValueError('of the cell')\n"
        f"The notebook as far as it came: {tmp_path / 'out' / 'train.ipynb'}"
    )
    assert "ValueError: of the cell" in said(lines)
    left = read(tmp_path / "out" / "train.ipynb")
    assert printed(left.cells[0]) == "before\n"
    assert left.cells[2].outputs[-1].ename == "ValueError"
    assert (left.cells[3].outputs, left.cells[3].execution_count) == ([], None)
    assert left.metadata.sdtune.finished is False
    assert (tmp_path / "out" / "train_files" / "cell-02-output-1.png").is_file()


def test_tags_that_jupyter_knows_are_heeded(run: Callable[..., Any], tmp_path: Path) -> None:
    code, lines = run(("1 / 0", "raises-exception"), ("print('no')", "skip-execution"), "print('on')")
    assert code == 0, lines
    assert [printed(cell) for cell in read(tmp_path / "out" / "train.ipynb").cells] == ["ZeroDivisionError", "", "on\n"]
    assert told(lines, events.Executed)[0].cells == 2


@pytest.mark.parametrize(("call", "code"), [("sys.exit()", 0), ("sys.exit(0)", 0), ("sys.exit(3)", 7)])
def test_a_notebook_may_end_itself(run: Callable[..., Any], call: str, code: int, tmp_path: Path) -> None:
    ended, lines = run(f"import sys\n{call}", "print('never')")
    assert ended == code, lines
    assert "never" not in lines
    assert read(tmp_path / "out" / "train.ipynb").metadata.sdtune.finished is (code == 0)


def test_a_kernel_that_dies_is_told_with_its_signal(run: Callable[..., Any], tmp_path: Path) -> None:
    code, lines = run("print('alive')", "import os\nprint('last words', flush=True)\nos.kill(os.getpid(), 9)", "1")
    assert code == 7
    text = told(lines, events.Failed)[0].text
    assert "cell [2], 'import os': its kernel was killed (signal 9), most often because the machine ran out of" in text
    left = read(tmp_path / "out" / "train.ipynb")
    assert printed(left.cells[0]) == "alive\n"
    assert left.cells[1].outputs[-1].ename == "DeadKernelError"


def test_a_cell_that_takes_too_long_is_told_with_its_line(run: Callable[..., Any], tmp_path: Path) -> None:
    code, lines = run("print('before')", "import time\ntime.sleep(600)", words=("--cell-timeout=3",))
    assert code == 7
    text = told(lines, events.Failed)[0].text
    assert (
        "cell [2], 'import time', took longer than the 3 seconds of --cell-timeout; at line 2: time.sleep(600)" in text
    )
    assert read(tmp_path / "out" / "train.ipynb").cells[1].outputs[-1].ename == "KeyboardInterrupt"


def test_a_cell_that_will_not_be_interrupted_is_ended_all_the_same(run: Callable[..., Any], tmp_path: Path) -> None:
    stubborn = "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nprint('begun')\ntime.sleep(600)"
    code, _ = run(stubborn, words=("--cell-timeout=3",))
    assert code == 7
    left = read(tmp_path / "out" / "train.ipynb")
    assert left.cells[0].outputs[-1].ename == "TimeoutError"
    assert printed(left.cells[0]).startswith("begun\n")


def test_input_is_nobodys_to_give(run: Callable[..., Any]) -> None:
    code, lines = run("input('name?')")
    assert code == 7
    assert "StdinNotImplementedError" in told(lines, events.Failed)[0].text


def test_kernels_are_found_and_one_that_does_not_start_is_told(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    argv = [sys.executable, "-c", "raise SystemExit('no ipykernel here')"]
    spec = {"argv": argv, "display_name": "x", "language": "python"}
    folder = tmp_path / "jupyter" / "kernels" / "broken"
    folder.mkdir(parents=True)
    (folder / "kernel.json").write_text(json.dumps(spec))
    code, lines = run("1", words=("--kernel=broken",))
    assert code == 3
    assert "kernel: broken does not start" in told(lines, events.Failed)[0].text
    assert "no ipykernel here" in lines
    code, lines = run("1", words=("--kernel=nothing",))
    assert code == 2
    assert "kernel: found 'nothing', wanted one that is here: broken, python3" in told(lines, events.Failed)[0].text
    file = write(tmp_path / "conda.ipynb", "print(1)", kernel="conda-env-mine-py")
    assert main(["notebook", f"--notebook={file}", f"--output={tmp_path / 'out'}"]) == 0
    assert "the notebook's kernel 'conda-env-mine-py' is not here; python3 runs it" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--notebook=nothing.ipynb", "--output=out"], "nothing.ipynb cannot be read"),
        (["--notebook={file}"], "output: missing"),
        (["--notebook={file}", "--output=out", "--parameters={{"], "--parameters is not JSON"),
        (["--notebook={file}", "--output={file}"], "cannot be written"),
        (["--notebook={file}", "--output=out", "--steps=3"], "argument '--steps=3': notebook has --notebook"),
    ],
)
def test_what_cannot_be_run_is_told(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = write(tmp_path / "x.ipynb", "1")
    assert main(["notebook", *(word.format(file=file) for word in words)]) in (2, 5)
    assert said in told(capsys.readouterr().out.splitlines(), events.Failed)[0].text


def test_without_nbclient_it_is_said_what_to_install(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "sdtune.training.notebook_cells")
    monkeypatch.delattr("sdtune.training.notebook_cells")
    monkeypatch.setitem(sys.modules, "nbclient", None)
    code, lines = run("1")
    assert code == 3
    assert "pip install 'sdtune[notebook]'" in told(lines, events.Failed)[0].text


# --- in a bucket, and stopped -----------------------------------------------------------------------------------------


def stored(storage: StorageServer, name: str) -> Any:
    found = storage.buckets["lab"].get(name)
    return read(found.data) if found else None


def test_from_a_bucket_into_a_bucket(
    storage: StorageServer, run: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "x.ipynb", RED, "print(lr)", "1 / 0")
    storage.put("lab", "in/train.ipynb", file.read_bytes())
    storage.put("lab", "runs/train_files/cell-09-output-1.png", b"of an earlier run")
    storage.put("lab", "runs/train_files/mine.png", b"not of a run")
    storage.fail("POST", "uploadType", 503, times=1)
    words = ["notebook", "--notebook=gs://lab/in/train.ipynb", "--output=gs://lab/runs", '--parameters={"lr": 1e-4}']
    assert main(words) == 7
    lines = capsys.readouterr().out.splitlines()
    text = told(lines, events.Failed)[0].text
    assert "ZeroDivisionError" in text
    assert text.endswith("The notebook as far as it came: gs://lab/runs/train.ipynb")
    left = stored(storage, "runs/train.ipynb")
    assert printed(left.cells[2]) == "0.0001\n"
    assert sorted(name for name in storage.buckets["lab"] if name.startswith("runs/")) == [
        "runs/train.ipynb", "runs/train_files/cell-02-output-1.png", "runs/train_files/mine.png",
    ]  # fmt: skip
    with Image.open(io.BytesIO(storage.buckets["lab"]["runs/train_files/cell-02-output-1.png"].data)) as picture:
        assert picture.size == (16, 8)
    assert "gs://lab/runs/train_files/cell-02-output-1.png" in [event.path for event in told(lines, events.Artifact)]
    assert not list((tmp_path / "cache" / "runs").iterdir())

    words[1] = "--notebook=gs://lab/in/nothing.ipynb"
    assert main(words) == 2
    assert "gs://lab/in/nothing.ipynb is not there" in capsys.readouterr().out


def test_a_result_that_cannot_be_uploaded_is_kept(
    storage: StorageServer, run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.put("lab", "x", b"")
    storage.fail("POST", "uploadType", 403, times=1000)
    code, lines = run("print('hours of work')", output="gs://lab/runs")
    assert code == 6, lines
    (kept,) = (tmp_path / "cache" / "runs").rglob("train.ipynb")
    assert printed(read(kept).cells[0]) == "hours of work\n"
    code, lines = run("1 / 0", output="gs://lab/runs")
    assert code == 7
    assert any("could not be uploaded" in note.text for note in told(lines, events.Note))


SAVES_OFTEN = (
    "import sys\nfrom sdtune.training import notebook_cells, notebook_output\n"
    "notebook_output.SECONDS_BETWEEN_SAVES, notebook_cells.TICK = 0.7, 0.1\n"
    "from sdtune.training.__main__ import main\nsys.exit(main(sys.argv[1:]))"
)


def start(notebook: Path, output: str, script: str = "") -> subprocess.Popen[str]:
    command = ["-c", script] if script else ["-m", "sdtune.training"]
    return subprocess.Popen(
        [sys.executable, *command, "notebook", f"--notebook={notebook}", f"--output={output}"],
        stdout=subprocess.PIPE, text=True,
        # A shell's background jobs ignore Ctrl-C, and so would what they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip


def until(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdout
    for found in process.stdout:
        if found.rstrip("\n") == line:
            return
    raise AssertionError(f"it ended without saying {line!r}")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_what_is_there_and_ends_the_kernel(
    number: signal.Signals, storage: StorageServer, tmp_path: Path
) -> None:
    storage.put("lab", "x", b"")
    file = write(tmp_path / "train.ipynb", f"{RED}", "import os\nprint('kernel', os.getpid())", WAIT, "print('never')")
    process = start(file, "gs://lab/runs")
    until(process, "begun")
    process.send_signal(number)
    assert process.stdout
    rest = process.stdout.read()
    assert process.wait(60) == 128 + number, rest  # as a training, which its place starts again after SIGTERM
    left = stored(storage, "runs/train.ipynb")
    assert printed(left.cells[2]).startswith("begun\n")
    assert left.cells[2].outputs[-1].ename == "KeyboardInterrupt"
    assert left.cells[3].outputs == []
    assert left.metadata.sdtune.finished is False
    assert "runs/train_files/cell-01-output-1.png" in storage.buckets["lab"]
    assert not is_running(int(printed(left.cells[1]).split()[1]))


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_job_that_is_killed_leaves_what_was_saved_last(storage: StorageServer, tmp_path: Path) -> None:
    storage.put("lab", "x", b"")
    file = write(
        tmp_path / "train.ipynb", RED,
        "import os, time\nprint('kernel', os.getpid())\nfor number in range(40):\n    print('step', number)\n"
        "    time.sleep(0.05)\ntime.sleep(600)",
    )  # fmt: skip
    process = start(file, "gs://lab/runs", SAVES_OFTEN)
    try:
        until(process, "step 0")
        deadline = time.monotonic() + 120
        while not ((left := stored(storage, "runs/train.ipynb")) and "step 39\n" in printed(left.cells[1])):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait(60)
    left = stored(storage, "runs/train.ipynb")
    # Also what was said last before a long silence. Joined as it came, not a line of its own for every step.
    assert len(left.cells[1].outputs) == 1
    assert "runs/train_files/cell-01-output-1.png" in storage.buckets["lab"]
    # Its kernel sees that it is alone.
    deadline = time.monotonic() + 120
    while is_running(int(printed(left.cells[1]).split()[1])):
        assert time.monotonic() < deadline
        time.sleep(0.1)


# --- lines ------------------------------------------------------------------------------------------------------------


class Heard:
    def __init__(self) -> None:
        self.lines: list[str] = []
        self.now = 0.0
        self.listener = Lines(self.lines.append, lambda: self.now)

    def prints(self, text: str, name: str = "stdout") -> None:
        self.listener.take("stream", {"name": name, "text": text})


def test_lines_are_whole_and_streams_apart() -> None:
    heard = Heard()
    heard.prints("a")
    heard.prints("x\n", "stderr")
    heard.prints("b\nc")
    assert heard.lines == ["x", "ab"]
    heard.listener.end()
    assert heard.lines == ["x", "ab", "c"]


def test_of_a_bar_that_is_redrawn_there_is_a_state_now_and_then_and_its_last() -> None:
    heard = Heard()
    for number in range(129):
        heard.prints(f"\r{number:3}/128|" + "#" * number)
        heard.now += SECONDS_BETWEEN_STATES / 64
    heard.prints("\r\ndone\r\n")
    assert [line.partition("/")[0] for line in heard.lines] == ["  0", " 64", "128", "128", "done"]
    heard = Heard()
    heard.prints("10%\r")
    heard.prints("90%\r")
    heard.listener.end()
    assert heard.lines == ["10%", "90%"]


def test_a_display_that_is_updated_says_its_state_now_and_then() -> None:
    heard = Heard()
    for number in range(129):
        heard.listener.take("update_display_data", {"data": {"text/plain": f"step {number}", "text/html": "<b>"}})
        heard.now += SECONDS_BETWEEN_STATES / 64
    heard.listener.take("update_display_data", {"data": {"text/plain": "<Figure size 1x1>", "image/png": "..."}})
    assert heard.lines == ["step 0", "step 64", "step 128"]


def test_of_a_display_only_what_is_new_is_said() -> None:
    heard = Heard()
    for figure in ("1", "1", "2"):
        heard.listener.take("update_display_data", {"data": {"text/plain": f"cat: running\nstep {figure}"}})
        heard.now += SECONDS_BETWEEN_STATES
    assert heard.lines == ["cat: running", "step 1", "step 2"]


def test_redrawn_text_is_kept_as_a_terminal_shows_it() -> None:
    assert redrawn("a\n1%\r2%\r3%\nb\r\nc") == "a\n3%\nb\nc"
    assert redrawn("1%\r") == "1%\r"
    assert redrawn(redrawn("1%\r") + "2%\n") == "2%\n"
    assert redrawn("plain\n") == "plain\n"


def test_what_a_cell_says_is_no_event(capsys: pytest.CaptureFixture[str]) -> None:
    say(events.to_line(events.Finished(1.0, 1, 0.1, 0.1)))
    (line,) = capsys.readouterr().out.splitlines()
    assert isinstance(events.parse(line), events.Note)


def test_the_environment_is_the_kernels(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", "/somewhere")
    assert "/somewhere" in run("import os\nprint(os.environ['HF_HOME'])")[1]
    assert os.environ["HF_HOME"] == "/somewhere"
