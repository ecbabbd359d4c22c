"""Tests of the rule for regressions: it detects real changes, and ignores noise."""

from __future__ import annotations

import numpy as np
import pytest

from mimae.report import runs
from mimae.report.figures import _T95, Figure, compare, figures
from tests.report.conftest import MakeRun, lines, step_record


def rates(random: np.random.Generator, mean: float, noise: float) -> Figure:
    """Return the figure images/s of a run whose segments have the given noise."""
    return Figure(mean, "max", (mean * (1 + noise * random.standard_normal(20))).tolist())


@pytest.mark.parametrize("runs_of_each", [1, 3, 8])
def test_a_tenth_is_caught_and_noise_of_three_percent_is_not(runs_of_each: int) -> None:
    """Check seeded series. Every record has 3 % noise. With several runs, each run has a 3 % offset too, because a
    machine's speed differs from one start to the next."""
    random = np.random.default_rng(1)
    caught = false = 0
    for _ in range(300):
        between = 0.03 if runs_of_each > 1 else 0.0

        def side(mean: float, between: float = between) -> list[Figure]:
            each = mean * (1 + between * random.standard_normal(runs_of_each))
            return [rates(random, value * (1 + 0.03 * random.standard_normal() / 20**0.5), 0.03) for value in each]

        before = side(200.0)
        caught += compare(before, side(180.0)).is_regression
        false += compare(before, side(200.0)).is_regression
    # With a 3 % offset per run, three runs of each cannot decide more reliably; one run has noisy records only.
    assert caught >= {1: 300, 3: 285, 8: 300}[runs_of_each]
    assert false <= {1: 0, 3: 6, 8: 0}[runs_of_each]


def test_a_change_is_a_share_of_the_reference_and_knows_its_direction() -> None:
    slower = compare([Figure(200.0, "max", [])], [Figure(180.0, "max", [])])
    assert slower.worse == pytest.approx(0.1) and slower.is_regression
    heavier = compare([Figure(200.0, "min", [])], [Figure(220.0, "min", [])])
    assert heavier.worse == pytest.approx(0.1) and heavier.is_regression
    assert compare([Figure(200.0, "max", [])], [Figure(300.0, "max", [])]).worse == pytest.approx(-0.5)
    assert compare([Figure(-1.0, "min", [])], [Figure(-0.8, "min", [])]).worse == pytest.approx(0.2)
    assert not compare([Figure(0.0, "min", [])], [Figure(0.0, "min", [])]).is_regression


def test_a_change_within_the_spread_of_seeds_is_none() -> None:
    before = [Figure(value, "min", []) for value in (1.0, 1.2, 0.8)]
    after = [Figure(value, "min", []) for value in (1.1, 1.3, 0.9)]
    change = compare(before, after)
    assert change.worse > 0.09 and not change.is_regression and change.by == "3 and 3 runs"
    lone = compare(before, [Figure(1.1, "min", [])])
    assert lone.error > change.error, "one run says less than three"


def test_the_error_is_student_s() -> None:
    stats = pytest.importorskip("scipy.stats")
    assert pytest.approx(stats.t.ppf(0.95, np.arange(1, 21)), abs=6e-4) == _T95
    before, after = [1.0, 1.1, 0.95, 1.02], [1.2, 1.5, 1.1]
    change = compare([Figure(v, "min", []) for v in before], [Figure(v, "min", []) for v in after])
    tested = stats.ttest_ind(np.log(after), np.log(before), equal_var=True)
    standard = (np.log(after).mean() - np.log(before).mean()) / tested.statistic
    assert change.error == pytest.approx(stats.t.ppf(0.95, tested.df) * standard, rel=1e-3)


def test_the_start_of_a_process_is_no_throughput(make_run: MakeRun) -> None:
    """The first record after a start or a resume includes the time of starting."""
    steps = [step_record(step, images_per_s=1.0 if step in (1, 60) else 200.0) for step in (1, *range(10, 200, 10))]
    run = make_run(steps=steps)
    kinds = [{"kind": "start", "step": 0, "details": {}}, {"kind": "resume", "step": 55, "details": {}}]
    (run / "events.jsonl").write_text(lines(kinds))
    found = figures(runs.read(run))
    assert found["images_per_s"].stretches == [200.0] * 18
    assert found["mem_peak_bytes"].value == 2**30 and found["loss, last tenth"].better == "min"
