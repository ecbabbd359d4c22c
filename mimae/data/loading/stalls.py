"""Why the device waits for data: the evidence of a stretch of training, the cause that it speaks for, the remedy."""

from __future__ import annotations

import time
from typing import NamedTuple

import numpy as np

from mimae.data.loading.batch import Spent
from mimae.data.loading.workers import default_workers
from mimae.data.settings import DataSettings

LIMIT = 0.02
"""Share of the time past which waiting for data is worth a word."""

WORTH = 60.0
"""Seconds of waiting for data below which nothing is told: no change of settings pays for them."""

WARM_UP = 1
"""Readings at the start of a process whose waits tell nothing: until the one after the first step workers start and
blocks are compiled."""

_BUSY = 0.6
"""Share of their time that workers spend on batches, past which it is they that are too slow."""


class Feed(NamedTuple):
    """How batches came to a rank for some time."""

    seconds: float
    stalled: float
    """Seconds in which the device had nothing to do for want of a batch."""
    waited: float
    """Seconds in which the training process asked the loader for a batch that was not there."""
    spent: Spent
    """What went into the batches, all processes of the rank together."""
    workers: int
    cores: int
    """Cores that the rank may use."""
    loader: str
    cache: str | None


def diagnose(feed: Feed) -> str:
    """One line: the share of the time that the device waited for data, the likely cause, and what to change."""
    cause, remedy = _cause(feed)
    return f"the device waited for data {feed.stalled / feed.seconds:.1%} of the time: {cause}; {remedy}"


def _cause(feed: Feed) -> tuple[str, str]:
    made, workers, cores = sum(feed.spent), feed.workers, feed.cores
    # Batches that were made ahead, before this stretch, are counted where they are used.
    busy = min(1.0, made / (max(workers, 1) * feed.seconds))
    if feed.waited < feed.stalled / 2:
        return (
            f"the copies to the device are slow (of {feed.stalled:.1f} s the loader was late for {feed.waited:.1f} s)",
            "data.loader=dali_gpu copies encoded images, and fewer data.workers than cores leave one for the copies",
        )
    if workers == 0:
        return "the training process makes the batches itself", f"set data.workers=null, here {cores}"
    if made == 0:
        return (
            f"the loader does not tell what its {workers} workers on {cores} cores do",
            "try more data.workers, data.cache=encoded or another data.loader",
        )
    if busy < _BUSY and feed.loader == "dali_gpu":
        return (
            f"decoding on the device is slow (the workers are busy {busy:.0%} of the time)",
            "mimae data pack --shortest makes images smaller, data.loader=dali_cpu decodes on the cores",
        )
    if busy < _BUSY:
        return (
            f"the workers are busy only {busy:.0%} of the time, so the wait is for the first batches of an epoch",
            "a mixture with more draws makes epochs longer, schedule.accumulate makes batches smaller",
        )
    if feed.spent.read > made / 2:
        filling = "later epochs read from the cache as far as it has room" if feed.cache else "set data.cache=encoded"
        return (
            f"storage is slow ({feed.spent.read / made:.0%} of the work of {workers} workers is reading)",
            f"{filling}, data.shuffle=blocks reads in order, and more data.workers read side by side",
        )
    if workers < cores:
        return (
            f"too few workers ({workers}, busy {busy:.0%} of the time, on {cores} cores)",
            f"set data.workers={cores}",
        )
    if workers > cores:
        return (
            f"too few cores ({workers} workers share {cores})",
            "give the job more cores (SLURM: --cpus-per-task) and set data.workers=null",
        )
    decoding, resizing = feed.spent.decode / made, feed.spent.resize / made
    return (
        f"the {cores} cores are all in use (decoding is {decoding:.0%} of the work, resizing {resizing:.0%})",
        "data.loader=dali_gpu works on the device, mimae data pack --shortest makes images smaller"
        + ("" if feed.cache == "decoded" or decoding < 0.5 else ", data.cache=decoded decodes once"),
    )


class Stalls:
    """Follows how much of the training the device waits for data, to say why at the end of an epoch."""

    def __init__(self, settings: DataSettings) -> None:
        self._settings = settings
        self._spent = np.zeros(len(Spent._fields))
        self._last, self._sum = np.zeros(3 + len(Spent._fields)), np.zeros(3 + len(Spent._fields))
        self._readings = 0

    def made(self, spent: Spent) -> None:
        """Counts what went into a batch."""
        self._spent += spent

    def read(self, stalled: float, waited: float, *, counts: bool = True) -> None:
        """Takes a reading of the seconds so far, as in Feed; what came since the last one is left out or `counts`."""
        reading = np.array([time.perf_counter(), stalled, waited, *self._spent])
        if counts and self._readings >= WARM_UP:
            self._sum += reading - self._last
        self._last = reading
        self._readings += 1

    def verdict(self) -> str | None:
        """Return the diagnosis since the last one, where the device waited for more than LIMIT of the time, and for
        WORTH seconds at least; short epochs are taken together until then."""
        seconds, stalled, waited, *spent = self._sum.tolist()
        is_slow = stalled > LIMIT * seconds
        if is_slow and stalled < WORTH:
            return None
        self._sum[:] = 0
        if not is_slow:
            return None
        data, cores = self._settings, default_workers()
        workers = cores if data.workers is None else data.workers
        return diagnose(Feed(seconds, stalled, waited, Spent(*spent), workers, cores, data.loader, data.cache))
