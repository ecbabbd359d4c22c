"""Reading of small files that a user names: with a size limit, and never from a pipe or a device."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

UTF_16 = (b"\xff\xfe", b"\xfe\xff")
"""Byte-order marks at the beginning of text in UTF-16."""


def open_regular(path: str | bytes | Path, flags: int = os.O_RDONLY) -> int:
    """Open a regular file and return its descriptor. Raises OSError for pipes and devices, which might never end."""
    opened = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(opened).st_mode):
        os.close(opened)
        raise OSError(errno.EINVAL, "it is not a regular file")
    return opened


def read_text(path: Path, limit: int) -> str:
    """Return the text of a UTF-8 file of at most `limit` bytes. Raises OSError with the reason in `strerror`."""
    with open(open_regular(path), "rb", buffering=0) as file:
        data = bytearray()
        # Files in /proc and similar file systems do not report a size.
        while len(data) <= limit and (read := file.read(limit + 1 - len(data))):
            data += read
        if read is None:
            raise OSError(errno.EAGAIN, "reading it would wait for data that may never come")
    if len(data) > limit:
        raise OSError(errno.EFBIG, f"it has more than {limit:,} bytes, the limit for such a file")
    if data.startswith(UTF_16):
        raise OSError(errno.EILSEQ, "it is written in UTF-16; save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise OSError(errno.EILSEQ, f"byte {error.start} is not UTF-8; save it as UTF-8") from error
