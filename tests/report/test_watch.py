"""The live view, from the files of a run."""

from __future__ import annotations

import json

import numpy as np
import pytest

from mimae.report import watch
from tests.report.conftest import MakeRun, lines, step_record


def test_a_view_tells_progress_losses_and_events(make_run: MakeRun) -> None:
    steps = [step_record(step, epoch=step / 200) for step in range(10, 610, 10)]
    run = make_run(steps=steps)
    event = {"time": "2026-01-01T10:11:12+00:00", "step": 5, "kind": "fault", "details": {"what": "disk\x1b[31m full"}}
    (run / "events.jsonl").write_text(lines([event]))
    told, is_done = watch.view(run)
    assert not is_done
    # The recipe has 1,200 steps; each remaining step has 32 images at 200 images/s.
    assert any(line.startswith("step 600 of 1,200") and line.endswith("50%, 1:36 left") for line in told)
    (losses,) = [line for line in told if line.split()[0] == "loss"]
    assert "0.6" in losses and losses.rstrip().endswith("▁") and "█" in losses
    assert told[-1] == "10:11:12  fault  what disk\\x1b[31m full"
    (run / "events.jsonl").write_text(json.dumps(event | {"kind": "finish"}))
    assert watch.view(run)[1]


@pytest.mark.parametrize(
    "odd", [{"images_per_s": 0.0}, {"images_per_s": None}, {"samples": None}, {"epoch": None}, {"step": 0}]
)
def test_numbers_that_tell_no_time_give_none(make_run: MakeRun, odd: dict[str, object]) -> None:
    run = make_run(steps=[step_record(5) | odd])
    told, _ = watch.view(run)
    assert not any("left" in line for line in told)


@pytest.mark.parametrize(
    ("values", "drawn"),
    [
        ([0, 1, 2, 3, 4, 5, 6, 7], "▁▂▃▄▅▆▇█"),
        ([3, 3], "▁▁"),
        ([1, float("nan"), 2], "▁ █"),
        ([float("nan")], ""),
        ([], ""),
    ],
)
def test_small_curves(values: list[float], drawn: str) -> None:
    assert watch.sparkline(np.array(values, dtype=float)) == drawn


def test_a_long_curve_has_the_width_of_the_view() -> None:
    assert len(watch.sparkline(np.arange(10_000.0), 40)) == 40


def test_without_a_terminal_the_view_is_printed_once(make_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    watch.watch(make_run(), every=60)
    assert "not running" in capsys.readouterr().out
