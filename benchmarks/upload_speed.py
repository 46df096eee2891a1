"""How long 1,000 files of 1 MB take into a bucket: sdtune's own upload, and gcloud storage cp, to the same emulator.

    python benchmarks/upload_speed.py [ROUNDS]

Both are whole processes, as a user starts them, one after the other in each round; the fastest round counts. The
bucket lives in the emulator's memory, on this machine: what is compared is the work of the clients, not a network.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.servers.emulator import Emulator

FILES = 1000
BYTES = 1_000_000

OURS = """
import sys
from pathlib import Path
from sdtune.backends.storage import open_client
from sdtune.backends.uploads import plan_upload

folder = Path(sys.argv[1])
upload = plan_upload(folder, sys.argv[2], [file.name for file in folder.iterdir()])
done = upload.run(open_client())
assert done.bytes_sent == upload.size, done
"""


def main() -> None:
    """Make the files, time both by turns, print the best of each and how they compare."""
    if not (gcloud := shutil.which("gcloud")):
        sys.exit("This compares with gcloud storage cp, and there is no gcloud here; install the Google Cloud CLI.")
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    best = {"sdtune": float("inf"), "gcloud storage cp -r": float("inf")}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "pictures"
        folder.mkdir()
        for number in range(FILES):
            (folder / f"{number:04}.bin").write_bytes(os.urandom(BYTES))
        commands: dict[str, Callable[[], list[str]]] = {
            "sdtune": lambda: [sys.executable, "-c", OURS, str(folder), "gs://bucket/datasets"],
            "gcloud storage cp -r": lambda: [gcloud, "storage", "cp", "-r", "--quiet", str(folder), "gs://bucket"],
        }
        for _ in range(rounds):
            for name, command in commands.items():
                taken = _timed(command(), Path(scratch) / "gcloud-config")
                best[name] = min(best[name], taken)
                print(f"{name}: {taken:.2f} s", flush=True)
    ours, theirs = best.values()
    print(f"{FILES:,} x {BYTES / 1e6:.0f} MB, best of {rounds}: sdtune {ours:.2f} s, gcloud {theirs:.2f} s", end="")
    print(f"; {theirs / ours:.2f} times gcloud's speed")


def _timed(command: list[str], config: Path) -> float:
    """Seconds of a command on an empty bucket; all that it uploads is counted afterwards."""
    with Emulator() as emulator:
        from google.cloud.storage import Client

        bucket = Client().create_bucket("bucket")
        environment = os.environ | {
            "CLOUDSDK_CONFIG": str(config),
            "CLOUDSDK_AUTH_DISABLE_CREDENTIALS": "true",
            "CLOUDSDK_CORE_PROJECT": "project",
            "CLOUDSDK_CORE_DISABLE_PROMPTS": "1",
            "CLOUDSDK_API_ENDPOINT_OVERRIDES_STORAGE": f"{emulator.address}/",
        }
        started = time.perf_counter()
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        taken = time.perf_counter() - started
        if ended.returncode:
            sys.exit(f"{command[0]} failed: {ended.stderr[-2000:]}")
        sizes = [blob.size for blob in bucket.list_blobs()]
        assert (len(sizes), sum(sizes)) == (FILES, FILES * BYTES), (len(sizes), sum(sizes))
    return taken


if __name__ == "__main__":
    main()
