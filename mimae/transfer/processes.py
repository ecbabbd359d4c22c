"""Processes on this machine that share independent work, and report their progress."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

from mimae.errors import RunError, UserError

Work = Callable[..., None]
"""Function work(*arguments, rank, ranks, done) that does a rank's share and calls done(count) to report progress."""


def share(work: Work, arguments: tuple[Any, ...], ranks: int, done: Callable[[int], None]) -> None:
    """Run `work`, a function of a module, in `ranks` new processes, and call `done` with the progress that they report.

    Raises the UserError that a process raised, and RunError if a process died. The other processes are then ended. They
    also end if this process ends for any reason.
    """
    context = multiprocessing.get_context("spawn")
    running = {}
    try:
        for rank in range(ranks):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_rank, args=(theirs, work, arguments, rank, ranks))
            process.start()
            theirs.close()
            running[ours] = process
        while running:
            for connection in wait(list(running)):
                assert isinstance(connection, Connection)
                try:
                    told = connection.recv()
                except EOFError:
                    process = running[connection]
                    process.join()
                    raise RunError(
                        f"process {process.pid} of {ranks} ended with exit code {process.exitcode} before its work was "
                        "done; the same command continues from the finished part"
                    ) from None
                if isinstance(told, str):
                    raise UserError(told)
                if told is None:
                    running.pop(connection).join()
                else:
                    done(told)
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.join()


def _rank(connection: Connection, work: Work, arguments: tuple[Any, ...], rank: int, ranks: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # The parent gets the signal too, and ends this process.
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["LOCAL_WORLD_SIZE"] = str(ranks)  # The number of processes that share the cores.
    try:
        work(*arguments, rank, ranks, connection.send)
        connection.send(None)
    except UserError as mistake:
        connection.send(str(mistake))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
