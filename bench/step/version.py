"""Another version of this package as a contender: a checkout whose training step runs in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from mimae.errors import UserError


def check_version(checkout: Path) -> None:
    """Raise UserError if `checkout` has no version of this package."""
    if not (checkout / "mimae/__init__.py").exists():
        raise UserError(f"--against {checkout}: has no mimae/__init__.py; legal is a checkout of this repository")


class Version:
    """The version of a checkout. Use it in a `with` statement, which ends its process."""

    def __init__(self, checkout: Path, recipe: str | None, overrides: Sequence[str], device: torch.device) -> None:
        """Start the process. Raises UserError if `checkout` has no version of this package."""
        check_version(checkout)
        request: dict[str, Any] = {
            "recipe": recipe or {},
            "overrides": [*overrides],
            "device": device.type,
            "threads": torch.get_num_threads(),
        }
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("serve.py")), json.dumps(request)],
            env={**os.environ, "PYTHONPATH": str(checkout.absolute())},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Version:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.process.kill()
        self.process.communicate()

    def warm_up(self) -> float:
        """Run the first steps, and return the approximate seconds of a later one."""
        return self._ask("warm_up", steps=1)

    def timed(self, steps: int) -> float:
        """Return the seconds per step over `steps` steps."""
        return self._ask("timed", steps=steps)

    def kinds(self) -> dict[str, float]:
        """Return the shares of a step's time by kind of operator."""
        return self._ask("kinds")

    def allocated(self) -> dict[str, int]:
        """Return the bytes that a step allocates, see `meters.allocated`."""
        return self._ask("allocated")

    def peak(self) -> int:
        """Return the peak memory of a step. The process has to be a new one."""
        return self._ask("peak")

    def _ask(self, what: str, **more: Any) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({"what": what, **more}) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            line = ""
        else:
            line = self.process.stdout.readline()
        if not line:
            raise UserError("the other version's process has ended, with the error above")
        return json.loads(line)


def name_of(checkout: Path) -> str:
    """Return the short commit of a checkout, or the name of its folder."""
    answer = subprocess.run(
        ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return answer.stdout.strip() or checkout.absolute().name
