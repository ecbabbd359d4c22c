"""`mimae evaluate` and `mimae predict`: what a run measured, what is found in each image, and mistakes in words."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from mimae.cli import app
from mimae.data.loading.batch import DataError
from mimae.errors import CheckpointError, UserError
from mimae.tools import predict
from mimae.train.predictors.base import Names, Options, Predictor, whole_file
from mimae.train.tasks.classify import Classify
from mimae.train.tasks.detect import Detect
from mimae.train.tasks.segment import Segment
from mimae.train.trained import Trained, load
from mimae.train.trainer import train
from tests.detection import images as objects
from tests.train import test_detect, test_segment
from tests.train.test_classify import images, lines, recipe  # noqa: F401
from tests.train.test_segment import scenes  # noqa: F401


@pytest.fixture(scope="module")
def run(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    place = tmp_path_factory.mktemp("run")
    assert train(Classify(recipe(images, place))).finished
    return place


@pytest.fixture(scope="module")
def segmenter(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """The run of a segmenter whose classes have the values 0, 1, 2 and 7 in masks."""
    place = tmp_path_factory.mktemp("segmenter")
    asked = test_segment.recipe(scenes, place, "schedule.epochs=1", "segment.ids=[0, 1, 2, 7]", "segment.head=linear")
    assert train(Segment(asked)).finished
    return place


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("coco")
    objects.write(folder, 4)
    return folder


@pytest.fixture(scope="module")
def detector(coco: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("faster_coco_eval", reason="average precision is counted by faster-coco-eval")
    place = tmp_path_factory.mktemp("detector")
    assert train(Detect(test_detect.recipe(coco, place, "schedule.epochs=1", "detect.score=0"))).finished
    return place


def verb(*arguments: str | Path) -> str:
    result = CliRunner().invoke(app, [*map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


# Classes


def test_an_evaluation_gives_the_numbers_of_the_run(run: Path, tmp_path: Path) -> None:
    out, picture = tmp_path / "report.json", tmp_path / "confusion.png"
    shown = verb("evaluate", run, "--out", out, "--picture", picture)
    report, last = json.loads(out.read_text()), lines(run / "epochs.jsonl")[-1]
    assert report["images"] == 14 and report["top1"] == last["top1"] and "top5" not in report
    assert report["val_loss"] == pytest.approx(last["val_loss"], rel=1e-5)
    assert report["classes"].keys() == {"a", "b"} and sum(report["classes"].values()) / 2 == report["top1"]
    assert f"top1 {last['top1']:.4f}" in shown and "accuracy of each class:\n  " in shown
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
    assert f"3 images, of which 1 cannot be read\n  {folder / '2.png'}" in shown
    rows = list(csv.DictReader((tmp_path / "found.csv").open()))
    assert [row["path"].rpartition("/")[2] for row in rows] == ["1.png", "2.png", "3.png"]
    assert not rows[1]["class"] and rows[0]["class"] == rows[2]["class"] == "a"
    assert float(rows[0]["probability"]) + float(rows[0]["probability_2"]) == pytest.approx(1, abs=1e-5)
    alone = verb("predict", run, folder / "3.png", "--out", tmp_path / "one.csv")
    assert "1 images" in alone and rows[2]["class"] in (tmp_path / "one.csv").read_text()


# Masks


def test_a_segmenter_measures_what_its_run_did(segmenter: Path, scenes: Path, tmp_path: Path) -> None:  # noqa: F811
    out = tmp_path / "report.json"
    shown = verb("evaluate", segmenter, "--out", out, "--picture", tmp_path / "overlays.png")
    report, last = json.loads(out.read_text()), lines(segmenter / "epochs.jsonl")[-1]
    assert (report["miou"], report["pixel_accuracy"]) == (last["miou"], last["pixel_accuracy"])
    assert report["classes"] == {name: last[f"iou_{name}"] for name in ("ground", "disc", "bar", "none")}
    assert f"miou {last['miou']:.4f}" in shown and "iou of each class" in shown and (tmp_path / "overlays.png").exists()
    # Other images, whose masks are in another layout.
    shutil.copytree(scenes / "images", tmp_path / "others")
    with pytest.raises(DataError, match=r"segment.val_masks=null, but .* is not in a folder images/"):
        predict.evaluate(load(segmenter, data=str(tmp_path / "others")))
    others = verb(
        *("evaluate", segmenter, f"segment.val_masks={scenes / 'annotations'}", "--data", tmp_path / "others")
    )
    assert f"miou {last['miou']:.4f}" in others


def test_a_mask_has_the_values_of_its_classes_and_can_be_judged(
    segmenter: Path,
    scenes: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    """The masks that a model gives are the truth of an evaluation of the same model: it finds all of them."""
    folder = tmp_path / "images"
    (folder / "deep").mkdir(parents=True)
    for i in range(3):
        shutil.copy(scenes / f"images/{i}.png", folder / ("deep" if i else ".") / f"{i}.png")
    (folder / "3.png").write_bytes(b"no image")
    out, overlays = tmp_path / "annotations", tmp_path / "overlays"
    shown = verb("predict", segmenter, folder, "--out", out, "--overlays", overlays)
    assert "a folder of masks of 4 images, of which 1 cannot be read" in shown
    assert sorted(str(file.relative_to(out)) for file in out.rglob("*.png")) == ["0.png", "deep/1.png", "deep/2.png"]
    with Image.open(out / "deep/1.png") as mask, Image.open(overlays / "deep/1.jpg") as overlay:
        assert mask.size == (48, 36) and mask.mode == "P" and set(np.unique(np.asarray(mask))) <= {0, 1, 2, 7}
        assert overlay.width == 20 * 21, "the image at the scale of the window, enlarged, with a legend below"
    (folder / "3.png").unlink()
    found = predict.evaluate(load(segmenter, data=str(folder)))
    assert found.measures["pixel_accuracy"] == 1.0
    with pytest.raises(UserError, match="there are files already"):
        predict.predict(*_predictor(segmenter), str(folder), out)


def _predictor(run: Path, options: Options = Options()) -> tuple[Trained, Predictor[Any]]:  # noqa: B008
    model = load(run)
    return model, predict.predictor(model, options)


# Objects


def test_a_detector_measures_what_its_run_did_without_its_training_images(
    detector: Path, coco: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "run"
    shutil.copytree(detector, moved)
    text = (moved / "config.yaml").read_text()
    (moved / "config.yaml").write_text(text.replace(f"path: {coco}", "path: /nowhere"))
    out = tmp_path / "report.json"
    annotations = f"detect.val_annotations={coco / 'instances.json'}"
    verb("evaluate", moved, annotations, "--data", coco / "images", "--out", out)
    report, last = json.loads(out.read_text()), lines(detector / "epochs.jsonl")[-1]
    assert report["box_ap"] == last["box_ap"] and report["mask_ap"] == last["mask_ap"] and report["images"] == 4
    assert report["of_classes"] == "box_ap" and list(report["classes"]) == ["square", "disc"]
    with pytest.raises(DataError, match=r"needs detect\.val_annotations"):
        predict.evaluate(load(moved, data=str(coco / "images")))
    tree = json.loads((coco / "instances.json").read_text())
    tree["categories"][1]["name"] = "circle"
    (tmp_path / "other.json").write_text(json.dumps(tree))
    said = r"other categories than the detector: circle \(30\); legal are square \(7\), disc \(30\)"
    with pytest.raises(DataError, match=said):
        overrides = [f"detect.val_annotations={tmp_path / 'other.json'}"]
        predict.evaluate(load(moved, False, overrides, str(coco / "images")))


def test_objects_are_in_cocos_format(detector: Path, coco: Path, tmp_path: Path) -> None:
    """pycocotools reads them; images that cannot be read are left out and said."""
    folder = tmp_path / "images"
    shutil.copytree(coco / "images", folder)
    (folder / "002.png").write_bytes(b"no image")
    out = tmp_path / "found.json"
    shown = verb("predict", detector, folder, "--out", out, "--overlays", tmp_path / "overlays")
    assert "a JSON file of 4 images, of which 1 cannot be read" in shown
    rows = json.loads(out.read_text())
    assert {row["image_id"] for row in rows} == {0, 1, 3}, "the numbers in the files' names"
    assert {row["category_id"] for row in rows} <= {7, 30} and all(row["file_name"].endswith(".png") for row in rows)
    assert {name.name for name in (tmp_path / "overlays").iterdir()} == {"000.jpg", "001.jpg", "003.jpg"}
    tools = pytest.importorskip("pycocotools.coco", reason="pycocotools is the oracle")
    tree = json.loads((coco / "instances.json").read_text())
    for number, image in enumerate(tree["images"]):
        image["id"] = number
    truth = tools.COCO()
    truth.dataset = tree | {"annotations": []}
    truth.createIndex()
    read = truth.loadRes(str(out))
    assert len(read.anns) == len(rows) and read.annToMask(read.anns[1]).shape == (64, 72)
    nothing = verb("predict", detector, coco / "images/000.png", "detect.score=0.99", "--out", out)
    assert "1 images" in nothing and json.loads(out.read_text()) == []


# Mistakes


def test_what_cannot_be_done_is_said(run: Path, images: Path, tmp_path: Path) -> None:  # noqa: F811
    with pytest.raises(CheckpointError, match="neither a run directory nor a checkpoint"):
        load(tmp_path)
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    with pytest.raises(CheckpointError, match="no checkpoint yet"):
        load(tmp_path)
    model = load(run, data=str(images / "held-out/a"))
    with pytest.raises(UserError, match="has no labels, which an evaluation needs"):
        predict.evaluate(model)
    with pytest.raises(UserError, match="does not exist"):
        predict.evaluate(load(run, data=str(tmp_path / "nowhere")))
    with pytest.raises(UserError, match="--overlays is not for a run of task=classify, which has --top"):
        predict.predictor(model, Options(overlays=tmp_path))
    with pytest.raises(UserError, match="cannot be written"):
        predict.predict(*_predictor(run), str(images / "held-out"), tmp_path / "nowhere/found.csv")


class _Archive:
    """A source of images inside of archives, with names that lead out of a folder."""

    name = "shards.tar"
    paths = ("shards.tar/../../etc/a.png", "shards.tar/x/a.png", "shards.tar/y/a.jpg")

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, i: int) -> str:
        return self.paths[i]


def test_a_folder_in_the_place_of_the_file_is_found_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError), whole_file(tmp_path):
        pytest.fail("the work begins")
    assert not list(tmp_path.iterdir())


def test_names_stay_in_their_folder_and_differ() -> None:
    names = Names(_Archive())  # type: ignore[arg-type]
    found = [names.of(i, ".png") for i in range(3)]
    assert len(set(found)) == 3 and not any(part in ("..", "") for name in found for part in name.split("/")), found
