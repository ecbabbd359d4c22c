"""The account of an epoch over all ranks: least, mean and most of what each measured, and which rank is a straggler.

A collective makes all ranks wait for the slowest, so that their steps last equally long. A straggler is the rank that
waits the least: its share of exposed communication is far below the others'.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mimae.telemetry import cores
from mimae.telemetry.cores import COLUMNS as CORES
from mimae.telemetry.nvml import COLUMNS as GPU
from mimae.telemetry.records import OVER_RANKS

LAG = 0.1
"""A share of the step from which a rank that is busier than the others is a straggler."""

_THROTTLED = 0.1
"""A share of the readings from which a GPU counts as throttled."""

Account = Mapping[str, float | None]
"""Measurements of one rank, by the names of OVER_RANKS and of the GPU's readings."""


def over_ranks(everyone: Sequence[Account]) -> dict[str, Any]:
    """Return the columns of an epoch's line, from the accounts of all ranks in their order."""
    record: dict[str, Any] = {}
    for name in OVER_RANKS:
        values = [value for account in everyone if (value := account.get(name)) is not None]
        if values:
            record[f"{name}_least"], record[f"{name}_most"] = min(values), max(values)
            record[f"{name}_mean"] = statistics.fmean(values)
    for name, worst in zip(GPU, (max, min, max, max)):
        values = [value for account in everyone if (value := account.get(name)) is not None]
        record[name] = worst(values) if values else None
    for name in CORES:
        record[name] = max((value for account in everyone if (value := account.get(name)) is not None), default=None)
    found = straggler(everyone)
    record["straggler"], record["straggler_lag"] = (None, None) if found is None else found
    return record


def straggler(everyone: Sequence[Account]) -> tuple[int, float] | None:
    """Return the rank that the others wait for, and for which share of a step; None where ranks are alike."""
    waiting = [account.get("exposed_communication") for account in everyone]
    known = [share for share in waiting if share is not None]
    if len(known) < len(everyone) or len(known) < 2:
        return None
    rank = known.index(min(known))
    lag = statistics.median(known[:rank] + known[rank + 1 :]) - known[rank]
    return (rank, lag) if lag >= LAG else None


class Stragglers:
    """Tells once of each straggler, until it is another rank or none."""

    def __init__(self) -> None:
        self._told: int | None = None

    def verdict(self, everyone: Sequence[Account]) -> str | None:
        """Return a sentence that names a new straggler, and what it is slow in."""
        found = straggler(everyone)
        before, self._told = self._told, None if found is None else found[0]
        return None if found is None or found[0] == before else _sentence(everyone, *found)


def _sentence(everyone: Sequence[Account], rank: int, lag: float) -> str:
    own, others = everyone[rank], [account for place, account in enumerate(everyone) if place != rank]

    def excess(name: str) -> float:
        value, rest = own.get(name), [each for account in others if (each := account.get(name)) is not None]
        return 0.0 if value is None or not rest else value - statistics.median(rest)

    total = own.get("seconds") or 0.0
    if excess("seconds_data") > 0.5 * lag * total:
        cause = "it waits for its data: look at the storage and the workers of its machine"
    elif (own.get("gpu_throttled") or 0.0) > _THROTTLED:
        celsius = own.get("gpu_celsius")
        cause = "its GPU lowers its clock" + ("" if celsius is None else f", at {celsius:.0f} degrees Celsius")
    else:
        slow = cores.cause({name: own.get(name) for name in CORES})
        cause = f"it computes slower: {slow or 'another program, a lower clock, or a slower device on its machine'}"
    return f"rank {rank} is a straggler, and the others wait for it {lag:.0%} of a step: {cause}"


def workers_bytes(parent: Path = Path("/proc/self")) -> int | None:
    """Return the memory of this process's children, the data loader's workers: shared pages count once among those that
    share them. None where the system does not say."""
    try:
        children = [pid for file in parent.glob("task/*/children") for pid in file.read_text().split()]
    except OSError:
        return None
    total = 0
    for pid in children:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:  # it has ended
            continue
        total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    return total if children else None
