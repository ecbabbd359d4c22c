"""Worker processes return the same batches with and without room in shared memory."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mimae.data.loading import shared_memory
from mimae.data.loading.batch import Batch, DataError
from mimae.data.loading.loader import make_loader
from mimae.data.loading.shared_memory import Packed, handed_over, has_room
from mimae.data.settings import DataSettings
from mimae.data.sources.open import open_source
from tests.data.conftest import LOADERS, loader_on_cpu, write_images


@pytest.fixture(autouse=True)
def nothing_said() -> None:
    shared_memory._said.cache_clear()


@pytest.fixture
def images(tmp_path: Path) -> str:
    write_images(tmp_path, [f"{i}.png" for i in range(8)])
    return str(tmp_path)


def batch() -> Batch:
    return Batch(torch.arange(48, dtype=torch.uint8).view(1, 4, 4, 3), torch.arange(1), torch.arange(1), 0, 0)


def no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors cannot be moved to shared memory, as if it were full."""

    def full(self: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)


def test_a_batch_goes_through_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    made = batch()
    assert handed_over(made, by_pipe=False) is made and made.images.is_shared() and made.source_ids.is_shared()


@pytest.mark.parametrize("by_pipe", [True, False])
def test_a_batch_is_packed_where_there_is_no_room(monkeypatch: pytest.MonkeyPatch, by_pipe: bool) -> None:
    no_room(monkeypatch)
    packed = handed_over(batch(), by_pipe)
    assert isinstance(packed, Packed)
    assert torch.equal(packed.unpacked().images, batch().images)


@pytest.mark.parametrize("name", LOADERS)
def test_batches_are_the_same_without_shared_memory(images: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The forked workers have no room either. Without the fallback the first batch would never arrive."""
    found = []
    for full in (False, True):
        if full:
            no_room(monkeypatch)
        settings = DataSettings(image_size=8, workers=2)
        loader = loader_on_cpu(name, settings, open_source(images), seed=1, batch_size=4)
        found.append(torch.cat([batch.images for batch in loader.epoch(0)]))
        loader.close()
    assert torch.equal(*found)


def test_room_is_looked_at_before_the_start(
    images: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two workers have two finished batches and one in progress each, of 4 x 3,072 bytes and the ids."""
    need = 2 * 3 * 4 * (3 * 32 * 32 + 16)
    for room in (need, need - 1):
        monkeypatch.setattr(os, "statvfs", lambda path, room=room: SimpleNamespace(f_frsize=1, f_bavail=room))
        loader = make_loader(DataSettings(image_size=32, workers=2), open_source(images), seed=0, batch_size=4)
        assert len(list(loader.epoch(0))) == 2
        loader.close()
        said = capsys.readouterr().err
        assert ("batches go through pipes" in said) == (room < need) and said.count("\n") == (room < need)
    assert "need 0.1 MB (2 workers x 3 x 0.0 MB), and /dev/shm has 0.1 MB free" in said and "--shm-size" in said


def test_ranks_of_a_machine_share_the_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory, "free", lambda: 300)
    assert has_room(10, 5, 2) and not has_room(10, 5, 3)
    monkeypatch.setattr(shared_memory, "free", lambda: None)
    assert has_room(1 << 40, 100, 8)


def test_workers_that_cannot_start_are_told_in_words(images: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The locks of worker processes are in shared memory too."""
    import multiprocessing.synchronize

    def full(*given: object, **more: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(multiprocessing.synchronize.SemLock, "__init__", full)
    loader = make_loader(DataSettings(image_size=8, workers=1), open_source(images), seed=0, batch_size=4)
    with pytest.raises(DataError, match=r"No space left on device.*--shm-size.*data.workers=0"):
        next(loader.epoch(0))
