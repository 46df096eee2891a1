"""How long the command line takes to answer: the shortest of several runs, each a process of its own."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parent.parent
RUNS = 9


def seconds(*words: str) -> float:
    """The shortest of ``RUNS`` runs of ``sdtune`` with these words."""
    command = [str(Path(sys.executable).with_name("sdtune")), *words]
    taken = []
    for _ in range(RUNS):
        started = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        taken.append(time.perf_counter() - started)
    return min(taken)


def main() -> None:
    """Print one row per command."""
    with tempfile.TemporaryDirectory() as folder:
        dataset = Path(folder) / "pictures"
        dataset.mkdir()
        Image.new("RGB", (128, 128)).save(dataset / "picture.png")
        dry_run = [
            "train", "dreambooth-lora", "--base-model", str(ROOT / "examples" / "base-model"),
            "--dataset", str(dataset), "--output", f"{folder}/out",
            "--instance-prompt", "a photo of sks cat", "--dry-run",
        ]  # fmt: skip
        for words in (["--help"], ["--version"], ["train", "--help"], ["train", "dreambooth-lora", "--help"], dry_run):
            shown = "train dreambooth-lora ... --dry-run" if words is dry_run else " ".join(words)
            print(f"sdtune {shown:<40} {1000 * seconds(*words):6.0f} ms")


if __name__ == "__main__":
    main()
