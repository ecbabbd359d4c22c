"""All that needs a GPU, in one command: its tests, the ops, the training step at ViT-B and ViT-L, in one JSON file.

Each stage is a process of its own with a time limit, so that what hangs or fails costs its own result alone; the file
is written after every stage. The limits add up to less than eight minutes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mimae.outside.files import write_atomically

TESTS = Path(__file__).resolve().parents[1] / "tests"
"""A checkout has them, an installed wheel does not."""

_LAST_LINES = 30


class Stage(NamedTuple):
    """A command of `python -m`, and how long it may take."""

    name: str
    arguments: list[str]
    seconds: float
    writes: bool = True
    """It takes --json FILE; of the others the last lines are kept."""


_OPS = ("orthogonal_masks", "embed_visible", "fill_masked", "pixel_loss", "view_latents", "infonce", "club")
_TWO_BATCHES = ["--batch", "1024", "--batch", "4096", "--rounds", "15"]
STAGES = (
    Stage("tests", ["pytest", "-m", "gpu", "-v", "--durations=10", str(TESTS)], 105, writes=False),
    # One for each op: an illegal access ends a process's use of the GPU.
    # That of infonce has two precisions.
    *(
        Stage(op, ["mimae", "bench", "kernels", "--op", op, *_TWO_BATCHES], 38 if op == "infonce" else 24)
        for op in _OPS
    ),
    Stage("step, ViT-B", ["mimae", "bench", "step", "--model", "base", "--batch", "128", "--peers"], 110),
    Stage("step, ViT-L", ["mimae", "bench", "step", "--model", "large", "--batch", "64"], 75),
)


def run(stage: Stage) -> dict[str, Any]:
    """Run a stage: its exit code (None: it ran out of time), its result, its last lines."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        command = [sys.executable, "-m", *stage.arguments, *(["--json", str(file)] if stage.writes else [])]
        started = time.monotonic()
        try:
            done = subprocess.run(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                timeout=stage.seconds,
            )
            code, output = done.returncode, done.stdout
        except subprocess.TimeoutExpired as error:
            code, output = None, (error.stdout or b"").decode(errors="replace")
        return {
            "arguments": stage.arguments,
            "seconds": time.monotonic() - started,
            "limit_seconds": stage.seconds,
            "exit_code": code,
            "last_lines": output.splitlines()[-_LAST_LINES:],
            "result": json.loads(file.read_text()) if file.exists() else None,
        }


def run_all(stages: Sequence[Stage], file: Path, machine: dict[str, Any]) -> list[str]:
    """Run the stages in order and write `file` after each; return the names of those that did not end well."""
    report: dict[str, Any] = {"bench": "gpu", **machine, "stages": {}}
    failed = []
    file.parent.mkdir(parents=True, exist_ok=True)
    for stage in stages:
        print(f"{stage.name}: at most {stage.seconds:.0f} s", flush=True)
        outcome = run(stage)
        report["stages"][stage.name] = outcome
        write_atomically(file, json.dumps(report, indent=2) + "\n")
        print("\n".join(outcome["last_lines"]), flush=True)
        if outcome["exit_code"] != 0:
            failed.append(stage.name)
    return failed
