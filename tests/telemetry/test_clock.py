"""Tests that phases and rates add up to the wall time, on the CPU and on an asynchronous device."""

from __future__ import annotations

import math
import time

import pytest
import torch

from mimae.telemetry.clock import Pace, Phases
from mimae.telemetry.records import EPOCH_KEYS, PHASES, STEP_KEYS


def test_phases_count_no_time_twice() -> None:
    phases = Phases(torch.device("cpu"))
    began = time.perf_counter()
    with phases("forward"):
        time.sleep(0.02)
        with phases("checkpoint"):
            time.sleep(0.05)
    with pytest.raises(ZeroDivisionError), phases("backward"):
        time.sleep(0.01)
        raise ZeroDivisionError
    with phases("data"):
        time.sleep(0.03)
    total = time.perf_counter() - began
    seconds = phases.seconds()
    assert set(seconds) == set(PHASES)
    assert seconds["checkpoint"] >= 0.05 and seconds["backward"] >= 0.01 and seconds["optimizer"] == 0
    assert 0.02 <= seconds["forward"] <= total - 0.09  # the nested phase of 0.05 s is not included
    assert sum(seconds.values()) == pytest.approx(total, abs=0.01)


def test_pace_measures_since_its_last_reading() -> None:
    phases = Phases(torch.device("cpu"))
    with phases("data"):
        time.sleep(0.05)  # before the pace is created: not counted
    pace = Pace(phases, num_masks=4)
    with phases("data"):
        time.sleep(0.06)
    time.sleep(0.02)
    first = pace.epoch(8)
    assert 0.08 <= first["seconds"] < 0.5
    assert first["images"] == 8 and first["images_per_s"] == pytest.approx(8 / first["seconds"], rel=0.02)
    assert first["views_per_s"] == 4 * first["images_per_s"]
    assert first["data_wait"] == pytest.approx(first["seconds_data"] / first["seconds"], rel=0.02)
    time.sleep(0.01)
    second = pace.epoch(8)
    assert second["seconds_data"] == 0 and second["data_wait"] == 0 and second["seconds"] < 0.06
    assert set(first) <= set(EPOCH_KEYS) and set(pace.rates(8)) <= set(STEP_KEYS)


class FakeDevice:
    """Asynchronous device that executes its queue in order, and its events; `now` is the host's time."""

    def __init__(self) -> None:
        self.now = self.free = 0.0

    def give(self, seconds: float) -> None:
        self.free = max(self.free, self.now) + seconds

    def Event(self, enable_timing: bool) -> FakeEvent:
        return FakeEvent(self)


class FakeEvent:
    def __init__(self, device: FakeDevice) -> None:
        self.device, self.at = device, math.inf

    def record(self) -> None:
        self.device.give(0.0)
        self.at = self.device.free

    def query(self) -> bool:
        return self.at <= self.device.now

    def synchronize(self) -> None:
        self.device.now = max(self.device.now, self.at)

    def elapsed_time(self, end: FakeEvent) -> float:
        return 1000 * (end.at - self.at)


def test_waiting_for_data_on_cuda_is_the_time_without_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Count a host's wait only where it lasts longer than the queued work of the device."""
    device = FakeDevice()
    monkeypatch.setattr(torch.cuda, "Event", device.Event)
    phases = Phases(torch.device("cuda"))
    for host_waits in (4.0, 9.0, 13.0):  # the device needs 10 s for a step, which is queued in 1 s
        with phases("forward"):
            device.give(10.0)
            device.now += 1.0
        with phases("data"):
            device.now += host_waits
    # Steps end at 10, 20 and 30 s. The host queues the next at 5, 15 and 29 s, so the device is never idle.
    assert phases.data_seconds == 0.0
    device.now = 50.0
    for _ in range(2):
        with phases("data"):
            device.now += 2.0
        with phases("forward"):
            device.give(1.0)
    # The device is idle for 2 s; then for 1 s, because it still worked during the first of the 2 s.
    assert phases.data_seconds == 3.0 and phases.seconds()["data"] == 3.0
    assert phases.seconds()["forward"] == 32.0


def test_reading_the_waits_on_cuda_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    device = FakeDevice()
    monkeypatch.setattr(torch.cuda, "Event", device.Event)
    phases = Phases(torch.device("cuda"))
    with phases("data"):
        device.now += 2.0
    with phases("forward"):
        device.give(10.0)
    assert (phases.data_seconds, device.now) == (2.0, 2.0)
    with phases("checkpoint"):
        assert phases.seconds()["forward"] == 10.0  # This call synchronizes.
    assert device.now == 12.0


@pytest.mark.gpu
def test_waiting_for_data_on_a_gpu() -> None:
    """Wait 0.2 s during longer work of the GPU, then 0.2 s while the GPU is idle."""
    phases = Phases(torch.device("cuda"))
    a = torch.randn(8192, 8192, device="cuda")
    (a @ a).sum().item()
    for _ in range(100):
        torch.mm(a, a)
    busy = torch.cuda.Event()
    busy.record()
    with phases("data"):
        time.sleep(0.2)
    assert not busy.query(), "the work was too short for this test"
    torch.mm(a, a)
    assert phases.seconds()["data"] < 0.02
    torch.cuda.synchronize()
    with phases("data"):
        time.sleep(0.2)
    assert phases.seconds()["data"] == pytest.approx(0.2, abs=0.03)


@pytest.mark.gpu
def test_phases_on_cuda_time_the_device_without_waiting_for_it() -> None:
    phases = Phases(torch.device("cuda"))
    a = torch.randn(8192, 8192, device="cuda")
    (a @ a).sum().item()
    began = time.perf_counter()
    with phases("forward"):
        for _ in range(40):
            torch.mm(a, a)
        with phases("backward"):
            torch.mm(a, a)
    launched = time.perf_counter() - began
    seconds = phases.seconds()
    worked = time.perf_counter() - began
    assert launched < 0.5 * worked
    assert seconds["forward"] + seconds["backward"] == pytest.approx(worked, rel=0.1)
    assert seconds["forward"] == pytest.approx(40 * seconds["backward"], rel=0.3)
    for _ in range(1000):
        with phases("optimizer"):
            pass
    torch.cuda.synchronize()
    with phases("optimizer"):
        pass
    assert len(phases._pending) <= 1  # the events of an epoch do not accumulate
    assert phases.seconds()["optimizer"] < 0.1
