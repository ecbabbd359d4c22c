"""Tests of the one command for a GPU machine, without a GPU.

They check its control flow with stages that hang, die and run out of memory, on a fake clock, and with real processes,
none of which may outlive its stage.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from mimae.bench import machine
from mimae.bench.gpu import compile as compiling
from mimae.bench.gpu import group as groups
from mimae.bench.gpu import predicted
from mimae.bench.gpu import run as running
from mimae.bench.gpu.group import Group
from mimae.bench.gpu.page import render
from mimae.bench.gpu.predicted import RESULTS, predictions
from mimae.bench.gpu.run import RESERVE, Clock, Run
from mimae.bench.gpu.stages import STAGES, Stage, gpu_tests
from mimae.cli import app
from mimae.config.load import load_recipe
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
    return groups.parent(pid) is not None


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
    monkeypatch.setattr(groups, "GRACE", 0.2)
    pids = tmp_path / "pids"
    group = Group([sys.executable, "-c", FAMILY, str(pids)], tmp_path / "output")
    _wait_for(lambda: pids.exists() and len(pids.read_text().split()) == 3)
    family = [int(pid) for pid in pids.read_text().split()]
    assert group.poll() is None and all(map(_alive, family))
    group.end()
    assert not any(map(_alive, family))
    assert os.getpid() not in groups.descendants({family[0]})


CALL = """
import pathlib, sys
from mimae.bench.gpu.run import Run
from mimae.bench.gpu.stages import Stage
Run([Stage("a stage", ["hangs", "{result}"], 500)], pathlib.Path(sys.argv[1]), {}, 540).run()
"""
HANGS = """
import json, os, pathlib, sys, time
file = pathlib.Path(sys.argv[1])
file.with_suffix(".new").write_text(json.dumps(os.getpid()))
file.with_suffix(".new").rename(file)
time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_killed_call_takes_its_stage_along_and_the_next_one_has_its_numbers(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hangs.py").write_text(HANGS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    file, result = tmp_path / "gpu.json", tmp_path / "gpu" / "a-stage.result"
    process = subprocess.Popen([sys.executable, "-c", CALL, str(file)], stdout=subprocess.DEVNULL)
    _wait_for(result.exists)
    pid = json.loads(result.read_text())
    assert _alive(pid)
    process.send_signal(number)
    assert process.wait(60) == (-number if number == signal.SIGKILL else 128 + number)
    _wait_for(lambda: not _alive(pid))
    assert not _alive(pid)
    row = json.loads(file.read_text())["stages"]["a stage"]
    assert row["state"] == ("running" if number == signal.SIGKILL else "cut off")
    world = World({"hangs": [(1, 1, "no luck", [])]})
    assert call(world, [stage("hangs")._replace(name="a stage")], file) == {"a stage": "failed"}
    row = json.loads(file.read_text())["stages"]["a stage"]
    assert (row["before"]["state"], row["before"]["result"]) == ("cut off", pid)


def test_tests_that_are_cut_off_leave_those_that_ended(tmp_path: Path) -> None:
    """pytest writes its file at its end, and after SIGINT, which a job in the background would ignore."""
    started, result, test = tmp_path / "started", tmp_path / "junit.xml", tmp_path / "test_two.py"
    hangs = f"import pathlib, time; pathlib.Path({str(started)!r}).touch(); time.sleep(600)"
    test.write_text(f"def test_a():\n    pass\n\n\ndef test_b():\n    {hangs}\n")
    arguments = ["-m", "pytest", f"--rootdir={tmp_path}", "-p", "no:cacheprovider", f"--junitxml={result}", str(test)]
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        group = Group([sys.executable, *arguments], tmp_path / "output")
    finally:
        signal.signal(signal.SIGINT, before)
    _wait_for(started.exists)
    group.end()
    assert 'name="test_a"' in result.read_text()


def test_a_shortage_is_found_anywhere_and_the_second_try_has_its_own_time(tmp_path: Path) -> None:
    """The product says that memory ran out, and a long traceback follows."""
    told = "\n".join(["mimae.faults.shortage.MemoryShortage: memory ran out on rank 0 in forward", *["advice"] * 40])
    world = World({"is large": [(50, 1, told, []), (40, 0, "", [(30, 1)])]})
    states = call(world, [stage("is large", 60, least=45, smaller=["less"])], tmp_path / "gpu.json")
    assert states == {"is large": "done"} and world.started[-1][-1] == "less"


def test_the_time_of_a_call_begins_with_its_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    age = machine.process_age()
    time.sleep(0.1)
    assert 0.08 < machine.process_age() - age < 5
    given: list[float] = []

    class Told(Run):
        def __init__(self, *arguments: Any) -> None:
            given.append(arguments[3])
            super().__init__([], *arguments[1:])

    monkeypatch.setattr(running, "Run", Told)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(machine, "describe", lambda device: MACHINE)
    monkeypatch.setattr(machine, "process_age", lambda: 21.0)
    CliRunner().invoke(app, ["bench", "gpu", "--seconds", "100", "--out", str(tmp_path / "gpu.json")])
    assert given == [79.0]


def test_a_command_that_fails_leaves_its_output(tmp_path: Path) -> None:
    states = Run([Stage("missing", ["no.such.module"], 60)], tmp_path / "gpu.json", MACHINE, 200).run()
    assert states == {"missing": "failed"}
    row = json.loads((tmp_path / "gpu.json").read_text())["stages"]["missing"]
    assert row["exit_code"] == 1 and "No module named" in row["last_lines"][-1]


def test_the_stages_fit_into_two_calls_and_their_commands_exist() -> None:
    assert sum(each.seconds for each in STAGES) <= 2 * (540 - RESERVE)
    assert all(each.least <= each.seconds for each in STAGES)
    assert len({each.name for each in STAGES}) == len(STAGES)
    bench = next(group for group in app.registered_groups if group.name == "bench").typer_instance
    verbs = {command.name for command in bench.registered_commands} if bench is not None else set()
    for each in STAGES:
        assert any("{result}" in argument for argument in each.arguments)
        if each.arguments[0] == "mimae":
            assert each.arguments[1] == "bench" and each.arguments[2] in verbs
        elif each.arguments[0] != "pytest":
            assert find_spec(each.arguments[0]) is not None
    for each in STAGES:  # Rates are measured once, and memory comes last.
        if each.arguments[1] == "bench":
            assert "--no-roof" in each.arguments
            assert each is STAGES[-1] or each.arguments[2] == "kernels" or "--no-memory" in each.arguments


def test_each_step_of_the_stages_is_a_legal_one() -> None:
    given = [each.arguments for each in STAGES if each.name.startswith("step")]
    assert len(given) == 7
    for arguments in given:
        recipe = arguments[arguments.index("--recipe") + 1]
        for option, value in pairwise(arguments):
            if option == "--variant":
                load_recipe(recipe, value.split())


def test_the_stage_of_tests_runs_the_files_with_tests_for_a_gpu(tmp_path: Path) -> None:
    """A run of the whole tree would collect for most of the stage's time."""
    for name, text in (("a/test_a", "mark.gpu"), ("kernels/test_z", "marks=pytest.mark.gpu)"), ("a/test_b", "gpus")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.py").write_text(text)
    found = [Path(file).resolve() for file in gpu_tests(tmp_path)]
    assert found == [tmp_path / "kernels/test_z.py", tmp_path / "a/test_a.py"]
    (stage,) = (each for each in STAGES if each.name == "tests")
    assert any("test_embed_visible" in file for file in stage.arguments)


@pytest.mark.parametrize("report", [{}, {"calls": 1, "stages": {}}, "some"])
def test_the_page_renders_whatever_the_file_holds(report: Any, tmp_path: Path) -> None:
    if report == "some":
        cut = {"state": "cut off", "result": {"metrics": [{"images_per_s": 1234.5, "step": 20}], "epochs": []}}
        contest = {"contenders": {"mimae": {"images_per_s": 800.0}}}
        found = {
            "pretrain, plain": cut,
            "pretrain, graphs": {"state": "cut off", "result": {"metrics": [{"images_per_s": None, "step": 10}]}},
            "step, memory": {
                "state": "done",
                "result": {"contests": [{"contenders": {"mimae": {"peak_bytes": 3 << 30}}}]},
            },
            "step, eager": {"state": "failed", "result": None, "before": {"result": {"contests": [contest]}}},
            "tests": {"state": "done", "result": '<?xml?><testsuite name="p" errors="0" failures="1" tests="9">'},
        }
        report = {"calls": 2, "stages": found}
    page = render(report and {**MACHINE, **report})
    assert all(f"| {each.name} |" in page for each in STAGES)
    assert ("Nothing has been measured on a GPU yet" in page) == (not report)
    if report and report["stages"]:
        assert "| cut off | 1,234 images/s at step 20 |" in page and "| cut off | at step 10 |" in page
        assert "| done | mimae 3.0 GiB |" in page
        assert "| failed | mimae 800 images/s |" in page and "| done | 9 tests, 1 failures, 0 errors |" in page


def times(median: float) -> dict[str, Any]:
    return {kind: {"median": median, "p20": median, "p80": median} for kind in ("forward", "both")}


def test_the_page_has_every_kind_of_number() -> None:
    ops = {
        "op": "club", "size": "ViT-B/16", "batch": 1024, "precision": "fp32",
        "contenders": {
            "reference": {"skipped": None, "extra_bytes": 3 << 20, **times(4e-3)},
            "fused": {"skipped": None, "extra_bytes": 0, **times(1e-3)},
            "eager": {"skipped": "out of\nmemory | here"},
        },
    }  # fmt: skip
    mimae = {
        "images_per_s": 1400.0,
        "attention": "cudnn",
        "ours_over_this": {"median": 1.0},
        "seconds_per_step": [0.2],
        "peak_bytes": 41 << 30,
    }
    steps = {
        "images": 256,
        "uncompiled_seconds": 0.32,
        "agreement": {"eager": {"bf16": {"loss": 1e-3, "grad_norm": 2e-3}}},
        "skipped": {"model.attention=xformers": "not installed"},
        "contenders": {
            "mimae": mimae,
            "eager": mimae | {"ours_over_this": {"median": 1.3}, "peak_bytes": None, "peak_skipped": "no room"},
        },
    }
    phases = {f"seconds_{name}": 1.0 + n for n, name in enumerate(("data", "forward", "backward", "optimizer"))}
    epoch = {"images_per_s": 1390.0, "mfu": 0.32, "knn": 0.5, "mem_peak_bytes": 30 << 30, "seconds": 6.0, **phases}
    run = {
        "epochs": [epoch],
        "chosen": {"attention": "cudnn", "loader": "torch"},
        "pictures": ["a"],
        "clocks": [None, [{"clocks.sm": "1700 MHz", "clocks.max.sm": "1980 MHz"}]],
    }
    traced = {"encoder": {"forward_seconds": 0.01, "backward_seconds": 0.02, "launches": 30}}
    compiled = {
        "seconds": 20.0,
        "machine_code": [{"op": "club", "kernel": "terms", "size": "a", "error": "of ptxas"}],
        "roof": {"copy_bytes_per_s": 3e12, "bf16_flops_per_s": 6e14},
        "roof_of_step": {"bf16": {"square": 7e14, "layers": 5e14}},
    }
    found = {
        "compile": compiled,
        "evaluate": run,
        "step, eager": {"bench": "step", "contests": [steps]},
        "op club": {"bench": "kernels", "contests": [ops]},
        "trace": {"phases": traced, "seconds": 0.18, "images": 256},
    }
    page = render(
        {**MACHINE, "calls": 1, "stages": {name: {"state": "done", "result": r} for name, r in found.items()}}
    )
    for line in (
        "| copy | 3,000 GB |",
        "| bf16 products, as in ViT-B's step | 500 TFLOP |",
        "| op club | 30 | done | ViT-B/16, 1,024 images: fused 1 ms, reference 4 ms |",
        "| club | ViT-B/16, fp32 | 1,024 | reference | 4.000 | 4.000 | 3 |  |",
        "| club | ViT-B/16, fp32 | 1,024 | eager |  |  |  | out of memory \\| here |",
        "| step, eager | mimae | 1,400 | 1.000 | cudnn |  | 41.0 |  |",
        "| step, eager | eager | 1,400 | 1.300 | cudnn | 2e-03 (bf16) |  | no room |",
        "| step, eager | model.attention=xformers |  |  |  |  |  | not installed |",
        "| step, eager | before compilation | 800 |",
        "| 1,390 images/s; MFU 32 %; kNN 0.500, 1 pictures |",
        "| evaluate | 1.00 | 2.00 | 3.00 | 4.00 |  | 6.0 | 30.0 | cudnn, torch | 1700 MHz of 1980 MHz |",
        "| encoder | 10.00 | 20.00 | 30 |",
        "| club | terms | a | of ptxas |",
    ):
        assert line in page


def test_the_page_in_docs_is_that_of_the_file() -> None:
    file = RESULTS / "gpu.json"
    page = render(json.loads(file.read_text()) if file.exists() else {})
    assert (RESULTS.parents[1] / "docs/gpu-day.md").read_text() == page, "run `mimae bench gpu --render`"


def test_predictions_are_those_of_the_budget(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The page of the budget has a row for each of these settings, with ms of a step, images/s and MFU at its end."""
    budget = (RESULTS.parents[1] / "docs/budget.md").read_text()
    found = predictions()
    for name, settings in (("pretrain, plain", "the recipe"), ("step, less work", "`decoder.predict=next_view`")):
        row = next(line for line in budget.splitlines() if line.startswith(f"| {settings} |"))
        step, rate, mfu = (cell.strip() for cell in row.split("|")[-4:-1])
        assert f"{rate} images/s, {step} ms, MFU {mfu}" in found[name]
    assert found["step, ViT-L"].startswith("mimae ") and "step, transformers" not in found
    monkeypatch.setattr(predicted, "RESULTS", tmp_path)
    assert predictions() == {} and "Nothing has been" in render({})


def test_the_stage_that_compiles_writes_after_every_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[set[str]] = []
    file = tmp_path / "result.json"

    def rows(cases: Any, processes: int, targets: Any, keep: Any) -> None:
        keep([{"kernel": "a"}])
        keep([{"kernel": "a"}, {"kernel": "b"}])

    def rate(*given: Any) -> dict[str, float]:
        seen.append({*json.loads(file.read_text())})
        return {"of": 1.0}

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(
        major=9, minor=0, multi_processor_count=132
    ))  # fmt: skip
    monkeypatch.setattr(compiling.offline, "machine_code", rows)
    monkeypatch.setattr(compiling.kernels, "roof", rate)
    monkeypatch.setattr(compiling.roof, "roof", rate)
    compiling.main(file, torch.device("cpu"))
    first = {"seconds", "machine_code"}
    assert seen == [first, first | {"roof"}]
    found = json.loads(file.read_text())
    assert len(found["machine_code"]) == 2 and found.keys() == first | {"roof", "roof_of_step"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="here the command runs")
def test_without_a_gpu_it_says_what_runs_here(tmp_path: Path) -> None:
    answer = CliRunner().invoke(app, ["bench", "gpu"])
    assert isinstance(answer.exception, UserError) and "mimae bench kernels" in str(answer.exception)
    page = tmp_path / "page.md"
    assert (
        CliRunner().invoke(app, ["bench", "gpu", "--out", str(tmp_path / "no"), "--render", str(page)]).exit_code == 0
    )
    assert page.read_text().startswith("# Measurements on a GPU")


TINY = [
    *("model.size=tiny", "decoder.depth=1", "schedule.batch_size=4", "data.workers=0", "engine.kind=ddp"),
    *("compile=off", "schedule.warmup_epochs=0"),
]


@pytest.mark.slow  # trains, and compiles the ops' kernels
def test_the_stages_that_pretrain_leave_records_and_evaluate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mimae.bench.gpu import train

    monkeypatch.setattr(train, "IMAGES", 16)
    monkeypatch.setattr(train, "DIFFERENT", 8)
    monkeypatch.setattr(train, "STEPS", 2)
    (stage,) = (each for each in STAGES if each.name == "evaluate")
    train.main(tmp_path / "run.result", [*stage.arguments[2:], *TINY, "schedule.max_steps=4"])
    found = json.loads((tmp_path / "run.result").read_text())
    epoch = found["epochs"][-1]
    assert epoch["images"] == 16 and 0 <= epoch["knn"] <= 1 and epoch["val_rec"] > 0
    assert found["pictures"] == ["step-00000004.png"] and (tmp_path / "run.png").stat().st_size > 1000
    assert found["chosen"]["attention"] in ("sdpa", "plain")
    train.main(tmp_path / "plain.result", TINY)
    found = json.loads((tmp_path / "plain.result").read_text())
    assert found["metrics"][-1]["step"] == 2 and found["epochs"][-1]["images"] == 8 and not found["pictures"]


@pytest.mark.slow  # profiles steps
def test_the_stage_that_traces_leaves_a_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mimae.bench.gpu import trace

    monkeypatch.setattr(trace, "IMAGES", 16)
    monkeypatch.setattr(trace, "DIFFERENT", 4)
    monkeypatch.setattr(trace, "STEPS", 1)
    trace.main(tmp_path / "trace.result", TINY)
    found = json.loads((tmp_path / "trace.result").read_text())
    assert found["images"] == 4 and found["phases"]
    assert (tmp_path / "trace" / "trace.json.gz").stat().st_size > 1000
