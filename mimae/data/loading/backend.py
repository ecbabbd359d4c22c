"""Decoder backends, selected by `data.loader`: which of them can run here, and which one is the fastest."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple, Protocol

import torch

from mimae.data.loading.batch import Batch, DataError
from mimae.data.loading.dali import DaliGpuBackend, RegionDecoder
from mimae.data.loading.order import BatchRequest, spread_ids
from mimae.data.loading.samples import EachDecoder, make_batch
from mimae.data.loading.workers import Workers, default_workers
from mimae.data.settings import DataSettings
from mimae.data.sources.base import Source

SECONDS = 2.0
"""Seconds for which a backend is measured, after its processes have started and all images have been read once."""

IMAGES = 512
"""Number of images on which backends are measured, repeatedly."""

_AT_ONCE = 64


class DecoderBackend(Protocol):
    """Decodes, crops and resizes the images of requested micro-batches."""

    def batches(self, requests: Iterable[BatchRequest]) -> Iterator[Batch]:
        """Yield the batches of `requests` in order; an unfinished earlier iteration is ended. Raises DataError."""

    def close(self) -> None:
        """Stop the backend's worker processes."""


def make_backend(settings: DataSettings, source: Source, seed: int, *, by_pipe: bool = False) -> DecoderBackend:
    """Return the backend that `settings.loader` names ("auto" means "torch"). Raises DataError if it cannot run.

    With `by_pipe` the workers send batches through pipes instead of shared memory.
    """
    name = "torch" if settings.loader == "auto" else settings.loader
    if (reason := OBSTACLES[name](_device())) is not None:
        raise DataError(f"data.loader={name} cannot run here: {reason}")
    if name == "dali_gpu":
        return DaliGpuBackend(settings, source, seed, by_pipe=by_pipe)
    decoder = RegionDecoder() if name == "dali_cpu" else EachDecoder()
    return Workers(partial(make_batch, settings, source, seed, decoder=decoder), settings.workers, by_pipe=by_pipe)


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
"""For each backend's name, a function that returns why it cannot run on a device and what to do, or None if it can."""


class Choice(NamedTuple):
    """The backend that "auto" stands for."""

    loader: str
    rates: dict[str, float]
    """Images per second of each backend that can run here; empty if there is only one."""
    failed: dict[str, str] = {}  # noqa: RUF012 -- the default of a named tuple is never changed
    """Error message of each backend that failed although it should run here, by the backend's name."""


def fastest(settings: DataSettings, source: Source, seed: int, samples: int) -> Choice:
    """Return the backend that makes the most images per second here.

    Each backend runs as it would in training, on images spread evenly over `source`. Raises DataError if none of them
    runs, for instance because no image can be read.
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
    """Return the images per second of `settings.loader`, measured after each of its processes has made a batch.

    By then all images have been read once. Otherwise the first backend would be measured with a cold page cache.
    """
    parts = spread_ids(len(source), IMAGES).split(min(_AT_ONCE, samples))
    workers = default_workers() if settings.workers is None else settings.workers
    backend = make_backend(settings, source, seed)
    try:
        batches = backend.batches(
            BatchRequest(0, step, part.numpy()) for step, part in enumerate(itertools.cycle(parts))
        )
        for _ in range(max(workers + 1, len(parts))):
            next(batches)
        start, images = time.perf_counter(), 0
        # The loop counts time and not images: with few small images, most of those counted would be prefetched ones.
        while (elapsed := time.perf_counter() - start) < SECONDS:
            images += len(next(batches).sample_ids)
        return images / elapsed
    finally:
        backend.close()
