"""The use of an input in a forked child with limited memory and time, which may write only to its own folder."""

from __future__ import annotations

import json
import os
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

from mimae.bench.harness.fuzz.case import Case
from mimae.errors import UserError
from mimae.outside.text import printable

CPU_SECONDS = 10
"""Maximal processor time of an input, in seconds."""

WALL_SECONDS = 300.0
"""Wall time in seconds after which an input counts as a hang. It is long, because the machine may be busy."""

MEMORY = 1 << 30
"""Maximal number of bytes that an input may take in addition to the memory of the warm process."""

LONGEST = 60_000
"""Maximal number of characters of a refusal. Nobody would read a longer one."""

_CANARY = b"a file that is not of the run\n"
_MIB = 1 << 20

Verdict = Literal["used", "refused", "traceback", "hang", "memory", "count", "outside", "words", "killed"]


class Wrong(Exception):
    """An input was used, but the result does not correspond to the input."""


class Outcome(NamedTuple):
    """The result of an input. All verdicts except used and refused are finds."""

    verdict: Verdict
    said: str
    """The message of the refusal, or a description of the error."""
    seconds: float
    """Processor time in seconds."""
    mib: float
    """Peak memory in MiB, in addition to the memory of the warm process."""

    @property
    def is_find(self) -> bool:
        return self.verdict not in ("used", "refused")


def run(make: Callable[[], Case], use: Callable[[Path, Case], str], memory: int = MEMORY) -> Outcome:
    """Make a case and use it in a child. `use(folder, case)` returns the reason of a refusal, or an empty string.

    The child's working directory is the folder `case`, which has the case's files and in which it may write.
    """
    scratch = Path(tempfile.mkdtemp(prefix="mimae-fuzz-"))
    for name in ("case", "home", "canary/folder"):
        (scratch / name).mkdir(parents=True)
    for name in ("canary/file", "canary/folder/file"):
        (scratch / name).write_bytes(_CANARY)
    reading, writing = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        try:
            _child(scratch, make, use, memory, writing)
        finally:
            os._exit(1)
    os.close(writing)
    try:
        text, stopped = _watch(pid, reading, memory)
        _, status, used = os.wait4(pid, 0)
        return _judge(scratch, text, stopped, status, used)
    finally:
        os.close(reading)
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)  # This ends the processes that the child has started.
        shutil.rmtree(scratch, ignore_errors=True)


def _watch(pid: int, reading: int, memory: int) -> tuple[bytes, Verdict | None]:
    """Return the report of the child, and the reason if it was stopped."""
    begun = resident(pid)
    text, end = b"", time.monotonic() + WALL_SECONDS
    while True:
        if select.select([reading], [], [], 0.05)[0]:
            piece = os.read(reading, 1 << 16)
            if not piece:
                return text, None
            text += piece
        stopped: Verdict | None = None
        if resident(pid) - begun > memory:
            stopped = "memory"
        elif time.monotonic() > end:
            stopped = "hang"
        if stopped is not None:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            return text, stopped


def resident(pid: int) -> int:
    """Return the anonymous resident memory of a process in bytes; 0 if the process does not exist."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return _kib(status, "RssAnon") * 1024


def _kib(status: str, field: str) -> int:
    line = next((line for line in status.splitlines() if line.startswith(f"{field}:")), f"{field}: 0 kB")
    return int(line.split()[1])


def _judge(scratch: Path, text: bytes, stopped: Verdict | None, status: int, used: resource.struct_rusage) -> Outcome:
    seconds = used.ru_utime + used.ru_stime
    output = (scratch / "output").read_text(errors="replace")[-4000:] if (scratch / "output").exists() else ""
    if stopped is not None:
        return Outcome(stopped, f"stopped after {seconds:.1f} s of processor time\n{output}", seconds, 0.0)
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        verdict: Verdict = "hang" if number == signal.SIGXCPU else "killed"
        return Outcome(verdict, f"ended by {signal.Signals(number).name}\n{output}", seconds, 0.0)
    try:
        report = json.loads(text)
    except ValueError:
        return Outcome(
            "killed", f"ended with {os.waitstatus_to_exitcode(status)}, without a report\n{output}", seconds, 0.0
        )
    verdict, said = report["verdict"], report["said"]
    intact = all((scratch / name).read_bytes() == _CANARY for name in ("canary/file", "canary/folder/file"))
    if sorted(path.name for path in (scratch / "canary").rglob("*")) != ["file", "file", "folder"] or not intact:
        verdict, said = "outside", f"a file outside the case was changed; {said}"
    elif "Traceback (most recent call last)" in output and verdict in ("used", "refused"):
        verdict, said = "traceback", f"printed\n{output}"
    return Outcome(verdict, said, seconds, report["mib"])


def _child(
    scratch: Path, make: Callable[[], Case], use: Callable[[Path, Case], str], memory: int, writing: int
) -> None:
    os.setsid()
    nothing, output = os.open(os.devnull, os.O_RDONLY), os.open(scratch / "output", os.O_CREAT | os.O_RDWR, 0o600)
    for number, descriptor in enumerate((nothing, output, output)):
        os.dup2(descriptor, number)
    sys.stdout, sys.stderr = (os.fdopen(os.dup(n), "w", errors="backslashreplace") for n in (1, 2))
    for kind, limit in (
        (resource.RLIMIT_CPU, CPU_SECONDS),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 2 * memory),
    ):
        resource.setrlimit(kind, (limit, limit + 5 * (kind == resource.RLIMIT_CPU)))
    status = Path("/proc/self/status").read_text()
    # This limit is above the one that is watched. It prevents that a sudden allocation brings the machine down.
    space = _kib(status, "VmSize") * 1024 + 8 * memory
    resource.setrlimit(resource.RLIMIT_AS, (space, space))
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # The peak counts from here on.
    begun = _kib(Path("/proc/self/status").read_text(), "VmRSS")
    os.chdir(scratch / "case")
    try:
        case = make()
    except Exception:
        _report(writing, "traceback", f"the harness itself failed\n{traceback.format_exc()}", 0)
    case.write(scratch / "case")
    os.environ |= {
        "HOME": str(scratch / "home"),
        "XDG_CACHE_HOME": str(scratch / "home"),
        "TMPDIR": str(scratch / "home"),
        "TORCHINDUCTOR_CACHE_DIR": str(scratch / "home/torchinductor"),
    }
    tempfile.tempdir = None
    writes = _forbid_writes(scratch)
    _set(case.environment)
    verdict, said = _use(scratch / "case", case, use)
    if writes:
        verdict, said = "outside", f"writes to {', '.join(map(printable, writes[:3]))}; {said}"
    peak = _kib(Path("/proc/self/status").read_text(), "VmHWM")
    _report(writing, verdict, said, max(0, peak - begun) / 1024)


def _report(writing: int, verdict: Verdict, said: str, mib: float) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os.write(writing, json.dumps({"verdict": verdict, "said": said[:50_000], "mib": mib}).encode())
    os._exit(0)


def _set(environment: Mapping[str, str]) -> None:
    for name, value in environment.items():
        with suppress(ValueError, UnicodeEncodeError):  # No variable can have such a name or value.
            os.environ[name] = value


def _use(folder: Path, case: Case, use: Callable[[Path, Case], str]) -> tuple[Verdict, str]:
    try:
        said = use(folder, case)
    except UserError as error:
        said = str(error) or type(error).__name__
    except Wrong as error:
        return "count", str(error)
    except BaseException:
        return "traceback", traceback.format_exc(limit=-12)
    if len(said) > LONGEST or printable(said, lines=True) != said:
        return "words", f"{len(said)} characters, or some that are not printable: {said[:LONGEST]!r}"
    return ("refused" if said else "used"), said


def _forbid_writes(scratch: Path) -> list[str]:
    """Return a list that collects each path outside the case and its home that Python code opens for writing."""
    found: list[str] = []
    legal = tuple(f"{Path(path).resolve()}/" for path in (scratch / "case", scratch / "home", "/dev", "/proc"))

    def is_legal(path: Any) -> bool:
        if isinstance(path, int):
            return True
        full = os.path.realpath(os.path.join(os.getcwd(), os.fsdecode(path)))
        return f"{full}/".startswith(legal)

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            writes = (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            # A name relative to an open folder is reported without the folder; the canary detects such writes.
            if (writes or (isinstance(mode, str) and set(mode) & set("wax+"))) and os.path.isabs(
                os.fsdecode(path) if not isinstance(path, int) else ""
            ):
                with suppress(ValueError, OSError):
                    if not is_legal(path):
                        found.append(os.fsdecode(path))
        elif event in ("os.mkdir", "os.remove", "os.rename", "os.rmdir", "shutil.rmtree", "os.truncate", "os.symlink"):
            path = arguments[1] if event in ("os.rename", "os.symlink") else arguments[0]
            with suppress(ValueError, OSError, TypeError):
                if os.path.isabs(os.fsdecode(path)) and not is_legal(os.path.dirname(os.fsdecode(path))):
                    found.append(os.fsdecode(path))

    sys.addaudithook(watch)
    return found
