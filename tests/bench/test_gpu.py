"""The one command for a GPU machine: every stage leaves its result, also when another one fails or hangs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from mimae.bench import gpu
from mimae.bench.gpu import STAGES, Stage, run_all
from mimae.cli import app
from mimae.errors import UserError

MACHINE = {"machine": "one of the test"}


def test_a_stage_that_fails_or_hangs_costs_its_own_result_alone(tmp_path: Path) -> None:
    file = tmp_path / "new" / "gpu.json"
    stages = [
        Stage("fails", ["mimae", "bench", "kernels", "--op", "nothing"], 60),
        Stage("hangs", ["http.server", "--bind", "127.0.0.1", "0"], 2, writes=False),
        Stage("ends", ["this"], 60, writes=False),
    ]
    assert run_all(stages, file, MACHINE) == ["fails", "hangs"]
    found = json.loads(file.read_text())
    assert found["machine"] == MACHINE["machine"]
    codes = {name: stage["exit_code"] for name, stage in found["stages"].items()}
    assert codes == {"fails": 2, "hangs": None, "ends": 0}
    assert "legal is" in " ".join(found["stages"]["fails"]["last_lines"])
    assert found["stages"]["ends"]["last_lines"]


@pytest.mark.slow  # two processes that import torch
def test_a_stage_that_measures_hands_its_result_over(tmp_path: Path) -> None:
    arguments = ["mimae", "bench", "kernels", "--op", "club", "--batch", "2", "--rounds", "2", "--no-compiled"]
    outcome = gpu.run(Stage("kernels", arguments, 120))
    assert outcome["exit_code"] == 0, outcome["last_lines"]
    assert {contest["op"] for contest in outcome["result"]["contests"]} == {"club"}


def test_the_limits_leave_room_within_eight_minutes() -> None:
    assert sum(stage.seconds for stage in STAGES) < 480
    known = {command.name for command in app.registered_commands} | {group.name for group in app.registered_groups}
    assert {stage.arguments[1] for stage in STAGES if stage.arguments[0] == "mimae"} <= known


@pytest.mark.skipif(torch.cuda.is_available(), reason="here the command runs")
def test_without_a_gpu_it_says_what_runs_here() -> None:
    answer = CliRunner().invoke(app, ["bench", "gpu"])
    assert isinstance(answer.exception, UserError) and "mimae bench kernels" in str(answer.exception)
