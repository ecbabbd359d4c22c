"""Tests of whole runs on small images: resuming, killing, stopping, and the files of a run."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable
from functools import partialmethod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mimae.checkpoints import checkpoint, dcp
from mimae.config.load import load_recipe
from mimae.config.recipe import Recipe
from mimae.data.loading import backend
from mimae.data.loading.backend import Choice
from mimae.data.loading.loader import evaluation_batches
from mimae.data.loading.stalls import Diagnosis, Stalls
from mimae.data.sources import cache
from mimae.data.sources.open import open_source
from mimae.engines.ddp import DDPEngine
from mimae.engines.replicas import DivergenceError
from mimae.errors import RunError, UserError
from mimae.kernels import patchify
from mimae.model import attention_choice
from mimae.model.masking import views
from mimae.model.mimae import build
from mimae.telemetry.pictures import reconstructions
from mimae.telemetry.records import EPOCH_KEYS, PHASES, STEP_KEYS
from mimae.train.tasks import pretrain as tasks
from mimae.train.tasks.pretrain import Pretrain, pretrain
from mimae.train.trainer import Trainer
from tests.image_folders import noise, two_classes
from tests.rank_processes import own_process, run_ranks

STEPS = 9  # 30 images in steps of 8: 3 steps an epoch with a tail of 6, so 3 epochs


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of 30 images in two classes, 14 to 20 pixels wide."""
    return two_classes(tmp_path_factory.mktemp("images"), noise(30, seed=0))


def recipe(images: Path, run: Path, *overrides: str) -> Recipe:
    """Return a recipe that takes seconds on one core and uses every part.

    The parts are gate, V, projector, accumulation, clipping, EMA and checks.
    """
    tree = {
        "precision": "fp32",
        "run": {"dir": str(run)},
        "data": {"path": str(images), "val_path": str(images), "image_size": 8, "workers": 0, "loader": "torch"},
        "model": {"size": "tiny", "patch_size": 2, "width": 16, "depth": 1, "heads": 2, "attention": "sdpa"},
        "decoder": {"width": 8, "depth": 1, "heads": 2},
        "objective": {"projector": "mlp", "gate_loss": 5.0, "posterior_width": 4},
        "optimizer": {"learning_rate": 0.1, "clip": 1.0},
        "schedule": {"batch_size": 8, "epochs": 3, "warmup_epochs": 1, "accumulate": 2},
        "ema": {"decay": 0.5},
        "checkpoint": {"every_steps": 2},
        "telemetry": {"log_every_steps": 1, "probe_every_epochs": 1, "tensorboard": False},
    }
    return load_recipe(tree, overrides).recipe


def tensors(run: Path) -> dict[str, Tensor]:
    found = checkpoint.find(run)
    assert found is not None
    return dcp.load_whole(found.path, "")


def assert_bit_equal(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    different = [name for name in want if not torch.equal(got[name].nan_to_num(), want[name].nan_to_num())]
    assert not different


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an uninterrupted run."""
    run = tmp_path_factory.mktemp("whole")
    outcome = pretrain(recipe(images, run))
    assert outcome == (run, STEPS, True, False)
    return run


def test_a_run_leaves_what_its_reader_expects(whole: Path, capfd: pytest.CaptureFixture[str]) -> None:
    steps, epochs = lines(whole / "metrics.jsonl"), lines(whole / "epochs.jsonl")
    assert [record["step"] for record in steps] == list(range(1, STEPS + 1))
    assert all(set(record) == set(STEP_KEYS) for record in steps)
    assert [record["epoch"] for record in epochs] == [0, 1, 2]
    assert all(set(record) == set(EPOCH_KEYS) for record in epochs)
    assert [record["images"] for record in epochs] == [24, 24, 24]
    assert all(record[key] is not None for record in epochs for key in ("knn", "val_rec", "effective_rank"))
    assert all((record["bytes_sent"], record["exposed_communication"]) == (0, None) for record in epochs)
    assert steps[0]["gate"] == 1 and steps[-1]["lr"] < steps[2]["lr"]
    assert len(list((whole / "images").glob("*.png"))) == 3
    assert len(list((whole / "checkpoints").glob("step-*"))) == 2
    assert json.loads((whole / "environment.json").read_text())["packages"]["torch"]


def test_a_finished_run_says_so(images: Path, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = tensors(whole)
    assert pretrain(recipe(images, whole)).finished
    assert "finished" in capsys.readouterr().out
    assert_bit_equal(tensors(whole), before)


def _die_at_step(images: Path, run: Path, step: int) -> None:
    """Run until `step` has been computed, then die before anything is written about it."""
    optimize: Callable[..., Any] = Trainer.optimize

    def until(self: Any) -> Any:
        if self.step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return optimize(self)

    Trainer.optimize = until
    pretrain(recipe(images, run))


def _die_in_save(images: Path, run: Path, step: int) -> None:
    """Die during the background save of `step`, some steps later, with half of the tensor file written."""
    write = dcp.save

    def torn(path: Path, *args: Any) -> None:
        write(path, *args)
        if f"step-{step:08d}" in path.name:
            os.truncate(path / "__0_0.distcp", (path / "__0_0.distcp").stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    vars(dcp)["save"] = torn
    pretrain(recipe(images, run))


def _killed(function: Callable[..., None], *args: Any) -> None:
    """Run `function` in a separate process, which must die by SIGKILL."""
    process = own_process(function, *args)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def test_killed_at_random_and_in_a_save_a_run_ends_with_the_same_bits(
    images: Path, whole: Path, tmp_path: Path
) -> None:
    step = random.randrange(1, STEPS)
    print("killed at step", step)
    _killed(_die_at_step, images, tmp_path, step)
    _killed(_die_in_save, images, tmp_path, random.choice(range(step // 2 * 2 + 2, STEPS, 2) or [STEPS]))
    assert pretrain(recipe(images, tmp_path)).finished
    assert_bit_equal(tensors(tmp_path), tensors(whole))
    records = lines(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, STEPS + 1)), "each step once, none lost"
    undisturbed = lines(whole / "metrics.jsonl")
    assert [record["loss"] for record in records] == [record["loss"] for record in undisturbed]


def test_a_signal_saves_and_the_same_command_goes_on(
    images: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimize = Trainer.optimize

    def signalled(self: Any) -> Any:
        if self.step == 4:
            signal.raise_signal(signal.SIGTERM)
        return optimize(self)

    monkeypatch.setattr(Trainer, "optimize", signalled)
    outcome = pretrain(recipe(images, tmp_path))
    assert outcome.saved_on_signal and not outcome.finished and outcome.step < STEPS
    monkeypatch.undo()
    assert pretrain(recipe(images, tmp_path)).finished
    assert_bit_equal(tensors(tmp_path), tensors(whole))
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_damaged_checkpoints_are_named_and_the_one_before_is_used(
    images: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Flip one bit of a checkpoint, then truncate one, then damage the last."""
    pretrain(recipe(images, tmp_path))
    older, newest = sorted((tmp_path / "checkpoints").iterdir())
    weights = newest / "__0_0.distcp"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert pretrain(recipe(images, tmp_path)).finished
    output = capsys.readouterr().out
    assert f"{weights} was altered" in output and f"at step {int(older.name[5:])}" in output
    assert_bit_equal(tensors(tmp_path), tensors(whole))
    for path in (tmp_path / "checkpoints").iterdir():
        os.truncate(path / "__0_0.distcp", 10)
    with pytest.raises(checkpoint.CheckpointError, match="none of the 2 checkpoints"):
        pretrain(recipe(images, tmp_path))
    assert "is torn: 10 bytes" in capsys.readouterr().out


def test_a_damaged_checkpoint_that_was_passed_over_is_not_kept(images: Path, tmp_path: Path) -> None:
    """Damage the checkpoint of step 2, at which the run that resumes from step 1 does not save again."""
    for _ in range(2):
        pretrain(recipe(images, tmp_path, "run.dry=true"))
    os.truncate(tmp_path / "checkpoints/step-00000002/__0_0.distcp", 10)
    assert pretrain(recipe(images, tmp_path, "checkpoint.every_steps=3", "checkpoint.keep=9")).finished
    assert [int(name[5:]) for name in checkpoint.names(tmp_path)] == [9, 6, 3, 1]


@pytest.mark.parametrize("kind", ["encoded", "decoded"])
def test_a_cache_may_be_switched_on_in_a_run(
    images: Path,
    whole: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    """Compare weights with those of a run without a cache. The images are PNGs, for which there is one decoder."""
    monkeypatch.setattr(cache, "SPARE", 0.0)  # This machine's disk may be nearly full.
    run, kept = tmp_path / "run", tmp_path / "kept"
    pretrain(recipe(images, run, "run.dry=true"))
    assert pretrain(recipe(images, run, f"data.cache={kind}", f"data.cache_dir={kept}")).finished
    assert_bit_equal(tensors(run), tensors(whole))
    (folder,) = kept.glob("mimae-cache-*/*")
    assert f"data.cache={kind}: 0 MB are kept" in (output := capsys.readouterr().out)
    assert f"rm -r {folder}" in output
    assert (folder / "data").stat().st_size > 0


def test_other_settings_or_images_are_refused_on_resume(images: Path, whole: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"masking\.ratio: 0\.75 in the run, 0\.5 now"):
        pretrain(recipe(images, whole, "masking.ratio=0.5", "masking.num_masks=2"))
    run = tmp_path / "run"
    pretrain(recipe(images, run, "run.dry=true"))
    found = checkpoint.find(run)
    assert found is not None and found.state["step"] == 1
    path = next(images.rglob("*.png"))
    kept = path.read_bytes()
    path.rename(tmp_path / "away.png")
    try:
        with pytest.raises(UserError, match="does not hold the images"):
            pretrain(recipe(images, run))
    finally:
        path.write_bytes(kept)


def test_the_same_images_at_another_path_are_taken(
    images: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Resume after the images have moved, report both paths, and find relative paths from any folder."""
    shutil.copytree(images, tmp_path / "job-1")
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    pretrain(recipe(Path("job-1"), run, "run.dry=true"))
    assert load_recipe(run / "config.yaml").recipe.data.path == str(tmp_path / "job-1")
    (tmp_path / "job-1").rename(tmp_path / "job-2")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    capsys.readouterr()
    assert pretrain(recipe(tmp_path / "job-2", run)).finished
    told = capsys.readouterr().out
    assert f"the images are at {tmp_path / 'job-2'}, and were at {tmp_path / 'job-1'}, the same by name" in told
    assert_bit_equal(tensors(run), tensors(whole))


def test_non_finite_steps_are_skipped_and_ten_in_a_row_end_the_run(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keep weights and averages unchanged in a non-finite step; ten in a row do not change checkpoints either."""
    optimize, bad = Trainer.optimize, {4}

    def poisoned(self: Any) -> Any:
        parameter = next(self.engine.model.parameters())
        hook = parameter.register_hook(lambda g: g * float("nan")) if self.step in bad else None
        before = {name: p.clone() for name, p in self.engine.model.named_parameters()}
        averages = {name: p.clone() for name, p in self.engine.ema.items()}
        result = optimize(self)
        changed = [n for n, p in self.engine.model.named_parameters() if not torch.equal(p, before[n])]
        changed += [n for n, p in self.engine.ema.items() if not torch.equal(p, averages[n])]
        assert bool(changed) == (hook is None)
        if hook is not None:
            hook.remove()
        return result

    monkeypatch.setattr(Trainer, "optimize", poisoned)
    assert pretrain(recipe(images, tmp_path / "one")).finished
    bad |= set(range(5, 40))
    with pytest.raises(RunError, match=r"step 14: samples \[(\d+(, )?){8}\]"):
        pretrain(recipe(images, tmp_path / "ten", "schedule.epochs=8"))
    found = checkpoint.find(tmp_path / "ten")
    assert found is not None and all(t.isfinite().all() for n, t in found.tensors("model").items() if "gate" not in n)


def test_an_error_costs_no_save_that_is_under_way(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finish the save thread before the process ends; otherwise torch would abort the process."""
    failed = threading.Event()
    write, optimize = dcp.dcp.FileSystemWriter.write_data, Trainer.optimize

    def late(*given: Any) -> Any:
        assert failed.wait(10)
        time.sleep(0.5)
        return write(*given)

    def broken(self: Any) -> Any:
        if self.step == 3:
            failed.set()
            raise DivergenceError("something else")
        return optimize(self)

    monkeypatch.setattr(dcp.dcp.FileSystemWriter, "write_data", late)
    monkeypatch.setattr(Trainer, "optimize", broken)
    with pytest.raises(DivergenceError):
        pretrain(recipe(images, tmp_path))
    assert checkpoint.names(tmp_path) == ["step-00000002"]


def test_nothing_is_saved_once_copies_differ(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checks: list[int] = []

    def check(self: DDPEngine) -> None:
        checks.append(len(checks))
        if len(checks) == 2:
            raise DivergenceError("ranks 0 and 1 differ")

    monkeypatch.setattr(DDPEngine, "check_copies", check)
    with pytest.raises(DivergenceError):
        pretrain(recipe(images, tmp_path, "checkpoint.background=false"))
    assert checkpoint.names(tmp_path) == ["step-00000002"]


def test_a_wait_for_data_is_an_event_with_its_share(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Stalls, "verdict", lambda self, worth: Diagnosis("the storage is slow", 0.25))
    quick = ("schedule.max_steps=1", "telemetry.probe_every_epochs=0", "telemetry.images_every_epochs=0")
    pretrain(recipe(images, tmp_path, *quick))
    found = [event["details"] for event in lines(tmp_path / "events.jsonl") if event["kind"] == "warning"]
    assert {"what": "the storage is slow", "waited": 0.25} in found
    assert "the storage is slow" in capsys.readouterr().out


def test_the_next_views_patches_are_what_is_validated_and_pictured(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compare val_rec with a loop over views and patches: the mean over the next view's patches, once per image."""
    given = recipe(images, tmp_path, "decoder.predict=next_view", "decoder.attention=cross", "schedule.epochs=1")
    drawn: list[Tensor] = []

    def draw(images: Tensor, visible: Tensor, targets: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, Tensor]:
        drawn.extend((visible, targets))
        return reconstructions(images, visible, targets, *rest, **options)

    monkeypatch.setattr(tasks.pictures, "reconstructions", draw)
    assert pretrain(given).finished
    assert torch.equal(drawn[1], drawn[0][:, [1, 2, 3, 0]])

    model = build(given)
    found = checkpoint.find(tmp_path)
    assert found is not None
    model.load_state_dict(found.tensors("model"))
    source = open_source(str(images))
    errors = []
    for batch in evaluation_batches(given.data, source, 30, torch.arange(30)):
        visible, _ = views(given, given.seed, 0, batch.sample_ids)
        targets = visible[:, [1, 2, 3, 0]]
        with torch.no_grad():
            predictions = model.predict(batch.images, visible, targets)
        pixels = patchify(batch.images, 2, model.encoder.mean, model.encoder.std)
        for place in np.ndindex(*targets.shape):
            true = pixels[place[0], targets[place]]
            goal = (true - true.mean()) / (true.var() + 1e-6).sqrt()
            errors.append((predictions[place] - goal).square().mean().item())
    assert len(errors) == 30 * 16, "every patch once"
    assert lines(tmp_path / "epochs.jsonl")[0]["val_rec"] == pytest.approx(np.mean(errors), rel=1e-5)


def test_blocks_are_compiled_for_the_sizes_of_training_alone(
    images: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compile the encoder block and the decoder's last block once, with fixed sizes, in a run with all outputs."""
    compiled: list[list[Any]] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        compiled.append([size for value in inputs if isinstance(value, Tensor) for size in value.shape])
        return graph.forward

    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend=backend))
    assert pretrain(recipe(images, tmp_path, "compile=on", "schedule.epochs=1")).finished
    assert len(compiled) == 2 and all(type(size) is int for sizes in compiled for size in sizes)
    curves = [[record["loss"] for record in lines(run / "metrics.jsonl")] for run in (tmp_path, whole)]
    assert curves[0] == pytest.approx(curves[1][:3], rel=1e-6)


def test_what_this_machine_cannot_do_is_told_before_anything_starts(images: Path, tmp_path: Path) -> None:
    wishes = ["model.attention=flex", "optimizer.impl=apex", "compile=graphs"]
    if torch.cuda.is_available():
        wishes = ["optimizer.impl=deepspeed"]
    with pytest.raises(UserError) as error:
        pretrain(recipe(images, tmp_path / "run", *wishes))
    assert all(f"{wish} cannot run on this " in str(error.value) for wish in wishes)
    assert not (tmp_path / "run").exists()


@pytest.mark.gpu
def test_cuda_graphs_train_and_validate_as_without(images: Path, tmp_path: Path) -> None:
    curves = {}
    for setting in ("off", "graphs"):
        # CUDA graphs are refused with accumulation.
        pretrain(recipe(images, tmp_path / setting, f"compile={setting}", "schedule.accumulate=1"))
        curves[setting] = [record["loss"] for record in lines(tmp_path / setting / "metrics.jsonl")]
        curves[setting] += [record["val_rec"] for record in lines(tmp_path / setting / "epochs.jsonl")]
    assert curves["graphs"] == pytest.approx(curves["off"], rel=1e-3)


def _losses(images: Path, run: Path) -> list[float]:
    pretrain(recipe(images, run, "schedule.accumulate=1"))
    return [record["loss"] for record in lines(run / "metrics.jsonl")]


def test_two_ranks_have_the_loss_curve_of_one(images: Path, tmp_path: Path) -> None:
    """Compare the losses: statistics and batches are global, so that only rounding differs."""
    (tmp_path / "ranks").mkdir()
    two = run_ranks(2, tmp_path / "ranks", _losses, images, tmp_path / "two")[0]
    one = _losses(images, tmp_path / "one")
    assert len(one) == STEPS
    assert max(abs(a - b) for a, b in zip(one, two, strict=True)) < 1e-4
    epochs = lines(tmp_path / "two" / "epochs.jsonl")
    assert all(record["bytes_sent"] > 0 and 0 < record["exposed_communication"] < 1 for record in epochs)


def test_auto_is_settled_once(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Keep the choices of the first start. Refuse another explicit loader, and accept another attention."""
    dry = ("run.dry=true", "data.loader=auto", "model.attention=auto")
    monkeypatch.setattr(backend, "choose", lambda *given, **more: Choice("dali_cpu", "the cheapest"))
    monkeypatch.setattr(attention_choice, "choose", lambda *given: ("plain", "measured here"))
    pretrain(recipe(images, tmp_path, *dry))
    kept = load_recipe(tmp_path / "config.yaml").recipe
    assert (kept.data.loader, kept.model.attention) == ("dali_cpu", "plain")
    assert "data.loader=dali_cpu, the cheapest; model.attention=plain, measured here" in capsys.readouterr().out
    monkeypatch.setattr(backend, "choose", None)
    monkeypatch.setattr(attention_choice, "choose", None)
    assert pretrain(recipe(images, tmp_path, *dry)).step == 2
    assert load_recipe(tmp_path / "config.yaml").recipe.model.attention == "plain"
    with pytest.raises(UserError, match=r"data.loader: 'dali_cpu' in the run, 'torch' now"):
        pretrain(recipe(images, tmp_path, "run.dry=true"))
    pretrain(recipe(images, tmp_path, "run.dry=true", "data.loader=auto", "model.attention=sdpa"))
    assert load_recipe(tmp_path / "config.yaml").recipe.model.attention == "sdpa"


def test_a_run_that_is_older_than_the_choice_of_attention_goes_on_with_sdpa(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = recipe(images, tmp_path, "run.dry=true")
    pretrain(given)
    config = tmp_path / "config.yaml"
    config.write_text(config.read_text().replace("attention: sdpa", "attention: auto"))
    monkeypatch.setattr(attention_choice, "choose", None)
    pretrain(recipe(images, tmp_path, "run.dry=true", "model.attention=auto"))
    assert load_recipe(config).recipe.model.attention == "sdpa"


def test_an_attention_that_this_machine_lacks_is_chosen_anew_and_told(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Continue a run of a GPU on a CPU."""
    pretrain(recipe(images, tmp_path, "run.dry=true"))
    config = tmp_path / "config.yaml"
    config.write_text(config.read_text().replace("attention: sdpa", "attention: cudnn"))
    monkeypatch.setattr(attention_choice, "choose", lambda *given: ("plain", "measured here"))
    assert pretrain(recipe(images, tmp_path, "run.dry=true", "model.attention=auto")).step == 2
    told = "model.attention=plain, measured here, since cudnn, with which the run was started, does not run here: cuDNN"
    assert told in capsys.readouterr().out
    assert load_recipe(config).recipe.model.attention == "plain"


def test_the_record_of_an_epoch_has_its_last_step_and_goes_when_the_run_goes_back_behind_it(
    images: Path, tmp_path: Path
) -> None:
    """Log only the first step, and continue from the checkpoint of step 4, inside epoch 1."""
    rare = ("telemetry.log_every_steps=100", "telemetry.images_every_epochs=0", "schedule.epochs=3")
    pretrain(recipe(images, tmp_path, *rare, "checkpoint.keep=9"))
    assert [record["step"] for record in lines(tmp_path / "epochs.jsonl")] == [3, 6, 9]
    for step in (6, 8, 9):
        shutil.rmtree(tmp_path / "checkpoints" / f"step-{step:08d}")
    pretrain(recipe(images, tmp_path, *rare))
    assert [(record["epoch"], record["step"]) for record in lines(tmp_path / "epochs.jsonl")] == [
        (0, 3),
        (1, 6),
        (2, 9),
    ]


# The record of an interrupted epoch


MEANS = ("loss", "rec", "max_mi", "min_mi", "fit", "mi_lower_nats", "mi_upper_nats", "saturated")


def _interrupted(images: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Start a run that ends after its fourth step, the first of its second epoch, which takes half a second."""
    optimize = Trainer.optimize

    def slow(self: Any) -> Any:
        if self.step == 3:
            time.sleep(0.5)
        if self.step == 4:
            raise KeyboardInterrupt
        return optimize(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "optimize", slow)
        with pytest.raises(KeyboardInterrupt):
            pretrain(recipe(images, run, "checkpoint.background=false"))
    assert checkpoint.names(run)[0] == "step-00000004"


def test_an_interrupted_epoch_has_the_line_of_a_whole_one(
    images: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _interrupted(images, tmp_path, monkeypatch)
    assert pretrain(recipe(images, tmp_path)).finished
    got, want = lines(tmp_path / "epochs.jsonl"), lines(whole / "epochs.jsonl")
    for key in ("epoch", "step", "images", *MEANS):
        assert [record[key] for record in got] == [record[key] for record in want], key
    assert got[1]["seconds"] > 0.5, "the seconds before the interruption count"
    assert got[1]["images_per_s"] == pytest.approx(24 / got[1]["seconds"])
    assert sum(got[1][f"seconds_{phase}"] for phase in PHASES) <= got[1]["seconds"]


def test_a_checkpoint_of_before_has_no_sums_and_is_resumed(
    images: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Record only the steps since the resume, as earlier versions did."""
    state = Trainer._state
    with monkeypatch.context() as before:
        before.setattr(Trainer, "_state", lambda self: {k: v for k, v in state(self).items() if k != "sums"})
        _interrupted(images, tmp_path, monkeypatch)
    began = time.perf_counter()
    assert pretrain(recipe(images, tmp_path)).finished
    elapsed = time.perf_counter() - began
    assert_bit_equal(tensors(tmp_path), tensors(whole))
    second = lines(tmp_path / "epochs.jsonl")[1]
    assert second["images"] == 16 and second["seconds"] < elapsed
    losses = [record["loss"] for record in lines(tmp_path / "metrics.jsonl")]
    assert second["loss"] == pytest.approx((losses[4] + losses[5]) / 2)


def test_the_columns_of_pretraining_stay() -> None:
    task = Pretrain(load_recipe("quickstart").recipe)
    assert task.step_keys == STEP_KEYS and task.epoch_keys == EPOCH_KEYS
