"""Class pictures: given or drawn, and drawn again only if they would be others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdtune.errors import DatasetError, RecipeError
from sdtune.methods.dreambooth import DreamBoothLora
from sdtune.training.components.models import Parts
from sdtune.training.components.prior import class_pictures
from sdtune.training.run import Run


def wanting(settings: dict[str, Any], **more: Any) -> DreamBoothLora:
    prior = {"with_prior_preservation": True, "class_prompt": "a green cat", "num_class_images": 3}
    return DreamBoothLora.from_settings({**settings, **prior, **more})


def test_none_are_drawn_unasked(method: DreamBoothLora, parts: Parts, run: Run) -> None:
    assert class_pictures(method, parts, run) == []


def test_they_are_drawn_once(settings: dict[str, Any], parts: Parts, run: Run) -> None:
    drawn = class_pictures(wanting(settings), parts, run)
    assert [picture.caption for picture in drawn] == ["a green cat"] * 3
    written = [picture.path.stat().st_mtime_ns for picture in drawn]
    assert len({picture.path.read_bytes() for picture in drawn}) == 3

    again = class_pictures(wanting(settings), parts, run)
    assert [picture.path.stat().st_mtime_ns for picture in again] == written

    # A picture that a stopped run did not get to is drawn, and is the one it would have been.
    lost = drawn[1].path.read_bytes()
    drawn[1].path.unlink()
    class_pictures(wanting(settings), parts, run)
    assert drawn[1].path.read_bytes() == lost


@pytest.mark.parametrize(
    "change", [{"class_prompt": "a red cat"}, {"seed": 8}, {"resolution": 64}, {"sample_steps": 3}, {"clip_skip": 1}]
)
def test_another_prompt_or_drawing_gives_other_pictures(
    settings: dict[str, Any], parts: Parts, run: Run, change: dict[str, Any]
) -> None:
    first = class_pictures(wanting(settings), parts, run)
    other = class_pictures(wanting(settings, **change), parts, run)
    assert not {picture.path for picture in first} & {picture.path for picture in other}


def test_given_ones_come_first(settings: dict[str, Any], pictures: Callable[..., Path], parts: Parts, run: Run) -> None:
    folder = pictures(2, name="class")
    (folder / "0.txt").write_text("a tabby cat")
    found = class_pictures(wanting(settings, class_data_dir=str(folder)), parts, run)
    assert [picture.caption for picture in found] == ["a tabby cat", "a green cat", "a green cat"]
    assert [picture.path.parent == folder for picture in found] == [True, True, False]
    enough = class_pictures(wanting(settings, class_data_dir=str(folder), num_class_images=1), parts, run)
    assert len(enough) == 1


def test_a_folder_that_is_not_there_is_named(settings: dict[str, Any], parts: Parts, run: Run) -> None:
    with pytest.raises(DatasetError, match="class_data_dir: /nowhere: no such folder"):
        class_pictures(wanting(settings, class_data_dir="/nowhere"), parts, run)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"class_prompt": "a cat"}, "class_prompt: found 'a cat', which has no use without prior preservation"),
        ({"num_class_images": 7}, "num_class_images: found 7, which has no use without"),
        ({"with_prior_preservation": True}, "class_prompt: missing; prior preservation needs --class-prompt"),
    ],
)
def test_settings_that_do_not_go_together_are_named(settings: dict[str, Any], more: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        DreamBoothLora.from_settings({**settings, **more})
    assert words in str(caught.value)
