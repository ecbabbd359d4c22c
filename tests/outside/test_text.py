"""Tests that text from files cannot control a terminal, and that a closed stream does not end the process."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mimae.errors import UserError
from mimae.outside import text
from mimae.outside.text import Output, losses, printable, say


@pytest.fixture(autouse=True)
def no_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "_losses", {})
    monkeypatch.setattr(text.atexit, "register", lambda _: None)


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("caf\u00e9 \u732b \U0001f431", "caf\u00e9 \u732b \U0001f431"),
        ("a\x1b[2Jb", "a\\x1b[2Jb"),
        ("a\rb\nc\td\x00", "a\\rb\\nc\\td\\x00"),
        ("\x9b31m\x7f", "\\x9b31m\\x7f"),
        ("gnp.\u202eexe\u2028", "gnp.\\u202eexe\\u2028"),
        (os.fsdecode(b"\xff.png"), "\\udcff.png"),
    ],
)
def test_control_characters_are_escaped_and_letters_are_not(raw: str, shown: str) -> None:
    assert printable(raw) == shown


def test_lines_of_our_own_stay_lines(capsys: pytest.CaptureFixture[str]) -> None:
    say("one\n\ttwo\x1b[1m")
    say("three", error=True)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("one\n\ttwo\\x1b[1m\n", "three\n")


def test_what_a_stream_cannot_encode_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    say("\u732b.png")
    assert raw.getvalue() == b"\\u732b.png\n" and not losses()


def test_a_stream_that_was_closed_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = io.StringIO()
    closed.close()
    for stream in (closed, None):
        monkeypatch.setattr(sys, "stdout", stream)
        say("hello")
        assert not text.is_terminal()
    assert losses()["stdout"].writes == 1, "no stream at all is what the caller wanted"


def test_a_full_disk_is_survived_and_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        output = Output()
        for _ in range(3):
            say("hello")
        assert output.write("bar") == 3
        assert losses() == {"stdout": text.Loss(4, "No space left on device")}
        text._abandon()  # as at the end of the process; else Python's own flush would fail


@pytest.mark.parametrize(("end", "code"), [("pass", 0), ("sys.exit(75)", 75)])
def test_the_exit_code_stays(end: str, code: int) -> None:
    """If Python could not flush stdout at its end, it would exit with 120."""
    program = f"import sys; from mimae.outside.text import say\nfor _ in range(9): say('x' * 3000)\n{end}"
    for stdout in ("/dev/full", None):
        reader, writer = os.pipe()
        os.close(reader)  # a pipe that nobody reads
        target = writer if stdout is None else os.open(stdout, os.O_WRONLY)
        done = subprocess.run(
            [sys.executable, "-c", program],
            stdout=target,
            stderr=subprocess.PIPE,
            cwd=Path(__file__).parents[1],
            env={key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"},
        )
        assert (done.returncode, done.stderr) == (code, b"")


def test_standard_streams_that_were_closed_take_no_files_number(tmp_path: Path) -> None:
    program = (
        "import os, sys; from mimae.outside.text import open_standard_streams, say\n"
        "open_standard_streams(); file = open(sys.argv[1], 'w'); say('not for the file')\n"
        "os.write(1, b'nor this'); file.close()"
    )
    command = f'exec "{sys.executable}" -c "$0" "$1" >&- 2>&-'
    subprocess.run(["sh", "-c", command, program, tmp_path / "file"], check=True, cwd=Path(__file__).parents[1])
    assert (tmp_path / "file").read_text() == ""


def test_a_long_line_of_an_error_is_shortened_and_the_others_are_not() -> None:
    lines = str(UserError(f"begin{'x' * 70_000}end\nthe second line")).split("\n")
    assert lines[1] == "the second line" and len(lines[0]) < 2100
    assert lines[0].startswith("beginx") and lines[0].endswith("xend") and "68,008 characters" in lines[0]
