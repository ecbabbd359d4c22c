"""The records of a run: metrics.jsonl has a line for each logged step, epochs.jsonl a line for each epoch.

Every line has all keys. A value that the run does not have, or that is not finite, is null.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from mimae.objective import terms
from mimae.outside.files import Folder

PHASES = ("data", "forward", "backward", "optimizer", "checkpoint")
"""Phases into which the seconds of an epoch are divided. The rest of the wall time is the trainer's own work."""

FILES = {"train": "metrics.jsonl", "epoch": "epochs.jsonl"}
"""File name of each group of records."""

OVER_RANKS = (*(f"seconds_{phase}" for phase in PHASES), "exposed_communication", "mem_peak_bytes", "workers_bytes")
"""Columns of epochs.jsonl that have a least, a mean and a largest value over ranks."""

ACCOUNT_KEYS = (
    *(f"{name}_{kind}" for name in OVER_RANKS for kind in ("least", "mean", "most")),
    *("gpu_power_watts", "gpu_clock_mhz", "gpu_celsius", "gpu_throttled", "straggler", "straggler_lag"),
    *("cpu_waiting", "cpu_limited", "cpu_hot"),
)
"""The account of an epoch over ranks, see `accounts`. Of GPUs the most power, heat and throttling, the least clock; of
cores the largest share of a rank, see `cores`."""

STEP_KEYS = (
    "step", "epoch", "samples", *terms.LOSSES, "gate", "lr", "grad_norm", "image_size",
    "images_per_s", "views_per_s", "data_wait", "mem_peak_bytes",
)  # fmt: skip

DIAGNOSTICS = ("deviation", "effective_rank", "alignment", "uniformity", *terms.DIAGNOSTICS, "knn", "val_rec")

EPOCH_KEYS = (
    "epoch", "step", "images", "seconds", "images_per_s", "views_per_s", "data_wait", "mem_peak_bytes",
    "mem_reserved_bytes", "bytes_sent", "exposed_communication", "tflops", "mfu",
    *terms.ESTIMATES, *terms.LOSSES, *(f"seconds_{phase}" for phase in PHASES), *DIAGNOSTICS,
    *ACCOUNT_KEYS,
)  # fmt: skip


_LONGEST_LINE = 1 << 20
"""Bytes of a line that are read at once. A longer line is no record."""

_MOST_STEPS = 1 << 53
"""A larger number of steps is none that a run writes. Floats hold all smaller ones exactly."""

_LARGEST = 1e200
"""A larger number is none that a run writes. Its sums and squares would not be finite."""


def plain(name: str, keys: Sequence[str], record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a line of file `name`: all `keys` in their order with JSON values, null for keys that `record` lacks."""
    unknown = sorted(set(record) - set(keys))
    assert not unknown, f"{name} has no keys {unknown}"
    return {key: plain_value(record.get(key)) for key in keys}


def plain_value(value: Any) -> Any:
    """Return a value for JSON: numbers of NumPy and torch become Python's, and numbers that are not finite None."""
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def number(value: Any) -> float:
    """Return a JSON value as a number; NaN for other types, and for numbers that are too large for sums."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < _LARGEST:
        return math.nan
    return float(value)


def is_until(line: bytes, step: int) -> bool:
    """Return whether a line is a complete record of a step up to `step`."""
    found = parse(line)
    return found is not None and bool(found["step"] <= step)


def parse(line: bytes) -> dict[str, Any] | None:
    """Return the record in a line, or None if it is not one, for example after a crash."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step = found.get("step") if isinstance(found, dict) else None
    return found if type(step) is int and 0 <= step < _MOST_STEPS else None


def read(folder: Folder, name: str, limit: int = 1 << 32, tail: bool = False) -> Iterator[dict[str, Any]]:
    """Yield the records in the first `limit` bytes of a file, or with `tail` in the last ones, oldest first.

    One line is in memory at a time. A file that cannot be read has no records.
    """
    with suppress(OSError), os.fdopen(folder.open(name, os.O_RDONLY), "rb") as file:
        if tail:
            file.seek(max(0, os.fstat(file.fileno()).st_size - limit))
        begins = True  # The rest of a long line is no record either.
        while limit > 0 and (line := file.readline(_LONGEST_LINE)):
            limit -= len(line)
            if begins and (found := parse(line)) is not None:
                yield found
            begins = line.endswith(b"\n")
