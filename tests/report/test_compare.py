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
