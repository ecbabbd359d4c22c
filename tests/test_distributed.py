"""Tests of joining a job: alone, as a rank, or with the caller's process group; and of objects between ranks."""

from __future__ import annotations

import os
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mimae import distributed
from mimae.errors import RunError, UserError
from mimae.ranks import messages, place
from tests.rank_processes import run_ranks
from tests.sockets import listening


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", place.STORE, messages.SECRET):
        monkeypatch.delenv(name, raising=False)


def test_a_lone_process_listens_on_the_loopback_and_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """A single process listens only on the loopback, even if a cluster's GLOO_SOCKET_IFNAME is set."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    unpickler = dist.distributed_c10d._unpickler
    for _ in range(2):
        before = listening(os.getpid())
        distributed.setup(5.0)
        assert distributed.world_size() == 1
        assert {address for address, _ in listening(os.getpid()) - before} <= {"127.0.0.1", "::1"}
        distributed.shutdown()
        assert not dist.is_initialized() and dist.distributed_c10d._unpickler is unpickler
        assert os.environ["GLOO_SOCKET_IFNAME"] == "eth0" and "NCCL_SOCKET_IFNAME" not in os.environ


@pytest.fixture
def own_group() -> Any:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=40))
    yield dist.distributed_c10d._get_default_group()
    if dist.is_initialized():
        dist.destroy_process_group()


def test_a_callers_group_is_kept_and_waits_as_long_as_the_run_needs(own_group: Any) -> None:
    """If a collective timed out before the watchdog, the watchdog's report would be lost."""
    backend = own_group._get_backend(torch.device("cpu"))
    for patience, within in ((100.0, 100), (20.0, 40), (None, 40)):
        distributed.setup(patience)
        assert distributed.gather_objects([1]) == [[1]]
        assert backend.options._timeout.seconds == within
        distributed.shutdown()
        assert dist.is_initialized() and backend.options._timeout.seconds == 40


def test_a_callers_group_without_a_backend_for_the_host_is_told() -> None:
    dist.init_process_group("cuda:gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(UserError, match=r"cannot exchange tensors of the cpu: make it with init_process_group"):
            distributed.setup()
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()


def test_a_second_run_at_the_same_time_is_one_error_and_one_after_another_is_fine() -> None:
    distributed.setup()
    raised: list[BaseException] = []

    def other() -> None:
        try:
            distributed.setup()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    distributed.shutdown()
    assert len(raised) == 1 and isinstance(raised[0], UserError) and "one run at a time" in str(raised[0])

    def alone() -> None:
        other()
        distributed.shutdown()

    thread = threading.Thread(target=alone)
    thread.start()
    thread.join()
    assert len(raised) == 1


def test_waiting_for_ranks_that_do_not_come_is_announced_and_ends_in_one_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The variables are those of a job of two ranks, but only one rank is started."""
    monkeypatch.setattr(distributed, "ANNOUNCED", 0.2)
    variables = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29613"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RunError, match=r"rank 0 waits for all 2 ranks .* at 127\.0\.0\.1:29613 .*"):
        distributed.setup(2.0)
    assert capsys.readouterr().out.count("rank 0 waits for all 2 ranks") == 1
    assert not dist.is_initialized()
    for name in variables:
        monkeypatch.delenv(name)
    distributed.setup()  # An error leaves the process as it was.
    distributed.shutdown()


@pytest.mark.parametrize("store", ["junk", "tcp:host:x:y", "tcp:host:1", "file:/nowhere/store-0", "file:"])
def test_a_store_that_is_left_over_is_told(monkeypatch: pytest.MonkeyPatch, store: str) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MIMAE_STORE": store}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RunError, match=rf"MIMAE_STORE='{store}' in the environment .*`unset MIMAE_STORE`"):
        distributed.setup(2.0)
    assert not dist.is_initialized()


def exchange() -> dict[str, Any]:
    """Gather objects of different lengths, also from some ranks only, and an object signed with another secret."""
    rank = distributed.rank()
    group: Any = dist.new_group([0, 2], backend="gloo")
    mine: Any = {"rank": rank, "text": "é" * 100 * rank, "none": None}
    found: dict[str, Any] = {"all": distributed.gather_objects(mine), "refused": False}
    if rank != 1:
        found["part"] = distributed.gather_objects([rank], group)
    os.environ[messages.SECRET] = "of the job" if rank else "of another"
    try:
        distributed.gather_objects(rank)
    except messages.MessageError:
        found["refused"] = True
    return found


@pytest.mark.slow
def test_objects_are_gathered_in_the_order_of_ranks(tmp_path: Path) -> None:
    results = run_ranks(3, tmp_path, exchange)
    wanted = [{"rank": rank, "text": "é" * 100 * rank, "none": None} for rank in range(3)]
    assert [result["all"] for result in results] == [wanted] * 3
    assert results[0]["part"] == results[2]["part"] == [[0], [2]]
    assert all(result["refused"] for result in results)
