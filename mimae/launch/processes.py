"""The processes of a run: one for each GPU of this machine, joined with those of others; or a rank of a job that
torchrun or SLURM started.

The processes are torch.distributed's elastic agent's. It starts them again after one of them died, and the run goes on
from its last checkpoint. Each leaves a note of how it ended, and this process tells the one that matters.
"""

from __future__ import annotations

import faulthandler
import fcntl
import json
import logging
import os
import re
import signal
import socket
import struct
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple

from mimae.errors import EXIT_MISTAKE, EXIT_SAVED, UserError
from mimae.faults.watchdog import Hangs
from mimae.files import write_atomically

if TYPE_CHECKING:
    from mimae.config.recipe import Recipe

PORT = 29_400
"""Where nodes meet when --rendezvous or SLURM names a host alone."""

_PATIENCE = 2.0
"""Seconds between two looks at whether the launcher still lives."""


_SIOCGIFADDR = 0x8915
"""Linux: ask for the address of an interface."""


class Job(NamedTuple):
    """Which processes: `ranks` on this node, of `nodes` that meet at `rendezvous` (host:port)."""

    ranks: int
    nodes: int = 1
    rendezvous: str | None = None
    restarts: int = 3
    wait: int = 300
    """Seconds after which a node that does not come, or of which nothing is heard, is lost."""


class Note(NamedTuple):
    """How a rank ended: done, saved (on a signal), mistake (the user's) or error, with what to tell of the last
    two."""

    kind: str
    rank: int
    attempt: int
    time: float
    text: str = ""
    summary: str = ""


def pretrain(recipe: str, overrides: Sequence[str], job: Job) -> int:
    """Runs a recipe in the processes of `job`, or as the rank that this process already is; returns the exit code.

    Raises UserError.
    """
    joined = "RANK" in os.environ or join_slurm(os.environ)
    if joined or job.ranks * job.nodes == 1:
        import mimae

        outcome = mimae.pretrain(recipe, *overrides)
        # torchrun takes any code but 0 for a failure of the worker.
        return EXIT_SAVED if outcome.saved_on_signal and "TORCHELASTIC_RUN_ID" not in os.environ else 0
    from mimae.config.load import load_recipe

    # A mistake in the recipe is told before any process starts.
    return _launch(recipe, overrides, job, load_recipe(recipe, overrides).recipe)


def default_job(ranks: int | None, nodes: int, rendezvous: str | None, restarts: int, wait: int = 300) -> Job:
    """What the command line leaves open: a rank for each GPU, one where there is none; under SLURM with a task a node,
    its nodes. Raises UserError for what does not go together."""
    import torch

    if nodes == 1 and rendezvous is None and "RANK" not in os.environ:
        nodes, rendezvous = _slurm_nodes(os.environ)
    if (nodes > 1) != (rendezvous is not None):
        raise UserError(
            "--nodes and --rendezvous go together: on each of the nodes the same command with --nodes N "
            "--rendezvous HOST:PORT, HOST being one of them"
        )
    if rendezvous is not None and not re.fullmatch(r"[^:\s]+(:\d+)?", rendezvous):
        raise UserError(f"--rendezvous {rendezvous}: legal is HOST:PORT, or HOST (port {PORT})")
    return Job(ranks or max(1, torch.cuda.device_count()), nodes, rendezvous, restarts, wait)


# SLURM


def join_slurm(environment: dict[str, str] | os._Environ[str]) -> bool:
    """Whether srun started this process as one of several ranks; then gives it the variables that torchrun sets."""
    # A batch script has a task number too, but no step.
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    if "SLURM_PROCID" not in environment or tasks == 1 or _slurm_nodes(environment)[0] > 1:
        return False
    hosts = _hosts(environment.get("SLURM_STEP_NODELIST", environment["SLURM_JOB_NODELIST"]))
    counts = _tasks_per_node(environment.get("SLURM_STEP_TASKS_PER_NODE", environment.get("SLURM_TASKS_PER_NODE", "1")))
    environment |= {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": str(tasks),
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(counts[int(environment.get("SLURM_NODEID", "0"))]),
        "MASTER_ADDR": hosts[0],
        "MASTER_PORT": str(_slurm_port(environment)),
    }
    return True


def _slurm_nodes(environment: Mapping[str, str]) -> tuple[int, str | None]:
    """Nodes and meeting point, where srun started one task on each of several nodes."""
    nodes = int(environment.get("SLURM_STEP_NUM_NODES", environment.get("SLURM_NNODES", "1")))
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    if "SLURM_PROCID" not in environment or nodes == 1 or nodes != tasks:
        return 1, None
    hosts = _hosts(environment.get("SLURM_STEP_NODELIST", environment["SLURM_JOB_NODELIST"]))
    return nodes, f"{hosts[0]}:{_slurm_port(environment)}"


def _slurm_port(environment: Mapping[str, str]) -> int:
    """The same on all nodes of a job, another for another job."""
    return 20_000 + int(environment.get("SLURM_JOB_ID", "0")) % 20_000


def _hosts(nodelist: str) -> list[str]:
    """The names in SLURM's short form: `gpu[01-03,7],login` -> gpu01, gpu02, gpu03, gpu7, login."""
    hosts = []
    for prefix, inside, suffix in re.findall(r"([^,\[\]]+)(?:\[([^\]]*)\])?([^,\[\]]*)", nodelist):
        for part in inside.split(",") if inside else [""]:
            first, _, last = part.partition("-")
            numbers = [f"{i:0{len(first)}d}" for i in range(int(first), int(last) + 1)] if last else [first]
            hosts += [prefix + number + suffix for number in numbers]
    return hosts


def _tasks_per_node(short: str) -> list[int]:
    """`4(x2),3` -> 4, 4, 3."""
    parts = re.findall(r"(\d+)(?:\(x(\d+)\))?", short)
    return [int(count) for count, times in parts for _ in range(int(times or 1))]


# The launcher


def _launch(recipe: str, overrides: Sequence[str], job: Job, resolved: Recipe) -> int:
    """Starts the ranks, passes signals on to them, and returns the exit code of what became of them."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from mimae.launch import nodes

    nodes.register()
    for talker in ("torch.distributed.elastic", "torch.multiprocessing"):
        logging.getLogger(talker).setLevel(logging.CRITICAL)  # What they would say is told below.
    cores = len(os.sched_getaffinity(0))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // job.ranks)))
    # Otherwise ranks that are started again find, in the store that torch's agent keeps, the addresses of dead ones.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    address, rendezvous = _addresses(job)
    with tempfile.TemporaryDirectory(prefix="mimae-") as folder:
        notes = Path(folder)
        config = LaunchConfig(
            min_nodes=job.nodes,
            max_nodes=job.nodes,
            nproc_per_node=job.ranks,
            run_id="mimae",
            rdzv_backend=nodes.BACKEND,
            rdzv_endpoint=_meeting(job),
            rdzv_configs=rendezvous,
            local_addr=address,
            max_restarts=job.restarts,
            monitor_interval=0.5,
            signals_to_handle="SIGHUP",  # The others are for the ranks: the agent would kill them while they save.
        )
        failed = None
        with _passing_signals(notes), Hangs(Path(resolved.run.dir), lambda: _processes(notes)) as hangs:
            try:
                elastic_launch(config, _rank)(recipe, list(overrides), str(notes), os.getpid())
            except ChildFailedError as error:
                failed = error.get_first_failure()
            except nodes.NodeLost as error:
                print(f"mimae: {error}", file=sys.stderr)
                return 1
        found = _read(notes)
        kinds = {note.kind for note in found}
        # Where a signal came before any rank had begun, there is nothing to save.
        if "saved" in kinds or ((notes / "stop").exists() and not kinds):
            return EXIT_SAVED
        if failed is None and not kinds & {"mistake", "error"}:
            return 0
        if failed is None:  # Told to stop, ranks failed; those that the agent then started again had nothing to do.
            return _tell(found, found[0].rank, 1, partial(_advice, resolved, job))
        if failed[1].pid in hangs.ended:
            print(
                "mimae: the run hung, as told above; the same command goes on from the last checkpoint", file=sys.stderr
            )
            return 1
        return _tell(found, failed[0], failed[1].exitcode, partial(_advice, resolved, job))


def _meeting(job: Job) -> str:
    if job.rendezvous is None:
        return "localhost:0"
    return job.rendezvous if ":" in job.rendezvous else f"{job.rendezvous}:{PORT}"


def _addresses(job: Job) -> tuple[str, dict[str, Any]]:
    """The address by which the other nodes reach this one, which is that of the way to the meeting point, and how the
    meeting is set up. Raises UserError."""
    waits = {"join_timeout": job.wait, "read_timeout": job.wait}
    if job.rendezvous is None:
        return "localhost", waits
    host, _, port = _meeting(job).partition(":")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, int(port)))  # No packet is sent.
        except OSError as error:
            raise UserError(f"--rendezvous {host}:{port} cannot be reached from here: {error.strerror}") from error
        own, meeting = probe.getsockname()[0], probe.getpeername()[0]
        if own.startswith("127."):
            if host not in (meeting, "localhost"):
                raise UserError(f"--rendezvous {host} is {meeting} here, where no other finds it: give its address")
            return own, waits  # All on one machine: who comes first holds the store.
        # gloo would take the interface of the address that this machine's name stands for, or the loopback.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", _interface(probe, own))
    return own, waits | {"is_host": own == meeting}


def _interface(probe: socket.socket, address: str) -> str:
    """The network interface that has an address. Raises UserError."""
    for _, name in socket.if_nameindex():
        try:
            found = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()))
        except OSError:
            continue  # It has none.
        if socket.inet_ntoa(found[20:24]) == address:
            return name
    raise UserError(f"{address}, the way to --rendezvous, is not the first address of a network interface")


@contextmanager
def _passing_signals(notes: Path) -> Iterator[None]:
    """SIGTERM, SIGUSR1 and Ctrl-C reach every rank as SIGTERM, to save and stop; a second Ctrl-C ends at once."""
    stop = notes / "stop"

    def pass_on(number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and stop.exists():
            raise KeyboardInterrupt
        stop.touch()
        for pid in _processes(notes).values():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _processes(notes: Path) -> dict[int, int]:
    """Process ids by rank, of this node's last attempt."""
    return {int(file.name[4:]): int(file.read_text()) for file in notes.glob("pid-*")}


def _advice(recipe: Recipe, job: Job) -> str:
    from mimae.faults.shortage import advice

    return advice(recipe, job.ranks * job.nodes, job.ranks)


def _tell(found: list[Note], rank: int, code: int, advice: Callable[[], str]) -> int:
    """Prints what ended the run, once, and returns the exit code; with `advice` where memory may have run out. The rank
    that failed first may have been killed, and left no note; what its peers say then is that they lost it."""
    if mistakes := [note for note in found if note.kind == "mistake"]:
        print(f"mimae: {mistakes[0].text}", file=sys.stderr)
        return EXIT_MISTAKE
    if code < 0:
        name = signal.Signals(-code).name
        was_killed = -code == signal.SIGKILL
        hint = ": most often because the machine's memory ran out" if was_killed else ""
        print(
            f"mimae: rank {rank} was ended by {name}{hint}; the same command goes on from the last checkpoint",
            file=sys.stderr,
        )
        if was_killed:
            print(advice(), file=sys.stderr)
    elif errors := [note for note in found if note.kind == "error"]:
        print(f"mimae: rank {errors[0].rank} failed first:\n{errors[0].text}", file=sys.stderr)
    else:
        print(f"mimae: rank {rank} ended with exit code {code} and no word", file=sys.stderr)
    return 1


def _read(notes: Path) -> list[Note]:
    """The notes of the last attempt, the earliest first."""
    found = [Note(**json.loads(file.read_text())) for file in notes.glob("note-*.json")]
    last = max((note.attempt for note in found), default=0)
    return sorted(
        (note for note in found if note.attempt == last or note.kind == "mistake"), key=lambda note: note.time
    )


# A rank


def _rank(recipe: str, overrides: list[str], folder: str, launcher: int) -> None:
    """What the agent runs as each rank."""
    notes, rank = Path(folder), int(os.environ["RANK"])
    if any(note.kind == "mistake" for note in _read(notes)):
        sys.exit(EXIT_MISTAKE)  # The agent starts ranks again whatever they died of; a mistake stays one.
    # Until the run takes the signals itself: Ctrl-C reaches the whole group, and is the launcher's to pass on.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.register(signal.SIGUSR2)
    threading.Thread(target=_save_when_alone, args=(launcher,), daemon=True).start()
    write_atomically(notes / f"pid-{rank}", str(os.getpid()))
    if (notes / "stop").exists():  # Whoever stops looks for this number, or this rank finds the word.
        return
    if rank == 0 and (attempt := int(os.environ["TORCHELASTIC_RESTART_COUNT"])):
        print(f"start {attempt + 1}, after a rank was lost{_last_words(notes)}", flush=True)
    try:
        import mimae

        outcome = mimae.pretrain(recipe, *overrides)
    except UserError as mistake:
        _leave(notes, "mistake", str(mistake))
        sys.exit(EXIT_MISTAKE)
    except BaseException as error:
        summary = " ".join(f"{type(error).__name__}: {error}".split())
        _leave(notes, "error", traceback.format_exc(), summary[:120])
        sys.exit(1)
    if os.getppid() != launcher:
        os._exit(EXIT_SAVED)  # torch's agent would have let it go; without one it would wait for that for ever.
    _leave(notes, "saved" if outcome.saved_on_signal else "done")


def _last_words(notes: Path) -> str:
    """What was raised first in the attempt before."""
    errors = [note for note in _read(notes) if note.kind == "error"]
    return f"; its peers, or it, said {errors[0].summary}" if errors else ""


def _leave(notes: Path, kind: str, text: str = "", summary: str = "") -> None:
    rank, attempt = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    note = Note(kind, rank, attempt, time.time(), text, summary)
    write_atomically(notes / f"note-{attempt}-{rank}.json", json.dumps(note._asdict()))


def _save_when_alone(launcher: int) -> None:
    """A rank whose launcher was killed saves and ends, as all of them do."""
    while os.getppid() == launcher:
        time.sleep(_PATIENCE)
    os.kill(os.getpid(), signal.SIGTERM)
