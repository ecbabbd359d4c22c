"""The classes of images with their probabilities, as a line of a CSV file for each image."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from mimae.data.loading.batch import Batch
from mimae.data.loading.examples import Reader
from mimae.data.sources.base import Source
from mimae.evaluate.classes import Classes
from mimae.train.predictors.base import Options, Predictor, Write, whole_file

Ranking = list[tuple[str, float]]
"""The most probable classes, each with its probability."""


class ClassPredictor(Predictor[Ranking]):
    """Finds the most probable classes of each image."""

    out = "a CSV file"
    options = frozenset({"top"})
    batch = 64

    def __init__(self, classes: Classes, logits: Callable[[Tensor], Tensor], reader: Reader, options: Options) -> None:
        """`logits` maps images uint8 (B, H, W, 3) to (B, C)."""
        self.classes, self.logits, self.reader = classes, logits, reader
        self.count = min(options.top or 1, len(classes))

    def find(self, batch: Batch) -> list[Ranking]:
        best = self.logits(batch.images).float().softmax(1).topk(self.count)
        rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [list(zip(map(self.classes.name, places), shares, strict=True)) for places, shares in rows]

    @contextmanager
    def writing(self, source: Source, out: Path) -> Iterator[Write[Ranking]]:
        """Write a line for each image: its path, then classes and probabilities; of one that cannot be read its path
        alone."""
        numbered = [("class", "probability"), *((f"class_{i}", f"probability_{i}") for i in range(2, self.count + 1))]
        with whole_file(out) as file:
            lines = csv.writer(file, lineterminator="\n")
            lines.writerow(["path", *(cell for pair in numbered[: self.count] for cell in pair)])

            def write(i: int, found: Ranking | None) -> None:
                cells = (cell for name, share in found or () for cell in (name, f"{share:.6f}"))
                lines.writerow([source.path(i), *cells])

            yield write
