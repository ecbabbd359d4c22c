"""Saving in the background: tensors are copied during a forward and backward, and written during the following steps.

A checkpoint that cannot be written does not stop the run: the failure is reported, and the previous checkpoint stays
the last one.
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
"""Longest time in seconds that a run which ends with an error waits for a save in progress."""


class Saver:
    """Writer of a run's checkpoints, one at a time. Every rank has one and calls its methods at the same points."""

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
        """Make a saver of `run`, or of a folder `inside` it.

        A collective: it makes a process group for the agreement of the ranks about a save, separate from training's.
        `check_owner` raises if another job owns the run by now, and returns the path of the run, which may have been
        renamed. `note` records the outcome of a save.
        """
        self.run, self.settings, self.device, self.say, self.check_owner = run, settings, device, say, check_owner
        self.inside, self.note = inside, note
        self.passed_over: set[str] = set()
        """Names of damaged checkpoints that were passed over when the run was resumed."""
        # Stored here because the thread may outlive training's process group.
        self.group, self.rank = distributed.host_group(), distributed.rank()
        self.staging = dcp.Staging(device) if settings.background else None
        self._thread: threading.Thread | None = None
        self._failed = False

    def start(self, step: int, tensors: State, state: Mapping[str, Any]) -> None:
        """Begin the checkpoint of `step`, after the previous one is written. `state` has the values for state.json.

        The tensors may change after the next `settle`. Raises RunError if another job owns the run.
        """
        state = {"step": step, **state}
        assert not wrong_with(state), wrong_with(state)
        self.finish()
        self._locate()
        if self.staging is not None:
            self.staging.begin()
        # A daemon thread: a rank that dies must not wait for its peers, which may be waiting for it.
        arguments = (step, tensors, state)
        self._thread = threading.Thread(target=self._work, args=arguments, daemon=True)
        self._thread.start()
        if self.staging is None:
            self._thread.join()

    def settle(self) -> None:
        """Wait until the tensors of a save in progress may change. Only the optimizer's step changes them."""
        if self.staging is not None:
            self.staging.settle()

    def finish(self) -> bool:
        """Wait for a save in progress, and return whether the last one succeeded: the same on every rank."""
        if self._thread is not None:
            self._thread.join()
        return not self._failed

    def close(self) -> None:
        """Wait for a save in progress, for at most GRACE seconds since peers may be gone.

        A process that exits while a thread is inside torch would abort.
        """
        if self._thread is not None:
            self._thread.join(GRACE)

    @property
    def is_settled(self) -> bool:
        """Return whether `settle` would return at once."""
        return self.staging is None or self.staging.is_settled

    def _work(self, step: int, tensors: State, state: Mapping[str, Any]) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # The current device is a property of the thread.
        self._failed, began = True, time.monotonic()
        try:
            self._write(step, tensors, state)
            self._failed = False
            seconds = round(time.monotonic() - began, 3)
            self.note("save", step=step, name=checkpoint.finished(self._temporary(step)).name, seconds=seconds)
        except (Exception, dcp.CheckpointException) as error:
            # A missing checkpoint is better than a stopped run, whatever the error is. The main thread learns of a lost
            # rank from training's own collectives.
            if self.rank == 0:
                self._tell(step, dcp.num_bytes(tensors), dcp.reason(error))
                self.note("save failed", step=step, reason=dcp.reason(error))
                shutil.rmtree(self._temporary(step), ignore_errors=True)
        finally:
            if self.staging is not None:
                self.staging.end()

    def _locate(self) -> None:
        """Update the path of the run. Raises RunError if another job owns it."""
        self.run = self.check_owner() or self.run

    def _temporary(self, step: int) -> Path:
        return checkpoint.unfinished(self.run / self.inside, step)

    def _tell(self, step: int, num_bytes: int, why: str) -> None:
        # torch's error for a full disk does not name the cause; so report the free space.
        run = self.run / self.inside
        folder = next(path for path in (run, *run.absolute().parents) if path.is_dir())
        last = next(iter(checkpoint.names(run)), "none")
        self.say(
            f"the checkpoint of step {step} could not be written: {why} ({num_bytes / 1e6:,.1f} MB are needed, "
            f"{shutil.disk_usage(folder).free / 1e6:,.1f} are free on {folder}); the last one in {run} is {last}"
        )

    def _write(self, step: int, tensors: State, state: Mapping[str, Any]) -> None:
        """Write the checkpoint. Raises on every rank if it fails on one."""

        def begin() -> str:
            if self.inside:
                Folder(self.run).folder(self.inside)  # Raises if it is a link.
            checkpoint.make_room(self._temporary(step), dcp.num_bytes(tensors))
            return str(self.run)

        def commit() -> None:
            # Writing may have taken minutes. Meanwhile another job may have taken the run, or it may have been renamed.
            self._locate()
            checkpoint.commit(self._temporary(step), state, manifest, self.settings, self.passed_over, self.say)

        # The other ranks write to the path that the main rank found.
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
        """Return the results of `action` on all ranks. Raises CheckpointError on all ranks if it failed on one."""
        results, wrong = list[T](), ""
        try:
            results.append(action())
        except Exception as error:  # Otherwise the other ranks would wait for this one.
            wrong = str(error) or type(error).__name__
        every = distributed.gather_objects((results, wrong), self.group)
        if wrong := next((wrong for _, wrong in every if wrong), ""):
            raise CheckpointError(wrong)
        return [result for results, _ in every for result in results]
