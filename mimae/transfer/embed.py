"""`mimae embed`: the features of each image of a data set, written to a file.

The samples are divided into parts of fixed size, which ranks take in turn. Each part is written atomically. So memory
does not grow with the data set, a killed run continues with the next part, and interruptions do not change the file.

    OUT.parts/plan.json                  what is embedded; a rerun with another plan is refused
    OUT.parts/part-00000.safetensors     a part: ids, paths, labels, features

Letters in shapes: n samples, B images, L patches, D width.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from mimae.data.loading.batch import BadSample
from mimae.data.loading.loader import evaluation_batches
from mimae.data.settings import DataSettings
from mimae.data.sources.base import Source
from mimae.data.sources.open import open_source
from mimae.errors import UserError
from mimae.model.encoder import Encoder
from mimae.outside.files import write_atomically
from mimae.outside.progress import Progress
from mimae.outside.reading import read_text
from mimae.transfer.load import load
from mimae.transfer.processes import share
from mimae.transfer.tables import WRITERS, Part, Table, finish, write_part

What = Literal["pooled", "class", "tokens", "maps"]

_PART_BYTES = 1 << 26
_PART_ROWS = 8192
_PLAN_BYTES = 1 << 20


@dataclass(frozen=True)
class Request:
    """The kind of features that is computed for each image."""

    what: What = "pooled"
    """pooled: the mean of the patch tokens (D,); class: the class token (D,); tokens: all patch tokens (L, D); these
    three are after the final norm. maps: the outputs of `blocks` for the patches (D, rows, columns), before the
    norm."""
    blocks: tuple[int, ...] = ()
    dtype: Literal["float32", "float16"] = "float32"
    batch: int = 64

    def of(self, encoder: Encoder, images: Tensor) -> dict[str, Tensor]:
        """Return the columns for images uint8 (B, H, W, 3): tensors (B, ...) by name."""
        if self.what == "maps":
            maps = encoder.maps(images, self.blocks)
            columns = {f"block_{number}": each for number, each in zip(self.blocks, maps, strict=True)}
        else:
            tokens = encoder.tokens(images)
            columns = {"features": _TAKEN[self.what](tokens)}
        return {name: column.to(getattr(torch, self.dtype)) for name, column in columns.items()}


_TAKEN: dict[str, Callable[[Tensor], Tensor]] = {
    "pooled": lambda tokens: tokens[:, 1:].mean(1),
    "class": lambda tokens: tokens[:, 0],
    "tokens": lambda tokens: tokens[:, 1:],
}


class Job:
    """The embedding of one data set by one encoder. Raises UserError if they cannot be opened."""

    def __init__(self, weights: Path, data: str, request: Request, average: bool = False) -> None:
        self.encoder, settings, _ = load(weights, average)
        self.settings: DataSettings = settings
        self.request = request
        self.source: Source = open_source(data, settings=settings)
        depth = len(self.encoder.blocks)
        if wrong := [block for block in request.blocks if not 0 <= block < depth]:
            raise UserError(f"--blocks {wrong[0]}: the encoder has blocks 0 to {depth - 1}")
        if (request.what == "maps") != bool(request.blocks):
            raise UserError(f"--what maps needs --blocks, such as 0,{depth - 1}; --what {request.what} takes none")
        values = len(request.blocks) if request.what == "maps" else 1
        values *= self.encoder.width * (self.encoder.grid.patches if request.what in ("tokens", "maps") else 1)
        row = values * getattr(torch, request.dtype).itemsize
        # A part consists of whole batches, because the rounding of a sample's features can depend on its batch.
        self.rows = max(1, min(_PART_ROWS, _PART_BYTES // row) // request.batch) * request.batch
        self.parts = -(-len(self.source) // self.rows)

    def plan(self) -> dict[str, object]:
        """Return everything that determines the bytes of the result, and the number of parts."""
        digest = hashlib.sha256()
        tensors = self.encoder.state_dict() | {"mean": self.encoder.mean, "std": self.encoder.std}
        for name, tensor in sorted(tensors.items()):
            digest.update(name.encode() + tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return {
            "weights": digest.hexdigest(),
            "data": self.source.fingerprint,
            "size": list(self.settings.size_hw),
            **asdict(self.request),
            "blocks": list(self.request.blocks),
            "rows": self.rows,
            "parts": self.parts,
        }

    def run(self, folder: Path, parts: Sequence[int], device: torch.device, done: Callable[[int], None]) -> None:
        """Write the parts with these numbers (ascending). `done` is called with the number of images of every batch."""
        encoder = self.encoder.to(device)
        ids = torch.cat([self.ids(part) for part in parts]) if parts else torch.empty(0, dtype=torch.int64)
        batches = evaluation_batches(self.settings, self.source, self.request.batch, ids)
        for part in parts:
            kept: list[Tensor] = []
            columns: dict[str, list[Tensor]] = {}
            bad: list[BadSample] = []
            for _ in range(-(-len(self.ids(part)) // self.request.batch)):
                batch = next(batches)
                with torch.no_grad():
                    found = self.request.of(encoder, batch.images.to(device))
                whole = batch.source_ids == batch.sample_ids  # The others are replacements of unreadable images.
                kept.append(batch.sample_ids[whole])
                for name, column in found.items():
                    columns.setdefault(name, []).append(column.cpu()[whole])
                bad += [sample for sample in batch.bad if sample.id in set(batch.sample_ids[~whole].tolist())]
                done(len(batch.images))
            write_part(part_path(folder, part), self._part(torch.cat(kept), columns, bad))

    def ids(self, part: int) -> Tensor:
        """Return the ids of the samples of a part."""
        return torch.arange(part * self.rows, min((part + 1) * self.rows, len(self.source)))

    def _part(self, ids: Tensor, columns: dict[str, list[Tensor]], bad: list[BadSample]) -> Part:
        labels = None if self.source.labels is None else torch.from_numpy(self.source.labels[ids.numpy()])
        paths = [self.source.path(i) for i in ids.tolist()]
        unreadable = [f"{sample.path}: {sample.reason}" for sample in bad]
        return Part(ids, paths, labels, {name: torch.cat(parts) for name, parts in columns.items()}, unreadable)


def prepare(out: Path, plan: dict[str, object]) -> Path:
    """Make or find the folder of parts next to OUT, and return it.

    Raises UserError if OUT exists, or if the folder has the parts of another embedding.
    """
    folder = out.with_name(f"{out.name}.parts")
    if os.path.lexists(out):
        raise UserError(f"{out} exists already: remove it, or give another --out")
    text = json.dumps(plan, indent=2) + "\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "plan.json").exists():
            before = json.loads(read_text(folder / "plan.json", _PLAN_BYTES))
            differing = sorted(key for key in plan if not isinstance(before, dict) or before.get(key) != plan[key])
            if differing:
                raise UserError(
                    f"{folder} holds the parts of another embedding, which was interrupted ({', '.join(differing)} "
                    f"differ): remove it, or give another --out"
                )
        else:
            write_atomically(folder / "plan.json", text)
    except OSError as error:
        raise UserError(f"{folder} cannot be used for the parts of {out.name}: {error.strerror}") from error
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{folder / 'plan.json'} is damaged ({error}): remove {folder}") from error
    return folder


def part_path(folder: Path, part: int) -> Path:
    """Return the path of a part."""
    return folder / f"part-{part:05d}.safetensors"


def embed(
    weights: Path, data: str, out: Path, request: Request, average: bool = False, ranks: int | None = None
) -> list[str]:
    """Embed the data set `data` into OUT, or continue from where a call with the same arguments was interrupted.

    `ranks` is the number of processes on this machine; None stands for one per GPU, or one. Returns path and reason of
    each image that could not be read and has no features. Raises UserError if the embedding is impossible.
    """
    if out.suffix not in WRITERS:
        raise UserError(f"--out {out}: legal endings are .npz and .parquet; without one it is a folder of safetensors")
    job = Job(weights, data, request, average)
    plan = job.plan()
    folder = prepare(out, plan)
    todo = [part for part in range(job.parts) if not part_path(folder, part).exists()]
    before = len(job.source) - sum(len(job.ids(part)) for part in todo)
    ranks = min(ranks or max(1, torch.cuda.device_count()), max(1, len(todo)))
    with Progress("embedding", len(job.source), "images", before) as progress:
        if before:
            progress.message(f"{before:,} of {len(job.source):,} images were embedded before; going on with the rest")
        if ranks == 1:
            job.run(folder, todo, torch.device("cuda" if torch.cuda.is_available() else "cpu"), progress.add)
        else:
            share(_work, (weights, data, request, average, plan, folder, todo), ranks, progress.add)
    table = Table([part_path(folder, part) for part in range(job.parts)], job.source.classes)
    finish(table, out)
    unreadable = [line for part in table for line in part.unreadable]
    shutil.rmtree(folder)
    return unreadable


def _work(
    weights: Path,
    data: str,
    request: Request,
    average: bool,
    plan: dict[str, object],
    folder: Path,
    todo: list[int],
    rank: int,
    ranks: int,
    done: Callable[[int], None],
) -> None:
    """Write a rank's share of the parts `todo`."""
    job = Job(weights, data, request, average)
    if job.plan() != plan:
        raise UserError(f"{weights} or {data} changed during the embedding: start again, with a checkpoint of the run")
    gpus = torch.cuda.device_count()
    job.run(folder, todo[rank::ranks], torch.device("cuda", rank % gpus) if gpus else torch.device("cpu"), done)
