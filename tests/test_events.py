"""Events survive the way through a line of log; everything else stays a line."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdtune import events

EVERY_KIND = [
    events.Phase("load", "Loading"),
    events.Progress("cache", 1, 2),
    events.Step(3, 10, 0.5, 1e-4, 7.5, 12.0),
    events.Measure("held_out_loss", 5, 0.125),
    events.Note("“look”\n", "warning"),
    events.Artifact("lora", "/out/x.safetensors"),
    events.Checkpoint(200, "/out/checkpoints/step-000200"),
    events.Copy("gs://b/dog/dog.safetensors", "/mnt/nfs/models/dog.safetensors", "failed", "the disk is full"),
    events.Failed("training", "why"),
    events.Finished(1.5, 10, 0.25, 0.01),
    events.Executed(seconds=61.5, cells=12),
]


@pytest.mark.parametrize("event", EVERY_KIND, ids=lambda event: event.event)
def test_an_event_survives_its_line(event: events.Event) -> None:
    line = events.to_line(event)
    assert "\n" not in line
    assert line.isascii()
    assert events.parse(line) == event


def test_every_kind_is_tried() -> None:
    assert {type(event) for event in EVERY_KIND} == set(events.KINDS.values())


def test_an_event_is_found_behind_a_line_that_was_not_ended() -> None:
    done = events.Artifact("lora", "/out/x.safetensors")
    assert events.parse("Downloading:  3%|x" + events.to_line(done)) == done


@pytest.mark.parametrize(
    "line", ["", "step 3", '{"event"', '{"event": "unknown"}', '{"event": "phase"}', '{"event": ["phase"]}', "{}"]
)
def test_other_output_is_no_event(line: str) -> None:
    assert events.parse(line) is None


@given(st.text())
def test_no_line_breaks_the_reader(line: str) -> None:
    events.parse(line)
    events.parse('{"event": ' + line)
