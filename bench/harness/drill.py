"""The fault drill: tiny runs with every kind of fault of a cluster, which must end as if there had been no fault.

Each fault has a separate run. It is started, the fault is injected at a step drawn from the seed, and the drill checks
that the fault fired. The same command then restarts the run until it is finished. Its weights, averages and optimizer
are compared with those of an undisturbed run: all bits must be equal on the same number of ranks, and differences must
be within TOLERANCE if the number changed.
"""

from __future__ import annotations

import math
import random
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import yaml
from torch import Tensor

from mimae.bench.harness.faults import FAULTS, RESHAPED
from mimae.bench.harness.subjects import Subject
from mimae.bench.harness.trial import EVERY, STEPS, Trial
from mimae.checkpoints import checkpoint
from mimae.config.load import load_recipe
from mimae.config.recipe import RunRecipe
from mimae.outside.progress import track

TOLERANCE = 1e-4
"""Tolerance, relative to the norm of each section (weights, optimizer, averages), for a different number of ranks,
which sums in a different order. The bias of attention's keys is left out: it shifts all logits of a query equally, so
its gradient is only rounding noise, which Adam turns into steps."""


def drill(
    subject: Subject, faults: Sequence[str], ranks: int, seed: int, jobs: int, overrides: Sequence[str], folder: Path
) -> list[dict[str, Any]]:
    """Run a trial for each fault (a name in FAULTS) on 2 to `ranks` ranks, `jobs` at a time; return a row for each."""
    data = folder / "data"
    subject.write(data)
    trials = []
    for i, fault in enumerate(faults):
        draw = random.Random(f"{seed} {i}")
        name = f"{i:03}-{fault.replace(' ', '-')}"
        trials.append((fault, Trial(folder / name, subject, data, list(overrides), draw.randint(2, ranks), draw)))
    counts = sorted({trial.ranks for _, trial in trials})
    undisturbed = [
        Trial(folder / f"undisturbed-{count}", subject, data, list(overrides), count, random.Random(0))
        for count in counts
    ]
    pool = ThreadPoolExecutor(jobs)
    try:
        list(pool.map(Trial.finish, undisturbed))
        wanted = {trial.ranks: _final(trial.run) for trial in undisturbed}
        return list(track(pool.map(partial(_judge, wanted=wanted), trials), "drill", len(trials), "faults"))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for trial in (*undisturbed, *(trial for _, trial in trials)):
            trial.close()


def _judge(named: tuple[str, Trial], wanted: dict[int, dict[str, Tensor]]) -> dict[str, Any]:
    """Inject a fault into a run, let it finish, and compare it."""
    fault, trial = named
    began, failed, distance = time.monotonic(), None, None
    try:
        FAULTS[fault](trial)
        if not trial.is_finished():
            trial.finish()
        distance = _distance(_final(trial.run), wanted[trial.ranks], exactly=fault != RESHAPED)
        if distance > (TOLERANCE if fault == RESHAPED else 0):
            failed = f"differs from the undisturbed run by {distance:.1e}"
    except Exception as error:  # The error becomes a row of the table, and the other trials continue.
        failed = str(error) or traceback.format_exc()
    finally:
        trial.close()
    row = {
        "fault": fault,
        "step": trial.step,
        "ranks": trial.ranks,
        "seen": trial.seen,
        "starts": trial.count_starts(),
        "lost": trial.lost(),
        "distance": distance,
        "failed": failed,
        "seconds": round(time.monotonic() - began, 1),
    }
    print(_line(row), flush=True)
    return row


def _final(run: Path) -> dict[str, Tensor]:
    """Return all tensors of a finished run."""
    found = checkpoint.load(run / "checkpoints" / f"step-{STEPS:08d}")
    sections = {section: found.tensors(section) for section in ("model", "optimizer", "ema")}
    return {f"{section}.{name}": tensor for section, part in sections.items() for name, tensor in part.items()}


def _distance(got: dict[str, Tensor], want: dict[str, Tensor], exactly: bool) -> float:
    """Return 0 if all bits are equal, otherwise the largest relative distance of a section.

    It is the norm of the difference over the norm of the expected section.
    """
    if got.keys() != want.keys():
        return float("inf")
    if all(torch.equal(got[name], want[name]) for name in want):
        return 0.0
    found = 0.0
    for section in {name.partition(".")[0] for name in want}:
        names = [name for name in want if name.startswith(section)]
        ours, theirs = (torch.cat([_seen(name, given[name], exactly) for name in names]) for given in (got, want))
        apart = float((ours - theirs).norm() / theirs.norm())
        found = max(found, apart if math.isfinite(apart) else math.inf)
    return found or sys.float_info.min if exactly else found


def _seen(name: str, tensor: Tensor, exactly: bool) -> Tensor:
    """Return the tensors to compare. The keys' part of the qkv bias is left out, unless bits are compared."""
    kept = tensor.double().flatten()
    return kept if exactly or not name.endswith("qkv.bias") or not tensor.ndim else torch.cat(kept.chunk(3)[::2])


def _line(row: dict[str, Any]) -> str:
    equal = "bits" if row["distance"] == 0 else f"{row['distance']:.0e}" if row["distance"] is not None else "-"
    outcome = f"FAILED: {row['failed']}" if row["failed"] else "; ".join(row["seen"])
    return (
        f"{row['fault']:<30} {row['step']:>4} {row['ranks']:>5} {row['starts']:>6} {row['lost']:>4} {equal:>6} "
        f"{row['seconds']:>6.0f}  {outcome}"
    )


def choose(kinds: Sequence[str], count: int, seed: int) -> list[str]:
    """Return `count` faults in random order; the numbers of any two kinds differ by at most one."""
    draw, chosen = random.Random(seed), list[str]()
    while len(chosen) < count:
        chosen += draw.sample(kinds, len(kinds))
    return chosen[:count]


def no_copies(subject: Subject, overrides: Sequence[str]) -> str | None:
    """Return the reason for which no two ranks have separate copies of a weight, or None. Raises ConfigError."""
    recipe = yaml.safe_load(subject.recipe(Path(), Path(), STEPS, EVERY))
    engine = load_recipe(recipe, overrides, None, RunRecipe).recipe.engine
    if engine.kind == "ddp" or engine.replicas > 1:
        return None
    return f"with {engine.kind}, engine.replicas={engine.replicas}, each weight is stepped by only one rank"


def end(number: int, _: FrameType | None) -> None:
    """End the drill and all processes that it started. Further signals are ignored meanwhile."""
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, lambda *_: None)
    raise KeyboardInterrupt


def pass_on_hangups() -> None:
    """Let the runs of a drill react to SIGHUP, also if the drill was started under nohup, which ignores it.

    Ignored signals are inherited. A handler, which keeps the drill alive as well, is not.
    """
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda *_: None)
