"""One run of the drill: its starts, what is done to them from outside, and what was seen of it."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from mimae.checkpoints import checkpoint

STEPS = 18
"""Optimizer steps of a run, 4 in each epoch."""

EVERY = 3
"""Steps between checkpoints."""

PATIENCE = 240.0
"""Seconds for anything that is waited for."""

IS_TRAINING = "; the run is "
"""Pattern of the line that every start with steps to do prints; it holds the step from which the start continues."""

RECIPE = """
precision: fp32
data: {path: %s, image_size: 8, workers: 0, loader: torch}
model: {size: tiny, patch_size: 2, width: 16, depth: 1, heads: 2, attention: sdpa}
decoder: {width: 8, depth: 1, heads: 2}
objective: {projector: mlp, gate_loss: 5.0, posterior_width: 4}
optimizer: {learning_rate: 0.1, clip: 1.0}
schedule: {batch_size: 24, epochs: 5, warmup_epochs: 1, accumulate: 2, max_steps: %d}
ema: {decay: 0.5}
checkpoint: {every_steps: %d}
telemetry: {log_every_steps: 1, probe_every_epochs: 0, images_every_epochs: 0, trackers: []}
"""
"""Every part that has state is in use: gate, V, projector, accumulation, clipping, average of weights. Batches of 24
divide among 1, 2, 3 and 4 ranks."""


class NotSeen(Exception):
    """A fault did not fire, or what had to follow from it did not."""


class Start:
    """One call of `mimae pretrain`, in a session of its own."""

    def __init__(self, command: list[str], output: Path, environment: dict[str, str]) -> None:
        self.file, self.is_dead = output, False
        with output.open("w") as stream:
            self.process = subprocess.Popen(
                command,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
            )

    @property
    def output(self) -> str:
        """All that it and its ranks have said so far."""
        return self.file.read_text(errors="replace")

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        """Raise NotSeen where the process ends first, or time does."""
        end = time.monotonic() + PATIENCE
        while not condition():
            if self.process.poll() is not None or time.monotonic() > end:
                raise NotSeen(f"{what}: not before its end\n{self.output[-2000:]}")
            time.sleep(0.02)

    def end(self) -> int:
        """Wait for its end, and return the exit code."""
        try:
            return self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            raise NotSeen(f"still at work after {PATIENCE:.0f} s\n{self.output[-2000:]}") from None
        finally:
            self.kill()

    def kill(self) -> None:
        """SIGKILL to all of its processes, once: the ranks are in its group, whose number is another's later."""
        if self.is_dead:
            return
        self.is_dead = True
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        self.process.wait()


class Trial:
    """A run in a directory of its own, on `ranks`, with a fault at `step` (on `rank`, where it is one rank's)."""

    def __init__(self, folder: Path, images: Path, overrides: list[str], ranks: int, draw: random.Random) -> None:
        folder.mkdir()
        self.folder, self.run, self.ranks, self.draw = folder, folder / "run", ranks, draw
        self.images, self.overrides = images, overrides
        self.step, self.rank = draw.randint(2, STEPS - 8), draw.randrange(ranks)
        self.starts: list[Start] = []
        self.seen: list[str] = []
        self.is_closed, self.lock = False, threading.Lock()
        self.expected: list[tuple[int, int]] = []
        """(characters that its starts had said by then, step of the newest checkpoint that was whole)."""

    def start(self, fault: str | None = None, *overrides: str, ranks: int | None = None, restarts: int = 3) -> Start:
        """Call `mimae pretrain`, always on the same recipe and directory; at first with a fault."""
        recipe = self.folder / "recipe.yaml"
        recipe.write_text(RECIPE % (self.images, STEPS, EVERY))
        module, environment = "mimae", {}
        if fault is not None:
            told = {"kind": fault, "step": self.step, "rank": self.rank, "folder": str(self.folder)}
            module, environment = "mimae.bench.harness.faulty", {"MIMAE_FAULT": json.dumps(told)}
        command = [sys.executable, "-m", module, "pretrain", str(recipe), f"run.dir={self.run}", *self.overrides]
        command += overrides
        command += ["--ranks", str(ranks or self.ranks), "--restarts", str(restarts)]
        with self.lock:
            if self.is_closed:
                raise NotSeen("the drill was ended")
            self.starts.append(Start(command, self.folder / f"output-{len(self.starts) + 1}.txt", environment))
            return self.starts[-1]

    def reach(self, start: Start) -> None:
        """Wait for the fault's step, and then for a moment that is drawn."""
        start.wait_for(lambda: self.steps_done() >= self.step, f"step {self.step}")
        time.sleep(self.draw.uniform(0, 0.3))

    def steps_done(self) -> int:
        metrics = self.run / "metrics.jsonl"
        return len(metrics.read_bytes().splitlines()) if metrics.exists() else 0

    def pid(self, rank: int) -> int:
        return int((self.folder / f"rank-{rank}").read_text())

    def checkpoints(self) -> list[Path]:
        """The complete ones, the newest last."""
        return sorted((self.run / "checkpoints").glob("step-*"))

    def keep_in_mind(self) -> None:
        """Record the checkpoints that are complete now, none of which may be lost.

        Raises CheckpointError for a damaged one.
        """
        if found := self.checkpoints():
            self.expect(int(checkpoint.load(found[-1]).state["step"]))

    def expect(self, step: int) -> None:
        """The starts from now on have to go on from this step at least."""
        self.expected.append((sum(len(start.output) for start in self.starts), step))

    def prove(self, holds: bool, what: str) -> None:
        """Raise NotSeen where the fault's trace is not there."""
        if not holds:
            raise NotSeen(f"{what}: not so\n{self.starts[-1].output[-2000:]}")
        self.seen.append(what)

    def finish(self, ranks: int | None = None, *overrides: str) -> None:
        """Repeat the same command until the run is finished."""
        code = self.start(None, *overrides, ranks=ranks).end()
        if code != 0:
            raise NotSeen(f"the run did not go on: exit code {code}\n{self.starts[-1].output[-2000:]}")

    def close(self) -> None:
        """End what still runs; nothing is started any more."""
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
        """1 where a start went on from less than what had been whole before it; else 0."""
        said = 0
        for start in self.starts:
            for output in _begun(start.output):
                wanted = next((step for place, step in reversed(self.expected) if place <= said), 0)
                resumed = re.search(r"^resuming .* at step (\d+) of", output, re.MULTILINE)
                if IS_TRAINING in output and (int(resumed[1]) if resumed else 0) < wanted:
                    return 1
                said += len(output)
        return 0


def _begun(output: str) -> list[str]:
    """Output of each start: the one by hand, and those that the launcher made."""
    return re.split(r"(?<=, after a rank was lost)", output)
