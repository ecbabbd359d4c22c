"""The list of bad samples: each id once over all ranks and restarts, and an error if there are too many."""

from __future__ import annotations

import json
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch

from mimae.data.loading.batch import BadSample, BadSamples, Batch, DataError


def bad(i: int) -> BadSample:
    return BadSample(i, f"/images/{i}.jpg", "truncated")


def listed(path: Path) -> list[int]:
    return [json.loads(line)["id"] for line in path.read_text().splitlines()]


def test_each_bad_sample_is_listed_once(tmp_path: Path) -> None:
    """Samples are recorded by two ranks in turn, twice within a batch, and by a run that resumes."""
    path = tmp_path / "bad_samples.jsonl"
    one, other = (BadSamples(path, 100, 1.0) for _ in range(2))
    one.record([])
    assert not path.exists()
    one.record([bad(3), bad(3), bad(5)])
    other.record([bad(5), bad(7)])
    one.record([bad(7), bad(3)])
    BadSamples(path, 100, 1.0).record([bad(5), bad(1)])
    assert listed(path) == [3, 5, 7, 1]
    assert json.loads(path.read_text().splitlines()[0]) == {
        "id": 3,
        "path": "/images/3.jpg",
        "reason": "truncated",
    }


def test_names_that_are_no_utf8(tmp_path: Path) -> None:
    path = tmp_path / "bad_samples.jsonl"
    samples = BadSamples(path, 100, 1.0)
    samples.record([BadSample(0, "caf\udce9 写.jpg", "empty")])
    BadSamples(path, 100, 1.0).record([bad(0), bad(1)])
    assert listed(path) == [0, 1]
    assert "写" in path.read_text()


def _record_all(path: Path, first: int) -> None:
    samples = BadSamples(path, 1000, 1.0)
    for i in range(60):
        samples.record([bad((first + i) % 60)])


def test_ranks_that_write_at_once(tmp_path: Path) -> None:
    path = tmp_path / "bad_samples.jsonl"
    with ProcessPoolExecutor(3) as ranks:
        list(ranks.map(_record_all, [path] * 3, [0, 20, 40]))
    assert sorted(listed(path)) == list(range(60))


def test_run_stops_past_the_legal_share(tmp_path: Path) -> None:
    """The limit is 2 % of 200, which is 4, over all ranks. The fifth one raises an error, and is still listed."""
    path = tmp_path / "bad_samples.jsonl"
    one, other = (BadSamples(path, 200, 0.02) for _ in range(2))
    one.record([bad(1), bad(2)])
    other.record([bad(2), bad(3), bad(4)])
    with pytest.raises(DataError) as stop:
        one.record([bad(5)])
    text = str(stop.value)
    assert "5 of 200 samples cannot be read, more than data.max_bad_fraction = 0.02 allows" in text
    assert "/images/5.jpg: truncated" in text and str(path) in text
    assert listed(path) == [1, 2, 3, 4, 5]
    one.record([bad(1)])  # Nothing new, so no error.


def test_none_is_legal_with_a_share_of_0(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="1 of 10 samples"):
        BadSamples(tmp_path / "bad_samples.jsonl", 10, 0.0).record([bad(0)])


def test_batch_moves_whole() -> None:
    batch = Batch(
        torch.zeros(2, 4, 4, 3, dtype=torch.uint8), torch.tensor([1, 2]), torch.tensor([1, 9]), 3, 4, [bad(2)]
    )
    moved = batch.to("meta")
    assert {moved.images.device.type, moved.sample_ids.device.type, moved.source_ids.device.type} == {"meta"}
    assert (moved.epoch, moved.step, moved.bad) == (3, 4, [bad(2)])
