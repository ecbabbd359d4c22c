"""What a run tells: records, TensorBoard, pictures, and lines for people.

Nothing here reads a tensor: the loop hands over numbers, and only on the steps that it logs.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

import numpy as np
from PIL import Image

from mimae.checkpoints.checkpoint import write_atomically
from mimae.errors import UserError
from mimae.telemetry.console import Console
from mimae.telemetry.records import EPOCH_KEYS, STEP_KEYS, is_until, plain
from mimae.telemetry.settings import TelemetrySettings


class Telemetry:
    """Writes the records of a run to its directory and shows them; on all but the main rank it does nothing.

    Call `rewind(step)` once before the first record of every start, with the step the run goes on from.
    """

    def __init__(self, run_dir: str | Path, settings: TelemetrySettings, *, is_main: bool, total_steps: int) -> None:
        self._is_main = is_main
        self._run_dir = Path(run_dir)
        self._step = 0
        self._purge_step: int | None = None
        self._tensorboard: Any = None
        self._writer_class: Any = None
        self._files: dict[str, TextIO] = {}
        self._lost: set[str] = set()
        self._console = Console(total_steps) if is_main else None
        if not is_main:
            return
        self._run_dir.mkdir(parents=True, exist_ok=True)
        if settings.tensorboard:
            self._writer_class = _summary_writer_class()

    def rewind(self, step: int) -> None:
        """Drops the records after `step`, and torn lines, from metrics.jsonl and epochs.jsonl.

        A run that goes on from a checkpoint at `step` repeats the steps after it; so each step is there once.
        """
        self._step = step
        self._purge_step = step + 1
        if self._console is None:
            return
        self._console.rewind(step)
        for name in ("metrics.jsonl", "epochs.jsonl"):
            if name in self._files:
                self._files.pop(name).close()
            path = self._run_dir / name
            if path.exists():
                kept = [line for line in path.read_bytes().splitlines() if is_until(line, step)]
                write_atomically(path, b"".join(line + b"\n" for line in kept))

    def step(self, record: Mapping[str, Any]) -> None:
        """Appends a line of STEP_KEYS to metrics.jsonl; keys that `record` lacks are null.

        `epoch` counts the epochs done, as a fraction; `samples` the images seen; `data_wait` is the share of
        the wall time since the last log in which the device of this rank waited for data, 0 to 1.
        """
        if self._console is None:
            return
        line = self._append("metrics.jsonl", STEP_KEYS, record)
        self._step = int(line["step"])
        self._scalars("train", line)
        self._console.step(line)

    def epoch(self, record: Mapping[str, Any]) -> None:
        """Appends a line of EPOCH_KEYS to epochs.jsonl; keys that `record` lacks are null.

        `step` is the step at which the epoch ended. After a resume in the middle of an epoch, `images` and
        `seconds` count the part since then. `seconds` is wall time and holds the phases' `seconds_*`. `bytes_sent` is
        what a rank sends in a step, by the formulas of docs/scaling.md; `exposed_communication` the share of the
        epoch's second step, 0 to 1, in which this rank was in a collective and computed nothing.
        """
        if self._console is None:
            return
        line = self._append("epochs.jsonl", EPOCH_KEYS, {"step": self._step, **record})
        self._scalars("epoch", line)
        self._console.epoch(line)

    def message(self, text: str) -> None:
        """Prints a line for people, above the progress bar where there is one."""
        if self._console is not None:
            self._console.message(text)

    def image(self, path: str | Path, png: bytes) -> None:
        """Writes a PNG at `path` inside the run directory and shows it in TensorBoard under the last step."""
        if self._console is None:
            return
        target = self._run_dir / path
        with self._surviving(str(path)):
            target.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(target, png)
        with self._surviving("tensorboard"):
            if writer := self._writer():
                pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
                writer.add_image(Path(path).parent.name or "image", pixels, self._step, dataformats="HWC")

    def close(self) -> None:
        """Ends the progress bar and closes the files."""
        if self._console is not None:
            self._console.close()
        for name, file in self._files.items():
            with self._surviving(name):
                file.close()
        self._files.clear()
        with self._surviving("tensorboard"):
            if self._tensorboard is not None:
                self._tensorboard.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _append(self, name: str, keys: Sequence[str], record: Mapping[str, Any]) -> dict[str, Any]:
        line = plain(name, keys, record)
        with self._surviving(name):
            if name not in self._files:
                self._files[name] = (self._run_dir / name).open("a", encoding="utf-8")
            self._files[name].write(json.dumps(line, allow_nan=False) + "\n")
            self._files[name].flush()  # in the system's hands: a kill of this process cannot lose it
        return line

    @contextmanager
    def _surviving(self, what: str) -> Iterator[None]:
        """A disk that is full or gone costs the run its records of that time, told once for each file, not itself."""
        try:
            yield
        except OSError as error:
            if what not in self._lost:
                self.message(f"{what} cannot be written: {error.strerror or error}; the run goes on")
            self._lost.add(what)
            if what == "tensorboard":  # its writer's thread has ended
                self._tensorboard = self._writer_class = None

    def _scalars(self, group: str, plain: Mapping[str, Any]) -> None:
        with self._surviving("tensorboard"):
            self._add_scalars(group, plain)

    def _add_scalars(self, group: str, plain: Mapping[str, Any]) -> None:
        if writer := self._writer():
            for key, value in plain.items():
                if key != "step" and value is not None:
                    writer.add_scalar(f"{group}/{key}", value, self._step)
            writer.flush()

    def _writer(self) -> Any:
        """The event writer, made at the first use: by then `rewind` has said which steps to purge."""
        if self._tensorboard is None and self._writer_class is not None:
            directory = str(self._run_dir / "tensorboard")
            self._tensorboard = self._writer_class(directory, purge_step=self._purge_step)
        return self._tensorboard


def _summary_writer_class() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError(
            f"telemetry.tensorboard is true, but TensorBoard cannot be imported ({error}): "
            "install it with `pip install tensorboard`, or set telemetry.tensorboard=false"
        ) from error
    return SummaryWriter
