"""`mimae evaluate` and `mimae predict`: what a run measured, a line for each image, and mistakes in words."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from mimae.cli import app
from mimae.errors import CheckpointError, ConfigError, UserError
from mimae.tools import classifier
from mimae.train.tasks.classify import Classify
from mimae.train.trainer import train
from tests.train.test_classify import images, lines, recipe  # noqa: F401


@pytest.fixture(scope="module")
def run(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    place = tmp_path_factory.mktemp("run")
    assert train(Classify(recipe(images, place))).finished
    return place


def verb(*arguments: str | Path) -> str:
    result = CliRunner().invoke(app, [*map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_an_evaluation_gives_the_numbers_of_the_run(run: Path, tmp_path: Path) -> None:
    out, picture = tmp_path / "report.json", tmp_path / "confusion.png"
    shown = verb("evaluate", run, "--out", out, "--picture", picture)
    report, last = json.loads(out.read_text()), lines(run / "epochs.jsonl")[-1]
    assert report["images"] == 14 and report["top1"] == last["top1"] and "top5" not in report
    assert report["loss"] == pytest.approx(last["val_loss"], rel=1e-5)
    assert report["classes"].keys() == {"a", "b"} and sum(report["classes"].values()) / 2 == report["top1"]
    assert f"top1 {last['top1']:.4f}" in shown and "  a  " in shown
    with Image.open(picture) as image:
        assert image.size[0] > 500
    assert "moving average" not in verb("evaluate", run, "--average")


def test_a_prediction_is_a_line_for_each_image(run: Path, images: Path, tmp_path: Path) -> None:  # noqa: F811
    """Unlabelled images, one of which cannot be read."""
    folder = tmp_path / "unlabelled"
    folder.mkdir()
    for name, label in {"1": "a/0", "2": "b/1", "3": "a/2"}.items():
        (folder / f"{name}.png").write_bytes((images / f"held-out/{label}.png").read_bytes())
    (folder / "2.png").write_bytes(b"no image")
    shown = verb("predict", run, folder, "--out", tmp_path / "found.csv", "--top", "2")
    assert "3 images, of which 1 cannot be read" in shown
    rows = list(csv.DictReader((tmp_path / "found.csv").open()))
    assert [row["path"].rpartition("/")[2] for row in rows] == ["1.png", "2.png", "3.png"]
    assert not rows[1]["class"] and rows[0]["class"] == rows[2]["class"] == "a"
    assert float(rows[0]["probability"]) + float(rows[0]["probability_2"]) == pytest.approx(1, abs=1e-5)


def test_what_cannot_be_judged_is_said(run: Path, images: Path, tmp_path: Path) -> None:  # noqa: F811
    with pytest.raises(CheckpointError, match="neither a run directory nor a checkpoint"):
        classifier.load(tmp_path)
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    with pytest.raises(ConfigError, match="legal here is classify"):
        classifier.load(tmp_path)
    trained = classifier.load(run)
    with pytest.raises(UserError, match="has no labels, which an evaluation needs"):
        classifier.evaluate(trained, str(images / "held-out/a"))
    with pytest.raises(UserError, match="does not exist"):
        classifier.evaluate(trained, str(tmp_path / "nowhere"))
