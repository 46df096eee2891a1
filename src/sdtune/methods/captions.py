"""Captions in text files beside their images."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from posixpath import basename, dirname, join, splitext

from sdtune.methods.folders import Folder
from sdtune.methods.ledger import Draft
from sdtune.methods.sources import File

LONGEST_CAPTION_FILE = 1_000_000
"""Bytes. What is larger is no caption."""


def captions_beside(folder: Folder, images: Iterable[str], draft: Draft) -> dict[str, str | None]:
    """The caption of each of ``images`` that has a <stem>.txt or <stem>.caption; None where that is unusable."""
    files = {splitext(path)[0] + splitext(path)[1].lower(): file for path, file in folder.texts.items()}
    return _read(images, lambda stem: [files.get(stem + ".txt"), files.get(stem + ".caption")], draft)


def kohya_captions(folder: Folder, images: Iterable[str], draft: Draft) -> dict[str, str | None]:
    """The same as kohya looks for them with --caption_extension .txt: <stem>.txt, or less the last four words of
    <stem>, which its face detector appends."""

    def candidates(stem: str) -> list[File | None]:
        words = basename(stem).split("_")
        shorter = join(dirname(stem), "_".join(words[:-4])) if len(words) >= 5 else stem
        return [folder.texts.get(stem + ".txt"), folder.texts.get(shorter + ".txt")]

    return _read(images, candidates, draft)


def remark_on_unread(folder: Folder, parent: str, why: str, draft: Draft) -> None:
    """Warn of the text files directly in ``parent`` that no image has taken; ``why``: of those with an image."""
    stems = {splitext(path)[0] for path in folder.images_in.get(parent, ())}
    for path in folder.texts_in.get(parent, ()):
        if path in draft.rows:
            continue
        if splitext(path)[0] in stems:
            draft.reject("unused-caption", path, f"is not read: {why}.")
        else:
            message = f"is no image's caption: there is no image called {basename(splitext(path)[0])!r}."
            draft.reject("caption-without-image", path, message)


def _read(images: Iterable[str], candidates: Callable[[str], list[File | None]], draft: Draft) -> dict[str, str | None]:
    captions: dict[str, str | None] = {}
    read: dict[str, str | None] = {}
    for image in images:
        file = next((file for file in candidates(splitext(image)[0]) if file is not None), None)
        if file is None:
            continue
        if file.path not in read:
            read[file.path] = read_caption(file, draft)
            draft.keep(file.path, "caption")
        captions[image] = read[file.path]
    return captions


def read_caption(file: File, draft: Draft) -> str | None:
    """The first line of a caption file, as kohya reads it; None if it is unusable, which is noted."""
    code = "caption-encoding"
    try:
        with file.open() as stream:
            text = stream.read(LONGEST_CAPTION_FILE + 1).decode("utf-8-sig")
        if len(text) > LONGEST_CAPTION_FILE or "\x00" in text:
            raise ValueError
    except OSError as error:
        draft.find("unreadable", file.path, f"cannot be opened ({error.strerror or error}).")
        return None
    except ValueError:  # UnicodeDecodeError is one
        draft.find(code, file.path, "is not UTF-8 text. Save it as UTF-8.")
        return None
    first, *more = re.split(r"\r\n|\r|\n", text)
    caption = first.strip()
    further = sum(bool(line.strip()) for line in more)
    if not caption:
        what = "begins with a blank line" if further else "is empty"
        draft.find("empty-caption", file.path, f"{what}. Write the caption on its first line, or remove the file.")
        return None
    if further:
        draft.find("multi-line-caption", file.path, f"has {further + 1} lines; only the first is the caption.")
    return caption
