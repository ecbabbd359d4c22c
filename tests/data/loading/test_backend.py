"""Which loaders can run, the error if one cannot, and the choice of `auto`."""

from __future__ import annotations

import builtins
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mimae.data.loading import backend as backends
from mimae.data.loading.backend import Rate, cheapest, choose, make_backend
from mimae.data.loading.batch import DataError
from mimae.data.loading.examples import make_examples
from mimae.data.loading.loader import make_loader
from mimae.data.loading.order import BatchRequest
from mimae.data.loading.readers import Augmented, Central
from mimae.data.pixels import jpeg
from mimae.data.pixels.rand_augment import RandAugment
from mimae.data.settings import DataSettings
from mimae.data.sources.base import Source
from mimae.data.sources.open import open_source
from tests.data.conftest import encoded, photograph

LONG: dict[str, Any] = {"images": 1_000_000, "needed": 0.0}
"""A run on the CPU that is worth a measurement."""


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


def test_scaled_decoding_needs_libjpeg_turbo_and_the_loader_that_uses_it(images: str) -> None:
    settings = DataSettings(path=images, image_size=8, workers=0, decode="scaled")
    source = open_source(images)
    with pytest.raises(DataError, match=r"data.loader=dali_cpu cannot run here: .*set data.loader=torch"):
        make_backend(settings.model_copy(update={"loader": "dali_cpu"}), source, 0)
    attempts: list[Callable[[], object]] = [
        lambda: make_loader(settings, source, seed=0, batch_size=2),
        lambda: Augmented(settings, 0, RandAugment(0, 0.0, settings.mean, (8, 8))),
        lambda: choose(settings.model_copy(update={"loader": "auto"}), source, 0, 4, **LONG),
    ]
    with jpeg.unused():
        for attempt in attempts:
            with pytest.raises(DataError, match=r"data.decode=scaled is not possible .* set data.decode=exact"):
                attempt()
        make_loader(settings, source, seed=0, batch_size=2, reader=Central(settings, 1.0)).close()  # It has all pixels.
    with pytest.raises(ValueError, match="legal is one of them"):
        DataSettings(decode="scaled", cache="decoded")


@pytest.mark.skipif(jpeg.obstacle() is not None, reason=str(jpeg.obstacle()))
def test_scaled_decoding_reaches_the_batches(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(encoded(photograph(0, 400, 600), "JPEG"))
    request = BatchRequest(0, 0, np.zeros(1, np.int64))
    batches: dict[tuple[str, bool], torch.Tensor] = {}
    for decode in ("exact", "scaled"):
        settings = DataSettings(path=str(tmp_path), image_size=16, workers=0, loader="torch", decode=decode)
        source = open_source(str(tmp_path))
        (batch,) = make_backend(settings, source, 0).batches([request])
        augmented = make_examples(
            settings, source, 0, request, Augmented(settings, 0, RandAugment(0, 0.0, settings.mean, (16, 16)))
        )
        batches[decode, False], batches[decode, True] = batch.images, augmented.images
    for each in (False, True):
        assert not torch.equal(batches["exact", each], batches["scaled", each])


def test_where_one_can_run_nothing_is_measured(images: str, no_dali: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_rate", None)
    assert choose(DataSettings(), open_source(images), 0, 4, **LONG) == ("torch", "the only one here")


def test_a_short_run_does_not_wait_for_a_measurement(images: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_rate", None)
    monkeypatch.setattr(backends, "OBSTACLES", dict.fromkeys(("torch", "dali_cpu"), lambda device: None))
    choice = choose(DataSettings(), open_source(images), 0, 4, images=38_400, needed=0.0)
    assert choice == ("torch", "not measured for a run of 38,400 images")


def test_a_rate_counts_the_cpu_seconds_of_workers(images: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two workers that decode all the time: an image costs what its worker spends on it."""
    monkeypatch.setattr(backends, "SECONDS", 0.3)
    source = open_source(images)
    rate = backends._rate(DataSettings(image_size=224, workers=2, loader="torch"), source, 0, 4)
    assert rate.images_per_s > 0
    # This process alone needs a third of the lower bound; the upper one is two processes, and this one for a little.
    assert 2.5e-4 < rate.cpu_seconds < 2.2 / rate.images_per_s


RATES = {"torch": Rate(500, 4e-3), "dali_cpu": Rate(900, 2e-3), "dali_gpu": Rate(4000, 1e-3)}


@pytest.mark.parametrize(
    ("needed", "loader"),
    [
        pytest.param(0.0, "dali_cpu", id="on a CPU: the least of its cores"),
        pytest.param(400, "dali_cpu", id="all are fast enough"),
        pytest.param(600, "dali_cpu", id="one on the CPU is fast enough"),
        pytest.param(1900, "dali_gpu", id="only the GPU is"),
        pytest.param(9000, "dali_gpu", id="none is: the fastest"),
        pytest.param(None, "dali_gpu", id="nothing is known of the step: the fastest"),
    ],
)
def test_the_cheapest_that_is_fast_enough(needed: float | None, loader: str) -> None:
    """On a CPU there is no dali_gpu, so the cheapest of the others is the answer there too."""
    assert cheapest(RATES, needed)[0] == loader
    slow_but_cheap = {**RATES, "torch": Rate(500, 1e-3)}
    assert cheapest(slow_but_cheap, 400)[0] == "torch" and cheapest(slow_but_cheap, 600)[0] == "dali_cpu"


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
    rate = backends._rate(DataSettings(image_size=8, workers=0, loader="torch"), source, 0, 2)
    assert rate.images_per_s > 60


def test_a_loader_that_fails_is_left_out_and_told(images: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loader fails, as with a driver that is too old for DALI. If all fail, the error of the first one is raised."""
    source, runs = open_source(images), {"torch"}

    def rate(settings: DataSettings, *given: Any) -> Rate:
        if settings.loader in runs:
            return Rate(1.0, 2e-3)
        raise DataError(f"{settings.loader} fails")

    monkeypatch.setattr(backends, "_rate", rate)
    monkeypatch.setattr(backends, "OBSTACLES", dict.fromkeys(("torch", "dali_cpu"), lambda device: None))
    assert choose(DataSettings(), source, 0, 4, **LONG) == (
        "torch",
        "the cheapest (images/s, and CPU time of an image: torch 1 and 2 ms); dali_cpu left out: dali_cpu fails",
    )
    runs.clear()
    with pytest.raises(DataError, match="torch fails"):
        choose(DataSettings(), source, 0, 4, **LONG)
