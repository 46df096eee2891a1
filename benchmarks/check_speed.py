"""How long the check of a large dataset takes: 10,000 JPEG files of 512 px, made anew in a temporary folder."""

from __future__ import annotations

import random
import tempfile
import time
from pathlib import Path

from PIL import Image

from sdtune.methods.layouts import check
from sdtune.methods.ledger import Layout

PICTURES = 10_000
KINDS = 200


def main() -> None:
    """Make the pictures, check them with and without decoding, print the seconds."""
    random.seed(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        first = []
        for number in range(KINDS):
            noise = Image.effect_noise((64, 64), 60).resize((512, 512), Image.Resampling.BICUBIC).convert("RGB")
            noise.save(folder / f"{number:05}.jpg", quality=90)
            first.append((folder / f"{number:05}.jpg").read_bytes())
        for number in range(KINDS, PICTURES):
            # Bytes after the end of a JPEG are allowed; they make each file one of its own.
            (folder / f"{number:05}.jpg").write_bytes(first[number % KINDS] + number.to_bytes(4, "big"))
        size = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
        for decode in (False, True):
            started = time.perf_counter()
            ledger = check(folder, Layout.IMAGES, resolution=512, decode=decode)
            taken = time.perf_counter() - started
            what = "headers and every pixel" if decode else "headers alone"
            print(f"{len(ledger.examples):,} JPEG files, {size:.0f} MB, {what}: {taken:.1f} s")


if __name__ == "__main__":
    main()
