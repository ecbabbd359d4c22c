"""Diagnosis of why the device waits for data: measurements over a period of training, the likely cause, the remedy."""

from __future__ import annotations

import time
from typing import NamedTuple

import numpy as np

from mimae.data.loading.batch import Spent
from mimae.data.loading.workers import default_workers
from mimae.data.settings import DataSettings

LIMIT = 0.02
"""Fraction of the time above which waiting for data is reported."""

WORTH = 60.0
"""Seconds of waiting for data below which nothing is reported, because no change of settings would pay off."""

WORTH_AT_END = 5.0
"""WORTH for the report at the end of a run, which serves only later runs."""

WARM_UP = 1
"""Number of readings at the start of a process that are ignored: before the reading after the first step, workers start
and blocks are compiled."""

_BUSY = 0.6
"""Fraction of their time that workers spend on batches, above which the workers are the bottleneck."""


class Feed(NamedTuple):
    """Measurements of a rank's data loading over some period."""

    seconds: float
    stalled: float
    """Seconds in which the device was idle because it had no batch."""
    waited: float
    """Seconds in which the training process waited for the loader's next batch."""
    spent: Spent
    """Seconds spent on the batches, summed over all processes of the rank."""
    workers: int
    cores: int
    """Number of cores that the rank may use."""
    loader: str
    cache: str | None


class Diagnosis(NamedTuple):
    """A warning about waiting for data: the details of its event."""

    what: str
    """One line: the fraction of time that the device waited for data, the likely cause, and what to change."""
    waited: float
    """The fraction, which tells the event from other warnings."""


def diagnose(feed: Feed) -> Diagnosis:
    """Return why the device waits for data."""
    cause, remedy = _cause(feed)
    waited = feed.stalled / feed.seconds
    return Diagnosis(f"the device waited for data {waited:.1%} of the time: {cause}; {remedy}", round(waited, 4))


def _cause(feed: Feed) -> tuple[str, str]:
    made, workers, cores = sum(feed.spent), feed.workers, feed.cores
    # Batches that were prefetched before this period are counted in the period that uses them.
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
            f"the loader does not report what its {workers} workers on {cores} cores do",
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
    """Tracks how long the device waits for data during training, and gives the cause at the end of an epoch."""

    def __init__(self, settings: DataSettings) -> None:
        self._settings = settings
        self._spent = np.zeros(len(Spent._fields))
        self._last, self._sum = np.zeros(3 + len(Spent._fields)), np.zeros(3 + len(Spent._fields))
        self._readings = 0

    def made(self, spent: Spent) -> None:
        """Add the seconds that were spent on a batch."""
        self._spent += spent

    def read(self, stalled: float, waited: float, *, counts: bool = True) -> None:
        """Take a reading of the total seconds `stalled` and `waited` (see Feed).

        The time since the previous reading is included only if `counts`.
        """
        reading = np.array([time.perf_counter(), stalled, waited, *self._spent])
        if counts and self._readings >= WARM_UP:
            self._sum += reading - self._last
        self._last = reading
        self._readings += 1

    def verdict(self, worth: float = WORTH) -> Diagnosis | None:
        """Return the diagnosis of the period since the previous verdict, or None.

        There is one if the device waited for more than LIMIT of the time and for at least `worth` seconds. Short epochs
        are accumulated until then.
        """
        seconds, stalled, waited, *spent = self._sum.tolist()
        is_slow = stalled > LIMIT * seconds
        if is_slow and stalled < worth:
            return None
        self._sum[:] = 0
        if not is_slow:
            return None
        data, cores = self._settings, default_workers()
        workers = cores if data.workers is None else data.workers
        return diagnose(Feed(seconds, stalled, waited, Spent(*spent), workers, cores, data.loader, data.cache))
