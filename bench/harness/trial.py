"""One run of the drill: its starts, the actions on them from outside, and the observations."""

from __future__ import annotations

import json
import os
import random
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mimae.bench.harness.subjects import Subject
from mimae.checkpoints import checkpoint
from mimae.errors import EXIT_SAVED

STEPS = 18
"""Number of optimizer steps of a run, 4 in each epoch."""

EVERY = 3
"""Number of steps between checkpoints."""

PATIENCE = 240.0
"""Longest wait in seconds for any event."""

IS_TRAINING = "; the run is "
"""Pattern of the line that every start with remaining steps prints, with the step from which it continues."""


class NotSeen(Exception):
    """A fault did not fire, or its expected consequence is missing."""


class Start:
    """One call of a command that trains, in a separate session."""

    def __init__(
        self, command: list[str], output: Path, environment: dict[str, str], reader: bool = False, errors: bool = False
    ) -> None:
        """`reader`: stdout is a pipe, which `hang_up` closes. `errors`: stderr is a file of its own beside `output`."""
        self.file, self.is_dead = output, False
        reading, writing = os.pipe() if reader else (None, None)
        with output.open("ab") as stream, output.with_suffix(".err").open("ab") as other:
            self.process = subprocess.Popen(
                command,
                stdout=stream if writing is None else writing,
                stderr=other if reader or errors else subprocess.STDOUT,
                start_new_session=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
            )
        self._hung_up = threading.Event()
        if reading is not None and writing is not None:
            os.close(writing)
            self._reader = threading.Thread(target=self._read, args=(reading,), daemon=True)
            self._reader.start()

    def _read(self, reading: int) -> None:
        """Copy what is said into the file, until `hang_up`."""
        with self.file.open("ab", buffering=0) as file, os.fdopen(reading, "rb", buffering=0) as pipe:
            while not self._hung_up.is_set():
                if select.select([pipe], [], [], 0.02)[0]:
                    piece = pipe.read(1 << 16)
                    if not piece:
                        return
                    file.write(piece)

    def hang_up(self) -> None:
        """Close the reading end of its stdout, as `head` does."""
        self._hung_up.set()
        self._reader.join()

    @property
    def errors(self) -> str:
        """Text that the run wrote to stderr, if stderr is a file of its own."""
        return self.file.with_suffix(".err").read_text(errors="replace")

    @property
    def output(self) -> str:
        """Return the output of the call and its ranks so far."""
        return self.file.read_text(errors="replace")

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for a condition. Raises NotSeen if the process or the time ends first."""
        end = time.monotonic() + PATIENCE
        while not condition():
            if self.process.poll() is not None or time.monotonic() > end:
                raise NotSeen(f"{what}: not seen before its end\n{self.output[-2000:]}")
            time.sleep(0.02)

    def end(self) -> int:
        """Wait until the process has ended, and return the exit code."""
        try:
            return self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            raise NotSeen(f"still at work after {PATIENCE:.0f} s\n{self.output[-2000:]}") from None
        finally:
            self.kill()

    def kill(self) -> None:
        """Send SIGKILL to all of its processes, once: the number of their process group may be reused later."""
        if self.is_dead:
            return
        self.is_dead = True
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        self.process.wait()


class Trial:
    """A run in a separate directory on `ranks` ranks, with a fault at `step` (on `rank`, if it concerns one rank)."""

    def __init__(
        self, folder: Path, subject: Subject, data: Path, overrides: list[str], ranks: int, draw: random.Random
    ) -> None:
        """`data`: the folder that the subject wrote."""
        folder.mkdir()
        self.folder, self.run, self.ranks, self.draw = folder, folder / "run", ranks, draw
        self.subject, self.data, self.images, self.overrides = subject, data, data / "images", overrides
        self.step, self.rank = draw.randint(2, STEPS - 8), draw.randrange(ranks)
        self.starts: list[Start] = []
        self.seen: list[str] = []
        self.is_closed, self.lock = False, threading.Lock()
        self.expected: list[tuple[int, int]] = []
        """Pairs of the number of output characters of the starts, and the step of the newest whole checkpoint then."""

    def start(
        self,
        fault: str | None = None,
        *overrides: str,
        ranks: int | None = None,
        restarts: int = 3,
        prefix: Sequence[str] = (),
        log: Path | None = None,
        reader: bool = False,
    ) -> Start:
        """Call the command that trains, always on the same recipe and directory; at first with a fault.

        `prefix`: a command that runs it. `log`: the file of its stdout. `reader`: see Start.
        """
        recipe = self.folder / "recipe.yaml"
        recipe.write_text(self.subject.recipe(self.images, self.data, STEPS, EVERY))
        module, environment = "mimae", {}
        if fault is not None:
            told = {"kind": fault, "step": self.step, "rank": self.rank, "folder": str(self.folder)}
            module, environment = "mimae.bench.harness.faulty", {"MIMAE_FAULT": json.dumps(told)}
        command = [*prefix, sys.executable, "-m", module, self.subject.verb, str(recipe), f"run.dir={self.run}"]
        command += self.overrides
        command += overrides
        command += ["--ranks", str(ranks or self.ranks), "--restarts", str(restarts)]
        with self.lock:
            if self.is_closed:
                raise NotSeen("the drill was ended")
            output = log or self.folder / f"output-{len(self.starts) + 1}.txt"
            self.starts.append(Start(command, output, environment, reader, log is not None))
            return self.starts[-1]

    def reach(self, start: Start) -> None:
        """Wait for the fault's step, and then for a random time."""
        start.wait_for(lambda: self.steps_done() >= self.step, f"step {self.step}")
        time.sleep(self.draw.uniform(0, 0.3))

    def steps_done(self) -> int:
        metrics = self.run / "metrics.jsonl"
        return len(metrics.read_bytes().splitlines()) if metrics.exists() else 0

    def events(self, kind: str) -> list[dict[str, Any]]:
        """Return the events of a kind, over all starts of the run."""
        file = self.run / "events.jsonl"
        found = map(json.loads, file.read_bytes().splitlines()) if file.exists() else ()
        return [event for event in found if event["kind"] == kind]

    def pid(self, rank: int) -> int:
        return int((self.folder / f"rank-{rank}").read_text())

    def checkpoints(self) -> list[Path]:
        """Return the complete checkpoints, newest last."""
        return sorted((self.run / "checkpoints").glob("step-*"))

    def keep_in_mind(self) -> None:
        """Record the checkpoints that are complete now; none of them may be lost.

        Raises CheckpointError for a damaged one.
        """
        if found := self.checkpoints():
            self.expect(int(checkpoint.load(found[-1]).state["step"]))

    def expect(self, step: int) -> None:
        """Require that later starts resume from at least this step."""
        self.expected.append((sum(len(start.output) for start in self.starts), step))

    def prove(self, holds: bool, what: str) -> None:
        """Raise NotSeen if the fault left no trace."""
        if not holds:
            raise NotSeen(f"{what}: not seen\n{self.starts[-1].output[-2000:]}")
        self.seen.append(what)

    def finish(self, ranks: int | None = None, *overrides: str) -> None:
        """Repeat the same command until the run is finished."""
        code = self.start(None, *overrides, ranks=ranks).end()
        if code != 0:
            raise NotSeen(f"the run did not continue: exit code {code}\n{self.starts[-1].output[-2000:]}")

    def close(self) -> None:
        """End the running processes, and prevent further starts."""
        with self.lock:
            self.is_closed = True
        for start in self.starts:
            start.kill()

    def is_finished(self) -> bool:
        return bool(found := self.checkpoints()) and found[-1].name == f"step-{STEPS:08d}"

    def count_starts(self) -> int:
        """Return the number of starts, by hand and by the launcher."""
        return sum(len(_begun(start.output)) for start in self.starts)

    def lost(self) -> int:
        """Return 1 if a start resumed from before a checkpoint that was whole at that time, otherwise 0."""
        said = 0
        for start in self.starts:
            for output in _begun(start.output):
                wanted = next((step for place, step in reversed(self.expected) if place <= said), 0)
                resumed = re.search(r"^resuming .* at step (\d+) of", output, re.MULTILINE)
                if IS_TRAINING in output and (int(resumed[1]) if resumed else 0) < wanted:
                    return 1
                said += len(output)
        return 0


def at_its_step(trial: Trial, *overrides: str, **how: Any) -> Start:
    """Return a start that has reached its step, and goes on slowly."""
    start = trial.start("pace", *overrides, **how)
    trial.reach(start)
    trial.keep_in_mind()
    return start


def saved(trial: Trial, start: Start) -> None:
    """Prove that a start saved on a signal, and ended."""
    trial.prove(start.end() == EXIT_SAVED, f"exit code {EXIT_SAVED}")
    trial.prove("on a signal; the same command continues" in start.output, "saved on a signal")
    trial.keep_in_mind()


def half_written(trial: Trial) -> list[Path]:
    """Return the checkpoints that are being written."""
    return list((trial.run / "checkpoints").glob(".step-*.tmp"))


def _begun(output: str) -> list[str]:
    """Output of each start: the one by hand, and those that the launcher made."""
    return re.split(r"(?<=, after a rank was lost)", output)
