"""Small disks and read-only directories, in a private mount namespace of this process."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_CLONE_NEWNS = 0x20000


def obstacle() -> str | None:
    """Give this process and its children private mounts; return the obstacle if that fails, otherwise None.

    Call this before any thread is started.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS):
        return f"no mounts: {os.strerror(ctypes.get_errno())}"
    found = subprocess.run(["mount", "--make-rprivate", "/"], capture_output=True, text=True)
    return f"no mounts: {found.stderr.strip()}" if found.returncode else None


@contextmanager
def small_disk(path: Path, num_bytes: int) -> Iterator[None]:
    """Mount a file system of `num_bytes` bytes at `path` inside the block. Its final contents are kept at `path`."""
    path.mkdir(parents=True)
    _run("mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "mimae-drill", str(path))
    try:
        yield
        _run("cp", "-a", f"{path}/.", f"{path}.kept")
    finally:
        _run("umount", "--lazy", str(path))
    path.rmdir()
    path.with_name(f"{path.name}.kept").rename(path)


@contextmanager
def read_only(path: Path) -> Iterator[None]:
    """Remount `path` read-only: new opens for writing fail, files that are open for writing stay writable."""
    _run("mount", "--bind", str(path), str(path))
    try:
        _run("mount", "-o", "remount,bind,ro", str(path))
        yield
    finally:
        _run("umount", "--lazy", str(path))


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)
