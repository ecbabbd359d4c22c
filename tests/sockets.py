"""Helper that lists the open sockets of a process, from /proc."""

from __future__ import annotations

import os
import socket
from pathlib import Path


def listening(pid: int) -> set[tuple[str, int]]:
    """Return the addresses and ports on which a process listens, in the format of /proc."""
    sockets = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = os.readlink(link)
        except OSError:
            continue
        if target.startswith("socket:["):
            sockets.add(target[8:-1])
    found = set()
    for name in ("tcp", "tcp6", "udp", "udp6"):
        for line in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]:
            fields = line.split()
            address, port = fields[1].split(":")
            is_open = fields[3] == "0A" if name.startswith("tcp") else True
            if is_open and fields[9] in sockets:
                found.add((_address(address), int(port, 16)))
    return found


def _address(number: str) -> str:
    words = b"".join(bytes.fromhex(number[i : i + 8])[::-1] for i in range(0, len(number), 8))
    return socket.inet_ntop(socket.AF_INET if len(words) == 4 else socket.AF_INET6, words)
