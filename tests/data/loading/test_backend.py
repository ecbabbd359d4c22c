"""Which loaders can run, the error if one cannot, and the choice of `auto`."""

from __future__ import annotations

import builtins
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mimae.data.loading import backend as backends
from mimae.data.loading.backend import OBSTACLES, fastest, make_backend
from mimae.data.loading.batch import DataError
from mimae.data.loading.order import BatchRequest
from mimae.data.settings import DataSettings
from mimae.data.sources.base import Source
from mimae.data.sources.open import open_source
from tests.data.conftest import encoded, photograph


@pytest.fixture
def images(tmp_path: Path) -> str:
    for i in range(6):
        (tmp_path / f"{i}.jpg").write_bytes(encoded(photograph(i, 40, 60), "JPEG"))
    return str(tmp_path)


@pytest.fixture
def no_dali(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def refuse(name: str, *given: Any, **more: Any) -> Any:
        if name.startswith("nvidia.dali"):
            raise ModuleNotFoundError("No module named 'nvidia.dali'")
        return original(name, *given, **more)

    monkeypatch.setattr(builtins, "__import__", refuse)


def test_a_loader_that_cannot_run_says_why_and_what_to_do(images: str, no_dali: None) -> None:
    for name in ("dali_cpu", "dali_gpu"):
        settings = DataSettings(image_size=8, workers=0, loader=name)
        remedy = r"pip install 'mimae\[dali\]'" if name == "dali_cpu" or torch.cuda.is_available() else "no CUDA device"
        with pytest.raises(DataError, match=f"data.loader={name} cannot run here: .*{remedy}"):
            make_backend(settings, open_source(images), 0)


def test_where_one_can_run_nothing_is_measured(images: str, no_dali: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_rate", None)
    assert fastest(DataSettings(), open_source(images), 0, 4) == ("torch", {}, {})


def test_the_fastest_by_its_rate(images: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first measurement is real. In the second one a loader sleeps for each batch, so the other one is chosen."""
    monkeypatch.setattr(backends, "SECONDS", 0.2)
    settings, source = DataSettings(image_size=8, workers=0), open_source(images)
    can_run = {name for name, obstacle in OBSTACLES.items() if obstacle(backends._device()) is None}
    choice = fastest(settings, source, 0, 4)
    assert choice.rates.keys() == can_run and min(choice.rates.values()) > 0
    assert choice.rates[choice.loader] == max(choice.rates.values())

    for slow in can_run:
        rate = backends._rate
        monkeypatch.setattr(
            backends, "_rate", lambda settings, *given, slow=slow: 1.0 if settings.loader == slow else 2.0
        )
        assert fastest(settings, source, 0, 4).loader != slow
        monkeypatch.setattr(backends, "_rate", rate)


def test_loaders_are_measured_on_images_that_a_huge_source_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last id, 2^24 + 3, is no float32."""
    asked = set[int]()

    class Recorder:
        def batches(self, jobs: Iterable[BatchRequest]) -> Iterator[Any]:
            for job in jobs:
                asked.update(job.ids.tolist())
                yield SimpleNamespace(sample_ids=job.ids)

        def close(self) -> None:
            pass

    monkeypatch.setattr(backends, "SECONDS", 0.0)
    monkeypatch.setattr(backends, "make_backend", lambda *given: Recorder())
    huge: Any = range(2**24 + 4)  # it is asked for its length alone
    backends._rate(DataSettings(workers=0), huge, 0, 64)
    assert len(asked) == backends.IMAGES and min(asked) == 0 and max(asked) == len(huge) - 1


class SlowAtFirst:
    """A source on storage that is slow for samples that were not read before."""

    def __init__(self, source: Source) -> None:
        self._source, self._known = source, set[int]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def __len__(self) -> int:
        return len(self._source)

    def read(self, i: int) -> bytes:
        if i not in self._known:
            time.sleep(0.1)
        self._known.add(i)
        return self._source.read(i)


def test_no_loader_is_measured_on_a_cold_cache(images: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first batch has two of six images: the first reads of the others would take 0.4 s of the 0.3 s measured."""
    monkeypatch.setattr(backends, "SECONDS", 0.3)
    source = SlowAtFirst(open_source(images))
    assert backends._rate(DataSettings(image_size=8, workers=0, loader="torch"), source, 0, 2) > 60


def test_a_loader_that_fails_is_left_out_and_told(images: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loader fails, as with a driver that is too old for DALI. If all fail, the error of the first one is raised."""
    source, runs = open_source(images), {"torch"}

    def rate(settings: DataSettings, *given: Any) -> float:
        if settings.loader in runs:
            return 1.0
        raise DataError(f"{settings.loader} fails")

    monkeypatch.setattr(backends, "_rate", rate)
    monkeypatch.setattr(backends, "OBSTACLES", dict.fromkeys(("torch", "dali_cpu"), lambda device: None))
    assert fastest(DataSettings(), source, 0, 4) == ("torch", {"torch": 1.0}, {"dali_cpu": "dali_cpu fails"})
    runs.clear()
    with pytest.raises(DataError, match="torch fails"):
        fastest(DataSettings(), source, 0, 4)
