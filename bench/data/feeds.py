"""The loaders of the comparison: ours, torchvision's, and those of the spdl and webdataset packages.

All read the same images, cut crops of the same distribution to the same size, and hand over uint8 batches.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, RandomSampler

from mimae.data.loading import order
from mimae.data.loading.backend import OBSTACLES, make_backend
from mimae.data.loading.batch import Spent
from mimae.data.loading.order import Plan, epoch_order
from mimae.data.pixels import jpeg
from mimae.data.pixels.augment import crop_words, flips, random_window
from mimae.data.settings import DataSettings
from mimae.data.sources.base import Source

PEER = "torchvision"
"""Name of the contender whose rate is the denominator of all ratios."""

_FOREVER = 1 << 40


class Made(NamedTuple):
    """A batch of any contender."""

    images: int
    spent: Spent = Spent()


class Job(NamedTuple):
    """The work of every contender."""

    source: Source
    settings: DataSettings
    batch_size: int
    workers: int


Feed = Callable[[Job, ExitStack], Iterator[Made]]
"""Function that yields batches without end, and registers cleanup on the stack."""


def ours(name: str) -> Feed:
    """Return the feed of the loader `data.loader=name`."""

    def feed(job: Job, stack: ExitStack) -> Iterator[Made]:
        settings = job.settings.model_copy(update={"loader": name, "workers": job.workers})
        backend = stack.enter_context(closing(make_backend(settings, job.source, seed=0)))
        for batch in backend.batches(_requests(job)):
            yield Made(len(batch.images), batch.spent)

    return feed


def whole_images(job: Job, stack: ExitStack) -> Iterator[Made]:
    """Yield the batches of the loader "torch" where mimae._C is built without libjpeg-turbo."""
    with jpeg.unused():
        yield from ours("torch")(job, stack)


def _requests(job: Job) -> Iterator[order.BatchRequest]:
    """Yield the requests of epoch after epoch, without a pause between epochs."""
    shares = job.source.shares
    dealt = Plan(sum(share.draws for share in shares), job.batch_size, 1, 0, 1)
    for epoch in itertools.count():
        yield from dealt.requests(epoch_order(0, epoch, shares), epoch)


def torchvision_feed(job: Job, stack: ExitStack) -> Iterator[Made]:
    """Yield batches of torchvision's ImageFolder and transforms in a DataLoader, as in its examples."""
    from torchvision.datasets import ImageFolder

    data = ImageFolder(_links(job.source, stack), _torchvision_transform(job.settings))
    loader = DataLoader(
        data, job.batch_size, sampler=RandomSampler(data, num_samples=_FOREVER), num_workers=job.workers, drop_last=True
    )
    for images, _ in loader:
        yield Made(len(images))


def _torchvision_transform(settings: DataSettings) -> Callable[[Image.Image], torch.Tensor]:
    from torchvision.transforms import v2

    assert settings.crop_scale is not None
    return v2.Compose(
        [
            v2.RandomResizedCrop(settings.size_hw, settings.crop_scale, interpolation=v2.InterpolationMode.BICUBIC),
            v2.RandomHorizontalFlip(),
            v2.PILToTensor(),
        ]
    )


def _links(source: Source, stack: ExitStack) -> str:
    """Return a folder with one class, for ImageFolder, with links to the source's files."""
    root = stack.enter_context(tempfile.TemporaryDirectory())
    folder = Path(root) / "all"
    folder.mkdir()
    for i in range(len(source)):
        # ImageFolder selects by extension, with a list that differs from ours; Pillow recognises the content.
        (folder / f"{i:08d}.jpg").symlink_to(source.path(i))
    return root


def webdataset_feed(job: Job, stack: ExitStack) -> Iterator[Made]:
    """Yield batches of the webdataset package over tar shards, with torchvision's transforms."""
    import webdataset

    shards = _shards(job.source)
    transform = _torchvision_transform(job.settings)
    data = (
        webdataset.WebDataset(shards, shardshuffle=False, resampled=True, nodesplitter=None)
        .shuffle(1000)
        .decode("pil")
        .to_tuple("jpg;jpeg;png;webp")
        .map_tuple(lambda image: transform(image.convert("RGB")))
        .batched(job.batch_size)
    )
    for (images,) in DataLoader(data, batch_size=None, num_workers=job.workers):
        yield Made(len(images))


def _shards(source: Source) -> list[str]:
    """Return the tar files of the source's samples."""
    found = {path[: path.index(".tar") + 4] for path in map(source.path, range(len(source))) if ".tar" in path}
    return sorted(shard for shard in found if Path(shard).is_file())


def spdl_feed(job: Job, stack: ExitStack) -> Iterator[Made]:
    """Yield batches of the spdl package: a thread pool that reads images, and decodes, crops and scales in FFmpeg."""
    import spdl.io
    from spdl.pipeline import PipelineBuilder

    height, width = job.settings.size_hw
    scale = job.settings.crop_scale
    assert scale is not None

    def slots() -> Iterator[tuple[int, list[int], bool]]:
        for each in _requests(job):
            ids = torch.from_numpy(each.ids)
            words = crop_words(0, each.epoch, ids).tolist()
            yield from zip(each.ids.tolist(), words, flips(0, each.epoch, ids).tolist(), strict=True)

    def make(slot: tuple[int, list[int], bool]) -> np.ndarray:
        i, words, flip = slot
        packets = spdl.io.demux_image(job.source.read(i % len(job.source)))
        cut = random_window(words, packets.height, packets.width, scale)
        filters = [
            f"crop={cut.width}:{cut.height}:{cut.left}:{cut.top}:exact=1",
            f"scale={width}:{height}:flags=bicubic",
            *(["hflip"] if flip else []),
            "format=pix_fmts=rgb24",
        ]
        frames = spdl.io.decode_packets(packets, filter_desc=",".join(filters))
        return np.asarray(spdl.io.to_numpy(spdl.io.convert_frames(frames)))

    builder: Any = PipelineBuilder()
    pipeline = (
        builder.add_source(slots())
        .pipe(make, concurrency=job.workers)
        .aggregate(job.batch_size, drop_last=True)
        .pipe(np.stack)
        .add_sink(3)
        .build(num_threads=job.workers + 1)
    )
    with pipeline.auto_stop():
        for images in pipeline:
            yield Made(len(images))


WHOLE = "torch, whole images"
"""Name of the contender that decodes as where there is no libjpeg-turbo."""

CONTENDERS: dict[str, Feed] = {
    **{name: ours(name) for name in OBSTACLES},
    WHOLE: whole_images,
    PEER: torchvision_feed,
    "spdl": spdl_feed,
    "webdataset": webdataset_feed,
}


def obstacle(name: str, source: Source, device: torch.device) -> str | None:
    """Return the reason for which a contender cannot run here on these images, or None."""
    if name in OBSTACLES:
        return OBSTACLES[name](device)
    if name == WHOLE:
        return jpeg.obstacle()
    if name == PEER:
        return None if Path(source.path(0)).is_file() else "it reads single files"
    if find_spec(name) is None:
        return f"pip install {name}"
    if name == "webdataset":
        return None if _shards(source) else "it reads tar shards"
    try:
        import spdl.io

        spdl.io.demux_image(source.read(0))
    except (RuntimeError, ImportError, OSError) as error:
        return " ".join(str(error).split())[:80]
    return None
