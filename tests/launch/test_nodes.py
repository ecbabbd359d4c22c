"""Tests of runs on several nodes: two network namespaces are two hosts, one of which is disconnected or killed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from PIL import Image

from mimae.errors import UserError
from mimae.launch import network, nodes
from mimae.launch.network import Way
from mimae.launch.nodes import NodeLost, Nodes, State

WAIT = 30
"""Value of --wait of the runs, in seconds."""

STOPPING = 30
"""Seconds that the launcher waits for its ranks to end before it kills them."""


class Meeting:
    """Launchers that meet in a store of this process, with a clock that the test sets. The first one leads."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, count: int, restarts: int = 1) -> None:
        self.now = 1000.0
        monkeypatch.setattr(nodes.time, "monotonic", lambda: self.now)
        self.store: Any = dist.HashStore()
        self.count, self.restarts = count, restarts
        self.all = [self.come(i) for i in range(count)]

    def come(self, i: int) -> Nodes:
        settings: dict[str, Any] = {"nodes": self.count, "wait": 30, "restarts": self.restarts}
        return Nodes(self.store, leads=i == 0, ranks=i + 1, name=f"host-{i}", where="a:1", **settings)

    def tell(self, *states: State | None) -> list[str]:
        """Make each launcher report its state (None: no report) a second later, and return the orders."""
        self.now += nodes.BEAT
        pairs = [(node, state) for node, state in zip(self.all, states) if state is not None]
        for node, state in pairs:
            node.exchange(state)
        self.now += nodes.BEAT
        return [node.exchange(state).kind for node, state in pairs]


def test_launchers_meet_run_fail_once_and_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    meeting = Meeting(monkeypatch, 3)
    leader, second, third = meeting.all
    ready = State("ready", 0)
    assert meeting.tell(ready, ready, None) == ["gather"] * 2, "the third has not come"
    assert meeting.tell(ready, ready, ready) == ["run"] * 3
    assert [node.order.first_rank(node.token) for node in meeting.all] == [0, 1, 3] and leader.order.ranks() == 6
    running = State("running", 0)
    assert meeting.tell(running, running, State("done", 0)) == ["run"] * 3
    failed = State("failed", 0, "host-1: rank 2 was ended by SIGKILL")
    assert meeting.tell(running, failed, State("done", 0)) == ["gather"] * 3
    assert second.order.round == 1
    again = State("ready", 1)
    assert meeting.tell(again, again, again) == ["run"] * 3
    assert meeting.tell(*[State("done", 1)] * 2, State("running", 1)) == ["run"] * 3, "the third is still at work"
    assert meeting.tell(*[State("done", 1)] * 3) == ["end"] * 3
    assert {node.order.end for node in meeting.all} == {"done"} and third.order.text == ""


def test_a_failure_without_restarts_left_and_a_mistake_end_all_with_their_text(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("failed", "mistake", "left"):
        meeting = Meeting(monkeypatch, 2, restarts=0)
        meeting.tell(*[State("ready", 0)] * 2)
        text = "data.path=\x1b[2J is not there"
        assert meeting.tell(State("running", 0), State(kind, 0, text)) == ["end"] * 2
        end = "mistake" if kind == "mistake" else "failed"
        escaped = "data.path=\\x1b[2J is not there"
        assert [(node.order.end, node.order.text) for node in meeting.all] == [(end, escaped)] * 2, (
            "nothing for a terminal"
        )


def test_a_node_that_falls_silent_is_named_and_one_that_goes_on_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    meeting = Meeting(monkeypatch, 3)
    meeting.tell(*[State("ready", 0)] * 3)
    running = State("running", 0)
    for _ in range(15):
        assert meeting.tell(running, running, running) == ["run"] * 3
    for _ in range(14):
        assert meeting.tell(running, running, None) == ["run"] * 2
    for _ in range(3):
        meeting.tell(running, running, None)
    texts = {node.order.text for node in meeting.all[:2]}
    assert len(texts) == 1 and "host-2 has been silent for 30 s" in texts.pop()


def test_a_node_that_does_not_come_back_is_named_and_another_may_take_its_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    meeting = Meeting(monkeypatch, 2)
    meeting.tell(*[State("ready", 0)] * 2)
    assert meeting.tell(State("failed", 0), None) == ["gather"]
    for _ in range(10):
        assert meeting.tell(State("ready", 1), None) == ["gather"]
    other = meeting.come(2)
    assert other.exchange(State("new", -1)).round == 1
    meeting.all.append(other)
    assert meeting.tell(State("ready", 1), None, State("ready", 1)) == ["run"] * 2

    meeting = Meeting(monkeypatch, 2)
    meeting.tell(*[State("ready", 0)] * 2)
    meeting.tell(State("failed", 0), None)
    for _ in range(16):
        meeting.tell(State("ready", 1), None)
    assert meeting.all[0].order.text.startswith("host-1 did not come to a:1 within 30 s; start the same command")


@pytest.mark.parametrize("message", [b"\x80\x04N.", b"[]", b"[1, 2]", b'["run", 0, [["a"]], "", ""]', b"9" * 5000])
def test_what_is_no_message_of_a_launcher_ends_the_meeting(monkeypatch: pytest.MonkeyPatch, message: bytes) -> None:
    for key in ("order", "launcher/0", "launcher/1"):
        meeting = Meeting(monkeypatch, 2)
        meeting.tell(*[State("ready", 0)] * 2)
        meeting.store.set(key, message)  # type: ignore[arg-type]
        victim = meeting.all[key == "order"]
        meeting.now += nodes.BEAT
        if key == f"launcher/{victim._place}":  # The launcher overwrites its own entry.
            victim.exchange(State("running", 0))
            continue
        with pytest.raises(NodeLost, match="a:1, where the nodes meet, contains data of something other than this job"):
            victim.exchange(State("running", 0))


def test_the_way_to_the_meeting_point_tells_a_nodes_own_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that resolves to the loopback on this machine may name this machine elsewhere."""
    assert network.find_way("127.0.0.1:9") == Way("127.0.0.1", 9, "127.0.0.1", "lo")
    with pytest.raises(UserError, match=r"ip6-localhost:9 cannot be reached from here"):
        network.find_way("ip6-localhost:9")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        assert network.interface(probe, "127.0.0.1") == "lo"
        with pytest.raises(UserError, match=r"203\.0\.113\.9, the local address towards --rendezvous"):
            network.interface(probe, "203.0.113.9")


def test_the_store_listens_on_the_meeting_points_address_alone() -> None:
    """All of 127.0.0.0/8 is this machine, so 127.0.0.1 and 127.0.0.2 represent two interfaces."""
    with socket.create_server(("127.0.0.2", 0)) as probe:
        port = probe.getsockname()[1]
    way = Way("127.0.0.2", port, "127.0.0.2", "lo")
    store, leads = network.open_store(way, 5)
    other, follows = network.open_store(way, 5)
    assert leads and not follows, "who comes first holds it"
    other.set("a", "1")
    assert store.get("a") == b"1"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), 5)


class Host:
    """A network namespace, connected to the other one by a pair of virtual interfaces."""

    def __init__(self, name: str, address: str) -> None:
        self.name, self.address, self.link = name, address, f"{name}-l"
        self.process: subprocess.Popen[bytes] | None = None

    def pretrain(self, folder: Path, meeting: str) -> None:
        self.output = folder / f"{self.name}.txt"
        command = [sys.executable, "-m", "mimae", "pretrain", str(folder / "recipe.yaml"), f"run.dir={folder / 'run'}"]
        command += ["--ranks", "1", "--nodes", "2", "--rendezvous", meeting, "--wait", str(WAIT)]
        self.process = subprocess.Popen(
            ["ip", "netns", "exec", self.name, *command],
            stdout=self.output.open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    def end(self, seconds: float) -> int:
        assert self.process is not None
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(self.output.read_text()) from None

    def told(self) -> list[str]:
        """Return its messages to the user."""
        return [line for line in self.output.read_text().splitlines() if line.startswith("mimae: ")]

    def processes(self) -> list[int]:
        found = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True)
        return [int(line) for line in found.stdout.split()]

    def kill(self) -> None:
        """Kill all processes, as in a power failure."""
        for pid in self.processes():
            os.kill(pid, signal.SIGKILL)
        if self.process is not None:
            self.process.wait()


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    pair = Host(f"mm{os.getpid()}a", "10.77.0.1"), Host(f"mm{os.getpid()}b", "10.77.0.2")
    here, there = pair
    try:
        for host in pair:
            _ip("netns", "add", host.name)
        _ip(
            "link",
            "add",
            here.link,
            "netns",
            here.name,
            "type",
            "veth",
            "peer",
            "name",
            there.link,
            "netns",
            there.name,
        )
        for host in pair:
            _ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", host.link)
            for link in ("lo", host.link):
                _ip("-n", host.name, "link", "set", link, "up")
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or error
        pytest.skip(f"network namespaces cannot be made here: {reason}")
    else:
        yield pair
    finally:
        for host in pair:
            host.kill()
            subprocess.run(["ip", "netns", "delete", host.name], capture_output=True)


RECIPE = """
precision: fp32
data: {path: %s, image_size: 32, workers: 0, loader: torch}
model: {size: tiny, patch_size: 8, width: 16, depth: 1, heads: 2, attention: sdpa}
decoder: {width: 8, depth: 1, heads: 2}
schedule: {batch_size: 32, epochs: 900, max_steps: %d}
checkpoint: {every_steps: 10}
telemetry: {tensorboard: false, images_every_epochs: 0, probe_every_epochs: 0, log_every_steps: 1}
"""
STEPS = 400


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_host_that_is_cut_off_or_dies_ends_the_other_and_the_pair_goes_on(
    tmp_path: Path, hosts: tuple[Host, Host]
) -> None:
    """There is no name service, and the only route is to the other host: the address determines the interface."""
    generator = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for i in range(64):
        pixels = generator.integers(0, 256, (200, 200, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i:02}.jpg")
    (tmp_path / "recipe.yaml").write_text(RECIPE % (tmp_path / "images", STEPS))
    here, there = hosts
    meeting = f"{here.address}:29400"

    def start() -> None:
        for host in hosts:
            host.pretrain(tmp_path, meeting)

    def run_on(steps: int) -> int:
        """Wait until the run has reached this step; return the step from which it resumed."""
        resumed = _step(tmp_path / "run")
        _wait_for(lambda: _step(tmp_path / "run") >= resumed + steps or _ended(hosts), hosts)
        assert not _ended(hosts), [host.output.read_text() for host in hosts]
        return resumed

    start()
    run_on(25)
    _ip("-n", there.name, "link", "set", there.link, "down")
    assert [host.end(2 * WAIT + STOPPING + 30) for host in hosts] == [1, 1]
    (told,), (told_there,) = here.told(), there.told()
    assert f"({there.address}) has been silent for {WAIT} s" in told and "start the same command on each node" in told
    assert f"{meeting}, where the nodes meet, does not answer" in told_there
    _assert_gone(here, there)

    _ip("-n", there.name, "link", "set", there.link, "up")
    start()
    run_on(25)
    there.kill()
    assert here.end(WAIT + STOPPING + 30) == 1
    (told,) = here.told()
    assert f"({there.address}) did not come to {meeting} within {WAIT} s" in told
    _assert_gone(here)

    start()
    run_on(25)
    here.kill()  # This host has the store.
    assert there.end(WAIT + STOPPING + 30) == 1
    (told,) = there.told()
    assert f"{meeting}, where the nodes meet, does not answer" in told
    _assert_gone(there)

    start()
    assert [host.end(300) for host in hosts] == [0, 0]
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, STEPS + 1)), "each step once"
    assert "resuming" in here.output.read_text() + there.output.read_text()


def _assert_gone(*hosts: Host) -> None:
    """Assert that all processes of the hosts end within a moment."""
    end = time.monotonic() + 10
    while any(host.processes() for host in hosts) and time.monotonic() < end:
        time.sleep(0.1)
    left = [Path(f"/proc/{pid}/cmdline").read_bytes() for host in hosts for pid in host.processes()]
    assert not left


def _step(run: Path) -> int:
    file = run / "metrics.jsonl"
    return len(file.read_bytes().splitlines()) if file.exists() else 0


def _ended(hosts: tuple[Host, Host]) -> bool:
    return any(host.process is not None and host.process.poll() is not None for host in hosts)


def _wait_for(condition: Callable[[], bool], hosts: tuple[Host, Host], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, [host.output.read_text() for host in hosts]
        time.sleep(0.1)
