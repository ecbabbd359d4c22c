"""All loaders agree: windows, pixels, replaced samples, and the samples of a run with kills and changes of ranks."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, functional  # type: ignore[import-untyped]

from mimae.config.load import load_recipe
from mimae.data.loading import backend as backends
from mimae.data.loading import dali
from mimae.data.loading.batch import Batch, DataError
from mimae.data.loading.dali import DaliGpuBackend, RegionDecoder
from mimae.data.loading.order import BatchRequest, SizeAt
from mimae.data.loading.samples import make_batch
from mimae.data.pixels.augment import crop_words, flips, random_window
from mimae.data.settings import DataSettings
from mimae.data.sources.open import open_source
from mimae.train.tasks.pretrain import pretrain
from tests.data.conftest import LOADERS, encoded, loader_on_cpu, photograph
from tests.data.loading.test_loader import without_tables
from tests.data.pixels.test_decode import LOSSLESS, REFUSED, TURNED, turned_by
from tests.kills import ids_through_kills, tell

CPU = torch.device("cpu")


def write(folder: Path, files: list[bytes]) -> str:
    folder.mkdir()
    for i, data in enumerate(files):
        (folder / f"{i:03}.jpg").write_bytes(data)
    return str(folder)


def epoch(name: str, settings: DataSettings, path: str, batch_size: int, number: int = 0) -> list[Batch]:
    loader = loader_on_cpu(name, settings, open_source(path), seed=5, batch_size=batch_size)
    batches = list(loader.epoch(number))
    loader.close()
    return batches


# Windows


def ramps(height: int, width: int) -> np.ndarray:
    """Return pixels that encode their position: red is the column, green is the row."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([columns, rows, np.full_like(rows, 90)], -1).astype(np.uint8)


def line(values: np.ndarray, length: int) -> tuple[float, float]:
    """Return start and length of the window from its resized coordinates `values` (n,).

    Value i is start + (i + 1/2) length / n - 1/2. The outer values are left out, because filters are cut at the
    window's edge.
    """
    n = len(values)
    inner = slice(n // 6, n - n // 6)
    slope, at = np.polyfit((np.arange(n) + 0.5)[inner], values[inner], 1)
    return (at + 0.5, slope * n) if slope > 0 else (at + 0.5 + slope * n, slope * n)


@pytest.mark.parametrize("name", LOADERS)
def test_window_and_flip_as_the_pixels_show_them(tmp_path: Path, name: str) -> None:
    """Images of ramps, in each orientation and as a PNG, have the windows of their seed, epoch and id.

    Least squares on the sample's pixels gives the window, exact to the integer. Height and width differ, so that a swap
    would be seen.
    """
    upright = ramps(180, 240)
    files = [
        encoded(np.ascontiguousarray(turn(upright)), "JPEG", quality=100, subsampling=0, exif=turned_by(orientation))
        for orientation, turn in TURNED.items()
    ]
    path = write(tmp_path / "ramps", [*files, encoded(upright)])
    seen = set()
    for number in range(3):
        for batch in epoch(name, DataSettings(image_size=(48, 64), workers=0), path, 3, number):
            drawn = crop_words(5, number, batch.sample_ids).tolist()
            mirrored = flips(5, number, batch.sample_ids).tolist()
            for image, words, flip in zip(batch.images.double().numpy(), drawn, mirrored):
                left, width = line(image[:, :, 0].mean(0), 64)
                top, height = line(image[:, :, 1].mean(1), 48)
                found = tuple(round(value) for value in (top, left, height, abs(width)))
                assert found == random_window(words, 180, 240, (0.2, 1.0))
                assert (width < 0) == flip
                seen.add(flip)
    assert seen == {False, True}


# Pixels

PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "retina.jpg")
"""Photographs of scikit-image, 300 to 1411 pixels wide."""

BOUNDS = {"torch": (0.06, 60), "dali_cpu": (0.06, 60), "dali_gpu": (0.2, 55)}
"""Mean absolute difference and PSNR (dB), as in docs/data.md."""


@pytest.mark.parametrize("name", LOADERS)
def test_pixels_are_near_those_of_torchvision(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Random crops of photographs are compared with torchvision's on Pillow's images, with the same windows."""
    spec = find_spec("skimage")
    assert spec is not None and spec.submodule_search_locations
    home = Path(spec.submodule_search_locations[0]) / "data"
    images = [np.asarray(Image.open(home / file).convert("RGB")) for file in PHOTOGRAPHS]
    path = write(tmp_path / "photographs", [encoded(pixels, "JPEG", quality=95) for pixels in images])
    source = open_source(path)
    errors = []
    for number in range(2):
        for batch in epoch(name, DataSettings(workers=0), path, 5, number):
            drawn = crop_words(5, number, batch.sample_ids).tolist()
            mirrored = flips(5, number, batch.sample_ids).tolist()
            for image, i, words, flip in zip(batch.images, batch.sample_ids.tolist(), drawn, mirrored):
                whole = Image.open(source.path(i)).convert("RGB")
                window = random_window(words, whole.height, whole.width, (0.2, 1.0))
                expected = functional.resized_crop(whole, *window, [224, 224], InterpolationMode.BICUBIC)
                expected = functional.hflip(expected) if flip else expected
                errors.append(image.numpy().astype(float) - np.asarray(expected))
    difference = np.stack(errors)
    mean, psnr = np.abs(difference).mean(), 10 * np.log10(255**2 / np.square(difference).mean())
    with capsys.disabled():
        print(f"\n{name}: mean {mean:.4f}, largest {np.abs(difference).max():.0f}, {psnr:.1f} dB")
    assert mean < BOUNDS[name][0] and psnr > BOUNDS[name][1]


# Unreadable samples


def test_odd_images_are_used_or_replaced_alike(tmp_path: Path) -> None:
    """For every format and kind of damage, reasons and replacements are equal, and the pixels nearly equal."""
    odd = [data for data, _ in (*LOSSLESS.values(), *REFUSED.values())]
    jpegs = [encoded(photograph(i, 50, 70), "JPEG", exif=turned_by(i % 8 + 1)) for i in range(16)]
    odd.append(without_tables(jpegs[0]))
    path = write(tmp_path / "odd", [*odd, *jpegs])
    settings = DataSettings(image_size=24, workers=0, max_pixels=1_000_000)
    seen = {name: epoch(name, settings, path, len(odd) + len(jpegs)) for name in LOADERS}
    (expected,) = seen["torch"]
    assert len({sample.id for sample in expected.bad}) == len(REFUSED) + 1
    for name, (batch,) in seen.items():
        assert batch.bad == expected.bad and torch.equal(batch.source_ids, expected.source_ids), name
        difference = (batch.images.int() - expected.images.int()).abs()
        assert difference.max() <= (0 if name == "dali_cpu" else 3), name


def flat(seen: list[Batch]) -> Tensor:
    return torch.cat([batch.images for batch in seen])


def test_a_part_with_a_bad_image_and_those_after_it(tmp_path: Path) -> None:
    """40 samples are decoded in three parts. After a failure the decoder continues with the rest in this process."""
    files = [encoded(photograph(i, 50, 70), "JPEG") for i in range(40)]
    files[3] = without_tables(files[3])
    path = write(tmp_path / "images", files)
    settings = DataSettings(image_size=24, workers=0)
    parts, ones = (flat(epoch(name, settings, path, 40)) for name in ("dali_cpu", "torch"))
    assert torch.equal(parts, ones)


def test_a_bad_image_costs_the_others_of_its_batch_no_bit(tmp_path: Path) -> None:
    """A failure of the resizing pipeline must not change the other samples of its batch.

    The pipeline fails for a whole batch, and another decoder would round differently. Then samples would change with
    the number of ranks, which changes the batches. 11 images give halves of unequal size.
    """
    files = [encoded(photograph(i, 50, 70), "JPEG") for i in range(11)]
    settings = DataSettings(image_size=24, workers=0)
    (sound,) = epoch("dali_gpu", settings, write(tmp_path / "sound", files), 11)
    files[3], files[4] = without_tables(files[3]), without_tables(files[4])
    (batch,) = epoch("dali_gpu", settings, write(tmp_path / "torn", files), 11)
    same = batch.source_ids == batch.sample_ids
    assert same.sum() == 9 and {sample.id for sample in batch.bad} == {3, 4}
    assert torch.equal(batch.images[same], sound.images[same])


def test_a_pipeline_that_cannot_be_made_or_makes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the driver is too old or memory is short, there is a readable error, not a silent fallback to one core."""
    path = write(tmp_path / "images", [encoded(photograph(i, 50, 70), "JPEG") for i in range(4)])
    settings = DataSettings(image_size=24, workers=0)

    def refuse(*given: object, **more: object) -> None:
        raise RuntimeError("Critical error:\nno driver")

    class Failing:
        def __init__(self, feed: Callable[[], object], *given: object, **more: object) -> None:
            self.feed = feed

        def run(self) -> None:
            self.feed()
            raise RuntimeError("out of memory")

    for made, text in (
        (refuse, r"cannot build a pipeline on cpu \(Critical error: no driver\); set"),
        (Failing, "the CPU decodes"),
    ):
        monkeypatch.setattr(dali, "build", made)
        with pytest.raises(DataError, match=f"data.loader=dali_gpu .*{text}"):
            epoch("dali_gpu", settings, path, 4)


def test_what_the_pipeline_owns_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This includes a batch of JPEGs and a PNG, whose images are a copy that may not have been made yet."""
    kept: list[Tensor] = []
    monkeypatch.setattr(dali._InUse, "add", lambda self, pixels: kept.append(pixels))
    jpegs = [encoded(photograph(i, 50, 70), "JPEG") for i in range(3)]
    path = write(tmp_path / "images", [*jpegs, encoded(photograph(3, 50, 70))])
    (batch,) = epoch("dali_gpu", DataSettings(image_size=24, workers=0), path, 4)
    assert torch.equal(batch.images[batch.sample_ids < 3], kept[0])


def _collect() -> None:
    gc.collect()


def _collect_if_enabled() -> None:
    if gc.isenabled() and gc.get_threshold()[0] == NEVER:
        gc.collect()


NEVER = 1 << 30
# Registered before a pipeline is built, as that of `threading` is, whose code in a child may start a collection.
os.register_at_fork(after_in_child=_collect_if_enabled)


def test_forks_do_not_free_pipelines(tmp_path: Path) -> None:
    """A pipeline in a garbage cycle, as from an error's traceback, is not freed in a fork: that would hang or crash."""
    jpeg = np.frombuffer(encoded(photograph(0, 50, 70), "JPEG"), np.uint8)
    cut = np.array([[0, 0, 9, 9, 0, 0]], np.int32)
    threshold = gc.get_threshold()
    gc.set_threshold(NEVER)
    try:
        cycle: list[object] = [dali.build(lambda: dali.feed_of([jpeg], cut), 1, 2, CPU, (8, 8))]
        cycle[0].run()  # type: ignore[attr-defined]
        cycle.append(cycle)
        del cycle
        child = multiprocessing.get_context("fork").Process(target=_collect)
        child.start()
        child.join(20)
        if child.exitcode is None:
            child.kill()
        assert child.exitcode == 0
        assert gc.isenabled()
    finally:
        gc.set_threshold(*threshold)


@pytest.mark.slow
def test_memory_over_bad_images(tmp_path: Path) -> None:
    """DALI's decoder fails on 2,000 images without tables. The memory of each is freed when it is reported."""
    good = encoded(photograph(0, 200, 200), "JPEG")
    source = open_source(write(tmp_path / "images", [without_tables(good), good]))
    decoder, settings = RegionDecoder(), DataSettings(image_size=8)
    used = []
    gc.freeze()  # As in a worker.
    for step in range(40):
        request = BatchRequest(0, step, np.zeros(50, np.int64) + 2 * np.arange(50))
        batch = make_batch(settings, source, 0, request, decoder)
        assert {sample.id for sample in batch.bad} == {0} and set(batch.source_ids.tolist()) == {1}
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        used.append((resident >> 20, len(os.listdir("/proc/self/fd"))))
    gc.unfreeze()
    assert used[-1][0] - used[8][0] < 8 and used[-1][1] <= used[8][1]


# Samples of a run


@pytest.fixture
def jpegs(tmp_path: Path) -> str:
    """23 JPEGs; the 6th is broken below its header."""
    files = [encoded(photograph(i, 40, 50), "JPEG") for i in range(23)]
    files[5] = without_tables(files[5])
    return write(tmp_path / "jpegs", files)


@pytest.mark.parametrize("name", LOADERS)
def test_each_once_through_changes_of_ranks(jpegs: str, name: str) -> None:
    """With 1 -> 2 -> 1 ranks in one epoch, every slot occurs once with its own pixels, except for the reported tail."""
    settings, source = DataSettings(image_size=8, workers=0), open_source(jpegs)
    whole = loader_on_cpu(name, settings, source, seed=9, batch_size=4)
    expected = {i: image for batch in whole.epoch(1) for i, image in zip(batch.sample_ids.tolist(), batch.images)}
    seen = whole.dropped(1).tolist()
    for ranks, first, steps in ((1, 0, 2), (2, 2, 1), (1, 3, 9)):
        for rank in range(ranks):
            loader = loader_on_cpu(name, settings, source, seed=9, batch_size=4, rank=rank, world_size=ranks)
            for batch, _ in zip(loader.epoch(1, first), range(steps)):
                assert batch.step in range(first, first + steps)
                seen += batch.sample_ids.tolist()
                assert all(map(torch.equal, batch.images, (expected[i] for i in batch.sample_ids.tolist())))
            loader.close()
    assert sorted(seen) == list(range(23))


def _train(name: str, place: str, first: int, told: Connection) -> None:
    """A run that prints each step and waits for input before it continues."""
    settings = DataSettings(image_size=8, workers=1)
    loader = loader_on_cpu(name, settings, open_source(place), seed=9, batch_size=2)
    tell(loader.epoch(3, first), told)
    loader.close()
    told.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", LOADERS[1:])  # torch: test_sources_agree.py
def test_each_once_through_kills(jpegs: str, name: str) -> None:
    """The run is killed after 4 steps and again after 7, while worker and pipeline have prefetched batches."""
    seen = ids_through_kills(_train, name, jpegs)
    assert len(seen) == len(set(seen)) == 22


@pytest.mark.slow
def test_losses_differ_less_than_with_another_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After 48 steps dali_cpu's losses equal torch's, and dali_gpu's are much closer to them than another seed's."""
    path = write(tmp_path / "images", [encoded(photograph(i, 60, 80), "JPEG") for i in range(32)])
    monkeypatch.setitem(backends.OBSTACLES, "dali_gpu", lambda device: None)
    monkeypatch.setattr(backends, "DaliGpuBackend", partial(DaliGpuBackend, device=CPU))

    def losses(loader: str, seed: int) -> np.ndarray:
        run = tmp_path / f"{loader}-{seed}"
        tree = {
            "seed": seed,
            "precision": "fp32",
            "run": {"dir": str(run)},
            "data": {"path": path, "image_size": 32, "workers": 0, "loader": loader},
            "model": {"size": "tiny", "patch_size": 8, "width": 32, "depth": 1, "heads": 2},
            "decoder": {"width": 16, "depth": 1, "heads": 2},
            "schedule": {"batch_size": 8, "epochs": 12, "warmup_epochs": 1},
            "telemetry": {"log_every_steps": 1, "tensorboard": False, "images_every_epochs": 0},
        }
        assert pretrain(load_recipe(tree, ()).recipe).finished
        records = (run / "metrics.jsonl").read_text().splitlines()
        return np.array([json.loads(record)["loss"] for record in records])

    reference = losses("torch", 0)
    other = np.abs(losses("torch", 1) - reference).mean()
    np.testing.assert_array_equal(losses("dali_cpu", 0), reference)
    assert np.abs(losses("dali_gpu", 0) - reference).mean() < other / 10


@pytest.mark.parametrize("name", LOADERS)
def test_images_of_another_size_are_cut_from_the_same_windows(jpegs: str, name: str) -> None:
    """A loader whose size changes from step to step gives the images of loaders that have each size throughout."""

    def batches(size: int, size_at: SizeAt | None = None) -> list[Batch]:
        settings = DataSettings(image_size=size, workers=0)
        loader = loader_on_cpu(name, settings, open_source(jpegs), seed=5, batch_size=3, size_at=size_at)
        try:
            return [*loader.epoch(0), *loader.epoch(1)]
        finally:
            loader.close()

    grown = batches(24, lambda step: (12, 12) if step < 3 else (24, 24))
    small, large = batches(12), batches(24)
    assert len(grown) > 6
    for step, batch in enumerate(grown):
        wanted = (small if step < 3 else large)[step]
        assert torch.equal(batch.images, wanted.images) and torch.equal(batch.sample_ids, wanted.sample_ids), step
