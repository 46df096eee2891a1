"""Entries of Cloud Logging as lines: who said it, what, and how bad it is by its own words."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest

from sdtune import events
from sdtune.backends.vertex.entries import EntryReader, grade
from sdtune.jobs.backend import LogLine

INFO = [
    "step 100 of 1000, loss 0.1234",
    "INFO: all is well",
    "[INFO] all is well",
    "INFO:root:all is well",
    "DEBUG:urllib3.connectionpool:Starting new connection",
    "11/25/2026 10:00:00 - INFO - __main__ - ***** Running training *****",
    "[2026-11-25 10:00:00,123] [INFO] [real_accelerator.py:203:get_accelerator] Setting ds_accelerator to cuda",
    "2026-11-25 10:00:00 INFO     create LoRA network. base dim (rank): 4, alpha: 1     lora.py:935",
    "I1125 10:00:00.123456 139 tensorflow.cc:12] here",
    "I0000 00:00:1732528800.000000 139 cuda_executor.cc:1015] successful NUMA node read",
    "  5%|▌         | 50/1000 [00:10<03:10,  5.00it/s]",
    "Downloading shards: 100%|██████████| 2/2 [00:05<00:00,  2.5s/it]",
    "Error rate is 0.01",
    "Warnings are switched off",
    "100 errors were corrected",
    "Information: none",
    "0 errors, 0 warnings",
    "2026 pictures",
    "",
]
WARNING = [
    "WARNING: the disk is nearly full",
    "Warning: the disk is nearly full",
    "warning: the disk is nearly full",
    "[WARNING] xFormers is not there",
    "WARNING:root:xFormers is not there",
    "11/25/2026 10:00:00 - WARNING - accelerate.utils.other - Detected kernel version 5.4.0",
    "2026-11-25 10:00:00,123 - sdtune.training - WARNING - no captions",
    "2026-11-25 10:00:00 WARNING  no metadata found                      train_util.py:100",
    "2026-11-25 10:00:00.123456: W external/local_xla/xla/tsl/framework/cpu_allocator_impl.cc:83] Allocation of",
    "W1125 10:00:00.123000 140 torch/distributed/run.py:793] Setting OMP_NUM_THREADS",
    "[W1125 10:00:00.123456789 socket.cpp:697] [c10d] The client socket has failed",
    "[rank0]:[W1125 10:00:00.123456789 ProcessGroupNCCL.cpp:1250] Warning: process group has NOT been destroyed",
    "/usr/lib/python3.11/site-packages/torch/utils.py:12: FutureWarning: this goes away",
    "UserWarning: this is odd",
]
ERROR = [
    "Traceback (most recent call last):",
    "[rank1]: Traceback (most recent call last):",
    "  + Exception Group Traceback (most recent call last):",
    "ERROR: it went wrong",
    "Error: it went wrong",
    "error: it went wrong",
    "[ERROR] it went wrong",
    "CRITICAL:root:it went wrong",
    "2026-11-25 10:00:00 ERROR x.py:12 it went wrong",
    "E0101 10:00:00.123456 1 here.cc:12] it went wrong",
    "2026-11-25 10:00:00.123456: E external/local_xla/xla/stream_executor/cuda/cuda_fft.cc:477] it went wrong",
    "F1125 10:00:00.123456 1 here.cc:12] Check failed",
    "ValueError: no such scheduler",
    "torch.cuda.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB",
    "KeyboardInterrupt",
    "Segmentation fault (core dumped)",
]


def container(text: str, severity: str = "ERROR", replica: str = "workerpool0-0") -> dict[str, Any]:
    """An entry, as Vertex AI makes it of what a container writes to standard error."""
    return {
        "insertId": "1", "severity": severity, "timestamp": "2026-11-25T10:00:00.123456789Z",
        "jsonPayload": {"attrs": {"tag": replica}, "levelname": severity, "message": text},
        "resource": {"type": "ml_job", "labels": {"job_id": "1", "task_name": replica}},
    }  # fmt: skip


def graded(*texts: str) -> list[str]:
    reader = EntryReader()
    return [line.severity for text in texts for line in reader.lines(container(text))]


@pytest.mark.parametrize(
    ("severity", "text"),
    [
        (severity, text)
        for severity, texts in (("info", INFO), ("warning", WARNING), ("error", ERROR))
        for text in texts
    ],
)
def test_severity_is_told_by_the_text(severity: str, text: str) -> None:
    assert graded(text) == [severity]
    assert EntryReader().lines(container(text, severity="INFO"))[0].severity == severity


def test_a_line_is_given_with_its_replica_and_time() -> None:
    time = datetime(2026, 11, 25, 10, 0, 0, 123456, UTC)
    assert EntryReader().lines(container("hello", replica="workerpool1-3")) == [
        LogLine("hello", "info", time, "workerpool1-3")
    ]


def test_a_traceback_in_one_entry() -> None:
    text = 'Traceback (most recent call last):\n  File "x.py", line 1, in <module>\n    go()\nSomethingOdd\n'
    lines = EntryReader().lines(container(text + "and on it goes"))
    assert [line.text for line in lines] == [*text.splitlines(), "and on it goes"]
    assert [line.severity for line in lines] == ["error"] * 4 + ["info"]


def test_a_traceback_whose_lines_are_entries_among_those_of_others() -> None:
    reader, severities = EntryReader(), []
    for entry in (
        container("[rank0]: Traceback (most recent call last):"),
        container("step 1", severity="INFO"),
        container('[rank0]:   File "x.py", line 1, in <module>'),
        container("step 7", replica="workerpool1-0"),
        container("[rank0]:     go()"),
        container("[rank0]: SomethingOdd"),
        container("goodbye"),
    ):
        severities += [line.severity for line in reader.lines(entry)]
    assert severities == ["error", "info", "error", "info", "error", "error", "info"]


def test_the_source_line_belongs_to_its_warning_and_a_progress_bar_does_not() -> None:
    warning = "/lib/x.py:12: UserWarning: odd"
    assert graded(warning, "  warnings.warn(text)", "next") == ["warning", "warning", "info"]
    assert graded(warning, "  0%|          | 0/1000 [00:00<?, ?it/s]", "  and what") == ["warning", "info", "info"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\r 1%|#\r 2%|##\r 3%|###", [" 3%|###"]),
        ("before\n 1%|#\r 2%|##\nafter\n", ["before", " 2%|##", "after"]),
        (" 99%|#########\r100%|##########\r          \r", ["100%|##########"]),
        ("windows\r\n", ["windows"]),
        ("\r", [""]),
        ("", [""]),
        ("\n\n", ["", ""]),
    ],
)
def test_of_a_progress_bar_the_last_state_is_shown(text: str, shown: list[str]) -> None:
    assert [line.text for line in EntryReader().lines(container(text))] == shown


def test_an_event_stays_a_whole_line_of_text() -> None:
    event = events.Failed("training", "Error: loss is not finite\nERROR: nor is this\r\u2028\x85")
    (line,) = EntryReader().lines(container(events.to_line(event) + "\n", severity="INFO"))
    assert line.severity == "info"
    assert events.parse(line.text) == event


@pytest.mark.parametrize(
    ("severity", "shown"), [("INFO", "info"), ("DEFAULT", "info"), ("WARNING", "warning"), ("ERROR", "error")]
)
def test_messages_of_vertex_ai_itself_keep_their_severity(severity: str, shown: str) -> None:
    entry = {
        "insertId": "1", "severity": severity, "timestamp": "2026-11-25T10:00:00Z", "textPayload": "Job is running",
        "resource": {"type": "ml_job", "labels": {"job_id": "1", "task_name": "service"}},
    }  # fmt: skip
    (line,) = EntryReader().lines(entry)
    assert line == LogLine("Job is running", shown, datetime(2026, 11, 25, 10, tzinfo=UTC), "")


def test_what_has_no_message_is_shown_as_it_is() -> None:
    payload = {"loss": 0.1, "step": 3}
    bare = {"insertId": "1", "timestamp": "2026-11-25T10:00:00Z"}
    task = {"resource": {"labels": {"task_name": "workerpool0-0"}}}
    shown = [
        EntryReader().lines({**bare, **task, **more})[0].text
        for more in ({"jsonPayload": payload}, {"jsonPayload": {"message": payload}}, {"textPayload": "plain"}, {})
    ]
    assert shown == [json.dumps(payload), json.dumps(payload), "plain", ""]


@pytest.mark.parametrize("attrs", [None, "tag", [], {"tag": None}, {"tag": 3}, {"tag": "somebody's own"}])
def test_a_payload_of_another_shape_is_shown_all_the_same(attrs: object) -> None:
    entry = {**container("hello"), "jsonPayload": {"attrs": attrs, "message": "hello"}}
    assert [line.text for line in EntryReader().lines(entry)] == ["hello"]


@pytest.mark.parametrize("text", [" " * 100_000, "1:" * 50_000, "a." * 50_000, "x:1: " * 20_000, "[" * 100_000])
def test_a_long_line_is_graded_in_no_time(text: str) -> None:
    start = datetime.now()
    assert grade(text) == "info"
    assert (datetime.now() - start).total_seconds() < 0.5
