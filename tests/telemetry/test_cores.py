"""Tests of the shares of time in which a process had no core, read from files in Linux's format."""

from __future__ import annotations

from pathlib import Path

import pytest

from mimae.telemetry import cores
from mimae.telemetry.cores import CoreReadings, cause


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return a list whose only entry is the clock's time in seconds, which a test may change."""
    seconds = [100.0]
    monkeypatch.setattr(cores.time, "monotonic", lambda: seconds[0])
    return seconds


def write(root: Path, path: str, text: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)


@pytest.mark.parametrize(
    ("group", "stat"),
    [
        ("0::/job_7/step_0\n", "sys/fs/cgroup/job_7/step_0/cpu.stat"),
        ("5:memory:/x\n3:cpu,cpuacct:/docker/a\n0::/\n", "sys/fs/cgroup/cpu,cpuacct/docker/a/cpu.stat"),
        ("0::/outside\n", "sys/fs/cgroup/cpu.stat"),  # A container sees its own group at the root.
    ],
    ids=["version 2", "version 1", "in a container"],
)
def test_shares_are_of_the_time_since_the_last_reading(tmp_path: Path, now: list[float], group: str, stat: str) -> None:
    write(tmp_path, "proc/self/cgroup", group)
    write(tmp_path, "proc/self/schedstat", "900 1000000000 5\n")
    write(tmp_path, stat, "usage_usec 5\nnr_periods 1000\nnr_throttled 10\n")
    for core, spent in ((0, 5000), (1, 0)):
        write(tmp_path, f"sys/devices/system/cpu/cpu{core}/thermal_throttle/core_throttle_total_time_ms", f"{spent}\n")
    readings = CoreReadings(tmp_path)
    now[0] += 20
    write(tmp_path, "proc/self/schedstat", "900 6000000000 5\n")
    write(tmp_path, stat, "usage_usec 5\nnr_periods 1200\nnr_throttled 90\n")
    write(tmp_path, "sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_total_time_ms", "13000\n")
    assert readings.take() == {"cpu_waiting": 0.25, "cpu_limited": 0.4, "cpu_hot": 0.4}
    now[0] += 20
    assert readings.take() == {"cpu_waiting": 0, "cpu_limited": None, "cpu_hot": 0}  # No period has passed.


def test_a_system_that_counts_nothing_has_no_shares(tmp_path: Path, now: list[float]) -> None:
    write(tmp_path, "proc/self/schedstat", "not numbers\n")
    readings = CoreReadings(tmp_path)
    now[0] += 1
    assert set(readings.take().values()) == {None}


def test_this_system_counts_a_wait_that_is_a_share() -> None:
    readings = CoreReadings()
    found = readings.take()
    assert set(found) == set(cores.COLUMNS) and all(value is None or 0 <= value <= 1 for value in found.values())


@pytest.mark.parametrize(
    ("shares", "told"),
    [
        ({"cpu_limited": 0.4, "cpu_waiting": 0.9}, "in 40% of the time the limit of its control group held it back"),
        ({"cpu_limited": 0.0, "cpu_hot": 0.2}, "in 20% of the time a core was hot"),
        ({"cpu_waiting": 0.3, "cpu_hot": None}, "in 30% of the time the training process was ready and had no core"),
        ({"cpu_waiting": 0.05}, None),
        ({}, None),
    ],
)
def test_the_cause_in_words(shares: dict[str, float | None], told: str | None) -> None:
    found = cause(shares)
    assert found is None if told is None else (found or "").startswith(told)
