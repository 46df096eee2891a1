"""What a notebook is shown: pure functions from numbers to HTML, and a cell that is drawn over."""

from __future__ import annotations

import base64
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sdtune.api import pages, screens
from sdtune.api.runs import near
from sdtune.api.samples import compare


def test_a_page_says_what_and_how_far_and_what_went_wrong() -> None:
    html = pages.page(
        "dreambooth-lora <cat>", "this machine", "failed", [("output", "out/cat"), ("shapes", "")], doing="Training",
        share=0.25, figures="1/4", notes=["a & b"], trouble="loss is not finite",
    )  # fmt: skip
    ET.fromstring(html)  # well-formed, whatever was told
    assert "&lt;cat&gt;" in html
    assert "a &amp; b" in html
    assert "width:25.0%" in html
    assert f"color:{pages.RED}" in html
    assert "shapes" not in html
    assert "<script" not in html
    assert "width:100.0%" in pages.bar(None)


def drawn(losses: list[tuple[int, float]], **measures: list[tuple[int, float]]) -> ET.Element:
    html = pages.curves_picture(losses, measures)
    encoded = re.search(r'src="data:image/svg\+xml;base64,([^"]+)"', html)
    assert encoded
    return ET.fromstring(base64.b64decode(encoded[1]).decode())


def test_the_loss_curve_stays_in_its_picture_and_on_a_budget() -> None:
    losses = [(step, 1 / (1 + step)) for step in range(5000)]
    svg = drawn(losses, held_out_loss=[(0, 0.9), (4999, 0.1)])
    lines = svg.findall("{*}polyline")
    assert len(lines) == 3  # the loss, the same smoothed, what was held out
    for line in lines:
        points = [tuple(map(float, point.split(","))) for point in line.attrib["points"].split()]
        assert 2 <= len(points) <= pages.MOST_POINTS + 1
        assert all(0 <= x <= pages.WIDTH and 0 <= y <= pages.HEIGHT for x, y in points)
        assert points == sorted(points)
    said = [text.text for text in svg.findall("{*}text")]
    assert {"step 0", "4999", "held out loss"} <= set(said)


@pytest.mark.parametrize("losses", [[], [(1, 0.5)]])
def test_there_is_no_curve_of_one_point(losses: list[tuple[int, float]]) -> None:
    assert pages.curves_picture(losses, {}) == ""


def test_a_curve_that_does_not_move_is_drawn_all_the_same() -> None:
    assert len(drawn([(1, 0.5), (2, 0.5)]).findall("{*}polyline")) == 2
    assert len(drawn([(1, 0.0), (2, 0.0)]).findall("{*}polyline")) == 2


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.1236, 0.1239), (3e-6, 9e-4), (7, 7), (0, 0), (0.05, 3.2)])
def test_axes_have_a_few_round_numbers(low: float, high: float) -> None:
    marks = pages.ticks(low, high)
    assert 2 <= len(marks) <= 7
    assert marks == sorted(set(marks))
    assert all(len(f"{mark:g}") <= 8 for mark in marks)


def test_smoothing_begins_at_the_first_value_and_follows() -> None:
    smooth = pages.smoothed([(1, 4.0), (2, 2.0), *((step, 1.0) for step in range(3, 100))])
    assert smooth[:2] == [(1, 4.0), (2, 3.0)]
    assert smooth[-1][1] == pytest.approx(1.0, abs=0.01)


def test_places_are_told_as_seen_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    assert near(str(tmp_path / "notebooks" / "out" / "cat")) == "out/cat"
    assert near(str(tmp_path / "base-model")) == "../base-model"
    assert near("/usr") == "/usr"
    assert near("gs://bucket/cat") == "gs://bucket/cat"
    assert near("8 pictures from ../images") == "8 pictures from ../images"
    assert near(f"8 pictures from {tmp_path / 'images'}") == "8 pictures from ../images"


def test_pictures_side_by_side_are_kept_small() -> None:
    noise = Image.effect_noise((512, 512), 80).convert("RGB")
    shown = compare({"a cat": [("no LoRA", [noise] * 4), ("with", [noise] * 4)]})
    assert shown.image.width > 4 * 190
    assert len(shown._repr_jpeg_()) < 200_000


class Counted:
    """Shows how often it was asked."""

    def __init__(self) -> None:
        self.times = 0

    def as_html(self) -> str:
        self.times += 1
        return f"<b>{self.times}</b>"

    def as_text(self) -> str:
        return str(self.times)

    def as_picture(self) -> bytes | None:
        return b"picture" if self.times > 2 else None


def test_a_cell_is_drawn_over_and_not_too_often(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[dict[str, Any], bool]] = []

    class Publisher:
        def publish(self, data: dict[str, Any], update: bool = False, **more: Any) -> None:
            sent.append((data, update))

    class Shell:
        display_pub = Publisher()

    monkeypatch.setattr("IPython.core.interactiveshell.InteractiveShell.initialized", lambda: True)
    monkeypatch.setattr("IPython.core.interactiveshell.InteractiveShell.instance", lambda: Shell())
    cell, shown = screens.Cell(), Counted()
    cell.begin(shown)
    assert [update for _, update in sent] == [False, False]  # the page, and room for a picture
    for _ in range(50):
        cell.change(shown)
    assert shown.times <= 10
    before = shown.times
    cell.change(shown, at_once=True)
    assert shown.times == before + 1
    cell.end(shown)
    cell.end(shown)
    pictures = [data for data, update in sent if update and "image/jpeg" in data]
    assert pictures == [{"image/jpeg": base64.b64encode(b"picture").decode(), "text/plain": "samples"}]
    assert all(update for _, update in sent[2:])
