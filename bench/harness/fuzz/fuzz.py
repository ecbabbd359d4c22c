"""Fuzzing with many inputs of a kind, each drawn by (seed, kind, number) and used in a child, and their verdicts."""

from __future__ import annotations

import gc
import json
import random
from collections import Counter
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from mimae.bench.harness.fuzz.case import Case, from_json
from mimae.bench.harness.fuzz.forked import CPU_SECONDS, Outcome, run
from mimae.bench.harness.fuzz.kind import Kind
from mimae.outside.progress import track

KINDS = {
    "settings": "recipes",
    "images": "images",
    "shards": "sources",
    "lists": "sources",
    "mixtures": "sources",
    "parquet": "parquet",
    "weights": "weights",
    "checkpoints": "runs",
    "runs": "runs",
    "steps": "runs",
    "environment": "environment",
}
"""Module of each kind, in which the kind has its name in capital letters. Modules are imported only when they are used,
because imported libraries, above all torch, make forks slow."""


SLICE = 100
"""Number of inputs of a kind after which the counts so far are written."""


def kind_of(name: str) -> Kind:
    """Return a kind by its name."""
    found: Kind = vars(import_module(f"{__package__}.{KINDS[name]}"))[name.upper()]
    return found


def draw_case(kind: str, seed: int, number: int) -> Case:
    """Draw an input. Equal arguments give equal inputs."""
    return kind_of(kind).make(random.Random(f"{seed} {kind} {number}"))


def try_case(kind: str, make: Callable[[], Case]) -> Outcome:
    """Make an input of a kind and use it in a child."""
    return run(make, kind_of(kind).use, kind_of(kind).memory)


def fuzz(kind: str, seed: int, first: int, count: int, kept: Path | None, say: Callable[[str], None]) -> dict[str, Any]:
    """Try `count` inputs of a kind from number `first` on, and return the counts of verdicts.

    Each find is reported with the command that repeats it, and its input is written to the folder `kept`.
    """
    _warm(kind)
    verdicts = Counter[str]()
    seconds = mib = total = 0.0
    finds = []
    for number in track(range(first, first + count), kind, count, "inputs"):
        outcome = try_case(kind, partial(draw_case, kind, seed, number))
        verdicts[outcome.verdict] += 1
        seconds, mib = max(seconds, outcome.seconds), max(mib, outcome.mib)
        total += outcome.seconds
        if outcome.is_find:
            command = f"mimae bench fuzz {kind} --seed {seed} --first {number} --count 1"
            say(f"{kind} {number}: {outcome.verdict}: {outcome.said}\nrepeat: {command}")
            finds.append(
                {"number": number, "verdict": outcome.verdict, "said": outcome.said[-2000:], "repeat": command}
            )
            if kept is not None:
                kept.mkdir(parents=True, exist_ok=True)
                (kept / f"{kind}-{seed}-{number}.json").write_text(draw_case(kind, seed, number).to_json(kind))
    return {
        "seed": seed,
        "first": first,
        "tried": count,
        "used": verdicts.pop("used", 0),
        "refused": verdicts.pop("refused", 0),
        "others": sum(verdicts.values()),
        "cpu_seconds_at_most": round(seconds, 2),
        "mib_at_most": round(mib),
        "cpu_minutes": round(total / 60, 2),
        "finds": finds,
    }


def repeat(file: Path) -> tuple[str, Outcome]:
    """Try a stored input again; return its kind and outcome."""
    kind, case = from_json(file.read_text())
    _warm(kind)
    return kind, try_case(kind, lambda: case)


def _warm(kind: str) -> None:
    """Import the modules and make the data that the children of a kind share."""
    kind_of(kind).prepare()
    gc.collect()
    gc.freeze()  # Otherwise the garbage collector's marks would copy pages in every child.


def read(file: Path | None, kind: str, seed: int, first: int) -> dict[str, Any]:
    """Return the earlier result of a kind if inputs from number `first` on continue it, else an empty dictionary."""
    kinds = json.loads(file.read_text())["kinds"] if file is not None and file.exists() else {}
    found: dict[str, Any] = kinds.get(kind, {})
    return found if found and (found["seed"], found["first"] + found["tried"]) == (seed, first) else {}


def add(before: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """Return the combined result of two runs, the second of which continues the first."""
    if not before:
        return found
    summed = {key: before[key] + found[key] for key in ("tried", "used", "refused", "others", "finds")}
    largest = {key: max(before[key], found[key]) for key in ("cpu_seconds_at_most", "mib_at_most")}
    return before | summed | largest | {"cpu_minutes": round(before["cpu_minutes"] + found["cpu_minutes"], 2)}


def merged(file: Path, kind: str, found: dict[str, Any]) -> str:
    """Return the contents of a file of results, as JSON, with the result of a kind added or replaced."""
    import torch

    from mimae.bench.machine import describe

    kinds = json.loads(file.read_text())["kinds"] if file.exists() else {}
    kinds = {each: (kinds | {kind: found})[each] for each in KINDS if each in {*kinds, kind}}
    bounds = {"mib": {each: kind_of(each).memory >> 20 for each in kinds}, "cpu_seconds": CPU_SECONDS}
    described = {"bench": "fuzz", **describe(torch.device("cpu")), "bounds": bounds, "kinds": kinds}
    return json.dumps(described, indent=1) + "\n"
