"""Tests of extending a run: past steps do not change, and the learning rate continues from its current value."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import typer
import yaml
from torch import Tensor

from mimae.config.load import load_recipe
from mimae.data.loading.batch import Batch
from mimae.errors import CheckpointError, RunError, UserError
from mimae.launch.command import extend
from mimae.optim.schedule import extended, schedule_factor, total_steps
from mimae.optim.settings import ScheduleSettings
from mimae.outside.files import Folder
from mimae.telemetry import events
from mimae.train.tasks.pretrain import Pretrain, pretrain
from tests.train.test_trainer import assert_bit_equal, images, lines, recipe, tensors  # noqa: F401

PER_EPOCH = 3


def rates(schedule: ScheduleSettings, first: int = 0) -> list[float]:
    steps = range(first, total_steps(schedule, PER_EPOCH))
    return [schedule_factor(schedule, step, PER_EPOCH, 1.0) for step in steps]


def longer(schedule: ScheduleSettings, step: int, **changes: object) -> ScheduleSettings:
    new = ScheduleSettings.model_validate(schedule.model_dump() | changes)
    return extended(schedule, new, step, PER_EPOCH, 1.0)


@pytest.mark.parametrize("step", [1, 4, 6], ids=["inside the warm-up", "after it", "finished"])
@pytest.mark.parametrize(
    "shape", [{"shape": "constant"}, {"shape": "steps", "drop_epochs": (1.5, 3.0)}], ids=["constant", "steps"]
)
def test_a_rate_that_does_not_depend_on_the_end_stays_as_it_was(shape: dict[str, object], step: int) -> None:
    short = ScheduleSettings.model_validate({"epochs": 2, "warmup_epochs": 1, **shape})
    long = ScheduleSettings.model_validate({"epochs": 4, "warmup_epochs": 1, **shape})
    assert rates(longer(short, step, epochs=4)) == rates(long)


def test_a_cosine_goes_on_from_where_it_is() -> None:
    short = ScheduleSettings(epochs=2, warmup_epochs=1, floor=0.1)
    found = longer(short, 6, epochs=5)
    after = rates(found, 6)
    assert found.extended == ((6, pytest.approx(0.1), "schedule.epochs=2 until step 6"),)
    assert after[:3] == pytest.approx([0.1 + 0.9 / 3, 0.1 + 0.9 * 2 / 3, 1.0]), "it rises for one epoch"
    assert after[3] == 1.0 and all(a > b for a, b in pairwise(after[3:]))
    assert schedule_factor(found, total_steps(found, PER_EPOCH), PER_EPOCH, 1.0) == pytest.approx(0.1)
    at_once = rates(longer(short, 6, epochs=5, warmup_epochs=0), 6)
    assert at_once[0] == 1.0
    twice = longer(found, 15, epochs=6)
    assert len(twice.extended) == 2 and rates(twice, 15)[0] == pytest.approx(0.1 + 0.9 / 3)


def test_inside_the_warm_up_the_end_moves_and_nothing_else() -> None:
    short, long = (ScheduleSettings(epochs=epochs, warmup_epochs=1) for epochs in (2, 4))
    assert rates(longer(short, 2, epochs=4)) == rates(long)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Record the ids and masks of the micro-batches used in training."""
    taken: list[tuple[Tensor, Tensor]] = []
    inputs = Pretrain.inputs

    def note(self: Pretrain, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        found = inputs(self, batch)
        taken.append((torch.as_tensor(batch.sample_ids), found[1]))
        return found

    monkeypatch.setattr(Pretrain, "inputs", note)
    yield taken


QUIET = ("telemetry.probe_every_epochs=0", "telemetry.images_every_epochs=0", "data.val_path=null")


def by_command(run: Path, *overrides: str) -> None:
    with pytest.raises(typer.Exit) as ended:
        extend(run, list(overrides), ranks=1)
    assert ended.value.exit_code == 0


def test_a_constant_run_that_is_extended_is_the_longer_run_bit_for_bit(
    images: Path,  # noqa: F811
    tmp_path: Path,
    seen: list[tuple[Tensor, Tensor]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    way = (*QUIET, "schedule.shape=constant")
    long, run = tmp_path / "long", tmp_path / "run"
    pretrain(recipe(images, long, *way, "schedule.epochs=4"))
    expected = list(seen)
    seen.clear()
    pretrain(recipe(images, run, *way, "schedule.epochs=2"))
    with pytest.raises(RunError, match=rf"mimae extend {run} schedule.epochs=4"):
        pretrain(recipe(images, run, *way, "schedule.epochs=4"))
    with pytest.raises(RunError, match=r"is at step 6, and with schedule\.epochs=1 it would end at step 3"):
        extend(run, ["schedule.epochs=1"], ranks=1)
    for key in (f"run.dir={long}", "run.extend=false"):
        with pytest.raises(UserError, match=rf"{key}: mimae extend continues {run} where it is; model.init={run}"):
            extend(run, ["schedule.epochs=4", key], ranks=1)
    by_command(run, "schedule.epochs=4")
    assert_bit_equal(tensors(run), tensors(long))
    assert len(seen) == len(expected) == 24
    for (ids, masks), (wanted_ids, wanted_masks) in zip(seen, expected, strict=True):
        assert torch.equal(ids, wanted_ids) and torch.equal(masks, wanted_masks)
    assert [line["loss"] for line in lines(run / "metrics.jsonl")] == [
        line["loss"] for line in lines(long / "metrics.jsonl")
    ]
    kept = yaml.safe_load((run / "config.yaml").read_text())
    assert kept["schedule"]["epochs"] == 4 and kept["run"]["extend"] is False
    assert kept["schedule"]["extended"] == [[0, 0.0, "schedule.epochs=2 until step 6"]]
    (event,) = [event for event in events.read(Folder(run)) if event["kind"] == "extend"]
    assert (event["step"], event["details"]) == (
        6,
        {"before": {"schedule.epochs": 2}, "now": {"schedule.epochs": 4}},
    )
    capsys.readouterr()
    by_command(run, "schedule.epochs=4")
    assert "is finished: 12 of 12 steps" in capsys.readouterr().out


@pytest.mark.slow
def test_a_cosine_run_is_extended_after_an_interruption(
    images: Path,  # noqa: F811
    tmp_path: Path,
    seen: list[tuple[Tensor, Tensor]],
) -> None:
    long, run = tmp_path / "long", tmp_path / "run"
    pretrain(recipe(images, long, *QUIET, "schedule.epochs=4"))
    expected = list(seen)
    seen.clear()
    pretrain(recipe(images, run, *QUIET, "schedule.epochs=2"))
    by_command(run, "schedule.epochs=4", "run.dry=true")  # runs one step of the extension
    pretrain(recipe(images, run, *QUIET, "schedule.epochs=4"))  # continues with the same recipe through the Python API
    for (ids, masks), (wanted_ids, wanted_masks) in zip(seen, expected, strict=True):
        assert torch.equal(ids, wanted_ids) and torch.equal(masks, wanted_masks)
    kept = ScheduleSettings.model_validate(yaml.safe_load((run / "config.yaml").read_text())["schedule"])
    peak = recipe(images, run).optimizer.peak(0.1, 8, 4)
    shown = [line["lr"] / peak for line in lines(run / "metrics.jsonl")]
    assert shown[6:] == pytest.approx(rates(kept, 6)) and shown[6:9] == pytest.approx([1 / 3, 2 / 3, 1])


def test_a_run_does_not_fall_back_to_a_step_before_its_extension(images: Path, tmp_path: Path) -> None:  # noqa: F811
    """The learning rate of those steps is not known any more: it would be computed as negative."""
    run, way = (
        tmp_path / "run",
        (*QUIET, "checkpoint.every_steps=1", "checkpoint.keep=20", "checkpoint.background=false"),
    )
    pretrain(recipe(images, run, *way, "schedule.epochs=2"))
    by_command(run, "schedule.epochs=4")
    saved = sorted((run / "checkpoints").iterdir())
    for step in saved[6:]:  # The first six are of the steps up to the extension.
        (step / "state.json").write_text("damaged")
    pretrain(recipe(images, run, *way, "schedule.epochs=4", "run.dry=true"))
    assert [line["step"] for line in lines(run / "metrics.jsonl")][-1] == 7
    for step in saved[5:7]:
        (step / "state.json").write_text("damaged")
    behind = r"step-00000001 is of step 1, and the run was extended at step 6, and its schedule before that is not kept"
    with pytest.raises(CheckpointError, match=behind):
        pretrain(recipe(images, run, *way, "schedule.epochs=4"))
    shutil.rmtree(run / "checkpoints")
    (run / "latest").unlink()
    with pytest.raises(
        RunError, match=r"has lost its checkpoints, and cannot start again: the run was extended at step 6"
    ):
        pretrain(recipe(images, run, *way, "schedule.epochs=4"))


def test_a_new_run_with_the_recipe_of_an_extended_one_has_the_whole_length_from_its_start(
    images: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    first, second, plain = tmp_path / "first", tmp_path / "second", tmp_path / "plain"
    pretrain(recipe(images, first, *QUIET, "schedule.epochs=1"))
    by_command(first, "schedule.epochs=2")
    pretrain(load_recipe(str(first / "config.yaml"), [f"run.dir={second}"]).recipe)
    pretrain(recipe(images, plain, *QUIET, "schedule.epochs=2"))
    assert yaml.safe_load((second / "config.yaml").read_text())["schedule"]["extended"] == []
    rates_of = [[line["lr"] for line in lines(run / "metrics.jsonl")] for run in (second, plain)]
    assert rates_of[0] == rates_of[1] and min(rates_of[0]) >= 0
    assert_bit_equal(tensors(second), tensors(plain))


def test_the_rate_before_an_extension_is_not_computed() -> None:
    found = longer(ScheduleSettings(epochs=2, warmup_epochs=1), 6, epochs=4)
    with pytest.raises(ValueError, match=r"step 5 is before step 6"):
        schedule_factor(found, 5, PER_EPOCH, 1.0)


def test_micro_batches_may_change_where_no_term_compares_images(images: Path, tmp_path: Path) -> None:  # noqa: F811
    alone = (*QUIET, "objective.max_mi=0", "objective.min_mi=0", "optimizer.learning_rate=0.001")
    whole, run = tmp_path / "whole", tmp_path / "run"
    pretrain(recipe(images, whole, *alone, "schedule.epochs=1"))
    pretrain(recipe(images, run, *alone, "schedule.epochs=1", "run.dry=true"))
    pretrain(recipe(images, run, *alone, "schedule.epochs=1", "schedule.accumulate=4"))
    first, second = ([line["loss"] for line in lines(each / "metrics.jsonl")] for each in (whole, run))
    assert first == pytest.approx(second, rel=1e-4)
    with_terms = tmp_path / "terms"
    pretrain(recipe(images, with_terms, *QUIET, "run.dry=true"))
    with pytest.raises(RunError, match=r"schedule\.accumulate: 2 in the run, 4 now"):
        pretrain(recipe(images, with_terms, *QUIET, "schedule.accumulate=4"))
