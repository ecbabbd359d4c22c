"""Shares of the time in which this process could not compute though it wanted to, as Linux counts them.

A thread that is ready waits for a core because other programs use it, or because the limit of its control group (that
of a container or of a SLURM job) is used up. A core may also lower its own clock because it is hot.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

COLUMNS = ("cpu_waiting", "cpu_limited", "cpu_hot")

_SPENT = {"cpu_waiting": "ns", "cpu_hot": "ms"}
_PER_SECOND = {"ns": 1e9, "ms": 1e3}


class CoreReadings:
    """Shares (0 to 1) of the time since they were last taken, by COLUMNS; None where the system does not count them.

    `cpu_waiting`: the main thread was ready and had no core. `cpu_limited`: periods in which the control group used up
    its limit. `cpu_hot`: the hottest core lowered its clock.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        self._limits = _limits(root)
        self._time, self._before = time.monotonic(), self._read()

    def take(self) -> dict[str, float | None]:
        """Return the shares since the last call."""
        now, read = time.monotonic(), self._read()
        seconds, before = max(now - self._time, 1e-9), self._before
        self._time, self._before = now, read

        def grown(name: str) -> float | None:
            return None if name not in read or name not in before else max(0.0, read[name] - before[name])

        found = {}
        for name, unit in _SPENT.items():
            growth = grown(name)
            found[name] = None if growth is None else min(1.0, growth / _PER_SECOND[unit] / seconds)
        periods, limited = grown("nr_periods"), grown("nr_throttled")
        found["cpu_limited"] = None if not periods or limited is None else limited / periods
        return {name: found[name] for name in COLUMNS}

    def _read(self) -> dict[str, float]:
        """Return the system's counts."""
        found: dict[str, float] = {}
        with suppress(OSError, ValueError, IndexError):
            found["cpu_waiting"] = float((self._root / "proc/self/schedstat").read_text().split()[1])
        hot = (self._root / "sys/devices/system/cpu").glob("cpu[0-9]*/thermal_throttle/core_throttle_total_time_ms")
        with suppress(OSError, ValueError):  # ValueError: no core counts it.
            found["cpu_hot"] = max(float(file.read_text()) for file in hot)
        with suppress(OSError, ValueError):
            lines = [] if self._limits is None else self._limits.read_text().splitlines()
            found |= {key: float(value) for key, value in map(str.split, lines) if key.startswith("nr_")}
        return found


def _limits(root: Path) -> Path | None:
    """Return the file that counts the limits of this process's control group (version 2, else 1)."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers or "cpu" in controllers.split(","):
            for file in (f"sys/fs/cgroup/{controllers}/{path}/cpu.stat", f"sys/fs/cgroup/{controllers}/cpu.stat"):
                if (root / file).is_file():
                    return root / file
    return None


def cause(shares: Mapping[str, float | None], worth: float = 0.1) -> str | None:
    """Return in words why the cores of this machine were slow, where one share is at least `worth`."""

    def share(name: str) -> float:
        return shares.get(name) or 0.0

    if share("cpu_limited") >= worth:
        return (
            f"in {share('cpu_limited'):.0%} of the time the limit of its control group held it back: give the "
            "container or the job more cores (SLURM: --cpus-per-task)"
        )
    if share("cpu_hot") >= worth:
        return f"in {share('cpu_hot'):.0%} of the time a core was hot and lowered its clock: look at the cooling"
    if share("cpu_waiting") >= worth:
        return (
            f"in {share('cpu_waiting'):.0%} of the time the training process was ready and had no core: other programs "
            "use them, or data.workers are too many"
        )
    return None
