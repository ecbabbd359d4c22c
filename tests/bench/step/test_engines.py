"""Tests of the comparison of engines: its measurements, its table, and a rank that dies."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mimae.bench.step import command, engines
from mimae.config.load import load_recipe
from mimae.errors import UserError

ROOT = Path(__file__).parents[3]
TINY = ["model.size=tiny", "model.depth=2", "decoder.depth=1", "data.image_size=32", "compile=off"]


def test_ratios_are_of_the_same_round() -> None:
    rows = {
        "ddp": {"seconds_per_step": [1.0, 4.0, 1.0], "peak_bytes": 2**21, "sent_bytes": 3e6},
        "fsdp": {"seconds_per_step": [2.0, 4.0, 1.5], "peak_bytes": 2**20, "sent_bytes": 4.4e6},
    }
    assert engines.table({"engines": rows}).splitlines()[2:] == [
        "| ddp | 1.00 (1.00 .. 1.00) | 2 MiB | 3 MB |",
        "| fsdp | 1.50 (1.00 .. 2.00) | 1 MiB | 4 MB |",
    ]


def test_the_page_shows_what_was_measured() -> None:
    result = json.loads((ROOT / "bench/results/engines-cpu.json").read_text())
    assert list(result["engines"]) == list(engines.ENGINES)
    assert engines.table(result) in (ROOT / "docs/scaling.md").read_text()


def test_only_known_engines() -> None:
    with pytest.raises(UserError, match="--engine fdsp: legal is ddp, fsdp"):
        command.engines(engine=["fdsp"])


@pytest.mark.slow
def test_two_engines_are_measured(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command.engines(TINY, engine=["fsdp"], ranks=2, batch=4, rounds=2, out=tmp_path / "e.json")
    found = json.loads((tmp_path / "e.json").read_text())["engines"]
    assert list(found) == ["ddp", "fsdp"]
    assert all(len(row["seconds_per_step"]) == 2 and min(row["seconds_per_step"]) > 0 for row in found.values())
    assert all(row["peak_bytes"] > 4 * row["sent_bytes"] / 3 for row in found.values())  # weights, gradients, moments
    # The message for a run that fails names the rank that ended.
    broken = load_recipe({}, [*TINY, "optimizer.impl=apex", "schedule.batch_size=4"]).recipe
    with pytest.raises(UserError, match="a rank of broken: it has ended, with the error above"):
        engines.measure({"broken": broken}, 2, 1)
    assert "apex" in capfd.readouterr().err
