"""SLURM's environment variables: they show if srun started this process as a rank or as the launcher of a node."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from itertools import islice

from mimae.errors import UserError
from mimae.ranks.place import number

MOST_NODES = 100_000
"""Nodes that a list of SLURM's may stand for."""


def join(environment: dict[str, str] | os._Environ[str], has_terminal: bool) -> bool:
    """Set the variables that torchrun would set, if srun started this process as one of several ranks.

    Returns True if it did. `has_terminal`: True if the process has a terminal, which srun gives only with --pty. Raises
    UserError for a shell of `srun --pty` with several tasks, and for variables that contradict each other.
    """
    # A batch script also has a task number, but no step.
    tasks = number(environment, "SLURM_STEP_NUM_TASKS", 1)
    if "SLURM_PROCID" not in environment or tasks <= 1:
        return False
    if has_terminal:
        raise UserError(
            f"SLURM_STEP_NUM_TASKS={tasks}: this shell is one of {tasks} tasks of `srun --pty`, and the others would "
            "never start it. Use `srun mimae pretrain ...`, or a shell with one task (--ntasks=1)"
        )
    if nodes(environment)[0] > 1:
        return False
    here = number(environment, "SLURM_NODEID", 0)
    short = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE") or "1"
    counts = tasks_per_node(short)
    if here >= len(counts):
        raise UserError(
            f"SLURM_NODEID={here} and SLURM_TASKS_PER_NODE={short} in the environment contradict each other"
        )
    found = {
        "RANK": str(number(environment, "SLURM_PROCID", 0)),
        "WORLD_SIZE": str(tasks),
        "LOCAL_RANK": str(number(environment, "SLURM_LOCALID", 0)),
        "LOCAL_WORLD_SIZE": str(counts[here]),
        "MASTER_ADDR": _first_host(environment),
        "MASTER_PORT": str(_port(environment)),
    }
    for name, value in found.items():
        environment[name] = value
    return True


def has_terminal() -> bool:
    """Return whether this process has a controlling terminal, even if its output is redirected."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True


def nodes(environment: Mapping[str, str]) -> tuple[int, str | None]:
    """Return the number of nodes and the meeting point if srun started one task on each of several nodes.

    Returns 1 and None otherwise.
    """
    count = number(environment, "SLURM_STEP_NUM_NODES", number(environment, "SLURM_NNODES", 1))
    tasks = number(environment, "SLURM_STEP_NUM_TASKS", 1)
    if "SLURM_PROCID" not in environment or count == 1 or count != tasks:
        return 1, None
    return count, f"{_first_host(environment)}:{_port(environment)}"


def _first_host(environment: Mapping[str, str]) -> str:
    """Return the first node of the step. Raises UserError if SLURM's list is missing or cannot be read."""
    name = next((name for name in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST") if environment.get(name)), None)
    if name is None:
        raise UserError("SLURM_PROCID is in the environment, but neither SLURM_STEP_NODELIST nor SLURM_JOB_NODELIST is")
    try:
        return hosts(environment[name])[0]
    except (ValueError, IndexError) as error:
        raise UserError(f"{name}={environment[name]!r} in the environment is no list of nodes") from error


def _port(environment: Mapping[str, str]) -> int:
    """Return the job's port: the same on all of its nodes, and usually different from the ports of other jobs."""
    return 20_000 + number(environment, "SLURM_JOB_ID", 0) % 20_000


def hosts(nodelist: str) -> list[str]:
    """Expand SLURM's short form of names: `gpu[01-03,7],login` -> gpu01, gpu02, gpu03, gpu7, login.

    Raises ValueError where it is none, or stands for more than MOST_NODES names.
    """
    found: list[str] = []
    for prefix, inside, suffix in re.findall(r"([^,\[\]]+)(?:\[([^\]]*)\])?([^,\[\]]*)", nodelist):
        for part in inside.split(",") if inside else [""]:
            first, _, last = part.partition("-")
            if last and int(last) - int(first) > MOST_NODES - len(found):
                raise ValueError(f"more than {MOST_NODES:,} nodes")
            numbers = [f"{i:0{len(first)}d}" for i in range(int(first), int(last) + 1)] if last else [first]
            found += [prefix + each + suffix for each in numbers]
    return found


def tasks_per_node(short: str) -> list[int]:
    """Expand SLURM's short form of counts: `4(x2),3` -> 4, 4, 3; those of the first MOST_NODES nodes."""
    parts = re.findall(r"(\d{1,9})(?:\(x(\d{1,9})\))?", short)
    every = (int(count) for count, times in parts for _ in range(int(times or 1)))
    return list(islice(every, MOST_NODES))
