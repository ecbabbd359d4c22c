"""Results of workers arrive unchanged in shared memory, which is used again only when the reader has dropped them."""

from __future__ import annotations

import gc
import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mimae.data.loading import shared_memory
from mimae.data.loading.batch import Batch
from mimae.data.loading.order import BatchRequest
from mimae.data.loading.shared_memory import SLOTS, Empty, Slot, Slots, arrived, handed_over
from mimae.data.loading.workers import Workers
from mimae.data.settings import DataSettings
from mimae.data.sources.open import open_source
from tests.data.conftest import LOADERS, loader_on_cpu, write_images

PIPES = "batches go through pipes"


@pytest.fixture(autouse=True)
def nothing_said() -> None:
    shared_memory._without.cache_clear()


@pytest.fixture(autouse=True)
def all_in_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor is small."""
    monkeypatch.setattr(shared_memory, "SMALL", 0)


@pytest.fixture
def images(tmp_path: Path) -> str:
    write_images(tmp_path, [f"{i}.png" for i in range(8)])
    return str(tmp_path)


def no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*given: object, flags: int) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(shared_memory.mmap, "mmap", refused)


def numbered(request: BatchRequest, *, empty: Empty) -> Batch:
    """Return a batch whose every value is the number of its step."""
    images = empty((len(request.ids), 16, 16, 3), dtype=torch.uint8).fill_(request.step % 251)
    steps = torch.full((len(request.ids),), request.step)
    return Batch(images, steps, steps.clone(), request.epoch, request.step)


def requests(count: int) -> list[BatchRequest]:
    return [BatchRequest(0, step, np.arange(4)) for step in range(count)]


def is_whole(batch: Batch) -> bool:
    return bool((batch.images == batch.step % 251).all() and (batch.sample_ids == batch.step).all())


def taken(workers: Workers[Any]) -> int:
    """Return how many slots are in use."""
    return len(numbers_taken(workers))


def numbers_taken(workers: Workers[Any]) -> set[int]:
    slots = workers._slots
    assert slots._memory is not None
    return {number for number, mark in enumerate(slots._memory[slots._marks :]) if mark}


def free(slots: Slots, worker: int = 0) -> Slot:
    slot = slots.free(worker)
    assert slot is not None
    return slot


def sent(made: Any, slot: Slot | None) -> Any:
    """Return what arrives in the reader, which is this process."""
    return arrived(handed_over(made, slot))


def test_a_result_of_any_type_arrives_unchanged() -> None:
    slots = Slots(1)
    slot = free(slots)
    inside = slot.empty((2, 3), dtype=torch.float32).copy_(torch.arange(6).view(2, 3))
    made: dict[str, Any] = {
        "inside": inside,
        "a part of it": inside[1],
        "turned": inside.t(),
        "outside": [torch.arange(5), (torch.arange(6).view(2, 3)[:, 1:], None)],
        "nothing": torch.empty(0, 3),
        "one number": torch.tensor(2.5, dtype=torch.float64),
        "bools": torch.tensor([True, False]),
        "no tensor": np.arange(3),
    }
    got = sent(made, slot)
    assert list(got) == list(made)
    for name in ("inside", "a part of it", "turned", "nothing", "one number", "bools"):
        assert torch.equal(got[name], made[name]) and got[name].dtype == made[name].dtype, name
        assert got[name].shape == made[name].shape
    assert torch.equal(got["outside"][1][0], made["outside"][1][0]) and got["outside"][1][1] is None
    assert np.array_equal(got["no tensor"], made["no tensor"])


def test_pixels_in_a_slot_are_not_copied_and_other_tensors_lie_beside_them() -> None:
    slots = Slots(1)
    slot = free(slots)
    pixels = slot.empty((4, 8), dtype=torch.uint8).fill_(1)
    got, labels = sent((pixels, torch.arange(3)), slot)
    pixels.fill_(9)
    assert bool((got == 9).all()), "one memory for both"
    assert labels.tolist() == [0, 1, 2]


def test_what_a_slot_cannot_hold_goes_through_the_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory, "SLOT_BYTES", 1 << 12)
    slots = Slots(1)
    slot = free(slots)
    made = slot.empty((4097,), dtype=torch.uint8).fill_(3), torch.arange(100), torch.arange(1000)
    got = sent(made, slot)
    assert all(map(torch.equal, got, made))
    others = sent(made, None)
    assert all(map(torch.equal, others, made))


def test_a_slot_is_free_when_its_last_tensor_is_dropped() -> None:
    slots = Slots(2)
    first = free(slots)
    got = sent([torch.arange(3), torch.arange(4)], first)
    kept = got[1][2:]
    del got, first
    assert free(slots)._number == 1, "a view is a tensor in it"
    assert free(slots, worker=1)._number == SLOTS, "each worker has its own"
    del kept
    assert free(slots)._number == 0


def test_a_slot_is_free_when_its_message_is_dropped() -> None:
    slots = Slots(1)
    message = handed_over(torch.arange(3), free(slots))
    assert free(slots)._number == 1
    arrived(message)
    assert free(slots)._number == 0


def test_there_are_no_more_slots_than_slots() -> None:
    slots = Slots(1)
    kept = [sent(torch.tensor([i]), free(slots)) for i in range(SLOTS)]
    assert slots.free(0) is None
    assert [int(each) for each in kept] == list(range(SLOTS))


def test_a_forked_process_does_not_free_what_its_parent_uses() -> None:
    slots = Slots(1)
    got = [sent(torch.arange(3), free(slots))]
    child = multiprocessing.get_context("fork").Process(target=got.clear)
    child.start()
    child.join()
    assert child.exitcode == 0 and free(slots)._number == 1
    got.clear()
    assert free(slots)._number == 0


def test_results_that_the_reader_keeps_are_never_overwritten() -> None:
    """More than there are slots: the rest comes through pipes."""
    workers = Workers(numbered, 2)
    kept = list(workers.batches(requests(3 * SLOTS)))
    assert [batch.step for batch in kept] == list(range(3 * SLOTS))
    assert all(map(is_whole, kept)) and taken(workers) == 2 * SLOTS
    kept.clear()
    assert taken(workers) == 0
    workers.close()


def test_a_reader_of_one_batch_at_a_time_needs_few_slots() -> None:
    """Memory is made for as many batches as are in flight, not for all slots."""
    workers = Workers(numbered, 1)
    used = set()
    for batch in workers.batches(requests(3 * SLOTS)):
        assert is_whole(batch)
        used |= numbers_taken(workers)
    assert used and used <= {0, 1, 2, 3}
    del batch
    assert taken(workers) == 0
    workers.close()


def test_an_iteration_that_ends_early_leaves_no_slot_taken() -> None:
    workers = Workers(numbered, 2)
    for _ in range(2 * SLOTS):
        batch = next(workers.batches(requests(8)))
        assert batch.step == 0 and is_whole(batch)
    assert [each.step for each in workers.batches(requests(5)) if is_whole(each)] == list(range(5))
    del batch
    assert taken(workers) == 0
    workers.close()


def test_the_memory_goes_with_the_loader_and_the_last_tensor() -> None:
    def mapped() -> bool:
        """Return whether this process has the memory of a worker's slots among its addresses."""
        ranges = [line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines()]
        return any(int(end, 16) - int(begin, 16) >= SLOTS * shared_memory.SLOT_BYTES for begin, end in ranges)

    gc.collect()
    assert not mapped()
    workers = Workers(numbered, 1)
    batch = next(workers.batches(requests(2)))
    workers.close()
    del workers
    assert mapped() and is_whole(batch), "a batch outlives its loader"
    del batch
    assert not mapped()


def test_two_loaders_have_their_own_memory() -> None:
    """As training and an evaluation do."""
    pairs = [Workers(numbered, 1), Workers(numbered, 1)]
    streams = [each.batches(requests(6)) for each in pairs]
    kept = [next(stream) for _ in range(3) for stream in streams]
    streams[1] = pairs[1].batches(requests(4))
    kept += [next(streams[1]), next(streams[0])]
    assert [batch.step for batch in kept] == [0, 0, 1, 1, 2, 2, 0, 3] and all(map(is_whole, kept))
    assert [taken(each) >= 4 for each in pairs] == [True, True]
    for each in pairs:
        each.close()


def test_workers_of_a_forked_process_do_not_write_to_the_slots_of_its_parent() -> None:
    """Both make workers with the same numbers from one loader, and read at the same time."""
    workers = Workers(numbered, 1)

    def read() -> None:
        for _ in range(3):
            assert all(map(is_whole, workers.batches(requests(20))))

    child = multiprocessing.get_context("fork").Process(target=read)
    child.start()
    read()
    child.join()
    assert child.exitcode == 0
    workers.close()


def test_small_tensors_do_not_keep_a_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory, "SMALL", 64)
    slots = Slots(1)
    conjugate = torch.tensor([1 + 2j, 3j]).conj()
    small = torch.arange(8), torch.tensor(2.5), torch.ones(2, 3, dtype=torch.bfloat16), torch.ones(2) > 0, conjugate
    got = sent((*small, torch.empty(0, 3), torch.arange(100)), free(slots))
    assert all(map(torch.equal, got, (*small, torch.empty(0, 3), torch.arange(100))))
    assert [tensor.dtype for tensor in got[: len(small)]] == [tensor.dtype for tensor in small]
    assert free(slots)._number == 1
    got = got[:-1]
    assert free(slots)._number == 0
    got[0][0] = 7  # They can be written to.


@pytest.fixture
def spawned() -> Iterator[None]:
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("spawn", force=True)
    yield
    multiprocessing.set_start_method(before, force=True)


@pytest.mark.usefixtures("spawned")
def test_workers_that_are_not_forked_send_through_pipes(capsys: pytest.CaptureFixture[str]) -> None:
    workers = Workers(numbered, 1)
    assert all(map(is_whole, workers.batches(requests(3))))
    workers.close()
    assert f"they are started by spawn, not by fork): {PIPES}" in capsys.readouterr().err


@pytest.mark.parametrize("name", LOADERS)
def test_batches_are_the_same_without_shared_memory(
    images: str, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = []
    for refused in (False, True):
        if refused:
            no_memory(monkeypatch)
        settings = DataSettings(image_size=8, workers=2)
        loader = loader_on_cpu(name, settings, open_source(images), seed=1, batch_size=4)
        found.append(torch.cat([batch.images for batch in loader.epoch(0)]))
        loader.close()
        assert capsys.readouterr().err.count(PIPES) == refused
    assert torch.equal(*found)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_pipes_are_told_once_by_one_rank_of_a_machine(
    rank: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A limit of addresses would leave too few for the run."""
    monkeypatch.setenv("LOCAL_RANK", rank)
    monkeypatch.setattr(shared_memory.resource, "getrlimit", lambda which: (1 << 50, 1 << 50))
    assert [Slots(1).free(0) for _ in range(3)] == [None] * 3
    Slots(0)
    line = (
        "no memory can be shared with the decoding processes (a limit of addresses is set, see `ulimit -v`): batches "
        "go through pipes, which takes more CPU time\n"
    )
    assert capsys.readouterr().err == (line if rank == "0" else "")
