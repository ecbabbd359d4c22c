"""Tests of reading files that a user names, and of printing their contents."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mimae.errors import UserError
from mimae.outside.reading import open_regular, read_text
from mimae.outside.text import printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain é 写", "plain é 写"),
        ("\x1b[2J", "\\x1b[2J"),
        ("a\nb\tc\r", "a\\nb\\tc\\r"),
        (os.fsdecode(b"caf\xe9"), "caf\\udce9"),
        ("\x7f\x9b", "\\x7f\\x9b"),
        ("\u202egnp.exe", "\\u202egnp.exe"),  # Turns the direction of writing: exe.png.
        ("\u2028", "\\u2028"),
    ],
)
def test_what_a_terminal_would_obey_is_escaped(text: str, shown: str) -> None:
    assert printable(text) == shown and shown.isprintable()


def test_an_error_keeps_its_lines_and_nothing_else() -> None:
    assert str(UserError("two\nlines\x1b[0m\udce9")) == "two\nlines\\x1b[0m\\udce9"


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"x" * 11, "more than 10 bytes"),
        ("é".encode("utf-16"), "UTF-16"),
        (b"a\xff", "byte 1 is not UTF-8"),
    ],
)
def test_texts_that_are_refused(tmp_path: Path, data: bytes, said: str) -> None:
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(OSError) as refusal:
        read_text(tmp_path / "x", 10)
    assert said in str(refusal.value.strerror)


def test_a_text_up_to_its_limit_with_a_mark(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"\xef\xbb\xbf" + b"a" * 7)
    assert read_text(tmp_path / "x", 10) == "a" * 7


def test_neither_pipes_nor_devices_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero", tmp_path):
        with pytest.raises(OSError, match="not a regular file"):
            open_regular(path)
