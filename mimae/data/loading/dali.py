"""Loading with NVIDIA DALI: decode regions of JPEGs on the CPU, or decode and resize samples on the GPU."""

from __future__ import annotations

import gc
import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import chain, groupby
from typing import Any

import numpy as np
import simplejpeg
import torch
from torch import Tensor

from mimae.data.loading.batch import Batch, DataError
from mimae.data.loading.order import BatchRequest
from mimae.data.loading.samples import Clock, EachDecoder, Sample, make_batch
from mimae.data.loading.shared_memory import Empty, unshared
from mimae.data.loading.worker import is_worker
from mimae.data.loading.workers import Workers, default_workers
from mimae.data.pixels.cut import Cut, finish
from mimae.data.pixels.decode import BadImage
from mimae.data.settings import DataSettings
from mimae.data.sources.base import Source

Feed = tuple[list[np.ndarray], ...]
"""Inputs of a pipeline, each a list with one array per sample: encoded images, uint8; starts and shapes of the regions,
int32 (rows, columns); whether columns and rows are mirrored, int32 (2,)."""


def build(
    feed: Callable[[], Feed],
    samples: int,
    threads: int,
    device: torch.device,
    size: tuple[int, int] | None = None,
    *,
    ahead: bool = False,
) -> Any:
    """Build a pipeline that decodes regions of JPEGs and, with a `size`, resizes (bicubic, antialiased) and flips them.

    `feed` returns the inputs of a batch of at most `samples` samples. The output is uint8 (h, w, 3) per sample in the
    order of the inputs. On a GPU the output stays in its memory. With `ahead` the next batch is made while the current
    one is used.
    """
    from nvidia.dali import Pipeline, fn, types

    _keep_in_forks()
    gpu = device.type == "cuda"
    pipeline = Pipeline(samples, threads, device.index if gpu else None, prefetch_queue_depth=1 + ahead, seed=0)
    with pipeline:
        # Without a resize the pipeline does not mirror either.
        kinds = [types.UINT8, types.INT32, types.INT32, *([] if size is None else [types.INT32])]
        data, start, shape, *mirror = fn.external_source(source=feed, num_outputs=len(kinds), dtype=kinds, ndim=1)
        pixels = fn.decoders.image_slice(
            data,
            device="mixed" if gpu else "cpu",
            start=start,
            shape=shape,
            axis_names="HW",
            output_type=types.RGB,
            # The region is given in stored pixels, before the EXIF orientation is applied.
            adjust_orientation=False,
        )
        if size is not None:
            pixels = fn.resize(pixels, size=size, interp_type=types.INTERP_CUBIC, antialias=True)
            pixels = fn.flip(pixels, horizontal=mirror[0][0], vertical=mirror[0][1])
        pipeline.set_outputs(pixels)
    pipeline.build()
    return pipeline


@lru_cache(1)
def _keep_in_forks() -> None:
    """Prevent processes forked from this one from freeing its pipelines.

    Freeing a pipeline waits for its threads or joins them, and a fork does not copy threads. From now on, objects that
    are garbage at a fork are never collected in the child. Collection pauses during a fork, because modules that
    registered themselves earlier (`threading`) run code in the child before `freeze`.
    """
    forking = threading.Lock()
    collects = False

    def before() -> None:
        nonlocal collects
        forking.acquire()
        collects = gc.isenabled()
        gc.disable()

    def after() -> None:
        if collects:
            gc.enable()
        forking.release()

    def after_in_child() -> None:
        gc.freeze()
        after()

    os.register_at_fork(before=before, after_in_parent=after, after_in_child=after_in_child)


def feed_of(data: Iterable[np.ndarray], cuts: np.ndarray) -> Feed:
    """Return the inputs of a pipeline for encoded images and their cuts, int32 (n, 6): window, columns, rows."""
    return list(data), list(cuts[:, :2]), list(cuts[:, 2:4]), list(cuts[:, 4:])


def row(cut: Cut) -> list[int]:
    """Return a cut as six integers: window, columns, rows."""
    return [*cut.window, cut.turn.columns, cut.turn.rows]


class RegionDecoder:
    """Decodes the regions of plain JPEGs with a pipeline of one thread, and all other images with EachDecoder.

    The pixels equal those of EachDecoder bit for bit: the decoders agree, and both resize with `finish`.
    """

    at_once = 16

    def __init__(self) -> None:
        self._pipeline: Any = None
        self._feeds: list[Feed] = []
        self._others = EachDecoder()

    def __call__(self, samples: Sequence[Sample], images: Tensor, clock: Clock) -> list[tuple[Sample, BadImage]]:
        found = [(sample, cut) for sample in samples if (cut := sample.cut)]
        with clock("decode"):
            regions = self._regions(found) if found else None
        if regions is None:
            return self._others(samples, images, clock)
        with clock("resize"):
            for (sample, cut), pixels in zip(found, regions):
                size = (images.shape[1], images.shape[2])
                images[sample.place] = finish(torch.from_dlpack(pixels), size, cut.turn)
        return self._others([sample for sample in samples if sample.encoded.orientation is None], images, clock)

    def _regions(self, found: list[tuple[Sample, Cut]]) -> Any:
        """Return the regions in stored orientation, or None if one of them cannot be decoded."""
        if self._pipeline is None:
            # Built here and not in __init__: a pipeline must not be copied by a fork.
            feeds = self._feeds
            self._pipeline = build(lambda: feeds.pop()[:3], self.at_once, 1, torch.device("cpu"))
        data = (np.frombuffer(sample.encoded.data, np.uint8) for sample, _ in found)
        self._feeds.append(feed_of(data, np.array([row(cut) for _, cut in found], np.int32)))
        try:
            with _quiet():
                (regions,) = self._pipeline.run()
            return regions
        except RuntimeError:
            pass  # The error names no sample, and the pipeline remains usable.
        # Otherwise the memory that the error refers to would be freed much later. A worker has few objects to scan.
        gc.collect()
        return None


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the lines that native code writes to stderr on damaged images; only in workers, which print nothing."""
    if not is_worker():
        yield
        return
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


_BLACK = np.frombuffer(simplejpeg.encode_jpeg(np.zeros((1, 1, 3), np.uint8)), np.uint8)


@dataclass(frozen=True)
class Held:
    """A micro-batch that a worker sends to the pipeline of its rank."""

    batch: Batch
    """The batch; `images` has only the samples that the worker has decoded, in order."""
    places: Tensor
    """int64 (n,): places in the batch of the n samples that are still encoded."""
    data: Tensor
    """uint8: their encoded images, concatenated."""
    sizes: Tensor
    """int64 (n,): size of each encoded image in bytes."""
    cuts: Tensor
    """int32 (n, 6): their cuts, in the form of `row`."""

    @property
    def size_hw(self) -> tuple[int, int]:
        """Height and width of the samples of the batch."""
        return self.batch.images.shape[1], self.batch.images.shape[2]

    def feed(self) -> Feed:
        """Return the inputs of the pipeline. It needs at least one image, so an empty list becomes one black image."""
        if not len(self.places):
            return feed_of([_BLACK], np.array([[0, 0, 1, 1, 0, 0]], np.int32))
        return feed_of([part.numpy() for part in self.data.split(self.sizes.tolist())], self.cuts.numpy())


def _for_pipeline(samples: Sequence[Sample]) -> list[tuple[Sample, Cut]]:
    """Return the plain JPEGs that are not rotated by 90 degrees: all samples of a pipeline have the same shape."""
    return [(sample, cut) for sample in samples if (cut := sample.cut) and not cut.turn.swap]


class _Hold:
    """Collects the images that the pipeline can decode, and decodes all others."""

    def __init__(self, samples: int) -> None:
        self.at_once = samples
        self.held: list[tuple[Sample, Cut]] = []
        self._others = EachDecoder()

    def __call__(self, samples: Sequence[Sample], images: Tensor, clock: Clock) -> list[tuple[Sample, BadImage]]:
        held = _for_pipeline(samples)
        self.held += held
        places = {sample.place for sample, _ in held}
        return self._others([sample for sample in samples if sample.place not in places], images, clock)


def hold(settings: DataSettings, source: Source, seed: int, request: BatchRequest, *, empty: Empty = unshared) -> Held:
    """Return the worker's part of a micro-batch: everything except the pixels of plain JPEGs. Raises DataError."""
    decoder = _Hold(len(request.ids))
    batch = make_batch(settings, source, seed, request, decoder)
    places = torch.tensor([sample.place for sample, _ in decoder.held], dtype=torch.int64)
    made = torch.ones(len(request.ids), dtype=torch.bool)
    made[places] = False
    parts = [np.frombuffer(sample.encoded.data, np.uint8) for sample, _ in decoder.held]
    data = empty((sum(map(len, parts)),), dtype=torch.uint8)
    if parts:
        np.concatenate(parts, out=data.numpy())
    return Held(
        replace(batch, images=batch.images[made]),
        places,
        data,
        torch.tensor([len(part) for part in parts], dtype=torch.int64),
        torch.tensor([row(cut) for _, cut in decoder.held], dtype=torch.int32).reshape(-1, 6),
    )


class _InHalves:
    """Decodes a micro-batch again after the pipeline failed on it.

    It splits the batch in halves, recursively, so that an image that the pipeline cannot decode does not change the
    pixels of the others. EachDecoder decodes that image.
    """

    def __init__(self, samples: int, device: torch.device, size: tuple[int, int]) -> None:
        self.at_once = samples
        self._feeds = feeds = list[Feed]()
        self._pipeline = _build_or_refuse(lambda: feeds.pop(), samples, device, size, ahead=False)
        self._others = EachDecoder()

    def __call__(self, samples: Sequence[Sample], images: Tensor, clock: Clock) -> list[tuple[Sample, BadImage]]:
        held = _for_pipeline(samples)
        with clock("decode"):
            made = self._made(held, images) if held else set()
        refused = self._others([sample for sample in samples if sample.place not in made], images, clock)
        if len(held) > 1 and not made and not refused:
            raise DataError(
                f"data.loader=dali_gpu decoded none of {len(held)} images that the CPU decodes: free GPU memory, "
                f"or set data.loader to dali_cpu or torch"
            )
        return refused

    def _made(self, held: list[tuple[Sample, Cut]], images: Tensor) -> set[int]:
        """Write samples to `images`. Returns the places of those that the pipeline can decode."""
        data = (np.frombuffer(sample.encoded.data, np.uint8) for sample, _ in held)
        self._feeds.append(feed_of(data, np.array([row(cut) for _, cut in held], np.int32)))
        try:
            (pixels,) = self._pipeline.run()
        except RuntimeError:
            half = len(held) // 2
            return self._made(held[:half], images) | self._made(held[half:], images) if half else set()
        places = [sample.place for sample, _ in held]
        images[places] = torch.from_dlpack(pixels.as_tensor()).cpu()
        return set(places)


def _build_or_refuse(
    feed: Callable[[], Feed], samples: int, device: torch.device, size: tuple[int, int], *, ahead: bool
) -> Any:
    """Return the pipeline of a rank. Raises DataError if DALI cannot build it."""
    try:
        return build(feed, samples, default_workers(), device, size, ahead=ahead)
    except RuntimeError as error:
        raise DataError(
            f"data.loader=dali_gpu cannot run here: DALI cannot build a pipeline on {device} "
            f"({' '.join(str(error).split())[:300]}); set data.loader to dali_cpu or torch"
        ) from None


class DaliGpuBackend:
    """Backend that decodes on the rank's GPU.

    Workers read images, check them and draw windows. A pipeline in this process makes the samples on the GPU. With the
    device "cpu" the same pipeline runs on the CPU.
    """

    def __init__(
        self,
        settings: DataSettings,
        source: Source,
        seed: int,
        device: torch.device | None = None,
    ) -> None:
        self._settings, self._source, self._seed = settings, source, seed
        self._device = device or torch.device("cuda", torch.cuda.current_device())
        self._workers = Workers(partial(hold, settings, source, seed), settings.workers)
        self._running: Generator[Batch, None, None] | None = None

    def batches(self, requests: Iterable[BatchRequest]) -> Iterator[Batch]:
        """Yield the batches of `requests` in order, none larger than the first.

        An unfinished earlier iteration is ended. Raises DataError.
        """
        if self._running is not None:
            self._running.close()
        self._running = self._of_each_size(self._workers.batches(requests))
        return self._running

    def close(self) -> None:
        """Stop the workers."""
        if self._running is not None:
            self._running.close()
        self._running = None
        self._workers.close()

    def _of_each_size(self, made: Iterator[Held]) -> Generator[Batch, None, None]:
        """Yield the batches, with a pipeline for each run of batches with images of one size."""
        for _, alike in groupby(made, key=lambda held: held.size_hw):
            yield from self._run(alike)

    def _run(self, made: Iterator[Held]) -> Generator[Batch, None, None]:
        waiting: deque[Held] = deque()
        failures: list[Exception] = []

        def feed() -> Feed:
            try:
                waiting.append(next(ahead))
            except StopIteration:
                raise
            except Exception as error:
                # It is raised after the batches before it; DALI would wrap it in an error of its own type.
                failures.append(error)
                raise StopIteration from None
            return waiting[-1].feed()

        first = next(made, None)
        if first is None:
            return
        ahead = chain([first], made)
        samples, size = len(first.batch.sample_ids), first.size_hw
        pipeline = _build_or_refuse(feed, samples, self._device, size, ahead=True)
        in_use, again = _InUse(self._device), None
        try:
            while True:
                try:
                    (tensors,) = pipeline.run()
                except StopIteration:
                    break
                except RuntimeError:
                    # The error names no sample, and the pipeline continues with the next batch.
                    tensors = None
                held = waiting.popleft()
                if tensors is None:
                    again = again or _InHalves(samples, self._device, size)
                    yield self._remade(held.batch, again)
                    continue
                pixels = torch.from_dlpack(tensors.as_tensor())
                in_use.add(pixels)
                yield self._finished(held, pixels)
        finally:
            in_use.wait()
        if failures:
            raise failures[0]

    def _remade(self, batch: Batch, decoder: _InHalves) -> Batch:
        size_hw = (batch.images.shape[1], batch.images.shape[2])
        request = BatchRequest(batch.epoch, batch.step, batch.sample_ids.numpy(), size_hw)
        return make_batch(self._settings, self._source, self._seed, request, decoder).to(self._device)

    def _finished(self, held: Held, pixels: Tensor) -> Batch:
        """Return the micro-batch with the pipeline's pixels, without a copy if the pipeline made all of them."""
        batch = held.batch
        total = len(batch.sample_ids)
        if len(held.places) == total:
            return replace(batch, images=pixels)
        images = pixels.new_empty((total, *held.size_hw, 3))
        made = torch.ones(total, dtype=torch.bool)
        made[held.places] = False
        images[made.to(self._device)] = batch.images.to(self._device)
        images[held.places.to(self._device)] = pixels[: len(held.places)]
        return replace(batch, images=images)


class _InUse:
    """Keeps references to pixels on a GPU until the queued work on them has run.

    DALI owns their memory and does not know torch's streams.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._kept: deque[tuple[Tensor, torch.cuda.Event]] = deque()
        self._last: Tensor | None = None

    def add(self, pixels: Tensor) -> None:
        """Register new pixels, which no queued work uses yet. All work on the pixels before them has been queued."""
        if self._device.type != "cuda":
            return
        if self._last is not None:
            done = torch.cuda.Event()
            done.record()
            self._kept.append((self._last, done))
        self._last = pixels
        while len(self._kept) > 1 or (self._kept and self._kept[0][1].query()):
            _, done = self._kept.popleft()
            done.synchronize()

    def wait(self) -> None:
        """Wait until all work on the pixels has run; their memory is then returned to DALI."""
        if self._last is not None:
            torch.cuda.current_stream(self._device).synchronize()
