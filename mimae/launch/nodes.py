"""Coordination of the launchers of a job's nodes: they agree on each start of the ranks and notice lost nodes.

Each launcher writes its state and an increasing count into a store. One launcher leads: it serves the store, reads all
states, and writes an order that all launchers follow: gather, run, or end. Clocks are not compared: a launcher whose
count stands still is lost. States and orders are JSON, signed if the job has a secret (`messages`). A job of one node
uses the same code, with a store inside its launcher.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable
from typing import Any, NamedTuple

from torch.distributed import Store

from mimae.ranks import messages
from mimae.ranks.messages import MessageError

BEAT = 1.0
"""Seconds between two counts of a launcher."""

_FRESH = 10.0
"""Seconds of silence after which a launcher that waits for the others no longer counts as present."""

_LEAVING = 5.0
"""Seconds that the store's server gives the other launchers to read its last order."""

_STRANGERS = 1000
"""Number of launchers beyond the job's nodes that may join, one after another, before the run ends with an error."""

AGAIN = "start the same command on each node to resume the run from its last checkpoint"


class NodeLost(Exception):
    """The nodes could not meet, or one was lost. The text is a message for the user."""


class State(NamedTuple):
    """State of a launcher in a round: `ready`, `running`, `done`, `failed`, `mistake` (the user's) or `left`."""

    kind: str
    round: int
    text: str = ""


class Order(NamedTuple):
    """Order for all launchers: `gather` for a round, `run` it, or `end` (`done`, `failed`, `mistake` or `lost`)."""

    kind: str
    round: int = 0
    members: tuple[tuple[str, int], ...] = ()
    """The launchers of the round, by token, and the ranks of each; in the order of ranks."""
    end: str = ""
    text: str = ""

    def ranks(self) -> int:
        """Return the number of ranks of all members."""
        return sum(ranks for _, ranks in self.members)

    def first_rank(self, token: str) -> int | None:
        """Return the number of the first rank of a member, or None for a launcher that is not a member."""
        first = 0
        for member, ranks in self.members:
            if member == token:
                return first
            first += ranks
        return None


class _Seen(NamedTuple):
    """A launcher as the leader sees it."""

    token: str
    name: str
    ranks: int
    beat: int
    state: State
    heard: float
    """Time at which its count last changed, on the leader's clock."""


class Nodes:
    """A launcher's membership in the job."""

    def __init__(
        self, store: Store, *, leads: bool, nodes: int, ranks: int, name: str, where: str, wait: float, restarts: int
    ) -> None:
        """Register this launcher in the store.

        `ranks` is the number of ranks of this node, `where` the meeting point in messages, `wait` the seconds after
        which a missing or silent launcher is lost, and `restarts` the number of times that ranks may be restarted.
        """
        self.store, self.leads, self.nodes, self.ranks = store, leads, nodes, ranks
        self.name, self.where, self.wait, self.restarts = name, where, wait, restarts
        self.token = secrets.token_hex(16)
        self.order = Order("gather")
        self._state, self._beat, self._told = State("", -1), 0, -BEAT
        self._seen: dict[int, _Seen] = {}
        self._since = time.monotonic()
        """Time at which the leader began to gather the present round."""
        self._place = self._guarded(lambda: self.store.add("launchers", 1) - 1)

    def exchange(self, state: State) -> Order:
        """Publish this launcher's state and return the current order. Raises NodeLost.

        Call it often: it reads the store once in BEAT seconds, or at once when the state has changed.
        """
        now = time.monotonic()
        if state == self._state and now - self._told < BEAT:
            return self.order
        self._state, self._told = state, now
        return self._guarded(self._exchange)

    def leave(self, text: str = "") -> None:
        """Announce that this launcher ends. If the leader ends, the run ends."""
        try:
            if not self.leads:
                self._tell(State("left", self._state.round, text))
                return
            if self.order.kind != "end":
                self._give(Order("end", self.order.round, self.order.members, "failed", text or f"{self.name} ended"))
            end = time.monotonic() + _LEAVING
            while time.monotonic() < end:
                self._look()
                others = [seen for seen in self._seen.values() if seen.token != self.token]
                if all(seen.state.kind == "left" or time.monotonic() - seen.heard > _FRESH for seen in others):
                    return
                time.sleep(0.1)
        except RuntimeError:
            pass  # The other launchers notice the silence.

    def _guarded(self, action: Any) -> Any:
        try:
            return action()
        except MessageError as error:
            raise NodeLost(
                f"{self.where}, where the nodes meet, contains data of something other than this job: {error}"
            ) from error
        except RuntimeError as error:
            raise NodeLost(
                f"{self.where}, where the nodes meet, does not answer: that node ended the run, or it or the network "
                f"is down; {AGAIN}"
            ) from error

    def _exchange(self) -> Order:
        self._tell(self._state)
        if self.leads:
            self._look()
            self._lead()
        elif self.store.check(["order"]):
            fields = _read(self.store, "order")
            if not _is_order(fields):
                raise MessageError("the message order was not written by a launcher")
            members = tuple((token, ranks) for token, ranks in fields[2])
            self.order = Order(fields[0], fields[1], members, fields[3], _printable(fields[4]))
        return self.order

    def _tell(self, state: State) -> None:
        self._beat += 1
        place = f"launcher/{self._place}"
        self.store.set(place, messages.pack([self.token, self.name, self.ranks, self._beat, *state], place))  # type: ignore[arg-type]

    def _give(self, order: Order) -> None:
        self.order = order
        self.store.set("order", messages.pack(order, "order"))  # type: ignore[arg-type]

    def _look(self) -> None:
        """Read the states of all launchers that have ever joined."""
        count = self.store.add("launchers", 0)
        if count > self.nodes + _STRANGERS:
            raise MessageError(f"{count} launchers have joined a job of {self.nodes} nodes")
        for place in range(count):
            key = f"launcher/{place}"
            if not self.store.check([key]):
                continue
            fields = _read(self.store, key)
            if not _is_state(fields):
                raise MessageError(f"the message {key} was not written by a launcher")
            token, name, ranks, beat, kind, number, text = fields
            state = State(kind, number, _printable(text))
            before = self._seen.get(place)
            moved = before is None or beat != before.beat
            heard = time.monotonic() if moved or before is None else before.heard
            self._seen[place] = _Seen(token, _printable(name), ranks, beat, state, heard)

    def _lead(self) -> None:
        """Write the next order if one is due; otherwise write the present one again, in case it was overwritten."""
        before, now = self.order, time.monotonic()
        if before.kind == "gather":
            self._gather(now)
        elif before.kind == "run":
            self._watch(now)
        if self.order == before:
            self._give(before)

    def _gather(self, now: float) -> None:
        order = self.order
        there = [
            seen
            for seen in self._seen.values()
            if seen.state[:2] == ("ready", order.round) and now - seen.heard < max(_FRESH, 3 * BEAT)
        ]
        if len(there) >= self.nodes:
            there.sort(key=lambda seen: (seen.token != self.token, seen.name, seen.token))
            members = tuple((seen.token, seen.ranks) for seen in there[: self.nodes])
            self._give(Order("run", order.round, members))
        elif now - self._since > self.wait:
            came = {seen.token for seen in there}
            before = [token for token, _ in order.members]
            missing = [seen.name for seen in self._seen.values() if seen.token in before and seen.token not in came]
            who = f"{', '.join(missing)} did not come" if missing else f"fewer than {self.nodes} nodes came"
            self._lose(f"{who} to {self.where} within {self.wait:.0f} s; {AGAIN}")

    def _watch(self, now: float) -> None:
        order = self.order
        tokens = [token for token, _ in order.members]
        members = [seen for seen in self._seen.values() if seen.token in tokens]
        for seen in members:
            if now - seen.heard > max(self.wait, 3 * BEAT):
                self._lose(f"{seen.name} has been silent for {self.wait:.0f} s: it or the network is down; {AGAIN}")
                return
        states = [seen.state for seen in members]
        wrong = [state for state in states if state.kind in ("mistake", "failed", "left") and state.text]
        if mistakes := [state for state in states if state.kind == "mistake"]:
            self._give(Order("end", order.round, order.members, "mistake", mistakes[0].text))
        elif any(state.kind == "left" for state in states):
            self._give(Order("end", order.round, order.members, "failed", wrong[0].text if wrong else "a node ended"))
        elif any(state == ("failed", order.round, state.text) for state in states):
            if order.round < self.restarts:
                self._since = now
                self._give(Order("gather", order.round + 1, order.members))
            else:
                self._give(Order("end", order.round, order.members, "failed", wrong[0].text if wrong else ""))
        elif all(state[:2] == ("done", order.round) for state in states):
            self._give(Order("end", order.round, order.members, "done"))

    def _lose(self, text: str) -> None:
        self._give(Order("end", self.order.round, self.order.members, "lost", text))


def _read(store: Store, key: str) -> Any:
    return messages.unpack(store.get(key), key)


def _is_state(fields: Any) -> bool:
    return isinstance(fields, list) and _fits(fields, (str, str, int, int, str, int, str)) and fields[2] > 0


def _is_order(fields: Any) -> bool:
    return (
        isinstance(fields, list)
        and _fits(fields, (str, int, list, str, str))
        and all(isinstance(each, list) and _fits(each, (str, int)) for each in fields[2])
    )


def _fits(values: list[Any], types: Iterable[type]) -> bool:
    return [type(value) for value in values] == list(types)


def _printable(text: str) -> str:
    """Escape control characters in a text that another process wrote."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
