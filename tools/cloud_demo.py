"""The whole way of a job through Google Cloud, without an account: every server is one of this machine's.

`make cloud-demo` runs it: sdtune uploads photographs of a cat, has the job checked, follows it to its end, lists it
and copies the LoRA to a share. The servers speak Google's protocols and run the job's command as a process.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

from google.cloud.storage import Client
from rich.console import Console

from tests.servers.cloud import loopback_cloud
from tests.servers.emulator import Emulator

ROOT = Path(__file__).parent.parent
OUT = ROOT / "out" / "cloud-demo"
BUCKET = "my-bucket"
SHARE = ["--network", "projects/123456789012/global/networks/vpc", "--nfs", "10.0.0.2:/vol1=/mnt/nfs/models"]
COMMANDS = [
    ["machines", "--gpu", "l4"],
    ["train", "dreambooth-lora", "--base-model", "examples/base-model", "--dataset", "examples/datasets/images",
     "--instance-prompt", "a photo of sks cat", "--config", "examples/recipes/dreambooth-lora.yaml",
     "--output", f"gs://{BUCKET}/cat", "--gpu", "l4", "--timeout", "1h"],
    ["jobs", "list"],
    ["sync-nfs", "--from", f"gs://{BUCKET}/cat", *SHARE],
    ["jobs", "logs", "--tail", "5"],
]  # fmt: skip


def main() -> int:
    """Run the commands as a user would type them; the result lies in out/cloud-demo then."""
    out = Console(highlight=False, soft_wrap=True)
    with loopback_cloud(Emulator) as cloud:
        cloud.vertex.projects["my-project"] = "123456789012"
        share = cloud.vertex.nfs("10.0.0.2", "/vol1")
        os.environ.update(cloud.environment)
        Client(project="my-project").create_bucket(BUCKET)
        for words in COMMANDS:
            out.print(f"\n[bold green]$[/] [bold]{shlex.join(['sdtune', *words])}[/]\n")
            ran = subprocess.run([Path(sys.executable).with_name("sdtune"), *words], cwd=ROOT)
            if ran.returncode:
                return ran.returncode
        fetch()
        out.print("\n[bold]On the share[/]")
        for file in sorted(path for path in share.rglob("*") if path.is_file()):
            out.print(f"  {file.relative_to(share)}  [dim]{file.stat().st_size:,} bytes[/]")
    out.print(f"\n[bold]In the bucket[/], copied to {OUT.relative_to(ROOT)}")
    for file in sorted(path for path in OUT.rglob("*") if path.is_file()):
        out.print(f"  {file.relative_to(OUT)}  [dim]{file.stat().st_size:,} bytes[/]")
    return 0


def fetch() -> None:
    """Copy what the job left in the bucket, with Google's own client."""
    for blob in Client(project="my-project").list_blobs(BUCKET, prefix="cat/"):
        target = OUT / blob.name.removeprefix("cat/")
        target.parent.mkdir(parents=True, exist_ok=True)
        blob.download_to_filename(target)


if __name__ == "__main__":
    sys.exit(main())
