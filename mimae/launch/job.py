"""The job to start: the ranks of this machine, and the meeting point with other machines."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mimae.errors import UserError
from mimae.launch import slurm
from mimae.ranks import messages

if TYPE_CHECKING:
    from mimae.config.recipe import RunRecipe

PORT = 29_400
"""Port at which nodes meet when --rendezvous or SLURM names only a host."""

SHORTEST = 16
"""Smallest number of characters of a secret."""

_LEGAL = f"legal are {SHORTEST} characters or more, as `openssl rand -hex 32` makes"


class Job(NamedTuple):
    """Description of the processes: `ranks` on this node, and `nodes` that meet at `rendezvous` (host:port)."""

    ranks: int
    nodes: int = 1
    rendezvous: str | None = None
    restarts: int = 3
    wait: int = 300
    """Seconds after which a node that is missing or silent counts as lost."""
    secret: str | None = None
    """Key that signs the messages between nodes; the same on all nodes."""

    @property
    def meeting(self) -> str | None:
        """Return host:port, with the default port if none is given."""
        if self.rendezvous is None or ":" in self.rendezvous:
            return self.rendezvous
        return f"{self.rendezvous}:{PORT}"


def default_job(
    ranks: int | None,
    nodes: int,
    rendezvous: str | None,
    restarts: int,
    wait: int = 300,
    secret_file: Path | None = None,
) -> Job:
    """Return a job, with defaults for the values that the command line leaves out.

    The default is one rank for each GPU, or one rank without GPUs. Under SLURM with one task for each node, the nodes
    and the meeting point are SLURM's. Raises UserError for options that contradict each other.
    """
    import torch

    if nodes == 1 and rendezvous is None and "RANK" not in os.environ:
        nodes, rendezvous = slurm.nodes(os.environ)
    if (nodes > 1) != (rendezvous is not None):
        raise UserError(
            "--nodes and --rendezvous go together: run the same command on each of the nodes, with --nodes N "
            "--rendezvous HOST:PORT, where HOST is one of them"
        )
    if rendezvous is not None:
        match = re.fullmatch(r"[^:\s]+(?::(\d{1,5}))?", rendezvous)
        if match is None or not 0 < int(match[1] or PORT) < 2**16:
            raise UserError(f"--rendezvous {rendezvous}: legal is HOST:PORT, or HOST (port {PORT})")
    secret = None if secret_file is None else read_secret(secret_file)
    secret = secret or checked(os.environ.get(messages.SECRET, ""), messages.SECRET) or None
    return Job(ranks or max(1, torch.cuda.device_count()), nodes, rendezvous, restarts, wait, secret)


def read_secret(file: Path) -> str:
    """Return the secret in a file. Raises UserError if others than its owner can read it, or if it is too short."""
    try:
        with file.open(errors="replace") as opened:
            mode = os.fstat(opened.fileno()).st_mode
            secret = opened.read(4096).strip()
    except OSError as error:
        raise UserError(f"--secret-file {file} cannot be read: {error.strerror}") from error
    if mode & 0o077:
        raise UserError(f"--secret-file {file} can be read by others: chmod 600 {file}")
    if not secret:
        raise UserError(f"--secret-file {file} is empty: {_LEGAL}")
    return checked(secret, f"--secret-file {file}")


def checked(secret: str, source: str) -> str:
    """Return a secret without the white space around it. Raises UserError if it is too short; "" is no secret."""
    found = secret.strip()
    if 0 < len(found) < SHORTEST:
        raise UserError(f"{source} has {len(found)} characters: {_LEGAL}")
    return found


def check_ranks(recipe: RunRecipe, ranks: int) -> None:
    """Check a recipe against the number of ranks, before any process starts or waits in a queue.

    Raises UserError if `batch_size` or `engine.replicas` does not fit the number of ranks.
    """
    schedule, replicas = recipe.schedule, recipe.engine.replicas
    if schedule.batch_size % (schedule.accumulate * ranks):
        raise UserError(
            f"schedule.batch_size = {schedule.batch_size} does not divide into {ranks} ranks x {schedule.accumulate} "
            f"micro-batches; make it a multiple of {schedule.accumulate * ranks}"
        )
    if ranks % replicas:
        raise UserError(f"engine.replicas={replicas} does not divide the {ranks} ranks of the run")
