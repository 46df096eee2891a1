"""No shell is asked anywhere: not by the code, not by an image, not by a step of a build."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from sdtune.backends.vertex.build_specs import build_request
from sdtune.jobs.images import CONTAINERS, BuildSettings, plan_image
from sdtune.jobs.placement import Placement
from tests.conftest import ROOT
from tests.containers.dockerfiles import read

SOURCES = sorted(path for folder in ("src", "tools", "benchmarks") for path in (ROOT / folder).rglob("*.py"))
STARTS = {"run", "Popen", "call", "check_call", "check_output", "create_subprocess_exec"}
"""What starts a process and takes a list."""
SHELLS = {
    "os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "asyncio.create_subprocess_shell",
    "commands.getoutput", "pty.spawn", "eval", "exec", "os.execl", "os.execlp", "os.spawnl", "os.spawnlp",
}  # fmt: skip
"""What hands a text to a shell, or runs it."""


def calls(source: str) -> Iterator[tuple[str, ast.Call]]:
    """Every call by its dotted name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def sins(source: str) -> list[str]:
    """The calls of ``source`` that a shell, or Python itself, would read a text of."""
    found = []
    for name, call in calls(source):
        shell = next((word.value for word in call.keywords if word.arg == "shell"), None)
        if shell is not None and not (isinstance(shell, ast.Constant) and shell.value is False):
            found.append(f"line {call.lineno}: {name}(shell=...)")
        if name in SHELLS or name in ("system", "popen", "getoutput"):
            found.append(f"line {call.lineno}: {name}")
        started = call.args[0] if name.startswith("subprocess.") and call.args else None
        # A text, or one put together of pieces: Python would start it as a program, others as a line of a shell.
        if name.rpartition(".")[2] in STARTS and isinstance(started, ast.Constant | ast.JoinedStr | ast.BinOp):
            found.append(f"line {call.lineno}: {name} of a text")
    return found


def test_the_rule_finds_what_it_is_for() -> None:
    for line in (
        "subprocess.run(words, shell=True)", "os.system(line)", "os.popen('ls')", "subprocess.Popen(f'ls {folder}')",
        "subprocess.run('ls ' + folder)", "subprocess.getoutput('ls')", "eval(text)", "subprocess.run(x, shell=shell)",
    ):  # fmt: skip
        assert sins(line), line
    assert not sins("subprocess.run(['ls', folder], check=True)\nmodel.eval()\nre.compile('x')")


def test_no_code_of_ours_asks_a_shell() -> None:
    assert len(SOURCES) > 150
    found = {str(path.relative_to(ROOT)): sins(path.read_text(encoding="utf-8")) for path in SOURCES}
    assert not {name: lines for name, lines in found.items() if lines}


@pytest.mark.parametrize("container", CONTAINERS)
def test_an_image_starts_its_program_without_a_shell_and_not_as_root(container: str) -> None:
    file = read(container)
    # The form of a list; in the other one a shell would be the first process, and swallow SIGTERM.
    assert [one.value for one in file.of("train", "ENTRYPOINT", "CMD")] == ['["python", "-m", "sdtune.training"]']
    assert [one.value for one in file.of("train", "USER")] == ["${RUN_AS}"]
    assert "RUN_AS=1000:1000" in [one.value for one in file.of("train", "ARG")]


@pytest.mark.parametrize("container", CONTAINERS)
def test_nothing_comes_into_an_image_without_a_hash(container: str) -> None:
    file = read(container)
    for stage in file.stages:
        for one in file.of(stage, "RUN"):
            assert not {"curl", "wget", "apt-get", "git", "sh", "bash", "eval"} & set(one.words), one.value
            for step in one.value.split("&&"):
                assert "pip install" not in step or "--require-hashes" in step, step
        for one in file.of(stage, "ADD"):
            assert one.words[0] == "https://github.com/kohya-ss/sd-scripts.git#${SD_SCRIPTS_COMMIT}"
    commit = (ROOT / "containers" / "kohya" / "SD_SCRIPTS_COMMIT").read_text().strip()
    assert len(commit) == 40
    assert container != "kohya" or file.arguments["SD_SCRIPTS_COMMIT"] == commit


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("target", ["train", "workbench"])
def test_the_steps_of_a_build_are_lists_of_words(container: str, target: str) -> None:
    placement = Placement(project="my-project")
    request = build_request(plan_image(container, target, placement), BuildSettings(), placement)  # type: ignore[arg-type]
    for step in request["steps"]:
        assert "script" not in step
        assert step.get("entrypoint", "docker").rpartition("/")[2] in ("docker", "python")
        assert all(isinstance(word, str) for word in step["args"])
        assert not {"sh", "bash", "-c"} & set(step["args"])
