"""Tests of the comparison of runs, also with a stored baseline."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import typer

from mimae.errors import UserError
from mimae.report import command, compare
from tests.report.conftest import MakeRun, step_record


def noisy(seed: int, rate: float = 200.0) -> list[dict[str, object]]:
    random = np.random.default_rng(seed)
    return [
        step_record(step, images_per_s=rate * (1 + 0.03 * random.standard_normal()), loss=1 + 0.01 * seed)
        for step in range(10, 1010, 10)
    ]


def test_runs_that_differ_in_the_seed_alone_are_one_column(make_run: MakeRun) -> None:
    ours = [make_run(f"ours{seed}", noisy(seed), overrides=(f"seed={seed}",)) for seed in range(3)]
    other = make_run("other", noisy(7), overrides=("masking.num_masks=2",))
    found = compare.contrast([compare.summary(run) for run in (*ours, other)], tolerance=0.05)
    assert [(group.name, len(group.members)) for group in found.groups] == [("ours0 (+2 seeds)", 3), ("other", 1)]
    assert found.differences == [("masking.num_masks", ["4", "2"])]
    told = compare.as_text(found)
    assert told.index("masking.num_masks") < told.index("loss at step") < told.index("images_per_s")
    assert "loss, last tenth" in told and "1.01 ± 0.01" in told
    page = compare.as_page(found)
    assert page.count('class="plot"') >= 8 and "ours0 (+2 seeds)/ours1" in page
    assert json.loads(json.dumps(compare.as_dict(found)))["differences"] == {"masking.num_masks": ["4", "2"]}


@pytest.mark.parametrize(("rate", "code"), [(200.0, 0), (194.0, 0), (180.0, 1), (300.0, 0)])
def test_the_exit_code_says_whether_a_run_is_worse_than_its_baseline(
    make_run: MakeRun, tmp_path: Path, rate: float, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    base, kept = make_run("base", noisy(0)), tmp_path / "baseline.json"
    command.compare([base], save=kept)
    now = make_run("now", noisy(0, rate))
    for baseline in (kept, base):
        with pytest.raises(typer.Exit) as ended:
            command.compare([now], baseline=baseline)
        assert ended.value.exit_code == code
        told = capsys.readouterr().out
        assert ("worse than the baseline:\n  images_per_s of now: worse by 10." in told) == bool(code)


@pytest.mark.parametrize(
    ("records", "missing"),
    [
        ([step_record(step, loss=None if step > 20 else 1.0) for step in range(1, 40)], "loss, last tenth of now"),
        ([step_record(1, images_per_s=None, loss=1.0)], "images_per_s of now"),
    ],
)
def test_a_run_without_a_figure_of_the_baseline_does_not_pass(
    make_run: MakeRun, records: list[dict[str, object]], missing: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """For example, its loss is not finite at the end, or it ended too early."""
    base = make_run("base", [step_record(step, loss=1.0) for step in range(1, 40)])
    with pytest.raises(typer.Exit) as ended:
        command.compare([make_run("now", records)], baseline=base)
    assert ended.value.exit_code == 1
    assert f"the baseline has figures that are missing here:\n  {missing}" in capsys.readouterr().out


def test_a_seed_without_a_figure_is_told(make_run: MakeRun) -> None:
    runs = [make_run(f"ours{seed}", noisy(seed), overrides=(f"seed={seed}",)) for seed in range(2)]
    lost = make_run("ours2", [step_record(step, loss=None) for step in range(1, 40)], overrides=("seed=2",))
    found = compare.contrast([compare.summary(run) for run in (*runs, lost)], tolerance=0.05)
    assert "(2 of 3 runs)" in compare.as_text(found)
    found = compare.contrast([compare.summary(lost)], [compare.summary(run) for run in runs], tolerance=0.05)
    assert found.missing == [("ours2", "loss, last tenth")]


def test_a_run_counts_once_and_unknown_recipes_are_not_equal(make_run: MakeRun) -> None:
    runs = [make_run(f"run{i}") for i in range(2)]
    with pytest.raises(UserError, match="run0 is named twice"):
        command.compare([runs[0], runs[0].parent / "." / "run0"])
    for run in runs:
        (run / "config.yaml").write_text("model: [")
    found = compare.contrast([compare.summary(run) for run in runs], tolerance=0.05)
    assert [group.name for group in found.groups] == ["run0", "run1"]
    assert "The recipe of run1 cannot be read." in compare.as_text(found)
    assert "The recipe of run1 cannot be read." in compare.as_page(found)


def test_a_baseline_has_figures_and_a_recipe(make_run: MakeRun, tmp_path: Path) -> None:
    run, young, file = make_run(), make_run("young"), tmp_path / "baseline.json"
    for name in ("metrics.jsonl", "epochs.jsonl"):
        (young / name).write_text("")
    file.write_text('{"baseline": []}')
    for baseline in (file, young):
        with pytest.raises(UserError, match="has no figures"):
            command.compare([run], baseline=baseline)
    with pytest.raises(UserError, match="young has no figure yet"):
        command.compare([young], save=file)
    (run / "config.yaml").write_text("model: [")
    with pytest.raises(UserError, match="run has no recipe that can be read"):
        command.compare([run], save=file)


def test_what_is_no_baseline_is_an_error_in_words(make_run: MakeRun, tmp_path: Path) -> None:
    run, file = make_run(), tmp_path / "baseline.json"
    for content in ("", "[]", '{"baseline": [{"name": 1}]}', '{"baseline": [[]]}'):
        file.write_text(content)
        with pytest.raises(UserError, match="is not a baseline"):
            command.compare([run], baseline=file)
    with pytest.raises(UserError, match="cannot be read: No such file"):
        command.compare([run], baseline=tmp_path / "none.json")
    other = make_run("other", overrides=("masking.num_masks=2",))
    with pytest.raises(UserError, match=r"differ in masking\.num_masks"):
        command.compare([run, other], save=file)
    with pytest.raises(UserError, match="cannot be written"):
        command.compare([run], save=tmp_path / "none/baseline.json")
