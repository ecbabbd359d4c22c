"""`mimae` with a fault inside its ranks; the drill starts it instead of `mimae`.

The launcher runs this module as each rank, so functions that are replaced here are replaced in the rank. MIMAE_FAULT is
JSON with kind, step (the first with the fault), rank and folder. Restarted ranks have no fault.
"""

from __future__ import annotations

import json
import os
import runpy
import time
from collections.abc import Callable
from datetime import datetime, timedelta, tzinfo
from pathlib import Path
from typing import Any

from mimae import distributed
from mimae.launch import processes, rank

PACE = 0.3
"""Shortest time in seconds of a step from the fault on, so that the drill can act from outside."""

DAY = 86_400
"""Seconds by which a clock is set back."""

SYNC = 0.4
"""Seconds that each file of a slow save takes."""


def pace(run: Any, folder: Path, first: bool) -> None:
    """Slow the run down, and wait while the file `hold` exists."""
    if first:
        (folder / f"rank-{distributed.rank()}").write_text(str(os.getpid()))
    time.sleep(PACE)
    while (folder / "hold").exists():
        time.sleep(0.05)


def slow_save(run: Any, folder: Path, first: bool) -> None:
    """Extend the time in which the temporary directory of a checkpoint exists."""
    pace(run, folder, first)
    if first:
        sync = os.fsync

        def slowly(descriptor: int) -> None:
            time.sleep(SYNC)
            sync(descriptor)

        vars(os)["fsync"] = slowly


def nan(run: Any, folder: Path, first: bool) -> None:
    """Make the gradients of one rank NaN in every step, through the loss, which every engine has."""
    if first and distributed.rank() == int(FAULT["rank"]):
        backward = run.engine.backward
        run.engine.backward = lambda loss: backward(loss * float("nan"))
        print(f"fault: gradients of rank {distributed.rank()} are NaN from step {run.step + 1} on", flush=True)


def drift(run: Any, folder: Path, first: bool) -> None:
    """Change a weight of one rank once, in the tensor that its optimizer steps."""
    if first and distributed.rank() == int(FAULT["rank"]):
        held = next(part.values for part in run.engine.parts.values() if part.values.numel())
        held.detach().view(-1)[0] += 1
        print(f"fault: a weight of rank {distributed.rank()} changed before step {run.step + 1}", flush=True)


def clock(run: Any, folder: Path, first: bool) -> None:
    """Set the time of day of every rank back by a day, for all Python code of it."""
    if first:
        from mimae.telemetry import events

        class Yesterday(datetime):
            @classmethod
            def now(cls, tz: tzinfo | None = None) -> Any:
                return datetime.now(tz) - timedelta(seconds=DAY)

        now, now_ns = time.time, time.time_ns
        vars(time).update(time=lambda: now() - DAY, time_ns=lambda: now_ns() - DAY * 10**9)
        vars(events)["datetime"] = Yesterday
    pace(run, folder, first)


KINDS: dict[str, Callable[[Any, Path, bool], None]] = {
    "pace": pace,
    "slow_save": slow_save,
    "nan": nan,
    "drift": drift,
    "clock": clock,
}
FAULT = json.loads(os.environ.get("MIMAE_FAULT", "null"))


def arm() -> None:
    """Call the fault before each step, from its first one on."""
    from mimae.train.trainer import Trainer

    optimize = Trainer.optimize

    def faulty(self: Any) -> Any:
        step = self.step + 1
        if step >= FAULT["step"] and os.environ[rank.ATTEMPT] == "0":
            KINDS[FAULT["kind"]](self, Path(FAULT["folder"]), step == FAULT["step"])
        return optimize(self)

    Trainer.optimize = faulty  # type: ignore[method-assign]


if __name__ == "__main__":
    if rank.ATTEMPT in os.environ:
        arm()
        rank.main()
    else:
        processes.RANK = "mimae.bench.harness.faulty"
        runpy.run_module("mimae", run_name="__main__")
