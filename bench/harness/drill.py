"""The fault drill: tiny runs that are harmed in every way that a cluster has, and have to end as if nothing had been.

Each fault is a run of its own: started, harmed at a step drawn from the seed, proven to have been harmed, and then
started again by the same command until it is finished. Its weights, averages and optimizer are compared with those of a
run that nothing disturbed: equal in every bit on as many ranks, within TOLERANCE where their number changed.
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

import numpy as np
import torch
import yaml
from PIL import Image
from torch import Tensor

from mimae.bench.harness.faults import FAULTS, RESHAPED
from mimae.bench.harness.trial import EVERY, RECIPE, STEPS, Trial
from mimae.checkpoints import checkpoint
from mimae.config.load import load_recipe

TOLERANCE = 1e-4
"""Tolerance, relative to the norm of each section (weights, optimizer, averages), for another number of ranks, which
sums in another order. The bias of attention's keys is left out: it moves all logits of a query alike, so its gradient
is only rounding, and Adam turns that into steps."""

IMAGES = 100


def drill(
    faults: Sequence[str], ranks: int, seed: int, jobs: int, overrides: Sequence[str], folder: Path
) -> list[dict[str, Any]]:
    """Run one trial for each fault, named as in FAULTS, on 2 to `ranks` ranks, `jobs` at a time; a row for each."""
    images = folder / "images"
    images.mkdir()
    generator = np.random.default_rng(0)
    for i in range(IMAGES):
        Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(images / f"{i:03}.png")
    trials = []
    for i, fault in enumerate(faults):
        draw = random.Random(f"{seed} {i}")
        name = f"{i:03}-{fault.replace(' ', '-')}"
        trials.append((fault, Trial(folder / name, images, list(overrides), draw.randint(2, ranks), draw)))
    counts = sorted({trial.ranks for _, trial in trials})
    undisturbed = [
        Trial(folder / f"undisturbed-{count}", images, list(overrides), count, random.Random(0)) for count in counts
    ]
    pool = ThreadPoolExecutor(jobs)
    try:
        list(pool.map(Trial.finish, undisturbed))
        wanted = {trial.ranks: _final(trial.run) for trial in undisturbed}
        return list(pool.map(partial(_judge, wanted=wanted), trials))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for trial in (*undisturbed, *(trial for _, trial in trials)):
            trial.close()


def _judge(named: tuple[str, Trial], wanted: dict[int, dict[str, Tensor]]) -> dict[str, Any]:
    """Harm a run, have it finished, and compare."""
    fault, trial = named
    began, failed, distance = time.monotonic(), None, None
    try:
        FAULTS[fault](trial)
        if not trial.is_finished():
            trial.finish()
        distance = _distance(_final(trial.run), wanted[trial.ranks], exactly=fault != RESHAPED)
        if distance > (TOLERANCE if fault == RESHAPED else 0):
            failed = f"differs from the undisturbed run by {distance:.1e}"
    except Exception as error:  # What went wrong is a row of the table, and the others go on.
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
    """All tensors of a finished run."""
    found = checkpoint.load(run / "checkpoints" / f"step-{STEPS:08d}")
    sections = {section: found.tensors(section) for section in ("model", "optimizer", "ema")}
    return {f"{section}.{name}": tensor for section, part in sections.items() for name, tensor in part.items()}


def _distance(got: dict[str, Tensor], want: dict[str, Tensor], exactly: bool) -> float:
    """0 where all bits are equal; else, by the section that differs most, the norm of the difference over that of what
    is wanted."""
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
    """Return the tensors that are compared. The keys' part of the qkv bias is left out, unless bits are compared."""
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
    """`count` faults in a drawn order, each kind as often as any other, give or take one."""
    draw, chosen = random.Random(seed), list[str]()
    while len(chosen) < count:
        chosen += draw.sample(kinds, len(kinds))
    return chosen[:count]


def no_copies(overrides: Sequence[str]) -> str | None:
    """Why no two ranks have a copy of their own of a weight, if that is so. Raises ConfigError."""
    engine = load_recipe(yaml.safe_load(RECIPE % (".", STEPS, EVERY)), overrides).recipe.engine
    if engine.kind == "ddp" or engine.replicas > 1:
        return None
    return f"of {engine.kind}, engine.replicas={engine.replicas}, each weight is stepped by one rank alone"


def end(number: int, _: FrameType | None) -> None:
    """End the drill with all that it started; nothing more may interrupt that."""
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, lambda *_: None)
    raise KeyboardInterrupt
