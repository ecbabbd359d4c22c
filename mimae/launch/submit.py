"""A SLURM job of a run, written and submitted through submitit: `mimae submit`.

SLURM sends a signal before the job's time ends or the job is preempted. The run then saves, the job is queued again,
and the run resumes from the checkpoint: a run of days is a job of hours that repeats.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from mimae.config.load import load_recipe
from mimae.config.recipe import RunRecipe
from mimae.errors import EXIT_SAVED, UserError
from mimae.outside.files import Folder

GRACE_SECONDS = 180
"""Seconds between SLURM's signal and the end of the job: time to save."""

SHORTEST = GRACE_SECONDS // 60 + 2
"""Shortest time limit of a job, in minutes: the time after the signal, and two minutes to start and train."""


class Training(NamedTuple):
    """The command that SLURM runs on each node: the launcher of its ranks."""

    recipe: str
    overrides: tuple[str, ...]
    ranks: int
    restarts: int

    def __call__(self) -> int:
        """Run the launcher and return its exit code. After a signal, the job's first node queues the job again."""
        from mimae.launch import processes

        code = processes.train(self.recipe, self.overrides, processes.default_job(self.ranks, 1, None, self.restarts))
        if code == EXIT_SAVED and os.environ.get("SLURM_NODEID", "0") == "0":
            subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], check=True)
        return code


def minutes(time: str) -> int:
    """Read SLURM's forms of a time, rounded up: `90` (minutes), `12:00:00`, `2-00`, `1-12:30:00`. Raises UserError."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time)
    if match is None:
        raise UserError(f"--time {time}: legal are minutes, HH:MM:SS and D-HH[:MM[:SS]]")
    days, first, second, third = match.groups()
    if days is not None:
        seconds = ((int(days) * 24 + int(first)) * 60 + int(second or 0)) * 60 + int(third or 0)
    elif third is not None:
        seconds = (int(first) * 60 + int(second)) * 60 + int(third)
    else:
        seconds = int(first) * 60 + int(second or 0)
    return -(-seconds // 60)


def check_time(time: str) -> int:
    """Return a job's time limit in minutes. Raises UserError if the job would end before it trains."""
    if minutes(time) < SHORTEST:
        raise UserError(
            f"--time {time}: SLURM's signal to save comes {GRACE_SECONDS} s before the end of a job, and starting "
            f"takes a while; legal are {SHORTEST} minutes or more"
        )
    return minutes(time)


def executor(folder: Path, container: str | None, is_dry: bool, **parameters: Any) -> Any:
    """Return a submitit executor with the job's parameters.

    Raises UserError if submitit is not installed, or if there is no SLURM and `is_dry` is false.
    """
    if find_spec("submitit") is None:
        raise UserError("submitit is not installed: pip install 'mimae[slurm]'")
    import submitit

    class Writer(submitit.SlurmExecutor):
        """Executor that also writes scripts on machines without SLURM."""

        @classmethod
        def affinity(cls) -> int:
            return 2

    if not is_dry and submitit.SlurmExecutor.affinity() <= 0:
        raise UserError("there is no srun on this machine: submit from a login node of the cluster, or add --dry-run")
    if not is_dry:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            Folder(folder.parent).folder(folder.name)  # Raises OSError if it is a link.
        except OSError as error:
            raise UserError(f"{folder} cannot be written: {error.strerror}") from error
    # The Python inside a container is not the one that submits.
    made = (Writer if is_dry else submitit.SlurmExecutor)(folder, python="python" if container else None)
    made.update_parameters(
        # USR1 makes launcher and ranks save. submitit gets the same signal, so that it does not add one of its own.
        setup=["export SUBMITIT_PREEMPT_SIGNAL=USR1"],
        additional_parameters={"requeue": True, "open-mode": "append", "signal": f"USR1@{GRACE_SECONDS}"},
        **({"srun_args": [f"--container-image={container}"]} if container else {}),
        **{key: value for key, value in parameters.items() if value is not None},
    )
    return made


def runs(recipe: str, overrides: Sequence[str], seeds: Sequence[int]) -> list[tuple[str, ...]]:
    """Return the overrides of each run: one run, or one for each seed with a separate directory. Raises UserError."""
    directory = load_recipe(recipe, overrides, None, RunRecipe).recipe.run.dir
    if not seeds:
        return [tuple(overrides)]
    return [(*overrides, f"seed={seed}", f"run.dir={directory}/seed-{seed}") for seed in seeds]
