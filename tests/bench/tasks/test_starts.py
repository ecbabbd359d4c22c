"""`mimae bench starts`: it trains each start with each seed, resumes, keeps no paths; the documents have its tables."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mimae.bench.tasks.starts import Start, compare, table
from mimae.errors import UserError
from tests.train.test_classify import FIXED, images, recipe  # noqa: F401 (images is a fixture)

ROOT = Path(__file__).parents[3]
TABLES = {
    "classify-cifar.json": "classification.md",
    "linear-cifar.json": "classification.md",
    "segment-coco.json": "segmentation.md",
}
"""Files of this bench, and the pages with their tables."""


def test_each_start_is_trained_with_each_seed(
    images: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    kept = recipe(images, tmp_path, *FIXED, "schedule.max_steps=1", "schedule.batch_size=48").model_dump_json()
    (tmp_path / "small.yaml").write_text(kept)
    starts = [Start.of("a rate of 1: optimizer.learning_rate=1")]
    given = [
        "model.init=null",
        f"data.path={images / 'train'}",
        f"data.val_path={images / 'held-out'}",
        "optimizer.kind=lars",
    ]
    found = compare(str(tmp_path / "small.yaml"), given, starts, 2, tmp_path / "runs")
    assert found["overrides"] == ["optimizer.kind=lars"] and str(tmp_path) not in json.dumps(found)
    rows = found["starts"]["a rate of 1"]
    assert [(row["seed"], row["step"], row["top5"]) for row in rows] == [(0, 1, None), (1, 1, None)]
    assert rows[0]["val_loss"] != rows[1]["val_loss"]
    again = compare(str(tmp_path / "small.yaml"), given, starts, 2, tmp_path / "runs")
    assert again == found and "is finished: 1 of 1 steps" in capsys.readouterr().out


def test_a_table_has_means_and_deviations() -> None:
    rows = [{"seed": seed, "step": 9, "top1": top1, "top5": None} for seed, top1 in enumerate((0.25, 0.5, 0.75))]
    assert table({"starts": {"MAE": rows, "one": rows[:1]}}) == (
        "| start | top-1 |\n|---|---|\n| MAE | 0.500 ± 0.250 |\n| one | 0.250 |"
    )


def test_a_start_without_a_name_is_refused() -> None:
    with pytest.raises(UserError, match="legal is NAME: KEY=VALUE"):
        Start.of("model.init=runs/mae")


@pytest.mark.parametrize("file", TABLES)
def test_the_documents_have_the_tables_of_the_files(file: str) -> None:
    found = json.loads((ROOT / "bench/results" / file).read_text())
    assert table(found) in (ROOT / "docs" / TABLES[file]).read_text()
