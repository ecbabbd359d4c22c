"""Tests of runs whose image size grows: exact resuming, results of each stage, records, plans, and refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mimae.checkpoints import checkpoint
from mimae.config.load import load_recipe
from mimae.config.recipe import ClassifyRecipe
from mimae.errors import ConfigError, RunError, UserError
from mimae.launch.command import extend
from mimae.model.masking import views
from mimae.model.mimae import build
from mimae.objective.posterior import cell_means
from mimae.optim.resolution import Stage, stages, work
from mimae.outside.files import Folder
from mimae.plan.advice import report
from mimae.plan.cost import Fleet
from mimae.plan.flops import encoder_flops, image_flops, objective_flops, run_flops, step_flops
from mimae.plan.gpus import find_gpu
from mimae.randomness import whole_parts
from mimae.telemetry import events
from mimae.telemetry.console import Console
from mimae.tools import status
from mimae.tools.replay import replay
from mimae.train.tasks.pretrain import Pretrain, pretrain
from mimae.weights.open import open_source as open_weights
from tests.oracles.mae_oracle import sincos_positions
from tests.plan import formula
from tests.train.test_trainer import assert_bit_equal, images, lines, recipe, tensors  # noqa: F401

GROWING = "schedule.resolution=[[4, 0.34], [6, 0.33], [8, 0.33]]"
"""Setting of 9 steps, 3 each with images of 2 x 2, 3 x 3 and 4 x 4 patches; the 4 x 4 cells of V do not divide 3 x 3.
"""

EACH_STEP = ("checkpoint.every_steps=1", "checkpoint.keep=9")

QUIET = ("telemetry.probe_every_epochs=0", "telemetry.images_every_epochs=0")

SIZES = [4, 4, 4, 6, 6, 6, 8, 8, 8]


def only_until(run: Path, step: int) -> None:
    """Delete a run's checkpoints after a step."""
    for name in checkpoint.names(run):
        if int(name.removeprefix("step-")) > step:
            shutil.rmtree(run / "checkpoints" / name)


@pytest.fixture(scope="module")
def whole(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """Return an uninterrupted run with all its checkpoints."""
    run = tmp_path_factory.mktemp("whole")
    pretrain(recipe(images, run, GROWING, *EACH_STEP, *QUIET))
    return run


@pytest.mark.parametrize(
    "step",
    [
        pytest.param(3, id="between two stages", marks=pytest.mark.slow),
        pytest.param(5, id="inside a stage, with a worker that loads the next one"),
    ],
)
def test_a_run_resumes_with_equal_bits(whole: Path, images: Path, tmp_path: Path, step: int) -> None:  # noqa: F811
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    only_until(run, step)
    workers = f"data.workers={step % 3 // 2}"
    assert pretrain(recipe(images, run, GROWING, *EACH_STEP, *QUIET, workers)).finished
    assert_bit_equal(tensors(run), tensors(whole))
    assert [line["loss"] for line in lines(run / "metrics.jsonl")] == [
        line["loss"] for line in lines(whole / "metrics.jsonl")
    ]


def sizes_told(run: Path) -> list[tuple[Any, Any]]:
    """Return step and details of the events that tell a size."""
    return [(event["step"], event["details"]) for event in events.read(Folder(run)) if event["kind"] == "resolution"]


def test_a_run_that_continues_inside_a_stage_tells_its_size(whole: Path, images: Path, tmp_path: Path) -> None:  # noqa: F811
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    only_until(run, 4)
    pretrain(recipe(images, run, GROWING, *QUIET, "run.dry=true"))
    assert sizes_told(run)[-1] == (4, {"size": [6, 6], "until": 6})


def test_records_events_and_status_name_the_sizes(whole: Path) -> None:
    assert [line["image_size"] for line in lines(whole / "metrics.jsonl")] == SIZES
    found = sizes_told(whole)
    assert found == [
        (0, {"size": [4, 4], "until": 3}),
        (3, {"size": [6, 6], "until": 6}),
        (6, {"size": [8, 8], "until": 9}),
    ]
    assert "images of 8 px" in status.look(whole)["step"]


def test_a_step_of_an_early_stage_can_be_replayed(whole: Path, images: Path) -> None:  # noqa: F811
    found = replay(recipe(images, whole, GROWING), 5, say=lambda _: None)
    line = lines(whole / "metrics.jsonl")[4]
    assert found.losses["loss"] == pytest.approx(line["loss"], rel=1e-6)


def test_stages_are_a_function_of_the_step() -> None:
    schedule = load_recipe("quickstart_fast").recipe.schedule
    assert stages(schedule, (32, 32), 1200) == [
        Stage((16, 16), 0, 360),
        Stage((24, 24), 360, 720),
        Stage((32, 32), 720, 1200),
    ]
    # A stage without steps is left out, but never the last one: the run ends with images of data.image_size.
    assert stages(schedule, (32, 32), 1) == [Stage((32, 32), 0, 1)]
    assert stages(schedule, (32, 32), 2) == [Stage((16, 16), 0, 1), Stage((32, 32), 1, 2)]
    late = load_recipe("quickstart_fast", ["schedule.resolution=[[16, 0.999], [32, 0.001]]"]).recipe.schedule
    assert stages(late, (32, 32), 100) == [Stage((16, 16), 0, 99), Stage((32, 32), 99, 100)]
    plain = load_recipe("quickstart").recipe.schedule
    assert stages(plain, (32, 32), 7) == [Stage((32, 32), 0, 7)]


def test_the_work_of_a_run_counts_the_size_of_each_step() -> None:
    found = stages(load_recipe("quickstart_fast").recipe.schedule, (32, 32), 10)  # 3 + 3 + 4 steps
    counts = [work(found, step, lambda size_hw: size_hw[0] / 8) for step in range(11)]
    assert counts == [0, 2, 4, 6, 9, 12, 15, 19, 23, 27, 31]


def test_the_time_left_knows_that_later_images_are_larger(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a step take one second for each 8 pixels of a side; after 2 of 10 steps, 4 of 31 seconds have passed."""
    found = stages(load_recipe("quickstart_fast").recipe.schedule, (32, 32), 10)
    clock = iter([0.0, 0.0, 2.0, 4.0, 6.0, 9.0])
    monkeypatch.setattr("mimae.telemetry.console.time", SimpleNamespace(monotonic=lambda: next(clock)))
    console = Console(10, ["loss"], [], lambda step: work(found, step, lambda size_hw: size_hw[0] / 8))
    console.begin(0)
    told: list[float | None] = []

    def note(record: Any, left: float | None) -> str:
        told.append(left)
        return ""

    monkeypatch.setattr(console, "_step_line", note)
    for step in range(1, 5):
        console.step({"step": step, "loss": 1.0})
    assert told == [29, 27, 25, 22]


@pytest.mark.parametrize("size", [4, 6])
def test_a_stage_computes_what_a_model_of_its_size_does(images: Path, tmp_path: Path, size: int) -> None:  # noqa: F811
    """Compare with a model for images of that size only: the predictions are equal bit for bit.

    Both have equal weights, since the random numbers of a weight depend on the seed and its name.
    """
    grown = build(recipe(images, tmp_path, GROWING))
    small = recipe(images, tmp_path, f"data.image_size={size}")
    alone = build(small)
    pixels = torch.randint(0, 256, (3, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    seen = views(small, 0, 0, torch.arange(3))
    grown_seen = views(recipe(images, tmp_path, GROWING), 0, 0, torch.arange(3), (size, size))
    assert all(torch.equal(a, b) for a, b in zip(seen, grown_seen, strict=True))
    with torch.no_grad():
        assert torch.equal(grown.predict(pixels, *seen), alone.predict(pixels, *seen))
        losses, wanted = grown(pixels, *seen).columns, alone(pixels, *seen).columns
    assert losses["rec"] == wanted["rec"] and losses["max_mi"] == wanted["max_mi"]
    assert losses["fit"] != wanted["fit"], "V has the cells of the last size"
    side = size // 2
    table = next(iter(t for n, t in grown.named_buffers() if n == f"encoder_positions.{side}x{side}"))
    np.testing.assert_allclose(table.double(), sincos_positions((side, side), 16), atol=1e-6)


@pytest.mark.parametrize("shape", [(8, 12), (4, 6), (6, 9), (5, 7)])
def test_cells_of_v_are_means_of_their_pixels(shape: tuple[int, int]) -> None:
    """Use 4 x 6 cells on images with several pixels per cell, with one, and with less than one."""
    rows, columns = 4, 6
    pixels = np.random.default_rng(0).integers(0, 256, (2, *shape, 3)).astype(np.float64)
    wanted = np.empty((2, rows, columns, 3))
    for r in range(rows):
        for c in range(columns):
            # Round the start of the cell down and its end up.
            tall = slice(r * shape[0] // rows, -(-(r + 1) * shape[0] // rows))
            wide = slice(c * shape[1] // columns, -(-(c + 1) * shape[1] // columns))
            wanted[:, r, c] = pixels[:, tall, wide].mean((1, 2))
    np.testing.assert_allclose(cell_means(torch.from_numpy(pixels), rows, columns).numpy(), wanted, rtol=1e-12)


def test_the_planner_knows_the_stages() -> None:
    given = load_recipe("quickstart_fast").recipe
    for size in (16, 24, 32):
        alone = load_recipe("quickstart_next_view", [f"data.image_size={size}"]).recipe
        assert encoder_flops(given, (size, size)) == encoder_flops(alone)
        # V has the same number of cells at any size; all else equals the work of a run with this size only.
        assert image_flops(given, (size, size)) - objective_flops(given, (size, size)) == image_flops(
            alone
        ) - objective_flops(alone)
    assert step_flops(given) == formula.step_flops(given)
    parts = [step_flops(given, (size, size)) for size in (16, 24, 32)]
    assert run_flops(given) == pytest.approx(0.3 * parts[0] + 0.3 * parts[1] + 0.4 * parts[2])
    told = report(given, Fleet(find_gpu("H100"), 1, 1, 0.45), 6400)
    rows = [line.split() for line in told.splitlines() if line.strip().startswith(("16 px", "24 px", "32 px"))]
    assert [row[2] for row in rows] == ["360", "360", "480"]
    assert Pretrain(given).flops((16, 16)) == parts[0] / given.schedule.batch_size
    longer = given.schedule.model_copy(update={"extended": ((1200, 0.0, "schedule.epochs=6 until step 1200"),)})
    assert run_flops(given.model_copy(update={"schedule": longer})) == parts[2], "all further steps have its last size"


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        (["schedule.resolution=[[4, 0.5], [8, 0.4]]"], "sum to 0.9; legal is 1"),
        (["schedule.resolution=[[4, 0.5], [6, 0.5]]"], "ends with images of 6 px, and data.image_size = 8"),
        (["schedule.resolution=[[12, 0.5], [8, 0.5]]"], "12 px before 8 px; legal are sizes that grow"),
        (["schedule.resolution=[[5, 0.5], [8, 0.5]]"], "each side of 5 px must be divisible by model.patch_size = 2"),
        (["schedule.resolution=[[2, 0.5], [8, 0.5]]"], "2 px are one patch"),
        (["schedule.resolution=[[[4, 6], 0.5], [8, 0.5]]"], "4 x 6 px has another shape than data.image_size = 8"),
        (["schedule.resolution=[[6, 0.5], [8, 0.5]]", "masking.num_masks=5", "masking.ratio=0.8"], "an image of 9 (6"),
    ],
)
def test_stages_that_cannot_be(images: Path, tmp_path: Path, overrides: list[str], wanted: str) -> None:  # noqa: F811
    with pytest.raises(ConfigError) as caught:
        recipe(images, tmp_path, *overrides)
    assert wanted in str(caught.value)


def test_other_tasks_and_cuda_graphs_have_one_size(images: Path, tmp_path: Path) -> None:  # noqa: F811
    with pytest.raises(ConfigError, match="applies to pretraining; legal here is \\[\\]"):
        load_recipe("finetune_cifar10", ["schedule.resolution=[[16, 0.5], [32, 0.5]]"], None, ClassifyRecipe)
    with pytest.raises(UserError, match=r"compile=graphs with schedule\.resolution .* several sizes"):
        pretrain(recipe(images, tmp_path / "run", GROWING, "compile=graphs"))


def test_positions_that_are_learned_are_no_start(images: Path, tmp_path: Path) -> None:  # noqa: F811
    from safetensors.torch import save_file

    file = tmp_path / "model.safetensors"
    asked = recipe(images, tmp_path / "run", GROWING, f"model.init={file}")
    weights = dict(build(asked).encoder.state_dict())
    for added, wanted in ((0.0, None), (0.1, r"not the fixed sines and cosines.*legal is schedule\.resolution=\[\]")):
        save_file(weights | {"pos_embed": weights["pos_embed"] + added}, file)
        model, task = build(asked), Pretrain(asked)
        task.weights = open_weights(str(file))
        if wanted is None:
            task.start(model, whole_parts(model))
            continue
        with pytest.raises(RunError, match=wanted):
            task.start(model, whole_parts(model))


def test_a_run_is_extended_in_its_last_stage_and_stays_there(
    whole: Path,
    images: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    only_until(run, 5)
    with pytest.raises(RunError, match=r"is at step 5, and schedule.resolution reaches 8 px at step 6"):
        extend(run, ["schedule.epochs=4"], ranks=1)
    shutil.rmtree(run)
    shutil.copytree(whole, run)
    pretrain(recipe(images, run, GROWING, "schedule.epochs=4", "run.extend=true", *EACH_STEP, *QUIET))
    assert [line["image_size"] for line in lines(run / "metrics.jsonl")] == [*SIZES, 8, 8, 8]
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 12
