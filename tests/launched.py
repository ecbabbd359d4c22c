"""Helper that starts a run from the command line, in separate processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import ClassVar

RECIPE = """
base: quickstart
data: {val_path: null, workers: 0, loader: torch}
schedule: {batch_size: 8, epochs: 900, max_steps: %d}
checkpoint: {every_steps: 5}
telemetry: {tensorboard: false, images_every_epochs: 0, probe_every_epochs: 0, log_every_steps: 1}
"""


OURS = ["-m", "mimae"]
NOHUP = """
import os, signal, sys
signal.signal(signal.SIGHUP, signal.SIG_IGN)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""
TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m", "mimae"]


class Launched:
    """A `mimae pretrain` command, by default with two ranks, in a separate session."""

    started: ClassVar[list[subprocess.Popen[bytes]]] = []
    """Processes of the present test, which are ended at its end."""

    def __init__(self, folder: Path, steps: int, *overrides: str, by: list[str] = OURS, ranks: int = 2) -> None:
        self.run = folder / "run"
        (folder / "recipe.yaml").write_text(RECIPE % steps)
        command = [sys.executable, *by, "pretrain", str(folder / "recipe.yaml"), f"run.dir={self.run}"]
        self.output = folder / "output.txt"
        self.process = subprocess.Popen(
            [*command, *overrides, *([] if by is TORCHRUN else ["--ranks", str(ranks)])],
            stdout=self.output.open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        self.started.append(self.process)

    def ranks(self) -> list[int]:
        """Return the process ids of the ranks in their order, whether the launcher or torchrun started them."""
        of_ranks = ["pgrep", "-P", str(self.process.pid), "-f", "[-]m mimae"]
        found = subprocess.run(of_ranks, capture_output=True, text=True)
        return [int(line) for line in found.stdout.split()]

    def wait_for(self, condition: Callable[[], bool], seconds: float = 180) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, self.output.read_text()
            time.sleep(0.1)

    def step(self) -> int:
        file = self.run / "metrics.jsonl"
        return len(file.read_bytes().splitlines()) if file.exists() else 0

    def end(self, seconds: float = 180) -> tuple[int, str]:
        code = self.process.wait(seconds)
        return code, self.output.read_text()

    @classmethod
    def end_all(cls) -> None:
        """End all processes that a test left running. Each is the leader of its session."""
        for process in cls.started:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        cls.started.clear()
