"""Decoder backends, selected by `data.loader`: which of them can run here, and which one `auto` stands for."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

import torch

from mimae.data.loading.batch import Batch, DataError
from mimae.data.loading.dali import DaliGpuBackend, RegionDecoder
from mimae.data.loading.order import BatchRequest, spread_ids
from mimae.data.loading.samples import EachDecoder, make_batch
from mimae.data.loading.workers import Workers, default_workers
from mimae.data.pixels import jpeg
from mimae.data.settings import DataSettings
from mimae.data.sources.base import Source

SECONDS = 2.0
"""Seconds for which a backend is measured, after its processes have started and all images have been read once."""

IMAGES = 512
"""Number of images on which backends are measured, repeatedly."""

SHORT = 100_000
"""Number of images below which measuring would cost more than it could save: such a run takes the first backend, which
needs no package that others lack."""

_AT_ONCE = 64


class DecoderBackend(Protocol):
    """Decodes, crops and resizes the images of requested micro-batches."""

    def batches(self, requests: Iterable[BatchRequest]) -> Iterator[Batch]:
        """Yield the batches of `requests` in order; an unfinished earlier iteration is ended. Raises DataError."""

    def close(self) -> None:
        """Stop the backend's worker processes."""


def make_backend(settings: DataSettings, source: Source, seed: int) -> DecoderBackend:
    """Return the backend that `settings.loader` names ("auto" means "torch"). Raises DataError if it cannot run."""
    name = "torch" if settings.loader == "auto" else settings.loader
    require(name, settings)
    if name == "dali_gpu":
        return DaliGpuBackend(settings, source, seed)
    decoder = RegionDecoder() if name == "dali_cpu" else EachDecoder(scaled=settings.decode == "scaled")
    return Workers(partial(make_batch, settings, source, seed, decoder=decoder), settings.workers)


def require(name: str, settings: DataSettings) -> None:
    """Raise DataError if the backend `name` cannot run here with these settings."""
    if (reason := _obstacle(name, settings)) is not None:
        raise DataError(f"data.loader={name} cannot run here: {reason}")


def _obstacle(name: str, settings: DataSettings) -> str | None:
    """Return why a backend cannot run here with these settings, or None if it can."""
    if settings.decode == "scaled":
        if name != "torch":
            return "it has no data.decode=scaled: set data.loader=torch, or data.decode=exact"
        if (reason := jpeg.obstacle()) is not None:
            return f"data.decode=scaled is not possible ({reason}): set data.decode=exact"
    return OBSTACLES[name](_device())


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
"""For each backend's name, a function that returns why it cannot run on a device and what to do, or None if it can. The
first needs no package that others lack."""


class Rate(NamedTuple):
    """Measured rate of a backend on this machine."""

    images_per_s: float
    cpu_seconds: float
    """CPU seconds of this process and of its workers for an image."""


class Choice(NamedTuple):
    """The backend that "auto" stands for."""

    loader: str
    reason: str
    """Why it is this one, in words."""


def choose(
    settings: DataSettings, source: Source, seed: int, samples: int, *, images: int, needed: float | None
) -> Choice:
    """Return the cheapest backend that is fast enough for a run of so many `images`.

    Each backend runs as it would in training, on images spread evenly over `source`, in micro-batches of at most
    `samples`. `needed`: images per second that the step of this rank takes at most; 0 where the step computes on the
    same cores, None where it is not known. Raises DataError if no backend runs, for instance because no image can be
    read.
    """
    if images < SHORT:
        return Choice(next(iter(OBSTACLES)), f"not measured for a run of {images:,} images")
    names = [name for name in OBSTACLES if _obstacle(name, settings) is None]
    if not names:
        require("torch", settings)
    if len(names) == 1:
        return Choice(names[0], "the only one here")
    rates: dict[str, Rate] = {}
    errors: dict[str, DataError] = {}
    for name in names:
        try:
            rates[name] = _rate(settings.model_copy(update={"loader": name}), source, seed, samples)
        except DataError as error:
            errors[name] = error
    if not rates:
        raise errors[names[0]]
    name, rule = cheapest(rates, needed)
    told = ", ".join(
        f"{name} {rate.images_per_s:,.0f} and {1e3 * rate.cpu_seconds:.2g} ms" for name, rate in rates.items()
    )
    failed = "".join(f"; {name} left out: {error}" for name, error in errors.items())
    return Choice(name, f"{rule} (images/s, and CPU time of an image: {told}){failed}")


def cheapest(rates: Mapping[str, Rate], needed: float | None) -> tuple[str, str]:
    """Return the backend that takes least from the step among those that are fast enough for it, and the rule in words.

    That is the one with the least CPU time; one that decodes on the GPU takes the step's own time, and is the last.
    """
    fast = {name for name, rate in rates.items() if needed is not None and rate.images_per_s >= needed}
    if not fast:
        limit = "" if needed is None else f"; none makes the {needed:,.0f} images/s that a step may take"
        return max(rates, key=lambda name: rates[name].images_per_s), f"the fastest here{limit}"
    enough = f" of those that make the {needed:,.0f} images/s that a step may take" if needed else ""
    return min(fast, key=lambda name: (name == "dali_gpu", rates[name].cpu_seconds)), f"the cheapest{enough}"


def _rate(settings: DataSettings, source: Source, seed: int, samples: int) -> Rate:
    """Return the rate of `settings.loader`, measured after each of its processes has made a batch.

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
        start, before, images = time.perf_counter(), _cpu_seconds(), 0
        # The loop counts time and not images: with few small images, most of those counted would be prefetched ones.
        while (elapsed := time.perf_counter() - start) < SECONDS:
            images += len(next(batches).sample_ids)
        return Rate(images / elapsed, (_cpu_seconds() - before) / max(images, 1))
    finally:
        backend.close()


def _cpu_seconds() -> float:
    """Return the CPU seconds of this process and of the workers that it has now."""
    total, tick = time.process_time(), os.sysconf("SC_CLK_TCK")
    for worker in multiprocessing.active_children():
        with suppress(OSError):  # a worker that has just died; the next batch raises the error
            # utime and stime are the 12th and the 13th field behind the name, which is in parentheses.
            fields = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
            total += (int(fields[11]) + int(fields[12])) / tick
    return total
