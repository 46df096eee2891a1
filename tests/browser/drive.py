"""Opens a notebook in JupyterLab in a headless Chromium, runs all its cells, and says what was to be seen.

    python drive.py NOTEBOOK PICTURES_TO

Runs in an environment of its own, which has JupyterLab and playwright (make browser). Prints one JSON object; the
screenshots are PICTURES_TO/opened.png, running.png and ended.png.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, sync_playwright

MINUTES = 60.0
SEEN = """() => {
    const shown = element => element.naturalWidth > 20 && element.getBoundingClientRect().width > 20;
    const pictures = [...document.querySelectorAll('.jp-OutputArea-output img')].filter(shown);
    return {
        text: [...document.querySelectorAll('.jp-OutputArea-output')].map(one => one.innerText).join('\\n'),
        curves: pictures.filter(one => one.src.startsWith('data:image/svg+xml')).length,
        photographs: pictures.filter(one => one.src.startsWith('data:image/jpeg')).length,
        bars: [...document.querySelectorAll('.jp-OutputArea-output div')].map(one => one.style.width)
            .filter(width => width.endsWith('%')),
        prompts: [...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].map(one => one.innerText),
    };
}"""


def main(notebook: Path, pictures_to: Path) -> None:
    """Drive it, and print what was seen."""
    told: dict[str, Any] = {}
    with lab(notebook.parent) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1100, "height": 2000})
        # Without the hints of a first visit.
        page.goto(f"{address}/lab/tree/{notebook.name}?reset", timeout=3 * MINUTES * 1000)
        page.wait_for_selector(".jp-Notebook .jp-CodeCell", timeout=3 * MINUTES * 1000)
        page.wait_for_selector(".jp-OutputArea-output img", timeout=MINUTES * 1000)
        told["opened"] = page.evaluate(SEEN)
        page.screenshot(path=pictures_to / "opened.png")
        wait_for_kernel(page)
        page.click("text=Run >> nth=0")
        page.click('[data-command="runmenu:run-all"]')
        told |= watch(page, pictures_to)
        page.screenshot(path=pictures_to / "ended.png")
        browser.close()
    sys.stdout.write(json.dumps(told))


def watch(page: Page, pictures_to: Path) -> dict[str, Any]:
    """Until the last cell has its number again: the parts that the bar had, and what is seen in the end."""
    shares: list[str] = []
    until = time.monotonic() + 8 * MINUTES
    begun = False
    while time.monotonic() < until:
        seen = page.evaluate(SEEN)
        begun = begun or "[*]:" in seen["prompts"]
        # The whole has a width, too.
        share = next((width for width in seen["bars"] if width != "100%"), "")
        if begun and share and share not in shares[-1:]:
            shares.append(share)
            page.screenshot(path=pictures_to / "running.png")
        if begun and "[*]:" not in seen["prompts"] and "succeeded" in seen["text"]:
            # The last picture may be on its way still.
            page.wait_for_timeout(2000)
            return {"shares": shares, "ended": page.evaluate(SEEN)}
        page.wait_for_timeout(200)
    raise SystemExit(f"the cells did not end: {page.evaluate(SEEN)}")


def wait_for_kernel(page: Page) -> None:
    """Idle, as the circle beside its name says."""
    page.wait_for_selector(".jp-Notebook-ExecutionIndicator[data-status='idle']", timeout=3 * MINUTES * 1000)


@contextmanager
def lab(folder: Path) -> Iterator[str]:
    """The address of a JupyterLab that shows ``folder``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root", f"--ServerApp.root_dir={folder}",
        f"--ServerApp.port={port}", "--ServerApp.port_retries=0", "--ServerApp.ip=127.0.0.1",
        "--IdentityProvider.token=", "--LabApp.news_url=None", "--LabApp.check_for_updates_class="
        "jupyterlab.NeverCheckForUpdate",
    ]  # fmt: skip
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=sys.stderr, env=dict(os.environ))
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{address}/api/status", timeout=5).close()
                break
            except OSError:
                if server.poll() is not None:
                    raise SystemExit(f"JupyterLab ended with {server.returncode}") from None
                time.sleep(0.3)
        yield address
    finally:
        server.terminate()
        server.wait(30)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]))
