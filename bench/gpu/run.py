"""Runs stages one after another within a time, and keeps what each has found so far.

Each stage is a process group of its own. Nothing of it is left when it ends: what hangs, dies or runs out of memory
costs its own result alone. The report is written at the start and at the end of every stage; what a stage itself has
written by then is in it, so a stage writes after every number. A second call goes on with what is left. If the first
one was killed, the second one reads what the stage at that time had written.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from mimae.bench.gpu.group import GRACE, SIGNALS, Group, raising
from mimae.bench.gpu.stages import Stage
from mimae.outside.files import write_atomically

RESERVE = len(SIGNALS) * GRACE + 3.0
"""Seconds at the end of a call that no stage gets: for the end of the last one and for the file."""

LAST_LINES = 30
"""Lines of a stage's output that the report keeps."""

_LOOK = 0.2
_SHORTAGE = re.compile(r"out of memory|memory ran out|OutOfMemory|CUBLAS_STATUS_ALLOC_FAILED", re.IGNORECASE)

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
        for stage in stages:
            row = self.report["stages"].get(stage.name)
            if row is not None and row["state"] == "running":  # An earlier call was killed.
                self._keep(stage, row | {"exit_code": None}, *self._files(stage))

    def run(self) -> dict[str, State | None]:
        """Run the stages that are not done, those that were never started first; return the state of each."""
        known = self.report["stages"]
        left = [stage for stage in self.stages if known.get(stage.name, {}).get("state") != "done"]
        with raising():
            for stage in sorted(left, key=lambda stage: stage.name in known):
                if self.until - self.clock.now() >= stage.least:
                    self._run(stage)
        return {stage.name: known.get(stage.name, {}).get("state") for stage in self.stages}

    def _run(self, stage: Stage) -> None:
        """Run a stage, and once more with less where memory ran out and time is left."""
        state = self._attempt(stage, stage.arguments)
        if state == "out of memory" and stage.smaller and self.until - self.clock.now() >= stage.least:
            self._attempt(stage, [*stage.arguments, *stage.smaller])

    def _files(self, stage: Stage) -> tuple[Path, Path]:
        """Return the files of a stage's result and of its output."""
        name = re.sub(r"\W+", "-", stage.name)
        return self.parts / f"{name}.result", self.parts / f"{name}.txt"

    def _attempt(self, stage: Stage, arguments: Sequence[str]) -> State:
        result, output = self._files(stage)
        if (before := self.report["stages"].get(stage.name)) is not None and before["result"] is None:
            before = before.get("before")  # the last try that found something
        result.unlink(missing_ok=True)
        began = self.clock.now()
        limit = min(stage.seconds, self.until - began)
        print(f"{stage.name}: at most {limit:.0f} s", flush=True)
        written = [argument.replace("{result}", str(result)) for argument in arguments]
        row = {"arguments": list(arguments), "limit_seconds": limit, "state": "running", "before": before}
        self._keep(stage, row, result, output)
        code = None
        running = self.start([sys.executable, "-m", *written], output)
        try:
            while (code := running.poll()) is None and self.clock.now() < began + limit:
                self.clock.sleep(_LOOK)
        finally:  # This also runs when a signal ends the call.
            running.end()
            took = self.clock.now() - began
            state = self._keep(stage, row | {"exit_code": code, "seconds": took}, result, output)
        print(f"{stage.name}: {state} after {took:.0f} s", flush=True)
        return state

    def _keep(self, stage: Stage, row: dict[str, Any], result: Path, output: Path) -> State:
        """Write the report with what a stage has found so far; return the stage's state."""
        text = output.read_text(errors="replace") if output.exists() else ""
        if "exit_code" in row:
            row["state"] = _state(row["exit_code"], text)
        lines = [] if row["state"] == "done" else text.splitlines()[-LAST_LINES:]
        row |= {"result": _read(result), "last_lines": lines}
        self.report["stages"][stage.name] = row
        write_atomically(self.file, json.dumps(self.report, indent=2) + "\n")
        return row["state"]


def _state(code: int | None, output: str) -> State:
    if code is None:
        return "cut off"
    if code == 0:
        return "done"
    return "out of memory" if _SHORTAGE.search(output) else "failed"


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
