"""What a run tells: metrics.jsonl per logged step, epochs.jsonl per epoch, TensorBoard, pictures, progress.

Every line of the two files holds all of its keys; what a run does not have, or what is not finite, is null.
Nothing here reads a tensor: the loop hands over numbers, and only on the steps that it logs.
"""

from __future__ import annotations

import io
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from mimae import __version__
from mimae.checkpoints.checkpoint import write_atomically
from mimae.config.section import Section
from mimae.errors import UserError
from mimae.objective import terms
from mimae.objective.terms import LOSSES

PHASES = ("data", "forward", "backward", "optimizer", "checkpoint")
"""Where the seconds of an epoch go; the rest of its wall time is the loop's own."""

IN_PHASE = "in the phase "
"""How the note begins that an error gets in a phase."""

STEP_KEYS = (
    "step", "epoch", "samples", *LOSSES, "gate", "lr", "grad_norm",
    "images_per_s", "views_per_s", "data_wait", "mem_peak_bytes",
)  # fmt: skip

DIAGNOSTICS = ("deviation", "effective_rank", "alignment", "uniformity", *terms.DIAGNOSTICS, "knn", "val_rec")

EPOCH_KEYS = (
    "epoch", "step", "images", "seconds", "images_per_s", "views_per_s", "data_wait", "mem_peak_bytes",
    "mem_reserved_bytes", "bytes_sent", "exposed_communication", "tflops", "mfu",
    *terms.ESTIMATES, *LOSSES, *(f"seconds_{phase}" for phase in PHASES), *DIAGNOSTICS,
)  # fmt: skip

_PACKAGES = ("torch", "torchvision", "triton", "timm", "numpy", "pillow")


class TelemetrySettings(Section):
    """How often a run reports, and where."""

    log_every_steps: int = Field(20, ge=1, description="steps between two lines of metrics.jsonl")
    images_every_epochs: int = Field(1, ge=0, description="epochs between two reconstruction pictures; 0: none")
    probe_every_epochs: int = Field(
        0, ge=0, description="epochs between two kNN and reconstruction checks on data.val_path; 0: none"
    )
    tensorboard: bool = Field(True, description="write TensorBoard event files to the run's tensorboard/")


class Telemetry:
    """Writes the records of a run to its directory and shows them; on all but the main rank it does nothing.

    Call `rewind(step)` once before the first record of every start, with the step the run goes on from.
    """

    def __init__(self, run_dir: str | Path, settings: TelemetrySettings, *, is_main: bool, total_steps: int) -> None:
        self._is_main = is_main
        self._run_dir = Path(run_dir)
        self._total_steps = total_steps
        self._step = 0
        self._purge_step: int | None = None
        # Recent (step, time) pairs: the time left follows what the last logs took, checkpoints included.
        self._pace: deque[tuple[int, float]] = deque([(0, time.monotonic())], maxlen=50)
        self._tensorboard: Any = None
        self._writer_class: Any = None
        self._files: dict[str, TextIO] = {}
        self._lost: set[str] = set()
        self._progress: Progress | None = None
        if not is_main:
            return
        self._run_dir.mkdir(parents=True, exist_ok=True)
        if settings.tensorboard:
            self._writer_class = _summary_writer_class()
        if sys.stdout.isatty():
            self._progress = Progress(
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[status]}"),
                console=Console(file=sys.stdout),
                auto_refresh=False,  # drawn at each log: no thread beside the forks of the data loaders
            )
            self._task = self._progress.add_task("pretraining", total=total_steps, status="")

    def rewind(self, step: int) -> None:
        """Drops the records after `step`, and torn lines, from metrics.jsonl and epochs.jsonl.

        A run that goes on from a checkpoint at `step` repeats the steps after it; so each step is there once.
        """
        self._step = step
        self._purge_step = step + 1
        self._pace.clear()
        self._pace.append((step, time.monotonic()))
        if not self._is_main:
            return
        for name in ("metrics.jsonl", "epochs.jsonl"):
            if name in self._files:
                self._files.pop(name).close()
            path = self._run_dir / name
            if path.exists():
                kept = [line for line in path.read_bytes().splitlines() if _is_record_until(line, step)]
                write_atomically(path, b"".join(line + b"\n" for line in kept))

    def step(self, record: Mapping[str, Any]) -> None:
        """Appends a line of STEP_KEYS to metrics.jsonl; keys that `record` lacks are null.

        `epoch` counts the epochs done, as a fraction; `samples` the images seen; `data_wait` is the share of
        the wall time since the last log in which the device of this rank waited for data, 0 to 1.
        """
        if not self._is_main:
            return
        plain = self._append("metrics.jsonl", STEP_KEYS, record)
        self._step = int(plain["step"])
        self._pace.append((self._step, time.monotonic()))
        self._scalars("train", plain)
        left = self._seconds_left()
        if self._progress is None:
            print(self._step_line(plain, left), flush=True)
        else:
            self._progress.start()
            status = f"{_total(plain)}  {_rate(plain)}{_wait(plain)}  {_clock(left)} left"  # fits 80 columns
            self._progress.update(self._task, completed=self._step, status=status, refresh=True)

    def epoch(self, record: Mapping[str, Any]) -> None:
        """Appends a line of EPOCH_KEYS to epochs.jsonl; keys that `record` lacks are null.

        `step` is the step at which the epoch ended. After a resume in the middle of an epoch, `images` and
        `seconds` count the part since then. `seconds` is wall time and holds the phases' `seconds_*`. `bytes_sent` is
        what a rank sends in a step, by the formulas of docs/scaling.md; `exposed_communication` the share of the
        epoch's second step, 0 to 1, in which this rank was in a collective and computed nothing.
        """
        if not self._is_main:
            return
        plain = self._append("epochs.jsonl", EPOCH_KEYS, {"step": self._step, **record})
        self._scalars("epoch", plain)
        parts = [f"epoch {plain['epoch']} done", _losses(plain), _rate(plain)]
        parts += [f"{key} {plain[key]:.3f}" for key in ("knn", "val_rec") if plain[key] is not None]
        if plain["mfu"] is not None:
            parts.append(f"MFU {100 * plain['mfu']:.1f} %")
        self.message("  ".join(parts))

    def message(self, text: str) -> None:
        """Prints a line for people, above the progress bar where there is one."""
        if not self._is_main:
            return
        if self._progress is None:
            print(text, flush=True)
        else:
            self._progress.console.print(text, markup=False, highlight=False)

    def image(self, path: str | Path, png: bytes) -> None:
        """Writes a PNG at `path` inside the run directory and shows it in TensorBoard under the last step."""
        if not self._is_main:
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
        if self._progress is not None:
            self._progress.stop()
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
        unknown = sorted(set(record) - set(keys))
        assert not unknown, f"{name} has no keys {unknown}"
        plain = {key: _plain(record.get(key)) for key in keys}
        with self._surviving(name):
            if name not in self._files:
                self._files[name] = (self._run_dir / name).open("a", encoding="utf-8")
            self._files[name].write(json.dumps(plain, allow_nan=False) + "\n")
            self._files[name].flush()  # in the system's hands: a kill of this process cannot lose it
        return plain

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

    def _seconds_left(self) -> float | None:
        (first_step, first), (last_step, last) = self._pace[0], self._pace[-1]
        if last_step <= first_step:
            return None
        return (self._total_steps - last_step) * (last - first) / (last_step - first_step)

    def _step_line(self, plain: Mapping[str, Any], left: float | None) -> str:
        width = len(str(self._total_steps))
        head = f"step {plain['step']:>{width}}/{self._total_steps}"
        epoch = "" if plain["epoch"] is None else f"  epoch {plain['epoch']:.2f}"
        return f"{head}{epoch}  {_losses(plain)}  {_rate(plain)}{_wait(plain)}  eta {_clock(left)}"


class Phases:
    """Seconds spent in each of PHASES since it was made: `with phases("forward"): ...`.

    A phase inside another is taken out of it, so the sum counts no time twice. An error says in which it was. On CUDA a
    phase is timed by the device, by a pair of events that nothing waits for until `seconds()` is read: waiting for data
    counts from when the device has done all it was given until it is given more, and is nothing where it was busy all
    the while. Saving checkpoints is timed by the host's clock, as everything is on the CPU.
    """

    _HOST = ("checkpoint",)

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._open: list[str] = []
        self._pending: deque[tuple[str, str | None, torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        assert name in PHASES, name
        outer = self._open[-1] if self._open else None
        if outer is not None and self._uses_events(outer) != self._uses_events(name):
            outer = None  # two clocks: what the host waits is not what the device works
        self._open.append(name)
        try:
            if self._uses_events(name):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                try:
                    yield
                finally:
                    end.record()
                    self._pending.append((name, outer, start, end))
                    self._settle_done()  # keeps the queue short
            else:
                began = time.perf_counter()
                try:
                    yield
                finally:
                    self._add(name, outer, time.perf_counter() - began)
        except Exception as error:
            error.add_note(IN_PHASE + name)
            raise
        finally:
            self._open.pop()

    @property
    def data_seconds(self) -> float:
        """Seconds spent waiting for data; reading it waits for nothing, so on CUDA it lacks what is not done yet."""
        self._settle_done()
        return self._seconds["data"]

    def seconds(self) -> dict[str, float]:
        """Seconds by phase. On CUDA this waits for the device."""
        if self._pending:
            self._pending[-1][3].synchronize()
        self._settle_done()
        return dict(self._seconds)

    def _uses_events(self, name: str) -> bool:
        return self._on_cuda and name not in self._HOST

    def _settle_done(self) -> None:
        """Adds the phases that the device is done with."""
        while self._pending and self._pending[0][3].query():
            name, outer, start, end = self._pending.popleft()
            self._add(name, outer, start.elapsed_time(end) / 1000)

    def _add(self, name: str, outer: str | None, seconds: float) -> None:
        self._seconds[name] += seconds
        if outer is not None:
            self._seconds[outer] -= seconds


class Pace:
    """Rates since the last reading: one of these for the logged steps, another for the epochs."""

    def __init__(self, phases: Phases, num_masks: int) -> None:
        self._phases = phases
        self._num_masks = num_masks
        self._began = time.perf_counter()
        self._waited = phases.data_seconds
        self._by_phase = phases.seconds()

    def rates(self, images: int) -> dict[str, float]:
        """`images_per_s`, `views_per_s` and `data_wait` (0 to 1) of `images` since the last reading."""
        now, waited = time.perf_counter(), self._phases.data_seconds
        seconds = max(now - self._began, 1e-9)
        rates = {
            "images_per_s": images / seconds,
            "views_per_s": images * self._num_masks / seconds,
            "data_wait": min((waited - self._waited) / seconds, 1.0),
        }
        self._began, self._waited = now, waited
        return rates

    def epoch(self, images: int) -> dict[str, float]:
        """`rates`, `images`, `seconds` and the phases' `seconds_*`. On CUDA this waits for the device."""
        by_phase = self._phases.seconds()
        spent = {f"seconds_{phase}": by_phase[phase] - self._by_phase[phase] for phase in PHASES}
        self._by_phase = by_phase
        seconds = time.perf_counter() - self._began
        return {"images": images, "seconds": seconds, **self.rates(images), **spent}


def memory(device: torch.device) -> dict[str, int | None]:
    """`mem_peak_bytes` and `mem_reserved_bytes` of this process so far.

    On CUDA the most that tensors held and the most that the allocator reserved on `device`. On the CPU the
    peak of the process's resident memory, which holds the libraries and shared pages too, and None.
    """
    if device.type == "cuda":
        return {
            "mem_peak_bytes": torch.cuda.max_memory_allocated(device),
            "mem_reserved_bytes": torch.cuda.max_memory_reserved(device),
        }
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"mem_peak_bytes": peak, "mem_reserved_bytes": None}


def environment(path: str | Path) -> None:
    """Writes what a run runs on as JSON: versions, platform, GPUs, the checkout's commit; nobody's names."""
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    facts = {
        "mimae": __version__,
        "git": _git_state(Path(__file__).resolve().parents[2]),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "gpus": [{"name": gpu.name, "memory_bytes": gpu.total_memory} for gpu in gpus],
        "packages": {name: _version(name) for name in _PACKAGES},
    }
    write_atomically(Path(path), json.dumps(facts, indent=2) + "\n")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_state(root: Path) -> dict[str, Any] | None:
    """The commit of the checkout at `root` and whether it was changed; None where `root` is no checkout."""
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout.strip()

    try:
        return {
            "commit": git("rev-parse", "HEAD"),
            "changed": bool(git("status", "--porcelain", "--untracked-files=no")),
        }
    except (OSError, subprocess.SubprocessError):
        return None  # no git program, or a checkout that it refuses to read


def _summary_writer_class() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError(
            f"telemetry.tensorboard is true, but TensorBoard cannot be imported ({error}): "
            "install it with `pip install tensorboard`, or set telemetry.tensorboard=false"
        ) from error
    return SummaryWriter


def _is_record_until(line: bytes, step: int) -> bool:
    try:
        return bool(json.loads(line)["step"] <= step)
    except (ValueError, KeyError, TypeError):
        return False


def _plain(value: Any) -> Any:
    """A value as JSON has it: numbers of NumPy and torch become Python's, what is not finite becomes None."""
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _losses(plain: Mapping[str, Any]) -> str:
    parts = ", ".join(f"{key} {plain[key]:.3f}" for key in LOSSES[1:] if plain[key] is not None)
    return f"{_total(plain)} ({parts})"


def _total(plain: Mapping[str, Any]) -> str:
    return "loss not finite" if plain["loss"] is None else f"loss {plain['loss']:.3f}"


def _rate(plain: Mapping[str, Any]) -> str:
    return "" if plain["images_per_s"] is None else f"{plain['images_per_s']:.0f} images/s"


def _wait(plain: Mapping[str, Any]) -> str:
    return "" if plain["data_wait"] is None else f"  wait {plain['data_wait']:.1%}"


def _clock(seconds: float | None) -> str:
    if seconds is None:
        return "-:--"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
