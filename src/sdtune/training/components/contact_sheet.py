"""One picture that shows what a run learned: the training pictures, then each prompt before and after."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont, ImageOps

TILE = 192
GAP = 8
LABEL_WIDTH = 96
TEXT = 18
MOST_TRAINING_PICTURES = 8
LEAST_COLUMNS = 4
PAPER, INK, FAINT = "#ffffff", "#1f2328", "#6e7781"

Row = tuple[str, Sequence[Image.Image]]
"""A label and the pictures beside it."""


def contact_sheet(
    title: str, training_pictures: Sequence[Image.Image], samples: Sequence[tuple[str, Sequence[Row]]]
) -> Image.Image:
    """The sheet. samples: for each prompt, its labelled rows, such as before and after.

    As wide as the samples need; more training pictures than fit beside each other are shown smaller. None: no row.
    """
    shown = training_pictures[:MOST_TRAINING_PICTURES]
    shown_first: list[tuple[str, Sequence[Row]]] = [("what it was shown", [("pictures", shown)])] if shown else []
    blocks = [*shown_first, *samples]
    columns = max(LEAST_COLUMNS, *(len(pictures) for _, rows in samples for _, pictures in rows))
    width = LABEL_WIDTH + columns * (TILE + GAP) + GAP
    heading = 2 * GAP + TEXT
    height = heading + GAP + sum(
        heading + sum(_tile(len(pictures), columns) + GAP for _, pictures in rows) for _, rows in blocks
    )  # fmt: skip
    sheet = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(sheet)
    bold, plain = ImageFont.load_default(TEXT + 4), ImageFont.load_default(TEXT)
    pen.text((GAP, GAP), _fit(title, pen, bold, width - 2 * GAP), INK, bold)
    top = heading + GAP
    for text, rows in blocks:
        pen.text((GAP, top + GAP), _fit(text, pen, plain, width - 2 * GAP), INK, plain)
        top += heading
        for label, pictures in rows:
            side = _tile(len(pictures), columns)
            pen.text((GAP, top + (side - TEXT) // 2), label, FAINT, plain)
            for column, picture in enumerate(pictures):
                tile = ImageOps.pad(picture, (side, side), Image.Resampling.LANCZOS, color=PAPER)
                sheet.paste(tile, (LABEL_WIDTH + column * (side + GAP), top))
            top += side + GAP
    return sheet


def _tile(pictures: int, columns: int) -> int:
    """Side in pixels of each of ``pictures`` beside each other where ``columns`` of full size fit."""
    return min(TILE, columns * (TILE + GAP) // max(1, pictures) - GAP)


def _fit(text: str, pen: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """``text`` on one line, cut so that it is at most ``width`` pixels wide."""
    text = " ".join(text.split())
    if pen.textlength(text, font) <= width:
        return text
    while text and pen.textlength(text + " ...", font) > width:
        text = text[:-1]
    return text + " ..."
