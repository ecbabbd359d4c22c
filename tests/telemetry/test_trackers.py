"""Tests of trackers: each receives all data, and a tracker that fails or hangs does not disturb the run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from mimae.config import renamed
from mimae.config.load import load_recipe
from mimae.errors import UserError
from mimae.outside.files import Folder
from mimae.telemetry import trackers
from mimae.telemetry.settings import TelemetrySettings
from mimae.telemetry.telemetry import Telemetry
from mimae.telemetry.trackers import Aside, kept_id


class Listener:
    """Tracker that records its calls and raises a given error."""

    name = "listener"

    def __init__(self, error: Exception | None = None) -> None:
        self.got: list[tuple[Any, ...]] = []
        self.error = error

    def _take(self, *got: Any) -> None:
        self.got.append(got)
        if self.error is not None:
            raise self.error

    def rewind(self, step: int) -> None:
        self._take("rewind", step)

    def scalars(self, group: str, values: Mapping[str, Any], step: int) -> None:
        self._take("scalars", group, values["loss"], step)

    def image(self, path: str, png: bytes, step: int) -> None:
        self._take("image", path, png, step)

    def text(self, name: str, text: str, step: int) -> None:
        self._take("text", name, text[:9], step)

    def close(self) -> None:
        self._take("close")


def run_with(listener: Any, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(trackers.TRACKERS, "tensorboard", lambda folder, failed: listener)
    with Telemetry(run, TelemetrySettings(), is_main=True, total_steps=9) as telemetry:
        telemetry.rewind(3)
        telemetry.describe("seed: 1\n")
        telemetry.step({"step": 4, "loss": 0.5})
        telemetry.epoch({"epoch": 0, "loss": 0.25})
        telemetry.image("images/a.png", b"png")


def test_a_tracker_gets_recipe_environment_numbers_and_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listener = Listener()
    run_with(listener, tmp_path, monkeypatch)
    assert listener.got == [
        ("rewind", 3),
        ("text", "config.yaml", "seed: 1\n", 3),
        ("text", "environment.json", '{\n  "mima', 3),
        ("scalars", "train", 0.5, 4),
        ("scalars", "epoch", 0.25, 4),
        ("image", "images/a.png", b"png", 4),
        ("close",),
    ]
    assert (tmp_path / "config.yaml").read_text() == "seed: 1\n"


def test_a_tracker_that_fails_is_told_once_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    listener = Listener(ConnectionError("no route\x1b[2J to server"))
    run_with(listener, tmp_path, monkeypatch)
    assert len(listener.got) == 7
    out = capsys.readouterr().out
    assert out.count("listener cannot be written: no route\\x1b[2J to server; the run continues") == 1
    faults = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [fault["details"]["what"] for fault in faults] == ["listener"]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1


def test_a_tracker_that_hangs_holds_nothing_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    over = threading.Event()

    class Hanging(Listener):
        def scalars(self, group: str, values: Mapping[str, Any], step: int) -> None:
            over.wait(60)

    monkeypatch.setattr(trackers, "GRACE", 0.2)
    began = time.monotonic()
    run_with(Aside("slow", Hanging, lambda name, error: None), tmp_path, monkeypatch)
    assert time.monotonic() - began < 30
    over.set()
    assert "slow cannot be written: it did not accept all records within 0 s" in capsys.readouterr().out


def test_a_server_that_is_too_slow_costs_its_own_calls() -> None:
    over, listener = threading.Event(), Listener()

    def make() -> Listener:
        over.wait(60)
        return listener

    aside = Aside("slow", make, lambda name, error: None)
    aside.rewind(0)
    with pytest.raises(TimeoutError, match="1000 calls behind"):
        for step in range(2000):
            aside.text("a", "b", step)
    over.set()
    while len(listener.got) < 1000:
        time.sleep(0.01)
    aside.close()
    assert len(listener.got) == 1001 and listener.got[-1] == ("close",)


def test_a_tracker_that_cannot_begin_is_told_and_left_alone() -> None:
    failed: list[str] = []

    def refuse() -> Listener:
        raise ValueError("no library")

    for make in (refuse, lambda: Listener(OSError("no key"))):
        aside = Aside("w", make, lambda name, error: failed.append(str(error)))
        aside.rewind(0)
        aside._thread.join(10)
        aside.text("a", "b", 0)
        aside.close()
    assert failed == ["no library", "no key"]


def test_an_id_is_made_once(tmp_path: Path) -> None:
    folder, made = Folder(tmp_path), iter("abc")
    assert [kept_id(folder, name, lambda: next(made)) for name in ("w", "m", "w")] == ["a", "b", "a"]
    (tmp_path / "trackers.json").write_text("[torn")
    assert kept_id(folder, "w", lambda: next(made)) == "c" == kept_id(folder, "w", lambda: "")


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_tracker_that_is_not_installed_is_refused_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: Any
) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=rf"names {name}.*pip install 'mimae\[track\]'"):
        Telemetry(tmp_path, TelemetrySettings(trackers=(name,)), is_main=True, total_steps=9)


@pytest.mark.parametrize(("value", "expected"), [("true", ("tensorboard",)), ("false", ())])
def test_the_old_key_is_read_and_told_once(
    value: str, expected: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    renamed._report_once.cache_clear()
    for _ in range(2):
        resolved = load_recipe("quickstart", [f"telemetry.tensorboard={value}"])
    assert resolved.recipe.telemetry.trackers == expected
    assert resolved.origins["telemetry.trackers"] == "override, as telemetry.tensorboard"
    told = capsys.readouterr().err
    assert told.count("telemetry.tensorboard (override) has a new name: it is read as telemetry.trackers=") == 1


def test_an_override_under_the_old_name_is_over_a_recipe_under_the_new_one() -> None:
    tree = {"telemetry": {"trackers": ["tensorboard", "mlflow"]}}
    assert load_recipe(tree, ["telemetry.tensorboard=false"]).recipe.telemetry.trackers == ()
    with pytest.raises(UserError, match=r"telemetry\.trackers = 5 \(override, as telemetry\.tensorboard\): legal is"):
        load_recipe({}, ["telemetry.tensorboard=5"])


TRACKED = """
import io, sys, time
from pathlib import Path
from PIL import Image
from mimae.telemetry.settings import TelemetrySettings
from mimae.telemetry.telemetry import Telemetry

png = io.BytesIO()
Image.new("RGB", (4, 4)).save(png, "PNG")
first, settings = int(sys.argv[3]), TelemetrySettings(trackers=(sys.argv[2],))
with Telemetry(Path(sys.argv[1]), settings, is_main=True, total_steps=9) as telemetry:
    telemetry.rewind(first)
    telemetry.describe("seed: 1\\nmodel:\\n  size: tiny\\n")
    for step in range(first + 1, first + 3):
        telemetry.step({"step": step, "loss": 1 / step, "rec": float("nan")})
    telemetry.image("images/a.png", png.getvalue())
"""


def _tracked(run: Path, tracker: str, first: int, fault: str = "", **variables: str) -> None:
    """Track two steps in a process of its own, which says that the tracker cannot be written for reason `fault`."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB", "MLFLOW"))}
    done = subprocess.run(
        [sys.executable, "-c", TRACKED, str(run), tracker, str(first)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env=environment | variables,
        timeout=300,
    )
    assert done.returncode == 0 and ("cannot be written" in done.stdout) == bool(fault), done.stdout + done.stderr
    assert fault in done.stdout


@pytest.mark.slow  # the import of mlflow
@pytest.mark.skipif(find_spec("mlflow") is None, reason="mlflow is not installed")
def test_mlflow_takes_the_names_of_any_classes(tmp_path: Path) -> None:
    """mlflow itself checks the names; the server is a stand-in."""
    from mlflow.utils.validation import _validate_batch_log_limits, _validate_metric

    from mimae.telemetry.mlflow_tracker import MLflow

    calls: list[list[str]] = []

    class Client:
        def log_batch(self, run: str, metrics: list[Any], synchronous: bool) -> None:
            _validate_batch_log_limits(metrics, [], [])
            for each in metrics:
                _validate_metric(each.key, each.value, each.timestamp, each.step)
            calls.append([each.key for each in metrics])

    tracker = MLflow(Folder(tmp_path))
    tracker._client = Client()
    names = ["door; double door", "<b>", ">b<", "a//b/", "Straße", "a" * 400, "a" * 401, *map(str, range(1200))]
    tracker.scalars("epoch", {f"iou_{name}": 0.5 for name in names}, 1)
    assert [len(call) for call in calls] == [1000, 207]
    assert len({key for call in calls for key in call}) == len(names), "each class has its own metric"


@pytest.mark.slow
@pytest.mark.skipif(find_spec("mlflow") is None, reason="mlflow is not installed")
def test_mlflow_keeps_one_run_through_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Track to files in the run directory; the second start continues from step 1."""
    for first in (0, 1):
        _tracked(tmp_path / "run", "mlflow", first)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow.tracking import MlflowClient

    client = MlflowClient((tmp_path / "run/mlflow").as_uri())
    experiment = client.get_experiment_by_name("mimae")
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED" and found.info.run_name == "run"
    points = [(each.step, each.value) for each in client.get_metric_history(found.info.run_id, "train/loss")]
    assert {step for step, _ in points} == {1, 2, 3} and dict(points)[2] == 0.5
    assert not client.get_metric_history(found.info.run_id, "train/rec")
    stored = {artifact.path for artifact in client.list_artifacts(found.info.run_id)}
    assert {"config.yaml", "environment.json", "images"} <= stored


@pytest.mark.slow
@pytest.mark.skipif(find_spec("mlflow") is None, reason="mlflow is not installed")
def test_mlflow_writes_nothing_where_a_stranger_says(tmp_path: Path) -> None:
    _tracked(tmp_path / "run", "mlflow", 0)
    (tmp_path / "victim").mkdir()
    (meta,) = (tmp_path / "run/mlflow").glob("*/*/meta.yaml")
    place = f"artifact_uri: {(tmp_path / 'victim').as_uri()}"
    meta.write_text(re.sub("artifact_uri: .*", place, meta.read_text()))
    _tracked(tmp_path / "run", "mlflow", 1, fault="victim as the place of pictures and texts")
    assert not list((tmp_path / "victim").iterdir())


@pytest.mark.slow
@pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_keeps_one_run_through_a_resume(tmp_path: Path) -> None:
    """Track offline: each start writes its own file, under the same id."""
    for first in (0, 1):
        _tracked(tmp_path / "run", "wandb", first, WANDB_MODE="offline")
    kept = json.loads((tmp_path / "run/trackers.json").read_text())["wandb"]
    files = list((tmp_path / "run/wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2 and all(file.name == f"run-{kept}.wandb" for file in files)
    content = b"".join(file.read_bytes() for file in files)
    assert all(word in content for word in (b"train/loss", b"tiny", b"packages"))
