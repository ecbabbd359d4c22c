"""Tests of the fuzz harness: it detects each kind of failure, and many inputs cause none."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mimae.bench.harness.fuzz.case import Case, Special, from_json
from mimae.bench.harness.fuzz.forked import Wrong, run
from mimae.bench.harness.fuzz.formats import tar_sealed
from mimae.bench.harness.fuzz.fuzz import KINDS, kind_of
from mimae.bench.harness.fuzz.thrift import encode
from mimae.data.sources.tar import intact
from mimae.data.sources.thrift import read_struct
from mimae.errors import UserError

CORPUS = sorted((Path(__file__).parents[2] / "fixtures/fuzz").glob("*.json"))


def fuzz(*arguments: str | Path) -> str:
    """Run `mimae bench fuzz`, which must not report any failing input; return its output."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "mimae", "bench", "fuzz", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _raise(error: BaseException) -> str:
    raise error


def _take(num_bytes: int) -> str:
    return str(bytearray(num_bytes))[:0]


def _write(path: str) -> str:
    Path(path).write_text("x")
    return ""


def _write_beside(folder: Path) -> str:
    """Write through the file descriptor of a folder, as Folder does, so that the full path is not seen."""
    os.close(os.open("new", os.O_WRONLY | os.O_CREAT, dir_fd=os.open(folder.parent / "canary", os.O_RDONLY)))
    return ""


@pytest.mark.parametrize(
    ("use", "verdict"),
    [
        (lambda folder: "", "used"),
        (lambda folder: "it is no image", "refused"),
        (lambda folder: _raise(UserError("no such key")), "refused"),
        (lambda folder: _raise(KeyError("x")), "traceback"),
        (lambda folder: print("Traceback (most recent call last)", file=sys.stderr) or "", "traceback"),
        (lambda folder: _raise(Wrong("7 of 8")), "count"),
        (lambda folder: "a line\x1b[2J", "words"),
        (lambda folder: "x" * 100_000, "words"),
        (lambda folder: _take(300 << 20), "memory"),
        (lambda folder: os.abort(), "killed"),
        (lambda folder: _write("../canary/file"), "outside"),
        (lambda folder: _write(str(folder.parent / "new")), "outside"),
        (_write_beside, "outside"),
        (lambda folder: _write("inside"), "used"),
    ],
)
def test_what_becomes_of_an_input(use: Callable[[Path], str], verdict: str) -> None:
    def slowly(folder: Path, _: Case) -> str:
        said = use(folder)
        time.sleep(0.2 * (verdict == "memory"))  # Another process measures the memory.
        return said

    assert run(Case, slowly, memory=100 << 20).verdict == verdict


def test_a_hang_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mimae.bench.harness.fuzz.forked.WALL_SECONDS", 0.3)
    outcome = run(Case, lambda folder, case: str(time.sleep(60)))  # type: ignore[func-returns-value]
    assert outcome.verdict == "hang" and outcome.is_find


@pytest.mark.parametrize("kind", ["settings", "shards", "lists", "mixtures", "parquet"])
def test_an_input_is_a_function_of_seed_kind_and_number(kind: str) -> None:
    made = [kind_of(kind).make(random.Random(f"0 {kind} {number}")) for number in (5, 5, 6)]
    assert made[0] == made[1] != made[2]
    assert from_json(made[0].to_json(kind)) == (kind, made[0])


def test_special_files_are_kept(tmp_path: Path) -> None:
    case = Case(
        {"a/link": Special("link", "x"), "fifo": Special("fifo"), "holes": Special("sparse", "9")}, ["é"], {"A": "b"}
    )
    assert from_json(case.to_json("runs")) == ("runs", case)
    case.write(tmp_path)
    assert (
        (tmp_path / "a/link").is_symlink()
        and (tmp_path / "fifo").is_fifo()
        and (tmp_path / "holes").stat().st_size == 9
    )


def test_formats_are_written_as_their_readers_want_them() -> None:
    pytest.importorskip("pyarrow")
    from mimae.bench.harness.fuzz.parquet import files

    for data, pages in files():
        length = int.from_bytes(data[-8:-4], "little")
        footer = data[-8 - length : -8]
        assert encode(read_struct(footer)[1]) == footer
        for at in pages:
            size, fields = read_struct(data[at:])
            assert encode(fields) == data[at : at + size]
    assert intact(tar_sealed(b"name".ljust(512, b"\0")))


def test_the_corpus_and_some_inputs_of_each_kind() -> None:
    """Run the corpus of inputs that once failed, and now are used or refused.

    They run in one command, so that imports happen once.
    """
    assert len(CORPUS) > 5
    kinds = [kind for kind in KINDS if kind not in ("steps", "environment")]  # These two take seconds.
    fuzz(*kinds, "--count", "3", "--seed", "7", *(word for file in CORPUS for word in ("--case", file)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_many_inputs(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "fuzz.json"
    fuzz(kind, "--count", "500", "--seed", "11", "--out", file)
    found = json.loads(file.read_text())["kinds"][kind]
    assert found["tried"] == 500 == found["used"] + found["refused"] and found["used"] and found["refused"]
