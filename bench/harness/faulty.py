"""`mimae` with a fault inside of its ranks: what the drill starts in its place.

The launcher runs this module as each rank, so what is replaced here is replaced in it. MIMAE_FAULT tells, as JSON:
kind, step (the first that is touched), rank and folder. Ranks that the launcher starts again are without fault.
"""

from __future__ import annotations

import json
import os
import runpy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mimae import distributed
from mimae.launch import processes, rank

PACE = 0.3
"""Seconds that a step takes at least from the fault's on: time to be hit from outside."""

SYNC = 0.4
"""Seconds that each file of a slow save takes."""


def pace(run: Any, folder: Path, first: bool) -> None:
    """Go slowly, and wait for as long as the file `hold` is there."""
    if first:
        (folder / f"rank-{distributed.rank()}").write_text(str(os.getpid()))
    time.sleep(PACE)
    while (folder / "hold").exists():
        time.sleep(0.05)


def slow_save(run: Any, folder: Path, first: bool) -> None:
    """Stretches the time in which the temporary directory of a checkpoint is there."""
    pace(run, folder, first)
    if first:
        sync = os.fsync

        def slowly(descriptor: int) -> None:
            time.sleep(SYNC)
            sync(descriptor)

        vars(os)["fsync"] = slowly


def nan(run: Any, folder: Path, first: bool) -> None:
    """Make the gradients of one rank NaN, step after step; through the loss, which every engine has."""
    if first and distributed.rank() == int(FAULT["rank"]):
        backward = run.engine.backward
        run.engine.backward = lambda loss: backward(loss * float("nan"))
        print(f"fault: gradients of rank {distributed.rank()} are NaN from step {run.step + 1} on", flush=True)


def drift(run: Any, folder: Path, first: bool) -> None:
    """Change a weight of one rank, once, in what its optimizer steps."""
    if first and distributed.rank() == int(FAULT["rank"]):
        held = next(part.values for part in run.engine.parts.values() if part.values.numel())
        held.detach().view(-1)[0] += 1
        print(f"fault: a weight of rank {distributed.rank()} changed before step {run.step + 1}", flush=True)


KINDS: dict[str, Callable[[Any, Path, bool], None]] = {"pace": pace, "slow_save": slow_save, "nan": nan, "drift": drift}
FAULT = json.loads(os.environ.get("MIMAE_FAULT", "null"))


def arm() -> None:
    """Has the fault called before each step from its own on."""
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
