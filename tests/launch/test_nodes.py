"""Several nodes of a run: two network namespaces as two hosts, of which one is cut off, and is killed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
from PIL import Image
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo, RendezvousParameters

from mimae.errors import UserError
from mimae.launch import nodes
from mimae.launch import processes as launch
from mimae.launch.job import Job

WAIT = 30
"""--wait of the runs, in seconds."""

STOPPING = 30
"""Seconds that torch's agent gives its ranks to end before it kills them."""


class Met(RendezvousHandler):
    """A meeting at which all nodes have come already."""

    def __init__(self, store: dist.Store, rank: int) -> None:
        self.found = RendezvousInfo(store, rank, 2, None)  # type: ignore[arg-type]

    def next_rendezvous(self) -> RendezvousInfo:
        return self.found

    def num_nodes_waiting(self) -> int:
        return 0

    get_backend = is_closed = set_closed = get_run_id = shutdown = None  # type: ignore[assignment]


def test_a_node_that_falls_silent_is_named_and_one_that_goes_on_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.HashStore()
    pair = []
    for rank in range(2):
        parameters = RendezvousParameters("mimae", "a:1", "run", 2, 2, f"10.0.0.{rank + 1}", join_timeout=10)
        pair.append(nodes._Nodes(Met(store, rank), store, parameters))
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(nodes._Nodes.next_rendezvous, pair))
    now = time.monotonic()
    for seconds in (6, 12, 18):
        monkeypatch.setattr(nodes.time, "monotonic", lambda seconds=seconds: now + seconds)
        assert [node.num_nodes_waiting() for node in pair] == [0, 0]
    monkeypatch.setattr(nodes.time, "monotonic", lambda: now + 21)
    assert pair[0].num_nodes_waiting() == 0, "the other's last count is read now"
    monkeypatch.setattr(nodes.time, "monotonic", lambda: now + 32)
    with pytest.raises(nodes.NodeLost, match=r"nothing was heard of .* \(10\.0\.0\.2\) for 10 s.*the same command"):
        pair[0].num_nodes_waiting()


def test_the_way_to_the_meeting_point_tells_a_nodes_own_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """On one machine whoever comes first holds the store; a name that is the loopback here is another's elsewhere."""
    waits = {"join_timeout": 5, "read_timeout": 5}
    assert launch._addresses(Job(1, 1, None, 0, 5)) == ("localhost", waits)
    assert launch._addresses(Job(1, 2, "127.0.0.1:9", 0, 5)) == ("127.0.0.1", waits)
    monkeypatch.setattr(launch, "_meeting", lambda job: "ip6-localhost:9")
    with pytest.raises(UserError, match=r"ip6-localhost:9 cannot be reached from here"):
        launch._addresses(Job(1, 2, "ip6-localhost:9"))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        assert launch._interface(probe, "127.0.0.1") == "lo"
        with pytest.raises(UserError, match=r"203\.0\.113\.9, the way to --rendezvous"):
            launch._interface(probe, "203.0.113.9")


class Host:
    """A network namespace, joined to the other one by a pair of virtual interfaces."""

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
        """What it said for people to read when it ended."""
        return [line for line in self.output.read_text().splitlines() if line.startswith("mimae: ")]

    def processes(self) -> list[int]:
        found = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True)
        return [int(line) for line in found.stdout.split()]

    def kill(self) -> None:
        """As when the power fails."""
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
model: {size: tiny, patch_size: 8, width: 16, depth: 1, heads: 2}
decoder: {width: 8, depth: 1, heads: 2}
schedule: {batch_size: 32, epochs: 900, max_steps: %d}
checkpoint: {every_steps: 10}
telemetry: {tensorboard: false, images_every_epochs: 0, probe_every_epochs: 0, log_every_steps: 1}
"""
STEPS = 400


@pytest.mark.slow
def test_a_host_that_is_cut_off_or_dies_ends_the_other_and_the_pair_goes_on(
    tmp_path: Path, hosts: tuple[Host, Host]
) -> None:
    """No name service, and no route but to each other: both find the way and the interface by the address alone."""
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
        """Waits until the run has gone on so far; returns where it resumed."""
        resumed = _step(tmp_path / "run")
        _wait_for(lambda: _step(tmp_path / "run") >= resumed + steps or _ended(hosts), hosts)
        assert not _ended(hosts), [host.output.read_text() for host in hosts]
        return resumed

    start()
    run_on(25)
    _ip("-n", there.name, "link", "set", there.link, "down")
    assert [host.end(2 * WAIT + STOPPING + 30) for host in hosts] == [1, 1]
    (told,), (told_there,) = here.told(), there.told()
    assert f"({there.address}) for {WAIT} s" in told and "start the same command on each node" in told
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
    here.kill()  # which holds the store
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
    """Python's own tracker of a launcher's resources may outlive it by a moment."""
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


def _wait_for(condition: Callable[[], bool], hosts: tuple[Host, Host], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, [host.output.read_text() for host in hosts]
        time.sleep(0.1)
