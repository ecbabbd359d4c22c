"""Trackers of a run's curves: one protocol, and the two trackers that every installation has.

`telemetry.trackers` names the trackers in addition to the JSON lines. A new tracker is a class, here or in its own
file, and a line of `TRACKERS`.
"""

from __future__ import annotations

import io
import json
import queue
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from mimae.errors import UserError
from mimae.outside.files import Folder
from mimae.telemetry.records import FILES, is_until

GRACE = 30.0
"""Seconds that a run waits at its end for a tracker with a server."""

_WAITING = 1000
"""Largest number of calls that are queued for a tracker with a server; further calls are dropped."""

_RECORDS_BYTES = 1 << 32

_IDS = "trackers.json"


class Tracker(Protocol):
    """Receiver of a run's reports. If a method raises, the tracker misses that call, and the run continues."""

    name: str
    """Name of the tracker in messages."""

    def rewind(self, step: int) -> None:
        """Begin or resume after `step`. This is called before all other methods."""

    def scalars(self, group: str, values: Mapping[str, Any], step: int) -> None:
        """Record numbers by key; a value may be None. `group` is `train` for a logged step, or `epoch`."""

    def image(self, path: str, png: bytes, step: int) -> None:
        """Record a picture; `path` is its path in the run directory."""

    def text(self, name: str, text: str, step: int) -> None:
        """Record a file that describes the run: the resolved recipe (YAML) or the environment (JSON)."""

    def close(self) -> None:
        """Write everything that is still queued."""


class JSONLines:
    """Tracker that writes metrics.jsonl, epochs.jsonl and the pictures to the run directory. Errors name the file."""

    name = "records"

    def __init__(self, folder: Folder) -> None:
        self._folder = folder

    def rewind(self, step: int) -> None:
        """Drop the records after `step`, and torn lines: a resumed run repeats the steps after its checkpoint."""
        for name in FILES.values():
            if not self._folder.exists(name):
                continue
            lines = self._folder.read(name, _RECORDS_BYTES).splitlines(keepends=True)
            kept = [line for line in lines if line.endswith(b"\n") and is_until(line, step)]
            if len(kept) != len(lines):
                self._folder.replace(name, b"".join(kept))

    def scalars(self, group: str, values: Mapping[str, Any], step: int) -> None:
        self._folder.append(FILES[group], json.dumps(values, allow_nan=False).encode() + b"\n")

    def image(self, path: str, png: bytes, step: int) -> None:
        self._folder.replace(path, png)

    def text(self, name: str, text: str, step: int) -> None:
        """Do nothing: these files are in the run directory already."""

    def close(self) -> None:
        """Do nothing: the operating system has each line, so that a kill of this process cannot lose it."""


class TensorBoard:
    """Tracker that writes event files to the run's tensorboard/."""

    name = "tensorboard"

    def __init__(self, folder: Folder) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise _missing(self.name, "tensorboard", error) from error
        self._folder, self._class = folder, SummaryWriter
        self._writer: Any = None
        self._purge_step: int | None = None
        self._is_lost, self._moves = False, folder.moves

    def rewind(self, step: int) -> None:
        self._purge_step = step + 1

    def scalars(self, group: str, values: Mapping[str, Any], step: int) -> None:
        def write(writer: Any) -> None:
            for key, value in values.items():
                if key != "step" and value is not None:
                    writer.add_scalar(f"{group}/{key}", value, step)
            writer.flush()

        self._write(write)

    def image(self, path: str, png: bytes, step: int) -> None:
        pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
        name = Path(path).parent.name or "image"
        self._write(lambda writer: writer.add_image(name, pixels, step, dataformats="HWC"))

    def text(self, name: str, text: str, step: int) -> None:
        shown = "".join(f"    {line}\n" for line in text.splitlines())  # Indented lines are verbatim text in Markdown.
        self._write(lambda writer: writer.add_text(name, shown, step))

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def _write(self, action: Callable[[Any], None]) -> None:
        if self._moves != self._folder.moves:  # The writer would open its file by the old path each time.
            self._moves, self._writer, self._is_lost = self._folder.moves, None, False
        if self._is_lost:
            return
        try:
            if self._writer is None:
                home = str(self._folder.entrust(self.name))
                # The random suffix prevents a prepared link at the path of the file.
                suffix = f".{secrets.token_hex(8)}"
                self._writer = self._class(home, purge_step=self._purge_step, filename_suffix=suffix)
            action(self._writer)
        except OSError:
            self._is_lost, self._writer = True, None  # The writer's thread ends at its first error.
            raise


class Aside:
    """A tracker with a server, in a separate thread: a slow or dead server never delays a step."""

    def __init__(self, name: str, make: Callable[[], Tracker], failed: Callable[[str, Exception], None]) -> None:
        """Start the thread, in which `make` and all calls run. `failed` is called with the errors that they raise."""
        self.name, self._make, self._failed = name, make, failed
        self._calls: queue.Queue[tuple[str, tuple[Any, ...]]] = queue.Queue(_WAITING)
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def rewind(self, step: int) -> None:
        self._put("rewind", step)

    def scalars(self, group: str, values: Mapping[str, Any], step: int) -> None:
        self._put("scalars", group, dict(values), step)

    def image(self, path: str, png: bytes, step: int) -> None:
        self._put("image", path, png, step)

    def text(self, name: str, text: str, step: int) -> None:
        self._put("text", name, text, step)

    def close(self) -> None:
        """Wait until the queue is empty, for at most GRACE seconds."""
        self._put("close")
        self._thread.join(GRACE)
        if self._thread.is_alive():
            raise TimeoutError(f"it did not accept all records within {GRACE:.0f} s")

    def _put(self, method: str, *arguments: Any) -> None:
        if not self._thread.is_alive():
            return  # The tracker could not begin, which has been reported.
        try:
            self._calls.put_nowait((method, arguments))
        except queue.Full:
            raise TimeoutError(f"it is {_WAITING} calls behind; more calls are dropped until it catches up") from None

    def _work(self) -> None:
        try:
            tracker = self._make()
        except Exception as error:
            self._failed(self.name, error)
            return
        method = ""
        while method != "close":
            method, arguments = self._calls.get()
            try:
                getattr(tracker, method)(*arguments)
            except Exception as error:
                self._failed(self.name, error)
                if method == "rewind":
                    return


def open_trackers(names: Sequence[str], folder: Folder, failed: Callable[[str, Exception], None]) -> list[Tracker]:
    """Return the JSON lines and those of `telemetry.trackers`. Raises UserError for one that is not installed."""
    return [JSONLines(folder), *(TRACKERS[name](folder, failed) for name in dict.fromkeys(names))]


def kept_id(folder: Folder, tracker: str, make: Callable[[], str]) -> str:
    """Return the id of a run in a tracker.

    It is stored in the run directory, so that a resumed run continues under it.
    """
    ids: dict[str, str] = {}
    with suppress(OSError, ValueError):
        found = json.loads(folder.read(_IDS, 1 << 16))
        ids = {key: value for key, value in found.items() if isinstance(value, str)} if isinstance(found, dict) else {}
    if tracker not in ids:
        ids[tracker] = make()
        folder.replace(_IDS, json.dumps(ids) + "\n")
    return ids[tracker]


def _aside(name: str, module: str, kind: str) -> _Opener:
    """Return a function that opens the tracker `kind` of a module in this package, if library `name` is installed."""

    def open_it(folder: Folder, failed: Callable[[str, Exception], None]) -> Tracker:
        if find_spec(name) is None:
            raise _missing(name, "'mimae[track]'", "it is not installed")
        return Aside(name, lambda: getattr(import_module(f"mimae.telemetry.{module}"), kind)(folder), failed)

    return open_it


def _missing(name: str, package: str, why: object) -> UserError:
    return UserError(
        f"telemetry.trackers names {name}, which cannot be used ({why}): install it with `pip install {package}`, or "
        f"leave it out, for example with telemetry.trackers=[]"
    )


_Opener = Callable[[Folder, Callable[[str, Exception], None]], Tracker]

TRACKERS: dict[str, _Opener] = {
    "tensorboard": lambda folder, failed: TensorBoard(folder),
    "wandb": _aside("wandb", "wandb_tracker", "WandB"),
    "mlflow": _aside("mlflow", "mlflow_tracker", "MLflow"),
}
"""Functions that open a tracker, by name in `telemetry.trackers`."""
