"""Fuzzing of environment variables of torchrun, SLURM, terminals and libraries, with unusual values."""

from __future__ import annotations

import os
import random
import runpy
import sys
from pathlib import Path

from mimae.bench.harness.fuzz.case import Case
from mimae.bench.harness.fuzz.draws import ODD_NUMBERS, ODD_TEXTS, times
from mimae.bench.harness.fuzz.images import bases
from mimae.bench.harness.fuzz.kind import Kind
from mimae.bench.harness.fuzz.recipes import TINY

_NUMBERS = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT", "SLURM_PROCID", "SLURM_LOCALID"),
    *("SLURM_STEP_NUM_TASKS", "SLURM_STEP_NUM_NODES", "SLURM_NNODES", "SLURM_NODEID", "SLURM_JOB_ID"),
    *("SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE", "COLUMNS", "LINES", "OMP_NUM_THREADS"),
)
_TEXTS = (
    *("MASTER_ADDR", "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_TASKS_PER_NODE", "SLURM_STEP_TASKS_PER_NODE"),
    *("MIMAE_SECRET", "MIMAE_STORE", "TERM", "LANG", "LC_ALL", "HOME", "XDG_CACHE_HOME", "CUDA_VISIBLE_DEVICES"),
    *("NO_COLOR", "FORCE_COLOR", "TMPDIR", "PYTHONIOENCODING", "TZ", "TORCH_LOGS"),
)
_NODES = (
    "gpu[01-03,7],login",
    "gpu[1-99999999999]",
    "gpu[",
    "gpu[3-1]",
    "[]",
    ",",
    "a,b",
    "gpu[01-03]x[1-2]",
    "gpu[a-b]",
)
_TASKS = ("4(x2),3", "2", "0", "(x2)", "4(x99999999999)", "-1", "4(x", "x")
_VERBS = ("config quickstart", "status run", "data check images --workers 1", "place", "workers", "train", "submit")


def make(draw: random.Random) -> Case:
    environment: dict[str, str] = {}
    if draw.random() < 0.4:
        environment |= {
            "SLURM_PROCID": "0",
            "SLURM_STEP_NUM_TASKS": "2",
            "SLURM_STEP_NODELIST": "a",
            "SLURM_JOB_ID": "7",
        }
    if draw.random() < 0.4:
        environment |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    for _ in times(draw, 5):
        name = draw.choice((*_NUMBERS, *_NUMBERS, *_TEXTS))
        odd_texts = [text for text in ODD_TEXTS if "\0" not in text]
        if name.endswith("NODELIST"):
            environment[name] = draw.choice((*_NODES, draw.choice(odd_texts)))
        elif name.endswith("TASKS_PER_NODE"):
            environment[name] = draw.choice((*_TASKS, draw.choice(odd_texts)))
        elif name in _NUMBERS:
            environment[name] = draw.choice(
                (str(draw.choice(ODD_NUMBERS))[:500], str(draw.randrange(4)), draw.choice(odd_texts)[:500])
            )
        else:
            environment[name] = draw.choice(odd_texts)[:1000]
    images = {f"images/{i}.png": bases()[6][1] for i in range(9)}
    return Case({"recipe.yaml": TINY.encode(), **images}, [draw.choice(_VERBS)], environment)


def use(folder: Path, case: Case) -> str:
    """Do the action that the case's word names; return the exit code of a command that fails."""
    from mimae.config.load import load_recipe
    from mimae.data.loading.workers import default_workers
    from mimae.launch import slurm
    from mimae.ranks import place

    (verb,) = case.words
    if verb == "workers":
        assert default_workers() >= 1
        return ""
    slurm.join(os.environ, has_terminal=False)
    found = place.find()
    if verb == "place" or (found is not None and found.ranks > 1):
        slurm.nodes(os.environ)
        return ""
    if verb == "train":
        from mimae.bench.harness.fuzz.runs import train

        train(load_recipe("recipe.yaml", ["schedule.max_steps=1"], {"run": {"dir": "run"}}).recipe)
        return ""
    return _command(verb.split() if verb != "submit" else ["submit", "recipe.yaml", "--nodes", "1", "--gpus", "1"])


def _command(arguments: list[str]) -> str:
    """Run a command as the shell would; return its exit code as text if it is not 0."""
    sys.argv = ["mimae", *arguments]
    try:
        runpy.run_module("mimae", run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1 if end.code else 0
        assert code in (0, 1, 2), f"exit code {code}"
        return "" if code == 0 else f"exit code {code}"
    return ""


ENVIRONMENT = Kind(make, use, bases, memory=700 << 20)
