"""The fault drill: what it takes for equal, that no fault is believed that did not fire, and some for real."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mimae.bench import drill
from mimae.bench.faults import FAULTS
from mimae.bench.trial import NotSeen, Trial


def test_every_bit_counts_and_the_bias_of_keys_only_where_rounding_may() -> None:
    want = {"model.w": torch.ones(4), "model.attn.qkv.bias": torch.ones(3), "optimizer.w": torch.ones(4)}
    assert drill._distance({**want}, want, exactly=True) == 0
    moved = {**want, "model.attn.qkv.bias": torch.tensor([1.0, 1.1, 1.0])}
    assert drill._distance(moved, want, exactly=True) > 0
    assert drill._distance(moved, want, exactly=False) == 0
    assert drill._distance({**want, "model.w": torch.full((4,), torch.nan)}, want, exactly=True) == float("inf")
    assert drill._distance({**want, "model.attn.qkv.bias": torch.tensor([1.1, 1.0, 1.0])}, want, exactly=False) > 0
    nearly = {**want, "optimizer.w": torch.tensor([1.0, 1.0, 1.0, 1.0 + 1e-6])}
    assert 0 < drill._distance(nearly, want, exactly=False) < drill.TOLERANCE
    assert drill._distance({"model.w": torch.ones(4)}, want, exactly=False) == float("inf")


def test_a_fault_that_did_not_fire_fails_its_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def idle(trial: Trial) -> None:
        raise NotSeen("SIGKILL: not so")

    monkeypatch.setitem(FAULTS, "SIGKILL of all", idle)
    trial = Trial(tmp_path / "trial", tmp_path, [], 2, random.Random(0))
    assert drill._judge(("SIGKILL of all", trial), {})["failed"] == "SIGKILL: not so"


def test_a_checkpoint_that_was_whole_and_is_not_gone_on_from_counts_as_lost(tmp_path: Path) -> None:
    class Said:
        def __init__(self, output: str) -> None:
            self.output = output

    trial = Trial(tmp_path / "trial", tmp_path, [], 2, random.Random(0))
    trial.whole = 6
    trial.starts = [Said(""), Said("resuming run at step 6 of 18\n")]  # type: ignore[list-item]
    assert trial.lost() == 0
    trial.starts = [Said(""), Said("resuming run at step 3 of 18\n")]  # type: ignore[list-item]
    assert trial.lost() == 1
    trial.starts = [Said(""), Said("began anew")]  # type: ignore[list-item]
    assert trial.lost() == 1


def test_each_kind_is_drawn_as_often_as_any_other() -> None:
    chosen = drill.choose(list(FAULTS), 2 * len(FAULTS), seed=0)
    assert all(chosen.count(kind) == 2 for kind in FAULTS)
    assert chosen != drill.choose(list(FAULTS), 2 * len(FAULTS), seed=1)


@pytest.mark.slow
def test_three_faults_on_three_ranks(tmp_path: Path) -> None:
    """On three ranks a sum depends on its order, on two it does not. The seed draws signals and a torn checkpoint."""
    found = tmp_path / "drill.json"
    command = [sys.executable, "-m", "mimae", "drill", "--faults", "3", "--seed", "3", "--json", str(found)]
    ended = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    rows = json.loads(found.read_text())["faults"]
    assert len(rows) == 3 and all(row["seen"] and row["failed"] is None and not row["lost"] for row in rows)
