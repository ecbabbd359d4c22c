"""Loading with NVIDIA DALI: regions of JPEGs decoded on the CPU, or whole samples made on the GPU."""

from __future__ import annotations

import gc
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import chain
from typing import Any

import numpy as np
import simplejpeg
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from mimae.data.loading.batch import Batch, DataError
from mimae.data.loading.order import BatchRequest
from mimae.data.loading.samples import Clock, EachDecoder, Sample, make_batch
from mimae.data.loading.workers import Workers, default_workers
from mimae.data.pixels.cut import Cut, finish
from mimae.data.pixels.decode import BadImage
from mimae.data.settings import DataSettings
from mimae.data.sources.base import Source

Feed = tuple[list[np.ndarray], ...]
"""What a pipeline is given, each sample by sample: encoded images, uint8; starts and shapes of the regions, int32
(rows, columns); whether columns and rows are mirrored, int32 (2,)."""


def build(
    feed: Callable[[], Feed],
    samples: int,
    threads: int,
    device: torch.device,
    size: tuple[int, int] | None = None,
    *,
    ahead: bool = False,
) -> Any:
    """A pipeline that decodes regions of JPEGs, and with a `size` resizes (bicubic, antialiased) and mirrors them.

    Each batch of what `feed` returns, at most `samples` of them, comes out as uint8 (h, w, 3) per sample, in the order
    in which it went in. On a GPU they stay there. With `ahead` the next batch is made while one is used.
    """
    from nvidia.dali import Pipeline, fn, types

    _keep_in_forks()
    gpu = device.type == "cuda"
    pipeline = Pipeline(samples, threads, device.index if gpu else None, prefetch_queue_depth=1 + ahead, seed=0)
    with pipeline:
        # What is not resized here is not mirrored either.
        kinds = [types.UINT8, types.INT32, types.INT32, *([] if size is None else [types.INT32])]
        data, start, shape, *mirror = fn.external_source(source=feed, num_outputs=len(kinds), dtype=kinds, ndim=1)
        pixels = fn.decoders.image_slice(
            data,
            device="mixed" if gpu else "cpu",
            start=start,
            shape=shape,
            axis_names="HW",
            output_type=types.RGB,
            # The region lies in the pixels as they are stored.
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
    """Sees to it that no process forked from this one frees its pipelines: that would wait for threads, or join
    them, which a fork does not copy. From here on, what is garbage at a fork stays so there."""
    os.register_at_fork(after_in_child=gc.freeze)


def feed_of(data: Iterable[np.ndarray], cuts: np.ndarray) -> Feed:
    """What a pipeline is given of encoded images and their cuts, int32 (n, 6): window, columns, rows."""
    return list(data), list(cuts[:, :2]), list(cuts[:, 2:4]), list(cuts[:, 4:])


def row(cut: Cut) -> list[int]:
    """A cut as integers: window, columns, rows."""
    return [*cut.window, cut.turn.columns, cut.turn.rows]


class RegionDecoder:
    """Decodes samples in parts: the regions of plain JPEGs by a pipeline of one thread, what it cannot as EachDecoder.

    Pixels are EachDecoder's, bit for bit: the decoders agree, and the resize is the same.
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
        """The regions as they are stored; None where one of them cannot be decoded."""
        if self._pipeline is None:
            # Here and not sooner: a pipeline must not cross a fork.
            feeds = self._feeds
            self._pipeline = build(lambda: feeds.pop()[:3], self.at_once, 1, torch.device("cpu"))
        data = (np.frombuffer(sample.encoded.data, np.uint8) for sample, _ in found)
        self._feeds.append(feed_of(data, np.array([row(cut) for _, cut in found], np.int32)))
        try:
            with _quiet():
                (regions,) = self._pipeline.run()
            return regions
        except RuntimeError:
            pass  # It names no sample, and the pipeline itself goes on.
        # Left to itself, what the error holds on to is freed much later; a worker has little else to go through.
        gc.collect()
        return None


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the lines off stderr that native code writes on damaged images: in a worker, which has no other output."""
    if get_worker_info() is None:
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
    """A micro-batch on its way to the pipeline of its rank."""

    batch: Batch
    """Of its images only those that are made already, in their order."""
    places: Tensor
    """int64 (n,): of those that are not."""
    data: Tensor
    """uint8: their encoded images, end to end."""
    sizes: Tensor
    """int64 (n,): bytes of each."""
    cuts: Tensor
    """int32 (n, 6), as `row` has them."""

    def feed(self) -> Feed:
        """What the pipeline is given: it needs at least one image, so where there is none a black one."""
        if not len(self.places):
            return feed_of([_BLACK], np.array([[0, 0, 1, 1, 0, 0]], np.int32))
        return feed_of([part.numpy() for part in self.data.split(self.sizes.tolist())], self.cuts.numpy())


def _for_pipeline(samples: Sequence[Sample]) -> list[tuple[Sample, Cut]]:
    """Plain JPEGs, but for those that lie on their side: a pipeline's samples have one shape."""
    return [(sample, cut) for sample in samples if (cut := sample.cut) and not cut.turn.swap]


class _Hold:
    """Keeps images as they are that the pipeline can make samples of; makes the pixels of all others."""

    def __init__(self, samples: int) -> None:
        self.at_once = samples
        self.held: list[tuple[Sample, Cut]] = []
        self._others = EachDecoder()

    def __call__(self, samples: Sequence[Sample], images: Tensor, clock: Clock) -> list[tuple[Sample, BadImage]]:
        held = _for_pipeline(samples)
        self.held += held
        places = {sample.place for sample, _ in held}
        return self._others([sample for sample in samples if sample.place not in places], images, clock)


def hold(settings: DataSettings, source: Source, seed: int, request: BatchRequest) -> Held:
    """The worker's part of a micro-batch: all but the pixels of plain JPEGs. Raises DataError."""
    decoder = _Hold(len(request.ids))
    batch = make_batch(settings, source, seed, request, decoder)
    places = torch.tensor([sample.place for sample, _ in decoder.held], dtype=torch.int64)
    made = torch.ones(len(request.ids), dtype=torch.bool)
    made[places] = False
    parts = [sample.encoded.data for sample, _ in decoder.held]
    return Held(
        replace(batch, images=batch.images[made]),
        places,
        torch.frombuffer(bytearray().join(parts), dtype=torch.uint8) if parts else torch.empty(0, dtype=torch.uint8),
        torch.tensor([len(part) for part in parts], dtype=torch.int64),
        torch.tensor([row(cut) for _, cut in decoder.held], dtype=torch.int32).reshape(-1, 6),
    )


class _InHalves:
    """Makes the micro-batch of which the pipeline failed: by a pipeline again, half by half, so that an image which it
    cannot decode costs no other one its pixels. That image is for EachDecoder."""

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
                f"data.loader=dali_gpu made none of {len(held)} images that the CPU decodes: give the GPU more free "
                f"memory, or set data.loader to dali_cpu or torch"
            )
        return refused

    def _made(self, held: list[tuple[Sample, Cut]], images: Tensor) -> set[int]:
        """Writes samples to `images`; returns the places of those that the pipeline can decode."""
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
    """The pipeline of a rank. Raises DataError."""
    try:
        return build(feed, samples, default_workers(), device, size, ahead=ahead)
    except RuntimeError as error:
        raise DataError(
            f"data.loader=dali_gpu cannot run here: DALI makes no pipeline on {device} "
            f"({' '.join(str(error).split())[:300]}); set data.loader to dali_cpu or torch"
        ) from None


class DaliGpuBackend:
    """Workers read, check and draw windows; a pipeline in this process makes the samples on the rank's GPU.

    With the device "cpu" the same pipeline runs there.
    """

    def __init__(
        self,
        settings: DataSettings,
        source: Source,
        seed: int,
        device: torch.device | None = None,
        *,
        by_pipe: bool = False,
    ) -> None:
        self._settings, self._source, self._seed = settings, source, seed
        self._device = device or torch.device("cuda", torch.cuda.current_device())
        self._workers = Workers(partial(hold, settings, source, seed), settings.workers, by_pipe=by_pipe)
        self._running: Generator[Batch, None, None] | None = None

    def batches(self, requests: Iterable[BatchRequest]) -> Iterator[Batch]:
        """The batches of `requests` in their order, none larger than the first; an earlier run that is not done ends.

        Raises DataError.
        """
        if self._running is not None:
            self._running.close()
        self._running = self._run(self._workers.batches(requests))
        return self._running

    def close(self) -> None:
        """Ends the workers."""
        if self._running is not None:
            self._running.close()
        self._running = None
        self._workers.close()

    def _run(self, made: Iterator[Held]) -> Generator[Batch, None, None]:
        waiting: deque[Held] = deque()
        failures: list[Exception] = []

        def feed() -> Feed:
            try:
                waiting.append(next(ahead))
            except StopIteration:
                raise
            except Exception as error:
                # Due after the batches that went before; and DALI would wrap it in words of its own.
                failures.append(error)
                raise StopIteration from None
            return waiting[-1].feed()

        first = next(made, None)
        if first is None:
            return
        ahead = chain([first], made)
        samples = len(first.batch.sample_ids)
        pipeline = _build_or_refuse(feed, samples, self._device, self._settings.size_hw, ahead=True)
        in_use, again = _InUse(self._device), None
        try:
            while True:
                try:
                    (tensors,) = pipeline.run()
                except StopIteration:
                    break
                except RuntimeError:
                    # It names no sample, and the pipeline goes on with the next batch.
                    tensors = None
                held = waiting.popleft()
                if tensors is None:
                    again = again or _InHalves(samples, self._device, self._settings.size_hw)
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
        request = BatchRequest(batch.epoch, batch.step, batch.sample_ids.numpy())
        return make_batch(self._settings, self._source, self._seed, request, decoder).to(self._device)

    def _finished(self, held: Held, pixels: Tensor) -> Batch:
        """The micro-batch with the pipeline's pixels; without a copy if they are all of it."""
        batch = held.batch
        total = len(batch.sample_ids)
        if len(held.places) == total:
            return replace(batch, images=pixels)
        images = pixels.new_empty((total, *self._settings.size_hw, 3))
        made = torch.ones(total, dtype=torch.bool)
        made[held.places] = False
        images[made.to(self._device)] = batch.images.to(self._device)
        images[held.places.to(self._device)] = pixels[: len(held.places)]
        return replace(batch, images=images)


class _InUse:
    """Keeps pixels on a GPU until the work on them that was queued has run: DALI owns their memory, and knows nothing
    of torch's streams."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._kept: deque[tuple[Tensor, torch.cuda.Event]] = deque()
        self._last: Tensor | None = None

    def add(self, pixels: Tensor) -> None:
        """Notes pixels that nothing works on yet; all work on those before them has been queued."""
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
        """Until all work on them has run: they are about to go back to DALI."""
        if self._last is not None:
            torch.cuda.current_stream(self._device).synchronize()
