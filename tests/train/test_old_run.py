"""Tests that a run directory of an earlier version resumes in the middle of an epoch.

tests/fixtures/run-of-ec7eaa5.tar.xz holds a run of six steps as commit ec7eaa5 left it after step 3, and the records of
all six steps as the same commit wrote them without an interruption.
"""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest

import mimae

ARCHIVE = Path(__file__).parents[1] / "fixtures" / "run-of-ec7eaa5.tar.xz"

ROUNDING = 1e-3
"""Relative tolerance. Float32 on another processor differs far less in three steps; wrong weights or batches, far more.
"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "run"


def test_a_run_of_an_earlier_version_goes_on_in_mid_epoch(run: Path) -> None:
    outcome = mimae.pretrain(run / "config.yaml", f"run.dir={run}")
    assert (outcome.step, outcome.finished) == (6, True)

    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    expected = json.loads((run.parent / "expected.json").read_text())
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    for record, wanted in zip(records[3:], expected[3:]):
        assert {key: record[key] for key in wanted} == pytest.approx(wanted, rel=ROUNDING, abs=ROUNDING)


def test_an_encoder_of_an_earlier_version_loads(run: Path) -> None:
    encoder = mimae.load_encoder(run)
    assert encoder.state_dict()["patch_embed.proj.weight"].shape == (4, 3, 4, 4)
