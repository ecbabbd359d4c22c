"""The launcher: it starts the processes of a run on this machine, and restarts them when one of them dies.

The run then resumes from its last checkpoint. Ranks leave notes of how they ended, and the launcher prints the note
that explains the failure. A run on one machine cannot be reached from other machines: its ranks meet in a file in a
private folder and listen only on the loopback interface. Several machines meet through `nodes`.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NamedTuple

import torch.distributed as dist

from mimae.errors import EXIT_MISTAKE, EXIT_SAVED
from mimae.faults.signals import handled
from mimae.launch import network, notes, slurm
from mimae.launch.hangs import Hangs
from mimae.launch.job import Job, check_ranks, default_job
from mimae.launch.nodes import AGAIN, NodeLost, Nodes, Order, State
from mimae.launch.notes import Note
from mimae.launch.rank import ATTEMPT
from mimae.outside.text import say
from mimae.ranks import messages, place

if TYPE_CHECKING:
    from mimae.config.recipe import RunRecipe

__all__ = ["Job", "default_job", "train"]

RANK = "mimae.launch.rank"
"""The module that is run as each rank."""

_LOOK = 0.1
"""Seconds between two looks at the ranks."""

_STOPPING = 30.0
"""Seconds that a rank has to exit after SIGTERM, before it is killed."""


def train(recipe: str, overrides: Sequence[str], job: Job) -> int:
    """Run a recipe in the processes of `job`, or as the rank that this process already is; return the exit code.

    Raises UserError.
    """

    if not os.environ.get("RANK"):
        slurm.join(os.environ, slurm.has_terminal())
    if place.find() is not None or job.ranks * job.nodes == 1:
        import mimae

        outcome = mimae.run(recipe, *overrides)
        # torchrun treats every exit code other than 0 as a failure of the worker.
        return EXIT_SAVED if outcome.saved_on_signal and "TORCHELASTIC_RUN_ID" not in os.environ else 0
    from mimae.config.load import load_recipe
    from mimae.config.recipe import RunRecipe

    # A mistake in the recipe is reported before any process starts.
    resolved = load_recipe(recipe, overrides, None, RunRecipe).recipe
    if job.nodes == 1:  # Nodes may have different numbers of ranks.
        check_ranks(resolved, job.ranks)
    with tempfile.TemporaryDirectory(prefix="mimae-") as folder:
        return _Launcher([recipe, *overrides], job, resolved, Path(folder)).run()


class _Failure(NamedTuple):
    """The rank that failed first, as observed by the launcher."""

    rank: int
    pid: int
    code: int


class _Ranks:
    """This node's ranks of one attempt."""

    def __init__(self) -> None:
        self.started: dict[int, subprocess.Popen[bytes]] = {}

    def start(self, rank: int, arguments: Sequence[str], environment: dict[str, str]) -> None:
        """Start a rank in a Python process that has this process's module path."""
        environment = environment | {"PYTHONPATH": os.pathsep.join(folder or os.getcwd() for folder in sys.path)}
        command = [sys.executable, "-P", "-m", RANK, *arguments]
        self.started[rank] = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL)

    @property
    def pids(self) -> dict[int, int]:
        """Process ids by rank."""
        return {rank: process.pid for rank, process in self.started.items()}

    def is_done(self) -> bool:
        """Return whether all ranks have exited with code 0."""
        return all(process.poll() == 0 for process in self.started.values())

    def has_failed(self) -> bool:
        """Return whether a rank has exited with a code other than 0."""
        return any(process.poll() not in (None, 0) for process in self.started.values())

    def failure(self, found: Sequence[Note]) -> _Failure:
        """Return the rank that failed.

        If several failed, a rank that a signal killed is taken as the cause of the others' errors; otherwise the rank
        whose note is the earliest.
        """
        times = {note.rank: note.time for note in found}
        failed = [
            _Failure(rank, process.pid, process.returncode)
            for rank, process in self.started.items()
            if process.poll() not in (None, 0)
        ]
        return min(failed, key=lambda each: (each.code >= 0, times.get(each.rank, 0.0)))

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the running ranks."""
        for process in list(self.started.values()):
            process.send_signal(number)

    def end(self, meanwhile: Callable[[], object]) -> None:
        """End the running ranks by SIGTERM, and after `_STOPPING` seconds by SIGKILL."""
        self.send(signal.SIGTERM)
        end = time.monotonic() + _STOPPING
        while any(process.poll() is None for process in self.started.values()):
            if time.monotonic() > end:
                self.send(signal.SIGKILL)
            time.sleep(_LOOK)
            meanwhile()


class _Launcher:
    """One run on one machine."""

    def __init__(self, command: list[str], job: Job, recipe: RunRecipe, folder: Path) -> None:
        self.command, self.job, self.recipe, self.folder = command, job, recipe, folder
        self.ranks, self.hangs = _Ranks(), Hangs(Path(recipe.run.dir))
        self.failure: _Failure | None = None
        self.attempt = 0
        self.began, self.looked = time.monotonic(), 0.0
        self.environment = dict(os.environ)
        for left_over in ("MASTER_ADDR", "MASTER_PORT"):
            self.environment.pop(left_over, None)
        cores = len(os.sched_getaffinity(0))
        self.environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // job.ranks)))

    def run(self) -> int:
        """Start the ranks, forward signals to them, and return the exit code of the run."""
        try:
            nodes = self._meet()
            with handled(self._pass_on):
                last = self._follow(nodes)
        except NodeLost as lost:
            say(f"mimae: {lost}", error=True)
            return 1
        return self._verdict(last)

    def _meet(self) -> Nodes:
        """Join the other nodes. Raises UserError, NodeLost."""
        job, name = self.job, socket.gethostname()
        if job.secret is not None:
            os.environ[messages.SECRET] = self.environment[messages.SECRET] = job.secret
        if job.meeting is None:
            # These replace the interfaces that the user may have set for a cluster's network.
            self.environment |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "=lo"}
            store: dist.Store = dist.HashStore()
            leads, where = True, "this machine"
            self.store = f"file:{self.folder}/store-"
        else:
            way = network.find_way(job.meeting)
            # By default gloo uses the interface of the address that this machine's host name resolves to, or the
            # loopback.
            self.environment.setdefault("GLOO_SOCKET_IFNAME", way.interface)
            if way.interface == "lo":
                self.environment["NCCL_SOCKET_IFNAME"] = "=lo"
            where, name = job.meeting, f"{name} ({way.own})"
            self.store = f"tcp:{way.host}:{way.port}:round-"
            try:
                store, leads = network.open_store(way, job.wait)
            except RuntimeError as error:
                raise NodeLost(
                    f"{where}, where nodes meet, did not answer within {job.wait} s; {AGAIN.partition(',')[0]}"
                ) from error
        return Nodes(
            store,
            leads=leads,
            nodes=job.nodes,
            ranks=job.ranks,
            name=name,
            where=where,
            wait=job.wait,
            restarts=job.restarts,
        )

    def _follow(self, nodes: Nodes) -> Order:
        """Follow the orders until the run ends, and return the last order. Raises NodeLost."""
        state = State("new", -1)
        try:
            while (order := self._order(nodes, state)).kind != "end":
                if notes.is_asked_to_stop(self.folder) and state.kind not in ("running", "done"):
                    break
                state = self._obey(nodes, order, state)
                time.sleep(_LOOK)
            return order
        finally:
            self.ranks.end(meanwhile=lambda: None)
            nodes.leave(f"{nodes.name} ended: {state.text or 'it was asked to stop'}")

    def _order(self, nodes: Nodes, state: State) -> Order:
        try:
            return nodes.exchange(state)
        except NodeLost:
            if state.kind == "done":  # Another node may have ended a moment before this one.
                return Order("end", state.round, end="done")
            raise

    def _obey(self, nodes: Nodes, order: Order, state: State) -> State:
        """Carry out the next part of an order, and return the state after it. Raises NodeLost."""
        if order.kind == "gather" and order.round > state.round:
            self.ranks.end(meanwhile=partial(nodes.exchange, state))
            if self.job.nodes > 1:
                again = ", after a rank or a node was lost" if order.round else ""
                say(f"waiting up to {self.job.wait} s for {self.job.nodes} nodes at {nodes.where}{again}")
            return State("ready", order.round)
        if order.kind == "run" and state.kind in ("new", "ready"):
            first = order.first_rank(nodes.token)
            if first is not None and order.round == state.round:
                return self._start(order, first)
            if time.monotonic() - self.began > self.job.wait:
                raise NodeLost(f"the run at {nodes.where} has all of its {self.job.nodes} nodes already")
        if state.kind == "running":
            return self._watch(nodes, state)
        return state

    def _start(self, order: Order, first: int) -> State:
        self.failure, self.ranks, self.attempt = None, _Ranks(), order.round
        for local in range(self.job.ranks):
            variables = {
                "RANK": str(first + local),
                "WORLD_SIZE": str(order.ranks()),
                "LOCAL_RANK": str(local),
                "LOCAL_WORLD_SIZE": str(self.job.ranks),
                place.STORE: f"{self.store}{order.round}",
                ATTEMPT: str(order.round),
            }
            arguments = [str(self.folder), str(os.getpid()), *self.command]
            self.ranks.start(first + local, arguments, self.environment | variables)
        return State("running", order.round)

    def _watch(self, nodes: Nodes, state: State) -> State:
        """Check the ranks; if one has failed, end the others."""
        if self.ranks.is_done():
            return state._replace(kind="done")
        has_failed = self.ranks.has_failed()
        if has_failed or time.monotonic() - self.looked > 1:
            self.hangs.look(self.ranks.pids)
            self.looked = time.monotonic()
        if not has_failed:
            return state
        found = notes.read(self.folder, state.round)
        self.failure = self.ranks.failure(found)
        self.ranks.end(meanwhile=partial(nodes.exchange, state))
        if mistakes := [note.text for note in found if note.kind == "mistake"]:
            return state._replace(kind="mistake", text=mistakes[0])
        return state._replace(kind="failed", text=f"{nodes.name}: {_summary(self.failure, found)}")

    def _pass_on(self, number: int, _: FrameType | None) -> None:
        """Forward a signal to every rank as SIGTERM, so that it saves and stops. A second Ctrl-C kills all at once."""
        if number == signal.SIGINT and notes.is_asked_to_stop(self.folder):
            raise KeyboardInterrupt
        notes.ask_to_stop(self.folder)  # This reaches the ranks that have not begun.
        self.ranks.send(signal.SIGTERM)

    def _verdict(self, last: Order) -> int:
        """Report the reason for which the run ended, and return the exit code."""
        found = notes.read(self.folder, self.attempt)
        kinds = {note.kind for note in found}
        is_asked = notes.is_asked_to_stop(self.folder)
        if last.end == "lost" or (self.failure is None and last.end in ("failed", "mistake") and not is_asked):
            say(f"mimae: {last.text}", error=True)
            return EXIT_MISTAKE if last.end == "mistake" else 1
        if "saved" in kinds:
            return EXIT_SAVED
        was_early = not kinds or (self.failure is not None and self.failure.code == -signal.SIGTERM)
        if is_asked and "done" not in kinds and was_early:
            return EXIT_SAVED  # There was nothing to save: a rank had not begun yet.
        if self.failure is None:
            return 0
        if self.failure.pid in self.hangs.ended:
            say("mimae: the run hung, see above; run the same command to resume from the last checkpoint", error=True)
            return 1
        return _tell(found, self.failure.rank, self.failure.code, self._advice)

    def _advice(self) -> str:
        from mimae.faults.shortage import advice

        return advice(self.recipe, self.job.ranks * self.job.nodes, self.job.ranks)


def _summary(failure: _Failure, found: Sequence[Note]) -> str:
    """Return one line for the other nodes that describes how a rank failed."""
    if failure.code < 0:
        return f"rank {failure.rank} was ended by {signal.Signals(-failure.code).name}"
    reason = next((note.summary for note in found if note.kind == "error"), f"exit code {failure.code}")
    return f"rank {failure.rank} failed: {reason}"


def _tell(found: Sequence[Note], rank: int, code: int, advice: Callable[[], str]) -> int:
    """Print the reason for which the run ended, once, and return the exit code.

    `advice` is added if memory may have run out. The rank that failed first may have been killed without a note; the
    notes of its peers then only say that they lost it.
    """
    if mistakes := [note for note in found if note.kind == "mistake"]:
        say(f"mimae: {mistakes[0].text}", error=True)
        return EXIT_MISTAKE
    if code < 0:
        name = signal.Signals(-code).name
        was_killed = -code == signal.SIGKILL
        hint = ", most often because the machine's memory ran out" if was_killed else ""
        say(
            f"mimae: rank {rank} was ended by {name}{hint}; run the same command to resume from the last checkpoint",
            error=True,
        )
        if was_killed:
            say(advice(), error=True)
    elif errors := [note for note in found if note.kind == "error"]:
        say(f"mimae: rank {errors[0].rank} failed first:\n{errors[0].text}", error=True)
    else:
        say(f"mimae: rank {rank} ended with exit code {code} and left no message", error=True)
    return 1
