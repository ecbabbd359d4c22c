"""Tests of a resumed run's data: at another path, from another folder, and by the rules of its version."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mimae.config.kept import load_run
from mimae.config.load import load_recipe
from mimae.config.recipe import FREE_KEYS, Recipe, TransferRecipe, flat
from mimae.data.loading.batch import DataError
from mimae.errors import UserError
from mimae.train.run_data import as_kept
from mimae.train.tasks.pretrain import Pretrain, pretrain
from mimae.transfer.load import load_encoder
from tests.data.conftest import write_images

TINY: dict[str, Any] = {
    "precision": "fp32",
    "data": {"image_size": 8, "workers": 0, "loader": "torch"},
    "model": {"size": "tiny", "patch_size": 4, "width": 12, "depth": 1, "heads": 2, "attention": "sdpa"},
    "decoder": {"width": 8, "depth": 1, "heads": 2},
    "masking": {"num_masks": 2, "ratio": 0.5},
    "schedule": {"batch_size": 2, "epochs": 2, "warmup_epochs": 0},
    "telemetry": {"probe_every_epochs": 0, "images_every_epochs": 0, "tensorboard": False},
    "checkpoint": {"background": False},
}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    write_images(tmp_path / "here/images", ["a/1.png", "a/2.png", "b/3.png", "b/4.png"], 8, 8)
    return tmp_path / "here"


def tiny(*overrides: str) -> Recipe:
    return load_recipe(TINY, ["run.dir=run", *overrides]).recipe


def test_a_run_goes_on_where_its_images_have_moved(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Resume with another path, since a node's scratch path may contain the job number.

    Other images are refused, and both paths are reported.
    """
    pretrain(tiny("data.path=images", "run.dry=true"))
    shutil.copytree(here / "images", here.parent / "job 2")
    (here / "images").rename(here / "other")
    (here / "other/a/1.png").rename(here / "other/a/5.png")
    with pytest.raises(UserError, match=rf"{here}/other does not hold the images .*, which were at {here}/images"):
        pretrain(tiny("data.path=other"))
    assert pretrain(tiny(f"data.path={here.parent}/job 2")).finished
    said = capsys.readouterr().out
    assert f"the images are at {here.parent}/job 2, and were at {here}/images, the same by name and class" in said
    assert load_run(Path("run")).data.path == f"{here.parent}/job 2"


def test_a_relative_path_is_kept_for_every_folder(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretrain(tiny("data.path=images", "data.val_path=./images", "run.dry=true"))
    kept = load_run(Path("run")).data
    assert (kept.path, kept.val_path) == (f"{here}/images", f"{here}/images")
    run = str(here / "run")
    monkeypatch.chdir("/")
    assert pretrain(load_recipe(f"{run}/config.yaml", [f"run.dir={run}", "run.dry=false"]).recipe).finished


@pytest.mark.parametrize(
    ("task", "keys"),
    [
        ("segment", ["segment.masks", "segment.val_masks"]),
        ("detect", ["detect.annotations", "detect.val_annotations", "detect.panoptic", "detect.val_panoptic"]),
    ],
)
def test_relative_paths_of_labels_are_kept_for_every_folder(here: Path, task: str, keys: list[str]) -> None:
    asked = load_recipe({"task": task}, [f"{key}=labels" for key in keys], None, TransferRecipe).recipe
    kept = flat(as_kept(asked))
    assert [kept[key] for key in keys] == [f"{here}/labels"] * len(keys)
    assert set(keys) <= set(FREE_KEYS), "a run goes on where its labels have moved"


@pytest.mark.parametrize("written", [True, False])
def test_a_run_keeps_the_numbering_that_it_was_started_with(
    here: Path, written: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Keep the run's rules: by newer rules, the folder has one image more, which would change the batches."""
    (here / "images/a/1.jpe").write_bytes((here / "images/a/1.png").read_bytes())
    pretrain(tiny("data.path=images", "data.index_version=1", "run.dry=true"))
    file = here / "run/config.yaml"
    if not written:  # Runs of early versions have no entry.
        file.write_text(re.sub(r".*index_version.*\n", "", file.read_text()))
    assert as_kept(tiny("data.path=images")).data.index_version == 1
    assert pretrain(tiny("data.path=images")).finished
    assert capsys.readouterr().out.count("4 images of") == 2
    assert "index_version: 1" in file.read_text()
    pretrain(tiny("data.path=images", "run.dir=new", "run.dry=true"))
    assert "5 images of" in capsys.readouterr().out


def test_a_run_that_is_older_than_a_key_goes_on_as_it_was_started(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Resume with a shipped recipe that sets a key which did not exist when the run was started.

    The original command resumes the run repeatedly, and no weight changes. A run that has the key refuses another
    value.
    """
    later = {
        "masking.rounding": "down",
        "model.patch_bias": "uniform",
        "optimizer.decay_tokens": "true",
        "schedule.warmup_from_zero": "true",
    }
    asked = ["data.path=images", "schedule.warmup_epochs=1", *(f"{key}={value}" for key, value in later.items())]
    assert pretrain(tiny(*asked[:2], "run.dir=whole")).finished
    pretrain(tiny(*asked[:2], "run.dry=true"))
    with pytest.raises(UserError, match=r"optimizer\.decay_tokens: False in the run, True now"):
        pretrain(tiny(*asked))
    file = here / "run/config.yaml"
    names = tuple(f"  {key.partition('.')[2]}:" for key in later)
    file.write_text("".join(line for line in file.read_text().splitlines(keepends=True) if not line.startswith(names)))
    for dry in ("true", "false"):
        capsys.readouterr()
        pretrain(tiny(*asked, f"run.dry={dry}"))
        said = capsys.readouterr().out
        assert "run is older than some keys of its recipe and continues as it was started, with " in said
        assert "optimizer.decay_tokens=false (not true)" in said and "masking.rounding=nearest (not down)" in said
        assert not [name for name in names if f"\n{name}" in file.read_text()]
    weights, wanted = (load_encoder(run).state_dict() for run in ("run", "whole"))
    assert [name for name in wanted if not torch.equal(weights[name], wanted[name])] == []
    assert pretrain(tiny(*asked[:2])).finished, "with the older recipe as well"
    assert pretrain(tiny(*asked)).finished


def test_what_was_left_out_is_told_at_the_start(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "images/a/notes.txt").touch()
    pretrain(tiny("data.path=images", "run.dry=true"))
    assert "left out, since their extensions are not those of images: 1 .txt" in capsys.readouterr().out


def test_held_out_images_are_those_of_their_split(here: Path) -> None:
    for split in ("train", "validation"):
        shutil.copytree(here / "images", here / "both" / split)
    shutil.rmtree(here / "both/validation/b")
    task = Pretrain(tiny("data.path=both", "data.val_path=both"))
    source, held_out = task.source, task.validation
    assert held_out is not None and (len(source), len(held_out)) == (4, 2)
    assert "/validation/" in held_out.path(0) and "/train/" in source.path(0)


def test_a_path_that_is_gone_is_a_mistake(here: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        pretrain(tiny("data.path=gone"))
