"""Tests that the traffic bench counts exactly, extrapolates only linear counts, and fails above a bound."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from mimae.bench.ops import command, traffic
from mimae.bench.ops.cases import CASES, chosen
from mimae.bench.ops.cases.case import VIT_B, Bound, Case, Size, recorded
from mimae.bench.ops.counting import TorchTraffic, Traffic, counting, total
from mimae.bench.ops.traffic import beyond_bounds, bound_of, eager, extrapolated, measure
from mimae.cli import app
from mimae.errors import UserError
from mimae.kernels import runtime
from tests.bench.ops import toy_kernels

ROOT = Path(__file__).parents[3]

interpreted = pytest.mark.skipif(not runtime.INTERPRETED, reason="traffic is counted in the interpreter")


@cache
def measured(op: str) -> dict[str, Any]:
    """Return the row of an op at its first size. Counting takes some seconds."""
    (case,) = chosen([op])
    return measure(op, case.sizes[0])


# Kernels


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_a_copy_loads_and_stores_each_element(dtype: torch.dtype) -> None:
    """Count 1,000 elements in blocks of 256, without the last block's masked lanes and without skipped elements."""
    source = torch.arange(2000).to(dtype)
    with counting() as launches:
        target = toy_kernels.run_copy(toy_kernels.copy, source, step=2, block=256)
    assert torch.equal(target, source[::2]), "counting leaves loads and stores as they are"
    size = 1000 * dtype.itemsize
    assert [launch.traffic for launch in launches] == [
        {"source": Traffic(size, 0, size, 0), "target": Traffic(0, size, 0, size)}
    ]


@interpreted
def test_reading_twice_is_seen() -> None:
    with counting() as launches:
        toy_kernels.run_copy(toy_kernels.copy_reading_twice, torch.arange(1000.0), block=256)
    assert launches[0].traffic["source"] == Traffic(8000, 0, 4000, 0)
    assert total(launches[0].traffic.values()).issued == 12000


@interpreted
def test_launches_are_told_apart() -> None:
    source = torch.arange(64.0)
    with counting() as launches:
        halved = toy_kernels.run_copy(toy_kernels.copy, source, step=2, block=16)
        toy_kernels.run_copy(toy_kernels.copy, halved, block=16)
    assert [launch.launch.grid for launch in launches] == [(2,), (2,)]
    assert [launch.traffic["source"].issued for launch in launches] == [128, 128]


@interpreted
def test_an_access_outside_of_all_arguments_is_an_error() -> None:
    """Use a mask that is true for more elements than the source has."""
    source = torch.arange(64.0)
    count = 1 << 20
    target = torch.empty(count)
    with counting(), pytest.raises(Exception, match="copy: a load that is not of one argument"):
        runtime.launch(toy_kernels.copy, (1,), source=source, target=target, count=count, step=1, BLOCK=1 << 20)


# Operators


def _square() -> Tensor:
    return torch.ones(100, 100)


@pytest.mark.parametrize(
    ("run", "read", "written"),
    [
        (lambda x: x + 1, 40000, 40000),
        (lambda x: x + x, 40000, 40000),  # one tensor that is used twice is read once
        (lambda x: x @ x.T, 80000, 40000),
        (lambda x: x.view(-1)[:50].detach(), 0, 0),
        (lambda x: x[:, :10].contiguous(), 4000, 4000),
        (lambda x: torch.empty_like(x), 0, 0),
        (lambda x: torch.zeros(100, 100), 0, 40000),
        (lambda x: x.expand(7, 100, 100).sum(), 40000, 4),
        (lambda x: x.mul_(2), 40000, 40000),
        (lambda x: torch.empty(100, 100).copy_(x), 40000, 40000),
        (lambda x: x.gather(1, torch.zeros(100, 1, dtype=torch.int64)), 800 + 400 + 0, 400 + 800),
        (lambda x: x.bfloat16(), 40000, 20000),
    ],
)
def test_operators_read_inputs_and_write_outputs(run: Callable[[Tensor], Tensor], read: int, written: int) -> None:
    x = _square()
    with TorchTraffic() as moved:
        run(x)
    assert (moved.read, moved.written) == (read, written)


def test_backward_is_counted() -> None:
    x = _square().requires_grad_()
    loss = (x * 2).sum()
    with TorchTraffic() as moved:
        loss.backward()
    # The loss's gradient is made, expanded without traffic, and doubled to give the gradient of x.
    assert moved.written == 4 + 40000


def test_the_eager_form_of_club_is_pairwise() -> None:
    """Extrapolate memory and traffic that grow with the square of the batch."""
    (case,) = chosen(["club"])
    small, large = (eager(case, Size("", 32, batch)) for batch in (256, 512))
    assert large["largest_bytes"] == 512 * 4 * 512 * 32 * 4 == 4 * small["largest_bytes"]
    assert 3.5 < large["forward_bytes"] / small["forward_bytes"] < 4


# Extrapolation


def test_a_linear_function_is_found_again() -> None:
    rows = [[1, 2, 6], [1, 4, 6], [1, 4, 8], [1, 6, 8]]
    counts = [{"x": Traffic(7 + 3 * b + 5 * p, b, 0, 1)} for _, b, p in rows]
    assert extrapolated(rows, counts, [1, 1000, 132]) == {"x": Traffic(7 + 3000 + 660, 1000, 0, 1)}


@pytest.mark.parametrize(
    ("batches", "wanted", "message"),
    [
        ([1, 2, 3], [1, 100], "not linear"),
        ([1, 2], [1, 100], "do not determine and check"),  # a line fits any two points
        ([2, 2, 2], [1, 100], "do not determine and check"),
    ],
)
def test_what_is_not_linear_or_not_known_is_an_error(batches: list[int], wanted: list[float], message: str) -> None:
    counts = [{"x": Traffic(b * b)} for b in batches]
    with pytest.raises(RuntimeError, match=message):
        extrapolated([[1, b] for b in batches], counts, wanted)


def test_another_tile_is_not_extrapolated() -> None:
    """Choose small tiles for embed_visible where large ones would leave parts of the GPU idle."""
    (case,) = chosen(["embed_visible"])
    few, many = (
        recorded(case.passes[0], case.inputs(VIT_B, batch, traffic.META), runtime.H100)[0] for batch in (1, 1024)
    )
    traffic.check_tiles(many, many, [])
    with pytest.raises(RuntimeError, match=r"_embed was counted with .*'ROWS': 64"):
        traffic.check_tiles(few, many, [])
    traffic.check_tiles(few, many, ["_embed.ROWS", "_embed.COLUMNS"])


# The verb


def row_of(issued: int = 100, unique: int = 100, extra: int = 0, eager: int = 1000) -> dict[str, Any]:
    megabytes = {"issued_bytes": issued, "unique_bytes": unique, "extra_bytes": extra, "floor_bytes": 100}
    fused = {"name": "a pass", **{key: value * 1_000_000 for key, value in megabytes.items()}}
    moved = {"forward_bytes": eager * 1_000_000, "backward_bytes": 0}
    return {"op": "an op", "size": "a size", "passes": [fused], "eager": moved}


@pytest.mark.parametrize(
    ("row", "bound", "beyond"),
    [
        (row_of(issued=110), Bound(issued=1.1), None),
        (row_of(issued=111), Bound(issued=1.1), "issued bytes over floor 1.110, bound 1.1"),
        (row_of(unique=111), Bound(issued=1.1, unique=1.1), "different bytes over floor 1.110"),
        (row_of(extra=101), Bound(extra=1.0), "extra memory"),
        (row_of(eager=299), Bound(eager=3), "bytes of eager PyTorch over issued 2.990, bound 3"),
        (row_of(eager=300), Bound(eager=3), None),
        (row_of(issued=900), Bound(), None),
    ],
)
def test_bounds(row: dict[str, Any], bound: Bound, beyond: str | None) -> None:
    found = beyond_bounds(row, bound)
    assert len(found) == (beyond is not None)
    assert beyond is None or beyond in found[0]


@interpreted
def test_the_verb_fails_where_a_bound_is_passed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Count the op in this process, since a fresh one takes seconds to import torch."""
    rows = [measured("view_latents")]
    monkeypatch.setattr(traffic, "count", lambda cases, jobs: rows)
    file = tmp_path / "traffic.json"
    arguments = ["bench", "traffic", "--op", "view_latents", "--no-machine-code", "--out", str(file)]

    answer = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert answer.exit_code == 0, answer.output
    assert "view_latents backward" in answer.output
    result = json.loads(file.read_text())
    assert set(result) == {"bench", "versions", "traffic", "machine_code"} and result["traffic"] == rows
    # The bytes are of patch tokens in fp32, of two latents per view, and of the moments.
    forward = rows[0]["passes"][0]
    assert forward["floor_bytes"] == 1024 * 4 * (49 + 2) * 768 * 4 + 2 * 768 * 4
    assert forward["predicted_h100_us_at_floor"] == pytest.approx(forward["floor_bytes"] / 3.35e6)

    monkeypatch.setattr(traffic, "bound_of", lambda op: Bound(issued=1.001))
    answer = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert answer.exit_code == 1
    assert "beyond its bound: view_latents, ViT-B/16: issued bytes over floor" in answer.output


def test_the_page_in_the_documentation_is_what_its_file_renders_to(tmp_path: Path) -> None:
    page = tmp_path / "traffic.md"
    command.traffic(out=ROOT / "bench/results/traffic.json", page=page)
    assert (ROOT / "docs/traffic.md").read_text() == page.read_text(), (
        "run `mimae bench traffic --out ... --render ...`"
    )
    with pytest.raises(UserError, match="name its file by --out"):
        command.traffic(page=page)


def test_the_published_result_keeps_its_bounds() -> None:
    result = json.loads((ROOT / "bench/results/traffic.json").read_text())
    assert [line for row in result["traffic"] for line in beyond_bounds(row, bound_of(row["op"]))] == []
    assert [line for binary in result["machine_code"] for line in traffic.flaws(binary)] == []
    assert {row["op"] for row in result["traffic"]} == {case.op for case in CASES}


def test_triton_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "triton", None)
    with pytest.raises(UserError, match="triton, which is not installed"):
        command.traffic()


def test_an_unknown_op_is_a_mistake_of_the_users() -> None:
    with pytest.raises(UserError, match="no case named nosuch: legal is orthogonal_masks, embed_visible"):
        command.traffic(op=["nosuch"])


def test_every_op_has_a_bound_and_names_are_distinct() -> None:
    assert all(case.bound != Bound() for case in CASES)
    names = [fused.name for case in CASES for fused in case.passes]
    assert len(names) == len(set(names)) and len(CASES) == len({case.op for case in CASES})


@interpreted
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=[] if case.op in ("orthogonal_masks", "view_latents") else pytest.mark.slow)
        for case in CASES
    ],
    ids=lambda case: case.op,
)
def test_ops_keep_their_bounds(case: Case) -> None:
    """Check the first size; `mimae bench traffic` checks the others, and the machine code."""
    assert beyond_bounds(measured(case.op), case.bound) == []
