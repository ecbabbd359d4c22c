"""Tests of output for machines: stdout has only the documents, even if other code writes to it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from mimae.outside.output import as_json, mode

CODE = """
import os, sys
from mimae.outside.output import as_json, mode

with mode(quiet=False, machine=True):
    print("for people")
    os.write(1, b"a C library\\n")
    os.system("echo a child")
    as_json({"a": [1, float("nan"), ("x", None)], "b": {"c": True}})
    print("more for people")
print("after it")
assert not as_json({})
"""


def test_stdout_holds_the_document_alone() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    document, after = done.stdout.splitlines()
    assert json.loads(document) == {"a": [1, None, ["x", None]], "b": {"c": True}} and after == "after it"
    assert sorted(done.stderr.splitlines()) == ["a C library", "a child", "for people", "more for people"]


def test_numbers_that_are_not_finite_and_paths_are_legal_json(capsys: object) -> None:
    assert not as_json({})
    with mode(quiet=False, machine=True):
        assert as_json({1: float("inf"), "path": Path("a/b"), "half": "\ud800"})
    out = capsys.readouterr().out  # type: ignore[attr-defined]
    assert json.loads(out, parse_constant=lambda _: 1 / 0) == {"1": None, "path": "a/b", "half": "\ud800"}
