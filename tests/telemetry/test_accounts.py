"""Tests of an epoch's account over ranks: stragglers and their causes, GPUs with a fake NVML, workers' memory."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mimae import distributed
from mimae.config.load import load_recipe
from mimae.telemetry.accounts import Stragglers, over_ranks, workers_bytes
from mimae.telemetry.nvml import COLUMNS, GPUReadings
from mimae.telemetry.records import ACCOUNT_KEYS
from mimae.train.tasks.pretrain import Pretrain, pretrain
from mimae.train.trainer import Trainer
from tests.rank_processes import run_ranks


def account(exposed: float | None, data: float = 1.0, **more: float) -> dict[str, float | None]:
    return {"seconds": 100.0, "seconds_data": data, "exposed_communication": exposed, **more}


def test_columns_are_over_all_ranks() -> None:
    everyone = [account(0.3, 1.0), account(0.1, 2.0, gpu_clock_mhz=900.0), account(0.35, 6.0, gpu_clock_mhz=1800.0)]
    record = over_ranks(everyone)
    assert set(record) <= set(ACCOUNT_KEYS)
    assert [record[f"seconds_data_{kind}"] for kind in ("least", "mean", "most")] == [1.0, 3.0, 6.0]
    assert record["gpu_clock_mhz"] == 900.0 and record["gpu_power_watts"] is None
    assert record["straggler"] == 1 and record["straggler_lag"] == pytest.approx(0.225)
    alone = over_ranks([account(None)])
    assert alone["straggler"] is None and alone["seconds_data_least"] == alone["seconds_data_most"] == 1.0


@pytest.mark.parametrize(
    ("slow", "cause"),
    [
        (account(0.05), "it computes slower"),
        (account(0.05, data=20.0), "it waits for its data"),
        (account(0.05, gpu_throttled=0.5, gpu_celsius=91.0), "its GPU lowers its clock, at 91 degrees"),
    ],
)
def test_a_straggler_is_named_once_with_its_cause(slow: dict[str, float | None], cause: str) -> None:
    told = Stragglers()
    everyone = [account(0.3), account(0.28), slow, account(0.33)]
    sentence = told.verdict(everyone)
    assert sentence is not None and sentence.startswith(
        "rank 2 is a straggler, and the others wait for it 25% of a step"
    )
    assert cause in sentence
    assert told.verdict(everyone) is None, "the same rank again"
    assert told.verdict([account(0.3), account(0.29), account(0.3)]) is None
    assert told.verdict(everyone) == sentence


def test_ranks_that_differ_little_have_no_straggler() -> None:
    assert Stragglers().verdict([account(0.3), account(0.22)]) is None
    assert Stragglers().verdict([account(0.3), account(None)]) is None


class FakeNVML:
    """Fake of the used functions of pynvml, for one GPU that is throttled when it is hot."""

    NVML_CLOCK_SM, NVML_TEMPERATURE_GPU = 1, 0
    nvmlClocksThrottleReasonSwPowerCap, nvmlClocksThrottleReasonHwThermalSlowdown = 4, 64

    def __init__(self) -> None:
        self.hot = False

    def nvmlInit(self) -> None: ...

    def nvmlDeviceGetHandleByUUID(self, uuid: bytes) -> str:
        assert uuid == b"GPU-1234"
        return "handle"

    def nvmlDeviceGetPowerUsage(self, gpu: str) -> int:
        return 400_000 if self.hot else 600_000

    def nvmlDeviceGetClockInfo(self, gpu: str, kind: int) -> int:
        return 1000 if self.hot else 1800

    def nvmlDeviceGetTemperature(self, gpu: str, kind: int) -> int:
        return 90 if self.hot else 60

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, gpu: str) -> int:
        return 64 if self.hot else 1  # 1 means idle, which is no throttling


def test_a_gpu_is_read_through_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeNVML()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1234"))
    readings = GPUReadings(torch.device("cuda", 0))
    readings.read()
    fake.hot = True
    readings.read()
    assert readings.take() == {
        "gpu_power_watts": 500.0,
        "gpu_clock_mhz": 1400.0,
        "gpu_celsius": 75.0,
        "gpu_throttled": 0.5,
    }
    assert readings.take() == dict.fromkeys(COLUMNS)


def test_a_run_needs_no_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("NVML: Insufficient Permissions")

    for module in (None, SimpleNamespace(nvmlInit=broken)):
        monkeypatch.setitem(sys.modules, "pynvml", module)
        readings = GPUReadings(torch.device("cuda", 0))
        readings.read()
        assert readings.take() == dict.fromkeys(COLUMNS)
    fake = FakeNVML()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1234"))
    readings = GPUReadings(torch.device("cuda", 0))
    monkeypatch.setattr(fake, "nvmlDeviceGetPowerUsage", broken)  # as for a lost GPU
    readings.read()
    assert readings.take() == dict.fromkeys(COLUMNS)


def test_the_memory_of_children_is_counted(tmp_path: Path) -> None:
    assert workers_bytes(tmp_path / "no/proc") is None
    code = "import sys; block = b'x' * 50_000_000; print('ready', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stdout.readline() == b"ready\n"
        found = workers_bytes()
        assert found is not None and found > 50_000_000
        child.communicate()


def _train(images: str, run: str, slow: str) -> int:
    """Train a few steps, with rank 1 slow in computing or in its data."""
    plain: dict[str, Any] = {"compute": Pretrain.inputs, "data": Trainer.take}

    def late(part: str) -> Any:
        def call(*arguments: Any) -> Any:
            if part == "compute" and distributed.rank() == 1:
                time.sleep(0.5)
            return plain[part](*arguments)

        return call

    def take(trainer: Any) -> Any:
        with trainer.phases("data"):
            time.sleep(0.5 * distributed.rank())
        return plain["data"](trainer)

    if slow == "compute":
        Pretrain.inputs = late("compute")  # type: ignore[method-assign]
    else:
        Trainer.take = take  # type: ignore[method-assign, assignment]
    tree = {
        "run": {"dir": run},
        "data": {"path": "photos", "image_size": 32, "workers": 0, "loader": "torch"},
        "schedule": {"batch_size": 8, "max_steps": 10},
        "telemetry": {"trackers": ["tensorboard"], "images_every_epochs": 0},
    }
    return pretrain(load_recipe("quickstart", [], tree).recipe).step


@pytest.mark.slow  # two ranks for each
@pytest.mark.parametrize(("slow", "cause"), [("compute", "it computes slower"), ("data", "it waits for its data")])
def test_a_rank_that_is_slow_on_purpose_is_named(tmp_path: Path, slow: str, cause: str) -> None:
    run = tmp_path / "run"
    assert run_ranks(2, tmp_path, _train, "", str(run), slow) == [10, 10]
    (epoch,) = [json.loads(line) for line in (run / "epochs.jsonl").read_text().splitlines()]
    assert epoch["straggler"] == 1
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    (told,) = [event["details"]["what"] for event in events if event["kind"] == "warning"]
    assert told.startswith("rank 1 is a straggler") and cause in told
