"""Where the launchers of several nodes meet, and how they notice that one of them is gone.

torch's rendezvous, with three things added: it says what it waits for; each node counts up in the shared store, and one
whose count stands still is lost (no clocks are compared); and what went wrong is told by the node's name.
"""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

from torch.distributed import Store
from torch.distributed.elastic.rendezvous import (
    RendezvousConnectionError,
    RendezvousError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousTimeoutError,
    rendezvous_handler_registry,
)
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import create_backend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import create_handler

BACKEND = "mimae"
"""The name under which torch's launcher finds this rendezvous."""

_BEAT = 2.0
"""Seconds between two counts of a node."""


_AGAIN = "start the same command on each node, and the run goes on from its last checkpoint"


class NodeLost(RendezvousError):
    """The nodes do not meet, or no longer; the text is for people."""


def register() -> None:
    """Makes the rendezvous known to torch's launcher."""
    rendezvous_handler_registry.register(BACKEND, _meet)


def _meet(parameters: RendezvousParameters) -> RendezvousHandler:
    try:
        backend, store = create_backend(parameters)
    except RendezvousConnectionError as error:
        raise NodeLost(
            f"{parameters.endpoint}, where nodes meet, did not answer within {parameters.config['read_timeout']} s; "
            "start the same command on each node"
        ) from error
    _bound_silence(parameters.endpoint, parameters.config["read_timeout"])
    return _Nodes(create_handler(store, backend, parameters), store, parameters)


def _bound_silence(endpoint: str, seconds: int) -> None:
    """Ends this process's connections to the store when what was sent is not acknowledged for so long: where the
    network is cut most of torch's requests would wait for ever, timeout or not."""
    port = int(endpoint.rpartition(":")[2])
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            with socket.socket(fileno=os.dup(int(descriptor.name))) as connection:
                if connection.getpeername()[1] == port:
                    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, seconds * 1000)
        except OSError:
            continue  # No socket, or not connected.


class _Nodes(RendezvousHandler):
    """See the top of the file."""

    def __init__(self, inner: RendezvousHandler, store: Store, parameters: RendezvousParameters) -> None:
        self.inner, self.store = inner, store
        self.nodes, self.endpoint = parameters.max_nodes, parameters.endpoint
        self.wait = int(parameters.config["join_timeout"])
        self.name = f"{socket.gethostname()} ({parameters.local_addr})"
        self.came: dict[str, int] = {}
        """Nodes of the last round, and how often each had come until then."""
        self.is_reachable = True

    def next_rendezvous(self) -> RendezvousInfo:
        """Waits for all nodes. Raises NodeLost after `wait` seconds, naming who was there before and did not come."""
        if self.nodes > 1:
            again = ", after a rank or a node was lost" if self.came else ""
            print(f"waiting up to {self.wait} s for {self.nodes} nodes at {self.endpoint}{again}", flush=True)
        try:
            self.store.add(f"came/{self.name}", 1)
            found = self.inner.next_rendezvous()
            self._introduce(found)
        except RendezvousTimeoutError as error:
            missing = [name for name, times in self.came.items() if self.store.add(f"came/{name}", 0) == times]
            who = f"{', '.join(missing)} did not come" if missing else f"fewer than {self.nodes} nodes came"
            raise NodeLost(
                f"{who} to {self.endpoint} within {self.wait} s (nodes whose clocks differ by more than 15 s do not "
                f"see each other either); {_AGAIN}"
            ) from error
        except (RendezvousError, RuntimeError) as error:
            raise self._unreachable() from error
        return found

    def _introduce(self, found: RendezvousInfo) -> None:
        """Learns who the others of this round are."""
        self.round, self.rank = found.store, found.rank
        self.round.set(f"beat/{self.rank}", "0")
        self.round.set(f"name/{self.rank}", self.name)
        ranks = range(found.world_size)
        self.names = [name.decode() for name in self.round.multi_get([f"name/{rank}" for rank in ranks])]
        self.came = {name: self.store.add(f"came/{name}", 0) for name in self.names}
        self.beats, self.last_beat = [b""] * found.world_size, 0.0
        self.heard = [time.monotonic()] * found.world_size

    def num_nodes_waiting(self) -> int:
        """Asked again and again while the ranks are at work. Raises NodeLost."""
        try:
            if time.monotonic() - self.last_beat > _BEAT:
                self._beat()
            return self.inner.num_nodes_waiting()
        except NodeLost:
            raise
        except (RendezvousError, RuntimeError) as error:
            raise self._unreachable() from error

    def _beat(self) -> None:
        """Counts up, and looks who else did."""
        self.round.add(f"beat/{self.rank}", 1)
        beats = self.round.multi_get([f"beat/{rank}" for rank in range(len(self.names))])
        self.last_beat = now = time.monotonic()
        for rank, name in enumerate(self.names):
            if beats[rank] != self.beats[rank]:
                self.heard[rank] = now
            elif now - self.heard[rank] > self.wait:
                raise NodeLost(
                    f"nothing was heard of {name} for {self.wait} s: it, or the network on the way, is down; {_AGAIN}"
                )
        self.beats = beats

    def _unreachable(self) -> NodeLost:
        self.is_reachable = False
        return NodeLost(
            f"{self.endpoint}, where the nodes meet, does not answer: the node ended the run, or it, or the network on "
            f"the way, is down; {_AGAIN}"
        )

    def shutdown(self) -> bool:
        return self.is_reachable and self.inner.shutdown()

    def get_backend(self) -> str:
        return BACKEND

    @property
    def use_agent_store(self) -> bool:
        # In the store that the agents keep, ranks that are started again would find the addresses of dead ones.
        return False

    def is_closed(self) -> bool:
        return self.inner.is_closed()

    def set_closed(self) -> None:
        self.inner.set_closed()

    def get_run_id(self) -> str:
        return self.inner.get_run_id()
