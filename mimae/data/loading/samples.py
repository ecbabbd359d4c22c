"""From a request to a micro-batch: read the samples, replace unreadable ones, and decode the pixels."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple, Protocol

import simplejpeg
import torch
from torch import Tensor

from mimae.data.loading.batch import BadSample, Batch, DataError, Spent
from mimae.data.loading.order import BatchRequest
from mimae.data.loading.shared_memory import Empty, unshared
from mimae.data.pixels import jpeg
from mimae.data.pixels.augment import Window, below, centre_window, crop_words, flips, random_window
from mimae.data.pixels.cut import Cut, Turn, cut_from, finish
from mimae.data.pixels.decode import BadImage, Encoded, look, region, why
from mimae.data.settings import DataSettings
from mimae.data.sources.base import Source
from mimae.outside.text import printable
from mimae.randomness import Purpose, words

_REPLACEMENTS = 64
"""Number of other samples that are tried in place of an unreadable one."""


class Clock:
    """Sum of the seconds spent on each part of the work."""

    def __init__(self) -> None:
        self._seconds = dict.fromkeys(Spent._fields, 0.0)

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Add the time of the `with` block to `part`, a field of Spent."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[part] += time.perf_counter() - start

    def spent(self) -> Spent:
        """Return the seconds so far."""
        return Spent(**self._seconds)


class Sample(NamedTuple):
    """An image with a valid header, and how sample number `place` of the micro-batch is cut from it."""

    place: int
    encoded: Encoded
    window: Callable[[int, int], Window]
    """Maps (height, width) of the upright image to the crop window."""
    flip: bool

    @property
    def cut(self) -> Cut | None:
        """The cut in stored (not yet rotated) pixels of a plain JPEG; None for images that Pillow has to decode."""
        encoded = self.encoded
        if encoded.orientation is None:
            return None
        return cut_from(encoded.height, encoded.width, encoded.orientation, self.window, flip=self.flip)


class Decoder(Protocol):
    """Decodes the pixels of samples."""

    at_once: int
    """Largest number of samples per call."""

    def __call__(self, samples: Sequence[Sample], images: Tensor, clock: Clock) -> list[tuple[Sample, BadImage]]:
        """Write samples to their places in `images` uint8 (B, H, W, 3). Returns those that failed, with the errors."""


class EachDecoder:
    """Decodes samples one by one: plain JPEGs with libjpeg-turbo; other images, and JPEGs that fail, with Pillow.

    With `scaled`, large plain JPEGs are decoded at 1/2, 1/4 or 1/8 of their size, see `Cut.scale`.
    """

    at_once = 1

    def __init__(self, *, scaled: bool = False) -> None:
        self.scaled = scaled

    def __call__(self, samples: Sequence[Sample], images: Tensor, clock: Clock) -> list[tuple[Sample, BadImage]]:
        refused, size = [], (images.shape[1], images.shape[2])
        for sample in samples:
            try:
                with clock("decode"):
                    pixels, turn = region_of(sample, size if self.scaled else None)
            except BadImage as error:
                refused.append((sample, error))
                continue
            with clock("resize"):
                images[sample.place] = finish(pixels, size, turn)
        return refused


def region_of(sample: Sample, size: tuple[int, int] | None = None) -> tuple[Tensor, Turn]:
    """Return the sample's crop, uint8 (h, w, 3) and not resized, and the turn that is still to be applied.

    The crop has all pixels of its window, or fewer where the `size` of the sample allows it, see `Cut.scale`.
    """
    if cut := sample.cut:
        scale = 1 if size is None else cut.scale(size)
        if (found := jpeg.region(sample.encoded.data, cut.scaled(scale), scale)) is not None:
            return found, cut.turn
        top, left, height, width = cut.window
        try:
            pixels = simplejpeg.decode_jpeg(sample.encoded.data, "RGB", strict=True)
        except ValueError:
            pass  # Pillow decides below whether this is an image.
        else:
            return torch.from_numpy(pixels[top : top + height, left : left + width]), cut.turn
    return torch.from_numpy(region(sample.encoded, sample.window)), Turn(columns=sample.flip)


def make_batch(
    settings: DataSettings,
    source: Source,
    seed: int,
    request: BatchRequest,
    decoder: Decoder,
    *,
    empty: Empty = unshared,
) -> Batch:
    """Return the micro-batch of a request; `empty` makes the tensor for its images.

    Raises DataError if a sample cannot be read and no replacement can.
    """
    size_hw = request.size_hw or settings.size_hw
    images = empty((len(request.ids), *size_hw, 3), dtype=torch.uint8)
    slots, places, clock = slots_of(settings, source, seed, request), cuts(settings, seed, request), Clock()
    for start in range(0, len(slots), decoder.at_once):
        taken = slots[start : start + decoder.at_once]
        while taken:
            samples = [Sample(slot.place, slot.encoded(clock), *places[slot.place]) for slot in taken]
            refused = decoder(samples, images, clock)
            for sample, error in refused:
                slots[sample.place].refuse(error)
            taken = [slots[sample.place] for sample, _ in refused]
    return batch_of(images, slots, request, clock)


def batch_of(
    images: Tensor, slots: Sequence[Slot], request: BatchRequest, clock: Clock, targets: dict[str, Tensor] | None = None
) -> Batch:
    """Return the batch of a request from the images and targets that were made for its slots."""
    return Batch(
        images,
        torch.tensor(request.ids),
        torch.tensor([slot.source_id for slot in slots], dtype=torch.int64),
        request.epoch,
        request.step,
        [sample for slot in slots for sample in slot.bad],
        clock.spent(),
        targets or {},
    )


def cuts(settings: DataSettings, seed: int, request: BatchRequest) -> list[tuple[Callable[[int, int], Window], bool]]:
    """Return for each place of a request how its image is cut: the window, and whether it is flipped."""
    size, scale = settings.size_hw, settings.crop_scale
    sample_ids = torch.tensor(request.ids)
    mirrored = flips(seed, request.epoch, sample_ids).tolist() if settings.flip else [False] * len(request.ids)
    windows: list[Callable[[int, int], Window]] = [partial(centre_window, size=size)] * len(request.ids)
    if scale is not None:
        drawn = crop_words(seed, request.epoch, sample_ids).tolist()
        windows = [partial(random_window, row, scale=scale) for row in drawn]
    return list(zip(windows, mirrored))


def slots_of(settings: DataSettings, source: Source, seed: int, request: BatchRequest) -> list[Slot]:
    """Return the slots of a request, in order."""
    return [
        Slot(source, settings, place, _chain(seed, request.epoch, sample_id, len(source)))
        for place, sample_id in enumerate(request.ids.tolist())
    ]


class Slot:
    """One place of a micro-batch. Its cut stays the same when its image is replaced."""

    def __init__(self, source: Source, settings: DataSettings, place: int, candidates: Iterator[int]) -> None:
        self.source, self.settings, self.place, self.candidates = source, settings, place, candidates
        self.bad: list[BadSample] = []
        self.source_id = -1

    def encoded(self, clock: Clock) -> Encoded:
        """Return the slot's next image with a valid header. Raises DataError if there is none."""
        for candidate in self.candidates:
            self.source_id = candidate
            try:
                with clock("read"):
                    data = self.source.read(self.source_id)
                with clock("decode"):
                    return look(data, self.settings.max_pixels, self.settings.range)
            except (BadImage, OSError) as error:
                self.refuse(error)
        tried = "\n".join(f"  {printable(path)}: {reason}" for _, path, reason in self.bad[-5:])
        raise DataError(
            f"sample {self.bad[0].id} of {printable(self.source.name)} cannot be read, nor any of {_REPLACEMENTS} "
            f"samples tried in its place; the last ones:\n{tried}\nCheck that data.path contains readable images."
        )

    def refuse(self, error: BadImage | OSError) -> None:
        """Record that the slot's current image cannot be used."""
        self.bad.append(BadSample(self.source_id, self.source.path(self.source_id), why(error)))


def _chain(seed: int, epoch: int, sample_id: int, n: int) -> Iterator[int]:
    """Yield the slot's own sample id, then replacement ids drawn from the sample's random stream."""
    yield sample_id % n
    for word in words(seed, Purpose.REPLACEMENT, epoch, torch.tensor([sample_id]), _REPLACEMENTS)[0].tolist():
        yield below(word, n)
