"""Tests of converting checkpoints to and from DeepSpeed's universal form, without DeepSpeed and with it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from mimae import distributed
from mimae.checkpoints import checkpoint, dcp
from mimae.config.load import load_recipe
from mimae.config.printing import as_yaml
from mimae.errors import CheckpointError
from mimae.model.mimae import outline
from mimae.randomness import materialise
from mimae.tools import command
from mimae.tools import convert as universal
from mimae.train.tasks.classify import Classify
from mimae.train.tasks.pretrain import pretrain
from mimae.train.trainer import train
from tests.rank_processes import run_ranks
from tests.train.test_classify import LINEAR
from tests.train.test_classify import images as photographs
from tests.train.test_classify import recipe as classifier
from tests.train.test_trainer import assert_bit_equal, images, recipe, tensors

__all__ = ["images", "photographs"]  # fixtures

RATES = {"decay": 0.05, "no_decay": 0.0, "posterior": 0.01}
"""Weight decay of the three groups; the values differ, so that a swap fails the test."""


@pytest.fixture(scope="module")
def run(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run that has done three of four steps."""
    path = tmp_path_factory.mktemp("runs") / "begun"
    pretrain(recipe(images, path, "schedule.max_steps=3"))
    return path


def _beside(run: Path, name: str) -> Path:
    """Return a run of the same recipe without a checkpoint."""
    other = run.with_name(name)
    other.mkdir()
    shutil.copy(run / "config.yaml", other)
    return other


def test_there_and_back(run: Path, tmp_path: Path) -> None:
    written = universal.write(run, tmp_path / "universal")
    assert (tmp_path / "universal/latest_universal").read_text().strip() == written.name == "global_step3"
    other = _beside(run, "back")
    assert universal.read(tmp_path / "universal", other) == other / "checkpoints/step-00000003"
    assert_bit_equal(tensors(other), tensors(run))
    mine, whose = checkpoint.find(other), checkpoint.find(run)
    assert mine is not None and whose is not None
    assert {key: mine.state[key] for key in ("step", "steps", "samples", "data")} == {
        key: whose.state[key] for key in ("step", "steps", "samples", "data")
    }


def test_a_fine_tuned_classifier_goes_there_and_back(
    photographs: Path,
    tmp_path: Path,
) -> None:
    """Keep its average and its classes; a frozen encoder has no state of the optimizer, and is refused."""
    begun = tmp_path / "begun"
    train(Classify(classifier(photographs, begun, "schedule.max_steps=2")))
    universal.write(begun, tmp_path / "universal")
    other = _beside(begun, "back")
    universal.read(tmp_path / "universal", other)
    assert_bit_equal(tensors(other), tensors(begun))
    mine, whose = checkpoint.find(other), checkpoint.find(begun)
    assert mine is not None and whose is not None and mine.state["task"] == whose.state["task"]
    train(Classify(classifier(photographs, tmp_path / "linear", *LINEAR, "schedule.max_steps=1", "ema.decay=null")))
    with pytest.raises(CheckpointError, match=r"finetune.freeze=all, and the format holds only parameters that are"):
        universal.write(tmp_path / "linear", tmp_path / "other")


def test_the_run_goes_on_as_if_nothing_had_been(images: Path, run: Path, tmp_path: Path) -> None:
    universal.write(run / "checkpoints/step-00000003", tmp_path / "universal")
    ends = []
    for name in ("converted", "copied"):
        other = _beside(run, name)
        if name == "copied":
            shutil.copytree(run, other, dirs_exist_ok=True)
        else:
            universal.read(tmp_path / "universal/global_step3", other)
        settings = recipe(images, other, "schedule.max_steps=3")
        longer = settings.schedule.model_copy(update={"max_steps": 4})
        (other / "config.yaml").write_text(as_yaml(settings.model_copy(update={"schedule": longer})))
        pretrain(recipe(images, other, "schedule.max_steps=4"))
        ends.append(tensors(other))
    assert_bit_equal(*ends)


def test_an_average_that_deepspeed_lost_begins_with_the_weights(run: Path, tmp_path: Path) -> None:
    shutil.rmtree(universal.write(run, tmp_path) / "average")
    other = _beside(run, "lost")
    said: list[str] = []
    universal.read(tmp_path, other, said.append)
    assert ["begins with the weights" in line for line in said] == [True]
    found = tensors(other)
    averages = [name for name in found if name.startswith("ema.")]
    assert averages and all(torch.equal(found[name], found[f"model.{name[4:]}"]) for name in averages)


def test_what_cannot_be_converted_is_told(run: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(CheckpointError, match=r"neither a run directory nor a checkpoint of one"):
        universal.write(empty, tmp_path / "u")
    with pytest.raises(CheckpointError, match="is not a run directory"):
        universal.read(tmp_path / "u", empty)
    with pytest.raises(CheckpointError, match="has no checkpoint yet"):
        universal.write(_beside(run, "fresh"), tmp_path / "u")
    with pytest.raises(CheckpointError, match="it has no zero/, and no latest_universal"):
        universal.read(empty, run)
    universal.write(run, tmp_path / "u")
    with pytest.raises(CheckpointError, match="global_step3 exists already"):
        universal.write(run, tmp_path / "u")
    with pytest.raises(CheckpointError, match="has step-00000003 already"):
        universal.read(tmp_path / "u", run)
    with pytest.raises(CheckpointError, match="is a run directory; give"):
        universal.write(run, run)
    (empty / "latest").write_text("global_step3")
    with pytest.raises(CheckpointError, match="convert it first"):
        command.convert(empty, run)
    (empty / "latest_universal").write_text("global_step4")
    with pytest.raises(CheckpointError, match="it has no zero/, and no latest_universal"):
        command.convert(empty, run)


def _narrower(states: dict[str, Any]) -> dict[str, Any]:
    return states | {"module": {name: tensor.flatten()[:1] for name, tensor in states["module"].items()}}


@pytest.mark.parametrize(
    ("file", "change", "told"),
    [
        ("zero/NAME/exp_avg.pt", None, r"exp_avg.pt cannot be read: .*No such file"),
        ("zero/NAME/fp32.pt", lambda _: print, "cannot be read: Weights only load failed"),
        ("zero/NAME/fp32.pt", lambda _: {"parameter": 1}, r"fp32.pt does not contain a tensor of a parameter"),
        # The tensor has as many numbers as the model's (24, 8), in another shape.
        ("zero/NAME/fp32.pt", lambda found: {"param": found["param"].T}, r"has shape \(8, 24\), and .* has \(24, 8\)"),
        (
            "zero/NAME/fp32.pt",
            lambda found: {"param": found["param"][1:]},
            r"has shape \(23, 8\), and .* has \(24, 8\)",
        ),
        ("average/NAME.pt", None, r"NAME.pt cannot be read: .*No such file"),
        ("zero/decoder.blocks.1.norm/fp32.pt", lambda _: {"param": torch.ones(1)}, "has decoder.blocks.1.norm,"),
        ("mp_rank_00_model_states.pt", lambda _: [3], "is not of the model in"),
        ("mp_rank_00_model_states.pt", lambda found: {"global_steps": 3}, r"is not of the model in .*'skipped_steps'"),
        ("mp_rank_00_model_states.pt", _narrower, "is not of the model in .*invalid for input of size 1"),
        ("mp_rank_00_model_states.pt", lambda found: found | {"skipped_steps": 3}, "3 steps, 3 of them skipped"),
    ],
)
def test_a_folder_of_something_else_makes_no_checkpoint(
    run: Path, tmp_path: Path, file: str, change: Callable[[Any], Any] | None, told: str
) -> None:
    name = "decoder.blocks.0.attn.qkv.weight"
    harmed = universal.write(run, tmp_path) / file.replace("NAME", name)
    harmed.parent.mkdir(exist_ok=True)
    found = torch.load(harmed) if harmed.exists() else None
    if change is None:
        harmed.unlink()
    else:
        torch.save(change(found), harmed)
    other = _beside(run, f"other-{tmp_path.name}")
    with pytest.raises(CheckpointError, match=told.replace("NAME", name)):
        universal.read(tmp_path, other)
    assert checkpoint.find(other) is None


def test_a_torn_file_makes_no_checkpoint(run: Path, tmp_path: Path) -> None:
    torn = universal.write(run, tmp_path) / "zero/encoder.norm.weight/exp_avg.pt"
    torn.write_bytes(torn.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"encoder.norm.weight/exp_avg.pt cannot be read"):
        universal.read(tmp_path, other := _beside(run, "torn"))
    assert checkpoint.find(other) is None


@pytest.mark.parametrize(("was", "now"), [("width: 16", "width: 32"), ("depth: 1", "depth: 2")])
def test_a_checkpoint_of_another_model_is_told(run: Path, tmp_path: Path, was: str, now: str) -> None:
    shutil.copytree(run, other := tmp_path / "run")
    settings = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(settings.replace(was, now))
    with pytest.raises(CheckpointError, match=r"00003 cannot be read as one of .*config.yaml: .*model\.encoder"):
        universal.write(other, tmp_path / "universal")
    assert not [*(tmp_path / "universal").iterdir()]


def test_a_write_that_fails_leaves_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise RuntimeError("PytorchStreamWriter failed writing file: No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match=r"global_step3 could not be written: .*No space left"):
        universal.write(run, tmp_path)
    assert not [*tmp_path.iterdir()]
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(CheckpointError, match=r"global_step3 takes 0\.\d MB, and .* has 0.0 free"):
        universal.write(run, tmp_path)
    assert not [*tmp_path.iterdir()]


def test_a_checkpoint_is_described_once(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read each description once.

    With many ranks, reading one takes seconds; reading it for each of thousands of tensors would take hours.
    """
    reader = Mock(side_effect=dcp._Unpickler)
    monkeypatch.setattr(dcp, "_Unpickler", reader)
    universal.write(run, tmp_path)
    assert reader.call_count == 1


# With DeepSpeed itself


def _in_deepspeed(folder: Path, run: Path, out: Path) -> dict[int, dict[str, Any]]:
    """Load FOLDER with DeepSpeed's own code, return the result by stage, and save it again in OUT/STAGE."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    deepspeed: Any = import_module("deepspeed")
    utils = import_module("deepspeed.utils")
    import_module("deepspeed.ops").__compatible_ops__["deepspeed_shm_comm"] = False  # compiling it takes minutes
    found = {}
    for stage in (1, 2, 3):
        model = outline(load_recipe(run / "config.yaml").recipe)
        materialise(model, "cpu")
        groups: dict[str, list[Tensor]] = {name: [] for name in RATES}
        for name, parameter in model.named_parameters():
            torch.nn.init.zeros_(parameter)
            kind = "posterior" if "posterior" in name else "decay" if parameter.ndim > 1 else "no_decay"
            groups[kind].append(parameter)
        adamw = torch.optim.AdamW([{"params": groups[name], "weight_decay": RATES[name]} for name in groups], lr=0.1)
        settings = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": stage},
            "zero_force_ds_cpu_optimizer": False,
            "checkpoint": {"load_universal": True},
        }
        engine, *_ = deepspeed.initialize(model=model, optimizer=adamw, config=settings)
        _, client = engine.load_checkpoint(str(folder), load_lr_scheduler_states=False)
        model.load_state_dict(client["buffers"], strict=False)
        kinds = {
            "model": utils.safe_get_full_fp32_param,
            "optimizer.exp_avg": lambda p: utils.safe_get_full_optimizer_state(p, "exp_avg"),
            "optimizer.exp_avg_sq": lambda p: utils.safe_get_full_optimizer_state(p, "exp_avg_sq"),
        }
        found[stage] = {
            "tensors": {f"{k}.{n}": get(p).clone() for n, p in model.named_parameters() for k, get in kinds.items()},
            "decay": [group["weight_decay"] for group in engine.optimizer.optimizer.param_groups],
            "steps": {float(state["step"]) for state in engine.optimizer.optimizer.state.values()},
            "count": (engine.global_steps, engine.skipped_steps),
        }
        engine.save_checkpoint(str(out / str(stage)))
    return found


@pytest.mark.slow
def test_deepspeed_goes_on_from_it_and_gives_it_back(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "universal"
    universal.write(run, folder)
    whole = tensors(run)
    for stage, found in run_ranks(2, tmp_path, _in_deepspeed, folder, run, tmp_path)[0].items():
        for name, tensor in found["tensors"].items():
            assert torch.equal(tensor.view_as(whole[name]), whole[name]), (stage, name)
        assert found["decay"] == [*RATES.values()] and found["steps"] == {3.0} and found["count"] == (3, 0)
        source, target = tmp_path / str(stage) / "global_step3", tmp_path / f"universal-{stage}" / "global_step3"
        convert = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
        folders = ["--input_folder", str(source), "--output_folder", str(target)]
        subprocess.run([*convert, *folders], check=True, capture_output=True)
        other = _beside(run, f"stage-{stage}")
        universal.read(target.parent, other)
        back = tensors(other)
        kept = {name for name in whole if not name.startswith("ema.")}
        assert_bit_equal({name: back[name] for name in kept}, {name: whole[name] for name in kept})


def test_deepspeeds_adam_counts_in_an_int(run: Path, tmp_path: Path) -> None:
    step = universal.write(run, tmp_path, "deepspeed") / "zero/encoder.norm.weight/step.pt"
    assert torch.load(step) == 3 and isinstance(torch.load(step), int)
    universal.read(tmp_path, other := _beside(run, "counted"))
    assert tensors(other)["optimizer.step.encoder.norm.weight"] == 3
    assert distributed.world_size() == 1
