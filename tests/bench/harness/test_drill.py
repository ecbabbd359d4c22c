"""Tests of the fault drill: its comparisons, its proof that a fault occurred, and some real trials."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from mimae.bench.harness import drill, faulty, mounts
from mimae.bench.harness.faults import FAULTS, MOUNTED, RESHAPED
from mimae.bench.harness.flat import summary
from mimae.bench.harness.subjects import SUBJECTS
from mimae.bench.harness.trial import NotSeen, Trial
from mimae.engines.base import Engine
from mimae.engines.replicas import DivergenceError
from mimae.train.tasks.pretrain import engine_of
from tests.engines.test_engines import backward, recipe
from tests.rank_processes import run_ranks


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
    trial = Trial(tmp_path / "trial", SUBJECTS["pretrain"], tmp_path, [], 2, random.Random(0))
    assert drill._judge(("SIGKILL of all", trial), {})["failed"] == "SIGKILL: not so"


def test_a_checkpoint_that_was_whole_and_is_not_gone_on_from_counts_as_lost(tmp_path: Path) -> None:
    class Said:
        def __init__(self, output: str) -> None:
            self.output = output

    begun, again = "fp32; the run is run\n", "start 2, after a rank was lost\n"

    def lost(*said: str | int) -> int:
        """Return the lost checkpoints of starts with this output.

        A number stands for a checkpoint that was whole at that time.
        """
        number = len([*tmp_path.iterdir()])
        trial = Trial(tmp_path / str(number), SUBJECTS["pretrain"], tmp_path, [], 2, random.Random(0))
        for each in said:
            if isinstance(each, int):
                trial.expect(each)
            else:
                trial.starts.append(Said(each))  # type: ignore[arg-type]
        return trial.lost()

    def at(step: int) -> str:
        return f"resuming run at step {step} of 18\n{begun}"

    assert lost(begun) == lost(begun, 6, at(6)) == 0
    assert lost(begun, 6, at(3)) == 1
    assert lost(begun, 6, begun) == 1, "began anew"
    assert lost(begun, 6, "refused: the first is at work\n", at(6)) == 0
    assert lost(begun, 3, at(3), 6, at(6)) == 0, "each is judged by what was there before it"
    assert lost(begun, 3, at(6), 9, at(6)) == 1
    assert lost(begun, 9, 6, at(6)) == 0, "9 was damaged then"
    assert lost(begun + again + at(3), 6, at(6)) == 0
    assert lost(begun, 3, at(3) + again + at(0)) == 1, "the launcher's own start"


class Run(NamedTuple):
    """Fake with the attributes of a run that a fault uses."""

    engine: Engine
    step: int


def harmed(kinds: dict[str, list[str]]) -> dict[str, tuple[float, bool]]:
    """Return for each engine whether a step with NaN is skipped, and whether copies differ one step after a drift."""
    vars(faulty)["FAULT"] = {"rank": 1}
    found = {}
    for kind, overrides in kinds.items():
        settings = recipe(*overrides)
        engines = [engine_of(settings, torch.device("cpu")) for _ in range(2)]
        faulty.nan(Run(engines[0], 0), Path(), True)
        backward(engines[0], settings, 0)
        skipped = engines[0].step(1.0).skipped.item()
        faulty.drift(Run(engines[1], 0), Path(), True)
        backward(engines[1], settings, 0)
        engines[1].step(1.0)
        try:
            engines[1].check_copies()
            found[kind] = (skipped, False)
        except DivergenceError:
            found[kind] = (skipped, True)
    return found


def test_faults_inside_of_a_rank_fire_on_every_engine_that_the_drill_has_them_for(tmp_path: Path) -> None:
    engines = (["ddp"], ["zero1"], ["zero3"], ["fsdp"], ["fsdp", "engine.replicas=2"])
    kinds = {" ".join(each): [f"engine.kind={each[0]}", *each[1:]] for each in engines}
    expected = {
        kind: (1.0, drill.no_copies(SUBJECTS["pretrain"], overrides) is None) for kind, overrides in kinds.items()
    }
    assert {drifts for _, drifts in expected.values()} == {True, False}
    assert run_ranks(2, tmp_path, harmed, kinds) == [expected] * 2


def test_each_kind_is_drawn_as_often_as_any_other() -> None:
    chosen = drill.choose(list(FAULTS), 2 * len(FAULTS), seed=0)
    assert all(chosen.count(kind) == 2 for kind in FAULTS)
    assert chosen != drill.choose(list(FAULTS), 2 * len(FAULTS), seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("task", sorted(SUBJECTS.keys() - {"pretrain"}))
def test_other_tasks_are_drilled(task: str, tmp_path: Path) -> None:
    faults = ["SIGKILL of a rank in a save", "SIGTERM to a rank", "bad data", "NaN storm", RESHAPED]
    for row in drill.drill(SUBJECTS[task], faults, 2, 0, 2, [], tmp_path):
        assert row["seen"] and row["failed"] is None and not row["lost"], row


@pytest.mark.slow
def test_every_kind_of_fault_once(tmp_path: Path) -> None:
    """Run some trials with three ranks, whose sums depend on the order of addition, unlike those of two."""
    found = tmp_path / "drill.json"
    faults = [kind for kind in FAULTS if mounts.obstacle() is None or kind not in MOUNTED]
    count = str(len(faults))
    command = [sys.executable, "-m", "mimae", "drill", "--faults", count, "--seed", "3", "--out", str(found)]
    ended = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    rows = json.loads(found.read_text())["faults"]
    assert {row["fault"] for row in rows} == set(faults) and all(
        row["seen"] and row["failed"] is None and not row["lost"] for row in rows
    )


def test_what_grows_is_not_flat() -> None:
    steady = np.array([[step, 500.0, 20, 9, 400 * step, 800 * step] for step in range(0, 1000, 50)])
    assert summary(steady)["flat"]
    for column, growth in ((1, 0.02), (2, 0.01), (3, 0.01), (4, 0.4 * steady[:, 0] / 1000)):
        grown = steady.copy()
        grown[:, column] += growth * steady[:, 0] * (1 if column < 4 else 400)
        assert not summary(grown)["flat"], column


def test_runs_of_a_drill_under_nohup_react_to_hangups() -> None:
    asked = [sys.executable, "-S", "-c", "import signal; print(signal.getsignal(signal.SIGHUP).name)"]
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        drill.pass_on_hangups()
        os.kill(os.getpid(), signal.SIGHUP)  # This process goes on.
        assert subprocess.run(asked, capture_output=True, text=True, check=True).stdout == "SIG_DFL\n"
    finally:
        signal.signal(signal.SIGHUP, before)
