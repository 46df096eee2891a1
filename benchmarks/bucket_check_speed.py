"""How long the check of a large dataset in a bucket takes: 10,000 JPEG files of 512 px, without and with captions.

    python benchmarks/bucket_check_speed.py [SECONDS_PER_REQUEST]

The bucket is our own server in a process of its own, which lets 30 ms pass before every answer, as a line to another
country does. Listed are the threads that could be used; the product uses storage.AT_ONCE.
"""

from __future__ import annotations

import io
import os
import random
import subprocess
import sys
import time
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))

from sdtune.methods.ledger import Layout
from tests.servers.storage import StorageServer

PICTURES = 10_000
KINDS = 200
DELAY = 0.03
THREADS = (16, 32, 64)


def main() -> None:
    """Fill the bucket, check it with several numbers of threads, print the seconds."""
    delay = sys.argv[1] if len(sys.argv) > 1 else str(DELAY)
    command = [sys.executable, __file__, "serve", delay]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin
        assert server.stdout
        os.environ["STORAGE_EMULATOR_HOST"] = server.stdout.readline().strip()
        for folder in ("pictures", "captioned"):
            for threads in THREADS:
                _check(f"gs://bucket/{folder}", threads)
        server.stdin.close()


def _check(address: str, threads: int) -> None:
    from sdtune.backends.storage import BucketFolder, open_client
    from sdtune.methods.layouts import check_source

    started, worked = time.perf_counter(), time.process_time()
    folder = BucketFolder(open_client(), address)
    ledger = check_source(folder, Layout.IMAGES, resolution=512, decode=False, workers=threads)
    taken = time.perf_counter() - started
    assert len(ledger.examples) == PICTURES, ledger.findings[:3]
    files = len(ledger.rows)
    print(f"{address}: {files:,} objects, {threads} threads: {taken:.1f} s", end="")
    print(f" ({time.process_time() - worked:.1f} s of them at work)", flush=True)


def serve(delay: float) -> None:
    """Tell the address, and be the bucket until standard input ends."""
    random.seed(0)
    kinds = []
    for _ in range(KINDS):
        noise = Image.effect_noise((64, 64), 60).resize((512, 512), Image.Resampling.BICUBIC).convert("RGB")
        stream = io.BytesIO()
        noise.save(stream, "JPEG", quality=90)
        kinds.append(stream.getvalue())
    with StorageServer(delay) as server:
        for number in range(PICTURES):
            # Bytes after the end of a JPEG are allowed; they make each file one of its own.
            data = kinds[number % KINDS] + number.to_bytes(4, "big")
            server.put("bucket", f"pictures/{number:05}.jpg", data)
            server.put("bucket", f"captioned/{number:05}.jpg", data)
            server.put("bucket", f"captioned/{number:05}.txt", f"picture {number}".encode())
        for stored in server.buckets["bucket"].values():
            stored.resource("")  # a real bucket has its checksums at hand
        print(server.address, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    serve(float(sys.argv[2])) if sys.argv[1:2] == ["serve"] else main()
