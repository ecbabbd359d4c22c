"""Waiting for data: when it is reported, and the cause that the measurements indicate."""

from __future__ import annotations

from typing import Any

import pytest

from mimae.data.loading.batch import Spent
from mimae.data.loading.stalls import Feed, Stalls, diagnose
from mimae.data.settings import DataSettings

# 100 s on 8 cores with 8 workers that are always busy, mostly decoding; the device waited for 10 s.
FEED = Feed(100.0, 10.0, 10.0, Spent(50.0, 600.0, 150.0), workers=8, cores=8, loader="torch", cache=None)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, ["10.0% of the time", "the 8 cores are all in use (decoding is 75% of the work", "data.cache=decoded"]),
        ({"cache": "decoded"}, ["the 8 cores are all in use", "data.loader=dali_gpu"]),
        ({"spent": Spent(50.0, 150.0, 600.0)}, ["all in use", "resizing 75%", "data pack --shortest"]),
        (
            {"waited": 1.0},
            ["the copies to the device are slow", "late for 1.0 s", "data.loader=dali_gpu"],
        ),
        ({"workers": 0, "spent": Spent(1, 8, 1)}, ["the training process makes the batches itself", "here 8"]),
        ({"spent": Spent()}, ["does not report", "8 workers on 8 cores", "data.workers"]),
        ({"spent": Spent(600, 150, 50)}, ["storage is slow (75% of", "set data.cache=encoded", "data.shuffle=blocks"]),
        ({"spent": Spent(600, 150, 50), "cache": "encoded"}, ["storage is slow", "read from the cache"]),
        ({"workers": 4, "spent": Spent(20, 300, 70)}, ["too few workers (4, busy 98%", "8 cores", "data.workers=8"]),
        ({"workers": 16, "spent": Spent(100, 1200, 200)}, ["too few cores (16 workers share 8)", "--cpus-per-task"]),
        ({"spent": Spent(10, 160, 30)}, ["busy only 25%", "first batches of an epoch", "schedule.accumulate"]),
        ({"spent": Spent(80, 0, 0), "loader": "dali_gpu"}, ["decoding on the device is slow", "data.loader=dali_cpu"]),
        ({"spent": Spent(700, 0, 0), "loader": "dali_gpu"}, ["storage is slow (100% of"]),
    ],
)
def test_the_cause_and_what_to_change(changes: dict[str, Any], expected: list[str]) -> None:
    line = diagnose(FEED._replace(**changes)).what
    assert "\n" not in line
    assert all(text in line for text in expected), line


def test_what_is_done_already_is_not_advised() -> None:
    assert "decoded" not in diagnose(FEED._replace(cache="decoded")).what
    assert "data.cache" not in diagnose(FEED._replace(spent=Spent(600, 150, 50), cache="encoded")).what


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr("mimae.data.loading.stalls.time.perf_counter", lambda: now[0])
    monkeypatch.setattr("mimae.data.loading.stalls.default_workers", lambda: 2)
    return now


def test_two_per_cent_of_what_is_no_warm_up(clock: list[float]) -> None:
    """The first reading and excluded readings are ignored. Then each epoch is judged separately, once."""
    stalls = Stalls(DataSettings())
    clock[0] += 150
    stalls.read(150.0, 150.0)  # waited all the time: workers started
    assert stalls.verdict() is None
    clock[0] += 5000
    stalls.made(Spent(50.0, 7500.0, 2000.0))
    stalls.read(250.0, 250.0)
    clock[0] += 500
    stalls.read(750.0, 750.0, counts=False)
    assert stalls.verdict() is None  # 100 of 5000 s
    for _ in range(2):
        clock[0] += 2500
        stalls.made(Spent(50.0, 4000.0, 750.0))
        stalls.read(750.0 + (clock[0] - 6650) * 0.03, 1150.0)
    found = stalls.verdict()
    assert found is not None and found.waited == 0.03 and "3.0% of the time" in found.what
    assert "the 2 cores are all in use (decoding is 83% of the work, resizing 16%)" in found.what
    assert stalls.verdict() is None


def test_a_run_of_minutes_is_told_nothing_and_many_short_epochs_are_judged_together(clock: list[float]) -> None:
    """Readings are taken after the first step and at the end of each epoch, with more prefetched batches than time.

    No setting can save more than the seconds that were lost, so below a minute of them nothing is reported.
    """
    stalls = Stalls(DataSettings(workers=1))
    stalls.read(5.0, 5.0)
    found = []
    for epoch in range(1, 7):
        clock[0] += 60
        stalls.made(Spent(6.0, 84.0, 18.0))
        stalls.read(5.0 + 12 * epoch, 5.0 + 12 * epoch)
        found.append(stalls.verdict())
    assert found[:4] == [None] * 4, "48 of 240 s"
    assert found[4] is not None and found[4].waited == 0.2 and "20.0% of the time" in found[4].what
    assert "too few workers (1, busy 100% of the time, on 2 cores)" in found[4].what
    assert found[5] is None, "counted anew"
