"""The place of this process among the ranks of a job, as torchrun, srun or mimae's launcher write it into the
environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple

from mimae.errors import UserError

STORE = "MIMAE_STORE"
"""Name of the variable in which mimae's launcher gives its ranks their meeting point: `file:PATH` or
`tcp:HOST:PORT:PREFIX`."""

_ALL = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Place(NamedTuple):
    """The number of a rank, and the number of ranks of the job."""

    rank: int
    ranks: int


def find(environment: Mapping[str, str] = os.environ) -> Place | None:
    """Return the place that the environment gives this process, or None if it was not started as a rank.

    Raises UserError for variables that are incomplete or not numbers; most often they are left over from another job.
    """
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        number(environment, name, 0)
    ranks = number(environment, "WORLD_SIZE", 1, least=1)
    if not environment.get("RANK"):
        if ranks > 1:
            raise UserError(
                f"WORLD_SIZE={ranks} is in the environment but RANK is not: torchrun and srun set both. If WORLD_SIZE "
                "is left over, `unset WORLD_SIZE`; for several processes give --ranks"
            )
        return None
    rank = number(environment, "RANK", 0)
    needed = _ALL[:2] if environment.get(STORE) or environment.get("WORLD_SIZE") == "1" else _ALL
    if missing := [name for name in needed if not environment.get(name)]:
        raise UserError(
            f"RANK={rank} is in the environment without {', '.join(missing)}, which torchrun and srun set with it. If "
            "RANK is left over, `unset RANK`"
        )
    if rank >= ranks:
        raise UserError(f"RANK={rank} in the environment: legal is 0 to {ranks - 1}, since WORLD_SIZE={ranks}")
    if number(environment, "MASTER_PORT", 1) > 65_535:
        raise UserError(f"MASTER_PORT={environment['MASTER_PORT']} in the environment: legal is 1 to 65535")
    return Place(rank, ranks)


def number(environment: Mapping[str, str], name: str, default: int, least: int = 0) -> int:
    """Return a variable's number, or `default` if it is not set. Raises UserError that names the variable."""
    text = environment.get(name) or str(default)
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise UserError(f"{name}={text!r} in the environment: legal are whole numbers from {least}; or unset {name}")
    return value
