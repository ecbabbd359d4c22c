"""Copies of batches to the device: the right pixels at the right time, whichever of the two queues is faster."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mimae.data.loading.batch import BadSample, Batch, DataError
from mimae.data.loading.loader import make_loader
from mimae.data.loading.to_device import Transfer
from mimae.data.settings import DataSettings
from mimae.data.sources.open import open_source
from tests.data.conftest import write_images

CPU = torch.device("cpu")


class Queue:
    """A queue that does its work in order. Each piece begins when the work that it waits for is done."""

    def __init__(self) -> None:
        self.work: deque[Callable[[], object] | tuple[Queue, int]] = deque()
        self.given = self.done = 0

    def give(self, work: Callable[[], object] | tuple[Queue, int]) -> None:
        self.work.append(work)
        self.given += 1

    def wait_for(self, other: Queue) -> None:
        self.give((other, other.given))

    def advance(self) -> bool:
        """Do one piece of work, if there is one that may begin."""
        if not self.work:
            return False
        first = self.work[0]
        if isinstance(first, tuple):
            if first[0].done < first[1]:
                return False
        else:
            first()
        self.work.popleft()
        self.done += 1
        return True


class Device:
    """A device with two queues. As a lane it takes copies; to compute it stores the pixels that it sees."""

    def __init__(self) -> None:
        self.computing, self.copies = Queue(), Queue()
        self.targets: set[int] = set()
        self.seen: list[list[int]] = []

    def after_computing(self) -> None:
        self.copies.wait_for(self.computing)

    def before_computing(self) -> None:
        self.computing.wait_for(self.copies)

    def copy(self, target: Tensor, source: Tensor) -> None:
        self.targets.add(target.data_ptr())
        self.copies.give(lambda: target.copy_(source))

    def step(self, batch: Batch) -> None:
        images, ids, source_ids = batch.images, batch.sample_ids, batch.source_ids
        self.computing.give(lambda: self.seen.append([int(images[0, 0, 0, 0]), int(ids[0]), int(source_ids[0])]))

    def run(self, *queues: Queue) -> None:
        """Work until nothing may begin, on the first queue as long as possible."""
        while any(queue.advance() for queue in queues):
            pass


def batch(number: int, size: int = 2) -> Batch:
    ids = torch.full((size,), number)
    return Batch(torch.full((size, 4, 4, 3), number, dtype=torch.uint8), ids, ids + 100, 0, number)


@pytest.mark.parametrize("eager", ["copies", "computing", "late"])
def test_each_step_sees_its_own_batch(eager: str) -> None:
    """Three schedules: copies as soon as possible, computing first, and a host that queues everything first."""
    device = Device()
    order = (device.copies, device.computing) if eager == "copies" else (device.computing, device.copies)
    for moved in Transfer(CPU, device)(map(batch, range(6))):
        if eager != "late":
            device.run(*order)
        device.step(moved)
        if eager == "copies":
            device.run(device.copies)
    device.run(*order)
    assert device.seen == [[i, i, i + 100] for i in range(6)]
    assert len(device.targets) == 2 * 3  # Two batches on the device, of three tensors each.


def test_the_next_copy_runs_beside_the_step() -> None:
    """While the device is still at step 0, batch 1 has been copied. Batch 2 has not, since it has no free buffer."""
    device = Device()
    moving = Transfer(CPU, device)(map(batch, range(3)))
    first = next(moving)
    device.run(device.copies, device.computing)
    device.step(first)
    second = next(moving)
    device.run(device.copies)
    assert int(second.images[0, 0, 0, 0]) == 1 and int(first.images[0, 0, 0, 0]) == 0
    device.step(second)
    device.run(device.computing, device.copies)
    assert device.seen == [[0, 0, 100], [1, 1, 101]] and int(first.images[0, 0, 0, 0]) == 2


def test_left_in_the_middle_with_another_size_after_it() -> None:
    """If a later epoch ends an earlier one before its last copy is done, the later one's batches are still right."""
    device = Device()
    transfer = Transfer(CPU, device)
    for number, moved in enumerate(transfer(map(batch, range(4)))):
        device.step(moved)
        if number == 1:
            break
    for moved in transfer(batch(number, size=3) for number in range(4, 7)):
        assert len(moved.images) == 3
        device.step(moved)
    device.run(device.copies, device.computing)
    assert [pixel for pixel, *_ in device.seen] == [0, 1, 4, 5, 6]


def test_an_error_waits_for_its_batch_and_nothing_is_asked_for_twice() -> None:
    asked = []

    def making() -> Iterator[Batch]:
        for number in range(2):
            asked.append(number)
            yield batch(number)
        asked.append(2)
        raise DataError("the third")

    moving = Transfer(CPU, Device())(making())
    assert asked == []
    assert [next(moving).step, next(moving).step] == [0, 1]
    assert asked == [0, 1, 2]
    with pytest.raises(DataError, match="the third"):
        next(moving)
    assert next(moving, None) is None
    assert list(Transfer(CPU, Device())(iter(()))) == []


def test_bad_samples_come_with_their_batch() -> None:
    bad = [BadSample(7, "a", "torn")]
    made = [batch(0), replace(batch(1), bad=bad)]
    assert [moved.bad for moved in Transfer(CPU, Device())(made)] == [[], bad]


def test_on_the_cpu_nothing_is_copied_or_made_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    now, asked = 0.0, list[int]()
    monkeypatch.setattr("mimae.data.loading.to_device.time.perf_counter", lambda: now)

    def making() -> Iterator[Batch]:
        nonlocal now
        for number in range(3):
            asked.append(number)
            now += 5.0
            yield batch(number)

    transfer = Transfer(CPU)
    for number, moved in enumerate(transfer(making())):
        assert asked == list(range(number + 1))
        assert moved.step == number
        now += 100.0  # This is the step and no waiting.
    assert transfer.waited == 15.0
    one = batch(0)
    assert next(transfer([one])).images is one.images


def test_batches_made_on_the_device_are_handed_through() -> None:
    """With `meta` in place of a GPU, batches on the device are neither copied nor prefetched."""
    device, asked = Device(), []

    def making() -> Iterator[Batch]:
        for number in range(2):
            asked.append(number)
            yield batch(number).to("meta")

    moving = Transfer(torch.device("meta"), device)(making())
    assert next(moving).images.device.type == "meta"
    assert asked == [0] and not device.targets


@pytest.mark.gpu
def test_on_a_gpu_each_step_sees_its_own_batch(tmp_path: Path) -> None:
    """With steps longer than copies and a host that runs ahead, the sums are right, with memory for two batches."""
    write_images(tmp_path, [f"{i:02}.png" for i in range(24)], 64, 64)
    settings = DataSettings(image_size=64, workers=1)
    loader = make_loader(settings, open_source(str(tmp_path)), seed=0, batch_size=4)
    expected = [(made.images.long().sum().item(), made.sample_ids.tolist()) for made in loader.epoch(0)]
    transfer = Transfer(torch.device("cuda"))
    a = torch.randn(4096, 4096, device="cuda")
    sums, ids, places = [], [], set()
    for moved in transfer(loader.epoch(0)):
        for _ in range(20):
            torch.mm(a, a)
        sums.append(moved.images.long().sum())
        ids.append(moved.sample_ids.clone())
        places.add(moved.images.data_ptr())
    loader.close()
    assert [(total.item(), row.tolist()) for total, row in zip(sums, ids)] == expected
    assert len(places) == 2
