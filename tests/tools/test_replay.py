"""Tests of replaying a step: it gives the same numbers, and finds where non-finite values begin."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from mimae import distributed
from mimae.checkpoints import checkpoint
from mimae.checkpoints.saving import Saver
from mimae.checkpoints.settings import CheckpointSettings
from mimae.cli import app
from mimae.config.kept import load_run
from mimae.config.load import load_recipe
from mimae.config.recipe import FREE_KEYS, Recipe, RunRecipe
from mimae.errors import RunError
from mimae.faults.nonfinite import NonFinite
from mimae.tools.replay import HERE, replay
from mimae.train.tasks.pretrain import engine_of, pretrain
from mimae.train.tasks.segment import Segment
from mimae.train.trainer import Trainer, train
from tests.train.test_segment import recipe as segment_recipe
from tests.train.test_segment import scene
from tests.train.test_trainer import lines, recipe

POISONED = "encoder.blocks.0.mlp.fc1.weight"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run of 9 steps with checkpoints 8 and 9. The gate is open from step 1, so that all terms count."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "images").mkdir()
    generator = np.random.default_rng(0)
    for i in range(30):
        pixels = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{i:02}.png")
    given = recipe(folder / "images", folder / "run", "telemetry.probe_every_epochs=0", "objective.gate_loss=null")
    assert pretrain(given).finished
    return folder / "run"


def recipe_of(run: Path) -> Recipe:
    return load_recipe(run / "config.yaml", [f"run.dir={run}"]).recipe


def test_a_step_of_another_task_has_the_runs_numbers(tmp_path: Path) -> None:
    """A segmenter: its examples, its drop path and its dropout are drawn again."""
    for i in range(4):
        for name, pixels in zip(("images", "annotations"), scene(i)):
            (tmp_path / name).mkdir(exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
    asked = segment_recipe(tmp_path, tmp_path / "run", "telemetry.probe_every_epochs=0", "schedule.max_steps=2")
    assert train(Segment(asked)).finished
    command = ["replay", str(tmp_path / "run"), "--step", "2"]
    assert CliRunner().invoke(app, command, catch_exceptions=False).exit_code == 0
    found = replay(load_run(tmp_path / "run", HERE, {"run": {"dir": str(tmp_path / "run")}}, RunRecipe), 2)
    logged = lines(tmp_path / "run/metrics.jsonl")[1]
    assert found.losses == {key: pytest.approx(logged[key], rel=1e-6) for key in ("loss", "main", "auxiliary")}
    assert found.is_finite and found.rec == {}
    with Image.open(tmp_path / "run/replay/step-00000002.png") as picture:
        assert picture.height > 4 * 16


@pytest.mark.parametrize("step", [9, 4])
def test_a_healthy_step_has_the_runs_numbers(run: Path, step: int) -> None:
    """Replay from the previous checkpoint, and from the initial weights through all steps before."""
    said: list[str] = []
    before = sorted(run.rglob("*"))
    found = replay(recipe_of(run), step, said.append)
    assert sorted(run.rglob("*")) == before
    assert ("running steps 1 to 3 first" in said) == (step == 4)
    logged = lines(run / "metrics.jsonl")[step - 1]
    assert found.losses == {key: pytest.approx(logged[key], rel=1e-6) for key in found.losses}
    assert set(found.losses) == {"loss", "rec", "max_mi", "min_mi", "fit"}
    assert found.grad_norm == pytest.approx(logged["grad_norm"], rel=1e-5)
    assert len(found.rec) == 8 and sum(found.rec.values()) / 8 == pytest.approx(logged["rec"], rel=1e-5)
    assert found.is_finite and found.module is None and not found.gradients


def test_no_weight_depends_on_what_a_replay_changes() -> None:
    assert {override.partition("=")[0] for override in HERE} <= {*FREE_KEYS}


def test_the_command_tells_and_draws(run: Path) -> None:
    """Replay in micro-batches: the MI terms compare fewer images, and L_rec is the same."""
    done = CliRunner().invoke(app, ["replay", str(run), "--step", "9", "--split", "2"])
    assert done.exit_code == 0, done.output
    logged = lines(run / "metrics.jsonl")[8]
    assert f"in the run {logged['rec']:.7g}" in done.output and "the step is finite" in done.output
    assert "--split 2: losses that depend on the whole micro-batch" in done.output
    with Image.open(run / "replay/step-00000009.png") as picture:
        assert picture.width > picture.height / 2
    (run / "replay/step-00000009.png").unlink()
    (run / "replay").rmdir()


def test_poisoned_weights_are_found_where_they_are(run: Path, tmp_path: Path) -> None:
    """Make one weight of a hidden unit non-finite.

    Activations before it stay finite. The report names its own gradient and the gradients of earlier layers only.
    """
    (tmp_path / "config.yaml").write_text((run / "config.yaml").read_text())
    healthy, device = checkpoint.load(run / "checkpoints/step-00000008"), torch.device("cpu")
    distributed.setup()
    try:
        engine = engine_of(recipe_of(run), device)
        engine.load(healthy.path)
        engine.parts[POISONED].values.detach()[0, 0] = math.nan
        Saver(tmp_path, CheckpointSettings(background=False), device).start(8, engine.state(), healthy.state)
    finally:
        distributed.shutdown()
    done = CliRunner().invoke(app, ["replay", str(tmp_path), "--step", "9"])
    assert done.exit_code == 1, done.output
    assert f"weights that are not finite before the step: 1: {POISONED}\n" in done.output
    assert "first output that is not finite: encoder.blocks.0.mlp.fc1\n" in done.output
    assert "samples of 8 whose L_rec is not finite: 8: " in done.output
    assert "loss        not finite   in the run" not in done.output, "there is no record of this step"
    assert "the step is not finite" in done.output


@pytest.fixture
def storm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the gradients non-finite from step 5 on."""
    optimize = Trainer.optimize

    def poisoned(self: Any) -> Any:
        if self.step < 4:
            return optimize(self)
        parameter = dict(self.engine.model.named_parameters())["decoder.head.bias"]
        hook = parameter.register_hook(lambda grad: grad * math.nan)
        try:
            return optimize(self)
        finally:
            hook.remove()

    monkeypatch.setattr(Trainer, "optimize", poisoned)


STORMY = ["schedule.epochs=8", "checkpoint.every_steps=3"]


def test_a_storm_keeps_the_weights_of_its_steps(
    run: Path, tmp_path: Path, storm: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """End the run, and replay each of the non-finite steps."""
    with pytest.raises(RunError, match=rf"`mimae replay {tmp_path} --step 5` shows.* where it begins\. "):
        pretrain(load_recipe(run / "config.yaml", [*STORMY, f"run.dir={tmp_path}"]).recipe)
    monkeypatch.undo()
    losses = [record["loss"] for record in lines(tmp_path / "metrics.jsonl")]
    for step in (5, 12):
        said: list[str] = []
        found = replay(recipe_of(tmp_path), step, said.append)
        assert said == [f"from {tmp_path / 'nonfinite/checkpoints/step-00000004'}"]
        assert found.is_finite, "the poison is not in the weights"
        assert found.losses["loss"] == pytest.approx(losses[step - 1], rel=1e-6)
    newest = checkpoint.find(tmp_path)
    assert newest is not None and newest.state["step"] == 3, "none is saved within a streak"


def test_a_storm_whose_weights_cannot_be_kept_is_replayed_from_the_last_checkpoint(
    run: Path, tmp_path: Path, storm: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Let the disk become full or read-only before the last non-finite step."""
    make_room = checkpoint.make_room

    def read_only(temporary: Path, num_bytes: int) -> None:
        if "nonfinite" in str(temporary):
            raise OSError(30, "Read-only file system")
        make_room(temporary, num_bytes)

    monkeypatch.setattr(checkpoint, "make_room", read_only)
    with pytest.raises(RunError, match="where it begins, from the last checkpoint on, since their weights"):
        pretrain(load_recipe(run / "config.yaml", [*STORMY, f"run.dir={tmp_path}"]).recipe)
    monkeypatch.undo()
    assert "checkpoint of step 4 could not be written: [Errno 30] Read-only file system" in capsys.readouterr().out
    said: list[str] = []
    assert replay(recipe_of(tmp_path), 5, said.append).is_finite
    assert said == [f"from {tmp_path / 'checkpoints/step-00000003'}", "running step 4 first"]


def test_a_run_that_recovers_from_a_streak_goes_on(tmp_path: Path) -> None:
    """Read the tenth decision one step late, when the next step has already been taken."""
    kept: list[tuple[int, int]] = []

    def keep(first: int, last: int) -> bool:
        kept.append((first, last))
        return True

    guard = NonFinite(tmp_path, lambda step: [step], keep)
    for step in range(1, 35):
        guard.check(step, torch.tensor(float(step % 12 < 10)))
    guard.drain()
    assert not kept
    with pytest.raises(RunError, match=r"11 steps in a row(.|\n)*step 45: samples \[45\]"):
        for step in range(35, 99):
            guard.check(step, torch.tensor(1.0))
    assert kept == [(35, 45)]
