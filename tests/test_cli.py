"""The launcher: exit codes, what it prints where, and that it starts at once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Annotated, Any

import pytest
import typer

import mimae
from mimae import cli
from mimae.config.recipe import Recipe
from mimae.data.loading.batch import DataError
from mimae.train import loop

QUICK = ["pretrain", "quickstart"]


def launch(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit code of `mimae ARGUMENTS`, in this process."""
    monkeypatch.setattr(sys, "argv", ["mimae", *arguments])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    return int(exit.value.code or 0)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Recipe]:
    """Collects the recipes that would be pretrained."""
    recipes: list[Recipe] = []

    def pretrain(recipe: Recipe) -> SimpleNamespace:
        recipes.append(recipe)
        return SimpleNamespace(saved_on_signal=recipe.seed == 75)

    monkeypatch.setattr(loop, "pretrain", pretrain)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    return recipes


def test_help_is_instant_and_imports_nothing_heavy() -> None:
    def seconds() -> float:
        # Of the processor: on an idle machine what the clock says, and no more on a busy one.
        start = time_of_children()
        subprocess.run([sys.executable, "-m", "mimae", "--help"], check=True, capture_output=True)
        return time_of_children() - start

    def time_of_children() -> float:
        times = os.times()
        return times.children_user + times.children_system

    assert min(seconds() for _ in range(5)) < 0.3
    heavy = "import sys, mimae.cli; print({'torch', 'numpy', 'pydantic', 'rich', 'yaml'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", heavy], text=True) == "set()\n"


def test_overrides_reach_the_recipe(monkeypatch: pytest.MonkeyPatch, trained: list[Recipe]) -> None:
    assert launch(monkeypatch, *QUICK, "masking.num_masks=2", "optimizer.learning_rate=1e-3") == 0
    assert mimae.pretrain("quickstart", "masking.num_masks=2", optimizer={"learning_rate": 1e-3})
    assert trained[0] == trained[1]
    assert (trained[0].masking.num_masks, trained[0].optimizer.learning_rate) == (2, 1e-3)


def test_a_run_saved_on_a_signal_exits_with_75(monkeypatch: pytest.MonkeyPatch, trained: list[Recipe]) -> None:
    assert launch(monkeypatch, *QUICK, "seed=75") == 75
    # torchrun would report a failed worker and a traceback of its own.
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

    def no_data(recipe: Recipe) -> None:
        raise DataError("data.path=/nonexistent is not there")

    monkeypatch.setattr(loop, "pretrain", no_data)
    assert launch(monkeypatch, *QUICK) == 2
    assert capsys.readouterr().err == "mimae: data.path=/nonexistent is not there\n"
    # What one rank finds in its data it alone can tell; settings are the same on all, and one speaks for them.
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert launch(monkeypatch, *QUICK) == 2
    assert capsys.readouterr().err == "mimae (rank 1): data.path=/nonexistent is not there\n"
    assert launch(monkeypatch, *QUICK, "masking.num_masks=5") == 2
    assert capsys.readouterr() == ("", "")


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(recipe: Recipe) -> None:
        raise ValueError("not for the user")

    monkeypatch.setattr(loop, "pretrain", broken)
    monkeypatch.setattr(sys, "argv", ["mimae", *QUICK])
    with pytest.raises(ValueError, match="not for the user"):
        cli.main()


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


def test_a_mounted_verb_has_the_arguments_of_its_module(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[Any] = []

    def main(
        run: Annotated[Path, typer.Argument(help="a run's directory")],
        few: Annotated[int, typer.Option(help="labels")] = 10,
    ) -> None:
        """Measures."""
        calls.append((run, few))

    module = ModuleType("mimae.evaluate.probe")
    module.main = main  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mimae.evaluate.probe", module)
    assert launch(monkeypatch, "probe", "runs/x", "--few", "3") == 0
    assert calls == [(Path("runs/x"), 3)]
    assert launch(monkeypatch, "probe", "--help") == 0
    out = capsys.readouterr().out
    assert "Usage: mimae probe [OPTIONS] " in out and "a run's directory" in out and "Measures." in out
    assert launch(monkeypatch, "probe", "runs/x", "--few", "many") == 2
    assert len(calls) == 1


def test_the_python_names_are_there_at_their_first_use() -> None:
    from mimae.model.mimae import MIMAE
    from mimae.transfer.export import load_encoder

    assert (mimae.MIMAE, mimae.load_encoder) == (MIMAE, load_encoder)
    with pytest.raises(AttributeError, match="no attribute 'nosuch'"):
        _ = mimae.nosuch
