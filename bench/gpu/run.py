"""Runs stages one after another within a time, and keeps what each has found so far.

Each stage is a process group of its own. Nothing of it is left when it ends: what hangs, dies or runs out of memory
costs its own result alone. The report is written at the start and at the end of every stage; what a stage itself has
written by then is in it, so a stage writes after every number. A second call goes on with what is left.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from mimae.bench.gpu.stages import Stage
from mimae.outside.files import write_atomically

GRACE = 3.0
"""Seconds between the signal to end and the one that cannot be refused."""

RESERVE = 10.0
"""Seconds at the end of a call that no stage gets: for the end of the last one and for the file."""

LAST_LINES = 30
"""Lines of a stage's output that the report keeps."""

_LOOK = 0.2
_SHORTAGE = re.compile(r"out of memory|OutOfMemory|CUBLAS_STATUS_ALLOC_FAILED")

State = Literal["done", "failed", "cut off", "out of memory", "running"]


class Running(Protocol):
    """A stage that was started."""

    def poll(self) -> int | None:
        """Return the exit code; None while it runs."""

    def end(self) -> None:
        """End all of its processes."""


class Clock(NamedTuple):
    """Time, which tests bring along."""

    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


class Group:
    """A process and all that it starts, in a session of its own."""

    def __init__(self, command: Sequence[str], output: Path) -> None:
        with output.open("wb") as stream:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._known: set[int] = {self._process.pid}

    def poll(self) -> int | None:
        # Those that begin a session of their own are found while their parents live.
        self._known |= descendants(self._known)
        return self._process.poll()

    def end(self) -> None:
        self._known |= descendants(self._known)
        for number in (signal.SIGTERM, signal.SIGKILL):
            self._send(number)
            end = time.monotonic() + GRACE
            while self._lives() and time.monotonic() < end:
                time.sleep(0.05)
                self._process.poll()
        self._process.wait()

    def _send(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)
        for pid in self._known - {self._process.pid}:
            if _parent(pid) is not None:
                with suppress(ProcessLookupError):
                    os.kill(pid, number)

    def _lives(self) -> bool:
        return any(_parent(pid) is not None for pid in self._known)


def descendants(roots: set[int]) -> set[int]:
    """Return the processes that these have started, and those that they have."""
    parents = {int(entry.name): _parent(int(entry.name)) for entry in Path("/proc").glob("[0-9]*")}
    found, size = set(roots), 0
    while len(found) > size:
        size = len(found)
        found |= {pid for pid, parent in parents.items() if parent in found}
    return found - roots


def _parent(pid: int) -> int | None:
    """Return the parent of a process that has not ended, else None."""
    try:
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except OSError:
        return None
    return None if state in "ZX" else int(parent)


class Run:
    """One call: the stages, the report that they fill, and the time that is left."""

    def __init__(
        self,
        stages: Sequence[Stage],
        file: Path,
        machine: Mapping[str, Any],
        seconds: float,
        start: Callable[[Sequence[str], Path], Running] = Group,
        clock: Clock = Clock(),  # noqa: B008 -- it has no state
    ) -> None:
        self.stages, self.file, self.start, self.clock = stages, file, start, clock
        self.parts = file.with_suffix("")
        """The folder of what the stages write, and of their output."""
        self.until = clock.now() + seconds - RESERVE
        self.report: dict[str, Any] = {"bench": "gpu", **machine, "calls": 0, "stages": {}}
        with suppress(OSError, ValueError):
            self.report |= {key: json.loads(file.read_text())[key] for key in ("calls", "stages")}
        self.report["calls"] += 1
        self.parts.mkdir(parents=True, exist_ok=True)

    def run(self) -> dict[str, State | None]:
        """Run the stages that are not done, those that were never started first; return the state of each."""
        known = self.report["stages"]
        left = [stage for stage in self.stages if known.get(stage.name, {}).get("state") != "done"]
        for stage in sorted(left, key=lambda stage: stage.name in known):
            if self.until - self.clock.now() >= stage.least:
                self._run(stage)
        return {stage.name: known.get(stage.name, {}).get("state") for stage in self.stages}

    def _run(self, stage: Stage) -> None:
        """Run a stage, and once more with less where memory ran out and time is left."""
        until = min(self.clock.now() + stage.seconds, self.until)
        state = self._attempt(stage, stage.arguments, until)
        if state == "out of memory" and stage.smaller and until - self.clock.now() >= stage.least:
            self._attempt(stage, [*stage.arguments, *stage.smaller], until)

    def _attempt(self, stage: Stage, arguments: Sequence[str], until: float) -> State:
        name = re.sub(r"\W+", "-", stage.name)
        result, output = self.parts / f"{name}.result", self.parts / f"{name}.txt"
        if (before := self.report["stages"].get(stage.name)) is not None and before["result"] is None:
            before = before.get("before")  # the last try that found something
        result.unlink(missing_ok=True)
        began = self.clock.now()
        print(f"{stage.name}: at most {until - began:.0f} s", flush=True)
        written = [argument.replace("{result}", str(result)) for argument in arguments]
        row = {"arguments": list(arguments), "limit_seconds": until - began, "state": "running", "before": before}
        self._keep(stage, row, result, output)
        running = self.start([sys.executable, "-m", *written], output)
        try:
            while (code := running.poll()) is None and self.clock.now() < until:
                self.clock.sleep(_LOOK)
        finally:
            running.end()
            took = self.clock.now() - began
        state = self._keep(stage, row | {"exit_code": code, "seconds": took}, result, output)
        print(f"{stage.name}: {state} after {took:.0f} s", flush=True)
        return state

    def _keep(self, stage: Stage, row: dict[str, Any], result: Path, output: Path) -> State:
        """Write the report with what a stage has found so far; return the stage's state."""
        lines = output.read_text(errors="replace").splitlines()[-LAST_LINES:] if output.exists() else []
        if "exit_code" in row:
            row["state"] = _state(row["exit_code"], lines)
        row |= {"result": _read(result), "last_lines": [] if row["state"] == "done" else lines}
        self.report["stages"][stage.name] = row
        write_atomically(self.file, json.dumps(self.report, indent=2) + "\n")
        return row["state"]


def _state(code: int | None, lines: Sequence[str]) -> State:
    if code is None:
        return "cut off"
    if code == 0:
        return "done"
    return "out of memory" if any(_SHORTAGE.search(line) for line in lines) else "failed"


def _read(result: Path) -> Any:
    """Return what a stage wrote: JSON, or the text of a file in another format; None for nothing."""
    try:
        text = result.read_text(errors="replace")
    except OSError:
        return None
    try:
        return json.loads(text)
    except ValueError:
        return text
