"""Helpers for a process that trains and is killed, and for the ids that it had processed."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from mimae.data.loading.batch import Batch
from tests.rank_processes import own_process


def tell(batches: Iterable[Batch], told: Connection) -> None:
    """Send the step and the ids of each batch, and wait for a message before continuing."""
    for batch in batches:
        told.send((batch.step, batch.sample_ids.tolist()))
        told.recv()


def ids_through_kills(train: Callable[..., None], *args: Any) -> list[int]:
    """Return the ids of 11 steps of `train(*args, first_step, told)`, killed after step 4 and again after step 7."""
    seen: list[int] = []
    step = 0
    for end in (4, 7, 11):
        ours, theirs = Pipe()
        process = own_process(train, *args, step, theirs)
        process.start()
        theirs.close()
        while step < end:
            told, ids = ours.recv()
            assert told == step
            seen, step = seen + ids, step + 1
            if step < end or end == 11:
                ours.send(None)
        if end < 11:
            process.kill()
        process.join()
        assert process.exitcode == (-signal.SIGKILL if end < 11 else 0)
    return seen
