"""Tests that a run directory is read in any state of its files."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest

from mimae.errors import UserError
from mimae.report import runs
from tests.report.conftest import MakeRun, lines, step_record


def test_records_become_columns_in_the_order_of_steps(make_run: MakeRun) -> None:
    run = make_run(steps=[step_record(20, loss=2.0), step_record(10, loss=3.0), step_record(20, loss=1.0)])
    found = runs.read(run)
    assert found.steps["step"].tolist() == [10, 20]
    assert found.steps["loss"].tolist() == [3.0, 1.0], "of two records of a step the later one counts"
    assert found.losses == ["loss", "rec", "max_mi", "gate"]
    assert (found.state, found.step) == ("finished after 20 steps", 20)
    assert found.recipe is not None and found.recipe.model.width == 96


def test_what_is_no_record_is_left_out(make_run: MakeRun) -> None:
    run = make_run()
    strange = [
        '{"step": 40, "loss": "high", "rec": true, "lr": [1], "grad_norm": 1e999}',
        '{"step": 50, "loss": 1' + "0" * 400 + "}",
        '{"step": -1}',
        '{"step": 1' + "0" * 300 + "}",
        '{"step": 1.5}',
        "[" * 100_000,
        "[1, 2]",
        "\x00\xff",
        '{"step": 60, "lo',
    ]
    (run / "metrics.jsonl").write_text(lines([step_record(30)]) + "\n".join(strange))
    found = runs.read(run)
    assert found.steps["step"].tolist() == [30, 40, 50]
    assert all(math.isnan(found.steps[key][1]) for key in ("loss", "rec", "lr", "grad_norm"))
    assert math.isnan(found.steps["loss"][2])


@pytest.mark.parametrize("name", ["metrics.jsonl", "epochs.jsonl", "events.jsonl", "environment.json", "config.yaml"])
def test_a_file_that_is_missing_or_broken_is_empty(make_run: MakeRun, name: str) -> None:
    run = make_run()
    (run / name).unlink()
    runs.read(run)
    (run / name).write_bytes(b"\xff\xfe\x00[")
    runs.read(run)
    (run / name).unlink()
    os.mkfifo(run / name)  # Nothing may wait for its other end.
    runs.read(run)


def test_a_run_that_has_just_begun_and_one_that_failed(make_run: MakeRun) -> None:
    run = make_run()
    for name in ("metrics.jsonl", "epochs.jsonl", "events.jsonl"):
        (run / name).write_text("")
    assert runs.read(run).state == "no step logged yet"
    event = {"time": "", "step": 0, "kind": "error", "details": {"error": "RunError", "message": "no memory"}}
    (run / "events.jsonl").write_text(json.dumps(event))
    assert runs.read(run).state == "ended with an error after step 0"


def test_measures_are_known_without_a_checkpoint(make_run: MakeRun) -> None:
    assert runs.read(make_run()).directions == {"knn": "max", "val_rec": "min"}


def test_what_is_no_run_is_an_error(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(UserError, match="not the directory of a run"):
            runs.read(path)
