"""Tests of the dry run: memory and communication of a rank in a large world are as planned, and errors are detected."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import typer

from mimae.config.load import load_recipe
from mimae.config.recipe import Recipe
from mimae.errors import UserError
from mimae.plan import command, communication, dry, memory
from mimae.plan.gpus import find_gpu
from mimae.plan.memory import Layout
from tests.plan.test_memory import EVERY_TERM
from tests.plan.test_plan import SMALL


def small(*overrides: str) -> Recipe:
    """Return a recipe with activations above the plan's tolerance, and with rows that 8 ranks cannot divide evenly."""
    sizes = ["model.width=72", "model.heads=6", "decoder.width=48", "schedule.batch_size=64", "engine.kind=fsdp"]
    return load_recipe(SMALL, [*sizes, "objective.projector=mlp", *overrides]).recipe


def agrees(recipe: Recipe, ranks: int = 8) -> bool:
    layout = Layout("fsdp", ranks, recipe.engine.replicas)
    return dry.report(recipe, layout, find_gpu("h100"), 4)


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(["engine.replicas=2", "precision=bf16"], id="replicas"),
        pytest.param(
            ["precision=fp32", "schedule.accumulate=2", "ema.decay=0.9", "model.checkpointing=full"],
            id="one group",
            marks=pytest.mark.slow,
        ),
        pytest.param(["objective.max_mi=0", "decoder.attention=cross"], id="no InfoNCE", marks=pytest.mark.slow),
        pytest.param([*EVERY_TERM, "masking.kind=independent"], id="every term"),
    ],
)
def test_a_step_is_as_planned(overrides: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert agrees(small(*overrides)), capsys.readouterr().out
    assert not dist.is_initialized()
    said = capsys.readouterr().out
    assert "rank 7 of 8" in said and "losses of shape (), latents" in said


@pytest.fixture(scope="module")
def counted() -> dry.Counted:
    """Return the counts of the last of 8 ranks in two replicas."""
    return dry.count_step(small("engine.replicas=2"), 8, 7)


def test_the_schedule_is_told_in_order(counted: dry.Counted) -> None:
    said = dry.schedule(counted.collectives)
    assert "forward      3 x  all-gather among 4" in said[1]  # three blocks of the encoder, after what is outside
    assert any("reduce-scatter among 4" in line and "all-reduce among 2" in line for line in said)
    assert said[-1].startswith("  optimizer    1 x  all-reduce among 4")


def test_a_plan_that_is_wrong_is_seen(counted: dry.Counted) -> None:
    recipe, layout = small("engine.replicas=2"), Layout("fsdp", 8, 2)
    count = memory.parameters(recipe)
    planned = memory.memory(recipe, layout, 8, count=count, ops="fake")
    held = memory.kept(recipe, 8, 8, "fake") + 4 * count.root
    sent = communication.traffic(recipe, layout, find_gpu("h100"), 4, count)

    def wrong(planned: memory.Memory, held: float, sent: list[communication.Traffic]) -> list[str]:
        return [row.line for row in dry.compare(counted, planned, held, sent) if not row.is_right]

    assert not wrong(planned, held, sent)
    (line,) = wrong(planned._replace(workspace=planned.workspace + 0.2 * planned.total), held, sent)
    assert "peak" in line and line.endswith("OUT")
    assert len(wrong(planned, held, sent[1:])) == 2  # bytes and calls
    (line,) = wrong(planned, held, [sent[0]._replace(calls=sent[0].calls + 2), *sent[1:]])
    assert "calls" in line and line.endswith("OUT")
    assert not dry.wrong_parts(counted)
    assert dry.wrong_parts(counted._replace(place=2))  # rows of a neighbour


def test_the_verb_ends_with_the_verdict(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    defaults: dict[str, Any] = {"gpu": "h100", "nodes_of": 8, "share": 0.45, "images": 10_240, "dry_run": True}
    for right in (True, False):
        monkeypatch.setattr(dry, "report", lambda *_, right=right: right)
        with pytest.raises(typer.Exit) as ended:
            command.plan("vit_giant14", gpus=64, **defaults)
        assert ended.value.exit_code == (0 if right else 1)
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"needs engine\.kind=fsdp"):
        command.plan("vit_base_400ep", gpus=64, **defaults)
    with pytest.raises(UserError, match=r"engine\.replicas=3 does not divide the 8 ranks"):
        agrees(small("engine.replicas=3"))
    assert not dist.is_initialized()


def test_storages_are_counted_as_long_as_they_live() -> None:
    held = torch.empty(10)
    with dry.Watch([held]) as watch:
        assert watch.live == 40
        more = torch.empty(100)
        view = more[:3]
        assert watch.live == 440
        del more
        assert watch.live == 440  # The view keeps it alive.
        view.untyped_storage().resize_(0)
        assert watch.live == 40
        view.untyped_storage().resize_(80)
        del view
    assert (watch.live, watch.peak) == (40, 440)


@pytest.mark.slow
@pytest.mark.parametrize("engine", [["engine.replicas=8"], ["engine.replicas=1"]], ids=["HSDP", "one group"])
def test_vit_giant_on_64_gpus_is_as_planned(engine: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    recipe = load_recipe("vit_giant14", engine).recipe
    layout = Layout("fsdp", 64, recipe.engine.replicas)
    assert dry.report(recipe, layout, find_gpu("h100"), 8), capsys.readouterr().out
