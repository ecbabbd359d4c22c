"""The reports of a run: records and pictures for its trackers, events, and lines on the console.

This module reads no tensors: the trainer passes numbers, and only on the steps that it logs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from mimae.errors import RunError
from mimae.objective.terms import LOSSES
from mimae.outside.files import Folder
from mimae.outside.text import losses, say
from mimae.telemetry.console import Console
from mimae.telemetry.environment import environment
from mimae.telemetry.events import Events
from mimae.telemetry.records import EPOCH_KEYS, FILES, STEP_KEYS, plain
from mimae.telemetry.settings import TelemetrySettings
from mimae.telemetry.trackers import JSONLines, Tracker, open_trackers

ORIGINS = "origins.json"
"""File of the origins of a run's settings: by key a file and line, "override", or "default"."""


class Telemetry:
    """Writer of a run's records to its directory and the console. It only acts on the main rank.

    Call `rewind(step)` once before the first record of every start, with the step from which the run resumes. Records
    that cannot be written (a full disk, an unreachable server, a closed stdout) are lost, and the run continues.
    """

    def __init__(
        self,
        run: str | Path | Folder,
        settings: TelemetrySettings,
        *,
        is_main: bool,
        total_steps: int,
        step_keys: Sequence[str] = STEP_KEYS,
        epoch_keys: Sequence[str] = EPOCH_KEYS,
        losses: Sequence[str] = LOSSES,
        measures: Sequence[str] = ("knn", "val_rec"),
        work: Callable[[int], float] = float,
    ) -> None:
        """Open the trackers.

        `run` is the run's directory; `step_keys` and `epoch_keys` are the columns of metrics.jsonl and epochs.jsonl,
        of which people are shown `losses` and `measures`. `work` returns the work of the first steps of the run, from
        which the time left is estimated. Raises UserError for a tracker that is not installed.
        """
        self._folder = run if isinstance(run, Folder) else Folder(run)
        self._step_keys, self._epoch_keys = step_keys, epoch_keys
        self._step = 0
        self._lost: set[str] = set()
        self._unsaid: set[str] = set()
        self._console = Console(total_steps, losses, measures, work) if is_main else None
        self._trackers: list[Tracker] = []
        self.events = Events(self._folder if is_main else None, self.message)
        """Writer of events.jsonl."""
        if is_main:
            self._folder.make()
            self._folder.tell = self._moved
            self._trackers = open_trackers(settings.trackers, self._folder, self._failed)

    def rewind(self, step: int) -> None:
        """Drop the records after `step`, and torn lines, from metrics.jsonl and epochs.jsonl.

        A run that resumes from a checkpoint at `step` repeats the steps after it, and each step must occur once. Raises
        RunError if the files cannot be written.
        """
        self._step = self.events.step = step
        if self._console is None:
            return
        records, *others = self._trackers
        try:
            records.rewind(step)
        except OSError as error:
            raise self._unwritable(error) from error
        for tracker in others:
            self._try(tracker, lambda tracker: tracker.rewind(step))

    def begin(self, step: int) -> None:
        """Start to measure the speed at `step`, from which the time left is estimated."""
        if self._console is not None:
            self._console.begin(step)

    def describe(self, recipe: str, origins: Mapping[str, str] | None = None) -> None:
        """Write config.yaml (the resolved recipe) and environment.json, and pass them to the trackers.

        A new run also keeps the origins of its settings, in origins.json. Raises RunError as `keep` does.
        """
        if self._console is None:
            return
        if origins and not self._has(ORIGINS):
            self.keep(ORIGINS, json.dumps(dict(origins), indent=1) + "\n", lasting=False)
        for name, text in {"config.yaml": recipe, "environment.json": environment()}.items():
            self.keep(name, text)
            self._text(name, text)

    def keep(self, name: str, text: str, lasting: bool = True) -> None:
        """Write a file that describes the run; `lasting` is as for `Folder.replace`.

        Raises RunError if it cannot be written.
        """
        if self._console is None:
            return
        try:
            self._folder.replace(name, text, lasting)
        except OSError as error:
            raise self._unwritable(error) from error

    def step(self, record: Mapping[str, Any]) -> None:
        """Append a line of the step's columns to metrics.jsonl; keys that `record` lacks are null.

        `epoch` is the number of epochs done, as a fraction; `samples` is the number of images seen; `data_wait` is the
        share (0 to 1) of the wall time since the last log in which the device of this rank waited for data.
        """
        if self._console is None:
            return
        line = plain(FILES["train"], self._step_keys, record)
        self._step = self.events.step = int(line["step"])
        self._scalars("train", line)
        self._console.step(line)
        self._note_lost_output()

    def epoch(self, record: Mapping[str, Any]) -> None:
        """Append a line of the epoch's columns to epochs.jsonl; keys that `record` lacks are null.

        `step` is the step at which the epoch ended, by default the last logged one. After a resume from a checkpoint
        without sums of its epoch, all counts and means are those of the part since then. `seconds` is wall time and
        includes the phases' `seconds_*`. `bytes_sent` is the number of bytes that a rank sends in a step, by the
        formulas of docs/scaling.md; `exposed_communication` is the share (0 to 1) of three steps of the epoch in which
        this rank was in a collective without computing. The columns of ACCOUNT_KEYS are over all ranks.
        """
        if self._console is None:
            return
        line = plain(FILES["epoch"], self._epoch_keys, {"step": self._step, **record})
        # The step of the record may be after the last logged one.
        self._step = self.events.step = int(line["step"])
        self._scalars("epoch", line)
        self._console.epoch(line)

    def message(self, text: str) -> None:
        """Print a line, above the progress bar if there is one."""
        if self._console is not None:
            self._console.message(text)
            self._note_lost_output()

    def image(self, path: str | Path, png: bytes) -> None:
        """Write a PNG at `path` inside the run directory and show it in the trackers under the last step."""
        for tracker in self._trackers:
            self._try(tracker, lambda tracker: tracker.image(str(path), png, self._step))

    def close(self) -> None:
        """End the progress bar and close the trackers."""
        if self._console is None:
            return
        self._console.close()
        for tracker in self._trackers:
            self._try(tracker, lambda tracker: tracker.close())
        self._trackers = []
        self._note_lost_output()
        for stream, (writes, reason) in losses().items():
            # The message goes to the stream that can still be written.
            for error in (True, False):
                say(f"{writes} writes to {stream} failed: {reason}; the run continued without them", error=error)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.events.add("error", error=type(error).__name__, message=str(error)[:1000])
        self.close()

    def _text(self, name: str, text: str) -> None:
        for tracker in self._trackers:
            self._try(tracker, lambda tracker: tracker.text(name, text, self._step))

    def _scalars(self, group: str, line: Mapping[str, Any]) -> None:
        for tracker in self._trackers:
            self._try(tracker, lambda tracker: tracker.scalars(group, line, self._step))

    def _try(self, tracker: Tracker, action: Callable[[Tracker], None]) -> None:
        try:
            action(tracker)
        except Exception as error:  # Libraries may raise anything.
            self._failed(tracker.name, error)

    def _failed(self, tracker: str, error: Exception) -> None:
        """Report once for each tracker, or for each file, that it cannot be written."""
        file = getattr(error, "filename", None)
        what = str(file) if tracker == JSONLines.name and file else tracker
        if what in self._lost:
            return
        self._lost.add(what)
        reason = getattr(error, "strerror", None) or f"{error}".strip() or type(error).__name__
        self.events.add("fault", what=what, reason=str(reason)[:1000])
        self.message(f"{what} cannot be written: {reason}; the run continues")

    def _has(self, name: str) -> bool:
        """Return True if the run has this file; raise RunError if it is a link or cannot be opened."""
        try:
            os.close(self._folder.open(name, os.O_RDONLY))
        except FileNotFoundError:
            return False
        except OSError as error:
            raise self._unwritable(error) from error
        return True

    def _unwritable(self, error: OSError) -> RunError:
        return RunError(f"{self._folder.path / str(error.filename)} cannot be written: {error.strerror}")

    def _moved(self, text: str) -> None:
        self.events.add("moved", what=text)
        self.message(text)

    def _note_lost_output(self) -> None:
        """Record once for each stream that it cannot be written."""
        for stream, loss in losses().items():
            if stream not in self._unsaid:
                self._unsaid.add(stream)
                self.events.add("output lost", stream=stream, reason=loss.reason)
