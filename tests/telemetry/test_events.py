"""Tests of events.jsonl: one line per event, over all starts, whatever else is in the file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mimae.outside.files import Folder
from mimae.telemetry.events import Events, read


def test_an_event_is_a_line_with_time_step_kind_and_details(tmp_path: Path) -> None:
    for _ in range(2):  # two starts
        events = Events(Folder(tmp_path))
        events.step = 7
        events.add("fault", what=Path("a\x1b"), reason=None)
        events.add("save", step=8, seconds=0.5)
    text = (tmp_path / "events.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert "\x1b" not in text and len(lines) == 4
    assert [[line[key] for key in ("step", "kind", "details")] for line in lines[:2]] == [
        [7, "fault", {"what": "a\x1b", "reason": None}],
        [8, "save", {"seconds": 0.5}],
    ]
    assert lines == [*read(Folder(tmp_path))]


def test_an_event_of_an_unknown_kind_is_a_bug(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="sav"):
        Events(Folder(tmp_path)).add("sav")


def test_events_that_cannot_be_written_are_lost_and_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Events(None).add("start")
    (tmp_path / "victim").touch()
    (tmp_path / "events.jsonl").symlink_to(tmp_path / "victim")
    events = Events(Folder(tmp_path))
    events.add("start")
    events.add("finish")
    assert capsys.readouterr().out.count("events.jsonl cannot be written: it is a symbolic link") == 1
    Events(Folder(tmp_path / "nowhere")).add("start")
    assert (tmp_path / "victim").read_text() == "" and not (tmp_path / "nowhere").exists()


def test_what_is_no_event_is_left_out(tmp_path: Path) -> None:
    Events(Folder(tmp_path)).add("start")
    with (tmp_path / "events.jsonl").open("ab") as file:
        for line in (b"[1]", b"\xff\xfe", b'{"kind": "start"}', b'{"kind": 5, "details": {}}', b"[" * 10_000, b'{"ti'):
            file.write(line + b"\n")
    Events(Folder(tmp_path)).add("finish")
    assert [event["kind"] for event in read(Folder(tmp_path))] == ["start", "finish"]
    assert [*read(Folder(tmp_path / "nowhere"))] == []
