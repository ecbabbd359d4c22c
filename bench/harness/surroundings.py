"""Faults of what surrounds a run: terminal and log, launcher and workers, shared memory, directory, clock."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

from mimae.bench.harness.mounts import small_disk
from mimae.bench.harness.trial import Trial, at_its_step
from mimae.errors import EXIT_MISTAKE

LOG = 1 << 14
"""Bytes of the disk of a log."""

SHARED = "1m"
"""Size of a small /dev/shm."""


def hang_up_ignored(trial: Trial) -> None:
    """SIGHUP to the launcher and all ranks under nohup, as when an SSH session closes: the run goes on."""
    start = at_its_step(trial, prefix=["nohup"])
    os.killpg(start.process.pid, signal.SIGHUP)
    trial.prove(_ignores(start.process.pid, signal.SIGHUP), "SIGHUP is ignored")
    trial.prove(start.end() == 0, "ended with 0")
    trial.prove(not trial.events("signal"), "no signal seen")


def close_stdout(trial: Trial) -> None:
    """The reader of stdout goes, as `| head` does: the run goes on, and keeps that lines were lost."""
    start = at_its_step(trial, reader=True)
    start.hang_up()
    trial.prove(start.end() == 0, "ended with 0")
    _prove_lost_output(trial, "Broken pipe")


def fill_the_log(trial: Trial) -> None:
    """The disk of stdout's file is full: the run goes on, and keeps that lines were lost."""
    folder = trial.folder / "log"
    with small_disk(folder, LOG):
        start = at_its_step(trial, log=folder / "output.txt")
        _fill(folder / "filler")
        _fill(folder / "output.txt")  # the rest of its last page
        trial.prove(start.end() == 0, "ended with 0")
    _prove_lost_output(trial, "No space left on device")


def fill_shared_memory(trial: Trial) -> None:
    """No room is left in a small /dev/shm, as in a container: batches, which need none there, go on."""
    mount = f'mount -t tmpfs -o size={SHARED} tmpfs /dev/shm && exec "$@"'
    start = at_its_step(trial, "data.workers=1", prefix=["unshare", "--mount", "sh", "-c", mount, "sh"])
    filler = Path(f"/proc/{trial.pid(0)}/root/dev/shm/filler")
    _fill(filler)
    full = trial.steps_done()
    start.wait_for(lambda: trial.steps_done() > full + 1, "steps with a full /dev/shm")
    filler.unlink()  # Processes that start later, for an evaluation, need room for their locks.
    trial.prove(start.end() == 0, "steps with a full /dev/shm; ended with 0")


def rename_the_run(trial: Trial) -> None:
    """The run's directory gets another name: the run goes on there, and the same command with the new name."""
    start = at_its_step(trial)
    before, trial.run = trial.run, trial.folder / "renamed"
    before.rename(trial.run)
    trial.prove(start.end() == 0, "ended with 0")
    trial.prove(len(trial.events("moved")) == 1 and not before.exists(), "told once, and nothing is left behind")


def kill_the_launcher(trial: Trial) -> None:
    """SIGKILL of the launcher alone: its ranks end by themselves."""
    start = at_its_step(trial)
    ranks = [trial.pid(rank) for rank in range(trial.ranks)]
    start.process.kill()
    start.process.wait()
    end = time.monotonic() + 60
    while any(map(_is_alive, ranks)) and time.monotonic() < end:
        time.sleep(0.1)
    trial.prove(not any(map(_is_alive, ranks)), f"{len(ranks)} ranks ended by themselves")


def kill_a_worker(trial: Trial) -> None:
    """SIGKILL of a process that makes the batches of a rank: one error that says so."""
    start = at_its_step(trial, "data.workers=1")
    workers = _children(trial.pid(trial.rank))
    os.kill(workers[0], signal.SIGKILL)
    trial.prove(start.end() == EXIT_MISTAKE, f"exit code {EXIT_MISTAKE}")
    trial.prove("worker" in start.output and "Traceback" not in start.output, "the worker's end is told in words")


def clock_set_back(trial: Trial) -> None:
    """The time of day of all ranks goes back by a day. (A namespace of Linux moves only the clocks since the boot.)"""
    start = trial.start("clock")
    trial.reach(start)
    trial.keep_in_mind()
    trial.prove(start.end() == 0, "ended with 0")
    times = [event["time"] for event in (*trial.events("start"), *trial.events("finish"))]
    trial.prove(times[-1] < times[0], f"events of {times[0]} and then of {times[-1]}")


def _fill(file: Path) -> None:
    """Write to a file until its disk is full."""
    with suppress(OSError), file.open("ab", buffering=0) as opened:
        while True:
            opened.write(bytes(64))


def _prove_lost_output(trial: Trial, reason: str) -> None:
    found = [event["details"]["reason"] for event in trial.events("output lost")]
    trial.prove(reason in found, f"output lost: {reason}")


def _ignores(pid: int, number: signal.Signals) -> bool:
    """Return whether a process ignores a signal."""
    status = Path(f"/proc/{pid}/status").read_text()
    ignored = next(line for line in status.splitlines() if line.startswith("SigIgn"))
    return bool(int(ignored.split()[1], 16) >> (number - 1) & 1)


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
