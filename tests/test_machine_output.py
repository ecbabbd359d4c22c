"""Tests of `--json` and `--quiet` in all commands: one document on stdout, everything else on stderr."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import typer.main

from mimae import cli
from mimae.outside import output
from tests.data.conftest import write_images
from tests.test_cli import launch, verbs

TINY = [
    *("precision=fp32", "data.image_size=8", "data.workers=0", "data.loader=torch", "data.val_path=null"),
    *("model.width=8", "model.depth=1", "model.heads=2", "model.patch_size=4", "decoder.width=8", "decoder.depth=1"),
    *("decoder.heads=2", "masking.num_masks=2", "masking.ratio=0.5", "schedule.batch_size=4", "schedule.max_steps=2"),
    *("telemetry.probe_every_epochs=0", "telemetry.images_every_epochs=0", "telemetry.trackers=[]"),
    "telemetry.log_every_steps=1",
]

HEAVY = {
    *("finetune", "linear", "detect", "segment", "extend"),  # They train as pretrain does.
    *("evaluate", "predict", "probe"),  # They need a classifier, or as many images as a probe does.
    *("profile", "convert", "replay", "drill", "bench"),
}
"""Commands that the test below does not run. `submit` runs if submitit is installed."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with images, in which the commands run one after another."""
    made = tmp_path_factory.mktemp("json")
    write_images(made / "images", [f"{'ab'[i % 2]}/{i:02}.png" for i in range(8)], 16, 16)
    return made


def commands(folder: Path) -> list[list[str]]:
    """Return cheap commands, some of which use the results of earlier ones."""
    images = str(folder / "images")
    found = [
        ["pretrain", "quickstart", *TINY, f"data.path={images}", "run.dir=run"],
        ["config", "quickstart", "seed=3"],
        ["settings"],
        ["plan", "quickstart"],
        ["doctor"],
        ["status", "run"],
        ["report", "run"],
        ["watch", "run"],
        ["compare", "run"],
        ["export", "run", "--to", "safetensors", "--out", "exported"],
        ["embed", "run", images, "--out", "features.npz"],
        ["reconstruct", "run", images],
        ["neighbours", "run", images],
        ["map", "run", images],
        ["data", "check", images],
        ["data", "show", images, "--recipe", "quickstart", *TINY, "--images", "2"],
        ["data", "pack", images, "packed/set.tar"],
    ]
    if find_spec("submitit") is not None:
        found.append(["submit", "quickstart", "--dry-run", "run.dir=run"])
    return found


def test_every_cheap_command_prints_one_document(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    run = commands(folder)
    top = {words[0] for words in verbs(typer.main.get_group(cli.app))}
    assert top - HEAVY - {"submit"} == {words[0] for words in run} - {"submit"}, "a new command is in neither list"
    said: dict[str, Any] = {}
    for arguments in run:
        assert launch(monkeypatch, *arguments, "--json") == 0, (arguments, capsys.readouterr().err)
        out = capsys.readouterr().out
        said[" ".join(arguments[: 1 + (arguments[0] == "data")])] = json.loads(out, parse_constant=lambda text: 1 / 0)
    assert said["pretrain"]["step"]["step"] == 2 and said["pretrain"]["exit_code"] == 0
    assert said["config"]["recipe"]["seed"] == 3 and said["config"]["origins"]["seed"] == "override"
    assert said["status"]["state"].startswith("finished")
    assert said["watch"]["is_finished"] and Path(said["report"]["page"]).is_file()
    assert {row["key"] for row in said["settings"]} > {"data.max_bad_fraction", "seed"}
    assert {row["settings"] for row in said["plan"]["engines"]} > {"engine.kind=ddp"}
    assert said["data check"]["readable"] == 8 and len(said["data pack"]["shards"]) == 1
    assert len(said["reconstruct"]["images"]) > 0


def test_a_mistake_is_one_line_on_stderr(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = ["config", "quickstart", "masking.num_masks=5", "optimizer.lerning_rate=1"]
    assert launch(monkeypatch, *wrong, "--json") == 2
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert out == "" and line.startswith("mimae: 2 problems in the settings: ")
    assert "masking.num_masks = 5" in line and "did you mean optimizer.learning_rate?" in line
    assert launch(monkeypatch, *wrong) == 2
    assert len(capsys.readouterr().err.splitlines()) == 3


def test_a_quiet_run_prints_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    run = ["pretrain", "quickstart", *TINY, f"data.path={folder / 'images'}", f"run.dir={folder / 'quiet'}"]
    assert launch(monkeypatch, *run, "--quiet") == 0
    assert capfd.readouterr() == ("", "") and not output.is_quiet()


def test_all_commands_have_both_options() -> None:
    group = typer.main.get_group(cli.app)
    for words in verbs(group):
        command: Any = group
        for word in words:
            command = command.commands[word]
        names = {name for parameter in command.params for name in parameter.opts}
        assert {"--quiet", "--json"} <= names, words


def test_a_file_of_results_is_read_under_its_old_name(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["bench", "flat", "--json", "flat.json", "--quiet", "--json"]
    assert cli._under_new_names(given) == ["bench", "flat", "--out", "flat.json", "--quiet", "--json"]
    assert "--json flat.json has a new name" in capsys.readouterr().err
    assert cli._under_new_names(["status", "--json", "run.json"]) == ["status", "--json", "run.json"]
