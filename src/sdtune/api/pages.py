"""What a notebook shows of a run, as HTML that needs no script and keeps its place in the saved file."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from math import floor, log10

Curve = Sequence[tuple[int, float]]
"""Steps and values, in order."""

WIDTH, HEIGHT = 640, 150
LEFT, BOTTOM, EDGE = 56, 20, 8
"""Pixels of a curve's picture beside and below its plot."""
MOST_POINTS = 400
"""Of a curve: more would be drawn over each other, and kept in the notebook."""
SMOOTH = 0.9
"""Weight of what was before in the thicker line: one batch's loss says little."""
GREY, BLUE, ORANGE, GREEN, RED = "#888888", "#1f77b4", "#e6800f", "#2ca02c", "#d62728"
COLOURS = {"succeeded": GREEN, "failed": RED, "expired": RED, "cancelled": ORANGE}
FRAME = "font-family:sans-serif;font-size:13px;line-height:1.5;max-width:680px"


def page(
    title: str, place: str, state: str, rows: Iterable[tuple[str, ...]], *, doing: str = "", share: float | None = None,
    figures: str = "", picture: str = "", notes: Iterable[str] = (), trouble: str = "", below: str = "",
) -> str:  # fmt: skip
    """One run. share: of the phase ``doing`` that is done, 0 to 1; None where that is not known. below: more HTML."""
    told = [
        f'<div><b>{escape(title)}</b> on {escape(place)}: <b style="color:{COLOURS.get(state, BLUE)}">'
        f"{escape(state)}</b></div>",
        table(rows),
    ]
    if doing:
        told.append(f"<div>{escape(doing)}</div>")
        told.append(bar(share))
    if figures:
        told.append(f'<div style="font-family:monospace">{escape(figures)}</div>')
    told += [f'<div style="color:{ORANGE}">{escape(note)}</div>' for note in notes]
    if trouble:
        told.append(f'<div style="color:{RED};white-space:pre-wrap">{escape(trouble)}</div>')
    return f'<div style="{FRAME}">' + "".join(told) + picture + below + "</div>"


def table(rows: Iterable[tuple[str, ...]]) -> str:
    """Names, values, and what else is to be said of them; those without a value are left out."""
    style = "text-align:left;font-size:13px"
    cells = "".join(
        f'<tr><td style="{style};color:{GREY}">{escape(name)}</td>'
        + "".join(f'<td style="{style}">{escape(value)}</td>' for value in values)
        + "</tr>"
        for name, *values in rows
        if values[0]
    )
    return f'<table style="margin:0">{cells}</table>' if cells else ""


def bar(share: float | None) -> str:
    """How far it is; a pale one where nobody knows."""
    percent = 100.0 if share is None else 100.0 * min(1.0, max(0.0, share))
    colour = "#dddddd" if share is None else BLUE
    return (
        '<div style="width:100%;height:8px;background-color:#dddddd">'
        f'<div style="width:{percent:.1f}%;height:8px;background-color:{colour}"></div></div>'
    )


def code(text: str) -> str:
    """As it is, in a box."""
    return f'<pre style="white-space:pre-wrap;font-size:12px">{escape(text)}</pre>'


def grid(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table with a head."""
    head = "".join(f'<th style="text-align:left">{escape(cell)}</th>' for cell in heads)
    body = "".join(
        "<tr>" + "".join(f'<td style="text-align:left">{escape(cell)}</td>' for cell in line) + "</tr>"
        for line in lines
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def curves_picture(losses: Curve, measures: Mapping[str, Curve]) -> str:
    """The losses as a picture in HTML; nothing where there are fewer than two points."""
    drawn = [("loss", GREY, 1.0, thinned(losses)), ("loss, smoothed", BLUE, 2.0, smoothed(losses))]
    drawn += [(name.replace("_", " "), ORANGE, 2.0, thinned(curve)) for name, curve in measures.items()]
    drawn = [one for one in drawn if len(one[3]) > 1]
    if not drawn:
        return ""
    svg = base64.b64encode(curves_svg(drawn).encode()).decode()
    # A picture, and not the drawing itself: it is seen also in a notebook that nobody has trusted yet (tests/browser).
    return f'<img alt="loss" width="{WIDTH}" height="{HEIGHT}" src="data:image/svg+xml;base64,{svg}">'


def curves_svg(drawn: Sequence[tuple[str, str, float, Curve]]) -> str:
    """Lines, each with its name, colour and width, in one system of axes."""
    steps = [step for *_, curve in drawn for step, _ in curve]
    values = [value for *_, curve in drawn for _, value in curve]
    first, last = min(steps), max(steps)
    marks = ticks(min(values), max(values))
    low, high = min(marks[0], *values), max(marks[-1], *values)

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - EDGE) * (step - first) / max(1, last - first)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - EDGE) * (value - low) / ((high - low) or 1.0)

    text = f'font-family="sans-serif" font-size="11" fill="{GREY}"'
    parts = []
    for mark in marks:
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - EDGE}" y1="{y(mark):.1f}" y2="{y(mark):.1f}" stroke="{GREY}" '
            f'stroke-opacity="0.3"/><text x="{LEFT - 4}" y="{y(mark) + 4:.1f}" text-anchor="end" {text}>{mark:g}</text>'
        )
    parts.append(f'<text x="{LEFT}" y="{HEIGHT - 6}" {text}>step {first}</text>')
    parts.append(f'<text x="{WIDTH - EDGE}" y="{HEIGHT - 6}" text-anchor="end" {text}>{last}</text>')
    for number, (name, colour, width, curve) in enumerate(drawn):
        points = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in curve)
        faint = 'stroke-opacity="0.4"' if colour == GREY else ""
        parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="{width:g}" {faint} points="{points}"/>')
        parts.append(
            f'<text x="{LEFT + 90 + 130 * number}" y="{HEIGHT - 6}" font-family="sans-serif" font-size="11" '
            f'fill="{colour}">{escape(name)}</text>'
        )
    size = f'width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>' + "".join(parts) + "</svg>"


def ticks(low: float, high: float) -> list[float]:
    """Two to six round numbers between, or around, ``low`` and ``high``."""
    span = (high - low) or abs(high) or 1.0
    size = 10.0 ** floor(log10(span / 2))
    step = next(size * factor for factor in (1, 2, 5, 10) if span / (size * factor) <= 5)
    start = floor(low / step)
    found = [round((start + number) * step, 12) for number in range(8)]
    inside = [mark for mark in found if low <= mark <= high]
    return inside if len(inside) > 1 else [mark for mark in found if mark <= high + step][:2]


def thinned(curve: Curve) -> Curve:
    """At most MOST_POINTS of them, the last among them."""
    every = -(-len(curve) // MOST_POINTS) or 1
    return [*curve[:-1:every], *curve[-1:]]


def smoothed(curve: Curve) -> Curve:
    """The running mean, which begins with the first value and forgets it."""
    found, mean = [], 0.0
    for number, (step, value) in enumerate(curve):
        keep = min(SMOOTH, number / (number + 1))
        mean = keep * mean + (1 - keep) * value
        found.append((step, mean))
    return thinned(found)
