"""Equal images in different containers give equal batches bit for bit, each sample once, also if a run is killed."""

from __future__ import annotations

import os
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
import torch

from mimae.data.loading import order
from mimae.data.loading.loader import make_loader
from mimae.data.loading.order import BatchRequest
from mimae.data.loading.samples import EachDecoder, make_batch
from mimae.data.settings import DataSettings
from mimae.data.sources.base import Source
from mimae.data.sources.open import open_source
from tests.data.conftest import encoded, photograph
from tests.data.sources.test_shards import write_tar
from tests.kills import ids_through_kills, tell

COUNT, CLASSES = 23, ("cat", "dog")
SHUFFLES = ("full", "blocks")


@pytest.fixture
def places(tmp_path: Path) -> dict[str, str]:
    """23 images as a folder, a list, three shards and two Parquet files, in the same order; the 6th is broken."""
    files = [encoded(photograph(i, 30 + i, 40)) for i in range(COUNT)]
    files[5] = files[5][:400]
    labels = [int(i >= 11) for i in range(COUNT)]
    for folder in ("folder", "tar", "parquet"):
        (tmp_path / folder).mkdir()
    lines, rows = [], []
    for i, (data, label) in enumerate(zip(files, labels)):
        path = tmp_path / "folder" / CLASSES[label] / f"{i:02}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        lines.append(f"folder/{CLASSES[label]}/{i:02}.png\t{label}\n")
        rows.append({"bytes": data, "path": None})
    (tmp_path / "list.tsv").write_text("".join(lines))
    for number, (begin, end) in enumerate(((0, 9), (9, 10), (10, COUNT))):
        members = [
            (f"{i}.{ending}", data)
            for i in range(begin, end)
            for ending, data in (("png", files[i]), ("cls", b"%d" % labels[i]))
        ]
        write_tar(tmp_path / "tar" / f"{number}.tar", members)
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    for number, part in enumerate((slice(0, 14), slice(14, COUNT))):
        table = pa.table({"image": pa.array(rows[part], kind), "label": labels[part]})
        pq.write_table(table, tmp_path / "parquet" / f"{number}.parquet", row_group_size=5)
    return {kind: str(tmp_path / kind) for kind in ("folder", "list.tsv", "tar", "parquet")}


def settings(shuffle: str = "full", workers: int = 0) -> DataSettings:
    return DataSettings(image_size=8, workers=workers, shuffle=shuffle)


def test_batches_are_equal_bit_for_bit(places: dict[str, str]) -> None:
    """Batches are equal over two epochs with a broken image. Reasons are equal too; paths depend on the source."""
    seen = []
    for place in places.values():
        source = open_source(place)
        assert source.labels is not None and source.labels.tolist() == [int(i >= 11) for i in range(COUNT)]
        loader = make_loader(settings(), source, seed=2, batch_size=4)
        batches = [batch for epoch in range(2) for batch in loader.epoch(epoch)]
        images = torch.cat([batch.images for batch in batches])
        ids = torch.cat([torch.stack([batch.sample_ids, batch.source_ids]) for batch in batches], 1)
        bad = [(sample.id, sample.reason) for batch in batches for sample in batch.bad]
        assert {sample.path for batch in batches for sample in batch.bad} == {source.path(5)}
        seen.append((images, ids, bad))
    for images, ids, bad in seen[1:]:
        assert torch.equal(images, seen[0][0]) and torch.equal(ids, seen[0][1]) and bad == seen[0][2]
    assert seen[0][2] and {i for i, _ in seen[0][2]} == {5}


def test_blocks_follow_the_storage(places: dict[str, str]) -> None:
    """Blocks are shards, row groups, or runs of files of a fixed length. Equal blocks give an equal order."""
    blocks = {kind: open_source(place).shares[0].blocks.tolist() for kind, place in places.items()}
    assert blocks["tar"] == [0, 9, 10, COUNT]
    assert blocks["parquet"] == [0, 5, 10, 14, 19, COUNT]
    assert blocks["folder"] == blocks["list.tsv"] == [0, COUNT]


@pytest.fixture
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use groups of four samples, so that blocks of a few samples differ from a full shuffle."""
    monkeypatch.setattr("mimae.data.loading.order.GROUP", 4)


def slots(source: Source, shuffle: str, ranks: int, epoch: int, first: int, steps: int) -> list[int]:
    """Return the slots of some steps of an epoch, over all ranks of a separate job."""
    found = []
    for rank in range(ranks):
        loader = make_loader(settings(shuffle), source, seed=9, batch_size=4, rank=rank, world_size=ranks)
        for batch, _ in zip(loader.epoch(epoch, first), range(steps)):
            assert batch.step in range(first, first + steps)
            found += batch.sample_ids.tolist()
    return found


@pytest.mark.parametrize("shuffle", SHUFFLES)
@pytest.mark.parametrize("kind", ["folder", "tar", "parquet", "mixture"])
def test_each_once_through_changes_of_ranks(
    places: dict[str, str], tmp_path: Path, small_groups: None, kind: str, shuffle: str
) -> None:
    """With 1 -> 2 -> 1 ranks in one epoch, every slot but the reported tail occurs once, also a bad sample's."""
    if kind == "mixture":
        (tmp_path / "mix.yaml").write_text("draws: 23\nsources: {tar: 2, folder/cat: 1}")
        places["mixture"] = str(tmp_path / "mix.yaml")
    source = open_source(places[kind])
    loader = make_loader(settings(shuffle), source, seed=9, batch_size=4)
    for epoch in range(2):
        dealt = [slots(source, shuffle, ranks, epoch, *part) for ranks, part in ((1, (0, 2)), (2, (2, 1)), (1, (3, 9)))]
        seen = sum(dealt, loader.dropped(epoch).tolist())
        assert len(seen) == len(set(seen)) == 23
        if kind != "mixture":
            assert sorted(seen) == list(range(23))


def _train(place: str, shuffle: str, first: int, told: Connection) -> None:
    """A run that prints each step and waits for input before it continues."""
    order.GROUP = 4
    loader = make_loader(settings(shuffle, workers=1), open_source(place), seed=9, batch_size=2)
    tell(loader.epoch(3, first), told)
    loader.close()
    told.close()


@pytest.mark.slow
@pytest.mark.parametrize("shuffle", SHUFFLES)
def test_each_once_through_kills(places: dict[str, str], shuffle: str) -> None:
    """The run is killed after 4 steps and again after 7, with prefetched batches. The resumed run sees all the rest."""
    seen = ids_through_kills(_train, places["tar"], shuffle)
    assert len(seen) == len(set(seen)) == 22


def test_memory_and_files_over_bad_images(tmp_path: Path) -> None:
    """With 300 bad images of five kinds, the memory of each is freed when it is reported."""
    good = encoded(photograph(0, 200, 200), "JPEG")
    kinds = (b"", b"<html>", good[:-300], good[:200], encoded(np.zeros((2000, 2000), np.uint8)), good)
    source = open_source(str(write_tar(tmp_path / "a.tar", [(f"{i}.jpg", data) for i, data in enumerate(kinds)])))
    limited = settings().model_copy(update={"max_pixels": 1_000_000})

    def used() -> tuple[int, int]:
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return resident >> 20, len(os.listdir("/proc/self/fd"))

    before = (0, 0)
    for step in range(60):
        if step == 12:
            before = used()
        batch = make_batch(limited, source, 0, BatchRequest(0, step, np.arange(6)), EachDecoder())
        assert {sample.id for sample in batch.bad} == set(range(5)) and set(batch.source_ids.tolist()) == {5}
    after = used()
    assert after[0] - before[0] < 8 and after[1] <= before[1]
