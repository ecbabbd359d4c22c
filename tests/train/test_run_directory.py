"""Tests that a run writes only inside its directory, even where others put links, and survives changes to it."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import mimae
from mimae import distributed
from mimae.checkpoints import checkpoint
from mimae.checkpoints.saving import Saver
from mimae.checkpoints.settings import CheckpointSettings
from mimae.data.loading.batch import BadSample, BadSamples
from mimae.errors import UserError
from mimae.faults.watchdog import Watchdog
from mimae.outside import text
from mimae.outside.files import Folder
from mimae.telemetry import events
from mimae.train.trainer import Outcome, Trainer

SETTINGS = {
    "precision": "fp32",
    "data": {"workers": 0, "loader": "torch", "val_path": None, "image_size": 16},
    "model": {"size": "tiny", "width": 16, "depth": 1, "heads": 2, "patch_size": 4, "attention": "sdpa"},
    "decoder": {"width": 8, "depth": 1, "heads": 2},
    "schedule": {"batch_size": 4, "max_steps": 3, "warmup_epochs": 0},
    "checkpoint": {"every_steps": 1, "keep": 9, "background": False},
    "telemetry": {"log_every_steps": 1, "probe_every_epochs": 0},
}


def train(run: Path, **telemetry: Any) -> Outcome:
    settings = SETTINGS | {"run": {"dir": str(run)}}
    settings["telemetry"] = SETTINGS["telemetry"] | telemetry  # type: ignore[operator]
    return mimae.pretrain("quickstart", **settings)


def happened(run: Path) -> list[str]:
    return [event["kind"] for event in events.read(Folder(run))]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    assert train(run).finished
    return run


def _written(run: Path) -> list[str]:
    """Return the relative names of all files and folders of a run, except those inside checkpoints."""
    names = {str(path.relative_to(run)) for path in run.rglob("*")}
    names |= {"checkpoints/.step-00000002.tmp", "stacks", "stacks/rank-0.txt", "bad_samples.jsonl"}
    names |= {"nonfinite", "nonfinite/checkpoints/.step-00000001.tmp"}
    names |= {f".{name}.tmp" for name in names if "/" not in name and "." in name}
    return sorted(
        name for name in names if not re.match(r"checkpoints/[^/]*/|tensorboard/", name) and name != "checkpoints"
    )


def _write_the_rest(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write the files that a run writes only after a fault."""
    BadSamples(run / "bad_samples.jsonl", 10, 0.5).record([BadSample(1, "a.png", "torn")])
    # A single rank has no watchdog. The saver below needs the true number of ranks for its collectives.
    with monkeypatch.context() as several:
        several.setattr("mimae.faults.watchdog.distributed.world_size", lambda *_: 2)
        with Watchdog(run, 60, 60):
            pass
    distributed.setup()
    say = checkpoint.say
    try:
        saver = Saver(run, CheckpointSettings(background=False), torch.device("cpu"), say, inside="nonfinite")
        saver.start(1, {"model.w": torch.ones(1)}, {"data": "x", "skipped_to": 2})
    finally:
        distributed.shutdown()


@pytest.mark.slow  # one run for each of about twenty names
def test_no_link_in_a_run_directory_leads_a_write_outside(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Put a link to a user's file or folder at every name that a run writes."""
    monkeypatch.setattr("mimae.distributed.world_size", lambda *_: 1)
    names = _written(whole)
    assert {"lock", "config.yaml", "environment.json", "metrics.jsonl", "epochs.jsonl", "events.jsonl", "latest"} <= {
        *names
    } and {"images", "tensorboard", "checkpoints/step-00000001", ".config.yaml.tmp"} <= {*names}
    for number, name in enumerate(names):
        run, victim = tmp_path / f"run-{number}", tmp_path / f"victim-{number}"
        is_folder = (whole / name).is_dir() or name in ("stacks", "nonfinite") or "/.step" in name
        content = victim / "file" if is_folder else victim
        content.parent.mkdir(exist_ok=True)
        before = (whole / name).read_text() if name == "config.yaml" else "precious"  # this run is refused early
        content.write_text(before)
        (run / name).parent.mkdir(parents=True)
        (run / name).symlink_to(victim)
        try:
            train(run)
            _write_the_rest(run, monkeypatch)
            said = ""
        except UserError as error:
            said = str(error)
        said += capsys.readouterr().out
        assert content.read_text() == before, name
        assert not is_folder or [path.name for path in victim.iterdir()] == ["file"], name
        # Leftovers of a save, and names that are no longer used, are not reported.
        is_used = not re.search(r"\.tmp$|checkpoints/", name)
        assert not is_used or "symbolic link" in said, (name, said)


def test_links_that_a_run_goes_on_beside_are_told_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "victim").mkdir()
    (tmp_path / "file").write_text("precious")
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    for name in ("images", "tensorboard", "checkpoints/.step-00000001.tmp"):
        (tmp_path / "run" / name).symlink_to(tmp_path / "victim")
    (tmp_path / "run/latest").symlink_to(tmp_path / "file")
    assert train(tmp_path / "run").finished
    assert not list((tmp_path / "victim").iterdir()) and (tmp_path / "file").read_text() == "precious"
    told = capsys.readouterr().out
    assert len(re.findall("latest cannot be written: it is a symbolic link", told)) == 3, "for each save"
    assert len(re.findall("tensorboard cannot be written: it is a symbolic link", told)) == 1
    assert len(re.findall("images/step-00000003.png cannot be written: it is a symbolic link", told)) == 1
    assert len(checkpoint.names(tmp_path / "run")) == 3


def test_a_run_from_weights_follows_no_link_at_its_record_of_them(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/init.json").symlink_to(tmp_path / "file")
    settings = SETTINGS | {"run": {"dir": str(tmp_path / "run")}, "model": SETTINGS["model"] | {"init": str(whole)}}  # type: ignore[operator]
    with pytest.raises(UserError, match=r"init\.json cannot be written: it is a symbolic link"):
        mimae.pretrain("quickstart", **settings)
    assert (tmp_path / "file").read_text() == "precious"


def test_linked_run_and_checkpoints_stay_legal(tmp_path: Path) -> None:
    """Accept links that the user made to another disk."""
    for name in ("disk/run", "disk/checkpoints"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "run").symlink_to(tmp_path / "disk/run")
    (tmp_path / "run/checkpoints").symlink_to(tmp_path / "disk/checkpoints")
    assert train(tmp_path / "run", trackers=[], images_every_epochs=0).finished
    assert len(list((tmp_path / "disk/checkpoints").iterdir())) == 3


class _Closed:
    """Stdout that accepts some lines, and then fails like a pipe without a reader."""

    encoding = "utf-8"

    def __init__(self, lines: int) -> None:
        self.left = lines

    def write(self, _: str) -> None:
        self.left -= 1
        if self.left < 0:
            raise BrokenPipeError(32, "Broken pipe")

    def flush(self) -> None:
        if self.left < 0:
            raise BrokenPipeError(32, "Broken pipe")

    def isatty(self) -> bool:
        return False


@pytest.mark.parametrize("lines", [0, 4])
def test_a_stdout_that_nobody_reads_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], lines: int
) -> None:
    monkeypatch.setattr(text, "_losses", {})
    monkeypatch.setattr(text.atexit, "register", lambda _: None)
    with monkeypatch.context() as closed:
        closed.setattr(sys, "stdout", _Closed(lines))
        assert train(tmp_path, trackers=[], images_every_epochs=0).finished
    assert happened(tmp_path).count("output lost") == 1
    (lost,) = [event for event in events.read(Folder(tmp_path)) if event["kind"] == "output lost"]
    assert lost["details"] == {"stream": "stdout", "reason": "Broken pipe"}
    assert "writes to stdout failed: Broken pipe; the run continued" in capsys.readouterr().err


def _at_step_2(monkeypatch: pytest.MonkeyPatch, action: Callable[[], None]) -> None:
    optimize = Trainer.optimize

    def then(self: Any) -> Any:
        if self.step == 1:
            action()
        return optimize(self)

    monkeypatch.setattr(Trainer, "optimize", then)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's
def test_a_run_that_is_renamed_goes_on_in_its_new_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _at_step_2(monkeypatch, lambda: os.rename(tmp_path / "a", tmp_path / "b"))
    outcome = train(tmp_path / "a")
    assert len(list((tmp_path / "b/tensorboard").iterdir())) == 2
    assert outcome.finished and outcome.run == tmp_path / "b"
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
    assert checkpoint.names(tmp_path / "b") == ["step-00000003", "step-00000002", "step-00000001"]
    assert len((tmp_path / "b/metrics.jsonl").read_text().splitlines()) == 3
    # TensorBoard knows the old path, and may fail until the next save.
    kinds = [kind for kind in happened(tmp_path / "b") if kind != "fault"]
    assert kinds == ["start", "save", "moved", "save", "save", "finish"]
    assert f"renamed while training; the run continues in {tmp_path / 'b'}" in capsys.readouterr().out
    monkeypatch.undo()
    assert train(tmp_path / "b", trackers=[]).finished, "it is whole, and free again"


def test_a_run_that_is_deleted_is_saved_in_a_new_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _at_step_2(monkeypatch, lambda: shutil.rmtree(tmp_path / "a"))
    assert train(tmp_path / "a", trackers=[]).finished
    assert "deleted while training; it is made again" in capsys.readouterr().out
    assert checkpoint.names(tmp_path / "a") == ["step-00000003", "step-00000002"]
    for name in ("config.yaml", "environment.json", "lock", "metrics.jsonl", "events.jsonl", "latest"):
        assert (tmp_path / "a" / name).is_file(), name
    monkeypatch.undo()
    assert train(tmp_path / "a", trackers=[]).finished, "it is whole, and free again"


def test_a_run_that_another_one_replaced_ends_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replace() -> None:
        shutil.rmtree(tmp_path / "a")
        (tmp_path / "a").mkdir()

    _at_step_2(monkeypatch, replace)
    with pytest.raises(UserError, match="another directory by now"):
        train(tmp_path / "a", trackers=[], images_every_epochs=0)
    assert not list((tmp_path / "a").iterdir())


def test_events_tell_starts_saves_and_ends(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert happened(whole) == ["start", "save", "save", "save", "finish"]
    first, *_ = lines = [json.loads(line) for line in (whole / "events.jsonl").read_text().splitlines()]
    assert all(list(line) == ["time", "step", "kind", "details"] for line in lines)
    assert (first["step"], first["details"]) == (0, {"ranks": 1, "checkpoint": None})
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 3]

    def fail() -> None:
        raise RuntimeError("a fault\x1b[2J")

    _at_step_2(monkeypatch, fail)
    with pytest.raises(RuntimeError):
        train(tmp_path, trackers=[], images_every_epochs=0)
    monkeypatch.undo()
    os.truncate(tmp_path / "checkpoints/step-00000001/state.json", 3)
    (tmp_path / "checkpoints/step-00000000").mkdir()
    with pytest.raises(UserError, match="none of the 2 checkpoints"):
        train(tmp_path, trackers=[], images_every_epochs=0)
    shutil.rmtree(tmp_path / "checkpoints")
    assert train(tmp_path, trackers=[], images_every_epochs=0).finished
    assert happened(tmp_path) == ["start", "save", "error", "start", "fault", "save", "save", "save", "finish"]
