"""A step of each task that transfers an encoder, beside plain baselines on the same batch.

Both contenders take turns in one process with one thread, and CPU seconds are counted: other work on the machine does
not matter. Memory is measured in a process for each. Images are patterns and noise in memory; reading them is not part
of it.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mimae import distributed
from mimae.bench.baselines.finetune import Finetune
from mimae.bench.baselines.linear import Linear
from mimae.bench.baselines.maskrcnn import PlainMaskRCNN
from mimae.bench.baselines.upernet import PlainUperNet
from mimae.bench.machine import resident_bytes
from mimae.config.load import load_recipe
from mimae.config.recipe import ClassifyRecipe, DetectRecipe, RunRecipe, SegmentRecipe
from mimae.data.loading.batch import Batch
from mimae.data.loading.loader import make_loader
from mimae.detection.examples import unpacked
from mimae.outside.files import write_atomically
from mimae.train.task import Task
from mimae.train.tasks.classify import Classify
from mimae.train.tasks.detect import Detect
from mimae.train.tasks.segment import Segment

OURS = "mimae"

CLASSIFY: dict[str, Any] = {
    "task": "classify",
    "data": {"image_size": 96, "crop_scale": [0.08, 1.0]},
    "model": {"width": 192, "depth": 6, "heads": 3, "patch_size": 8},
    "finetune": {"layer_decay": 0.65, "drop_path": 0.1},
    "augment": {"erase": 0.25, "mixup": 0.8, "cutmix": 1.0, "label_smoothing": 0.1},
    "optimizer": {"learning_rate": 5e-4, "betas": [0.9, 0.999]},
    "schedule": {"batch_size": 16},
}
"""ViT-Tiny's width with half of its depth, and MAE's recipe."""

LINEAR: dict[str, Any] = {
    **CLASSIFY,
    "finetune": {"layer_decay": 1.0, "drop_path": 0.0, "freeze": "all"},
    "head": {"pooling": "mean", "norm": "batch_norm", "init_std": 0.01},
    "augment": {"erase": 0.0, "mixup": 0.0, "cutmix": 0.0, "label_smoothing": 0.0},
    "optimizer": {"kind": "lars", "scale_by": "images", "learning_rate": 0.1, "weight_decay": 0.0},
}
"""The same encoder, frozen, which computes the features of random windows in every step."""

SEGMENT: dict[str, Any] = {
    "task": "segment",
    "data": {"image_size": 128},
    "model": {"width": 192, "depth": 6, "heads": 3, "patch_size": 8},
    "segment": {"classes": 5, "width": 128, "photometric": False, "max_class_share": 1.0},
    "finetune": {"layer_decay": 1.0, "drop_path": 0.1},
    "optimizer": {"learning_rate": 1e-4, "scale_by": "none", "betas": [0.9, 0.999]},
    "schedule": {"batch_size": 4},
}
"""UperNet with its auxiliary head."""

DETECT: dict[str, Any] = {
    "task": "detect",
    "data": {"image_size": 160},
    "model": {"width": 96, "depth": 4, "heads": 3, "patch_size": 8},
    "detect": {"window": 0, "relative_positions": False, "width": 64, "box_width": 256, "max_objects": 4},
    "optimizer": {"learning_rate": 1e-4, "scale_by": "none", "betas": [0.9, 0.999]},
    "schedule": {"batch_size": 2},
}
"""All blocks attend to the whole image, as those of the baseline do."""

_SHARED: dict[str, Any] = {"precision": "fp32", "compile": "off", "data": {"workers": 0}, "engine": {"kind": "ddp"}}

Steps = Callable[[], float]
"""Takes a step, and returns its loss."""


def ours(task: Task[Any], batch: Batch) -> Steps:
    """Return the trainer's step: inputs, forward, backward, optimizer."""
    engine = task.engine(torch.device("cpu"))

    def step() -> float:
        result = task.result(engine.forward(*task.inputs(batch)))
        engine.backward(result.loss)
        engine.step(1.0)
        return result.loss.item()

    return step


def classify(folder: Path, contender: str) -> Steps:
    """Return a contender that fine-tunes a classifier."""
    return _classifier(CLASSIFY, Finetune, folder, contender)


def linear(folder: Path, contender: str) -> Steps:
    """Return a contender that trains a linear classifier on a frozen encoder."""
    return _classifier(LINEAR, Linear, folder, contender)


def _classifier(tree: dict[str, Any], baseline: type[Finetune] | type[Linear], folder: Path, contender: str) -> Steps:
    generator = np.random.default_rng(0)
    for i in range(tree["schedule"]["batch_size"]):
        place = folder / str(i % 2)
        place.mkdir(exist_ok=True)
        # The brightness of an image follows its class, so that a few steps can learn it.
        pixels = generator.integers(0, 128, (96, 96, 3), np.uint8) + np.uint8(128 * (i % 2))
        Image.fromarray(pixels).save(place / f"{i}.png")
    task = Classify(_recipe(tree, folder, ClassifyRecipe))
    batch = _batch(task)
    if contender == OURS:
        return ours(task, batch)
    plain, labels = baseline(task.recipe, len(task.classes)), task.labels[batch.source_ids]
    return lambda: plain.step(batch.images, labels)


def segment(folder: Path, contender: str) -> Steps:
    """Return a contender that trains a segmenter."""
    generator, settings = np.random.default_rng(0), SEGMENT["segment"]
    for name in ("images", "masks"):
        (folder / name).mkdir()
    for i in range(SEGMENT["schedule"]["batch_size"]):
        classes = generator.integers(0, settings["classes"], (8, 8), np.uint8).repeat(16, 0).repeat(16, 1)
        # The color of a patch follows its class, so that a few steps can learn it.
        pixels = (classes[..., None] * 50 + generator.integers(0, 50, (128, 128, 3))).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{i}.png")
        Image.fromarray(classes).save(folder / "masks" / f"{i}.png")
    masks = {"masks": str(folder / "masks")}
    task = Segment(_recipe(SEGMENT, folder, SegmentRecipe, segment=masks, data={"path": str(folder / "images")}))
    batch = _batch(task)
    if contender == OURS:
        return ours(task, batch)
    plain, targets = PlainUperNet(task.recipe), batch.targets["classes"].long()
    return lambda: plain.step(batch.images, targets)


def detect(folder: Path, contender: str) -> Steps:
    """Return a contender that trains a detector of boxes and masks."""
    generator, tree = np.random.default_rng(0), dict[str, list[Any]](images=[], annotations=[])
    for i in range(DETECT["schedule"]["batch_size"]):
        Image.fromarray(generator.integers(0, 256, (160, 160, 3), np.uint8)).save(folder / f"{i}.png")
        tree["images"].append({"id": i, "file_name": f"{i}.png", "height": 160, "width": 160})
        for left, top, side in ((10, 20, 60), (80, 70, 70)):
            square = [left, top, left + side, top, left + side, top + side, left, top + side]
            each = {"id": len(tree["annotations"]), "image_id": i, "category_id": 1, "bbox": [left, top, side, side]}
            tree["annotations"].append(each | {"segmentation": [square]})
    write_atomically(folder / "coco.json", json.dumps(tree | {"categories": [{"id": 1, "name": "square"}]}))
    settings = {"annotations": str(folder / "coco.json"), "scale": [1, 1]}
    task = Detect(_recipe(DETECT, folder, DetectRecipe, detect=settings))
    batch = _batch(task)
    if contender == OURS:
        return ours(task, batch)
    plain, found = PlainMaskRCNN(task.recipe, len(task.categories)), batch.targets
    targets = [
        {
            "boxes": found["boxes"][i, :count],
            "labels": found["classes"][i, :count],
            "masks": unpacked(found["masks"][i, :count], batch.images.shape[2]),
        }
        for i, count in enumerate(found["count"].tolist())
    ]
    return lambda: plain.step(batch.images, targets)


CONTESTS: dict[str, tuple[Callable[[Path, str], Steps], str, int]] = {
    "classify": (classify, "timm, AdamW", CLASSIFY["schedule"]["batch_size"]),
    "linear": (linear, "timm, LARS", LINEAR["schedule"]["batch_size"]),
    "segment": (segment, "timm, transformers' UperNet", SEGMENT["schedule"]["batch_size"]),
    "detect": (detect, "torchvision's Mask R-CNN", DETECT["schedule"]["batch_size"]),
}
"""By task: the function that makes a contender, the baseline, and the images of a batch."""


def compete(task: str, rounds: int) -> dict[str, Any]:
    """Return images per CPU second of both contenders, and the ratio of each round, in turns."""
    make, baseline, images = CONTESTS[task]
    torch.set_num_threads(1)
    distributed.setup()
    try:
        with tempfile.TemporaryDirectory() as folder:
            steps = {name: _made(make, Path(folder), name) for name in (OURS, baseline)}
            for step in steps.values():
                step()
            seconds: dict[str, list[float]] = {name: [] for name in steps}
            for _ in range(rounds):
                for name, step in steps.items():
                    began = time.process_time()
                    step()
                    seconds[name].append(time.process_time() - began)
    finally:
        distributed.shutdown()
    ratios = [plain / own for own, plain in zip(seconds[OURS], seconds[baseline])]
    context = multiprocessing.get_context("spawn")
    memory = {}
    for name in steps:
        with context.Pool(1) as pool:
            memory[name] = pool.apply(peak, (task, name))
    return {
        "images": images,
        "images_per_cpu_s": {name: images / statistics.median(each) for name, each in seconds.items()},
        "ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
        "peak_bytes": memory,
    }


def peak(task: str, contender: str) -> int:
    """Return the bytes that a contender adds at most to a process that has imported it: weights, optimizer and three
    steps."""
    torch.set_num_threads(1)
    distributed.setup()
    with tempfile.TemporaryDirectory() as folder:
        before = resident_bytes("VmRSS")
        step = _made(CONTESTS[task][0], Path(folder), contender)
        for _ in range(3):
            step()
    return resident_bytes("VmHWM") - before


def show(found: dict[str, Any]) -> str:
    """Return the result as the table of the documents."""
    lines = [
        "| task | contender | images per CPU second | peak memory | speed beside it |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for task, each in found["tasks"].items():
        for name, rate in each["images_per_cpu_s"].items():
            ratio = each["ratio"]
            beside = f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})" if name == OURS else ""
            lines.append(f"| {task} | {name} | {rate:.2f} | {each['peak_bytes'][name] / 2**20:.0f} MiB | {beside} |")
    return "\n".join(lines)


def _made(make: Callable[[Path, str], Steps], folder: Path, contender: str) -> Steps:
    place = folder / contender.split(",")[0]
    place.mkdir()
    torch.manual_seed(0)
    return make(place, contender)


def _recipe(tree: dict[str, Any], folder: Path, kind: type[Any], **sections: dict[str, Any]) -> Any:
    given = {name: tree.get(name, {}) | sections.get(name, {}) for name in (*tree, *sections) if name != "task"}
    given["data"] = {"path": str(folder), "loader": "torch", **given["data"], **_SHARED["data"]}
    rest = {name: value for name, value in _SHARED.items() if name != "data"}
    run = {"run": {"dir": str(folder / "run")}}
    return load_recipe({"task": tree["task"], **rest, **given, **run}, (), None, kind).recipe


def _batch(task: Task[Any]) -> Batch:
    recipe: RunRecipe = task.recipe
    loader = make_loader(recipe.data, task.source, seed=0, batch_size=recipe.schedule.batch_size, reader=task.reader())
    try:
        return next(loader.epoch(0))
    finally:
        loader.close()
