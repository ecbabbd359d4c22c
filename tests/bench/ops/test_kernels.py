"""Tests that the ops' bench times correct results only, and that its numbers belong to the op."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from mimae.bench.ops import kernels as bench
from mimae.bench.ops.cases import CASES
from mimae.bench.ops.cases.case import Case, Size
from mimae.cli import app
from mimae.kernels import runtime

CPU = torch.device("cpu")
# The sizes: 6 patches of 4 pixels, a width that is no power of two, 3 views of 2 patches.
SMALL = Size("small", 20, 0, torch.float32, decoder_width=12, side=12, patch=4, views=3)
KNOWN = {case.op: case for case in CASES}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.op)
def test_every_contender_of_every_op_agrees_and_has_its_times(case: Case) -> None:
    found = bench.contest(case, SMALL, 3, CPU, rounds=2, compiled=False)
    assert {"reference", "eager"} <= found["contenders"].keys()
    assert found["floor_bytes"] > 0
    for name, row in found["contenders"].items():
        assert row["skipped"] is None, f"{name}: {row['skipped']}"
        assert row["both"]["p20"] <= row["both"]["median"] <= row["both"]["p80"]
        assert ("backward" in row) == bool(case.trained)


def test_what_computes_something_else_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    case = KNOWN["club"]
    wrong = case._replace(eager=lambda inputs: [3 * each for each in case.eager(inputs)])
    found = bench.contest(wrong, SMALL, 3, CPU, rounds=1, compiled=False)["contenders"]
    assert "both" in found["reference"]
    assert "both" not in found["eager"] and found["eager"]["skipped"].startswith("wrong")


def test_numbers_are_kept_at_once_and_compiled_forms_come_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compilation may take long: the others' numbers are in the result by then."""
    monkeypatch.setattr(torch, "compile", lambda call, **_: call)
    assert list(bench.forms(KNOWN["club"], CPU, True))[-2:] == ["compiled", "compiled reference"]
    kept: list[dict[str, Any]] = []

    def keep(found: dict[str, Any]) -> None:
        kept.append(json.loads(json.dumps(found["contenders"])))

    found = bench.contest(KNOWN["club"], SMALL, 3, CPU, rounds=2, compiled=False, keep=keep)
    names = list(found["contenders"])
    assert [list(rows) for rows in kept] == [names[: n + 1] for n in range(len(names))] + [names] * 2
    assert ["both" in rows["reference"] for rows in kept] == [False] * len(names) + [True] * 2
    assert kept[-1] == json.loads(json.dumps(found["contenders"]))


@pytest.mark.parametrize("at", [1, 2, 3])  # the first run is the check, the second the count of memory, then rounds
def test_a_contender_that_fails_costs_its_own_time(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case, calls = KNOWN["club"], []

    def breaks(inputs: dict[str, Any]) -> Any:
        calls.append(1)
        if len(calls) >= at:
            raise ValueError("no kernel")
        return case.eager(inputs)

    monkeypatch.setattr(bench, "eager_traffic", lambda *_: {"largest_bytes": 0})
    found = bench.contest(case._replace(eager=breaks), SMALL, 3, CPU, rounds=2, compiled=False)["contenders"]
    assert found["eager"]["skipped"] == "ValueError: no kernel" and "both" not in found["eager"]
    assert "both" in found["reference"]


def test_all_sizes_have_times_before_the_first_compilation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The contests with compiled forms come second. They keep what the first ones have found, until they have more."""
    file, seen = tmp_path / "kernels.json", []

    def contest(case: Case, size: Size, batch: int, device: Any, rounds: int, compiled: bool, keep: Any) -> None:
        seen.append((batch, rounds, compiled))
        found = {"op": case.op, "size": size.name, "batch": batch, "precision": "fp32", "flops": 0, "floor_bytes": 8}
        rows: dict[str, Any] = {"eager": {"skipped": None, "extra_bytes": 0}}
        keep({**found, "contenders": rows})
        held = json.loads(file.read_text())["contests"]
        assert len(held) == 2 or not compiled
        times = dict.fromkeys(("median", "p20", "p80"), float(rounds))
        kept = next(each for each in held if each["batch"] == batch)["contenders"]["eager"]
        first = dict.fromkeys(times, 3.0)
        assert kept == rows["eager"] | ({"forward": first, "both": first} if compiled else {})
        rows["eager"] |= {"forward": times, "both": times}
        keep({**found, "contenders": rows})

    monkeypatch.setattr(bench, "contest", contest)
    monkeypatch.setattr(bench, "sizes_of", lambda *_: [(SMALL, 1024), (SMALL, 256)])
    given = ["--op", "club", "--rounds", "9", "--no-roof", "--out", str(file)]
    answer = CliRunner().invoke(app, ["bench", "kernels", *given], catch_exceptions=False)
    assert answer.exit_code == 0, answer.output
    assert seen == [(1024, 3, False), (256, 3, False), (1024, 9, True), (256, 9, True)]
    found = json.loads(file.read_text())
    assert found["roof"] == {} and [each["contenders"]["eager"]["both"]["median"] for each in found["contests"]] == [
        9,
        9,
    ]


def test_backward_runs_in_the_form_that_is_timed() -> None:
    """Force the path: on a GPU, `auto` would use the fused gradient in place of the reference."""
    case, seen = KNOWN["infonce"], []

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, u: torch.Tensor) -> torch.Tensor:
            return u.sum()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            seen.append(runtime._preferred)
            return grad.expand(3, 3, 20)

    form = bench.Form(lambda inputs: [Watched.apply(inputs["u"])], prepared=False, impl="reference")
    bench.Contender(case, form, [case.inputs(SMALL, 3, CPU)], CPU).once()
    assert seen == ["reference"] and runtime._preferred == "auto"


def test_the_crossover_is_the_batch_from_which_fused_stays_ahead() -> None:
    def contest(batch: int, fused: float, eager: float) -> dict[str, Any]:
        rows = {"fused": {"both": {"median": fused}}, "eager": {"both": {"median": eager}}, "slow": {"skipped": "x"}}
        return {"op": "club", "batch": batch, "contenders": rows}

    assert bench.crossovers([contest(256, 2, 1), contest(1024, 1, 2), contest(4096, 1, 2)]) == {"club": 1024}
    assert bench.crossovers([contest(256, 1, 2), contest(1024, 2, 1)]) == {"club": 1025}
    assert bench.crossovers([{"op": "club", "batch": 4, "contenders": {"eager": {"both": {"median": 1}}}}]) == {}


def test_the_verb_writes_what_it_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "COPY_BYTES", {"cpu": 1 << 16})
    monkeypatch.setattr(bench, "SQUARE_SIDE", {"cpu": 32})
    file = tmp_path / "kernels.json"
    small = ["--batch", "2", "--rounds", "1", "--no-compiled", "--precision", "fp32", "--out", str(file)]
    answer = CliRunner().invoke(app, ["bench", "kernels", "--op", "club", *small], catch_exceptions=False)
    assert answer.exit_code == 0, answer.output
    found = json.loads(file.read_text())
    assert {"date", "machine", "versions", "roof", "contests", "crossovers"} <= found.keys()
    assert [contest["width"] for contest in found["contests"]] == [768, 1024]
    assert "club, ViT-L/16, 2 images" in answer.output
