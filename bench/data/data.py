"""Images per second of each loader on a data set, against a plain torchvision DataLoader and loaders of other packages.

Turns are interleaved, so that ratios hold on a machine whose speed wanders; absolute rates are of that machine alone.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from mimae.bench.data.feeds import CONTENDERS, PEER, Job
from mimae.config.load import load_recipe
from mimae.data.loading.backend import OBSTACLES, make_backend
from mimae.data.loading.batch import Batch, Spent
from mimae.data.loading.order import Plan, epoch_order
from mimae.data.pixels.augment import crop_words, flips, random_window
from mimae.data.pixels.decode import whole
from mimae.data.sources.base import Source
from mimae.errors import UserError
from mimae.outside.progress import track
from mimae.plan.flops import step_flops
from mimae.plan.gpus import peak_flops

PARITY = 128
"""Number of images whose pixels are compared."""

# One turn


class Turn(NamedTuple):
    """The work of a contender in one turn."""

    images: int
    seconds: float
    cpu_seconds: float
    spent: Spent
    bytes: int
    """Memory of all processes at the end of the turn, in bytes."""


def turn(name: str, job: Job, seconds: float) -> Turn:
    """Open a contender, drop the batches that it prefetched, and count for `seconds`."""
    with ExitStack() as stack:
        feed = CONTENDERS[name](job, stack)
        stack.callback(feed.close)  # type: ignore[attr-defined]  # a generator, whose workers end with it
        for _ in range(3 * max(1, job.workers) + 1):
            next(feed)
        images, spent = 0, Spent()
        cpu, start = tree_cpu_seconds(), time.perf_counter()
        while time.perf_counter() - start < seconds:
            made = next(feed)
            images += made.images
            spent = Spent(*(a + b for a, b in zip(spent, made.spent, strict=True)))
        elapsed = time.perf_counter() - start
        return Turn(images, elapsed, tree_cpu_seconds() - cpu, spent, tree_bytes())


def first_epoch(name: str, job: Job) -> float:
    """Return the images per second from opening the contender to the end of one pass, without cached files."""
    for i in range(len(job.source)):
        descriptor = os.open(job.source.path(i), os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    with ExitStack() as stack:
        start, images = time.perf_counter(), 0
        feed = CONTENDERS[name](job, stack)
        stack.callback(feed.close)  # type: ignore[attr-defined]
        while images + job.batch_size <= len(job.source):
            images += next(feed).images
        return images / (time.perf_counter() - start)


def _tree() -> list[Path]:
    """Return the /proc folders of this process and its descendants."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue  # The process has ended meanwhile.
            parents.setdefault(int(fields[1]), []).append(int(entry.name))
    found, left = [], [os.getpid()]
    while left:
        process = left.pop()
        found.append(Path("/proc") / str(process))
        left += parents.get(process, [])
    return found


def tree_cpu_seconds() -> float:
    """Return the CPU seconds, user and system, of this process and its live descendants."""
    ticks = 0
    for process in _tree():
        try:
            fields = (process / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def tree_bytes() -> int:
    """Return the memory of this process and its descendants, with shared pages counted once."""
    total = 0
    for process in _tree():
        try:
            lines = (process / "smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)
    return total


# Pixels


def parity(name: str, job: Job) -> dict[str, float]:
    """Return differences of a loader's pixels from torchvision's antialiased bicubic on the same windows, of 255."""
    settings = job.settings.model_copy(update={"loader": name, "workers": 0})
    shares = job.source.shares
    count = min(PARITY, len(job.source))
    dealt = Plan(sum(share.draws for share in shares), count, 1, 0, 1)
    with closing(make_backend(settings, job.source, seed=0)) as backend:
        batch = next(iter(backend.batches(dealt.requests(epoch_order(0, 0, shares), 0))))
    expected = _expected(batch, job)
    error = (batch.images.cpu().numpy().astype(np.float64) - expected).__abs__()
    mse = float((error**2).mean())
    return {
        "mean": float(error.mean()),
        "max": float(error.max()),
        "psnr_db": math.inf if mse == 0 else 10 * math.log10(255**2 / mse),
    }


def _expected(batch: Batch, job: Job) -> np.ndarray:
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2.functional import resized_crop

    settings, size = job.settings, list(job.settings.size_hw)
    assert settings.crop_scale is not None
    words = crop_words(0, batch.epoch, batch.sample_ids).tolist()
    mirrored = flips(0, batch.epoch, batch.sample_ids).tolist()
    made = []
    for source_id, row, flip in zip(batch.source_ids.tolist(), words, mirrored, strict=True):
        image = whole(job.source.read(source_id), settings.max_pixels)
        cut = random_window(row, image.height, image.width, settings.crop_scale)
        pixels = np.asarray(resized_crop(image, *cut, size, InterpolationMode.BICUBIC, antialias=True))
        made.append(pixels[:, ::-1] if flip and settings.flip else pixels)
    return np.stack(made).astype(np.float64)


# The whole


def sweep(cores: int) -> list[int]:
    """Numbers of workers for the sweep."""
    return sorted({max(1, cores // 2), cores, cores + cores // 2, 2 * cores})


def measure(
    names: list[str],
    of_files: Job,
    counts: list[int],
    rounds: int,
    seconds: float,
    say: Callable[[str], None],
    packed: Mapping[str, Source] = MappingProxyType({}),
) -> dict[str, dict[str, Any]]:
    """Return the result of each contender: its best number of workers, and `rounds` interleaved turns with it.

    Our loaders also read the same images in the forms `packed`, by name.
    """
    results: dict[str, dict[str, Any]] = {}
    jobs = {name: (name, of_files) for name in names}
    for form, source in packed.items():
        jobs |= {f"{name}, {form}": (name, of_files._replace(source=source)) for name in names if name in OBSTACLES}
    for label, (name, job) in jobs.items():
        single = Path(job.source.path(0)).is_file()
        rates = {}
        for workers in counts if len(counts) > 1 else []:
            made = turn(name, job._replace(workers=workers), seconds / 2)
            rates[workers] = made.images / made.seconds
            say(f"{label} with {workers} workers: {rates[workers]:,.0f} images/s")
        best = max(rates, key=rates.__getitem__) if rates else counts[0]
        results[label] = {"workers": best, "sweep": rates, "turns": []}
        results[label]["cold_images_per_s"] = first_epoch(name, job._replace(workers=best)) if single else None
    for number in track(range(rounds), "loaders", rounds, "rounds"):
        for label, (name, job) in jobs.items():
            made = turn(name, job._replace(workers=results[label]["workers"]), seconds)
            results[label]["turns"].append({**made._asdict(), "spent": made.spent._asdict()})
            say(f"round {number + 1} of {rounds}: {label} {made.images / made.seconds:,.0f} images/s")
    for label, result in results.items():
        name, job = jobs[label]
        _summarise(result, results[PEER]["turns"] if PEER in results else None)
        result["parity"] = parity(name, job) if name in OBSTACLES else None
    return results


def _summarise(result: dict[str, Any], peer: list[dict[str, Any]] | None) -> None:
    """Add medians over the turns, ratios to the peer of the same round, and the shares of the work."""
    turns = result["turns"]
    result["images_per_s"] = statistics.median(made["images"] / made["seconds"] for made in turns)
    result["images_per_cpu_s"] = statistics.median(made["images"] / made["cpu_seconds"] for made in turns)
    result["bytes"] = max(made["bytes"] for made in turns)
    spent = {part: sum(made["spent"][part] for made in turns) for part in Spent._fields}
    total = sum(spent.values())
    result["shares"] = {part: seconds / total for part, seconds in spent.items()} if total else None
    for key, clock in (("ratio", "seconds"), ("ratio_per_cpu_s", "cpu_seconds")):
        pairs = [
            (mine["images"] / mine[clock]) / (theirs["images"] / theirs[clock])
            for mine, theirs in zip(turns, peer or [], strict=False)
        ]
        result[key] = {"median": statistics.median(pairs), "low": min(pairs), "high": max(pairs)} if pairs else None


def fed(images_per_s: float, recipe: str, gpu: str, mfu: float) -> dict[str, Any]:
    """Return the number of GPUs that the rate can feed while they train `recipe` at an assumed share of their peak."""
    resolved = load_recipe(recipe).recipe
    peak = peak_flops(gpu, resolved.precision)
    if peak is None:
        raise UserError(f"--gpu {gpu}: its peak is not known; name it as NVIDIA does, e.g. 'NVIDIA H100'")
    need = peak * mfu / (step_flops(resolved) / resolved.schedule.batch_size)
    return {"recipe": recipe, "gpu": gpu, "mfu": mfu, "images_per_s_each": need, "gpus": images_per_s / need}


def table(results: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Return the results in Markdown. Ratios compare the same round: median, smallest and largest."""
    each, per_cpu = f"images/s | x {PEER}", f"images/CPU-s | x {PEER}"
    yield f"| loader | workers | {each} | {per_cpu} | cold | read, decode, resize | MiB | off | PSNR |"
    yield "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|"
    for name, result in results.items():
        shares, pixels, cold = result["shares"], result["parity"], result["cold_images_per_s"]
        cells = [
            name,
            str(result["workers"]),
            f"{result['images_per_s']:,.0f}",
            _ratio(result["ratio"]),
            f"{result['images_per_cpu_s']:,.0f}",
            _ratio(result["ratio_per_cpu_s"]),
            f"{cold:,.0f}" if cold else "",
            ", ".join(f"{100 * share:.0f}" for share in shares.values()) + " %" if shares else "",
            f"{result['bytes'] / 2**20:,.0f}",
            f"{pixels['mean']:.3f}" if pixels else "",
            f"{pixels['psnr_db']:.1f} dB" if pixels else "",
        ]
        yield f"| {' | '.join(cells)} |"


def _ratio(ratio: dict[str, float] | None) -> str:
    return f"{ratio['median']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f})" if ratio else ""


def encoded_sizes(source: Source) -> list[int]:
    """Return the encoded bytes of each of up to a thousand samples."""
    return [len(source.read(i)) for i in range(0, len(source), max(1, len(source) // 1000))]
