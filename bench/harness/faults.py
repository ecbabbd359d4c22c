"""The faults of the drill. Each starts a run, injects the fault and checks that it fired; the drill then lets the run
finish and compares it."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from mimae.bench.harness.mounts import read_only, small_disk
from mimae.bench.harness.surroundings import (
    clock_set_back,
    close_stdout,
    fill_shared_memory,
    fill_the_log,
    hang_up_ignored,
    kill_a_worker,
    kill_the_launcher,
    rename_the_run,
)
from mimae.bench.harness.trial import EVERY, STEPS, NotSeen, Start, Trial, at_its_step, half_written, saved
from mimae.errors import EXIT_MISTAKE

DISK = 2**21
"""Bytes of a small disk, with room for more than three checkpoints."""


def kill_a_rank(trial: Trial) -> None:
    """SIGKILL of one rank; the launcher restarts all ranks by itself."""
    start = at_its_step(trial)
    pid = trial.pid(trial.rank)
    os.kill(pid, signal.SIGKILL)
    trial.prove(start.end() == 0, "ended with 0")
    trial.prove("start 2, after a rank was lost" in start.output, f"rank {trial.rank} lost, start 2 by itself")


def kill_a_rank_for_good(trial: Trial) -> None:
    """SIGKILL of one rank when the launcher has no restarts: it names the rank and the signal."""
    start = at_its_step(trial, restarts=0)
    os.kill(trial.pid(trial.rank), signal.SIGKILL)
    trial.prove(start.end() == 1, "exit code 1")
    told = f"rank {trial.rank} was ended by SIGKILL"
    trial.prove(told in start.output, told)


def kill_all(trial: Trial) -> None:
    """SIGKILL of the launcher and of every rank, as in a machine failure."""
    _kill(trial, at_its_step(trial))


def kill_in_save(trial: Trial) -> None:
    """SIGKILL of all processes while a checkpoint is half written."""
    start = trial.start("slow_save")
    trial.reach(start)
    trial.keep_in_mind()
    start.wait_for(lambda: bool(half_written(trial)), "a save")
    time.sleep(trial.draw.uniform(0, 1.0))
    start.kill()
    torn = half_written(trial)
    trial.prove(bool(torn), f"SIGKILL left {', '.join(path.name for path in torn)}")


def kill_a_rank_in_save(trial: Trial) -> None:
    """SIGKILL of one rank while a checkpoint is half written; the launcher starts all of them again by itself."""
    start = trial.start("slow_save")
    trial.reach(start)
    trial.keep_in_mind()
    start.wait_for(lambda: bool(half_written(trial)), "a save")
    time.sleep(trial.draw.uniform(0, 1.0))
    os.kill(trial.pid(trial.rank), signal.SIGKILL)
    torn = half_written(trial)
    trial.prove(bool(torn), f"rank {trial.rank} lost beside {', '.join(path.name for path in torn)}")
    trial.prove(start.end() == 0, "ended with 0")
    trial.prove("start 2, after a rank was lost" in start.output, "start 2 by itself")


def signal_a_rank(trial: Trial, number: signal.Signals) -> None:
    """A signal to one rank: all ranks save and end."""
    start = at_its_step(trial)
    os.kill(trial.pid(trial.rank), number)
    saved(trial, start)


def signal_the_launcher(trial: Trial) -> None:
    """SIGTERM to the launcher, which forwards it."""
    start = at_its_step(trial)
    start.process.terminate()
    saved(trial, start)


def stop_a_rank(trial: Trial) -> None:
    """SIGSTOP of one rank: the watchdog ends the others, which wait for it, and the launcher kills the stopped rank."""
    start = at_its_step(trial, "run.first_step_timeout=90", "run.step_timeout=20")
    os.kill(trial.pid(trial.rank), signal.SIGSTOP)
    trial.prove(start.end() == 0, "ended with 0")
    told = f"rank {trial.rank} left no stack: stopped (T)"
    trial.prove(told in start.output and "mimae: nothing moved for" in start.output, told)
    trial.prove("start 2, after a rank was lost" in start.output, "start 2 by itself")


def drift(trial: Trial) -> None:
    """Silent change of a weight of one rank: the next checkpoint is not written, and all ranks restart."""
    start = trial.start("drift")
    start.wait_for(lambda: "fault: a weight" in start.output, "the drift")
    trial.keep_in_mind()
    trial.prove(start.end() == 0, "ended with 0")
    trial.prove("start 2" in start.output and "DivergenceError" in start.output, "DivergenceError, start 2 by itself")


def fill_the_disk(trial: Trial) -> None:
    """A full disk that later has room again: the run continues throughout."""
    trial.step = max(trial.step, EVERY + 1)
    folder = trial.run / "checkpoints"
    with small_disk(folder, DISK):
        start = at_its_step(trial)
        start.wait_for(lambda: bool(trial.checkpoints()), "a checkpoint")
        before = trial.checkpoints()[-1]
        left = trial.draw.randrange(sum(path.stat().st_size for path in before.iterdir()) // 2)
        filler = folder / "filler"

        def has_failed() -> bool:
            """Fill the disk again: a save in progress may have removed an old checkpoint."""
            with suppress(OSError), filler.open("ab", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
            os.truncate(filler, max(0, filler.stat().st_size - left))
            return "could not be written" in start.output

        start.wait_for(has_failed, "a save that fails")
        trial.keep_in_mind()
        trial.prove(trial.checkpoints()[-1] >= before, f"with {left:,} bytes free: told, the last one still loads")
        filler.unlink()
        trial.prove(start.end() == 0, "ended with 0")


def read_only_run(trial: Trial) -> None:
    """A run directory that becomes read-only, and later writable again: the run continues throughout."""
    start = at_its_step(trial)
    before = trial.checkpoints()
    with read_only(trial.run):
        start.wait_for(lambda: "could not be written" in start.output, "a save that fails")
        trial.keep_in_mind()
        trial.prove(trial.checkpoints()[-1:] >= before[-1:], "what was there is there")
    trial.prove("Read-only file system" in start.output, "could not be written: Read-only file system")
    trial.prove(start.end() == 0, "ended with 0")


def tear(trial: Trial) -> None:
    """A truncated file in the newest checkpoint: the previous checkpoint is used."""
    _damage(trial, lambda content: content[: trial.draw.randrange(len(content))])


def alter(trial: Trial) -> None:
    """A flipped bit in the newest checkpoint: the previous checkpoint is used."""

    def flip(content: bytes) -> bytes:
        place = trial.draw.randrange(len(content))
        return content[:place] + bytes([content[place] ^ 1 << trial.draw.randrange(8)]) + content[place + 1 :]

    _damage(trial, flip)


def nan_storm(trial: Trial) -> None:
    """Ten consecutive steps without a finite gradient, and one more: the run ends, and resumes from before them."""
    trial.step = min(trial.step, STEPS - 11)
    start = trial.start("nan")
    start.wait_for(lambda: "fault: gradients" in start.output, "NaN")
    trial.keep_in_mind()
    trial.prove(start.end() == EXIT_MISTAKE, f"exit code {EXIT_MISTAKE}")
    told = "steps in a row had a gradient that is not finite"
    trial.prove(told in start.output and f"step {trial.step}: samples [" in start.output, told)


def bad_data(trial: Trial) -> None:
    """Half of the images become text in mid-run: the run stops with a list of them. Then they are restored."""
    sound, damaged = trial.images, trial.folder / "damaged"
    shutil.copytree(sound, damaged)
    for path in sorted(damaged.rglob("*.png"))[::2]:
        path.write_bytes(b"<html>404 Not Found</html>")
    trial.images = trial.folder / "images"
    trial.images.symlink_to(sound)
    start = at_its_step(trial)
    _point(trial.images, damaged)
    trial.prove(start.end() == EXIT_MISTAKE, f"exit code {EXIT_MISTAKE}")
    trial.prove("samples cannot be read, more than data.max_bad_fraction" in start.output, "unreadable samples listed")
    _point(trial.images, sound)


def second_run(trial: Trial) -> None:
    """A second launcher in the directory of a running run: it is refused, and the first one does not notice."""
    (trial.folder / "hold").touch()
    first = trial.start("pace")
    first.wait_for((trial.folder / "rank-0").exists, "the hold")
    second = trial.start()
    trial.prove(second.end() == EXIT_MISTAKE, f"exit code {EXIT_MISTAKE} of the second")
    trial.prove(f"is in use by process {trial.pid(0)}" in second.output, "told who is at work")
    (trial.folder / "hold").unlink()
    trial.prove(first.end() == 0, "the first ended with 0")


def other_ranks(trial: Trial) -> None:
    """All processes are killed, and the run resumes with another number of ranks."""
    kill_all(trial)
    ranks = trial.draw.choice([count for count in (1, 2, 3, 4) if count != trial.ranks])
    trial.finish(ranks, "engine.replicas=1")  # This number divides by all of them.
    trial.seen.append(f"went on with {ranks} ranks")


FAULTS: dict[str, Callable[[Trial], None]] = {
    "SIGKILL of a rank": kill_a_rank,
    "SIGKILL of a rank, no restart": kill_a_rank_for_good,
    "SIGKILL of all": kill_all,
    "SIGKILL in a save": kill_in_save,
    "SIGKILL of a rank in a save": kill_a_rank_in_save,
    "SIGKILL of the launcher": kill_the_launcher,
    "SIGKILL of a loader worker": kill_a_worker,
    "SIGTERM to a rank": lambda trial: signal_a_rank(trial, signal.SIGTERM),
    "SIGUSR1 to a rank": lambda trial: signal_a_rank(trial, signal.SIGUSR1),
    "SIGHUP to a rank": lambda trial: signal_a_rank(trial, signal.SIGHUP),
    "SIGHUP under nohup": hang_up_ignored,
    "closed stdout": close_stdout,
    "full disk of the log": fill_the_log,
    "full shared memory": fill_shared_memory,
    "run directory renamed": rename_the_run,
    "clock set back": clock_set_back,
    "SIGTERM to the launcher": signal_the_launcher,
    "torn checkpoint": tear,
    "altered checkpoint": alter,
    "NaN storm": nan_storm,
    "bad data": bad_data,
    "second run": second_run,
    "SIGSTOP of a rank": stop_a_rank,
    "drift of a replica": drift,
    "full disk": fill_the_disk,
    "read-only run": read_only_run,
    "other number of ranks": other_ranks,
}
"""Faults by name in the table."""

MOUNTED = ("full disk", "read-only run", "full disk of the log", "full shared memory")
"""Faults that need mounts."""

COPIED = ("drift of a replica",)
"""Faults that need a weight that two ranks step separately."""

RESHAPED = "other number of ranks"
"""Fault after which weights are equal only within the tolerance."""


def _kill(trial: Trial, start: Start) -> None:
    start.kill()
    trial.prove(start.process.returncode == -signal.SIGKILL, "launcher and ranks ended by SIGKILL")


def _damage(trial: Trial, change: Callable[[bytes], bytes]) -> None:
    """Kill a run with at least two checkpoints, and change a file of the newest."""
    trial.step = max(trial.step, 2 * EVERY + 2)
    start = at_its_step(trial)
    start.wait_for(lambda: len(trial.checkpoints()) > 1, "two checkpoints")
    _kill(trial, start)
    *_, before, newest = trial.checkpoints()
    file = trial.draw.choice(sorted(path for path in newest.iterdir() if path.stat().st_size))
    file.write_bytes(change(file.read_bytes()))
    step = int(before.name.removeprefix("step-"))
    trial.expect(step)
    trial.finish()
    told, resumed, _ = trial.starts[-1].output.partition("resuming ")
    trial.prove(bool(resumed) and newest.name in told, f"{newest.name}/{file.name} damaged, told, {before.name} taken")
    if f"at step {step} of" not in trial.starts[-1].output:
        raise NotSeen(f"{before.name} was not taken\n{trial.starts[-1].output[-2000:]}")


def _point(link: Path, target: Path) -> None:
    """Change the target of a link atomically."""
    other = link.with_name("other")
    other.symlink_to(target)
    other.replace(link)
