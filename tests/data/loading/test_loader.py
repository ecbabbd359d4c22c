"""Micro-batches as the training loop gets them: the right pixels with the right ids, whatever the images contain."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from mimae.data.loading.batch import Batch, DataError
from mimae.data.loading.loader import evaluation_batches, make_loader
from mimae.data.loading.order import BatchRequest
from mimae.data.loading.shared_memory import Empty
from mimae.data.loading.workers import Workers, default_workers
from mimae.data.pixels.augment import centre_window, crop_words, flips, random_window
from mimae.data.settings import DataSettings
from mimae.data.sources.base import Source
from mimae.data.sources.open import open_source
from mimae.errors import UserError
from mimae.randomness import Purpose, words
from tests.data.conftest import LOADERS, encoded, loader_on_cpu, photograph

SETTINGS = DataSettings(image_size=(16, 24), workers=0)
TURNED = {2: 3, 3: 6}
"""EXIF orientation of samples in the folder: one upside down, one rotated by 90 degrees."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twenty images: JPEGs, of which two are rotated and one is grey, and a PNG."""
    for i in range(20):
        (tmp_path / f"{i:02}.jpg").write_bytes(encoded(photograph(i, 40, 60), "JPEG", quality=95))
    for i, orientation in TURNED.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        (tmp_path / f"{i:02}.jpg").write_bytes(encoded(photograph(i, 40, 60), "JPEG", exif=exif))
    (tmp_path / "04.jpg").write_bytes(encoded(photograph(4, 40, 60)[..., 0], "JPEG"))
    (tmp_path / "06.jpg").write_bytes(encoded(photograph(6, 40, 60)))
    return tmp_path


def resized(image: Image.Image) -> np.ndarray:
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    return F.interpolate(pixels, (16, 24), mode="bicubic", antialias=True)[0].permute(1, 2, 0).numpy()


def expected_sample(source: Source, seed: int, epoch: int, slot: int, pixels_of: int) -> np.ndarray:
    """Make the sample without the loader: decode the whole upright image, crop, resize and flip it."""
    image = ImageOps.exif_transpose(Image.open(source.path(pixels_of))).convert("RGB")
    row = crop_words(seed, epoch, torch.tensor([slot]))[0].tolist()
    top, left, h, w = random_window(row, image.height, image.width, (0.2, 1.0))
    sample = resized(image.crop((left, top, left + w, top + h)))
    return sample[:, ::-1] if flips(seed, epoch, torch.tensor([slot]))[0] else sample


def assert_same(name: str, found: torch.Tensor, expected: np.ndarray, pixels_of: int) -> None:
    """Assert equal pixels, except for rounding.

    Rounding differs if the stored pixels are resized before they are turned, and if DALI resizes, since its weights
    have single precision.
    """
    difference = np.abs(found.numpy().astype(int) - expected)
    exact = name != "dali_gpu" and pixels_of not in TURNED
    assert difference.max() <= (0 if exact else 4) and difference.mean() < 0.5


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", LOADERS)
def test_epoch_of_micro_batches(folder: Path, name: str, workers: int) -> None:
    """With two ranks and two micro-batches per step, every sample of the order occurs once, cropped by its own id."""
    source = open_source(str(folder))
    settings = SETTINGS.model_copy(update={"workers": workers})
    loaders = [
        loader_on_cpu(name, settings, source, seed=3, batch_size=8, accumulate=2, rank=rank, world_size=2)
        for rank in range(2)
    ]
    assert [loader.steps_per_epoch for loader in loaders] == [2, 2]
    for epoch in (0, 1):
        dealt = [list(loader.epoch(epoch)) for loader in loaders]
        assert [len(batches) for batches in dealt] == [4, 4]
        seen = []
        for micro, both in enumerate(zip(*dealt)):
            for batch in both:
                assert (batch.epoch, batch.step) == (epoch, micro // 2)
                assert batch.images.dtype == torch.uint8 and batch.images.is_contiguous()
                assert batch.images.shape == (2, 16, 24, 3)
                assert batch.bad == []
                assert torch.equal(batch.sample_ids, batch.source_ids)
                for image, i in zip(batch.images, batch.sample_ids.tolist()):
                    assert_same(name, image, expected_sample(source, 3, epoch, i, i), i)
                    seen.append(i)
        assert sorted(seen + loaders[0].dropped(epoch).tolist()) == list(range(20))
    for loader in loaders:
        loader.close()


def same(a: Batch, b: Batch) -> bool:
    return (
        torch.equal(a.images, b.images)
        and torch.equal(a.sample_ids, b.sample_ids)
        and (a.epoch, a.step, a.bad) == (b.epoch, b.step, b.bad)
    )


@pytest.mark.parametrize("name", LOADERS)
def test_resume_and_unfinished_epochs(folder: Path, name: str) -> None:
    """An epoch is left half-way, another one begun, then the first one resumed, with workers busy: same batches."""
    source = open_source(str(folder))
    first = loader_on_cpu(name, SETTINGS, source, seed=0, batch_size=4, accumulate=2)
    whole = list(first.epoch(5))
    first.close()
    two = SETTINGS.model_copy(update={"workers": 2})
    loader = loader_on_cpu(name, two, source, seed=0, batch_size=4, accumulate=2)
    begun = loader.epoch(5)
    assert same(next(begun), whole[0])
    other = loader.epoch(6)
    assert next(begun, None) is None  # It ended when the other one began; else these were the other one's batches.
    assert [batch.epoch for batch in other] == [6] * 10
    rest = list(loader.epoch(5, first_step=3))
    assert len(rest) == 4 and all(map(same, rest, whole[6:]))
    loader.close()
    with pytest.raises(ValueError, match="closed"):
        loader.epoch(0)


def test_loading_leaves_the_global_generator_alone(folder: Path) -> None:
    """A model's dropout or noise must not depend on how often an epoch was begun."""
    loader = make_loader(SETTINGS, open_source(str(folder)), seed=0, batch_size=4)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    list(loader.epoch(0))
    list(evaluation_batches(SETTINGS, open_source(str(folder)), 8))
    assert torch.equal(torch.get_rng_state(), before)


# Samples that cannot be read


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("name", LOADERS)
def test_bad_samples_are_replaced_by_the_chain(folder: Path, name: str, workers: int) -> None:
    """Four samples are broken in four ways, one of them below a valid header.

    Only these samples are replaced, and their slots keep their own crop and flip.
    """
    source = open_source(str(folder))
    (folder / "05.jpg").write_bytes(b"no image")
    (folder / "11.jpg").unlink()
    (folder / "17.jpg").write_bytes(encoded(np.zeros((300, 300), np.uint8)))
    (folder / "13.jpg").write_bytes(without_tables(encoded(photograph(13, 40, 60), "JPEG")))
    broken = {5: "begins with b'no image'", 11: "No such file", 13: "OSError", 17: "max_pixels = 80000"}
    settings = SETTINGS.model_copy(update={"workers": workers, "max_pixels": 80_000})
    loader = loader_on_cpu(name, settings, source, seed=2, batch_size=5)
    replaced = set()
    for batch in loader.epoch(4):
        for image, slot, pixels_of in zip(batch.images, batch.sample_ids.tolist(), batch.source_ids.tolist()):
            drawn = words(2, Purpose.REPLACEMENT, 4, torch.tensor([slot]), 64)[0].tolist()
            chain = [slot, *(word * 20 >> 32 for word in drawn)]
            assert pixels_of == next(i for i in chain if i not in broken)
            assert_same(name, image, expected_sample(source, 2, 4, slot, pixels_of), pixels_of)
            replaced |= {slot} if slot != pixels_of else set()
        for i, path, reason in batch.bad:
            assert path == source.path(i) and broken[i] in reason and "\n" not in reason
    loader.close()
    assert replaced == set(broken)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("name", LOADERS)
def test_data_of_which_nothing_can_be_read(tmp_path: Path, name: str, workers: int) -> None:
    """The error shows a few of the reasons. If it comes from a worker, it has no traceback of torch."""
    for i in range(4):
        (tmp_path / f"{i}.jpg").write_bytes(b"no image")
    settings = SETTINGS.model_copy(update={"workers": workers})
    loader = loader_on_cpu(name, settings, open_source(str(tmp_path)), seed=0, batch_size=4)
    with pytest.raises(DataError, match=r"cannot be read, nor any of 64 samples tried") as failure:
        next(loader.epoch(0))
    assert "Traceback" not in str(failure.value)
    assert "0.jpg: no header of an image" in str(failure.value)
    loader.close()
    assert not multiprocessing.active_children()  # They have ended although the error and its traceback exist.


def without_tables(jpeg: bytes) -> bytes:
    """Return a JPEG without quantization tables, which no decoder can decode. Its header and end are valid."""
    return jpeg[: jpeg.index(b"\xff\xdb")] + jpeg[jpeg.index(b"\xff\xc0") :]


# Evaluation


def test_evaluation_is_in_order_and_of_the_centre(folder: Path) -> None:
    source = open_source(str(folder))
    batches = list(evaluation_batches(SETTINGS, source, 8))
    assert [batch.sample_ids.tolist() for batch in batches] == [
        list(range(8)),
        list(range(8, 16)),
        [16, 17, 18, 19],
    ]
    # 40 x 60 has the aspect ratio of 16 x 24; 03.jpg is upright 60 x 40 and loses its top and bottom.
    np.testing.assert_array_equal(batches[0].images[1], resized(Image.open(source.path(1))))
    window = centre_window(60, 40, (16, 24))
    assert window == (16, 0, 27, 40)
    middle = ImageOps.exif_transpose(Image.open(source.path(3))).crop((0, 16, 40, 43))
    assert_same("torch", batches[0].images[3], resized(middle), 3)


def test_evaluation_of_chosen_samples(folder: Path) -> None:
    source = open_source(str(folder))
    whole = torch.cat([batch.images for batch in evaluation_batches(SETTINGS, source, 20)])
    chosen = [7, 0, 19, 7]
    some = list(evaluation_batches(SETTINGS, source, 3, ids=chosen))
    assert torch.cat([batch.sample_ids for batch in some]).tolist() == chosen
    assert torch.equal(torch.cat([batch.images for batch in some]), whole[chosen])


# Processes


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, 12),
        ({"LOCAL_WORLD_SIZE": "4"}, 3),
        ({"SLURM_CPUS_PER_TASK": "6"}, 6),
        ({"SLURM_CPUS_PER_TASK": "64", "LOCAL_WORLD_SIZE": "5"}, 2),  # SLURM allots more than the process may use.
        ({"LOCAL_WORLD_SIZE": "16"}, 1),
        # One task per rank, bound to its cores or not; then one task for all four ranks of the node.
        ({"SLURM_TASKS_PER_NODE": "4(x8)", "SLURM_CPUS_PER_TASK": "3", "LOCAL_WORLD_SIZE": "4"}, 3),
        ({"SLURM_TASKS_PER_NODE": "4(x8),2", "SLURM_CPUS_ON_NODE": "8"}, 2),
        ({"SLURM_TASKS_PER_NODE": "1", "SLURM_CPUS_PER_TASK": "8", "LOCAL_WORLD_SIZE": "4"}, 2),
        # A step with one task in an allocation for four tasks.
        ({"SLURM_TASKS_PER_NODE": "4", "SLURM_STEP_TASKS_PER_NODE": "1", "LOCAL_WORLD_SIZE": "4"}, 3),
    ],
)
def test_default_workers(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    for name in ("LOCAL_WORLD_SIZE", *(name for name in os.environ if name.startswith("SLURM_"))):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert default_workers() == expected


@pytest.mark.parametrize(
    "name", ["LOCAL_WORLD_SIZE", "SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE", "SLURM_TASKS_PER_NODE"]
)
@pytest.mark.parametrize("value", ["0", "x", "-1", "(x2)"])
def test_a_variable_that_counts_nothing_is_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.delenv("SLURM_STEP_TASKS_PER_NODE", raising=False)
    monkeypatch.setenv(name, value)
    if (name, value) == ("SLURM_TASKS_PER_NODE", "(x2)"):
        return
    with pytest.raises(UserError, match=name):
        default_workers()


@pytest.mark.parametrize("name", LOADERS)
def test_signals_to_the_whole_job_and_a_worker_that_dies(folder: Path, name: str) -> None:
    """Only the parent reacts to SIGINT and SIGTERM. A killed worker raises a readable error at the next batch."""
    settings = SETTINGS.model_copy(update={"workers": 2})
    loader = loader_on_cpu(name, settings, open_source(str(folder)), seed=0, batch_size=1)
    batches = loader.epoch(0)
    next(batches)
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    # As from a scheduler: a process other than the parent sends the signal.
    for name in ("INT", "TERM"):
        subprocess.run(["kill", f"-{name}", *(str(worker.pid) for worker in workers)], check=True)
    for _ in range(5):
        next(batches)
    assert all(worker.is_alive() for worker in workers)
    workers[0].kill()
    with pytest.raises(DataError, match=r"a decoding process died \(process \d+ by SIGKILL\).*lower data.workers"):
        list(batches)
    loader.close()
    for worker in workers:
        worker.join(10)  # The other worker was asked to end and may take a moment.
    assert not multiprocessing.active_children()


def _fail(request: BatchRequest, *, empty: Empty) -> None:
    raise RuntimeError("of its own")


def test_an_error_in_a_worker_is_not_its_death() -> None:
    loader = Workers(_fail, 1)
    with pytest.raises(RuntimeError, match="of its own"):
        next(loader.batches([BatchRequest(0, 0, np.zeros(1, np.int64))]))
    loader.close()
    gc.collect()  # The error's traceback refers to torch's iterator, which refers to the worker.
    assert not multiprocessing.active_children()


def test_closing_ends_the_workers(folder: Path) -> None:
    loader = make_loader(SETTINGS.model_copy(update={"workers": 2}), open_source(str(folder)), seed=0, batch_size=4)
    unfinished = loader.epoch(0)
    next(unfinished)
    assert len(multiprocessing.active_children()) == 2
    loader.close()
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_a_stopped_worker_does_not_outlive_the_loader(folder: Path) -> None:
    """A stopped worker, as in a suspended job, reacts only to SIGKILL. torch waits five seconds for it."""
    loader = make_loader(SETTINGS.model_copy(update={"workers": 1}), open_source(str(folder)), seed=0, batch_size=4)
    next(loader.epoch(0))
    (worker,) = multiprocessing.active_children()
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGSTOP)
    loader.close()
    worker.join(20)
    assert not worker.is_alive()


ORPHANS = """
import multiprocessing, signal, sys, time
from mimae.data.loading.loader import make_loader
from mimae.data.settings import DataSettings
from mimae.data.sources.open import open_source
loader = make_loader(DataSettings(image_size=16, workers=2), open_source(sys.argv[1]), seed=0, batch_size=1)
batches = loader.epoch(0)
next(batches)
# torch's handler would raise a worker's death in the middle of anything.
assert signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL
print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
if sys.argv[2] == "exit":
    raise SystemExit("without closing")
time.sleep(60)
"""


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_workers_end_with_their_parent(folder: Path) -> None:
    """Workers end with the parent, whether it is killed or exits by an exception with the loader open."""
    parents = {
        end: subprocess.Popen(
            [sys.executable, "-c", ORPHANS, str(folder), end], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for end in ("kill", "exit")
    }
    workers: list[int] = []
    for end, parent in parents.items():
        assert parent.stdout is not None
        born = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(born) == 2
        if end == "kill":
            assert all(map(alive, born))
            parent.kill()
        workers += born
    for parent in parents.values():
        parent.communicate(timeout=60)
    deadline = time.monotonic() + 20
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, workers))


@pytest.mark.gpu
def test_batches_come_in_pinned_memory_and_move(folder: Path) -> None:
    loader = make_loader(SETTINGS.model_copy(update={"workers": 1}), open_source(str(folder)), seed=0, batch_size=4)
    batch = next(loader.epoch(0))
    assert batch.images.is_pinned() and batch.sample_ids.is_pinned() and batch.source_ids.is_pinned()
    moved = batch.to("cuda")
    assert moved.images.is_cuda and moved.sample_ids.is_cuda and torch.equal(moved.images.cpu(), batch.images)
    loader.close()
