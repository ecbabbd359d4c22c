"""The loaders by their names: which of them can run here, and which is the fastest."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple, Protocol

import torch

from mimae.data.batch import Batch, DataError
from mimae.data.dali_loader import DaliGpuLoader, RegionDecoder
from mimae.data.order import Job, spread_ids
from mimae.data.samples import EachDecoder, make_batch
from mimae.data.settings import DataSettings
from mimae.data.sources import Source
from mimae.data.torch_loader import TorchLoader, default_workers

SECONDS = 2.0
"""How long a loader is measured, once its processes have started and all images have been read."""

IMAGES = 512
"""Images that loaders are measured on, over and over."""

_AT_ONCE = 64


class Backend(Protocol):
    """What makes batches of jobs."""

    def batches(self, jobs: Iterable[Job]) -> Iterator[Batch]:
        """The batches of `jobs` in their order; an earlier run that is not done ends. Raises DataError."""

    def close(self) -> None:
        """Ends what works for it."""


def make_backend(settings: DataSettings, source: Source, seed: int) -> Backend:
    """What `settings.loader` names ("auto": "torch"). Raises DataError where it cannot run."""
    name = "torch" if settings.loader == "auto" else settings.loader
    if (reason := OBSTACLES[name](_device())) is not None:
        raise DataError(f"data.loader={name} cannot run here: {reason}")
    if name == "dali_gpu":
        return DaliGpuLoader(settings, source, seed)
    decoder = RegionDecoder() if name == "dali_cpu" else EachDecoder()
    return TorchLoader(partial(make_batch, settings, source, seed, decoder=decoder), settings.workers)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _no_dali(device: torch.device) -> str | None:
    try:
        import nvidia.dali  # noqa: F401
    except (ImportError, OSError) as error:
        return f"NVIDIA DALI cannot be imported ({error}): pip install 'mimae[dali]', or set data.loader=torch"
    return None


def _no_gpu(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "torch finds no CUDA device: set data.loader to dali_cpu or torch"
    return _no_dali(device)


OBSTACLES: dict[str, Callable[[torch.device], str | None]] = {
    "torch": lambda device: None,
    "dali_cpu": _no_dali,
    "dali_gpu": _no_gpu,
}
"""Of each loader, by its name: why it cannot run for a device, and what to do about it; None if it can."""


class Choice(NamedTuple):
    """What "auto" comes to."""

    loader: str
    rates: dict[str, float]
    """Images per second of each loader that can run here; empty where there is but one."""
    failed: dict[str, str] = {}  # noqa: RUF012 -- a default of a named tuple, which nobody changes
    """Of each loader that should run here and does not: why."""


def fastest(settings: DataSettings, source: Source, seed: int, samples: int) -> Choice:
    """The loader that makes most images per second here: each is run as it would be, on images from all over `source`.

    Raises DataError where none of them runs, as with images that cannot be read.
    """
    names = [name for name, obstacle in OBSTACLES.items() if obstacle(_device()) is None]
    if len(names) == 1:
        return Choice(names[0], {})
    rates: dict[str, float] = {}
    errors: dict[str, DataError] = {}
    for name in names:
        try:
            rates[name] = _rate(settings.model_copy(update={"loader": name}), source, seed, samples)
        except DataError as error:
            errors[name] = error
    if not rates:
        raise errors[names[0]]
    return Choice(max(rates, key=lambda name: rates[name]), rates, {name: str(errors[name]) for name in errors})


def _rate(settings: DataSettings, source: Source, seed: int, samples: int) -> float:
    """Images per second of `settings.loader`, counted from when each of its processes has made a batch.

    By then all images have been read: on slow storage the first loader would else be measured with a cold cache.
    """
    parts = spread_ids(len(source), IMAGES).split(min(_AT_ONCE, samples))
    workers = default_workers() if settings.workers is None else settings.workers
    backend = make_backend(settings, source, seed)
    try:
        batches = backend.batches(Job(0, step, part.numpy()) for step, part in enumerate(itertools.cycle(parts)))
        for _ in range(max(workers + 1, len(parts))):
            next(batches)
        start, images = time.perf_counter(), 0
        # No fewer images where they are small: those made ahead would be most of what is counted.
        while (elapsed := time.perf_counter() - start) < SECONDS:
            images += len(next(batches).sample_ids)
        return images / elapsed
    finally:
        backend.close()
