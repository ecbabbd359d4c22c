"""Saving beside training: copied while a forward and a backward read the weights, written while steps go on.

A checkpoint that cannot be written costs the run nothing but itself: it is told, and the one before stays the last.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from mimae import distributed
from mimae.checkpoints import checkpoint, dcp
from mimae.checkpoints.contents import wrong_with
from mimae.checkpoints.dcp import State
from mimae.checkpoints.settings import CheckpointSettings
from mimae.errors import CheckpointError
from mimae.outside.files import Folder
from mimae.outside.text import say

T = TypeVar("T")

GRACE = 60.0
"""Seconds, at most, that a run which ends with an error waits for the save that is under way."""


class Saver:
    """Writes the checkpoints of a run, one at a time. Every rank has one and calls its methods at the same places."""

    def __init__(
        self,
        run: Path,
        settings: CheckpointSettings,
        device: torch.device,
        say: Callable[[str], None] = say,
        check_owner: Callable[[], Path | None] = lambda: None,
        inside: str = "",
        note: Callable[..., None] = lambda kind, **details: None,
    ) -> None:
        """Make a saver of `run`, or of a folder `inside` it. A collective: the ranks agree about a save in a process
        group of its own, beside training's.

        `check_owner` raises where the run is another job's by now, and returns where the run is: it may have been
        renamed. `note` keeps what became of a save.
        """
        self.run, self.settings, self.device, self.say, self.check_owner = run, settings, device, say, check_owner
        self.inside, self.note = inside, note
        self.passed_over: set[str] = set()
        """Names of the checkpoints that the run went back behind when it was started."""
        # Kept, because the thread may outlive training's process group.
        self.group, self.rank = distributed.host_group(), distributed.rank()
        self.staging = dcp.Staging(device) if settings.background else None
        self._thread: threading.Thread | None = None
        self._failed = False

    def start(self, step: int, tensors: State, state: Mapping[str, Any]) -> None:
        """Begin the checkpoint of `step`, once the one before is written; `state`: what is not a tensor, as JSON.

        The tensors may change after the next `settle`. Raises where the run is another job's.
        """
        state = {"step": step, **state}
        assert not wrong_with(state), wrong_with(state)
        self.finish()
        self._locate()
        if self.staging is not None:
            self.staging.begin()
        # A daemon: a rank that dies does not wait for its peers, which may wait for it.
        arguments = (step, tensors, state)
        self._thread = threading.Thread(target=self._work, args=arguments, daemon=True)
        self._thread.start()
        if self.staging is None:
            self._thread.join()

    def settle(self) -> None:
        """Wait until the tensors of a save that is under way may change: they do in the optimizer's step alone."""
        if self.staging is not None:
            self.staging.settle()

    def finish(self) -> bool:
        """Wait for the save that is under way; whether the last one succeeded, on every rank the same."""
        if self._thread is not None:
            self._thread.join()
        return not self._failed

    def close(self) -> None:
        """Wait for the save that is under way, at most GRACE seconds: peers may be gone. A process that ends beside a
        thread that is in torch is aborted."""
        if self._thread is not None:
            self._thread.join(GRACE)

    @property
    def is_settled(self) -> bool:
        """Return whether `settle` would return at once."""
        return self.staging is None or self.staging.is_settled

    def _work(self, step: int, tensors: State, state: Mapping[str, Any]) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # each thread has its own
        self._failed, began = True, time.monotonic()
        try:
            self._write(step, tensors, state)
            self._failed = False
            seconds = round(time.monotonic() - began, 3)
            self.note("save", step=step, name=checkpoint.finished(self._temporary(step)).name, seconds=seconds)
        except (Exception, dcp.CheckpointException) as error:
            # Whatever it is, the run is better off without this checkpoint than without itself. Of a lost rank
            # training's own collectives tell the main thread.
            if self.rank == 0:
                self._tell(step, dcp.num_bytes(tensors), dcp.reason(error))
                self.note("save failed", step=step, reason=dcp.reason(error))
                shutil.rmtree(self._temporary(step), ignore_errors=True)
        finally:
            if self.staging is not None:
                self.staging.end()

    def _locate(self) -> None:
        """Find where the run is. Raises where it is another job's."""
        self.run = self.check_owner() or self.run

    def _temporary(self, step: int) -> Path:
        return checkpoint.unfinished(self.run / self.inside, step)

    def _tell(self, step: int, num_bytes: int, why: str) -> None:
        # What torch says when the disk is full is not that.
        run = self.run / self.inside
        folder = next(path for path in (run, *run.absolute().parents) if path.is_dir())
        last = next(iter(checkpoint.names(run)), "none")
        self.say(
            f"the checkpoint of step {step} could not be written: {why} ({num_bytes / 1e6:,.1f} MB are needed, "
            f"{shutil.disk_usage(folder).free / 1e6:,.1f} are free on {folder}); the last one in {run} is {last}"
        )

    def _write(self, step: int, tensors: State, state: Mapping[str, Any]) -> None:
        """Raise on every rank what fails on one."""

        def begin() -> str:
            if self.inside:
                Folder(self.run).folder(self.inside)  # which must not be a link
            checkpoint.make_room(self._temporary(step), dcp.num_bytes(tensors))
            return str(self.run)

        def commit() -> None:
            # Writing may have taken minutes, in which another job took over or the run was renamed.
            self._locate()
            checkpoint.commit(self._temporary(step), state, manifest, self.settings, self.passed_over, self.say)

        # The other ranks write where the main rank found the run.
        self.run = Path(self._together(begin if self.rank == 0 else lambda: str(self.run))[0])
        temporary = self._temporary(step)
        dcp.save(temporary, tensors, self.group, self.staging)
        mine = f"__{self.rank}_*"
        parts = self._together(lambda: checkpoint.describe(temporary.glob(mine)))
        manifest = {name: entry for part in parts for name, entry in part.items()}
        self._on_main(commit)

    def _on_main(self, action: Callable[[], None]) -> None:
        self._together(action if self.rank == 0 else lambda: None)

    def _together(self, action: Callable[[], T]) -> list[T]:
        """Return the function's result on every rank. Raises CheckpointError on all ranks where it failed on one."""
        results, wrong = list[T](), ""
        try:
            results.append(action())
        except Exception as error:  # else the others would wait for this rank
            wrong = str(error) or type(error).__name__
        every = distributed.gather_objects((results, wrong), self.group)
        if wrong := next((wrong for _, wrong in every if wrong), ""):
            raise CheckpointError(wrong)
        return [result for results, _ in every for result in results]
