"""The network of a job on several machines: addresses, interfaces, and the store at the meeting point."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

from mimae.errors import UserError

_SIOCGIFADDR = 0x8915
"""Linux's ioctl number for the IPv4 address of an interface."""


class Way(NamedTuple):
    """Route from this node to the meeting point."""

    host: str
    """The meeting point's numeric address."""
    port: int
    own: str
    """The address at which other nodes reach this one: the local address of the route to the meeting point."""
    interface: str


def find_way(meeting: str) -> Way:
    """Return the route to HOST:PORT. Raises UserError if there is none, or if HOST is a loopback address here."""
    host, _, port = meeting.partition(":")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, int(port)))  # No packet is sent.
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"--rendezvous {host}:{port} cannot be reached from here: {reason}") from error
        own, address = probe.getsockname()[0], probe.getpeername()[0]
        if own.startswith("127.") and host not in (address, "localhost"):
            raise UserError(
                f"--rendezvous {host} is {address} here, which other machines cannot reach: give its address"
            )
        return Way(address, int(port), own, "lo" if own.startswith("127.") else interface(probe, own))


def interface(probe: socket.socket, address: str) -> str:
    """Return the network interface that has an address. Raises UserError."""
    for _, name in socket.if_nameindex():
        try:
            found = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()))
        except OSError:
            continue  # This interface has no address.
        if socket.inet_ntoa(found[20:24]) == address:
            return name
    raise UserError(
        f"{address}, the local address towards --rendezvous, is not the first address of a network interface"
    )


def open_store(way: Way, seconds: int) -> tuple[dist.Store, bool]:
    """Open the store at the meeting point, and return it and whether this process is its server.

    The first process on the machine of the meeting point becomes the server. It listens only on the address of the
    meeting point; torch's own server would listen on all interfaces. Raises RuntimeError if the store does not answer
    within `seconds`.
    """
    timeout = timedelta(seconds=seconds)
    if way.own == way.host:
        listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind((way.host, way.port))
            listening.listen(socket.SOMAXCONN)
        except OSError as error:
            listening.close()
            if error.errno != errno.EADDRINUSE:
                raise UserError(f"cannot listen on --rendezvous {way.host}:{way.port}: {error.strerror}") from error
        else:
            store = dist.TCPStore(
                way.host,
                way.port,
                is_master=True,
                wait_for_workers=False,
                timeout=timeout,
                master_listen_fd=listening.detach(),
            )
            return store, True
    store = dist.TCPStore(way.host, way.port, is_master=False, timeout=timeout)
    _bound_silence(way, seconds)
    return store, False


def _bound_silence(way: Way, seconds: int) -> None:
    """Close this process's connections to the store when sent bytes stay unacknowledged for `seconds`.

    If the network is cut, most of torch's requests would otherwise wait for ever, whatever their timeout.
    """
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            with socket.socket(fileno=os.dup(int(descriptor.name))) as connection:
                if connection.getpeername()[1] == way.port:
                    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, seconds * 1000)
        except OSError:
            continue  # This descriptor is not a connected socket.
