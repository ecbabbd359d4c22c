"""Tests of the command line: exit codes, output streams, and a fast start."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
import typer.core
import typer.main

import mimae
from mimae import cli
from mimae.config.recipe import Recipe
from mimae.data.loading.batch import DataError
from mimae.errors import UserError
from mimae.outside import text
from mimae.outside.text import say
from mimae.tools import status
from mimae.train import trainer
from mimae.train.task import Task

QUICK = ["pretrain", "quickstart"]


def launch(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Run `mimae ARGUMENTS` in this process, and return the exit code."""
    monkeypatch.setattr(sys, "argv", ["mimae", *arguments])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    return int(exit.value.code or 0)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Recipe]:
    """Collect the recipes that would be pretrained."""
    recipes: list[Recipe] = []

    def train(task: Task[Any]) -> SimpleNamespace:
        assert isinstance(task.recipe, Recipe)
        recipes.append(task.recipe)
        return SimpleNamespace(saved_on_signal=task.recipe.seed == 75)

    monkeypatch.setattr(trainer, "train", train)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    return recipes


def test_help_is_instant_and_imports_nothing_heavy() -> None:
    def seconds() -> float:
        # Processor time is measured, because a busy machine does not change it.
        start = time_of_children()
        subprocess.run([sys.executable, "-m", "mimae", "--help"], check=True, capture_output=True)
        return time_of_children() - start

    def time_of_children() -> float:
        times = os.times()
        return times.children_user + times.children_system

    assert min(seconds() for _ in range(5)) < 0.3
    heavy = "import sys, mimae.cli; print({'torch', 'numpy', 'pydantic', 'rich', 'yaml'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", heavy], text=True) == "set()\n"


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["config", "--help"], ["bench", "step", "--help"]])
def test_help_on_a_full_disk_is_one_sentence(arguments: list[str]) -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "mimae", *arguments]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("mimae: ") and done.stderr.count("\n") == 1
    assert "stdout cannot be written (No space left on device)" in done.stderr


def test_overrides_reach_the_recipe(monkeypatch: pytest.MonkeyPatch, trained: list[Recipe]) -> None:
    assert launch(monkeypatch, *QUICK, "masking.num_masks=2", "optimizer.learning_rate=1e-3") == 0
    assert mimae.pretrain("quickstart", "masking.num_masks=2", optimizer={"learning_rate": 1e-3})
    assert trained[0] == trained[1]
    assert (trained[0].masking.num_masks, trained[0].optimizer.learning_rate) == (2, 1e-3)


def test_a_run_saved_on_a_signal_exits_with_75(monkeypatch: pytest.MonkeyPatch, trained: list[Recipe]) -> None:
    assert launch(monkeypatch, *QUICK, "seed=75") == 75
    # Otherwise torchrun would report a failed worker, with its own traceback.
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert launch(monkeypatch, *QUICK, "seed=75") == 0
    assert len(trained) == 2


def test_a_mistake_exits_with_2_and_one_message(
    monkeypatch: pytest.MonkeyPatch, trained: list[Recipe], capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch(monkeypatch, *QUICK, "masking.num_masks=5", "optimizer.lerning_rate=1") == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 3 and "Traceback" not in err
    assert "masking.num_masks = 5" in err and "did you mean optimizer.learning_rate?" in err
    assert trained == []

    def no_data(task: Task[Any]) -> None:
        raise DataError("data.path=/nonexistent is not there")

    monkeypatch.setattr(trainer, "train", no_data)
    assert launch(monkeypatch, *QUICK) == 2
    assert capsys.readouterr().err == "mimae: data.path=/nonexistent is not there\n"
    # Only the rank that finds a mistake in its data can report it. Settings are equal on all ranks, so rank 0 reports.
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29400"}.items():
        monkeypatch.setenv(name, value)
    assert launch(monkeypatch, *QUICK) == 2
    assert capsys.readouterr().err == "mimae (rank 1): data.path=/nonexistent is not there\n"
    assert launch(monkeypatch, *QUICK, "masking.num_masks=5") == 2
    assert capsys.readouterr() == ("", "")


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(task: Task[Any]) -> None:
        raise ValueError("not for the user")

    monkeypatch.setattr(trainer, "train", broken)
    monkeypatch.setattr(sys, "argv", ["mimae", *QUICK])
    with pytest.raises(ValueError, match="not for the user"):
        cli.main()


def test_a_file_that_the_system_refuses_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    long = "x" * 300
    for arguments in (["export", long, "--out", "new"], ["extend", long, "schedule.epochs=2"], ["probe", long]):
        assert launch(monkeypatch, *arguments) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"mimae: {long}") and said.endswith("cannot be used: File name too long\n")


class Unwritable(io.StringIO):
    """A stream that the system does not let a process write."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def write(self, _: str) -> int:
        raise OSError(self.number, os.strerror(self.number))


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_results_that_cannot_be_printed_are_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    monkeypatch.setattr(text, "_losses", {})
    monkeypatch.setattr(sys, "stdout", Unwritable(errno.ENOSPC))
    for arguments in (["settings"], ["config", "quickstart"]):
        assert launch(monkeypatch, *arguments, *options) == 2
        said = "mimae: the results are not complete: stdout cannot be written (No space left on device)\n"
        assert capsys.readouterr().err == said
    # A reader that has seen enough, as `head`, closes its end.
    monkeypatch.setattr(text, "_losses", {})
    monkeypatch.setattr(sys, "stdout", Unwritable(errno.EPIPE))
    assert launch(monkeypatch, "settings", *options) == 0


def test_a_verb_with_an_exit_code_of_its_own_reports_lost_results(monkeypatch: pytest.MonkeyPatch) -> None:
    def verb(code: int) -> None:
        say("results")
        raise typer.Exit(code)

    cli._run(verb, {"code": 0})
    monkeypatch.setattr(text, "_losses", {})
    monkeypatch.setattr(sys, "stdout", Unwritable(errno.ENOSPC))
    with pytest.raises(UserError, match="the results are not complete"):
        cli._run(verb, {"code": 0})
    with pytest.raises(typer.Exit):
        cli._run(verb, {"code": 1})


@pytest.mark.parametrize("name", [None, "out.json"])
def test_a_full_disk_is_no_fault_of_the_program(name: str | None) -> None:
    def verb() -> None:
        raise OSError(errno.ENOSPC, "No space left on device", name)

    with pytest.raises(UserError, match=f"{name or 'a file'} cannot be used: No space left on device"):
        cli._run(verb, {})


@pytest.mark.parametrize("arguments", [["pretrain"], ["nosuch"], ["config", "--nosuch", "x"], ["bench", "nosuch"], []])
def test_a_wrong_command_line_exits_with_2(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    assert launch(monkeypatch, *arguments) == 2


def test_config_and_settings_print(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("base: quickstart\nmasking: {num_masks: 2}\n")
    assert launch(monkeypatch, "config", "mine.yaml", "seed=3") == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert {"seed: 3 # override", "num_masks: 2 # mine.yaml:2", "kind: orthogonal # default"} <= set(lines)
    assert launch(monkeypatch, "settings") == 0
    assert "| `masking.num_masks` |" in capsys.readouterr().out
    assert launch(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"{mimae.__version__}\n"


def test_a_verb_takes_its_arguments_to_its_module(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    seen: list[Path] = []

    def look(run: Path) -> dict[str, str]:
        seen.append(run)
        return {"state": "finished"}

    monkeypatch.setattr(status, "look", look)
    assert launch(monkeypatch, "status", str(tmp_path)) == 0
    assert seen == [tmp_path] and capsys.readouterr().out.split() == ["state", "finished"]
    assert launch(monkeypatch, "probe", "--help") == 0
    out = capsys.readouterr().out
    assert "Usage: mimae probe [OPTIONS] " in out and "a pretraining run, or one of its" in out
    assert "RUN/probe.json" in out
    assert launch(monkeypatch, "probe", "runs/x", "--images", "many") == 2


def verbs(group: typer.core.TyperGroup, *path: str) -> Iterator[list[str]]:
    """Yield the words of each verb below a group."""
    for name, command in group.commands.items():
        if isinstance(command, typer.core.TyperGroup):
            yield from verbs(command, *path, name)
        else:
            yield [*path, name]


LIGHT = """
import json, sys
from typer.testing import CliRunner
from mimae.cli import app

for arguments in json.loads(sys.argv[1]):
    result = CliRunner().invoke(app, arguments)
    heavy = {"torch", "torchvision", "triton", "timm", "numpy", "PIL", "rich"} & set(sys.modules)
    print(json.dumps([arguments, result.exit_code, len(result.output), sorted(heavy)]))
"""


def test_help_and_what_reads_settings_or_a_run_load_nothing_heavy(tmp_path: Path) -> None:
    """All commands run in one process, and the first one that loads a heavy module is named."""
    run = tmp_path / "run"
    (run / "checkpoints/step-00000002").mkdir(parents=True)
    (run / "checkpoints/step-00000002/state.json").write_text('{"step": 2, "steps": 3}')
    (run / "latest").write_text("step-00000002\n")
    (run / "config.yaml").write_text("base: quickstart\n")
    every = list(verbs(typer.main.get_group(cli.app)))
    assert {("pretrain",), ("bench", "step"), ("data", "pack")} <= {*map(tuple, every)}
    commands = [[*verb, "--help"] for verb in every]
    commands += [
        ["--help"],
        ["--version"],
        ["settings"],
        ["config", "quickstart"],
        ["config", str(run / "config.yaml")],
    ]
    commands.append(["status", str(run)])
    if find_spec("submitit") is not None:
        commands.append(["submit", "quickstart", "--dry-run", f"run.dir={run}"])
    said = subprocess.check_output([sys.executable, "-c", LIGHT, json.dumps(commands)], text=True)
    results = [json.loads(line) for line in said.splitlines()]
    assert [arguments for arguments, *_ in results] == commands
    for arguments, code, length, heavy in results:
        assert not heavy, f"mimae {' '.join(arguments)} loads {', '.join(heavy)}"
        assert code == 0 and length > 0, arguments


def test_the_python_names_are_there_at_their_first_use() -> None:
    from mimae.model.mimae import MIMAE
    from mimae.transfer.load import load_encoder

    assert (mimae.MIMAE, mimae.load_encoder) == (MIMAE, load_encoder)
    with pytest.raises(AttributeError, match="no attribute 'nosuch'"):
        _ = mimae.nosuch
