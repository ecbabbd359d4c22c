"""Tests of classification: published recipes, runs that resume bit for bit, ranks, frozen encoders, refusals."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from mimae import distributed
from mimae.checkpoints import checkpoint
from mimae.config.load import load_recipe
from mimae.config.recipe import ClassifyRecipe
from mimae.data.loading.batch import Batch
from mimae.errors import ConfigError, UserError
from mimae.model.batch_norm import GlobalBatchNorm
from mimae.model.encoder import Encoder
from mimae.optim.schedule import schedule_factor, total_steps
from mimae.randomness import initialise, materialise
from mimae.train import frozen
from mimae.train.tasks.classify import Classify
from mimae.train.trainer import train
from tests.rank_processes import run_ranks
from tests.train.recipes import tiny
from tests.train.test_trainer import lines, tensors

STEPS = 9


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return 50 images, dark ones of class a and bright ones of class b; `held-out` has 7 of each.

    An epoch has 3 steps of 16.
    """
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for part, count in {"train": 50, "held-out": 14}.items():
        for i in range(count):
            place = folder / part / "ab"[i % 2]
            place.mkdir(exist_ok=True, parents=True)
            pixels = generator.integers(0, 100, (16, 16, 3), dtype=np.uint8) + np.uint8(100 * (i % 2))
            Image.fromarray(pixels).save(place / f"{i}.png")
    return folder


def recipe(images: Path, run: Path, *overrides: str) -> ClassifyRecipe:
    """Return a recipe with RandAugment, erasing, mixup and cutmix, drop path, layer decay, EMA and accumulation."""
    paths = {"path": str(images / "train"), "val_path": str(images / "held-out")}
    return tiny(
        ClassifyRecipe,
        run,
        overrides,
        data={**paths, "image_size": 8, "crop_scale": [0.5, 1.0]},
        augment={"rand_augment": 9, "erase": 0.25, "mixup": 0.8, "cutmix": 1.0, "mix": 0.5, "label_smoothing": 0.1},
        evaluation={"crop": 0.875},
        optimizer={"learning_rate": 0.01},
        schedule={"batch_size": 16, "epochs": 3, "shape": "constant"},
        ema={"decay": 0.5},
    )


LINEAR = (
    *("finetune.freeze=all", "finetune.drop_path=0", "augment.mix=0", "augment.erase=0", "augment.rand_augment=null"),
    *("head.norm=batch_norm", "head.pooling=class_token", "head.init_std=0.01", "data.loader=torch"),
)

FIXED = (*LINEAR, "data.crop_scale=null", "data.flip=false")
"""Options of a linear classifier that sees the same features of an image in every epoch."""


# The published recipes


def rules(name: str, *overrides: str) -> tuple[ClassifyRecipe, dict[str, Any]]:
    """Return a shipped recipe, and the optimizer group of each parameter of its model with 1,000 classes."""
    task = Classify(load_recipe(name, overrides, None, ClassifyRecipe).recipe)
    with torch.device("meta"):
        model = task.model(1000)
    return task.recipe, {n: task.group(n, p.shape) for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("name", "epochs", "base_rate", "decay", "drop_path"),
    [("base", 100, 5e-4, 0.65, 0.1), ("large", 50, 1e-3, 0.75, 0.2), ("huge", 50, 1e-3, 0.75, 0.3)],
)
def test_fine_tuning_follows_maes_recipe(
    name: str, epochs: int, base_rate: float, decay: float, drop_path: float
) -> None:
    recipe, groups = rules(f"finetune_vit_{name}")
    peak, depth = base_rate * 1024 / 256, recipe.model.depth
    assert groups["head.weight"] == (peak, 0.05, "main", True) and groups["head.bias"][:2] == (peak, 0.0)
    assert groups["fc_norm.weight"][:2] == (peak, 0.0) and "encoder.norm.weight" not in groups
    for embedding, weight_decay in {"cls_token": 0, "pos_embed": 0, "patch_embed.proj.weight": 0.05}.items():
        assert groups[f"encoder.{embedding}"][:2] == pytest.approx((peak * decay ** (depth + 1), weight_decay))
    assert groups[f"encoder.blocks.{depth - 1}.mlp.fc1.weight"][:2] == pytest.approx((peak * decay, 0.05))
    assert len(set(groups.values())) == 2 * (depth + 2)
    assert recipe.finetune.drop_path == drop_path and recipe.finetune.freeze == "none"
    assert recipe.optimizer.betas == (0.9, 0.999) and recipe.optimizer.clip is None and recipe.ema.decay is None
    assert (recipe.data.size_hw, recipe.data.crop_scale, recipe.data.flip) == ((224, 224), (0.08, 1.0), True)
    augment = recipe.augment
    assert (augment.rand_augment, augment.rand_augment_std, augment.erase) == (9, 0.5, 0.25)
    assert (augment.mixup, augment.cutmix, augment.mix, augment.cutmix_share) == (0.8, 1.0, 1.0, 0.5)
    assert augment.label_smoothing == 0.1 and recipe.evaluation.crop == 0.875
    assert (recipe.head.pooling, recipe.head.norm, recipe.head.init_std) == ("mean", "fc_norm", 2e-5)
    check_schedule(recipe, peak, 1024, epochs, warmup=5, floor=1e-6)


@pytest.mark.parametrize(("name", "epochs"), [("base", 90), ("large", 50), ("huge", 50)])
def test_linear_probing_follows_maes_recipe(name: str, epochs: int) -> None:
    recipe, groups = rules(f"linear_vit_{name}")
    assert set(groups) == {"head.weight", "head.bias"}
    assert groups["head.weight"] == (6.4, 0.0, "main", True) and groups["head.bias"] == (6.4, 0.0, "main", False)
    assert (recipe.optimizer.kind, recipe.optimizer.momentum) == ("lars", 0.9)
    assert (recipe.head.pooling, recipe.head.norm, recipe.head.init_std) == ("class_token", "batch_norm", 0.01)
    assert recipe.augment == type(recipe.augment)() and recipe.evaluation.crop == 0.875
    assert (recipe.data.crop_scale, recipe.data.flip) == ((0.08, 1.0), True)
    check_schedule(recipe, 6.4, 16384, epochs, warmup=10, floor=0.0)


def check_schedule(recipe: ClassifyRecipe, peak: float, batch: int, epochs: int, warmup: int, floor: float) -> None:
    """Return the rate of MAE's util/lr_sched.py, which depends on the epoch as a fraction."""
    per_epoch = 1_281_167 // batch
    assert recipe.schedule.batch_size == batch and Classify(recipe).peak == pytest.approx(peak)
    assert total_steps(recipe.schedule, per_epoch) == epochs * per_epoch
    for step in (0, 1, warmup * per_epoch - 1, warmup * per_epoch, 30 * per_epoch + 7, epochs * per_epoch - 1):
        at = step / per_epoch
        rate = peak * at / warmup
        if at >= warmup:
            rate = floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * (at - warmup) / (epochs - warmup)))
        assert peak * schedule_factor(recipe.schedule, step, per_epoch, peak) == pytest.approx(rate, abs=1e-12), step


def test_the_first_logits_are_small_and_a_frozen_encoder_has_no_gradient(images: Path, tmp_path: Path) -> None:
    """Initialise by N(0, 2e-5): the first loss is log C for any features. `fc_norm` replaces the encoder's norm."""
    task = Classify(recipe(images, tmp_path, "finetune.freeze=1"))
    model = task.outline()
    materialise(model, "cpu")
    initialise(model, 0)
    assert model.head.weight.std().item() == pytest.approx(2e-5, rel=0.4) and not model.head.bias.any()
    pixels, targets = torch.randint(0, 256, (4, 8, 8, 3), dtype=torch.uint8), torch.eye(2)[[0, 1, 0, 1]]
    loss = model(pixels, targets)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-3)
    loss.backward()
    still = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert still == {n for n, p in model.named_parameters() if p.grad is None}
    assert {n.split(".")[1] for n in still} == {"patch_embed", "cls_token", "pos_embed", "blocks"}
    assert all(n.startswith("encoder.blocks.0.") for n in still if ".blocks." in n)
    assert not isinstance(model.encoder.norm, nn.LayerNorm) and model.fc_norm.eps == 1e-6


def test_what_a_step_sees_does_not_depend_on_its_split(images: Path, tmp_path: Path) -> None:
    """Draw erasing, mixing and drop path for a batch and for its halves: they are equal, since pairs are neighbours."""
    task = Classify(recipe(images, tmp_path, "augment.mix=1"))
    ids = torch.arange(16)
    pixels = torch.randint(0, 256, (16, 8, 8, 3), dtype=torch.uint8)
    for step in range(4):
        whole = task.inputs(Batch(pixels, ids, ids, 1, step))
        halves = [task.inputs(Batch(pixels[part], ids[part], ids[part], 1, step)) for part in (slice(8), slice(8, 16))]
        for all_of_it, first, second in zip(whole, *halves, strict=True):
            assert torch.equal(all_of_it, torch.cat([first, second]))
        assert whole[0].dtype == torch.float32 and whole[2].shape == (16, 2, 2)
        torch.testing.assert_close(whole[1].sum(1), torch.ones(16))


# Whole runs


def test_a_run_resumes_bit_for_bit_and_learns(images: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(Classify(recipe(images, whole, "telemetry.images_every_epochs=3"))).finished
    for _ in range(2):
        train(Classify(recipe(images, parts, "run.dry=true")))
    assert train(Classify(recipe(images, parts))) == (parts, STEPS, True, False)
    ends = [tensors(run) for run in (whole, parts)]
    assert len(ends[0]) > 100 and not [name for name in ends[0] if not torch.equal(ends[0][name], ends[1][name])]
    records = [lines(run / "metrics.jsonl") for run in (whole, parts)]
    assert [r["loss"] for r in records[0]] == [r["loss"] for r in records[1]]
    last = lines(whole / "epochs.jsonl")[-1]
    assert last["top1"] == 1.0 and last["val_loss"] < 0.6 and last["top5"] is None
    assert (whole / "images" / f"step-{STEPS:08d}.png").read_bytes().startswith(b"\x89PNG")
    found = checkpoint.find(whole)
    assert found is not None and found.state["task"] == {"classes": {"names": ["a", "b"], "numbers": [0, 1]}}


def losses(images: Path, run: Path, *overrides: str) -> tuple[list[float], float]:
    assert train(Classify(recipe(images, run, *overrides))).finished
    return [line["loss"] for line in lines(run / "metrics.jsonl")], lines(run / "epochs.jsonl")[-1]["val_loss"]


def one_and_two(images: Path, folder: Path, *overrides: str) -> None:
    """Compare losses of 9 steps with every augmentation: the order of summation differs, by at most 1e-4 relatively."""
    two = run_ranks(2, folder, losses, images, folder / "two", *overrides, "schedule.accumulate=1")
    one = losses(images, folder / "one", "schedule.accumulate=1", *overrides, "engine.kind=ddp")
    for found in two:
        assert found[0] == pytest.approx(one[0], rel=1e-4) and found[1] == pytest.approx(one[1], rel=1e-3)


def test_two_ranks_train_as_one(images: Path, tmp_path: Path) -> None:
    one_and_two(images, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fsdp", "zero2"])
def test_two_ranks_train_as_one_under_every_engine(images: Path, tmp_path: Path, kind: str) -> None:
    if kind == "zero2":
        pytest.importorskip("deepspeed")
    one_and_two(images, tmp_path, f"engine.kind={kind}")


@pytest.mark.slow
@pytest.mark.parametrize("options", [LINEAR, FIXED], ids=["augmented", "fixed"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_ranks_train_a_linear_classifier_as_one(
    images: Path, tmp_path: Path, kind: str, options: tuple[str, ...]
) -> None:
    """Use the moments of the global batch in the batch norm, and share the work of features that are computed once."""
    lars = ["optimizer.kind=lars"] if kind == "ddp" else []
    one_and_two(images, tmp_path, *options, f"engine.kind={kind}", *lars)


def test_a_frozen_encoder_stays_and_resumes(images: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = (*LINEAR, "optimizer.kind=lars", "optimizer.learning_rate=1", "ema.decay=null")
    assert train(Classify(recipe(images, whole, *options))).finished
    train(Classify(recipe(images, parts, *options, "run.dry=true")))
    first = tensors(parts)
    assert train(Classify(recipe(images, parts, *options))).finished
    ends = [tensors(run) for run in (whole, parts)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    moved = {name for name in first if not torch.equal(first[name], ends[0][name])}
    assert {n for n in moved if n.startswith("model.")} == {
        *("model.head.weight", "model.head.bias", "model.fc_norm.mean", "model.fc_norm.variance")
    }
    assert not [name for name in ends[0] if name.startswith("optimizer.") and ".encoder." in name]


def encoded(images: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Train a linear classifier, and return the number of images that its encoder computed."""
    count, forward = 0, Encoder.forward

    def counted(self: Encoder, batch: Tensor, *rest: Any, **named: Any) -> Tensor:
        nonlocal count
        count += len(batch)
        return forward(self, batch, *rest, **named)

    with monkeypatch.context() as patch:
        patch.setattr(Encoder, "forward", counted)
        assert train(Classify(recipe(images, run, *FIXED, "optimizer.kind=lars"))).finished
    return count


def test_the_features_of_a_frozen_encoder_are_computed_once(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Compare with a run whose encoder sees every batch, and with one that stopped in the middle of an epoch.

    The 50 training images and the 14 held-out ones are encoded once, not in each of 3 epochs. Features of other
    batches may be rounded differently.
    """
    assert encoded(images, tmp_path / "once", monkeypatch) == 50 + 14
    assert "the features of 50 images take 0.0 MiB on each rank" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr(frozen, "LIMIT", 50 * 16 * 4 - 1)
        assert encoded(images, tmp_path / "often", monkeypatch) >= STEPS * 16 + 14
    assert "the frozen encoder computes them in every epoch" in capsys.readouterr().out
    options = (*FIXED, "optimizer.kind=lars")
    train(Classify(recipe(images, tmp_path / "parts", *options, "run.dry=true")))
    assert train(Classify(recipe(images, tmp_path / "parts", *options))).finished
    once, often, parts = (lines(tmp_path / run / "metrics.jsonl") for run in ("once", "often", "parts"))
    assert [line["loss"] for line in once] == pytest.approx([line["loss"] for line in often], rel=1e-5)
    ends = [tensors(tmp_path / run) for run in ("once", "parts")]
    assert not [name for name in ends[0] if not torch.equal(ends[0][name], ends[1][name])]
    assert [line["loss"] for line in once] == [line["loss"] for line in parts]
    assert (
        lines(tmp_path / "once" / "epochs.jsonl")[-1]["top1"] == lines(tmp_path / "often" / "epochs.jsonl")[-1]["top1"]
    )


# The batch norm


def normed(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    part = features.chunk(distributed.world_size())[distributed.rank()]
    norm = GlobalBatchNorm(features.shape[1])
    for _ in range(3):
        found = norm(part)
    return found, norm.mean, norm.variance


def test_the_batch_norm_is_torchs() -> None:
    features = torch.randn(24, 5) * 3 + torch.arange(5.0)
    theirs = nn.BatchNorm1d(5, affine=False, eps=1e-6)
    for _ in range(3):
        expected = theirs(features)
    found, mean, variance = normed(features)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mean, theirs.running_mean)
    torch.testing.assert_close(variance, theirs.running_var)
    ours = GlobalBatchNorm(5).eval()
    torch.testing.assert_close(ours(features), nn.BatchNorm1d(5, affine=False, eps=1e-6).eval()(features))


# Mistakes


def test_mistakes_are_one_line(images: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"mix pairs of images, but a micro-batch of one rank has 1 .*augment.mix=0"):
        Classify(recipe(images, tmp_path, "schedule.batch_size=2")).check()
    with pytest.raises(ConfigError, match="the encoder has 2 blocks"):
        recipe(images, tmp_path, "finetune.freeze=3")
    with pytest.raises(ConfigError, match="is only for frozen encoders"):
        recipe(images, tmp_path, "head.norm=batch_norm")
    with pytest.raises(ConfigError, match="legal is top1 or top5 or val_loss, or null"):
        recipe(images, tmp_path, "checkpoint.best=knn")
    with pytest.raises(UserError, match="1 class; a classifier needs at least 2"):
        (tmp_path / "one/a").mkdir(parents=True)
        Image.new("RGB", (9, 9)).save(tmp_path / "one/a/0.png")
        Classify(recipe(images, tmp_path, f"data.path={tmp_path / 'one'}", "data.val_path=null")).check()
    with pytest.raises(UserError, match="has no labels, which a classifier needs"):
        Classify(recipe(images, tmp_path, f"data.path={tmp_path / 'one/a'}", "data.val_path=null")).check()


def test_held_out_images_that_cannot_be_read_are_counted(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(images / "held-out", tmp_path / "held-out")
    (tmp_path / "held-out/a/0.png").write_bytes(b"none")
    overrides = [f"data.val_path={tmp_path}/held-out", "schedule.max_steps=1", "telemetry.images_every_epochs=1"]
    train(Classify(recipe(images, tmp_path / "run", *overrides)))
    assert capsys.readouterr().out.count("in data.val_path 1 of 14 images could not be used") == 1


def test_a_class_that_is_missing_in_validation_is_told_and_a_strange_one_refused(images: Path, tmp_path: Path) -> None:
    for label, file in {"b": "b/1.png", "c": "b/3.png"}.items():
        (tmp_path / "some" / label).mkdir(parents=True)
        (tmp_path / "some" / label / "x.png").write_bytes((images / "train" / file).read_bytes())
    task = Classify(recipe(images, tmp_path, f"data.val_path={tmp_path / 'some'}"))
    with pytest.raises(UserError, match=r"1 classes that the classifier does not have, c among them; legal .* a, b"):
        task.check()
    (tmp_path / "some/c/x.png").rename(tmp_path / "some/b/y.png")
    (tmp_path / "some/c").rmdir()
    (tmp_path / "list.txt").write_text("some/b/x.png\tb\nsome/b/y.png\tb\n")
    task = Classify(recipe(images, tmp_path, f"data.val_path={tmp_path / 'list.txt'}"))
    task.check()
    assert [*task.notes()] == ["2 classes", "data.val_path has no image of 1 classes: a"]


def test_a_label_beyond_the_classes_is_refused(images: Path, tmp_path: Path) -> None:
    """Use class numbers without names and with a gap, which the task must map to 0, 1, ... in its own order."""
    for name, labels in {"train": (3, 7), "held-out": (3, 8)}.items():
        files = sorted((images / name).rglob("*.png"))[:4]
        rows = [f"{file}\t{labels[i % 2]}" for i, file in enumerate(files)]
        (tmp_path / f"{name}.txt").write_text("\n".join(rows))
    options = [f"data.path={tmp_path / 'train.txt'}", "schedule.batch_size=4", "schedule.accumulate=1"]
    task = Classify(recipe(images, tmp_path, *options, f"data.val_path={tmp_path / 'train.txt'}"))
    task.check()
    assert task.labels.tolist() == [0, 1, 0, 1] and task.classes.name(1) == "7"
    with pytest.raises(UserError, match=r"1 classes that the classifier does not have, 8 among them; legal .* 3, 7"):
        Classify(recipe(images, tmp_path, *options, f"data.val_path={tmp_path / 'held-out.txt'}")).check()
