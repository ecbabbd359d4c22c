"""Tests of the command that makes the table of controls: which trials it runs, skips and writes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from PIL import Image

from mimae.bench.controls import command
from mimae.bench.controls.page import load_results, render
from mimae.bench.controls.running import Processes, Stopped, finished, record, run_trials
from mimae.bench.controls.time_to import checks_of, curve, reached
from mimae.bench.controls.trials import (
    CONTROLS,
    RECIPES,
    Result,
    Trial,
    control_trials,
    hold_out,
    make_trial,
    parse_data,
    tuning_trials,
)
from mimae.config.load import load_recipe
from mimae.config.printing import as_yaml
from mimae.config.recipe import Recipe
from mimae.data.sources.open import open_source
from mimae.errors import UserError
from mimae.evaluate.probe import MEASURES

ROOT = Path(__file__).parents[3]


def trial(name: str, settings: dict[str, Any] | None = None, kind: str = "mi_mae", seed: int = 0) -> Trial:
    given = settings or {"schedule.batch_size": 32}
    return Trial(name, "photos", kind, seed, "quickstart", ["masking.ratio=0.5"], ["data.path=x"], 128, given)


def result(linear: float, few: float, knn: float, seconds: float = 60.0) -> Result:
    scores = {"linear": linear, "few_labels": few, "knn": knn}
    return {
        "threads": 1,
        "seconds": seconds,
        "last_epoch": {"step": 1200, "rec": 0.5, "deviation": 0.25},
        "probe": {
            "train_images": 6400,
            "test_images": 1600,
            "classes": 16,
            "few_labels": 200,
            "features": {
                "raw pixels": {"linear": 0.47, "few_labels": 0.4, "knn": 0.38},
                "random encoder": {"linear": 0.7, "few_labels": 0.6, "knn": 0.65},
                "this run": scores,
            },
        },
    }


# Which trials


@pytest.mark.parametrize("data", ["photos", "cifar"])
def test_the_controls_differ_in_what_their_names_say_and_see_equal_views(data: str, tmp_path: Path) -> None:
    """Check that the shipped recipes, which anyone may edit, give equal runs; unequal runs cannot be compared."""
    for split in ("train", "test"):
        (tmp_path / split / "one").mkdir(parents=True)
        (tmp_path / split / "one" / "image.png").touch()
    name, paths = parse_data(data)
    samples = {"photos": 6400, "cifar": 9000}[data]
    made = {
        kind: make_trial(kind, name, kind, RECIPES[name] + control.suffix, [], paths, samples, 0)
        for kind, control in CONTROLS.items()
    }
    assert len({trial.views for trial in made.values()}) == 1
    terms = {kind: trial.settings for kind, trial in made.items()}
    assert terms["mae"]["masking.num_masks"] == 1
    assert terms["independent"]["masking.kind"] == "independent"
    for kind in ("mae", "independent", "orthogonal"):
        assert terms[kind]["objective.max_mi"] == terms[kind]["objective.min_mi"] == 0
    assert terms["max_mi"]["objective.max_mi"] > 0 == terms["max_mi"]["objective.min_mi"]
    assert terms["mi_mae"]["objective.min_mi"] > 0
    schedule = {"schedule.batch_size", "schedule.epochs", "schedule.warmup_epochs", "schedule.warmup_from_zero"}
    own = {"masking.rounding", "model.patch_bias", "optimizer.decay_tokens"}
    allowed = {
        "mae": {"masking.num_masks", "objective.max_mi", "objective.min_mi", *schedule, *own},
        "independent": {"masking.kind", "objective.max_mi", "objective.min_mi"},
        "orthogonal": {"objective.max_mi", "objective.min_mi"},
        "max_mi": {"objective.min_mi"},
    }
    for kind, keys in allowed.items():
        assert {key for key, value in terms[kind].items() if value != terms["mi_mae"][key]} <= keys


def test_a_choice_differs_in_what_it_says_and_runs_as_long_as_it_says(tmp_path: Path) -> None:
    """Give a trial of equal time more steps and one schedule over all of them: 60 steps, 10 batches of 32 per epoch."""
    folder = folder_of_images(tmp_path / "train", 160)
    controls_only = {kind: row for kind, row in CONTROLS.items() if kind == "mi_mae"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mimae.bench.controls.trials.CONTROLS", controls_only)
        made = {trial.name: trial for trial in control_trials(f"photos={folder}:{folder}") if trial.seed == 2}
    steps = {name: trial.views // (32 * 4) for name, trial in made.items()}
    assert steps == {
        "photos-mi_mae-2": 60,
        "photos-next_view-2": 60,
        "photos-next_view_long-2": 78,
        "photos-fast-2": 60,
        "photos-cross-2": 60,
        "photos-cross_long-2": 67,
        "photos-heads_64-2": 60,
        "photos-bf16-2": 60,
        "photos-residual-2": 60,
    }
    default = made["photos-mi_mae-2"].settings
    for kind, key in (("next_view", "decoder.predict"), ("cross", "decoder.attention")):
        differing = {k for k, v in made[f"photos-{kind}-2"].settings.items() if v != default[k]}
        longer = {k for k, v in made[f"photos-{kind}_long-2"].settings.items() if v != default[k]}
        assert differing == {key}
        assert longer == {key, "schedule.max_steps", "schedule.epochs"}
    fast = {k for k, v in made["photos-fast-2"].settings.items() if v != default[k]}
    assert fast == {"decoder.predict", "schedule.resolution"}
    overridden = {"heads_64": {"decoder.heads"}, "bf16": {"precision"}, "residual": {"precision", "model.residual"}}
    for kind, keys in overridden.items():
        assert {k for k, v in made[f"photos-{kind}-2"].settings.items() if v != default[k]} == keys


def test_the_choices_have_a_table_of_their_own_beside_the_default() -> None:
    rows = written([("mi_mae", 0, result(0.5, 0.3, 0.4)), ("next_view", 0, result(0.6, 0.35, 0.45))])
    page = render(rows, [])
    assert "| `decoder.predict=next_view` | 1,200 | 1 | 0.600 | 0.350 | 0.450 | 0.500 | 1.0 |" in page
    assert page.count("| 6. control 5 + L_min: MI-MAE | 1 | 0.500 |") == 1
    alone = render(rows[:1], [])
    assert "Variants with less work" not in alone


def epochs_of(flops: list[float], seconds: list[float]) -> list[dict[str, Any]]:
    """Return the epochs.jsonl of a run of 100 steps an epoch."""
    rows = zip(flops, seconds, strict=True)
    return [{"step": 100 * i, "tflops": each / 1e12 / took, "seconds": took} for i, (each, took) in enumerate(rows, 1)]


def checked(kind: str, scores: list[tuple[float, float, float]], flops: float = 1e12) -> tuple[str, int, Result]:
    """Return a trial of 100 steps between two probes, each of which takes `flops`, and 10 CPU seconds in all.

    The scores are those of the linear probe, of few labels and of neighbours.
    """
    checks = checks_of(epochs_of([flops] * len(scores), [2.0] * len(scores)), 1)
    probes = [check | dict(zip(MEASURES, row, strict=True)) for check, row in zip(checks, scores, strict=True)]
    return kind, 0, result(0.5, 0.3, 0.4) | {"cpu_seconds": 10.0, "probes": probes}


def test_the_checks_of_a_run_are_its_multiples_and_its_end() -> None:
    """Count the FLOPs and the seconds of all steps before a check, also of epochs that cost more than others."""
    checks = checks_of(epochs_of([1e12, 2e12, 4e12, 8e12, 16e12], [1.0, 2.0, 4.0, 8.0, 16.0]), 2)
    assert checks == [
        {"step": 200, "flops": pytest.approx(3e12), "seconds": 3.0},
        {"step": 400, "flops": pytest.approx(15e12), "seconds": 15.0},
        {"step": 500, "flops": pytest.approx(31e12), "seconds": 31.0},
    ]


def costs(kind: str, scores: list[tuple[float, float, float]], measure: str, level: float) -> Any:
    return reached(curve([checked(kind, scores, flops=3e12)[2]]), measure, level)


def test_the_time_to_an_accuracy_is_interpolated_between_two_probes() -> None:
    rising = [(0.2, 0.1, 0.0), (0.4, 0.2, 0.0), (0.4, 0.2, 0.0), (0.6, 0.1, 0.0)]
    assert costs("mi_mae", rising, "linear", 0.3) == pytest.approx((150, 4.5e12, 3.75))
    assert costs("mi_mae", rising, "linear", 0.2) == pytest.approx((100, 3e12, 2.5)), "no probe is below it"
    assert costs("mi_mae", rising, "linear", 0.61) is None
    assert costs("mi_mae", rising, "few_labels", 0.2) is None, "it is lost again before the end"
    assert costs("mi_mae", rising, "knn", 0.3) is None


def test_an_accuracy_counts_from_where_it_is_kept() -> None:
    noisy = [(0.5,) * 3, (0.7,) * 3, (0.5,) * 3, (0.7,) * 3]
    assert costs("mae", noisy, "linear", 0.6) == pytest.approx((350, 10.5e12, 8.75))


def test_seeds_are_averaged_before_a_level_is_looked_for() -> None:
    """Neither leave a seed out that never reaches the level, nor one that an interruption kept from being timed."""
    good, bad = (checked("mae", scores)[2] for scores in ([(0.4,) * 3, (0.8,) * 3], [(0.2,) * 3, (0.4,) * 3]))
    assert reached(curve([good, bad]), "linear", 0.45) == pytest.approx((150, 1.5e12, 7.5))
    assert reached(curve([good]), "linear", 0.45) == pytest.approx((112.5, 1.125e12, 5.625))
    interrupted = bad | {"cpu_seconds": None}
    assert reached(curve([good, interrupted]), "linear", 0.45) == pytest.approx((150, 1.5e12, 7.5))
    assert reached(curve([interrupted]), "linear", 0.4) == (200, 2e12, None)


def test_the_cpu_seconds_of_a_run_whose_images_grow_follow_its_epochs() -> None:
    checks = checks_of(epochs_of([1e12, 9e12], [1.0, 9.0]), 1)
    probes = [check | dict.fromkeys(MEASURES, score) for check, score in zip(checks, (0.5, 0.6), strict=True)]
    points = curve([{"cpu_seconds": 20.0, "probes": probes}])
    assert reached(points, "linear", 0.5) == pytest.approx((100, 1e12, 2.0))
    assert reached(points, "linear", 0.55) == pytest.approx((150, 5.5e12, 11.0))


def test_the_time_to_each_of_maes_final_accuracies_is_a_table() -> None:
    trials = [
        checked("mae", [(0.2, 0.1, 0.1), (0.3, 0.2, 0.2), (0.4, 0.3, 0.2)]),
        checked("mi_mae", [(0.3, 0.4, 0.1), (0.5, 0.4, 0.1), (0.6, 0.4, 0.1)], 0.5e12),
        checked("orthogonal", [(0.1, 0.1, 0.2)]),
    ]
    page = render(written(trials), [])
    linear, few, knn = (part.partition(" ")[0] for part in page.split(": MAE's ")[1:])
    assert (linear, few, knn) == ("0.400", "0.300", "0.200")
    assert "| 6. control 5 + L_min: MI-MAE | 1 | 0.600 | 150 | 0.25 | 5 |" in page
    assert "| 6. control 5 + L_min: MI-MAE | 1 | 0.400 | ≤ 100 | ≤ 0.17 | ≤ 3 |" in page
    assert "| 6. control 5 + L_min: MI-MAE | 1 | 0.100 | not reached |  |  |" in page
    assert "| 2. MAE: one mask, N times the images | 1 | 0.200 | 200 | 0.67 | 7 |" in page
    assert "Time to" not in render(written([("mi_mae", 0, result(0.5, 0.3, 0.4))]), [])


def test_the_seeds_of_the_claim_are_three() -> None:
    assert {kind: len(control.seeds) for kind, control in CONTROLS.items()} == {
        "mae": 3, "independent": 1, "orthogonal": 3, "max_mi": 1, "mi_mae": 3,
    }  # fmt: skip


@pytest.mark.parametrize("data", ["flowers", "cifar=only", "cifar=a:b:c", "cifar=:b"])
def test_what_is_no_data_set_is_told(data: str) -> None:
    with pytest.raises(UserError, match=r"legal is NAME or NAME=TRAIN:TEST"):
        parse_data(data)


def folder_of_images(folder: Path, per_class: int) -> Path:
    noise = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for i in range(per_class):
            Image.fromarray(noise.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / name / f"{i}.png")
    return folder


def test_unequal_views_are_refused(tmp_path: Path) -> None:
    """Use 300 images, 9 batches of 32 or 2 of 128 per epoch: MAE's larger number of epochs cannot balance its batch."""
    folder = folder_of_images(tmp_path / "train", 150)
    with pytest.raises(UserError, match=r"different numbers of views \(quickstart_mae: 6,144"):
        control_trials(f"photos={folder}:{folder}")


def test_a_split_holds_out_a_fifth_of_each_class_and_loses_nothing(tmp_path: Path) -> None:
    source = open_source(str(folder_of_images(tmp_path / "train", 10)))
    overrides = hold_out(source, tmp_path / "split")
    train, held = (open_source(override.partition("=")[2]) for override in overrides)
    assert train.labels is not None and held.labels is not None
    assert np.bincount(train.labels).tolist() == [8, 8] and np.bincount(held.labels).tolist() == [2, 2]
    paths = [part.path(i) for part in (train, held) for i in range(len(part))]
    assert sorted(paths) == [source.path(i) for i in range(20)]
    assert all(Path(path).parent.name == ("cat", "dog")[train.labels[i]] for i, path in enumerate(paths[:16]))
    assert hold_out(source, tmp_path / "again")[0].endswith("again/train.tsv")
    assert (tmp_path / "again/held.tsv").read_text() == (tmp_path / "split/held.tsv").read_text()


def test_trials_of_a_tuning_train_on_the_split_and_never_see_the_test_set(tmp_path: Path) -> None:
    folder = folder_of_images(tmp_path / "train", 200)
    listed = tmp_path / "trials.yaml"
    listed.write_text(
        "recipe: cifar10\noverrides: [schedule.epochs=3]\n"
        "trials:\n  a: {seeds: [0, 1], overrides: []}\n  b: {seeds: [0], overrides: [objective.min_mi=0.5]}\n"
    )
    trials = tuning_trials(listed, f"cifar={folder}:{tmp_path / 'test'}", tmp_path / "runs")
    assert [trial.name for trial in trials] == ["cifar-a-0", "cifar-a-1", "cifar-b-0"]
    assert trials[2].settings["objective.min_mi"] == 0.5 and trials[1].settings["seed"] == 1
    assert all("test" not in path.partition("=")[2].removeprefix(str(tmp_path)) for path in trials[0].paths)
    assert trials[0].views == 3 * (320 // 64) * 64 * 4
    listed.write_text("recipe: cifar10\n")
    with pytest.raises(UserError, match=r"trials.yaml is not a list of trials"):
        tuning_trials(listed, f"cifar={folder}:{folder}", tmp_path / "runs")


def test_the_shipped_list_of_trials_is_legal_and_not_longer_than_planned(tmp_path: Path) -> None:
    folder = folder_of_images(tmp_path / "train", 200)
    trials = tuning_trials(ROOT / "bench/controls/tuning.yaml", f"cifar={folder}:{folder}", tmp_path / "runs")
    assert 2 <= len({trial.name for trial in trials}) == len(trials) <= 24


# Running them


def test_a_finished_trial_is_not_run_again(tmp_path: Path) -> None:
    trials, ran = [trial("a"), trial("b"), trial("c")], []

    def runner(trial: Trial, run: Path) -> Result:
        ran.append((trial.name, run))
        return result(0.8, 0.7, 0.75)

    run_trials(trials[:2], tmp_path / "out", tmp_path / "runs", 1, runner)
    run_trials(trials, tmp_path / "out", tmp_path / "runs", 2, runner)
    assert ran == [(name, tmp_path / "runs" / name) for name in "abc"]
    written = json.loads((tmp_path / "out" / "a.json").read_text())
    assert written["overrides"] == ["masking.ratio=0.5"] and written["probe"]["features"]["this run"]["knn"] == 0.75
    assert {"date", "machine", "versions", "seed", "settings"} <= written.keys()
    assert "data.path" not in json.dumps(written), "the places of one machine are no part of a result"


def test_an_interrupted_trial_leaves_no_result_and_is_run_again(tmp_path: Path) -> None:
    def stop_at_b(trial: Trial, run: Path) -> Result:
        if trial.name == "b":
            raise Stopped
        return result(0.8, 0.7, 0.75)

    trials = [trial("a"), trial("b")]
    with pytest.raises(Stopped):
        run_trials(trials, tmp_path / "out", tmp_path, 2, stop_at_b)
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["a.json"]
    run_trials(trials, tmp_path / "out", tmp_path, 2, lambda trial, run: result(0.8, 0.7, 0.75))
    assert (tmp_path / "out" / "b.json").exists()


def test_a_trial_that_fails_is_told_and_does_not_stop_the_others(tmp_path: Path) -> None:
    def fail_at_a(trial: Trial, run: Path) -> Result:
        if trial.name == "a":
            raise UserError("no memory")
        return result(0.8, 0.7, 0.75)

    with pytest.raises(UserError, match=r"1 of 2 trials failed:\na: no memory"):
        run_trials([trial("a"), trial("b")], tmp_path / "out", tmp_path, 1, fail_at_a)
    assert (tmp_path / "out" / "b.json").exists()


def test_a_result_of_other_settings_is_not_taken_for_this_trials(tmp_path: Path) -> None:
    def runner(trial: Trial, run: Path) -> Result:
        return result(0.8, 0.7, 0.75)

    run_trials([trial("a", {"masking.ratio": 0.5})], tmp_path, tmp_path / "runs", 1, runner)
    with pytest.raises(UserError, match=r"a\.json is the result of other settings: masking.ratio was 0\.5, is 0\.6"):
        run_trials([trial("a", {"masking.ratio": 0.6})], tmp_path, tmp_path / "runs", 1, runner)


def test_a_result_that_is_older_than_a_key_has_its_default(tmp_path: Path) -> None:
    run_trials([trial("a")], tmp_path, tmp_path / "runs", 1, lambda trial, run: result(0.8, 0.7, 0.75))
    assert finished(trial("a", {"masking.rounding": "nearest"}), tmp_path)
    with pytest.raises(UserError, match=r"masking.rounding was 'nearest', is 'down'"):
        finished(trial("a", {"masking.rounding": "down"}), tmp_path)
    with pytest.raises(UserError, match=r"probe.tolerance was None, is 1e-06"):
        finished(trial("a", {"probe.tolerance": 1e-6}), tmp_path)


@pytest.fixture
def verbs(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Replace the commands that a runner starts with Python code."""
    real = subprocess.Popen

    def replace(code: str) -> None:
        def start(arguments: list[str], **options: Any) -> subprocess.Popen[bytes]:
            return real([sys.executable, "-c", code, *arguments[3:]], **options)

        monkeypatch.setattr(subprocess, "Popen", start)

    return replace


def test_a_failed_process_is_told_by_the_end_of_its_log(tmp_path: Path, verbs: Callable[[str], None]) -> None:
    verbs("import sys; print(*range(9), sep='\\n'); sys.exit('verb ' + sys.argv[1])")
    with pytest.raises(UserError) as failure:
        Processes(threads=1)(trial("a"), tmp_path / "runs" / "a")
    assert str(failure.value) == f"exit code 1, the end of {tmp_path}/runs/a.log:\n  7\n  8\n  verb pretrain"


def test_a_run_of_other_settings_is_not_judged(tmp_path: Path, verbs: Callable[[str], None]) -> None:
    """Continue a run that is older than a settings key: `mimae pretrain` keeps its recipe as it was."""
    verbs("")
    (tmp_path / "a").mkdir()
    every = Recipe().schedule.batch_size // load_recipe(RECIPES["photos"]).recipe.schedule.batch_size
    kept = load_recipe({"checkpoint": {"every_epochs": every}}).recipe
    (tmp_path / "a" / "config.yaml").write_text(as_yaml(kept, without=["masking.rounding"]))
    trained = {"schedule.batch_size": Recipe().schedule.batch_size, "data.loader": "auto", "probe.tolerance": 1e-6}
    older = trial("a", {"masking.rounding": "down", **trained})
    with pytest.raises(UserError, match=r"trained with other settings: masking.rounding was 'nearest', is 'down'"):
        Processes(threads=1)(older, tmp_path / "a")


def test_a_run_without_the_checkpoints_on_its_way_is_told_before_it_is_trained_on(
    tmp_path: Path, verbs: Callable[[str], None]
) -> None:
    verbs("import sys; sys.exit('it began')")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.yaml").write_text(as_yaml(Recipe()))
    with pytest.raises(UserError, match=r"a did not keep the checkpoints of every 1 epochs. Remove it to train it aga"):
        Processes(threads=1)(trial("a"), tmp_path / "a")


def test_a_signal_ends_what_runs_and_lets_nothing_new_start(tmp_path: Path, verbs: Callable[[str], None]) -> None:
    started = tmp_path / "started"
    verbs(f"import pathlib, time; pathlib.Path({str(started)!r}).touch(); time.sleep(60)")
    runner, errors = Processes(threads=1), []

    def run() -> None:
        try:
            runner(trial("a"), tmp_path / "a")
        except Stopped as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    deadline = time.monotonic() + 30
    while not started.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    runner.stop(signal.SIGTERM, None)
    thread.join(30)
    assert not thread.is_alive() and len(errors) == 1
    started.unlink()
    with pytest.raises(Stopped):
        runner(trial("b"), tmp_path / "b")
    assert not started.exists()


# The table


def written(rows: list[tuple[str, int, Result]]) -> list[Result]:
    """Write results as the runner does: untrained features are probed with only one control."""
    for kind, _, row in rows:
        if kind != "mi_mae":
            features = row["probe"]["features"]
            row["probe"]["features"] = {"this run": features["this run"]}
    return [record(trial(f"photos-{kind}-{seed}", kind=kind, seed=seed), row) for kind, seed, row in rows]


def test_the_table_has_means_and_spreads_over_seeds() -> None:
    rows = written(
        [
            ("orthogonal", 0, result(0.80, 0.70, 0.75)),
            ("orthogonal", 1, result(0.82, 0.71, 0.77, seconds=120.0)),
            ("mi_mae", 0, result(0.83, 0.70, 0.70)),
            ("mi_mae", 1, result(0.85, 0.73, 0.72)),
            ("max_mi", 0, result(0.79, 0.72, 0.78)),
        ]
    )
    lines = render(rows, []).splitlines()
    means = "| 4. N orthogonal masks, no MI | 2 | 0.810 ± 0.014 | 0.705 ± 0.007 | 0.760 ± 0.014 | 0.500 ± 0.000 | 1.5 |"
    assert means in lines
    assert any(line.startswith("| 5. control 4 + L_max | 1 | 0.790 | 0.720 | 0.780 |") for line in lines)
    assert any(line.startswith("| 1. raw pixels | 1 | 0.470 | 0.400 | 0.380 |") for line in lines)
    assert any(line.startswith("| 1. random encoder | 2 | 0.700 ± 0.000 |") for line in lines)
    # 0.83 and 0.85 are both above 0.80 and 0.82. 0.70 and 0.73 are not both above 0.70 and 0.71; 0.70, 0.72 are below.
    assert (
        "| 4. N orthogonal masks, no MI | 2 | +0.030 ± 0.000, clear | +0.010 ± 0.014 | -0.050 ± 0.000, clear |" in lines
    )
    assert not any(line.startswith("| 2. MAE") for line in lines), "a control that did not run has no row"


def test_results_of_earlier_versions_are_told_from_those_of_now() -> None:
    now = {"masking.rounding": "down", "probe.tolerance": 1e-6}
    new, old = ([record(trial("a", s, "mae"), result(0.5, 0.3, 0.4))] for s in (now, {}))
    for early in (render(old, new), render(new, old)):
        assert early.count("were not fitted to convergence") == 1
    assert "with four rules that differ from MAE's code" in render(old, new)
    assert "four rules" not in render(new, old) and "fitted" not in render(new, new)


def test_every_trial_of_a_tuning_is_listed_with_its_overrides() -> None:
    page = render([], written([("a", 0, result(0.5, 0.3, 0.4)), ("b", 0, result(0.6, 0.35, 0.45))]))
    assert "2 runs" in page
    assert "| photos | a | quickstart `masking.ratio=0.5` | 1 | 0.500 | 0.300 | 0.400 | 0.250 |" in page
    assert "| photos | b |" in page


def test_a_latent_whose_deviation_was_not_finite_has_an_empty_cell() -> None:
    broken = result(0.5, 0.3, 0.4)
    broken["last_epoch"]["deviation"] = None
    assert "| 0.400 |  |" in render([], written([("a", 0, broken)]))


def test_the_page_in_the_documentation_is_what_its_files_render_to() -> None:
    results = ROOT / "bench/results"
    page = render(load_results(results / "controls"), load_results(results / "tuning"))
    assert (ROOT / "docs/controls.md").read_text(encoding="utf-8") == page, "run `mimae bench controls --render`"


# Whole


@pytest.mark.slow
def test_a_trial_from_its_recipe_to_its_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the real processes for five epochs of a step; the second call finds everything done.

    Twice the recipe's batch is probed half as often: after epochs 2 and 4, and at the end.
    """
    folder = folder_of_images(tmp_path / "images", 40)
    short = ["schedule.max_steps=5", "data.image_size=8", "model.patch_size=2", "schedule.batch_size=64"]
    paths = [f"data.path={folder}", f"data.val_path={folder}"]
    made = make_trial("photos-mi_mae-1", "photos", "mi_mae", "quickstart", short, paths, 80, 1)
    monkeypatch.setattr("mimae.bench.controls.trials.control_trials", lambda data: [made])
    results, runs, docs = tmp_path / "results", tmp_path / "runs", tmp_path / "docs/controls.md"

    def run() -> None:
        command.controls(data=["photos"], threads=1, jobs=1, results=results, runs=runs, docs=docs)

    run()
    file = results / "controls/photos-mi_mae-1.json"
    row = json.loads(file.read_text())
    assert [probe["step"] for probe in row["probes"]] == [2, 4, 5]
    assert row["last_epoch"]["step"] == 5 and row["views"] == 5 * 64 * 4
    assert row["probe"]["features"]["this run"]["linear"] == row["probes"][-1]["linear"]
    assert {file.name for file in (runs / "photos-mi_mae-1").glob("probe*.json")} == {
        *("probe-step-00000002.json", "probe-step-00000004.json", "probe.json")
    }
    assert 0 <= row["probe"]["features"]["this run"]["linear"] <= 1
    assert str(tmp_path) not in file.read_text()
    assert load_recipe(tmp_path / "runs/photos-mi_mae-1/config.yaml").recipe.seed == 1
    assert "| 6. control 5 + L_min: MI-MAE | 1 |" in docs.read_text()
    assert "| 1. raw pixels | 1 |" in docs.read_text()
    monkeypatch.setattr(Processes, "__call__", lambda *_: pytest.fail("the trial has its result"))
    run()

    def stop(self: Processes, trial: Trial, run: Path) -> Result:
        raise Stopped

    file.unlink()
    monkeypatch.setattr(Processes, "__call__", stop)
    with pytest.raises(typer.Exit) as ended:
        run()
    assert ended.value.exit_code == 75
