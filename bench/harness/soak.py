"""Soak test of a loader: it runs for minutes with random damage to images, and is ended and resumed meanwhile.

Every slot of every epoch must come exactly once, every replaced sample must be named, and memory must not grow.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from mimae.bench.data.data import tree_bytes
from mimae.data.loading.batch import Batch
from mimae.data.loading.loader import make_loader
from mimae.data.settings import DataSettings
from mimae.data.sources.base import Source
from mimae.outside.progress import Progress

SAMPLE_SECONDS = 2.0
"""Seconds between two readings of the memory."""


class Damaged:
    """A source whose reads are randomly truncated, overwritten or failing."""

    def __init__(self, source: Source, share: float) -> None:
        self._source, self._share = source, share

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # Pickling requests these before the source is set.
            raise AttributeError(name)
        return getattr(self._source, name)

    def __len__(self) -> int:
        return len(self._source)

    def read(self, i: int) -> bytes:
        data = self._source.read(i)
        draw = random.SystemRandom()  # This generator differs between processes; one from before a fork would not.
        if draw.random() >= self._share:
            return data
        kind = draw.choice(("cut", "empty", "noise", "tables", "text", "vanished"))
        if kind == "vanished":
            raise FileNotFoundError(2, "No such file or directory")
        return {
            "cut": data[: draw.randrange(2, max(3, len(data) - 64))],
            "empty": b"",
            "noise": draw.randbytes(len(data)),
            # Quantization tables under another marker: the header of the JPEG is valid, but its decoder fails.
            "tables": data.replace(b"\xff\xdb", b"\xff\xec"),
            "text": b"<html>404 Not Found</html>",
        }[kind]


class Account:
    """Counts of each epoch: the samples that came, against the expected ones."""

    def __init__(self, steps_per_epoch: int, batch_size: int, samples: int) -> None:
        self.expected, self.samples = steps_per_epoch * batch_size, samples
        self.seen: Counter[int] = Counter()
        self.images = self.replaced = self.lost = self.repeated = self.unnamed = self.epochs = 0
        self.reasons: Counter[str] = Counter()

    def add(self, batch: Batch) -> None:
        """Count a batch. If a slot has the pixels of another sample, its own sample must be on the list."""
        named = {bad.id for bad in batch.bad}
        own = batch.sample_ids % self.samples
        moved = own[own != batch.source_ids].tolist()
        self.seen.update(batch.sample_ids.tolist())
        self.images += len(batch.sample_ids)
        self.replaced += len(moved)
        self.unnamed += len(set(moved) - named)
        self.reasons.update(" ".join(bad.reason.split()[:4]) for bad in batch.bad)

    def end_epoch(self) -> None:
        """Close an epoch: check that every slot came once."""
        self.epochs += 1
        self.lost += self.expected - len(self.seen)
        self.repeated += sum(self.seen.values()) - len(self.seen)
        self.seen.clear()


def soak(
    settings: DataSettings, source: Source, batch_size: int, minutes: float, share: float, restart_seconds: float
) -> dict[str, Any]:
    """Run for `minutes`, and end and resume the loader about every `restart_seconds`; return the counts."""
    damaged = Damaged(source, share)
    start = time.perf_counter()
    curve: list[tuple[float, float]] = []
    epoch = step = restarts = 0
    draw = random.Random(0)
    account: Account | None = None
    progress = Progress(settings.loader, round(60 * minutes), "seconds")
    while (now := time.perf_counter()) - start < 60 * minutes:
        until = min(now + draw.uniform(0.5, 1.5) * restart_seconds, start + 60 * minutes)
        with closing(make_loader(settings, damaged, seed=0, batch_size=batch_size)) as loader:
            account = account or Account(loader.steps_per_epoch, batch_size, len(source))
            for batch in _until(loader, epoch, step, until):
                account.add(batch)
                epoch, step = batch.epoch, batch.step + 1
                if step == loader.steps_per_epoch:
                    account.end_epoch()
                    epoch, step = epoch + 1, 0
                if time.perf_counter() - start >= len(curve) * SAMPLE_SECONDS:
                    curve.append((time.perf_counter() - start, tree_bytes() / 2**20))
                    progress.add(round(SAMPLE_SECONDS))
        restarts += 1
    progress.close()
    assert account is not None
    return {
        **{key: getattr(account, key) for key in ("images", "epochs", "lost", "repeated", "replaced", "unnamed")},
        "restarts": restarts,
        "reasons": dict(account.reasons.most_common()),
        "memory_mib": curve,
        "quarters_mib": _quarters(curve),
    }


def _until(loader: Any, epoch: int, step: int, until: float) -> Iterator[Batch]:
    """Yield the loader's batches from a position on, until the time is over."""
    while True:
        for batch in loader.epoch(epoch, step):
            yield batch
            if time.perf_counter() >= until:
                return
        epoch, step = epoch + 1, 0


def _quarters(curve: list[tuple[float, float]]) -> list[float]:
    """Return the MiB in each quarter of the time. They are medians, because single readings include short processes."""
    return [float(np.median(part)) for part in np.array_split(np.array(curve)[:, 1], 4) if len(part)]


def plot(found: dict[str, Any], path: Path) -> None:
    """Plot the memory over time of each loader."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    for name, result in found["loaders"].items():
        seconds, mib = np.array(result["memory_mib"]).T
        label = f"{name}: {result['images']:,} images, {result['replaced']:,} replaced, {result['restarts']} restarts"
        axes.plot(seconds / 60, mib, label=label, linewidth=1)
    axes.set(xlabel="minutes", ylabel="memory of all processes, MiB", ylim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
