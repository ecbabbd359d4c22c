"""Tests of the scaling model: its terms computed by hand, latency, recipes that do not fit, and the picture."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mimae.config.load import load_recipe
from mimae.errors import UserError
from mimae.plan import command, communication, cost, memory, scaling
from mimae.plan.gpus import find_gpu

FLEET = cost.Fleet(find_gpu("h100"), 64, 8, 0.45)


def test_latency_counts_hops() -> None:
    inside, across = communication.HOP_INSIDE, communication.HOP_ACROSS
    group = communication._neighbours(FLEET.gpu, 64, 8)
    assert group.latency("all-gather") == pytest.approx(56 * inside + 7 * across)  # a ring through eight nodes
    assert group.latency("all-reduce") == pytest.approx(2 * (7 * inside + 3 * across))  # a tree over them, both ways
    assert communication._neighbours(FLEET.gpu, 6, 8).latency("reduce-scatter") == pytest.approx(5 * inside)
    replicas = communication._replicas(FLEET.gpu, memory.Layout("fsdp", 64, 8), 8)
    assert replicas.latency("all-reduce") == pytest.approx(2 * 3 * across)  # one of each node
    both = communication._replicas(FLEET.gpu, memory.Layout("fsdp", 16, 4), 8)
    assert both.latency("all-reduce") == pytest.approx(2 * (inside + across))  # two on each of two nodes
    sent = communication._sent("", "all-gather", 64e9, 10, group, "forward", True)
    assert sent.seconds == pytest.approx(63e9 / group.rate + 10 * group.latency("all-gather"))


def test_weak_scaling_keeps_computing_and_strong_scaling_divides_it() -> None:
    recipe = load_recipe("vit_giant14").recipe
    count = memory.parameters(recipe)
    weak, strong = (scaling.points(recipe, "fsdp, a replica a node", FLEET, count, n) for n in (16, None))
    assert [point.gpus for point in weak] == [8, 16, 32, 64, 128, 256, 512, 1024]
    assert weak[0].row.computing == pytest.approx(weak[-1].row.computing, rel=0.01)
    assert strong[0].row.computing == pytest.approx(128 * strong[-1].row.computing)
    assert strong[0].row.recipe.schedule.accumulate == 1 and weak[-1].row.layout.replicas == 128
    for line in (weak, strong):
        assert all(later.efficiency < earlier.efficiency for earlier, later in pairwise(line))
    # Communication between all ranks grows with their number, communication inside a node does not.
    first, last = weak[0].terms(), weak[-1].terms()
    gathered = next(term for term in scaling.TERMS if term.startswith("weights"))
    assert last["latents and sums"] > 30 * first["latents and sums"]
    assert last[gathered] == pytest.approx(first[gathered])
    traffic = sum(each.seconds for each in weak[-1].row.traffic)
    assert sum(last.values()) == pytest.approx(weak[-1].row.computing + weak[-1].data + traffic)


def test_a_step_waits_for_its_data() -> None:
    recipe = load_recipe("vit_base_400ep", ["data.image_size=32"]).recipe
    point = scaling.points(recipe, "ddp", FLEET, memory.parameters(recipe), 512)[0]
    assert point.data == pytest.approx(512 / (scaling.CORES * scaling.CORE_RATE)) and point.data > point.row.seconds
    assert point.images_per_s == pytest.approx(8 * scaling.CORES * scaling.CORE_RATE)


def test_a_batch_that_does_not_fit_is_split() -> None:
    recipe = load_recipe("vit_giant14", ["model.checkpointing=none"]).recipe
    count = memory.parameters(recipe)
    points = scaling.points(recipe, "fsdp, a replica a node", FLEET, count, None)
    splits = [point.row.recipe.schedule.accumulate for point in points]
    assert splits[0] > 1 == splits[-1] and all(point.row.fits for point in points)
    small = FLEET._replace(gpu=FLEET.gpu._replace(memory=8))
    assert not scaling.points(recipe, "ddp", small, count, None)


def test_the_picture_is_small_and_the_figures_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "s.png"
    options: dict[str, Any] = {"gpus": 64, "gpu": "h100", "nodes_of": 8, "share": 0.45, "images": 10_240}
    command.plan("vit_giant14", scaling=path, **options)
    said = capsys.readouterr().out
    for part in ("weak scaling: 16 images a GPU", "strong scaling: 1024 images a step", "µs a hop", "1,024"):
        assert part in said
    assert Image.open(path).size == (1100, 850)
    assert (path).stat().st_size < 150_000
    with pytest.raises(UserError, match="drawn for ddp and fsdp"):
        command.plan("vit_giant14", ["engine.kind=zero2", "engine.replicas=1"], scaling=path, **options)
    with pytest.raises(UserError, match=r"ddp fits on no number of GPUs; model\.checkpointing=full"):
        command.plan("vit_6b14", ["engine.kind=ddp", "engine.replicas=1"], scaling=path, **options)
