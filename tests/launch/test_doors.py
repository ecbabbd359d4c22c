"""Tests of the network access to a run, and of the effect of messages from strangers."""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from mimae.errors import UserError
from mimae.launch import job
from tests.launched import RECIPE, Launched
from tests.sockets import listening


class Harm:
    """An object that creates a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


@pytest.mark.slow
def test_a_run_of_one_machine_listens_on_the_loopback_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This holds even if the user's environment names a cluster's network."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", next(name for _, name in socket.if_nameindex() if name != "lo"))
    launched = Launched(tmp_path, 100_000)
    launched.wait_for(lambda: launched.step() >= 1)
    processes = [launched.process.pid, *launched.ranks()]
    assert len(processes) == 3
    found = [listening(pid) for pid in processes]
    launched.process.terminate()
    assert launched.end()[0] == 75
    assert not found[0], "the launcher needs no socket"
    assert found[1] and found[2], "gloo's were not seen"
    assert {address for each in found for address, _ in each} <= {"127.0.0.1", "::1"}


def start_node(folder: Path, name: str, port: int, **variables: str) -> subprocess.Popen[bytes]:
    """Start one of two nodes on this machine."""
    (folder / "recipe.yaml").write_text(RECIPE % 100_000)
    command = [sys.executable, "-m", "mimae", "pretrain", str(folder / "recipe.yaml"), f"run.dir={folder / 'run'}"]
    command += ["--ranks=1", "--nodes=2", f"--rendezvous=127.0.0.1:{port}", "--wait=20", "--restarts=1"]
    node = subprocess.Popen(
        command,
        stdout=(folder / name).open("w"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | variables,
    )
    Launched.started.append(node)
    return node


def ended(node: subprocess.Popen[bytes], folder: Path, name: str) -> int:
    try:
        return node.wait(120)
    except subprocess.TimeoutExpired:
        raise AssertionError((folder / name).read_text()) from None


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def client(port: int) -> Any:
    return dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=20))


def wait_for(condition: Any, *outputs: Path) -> None:
    end = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < end, [output.read_text() for output in outputs]
        time.sleep(0.2)


@pytest.mark.slow
def test_pickles_under_every_key_of_the_meeting_end_the_run_and_are_not_executed(tmp_path: Path) -> None:
    """Pickles are written before the nodes have met and during training, also under the keys of torch's rendezvous."""
    harm, metrics = tmp_path / "harm", tmp_path / "run/metrics.jsonl"
    evil = pickle.dumps(Harm(harm))
    port = free_port()
    first = start_node(tmp_path, "first", port)
    wait_for(lambda: "waiting up to" in (tmp_path / "first").read_text(), tmp_path / "first")
    put_everywhere(client(port), evil)
    assert ended(first, tmp_path, "first") == 1
    told = [line for line in (tmp_path / "first").read_text().splitlines() if line.startswith("mimae: ")]
    assert len(told) == 1 and "where the nodes meet, " in told[0], told

    port = free_port()
    pair = [start_node(tmp_path, name, port) for name in ("first", "second")]
    wait_for(lambda: metrics.exists() and metrics.read_bytes(), tmp_path / "first", tmp_path / "second")
    put_everywhere(client(port), evil)
    assert [ended(node, tmp_path, name) for node, name in zip(pair, ("first", "second"))] == [1, 1]
    for name in ("first", "second"):
        output = (tmp_path / name).read_text()
        assert "the nodes meet, " in output and "Traceback" not in output, output
    assert not harm.exists()
    pickle.loads(evil)
    assert harm.exists(), "the test would see it"


def put_everywhere(store: Any, value: bytes) -> None:
    keys = {"launchers", "launcher/0", "launcher/1", "order", "torch.rendezvous.mimae", "torch.rendezvous.run"}
    keys |= set(store.list_keys())
    # The key that others read first is written last, because its reply may be the last one.
    for key in sorted(keys, key=lambda key: key in ("order", "launchers")):
        store.set(key, value)  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_stranger_without_the_secret_ends_the_run_at_most(tmp_path: Path) -> None:
    """An order that is well-formed but not signed is ignored."""
    port, secret = free_port(), "0123456789abcdef0123"
    pair = [start_node(tmp_path, name, port, MIMAE_SECRET=secret) for name in ("first", "second")]
    metrics = tmp_path / "run/metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_bytes(), tmp_path / "first", tmp_path / "second")
    store = client(port)
    order = store.get("order")
    assert secret.encode() not in b"".join(store.get(key) for key in store.list_keys() if store.check([key]))
    for _ in range(40):  # The leader overwrites it every second.
        store.set("order", order[64:])  # type: ignore[arg-type]
        time.sleep(0.05)
    assert [ended(node, tmp_path, name) for node, name in zip(pair, ("first", "second"))] == [1, 1]
    assert (
        "is not signed with this job's secret" in (tmp_path / "first").read_text() + (tmp_path / "second").read_text()
    )


@pytest.mark.parametrize(
    ("text", "mode", "told"),
    [
        ("0123456789abcdef", 0o644, "can be read by others: chmod 600"),
        ("short", 0o600, "has 5 characters: legal are 16 characters or more"),
        (" \n", 0o600, "is empty: legal are 16 characters or more"),
        (None, 0o600, "cannot be read: No such file"),
    ],
)
def test_a_secret_that_is_none_is_told(tmp_path: Path, text: str | None, mode: int, told: str) -> None:
    file = tmp_path / "secret"
    if text is not None:
        file.write_text(text)
        file.chmod(mode)
    with pytest.raises(UserError, match=told):
        job.read_secret(file)


def test_a_secret_of_the_environment_follows_the_same_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIMAE_SECRET", "short")
    with pytest.raises(UserError, match=r"MIMAE_SECRET has 5 characters: legal are 16 characters or more"):
        job.default_job(1, 1, None, 3)
    for value, secret in (("0123456789abcdef\n", "0123456789abcdef"), ("", None)):
        monkeypatch.setenv("MIMAE_SECRET", value)
        assert job.default_job(1, 1, None, 3).secret == secret


def test_a_secret_is_read_without_the_line_break(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.touch(0o600)
    file.write_text("0123456789abcdef\n")
    assert job.read_secret(file) == "0123456789abcdef"
