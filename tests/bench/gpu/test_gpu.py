"""Tests of the one command for a GPU machine, without a GPU.

They check its control flow with stages that hang, die and run out of memory, on a fake clock, and with real processes,
none of which may outlive its stage.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from mimae.bench.gpu import run as running
from mimae.bench.gpu.page import render
from mimae.bench.gpu.run import RESERVE, Clock, Group, Run
from mimae.bench.gpu.stages import STAGES, Stage
from mimae.cli import app
from mimae.errors import UserError

MACHINE = {
    "date": "2026-01-01",
    "machine": {"gpu": "one of the test", "driver": "1.2", "nccl": "3.4"},
    "versions": {"torch": "5", "triton": "6"},
}
HANG = float("inf")


class World:
    """Fake machine without processes: a stage ends after given seconds with a given code, and has written its results.

    `plans`: by the first argument, for each start in turn: seconds, exit code, last line, [(after seconds, result)].
    """

    def __init__(self, plans: dict[str, list[tuple[float, int, str, list[tuple[float, Any]]]]]) -> None:
        self.plans, self.time = plans, 1000.0
        self.started: list[list[str]] = []
        self.lives: list[str] = []
        self.clock = Clock(lambda: self.time, self._sleep)

    def _sleep(self, seconds: float) -> None:
        self.time += seconds

    def start(self, command: Sequence[str], output: Path) -> Any:
        name, result = command[2], Path(command[3])
        seconds, code, line, written = self.plans[name].pop(0)
        world, began = self, self.time
        self.started.append(list(command[2:]))
        self.lives.append(name)
        output.write_text(f"a line\n{line}\n")

        class Fake:
            def poll(self) -> int | None:
                for after, value in written:
                    if world.time - began >= after:
                        result.write_text(json.dumps(value))
                return code if world.time - began >= seconds else None

            def end(self) -> None:
                world.lives.remove(name)

        return Fake()


def stage(name: str, seconds: float = 60, **more: Any) -> Stage:
    return Stage(name, [name, "{result}"], seconds, **more)


def call(world: World, stages: Sequence[Stage], file: Path, seconds: float = 540) -> dict[str, Any]:
    began = world.time
    states = Run(stages, file, MACHINE, seconds, world.start, world.clock).run()
    assert not world.lives and world.time - began <= seconds
    return states


def test_stages_that_hang_die_or_run_out_of_memory_cost_their_own_result_alone(tmp_path: Path) -> None:
    world = World(
        {
            "hangs": [(HANG, 0, "", [(5, [1]), (50, [1, 2]), (70, [1, 2, 3])])],
            "dies": [(3, -11, "", [(1, [4])])],
            "is large": [(10, 1, "torch.OutOfMemoryError: CUDA out of memory", []), (10, 0, "", [(9, [5])])],
            "is too large": [(10, 1, "CUDA out of memory", []), (10, 1, "CUDA out of memory", [])],
            "ends": [(20, 0, "", [(15, [6])])],
        }
    )
    small = ["batch=1"]
    stages = [
        *(stage("hangs"), stage("dies"), stage("is large", smaller=small), stage("is too large", smaller=small)),
        stage("ends"),
    ]
    file = tmp_path / "new" / "gpu.json"
    states = call(world, stages, file)
    assert states == {
        "hangs": "cut off",
        "dies": "failed",
        "is large": "done",
        "is too large": "out of memory",
        "ends": "done",
    }
    found = json.loads(file.read_text())
    assert found["machine"] == MACHINE["machine"] and found["calls"] == 1
    results = {name: row["result"] for name, row in found["stages"].items()}
    assert results == {"hangs": [1, 2], "dies": [4], "is large": [5], "is too large": None, "ends": [6]}
    assert found["stages"]["hangs"]["seconds"] == pytest.approx(60, abs=0.3)
    assert found["stages"]["is large"]["arguments"][-1] == "batch=1"
    assert "CUDA out of memory" in found["stages"]["is too large"]["last_lines"]


def test_a_second_call_goes_on_with_what_is_left(tmp_path: Path) -> None:
    """Start stages that have not run before those that failed. A worse second try does not hide the first."""
    world = World(
        {
            "a": [(30, 0, "", [(20, "a")])],
            "b": [(HANG, 0, "", [(20, "half of b")]), (10, 1, "no memory", [])],
            "c": [(30, 0, "", [(20, "c")])],
            "d": [(30, 0, "", [(20, "d")])],
        }
    )
    stages = [stage(name, 40, least=35) for name in "abcd"]
    first = call(world, stages, tmp_path / "gpu.json", seconds=30 + 40 + 30 + RESERVE + 20)
    assert first == {"a": "done", "b": "cut off", "c": "done", "d": None}
    second = call(world, stages, tmp_path / "gpu.json")
    assert [name for name, _ in world.started] == ["a", "b", "c", "d", "b"]
    assert second == {"a": "done", "b": "failed", "c": "done", "d": "done"}
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["calls"] == 2 and found["stages"]["b"]["before"]["result"] == "half of b"


def test_the_last_stage_gets_the_time_that_is_left(tmp_path: Path) -> None:
    world = World({"long": [(HANG, 0, "", [(1, 1)])]})
    call(world, [stage("long", 400)], tmp_path / "gpu.json", seconds=100 + RESERVE)
    row = json.loads((tmp_path / "gpu.json").read_text())["stages"]["long"]
    assert row["seconds"] == pytest.approx(100, abs=0.3) and row["state"] == "cut off"


def test_what_was_found_is_in_the_file_while_a_stage_runs(tmp_path: Path) -> None:
    """Keep the results of earlier stages when the machine is lost."""
    file = tmp_path / "gpu.json"
    seen: list[Any] = []

    class Watched(World):
        def _sleep(self, seconds: float) -> None:
            super()._sleep(seconds)
            seen.append({name: row["state"] for name, row in json.loads(file.read_text())["stages"].items()})

    world = Watched({"a": [(2, 0, "", [(1, 1)])], "b": [(2, 0, "", [])]})
    call(world, [stage("a"), stage("b")], file)
    assert seen[0] == {"a": "running"} and seen[-1] == {"a": "done", "b": "running"}


def _alive(pid: int) -> bool:
    return running._parent(pid) is not None


def _wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)


FAMILY = """
import os, pathlib, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
loop = [sys.executable, "-c", "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"]
children = [subprocess.Popen(loop), subprocess.Popen(loop, start_new_session=True)]
pathlib.Path(sys.argv[1]).write_text(" ".join(str(p) for p in [os.getpid(), *(c.pid for c in children)]))
time.sleep(600)
"""


def test_nothing_outlives_its_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """End a stage that ignores SIGTERM, its child, and a child that has started its own session."""
    monkeypatch.setattr(running, "GRACE", 0.2)
    pids = tmp_path / "pids"
    group = Group([sys.executable, "-c", FAMILY, str(pids)], tmp_path / "output")
    _wait_for(lambda: pids.exists() and len(pids.read_text().split()) == 3)
    family = [int(pid) for pid in pids.read_text().split()]
    assert group.poll() is None and all(map(_alive, family))
    group.end()
    assert not any(map(_alive, family))
    assert os.getpid() not in running.descendants({family[0]})


def test_a_command_that_fails_leaves_its_output(tmp_path: Path) -> None:
    states = Run([Stage("missing", ["no.such.module"], 60)], tmp_path / "gpu.json", MACHINE, 200).run()
    assert states == {"missing": "failed"}
    row = json.loads((tmp_path / "gpu.json").read_text())["stages"]["missing"]
    assert row["exit_code"] == 1 and "No module named" in row["last_lines"][-1]


def test_the_stages_take_twelve_minutes_at_most_and_their_commands_exist() -> None:
    assert sum(each.seconds for each in STAGES) <= 12 * 60
    assert len({each.name for each in STAGES}) == len(STAGES)
    bench = next(group for group in app.registered_groups if group.name == "bench").typer_instance
    verbs = {command.name for command in bench.registered_commands} if bench is not None else set()
    for each in STAGES:
        assert any("{result}" in argument for argument in each.arguments)
        if each.arguments[0] == "mimae":
            assert each.arguments[1] == "bench" and each.arguments[2] in verbs


@pytest.mark.parametrize("report", [{}, {"calls": 1, "stages": {}}, "some"])
def test_the_page_renders_whatever_the_file_holds(report: Any, tmp_path: Path) -> None:
    if report == "some":
        cut = {"state": "cut off", "result": {"metrics": [{"images_per_s": 1234.5, "step": 20}], "epochs": []}}
        contest = {"contenders": {"mimae": {"images_per_s": 800.0}}}
        found = {
            "pretrain, plain": cut,
            "step, eager": {"state": "failed", "result": None, "before": {"result": {"contests": [contest]}}},
            "tests": {"state": "done", "result": '<?xml?><testsuite name="p" errors="0" failures="1" tests="9">'},
        }
        report = {"calls": 2, "stages": found}
    page = render(report and {**MACHINE, **report})
    assert all(f"| {each.name} |" in page for each in STAGES)
    assert "177 ms" in page and ("Nothing has been measured on a GPU yet" in page) == (not report)
    if report and report["stages"]:
        assert "| cut off | 1,234 images/s at step 20 |" in page
        assert "| failed | mimae 800 images/s |" in page and "| done | 9 tests, 1 failures, 0 errors |" in page


@pytest.mark.skipif(torch.cuda.is_available(), reason="here the command runs")
def test_without_a_gpu_it_says_what_runs_here(tmp_path: Path) -> None:
    answer = CliRunner().invoke(app, ["bench", "gpu"])
    assert isinstance(answer.exception, UserError) and "mimae bench kernels" in str(answer.exception)
    page = tmp_path / "page.md"
    assert (
        CliRunner().invoke(app, ["bench", "gpu", "--out", str(tmp_path / "no"), "--render", str(page)]).exit_code == 0
    )
    assert page.read_text().startswith("# Measurements on a GPU")


@pytest.mark.slow  # trains, and compiles the ops' kernels
def test_the_stage_that_pretrains_leaves_its_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mimae.bench.gpu import train

    monkeypatch.setattr(train, "IMAGES", 16)
    monkeypatch.setattr(train, "DIFFERENT", 4)
    monkeypatch.setattr(train, "STEPS", 2)
    small = ["model.size=tiny", "decoder.depth=1", "schedule.batch_size=4", "data.workers=0", "engine.kind=ddp"]
    train.main(tmp_path / "result.json", [*small, "compile=off", "schedule.warmup_epochs=0"])
    found = json.loads((tmp_path / "result.json").read_text())
    assert found["metrics"][-1]["step"] == 2 and found["epochs"][-1]["images"] == 8
