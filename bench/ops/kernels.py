"""Time and memory of every op against plain PyTorch, forward and backward, on this machine.

The contenders of an op run in turn, round by round, on the same random inputs, of which there are enough sets to pass
the last-level cache. Each result is checked against the reference first: what does not agree gets no time. Rates count
what an op has to move and multiply (`cases`), not what an implementation does, and stand beside the copy and matrix
rates that the same device reached in the same run. On a GPU times are CUDA events', elsewhere the clock's.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mimae import kernels
from mimae.bench.machine import Product, matmul_rate, resident_peak, synchronize
from mimae.bench.ops.cases.case import Case, Inputs, Pass, Size, numbers
from mimae.bench.ops.traffic import eager as eager_traffic
from mimae.kernels.runtime import Impl, chosen, watching
from mimae.outside.progress import track

BATCHES = (256, 1024, 4096)

FIRST_ROUNDS = 3
"""Rounds without the compiled forms, at all sizes, before the first compilation."""

CACHE_BYTES = {"cuda": 128 << 20, "cpu": 64 << 20}
"""Bytes of inputs that are rotated: more than the L2 of the supported GPUs, or the L3 of most CPUs."""
MOST_SETS = 8
_BUSY_CYCLES = 4_000_000
"""GPU cycles of about two milliseconds, longer than the host needs to launch an op, forward and backward."""
SQUARE_SIDE = {"cuda": 8192, "cpu": 1024}
COPY_BYTES = {"cuda": 2 << 30, "cpu": 256 << 20}
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 3e-3}
"""Tolerance relative to a norm, by the precision of the products. The tests of an op show that it is right; this check
only prevents the timing of a wrong computation."""

_MOST_OF_A_HOST = 0.25
"""Largest share of the host's memory for one tensor of a contender."""

Results = Sequence[Tensor]


class Form(NamedTuple):
    """An implementation: a function of the inputs in its layout, differentiable in the case's `trained`."""

    call: Callable[[Inputs], Results]
    prepared: bool
    """True if it takes the inputs of the eager form, from `Case.prepare`."""
    impl: Impl = "auto"
    """Implementation of the ops that it calls, also in backward."""


def forms(case: Case, device: torch.device, compiled: bool) -> dict[str, Form]:
    """Return the contenders of an op on a device, by name; `fused` only if the op has a fused form there."""

    public = case.public
    found = {"reference": Form(public, prepared=False, impl="reference")}
    automatic = chosen(case.op, torch.empty(0, device=device))
    if automatic != "reference":
        found["fused"] = Form(public, prepared=False, impl=automatic)
    found["eager"] = Form(case.eager, prepared=True)
    found |= {name: Form(call, prepared=True) for name, call in case.others(device).items()}
    if compiled:  # They come last: compilation may take long or fail.
        torch._dynamo.reset()  # After eight shapes of one function, torch would stop compiling it.
        found["compiled"] = Form(torch.compile(case.eager, dynamic=False), prepared=True)
        found["compiled reference"] = found["reference"]._replace(call=torch.compile(public, dynamic=False))
    return found


# One contender


class Contender:
    """A contender with its sets of inputs, in its layout."""

    def __init__(self, case: Case, form: Form, sets: Sequence[Inputs], device: torch.device) -> None:
        self.case, self.form, self.device = case, form, device
        self.sets = [
            {
                name: value.detach().clone().requires_grad_() if name in case.trained else value
                for name, value in each.items()
            }
            for each in sets
        ]
        self.turn = 0

    def forward(self, x: Inputs) -> Results:
        with kernels.prefer(self.form.impl):
            return self.form.call(x)

    def backward(self, x: Inputs, results: Results) -> Results:
        leaves = [x[name] for name in self.case.trained]
        if not leaves:
            return []
        upstream = [x[name] for name in self.case.upstream] or [torch.ones_like(each) for each in results]
        with kernels.prefer(self.form.impl):
            return torch.autograd.grad(results[: len(upstream)], leaves, upstream)

    def once(self) -> tuple[float, float]:
        """Return the seconds of one forward and one backward, each on the next set of inputs."""
        x = self.sets[self.turn % len(self.sets)]
        self.turn += 1
        _get_ahead(self.device)
        marks = [_mark(self.device)]
        results = self.forward(x)
        marks.append(_mark(self.device))
        self.backward(x, results)
        marks.append(_mark(self.device))
        synchronize(self.device)
        return _between(*marks[:2]), _between(*marks[1:])

    def norms(self) -> list[float]:
        """Return the norms of the first result and of every gradient, which are equal in every layout."""
        results = self.forward(self.sets[0])
        return [each.double().norm().item() for each in (results[0], *self.backward(self.sets[0], results))]

    def extra_bytes(self) -> int | None:
        """Return the peak memory of a forward and backward without the inputs.

        It is PyTorch's on a GPU, otherwise the process's as counted by Linux, or None on other systems.
        """
        if self.device.type != "cuda":
            return resident_peak(self.once)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        self.once()
        return torch.cuda.max_memory_allocated(self.device) - before


def _physical() -> int:
    """Return the bytes of the host's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _get_ahead(device: torch.device) -> None:
    """Empty a GPU's cache, and keep it busy while the host launches the timed work, so that events time the GPU."""
    if device.type == "cuda":
        torch.empty(CACHE_BYTES["cuda"], dtype=torch.uint8, device=device).zero_()
        torch.cuda._sleep(_BUSY_CYCLES)  # type: ignore[no-untyped-call]


def _mark(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(start: Any, end: Any) -> float:
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1e3


# One op


def contest(
    case: Case,
    size: Size,
    batch: int,
    device: torch.device,
    rounds: int,
    compiled: bool,
    keep: Callable[[dict[str, Any]], None] = lambda found: None,
) -> dict[str, Any]:
    """Check and time the contenders of an op. `keep` gets the result so far after each contender and each round.

    One that fails or runs out of memory has the reason in place of a time.
    """
    torch.manual_seed(0)
    first = case.inputs(size, batch, device)
    used = numbers([value for value in first.values() if isinstance(value, Tensor)])
    count = min(MOST_SETS, max(2, math.ceil(CACHE_BYTES[device.type] / used)))
    sets = [first, *(case.inputs(size, batch, device) for _ in range(count - 1))]
    laid = {False: sets, True: [case.prepare(size, each) for each in sets]}
    passes = [sum(p) for p in zip(*(_work(case, each, size, batch) for each in case.passes))]
    rows: dict[str, dict[str, Any]] = {}
    found = {
        "op": case.op, "size": size.name, "batch": batch, "width": size.width, "sets": count,
        "precision": "bf16" if size.precision == torch.bfloat16 else "fp32",
        "floor_bytes": passes[0], "flops": passes[1], "contenders": rows,
    }  # fmt: skip
    racing: dict[str, Contender] = {}
    expected: list[float] = []
    largest = eager_traffic(case, size._replace(batch=batch))["largest_bytes"]
    for name, form in forms(case, device, compiled).items():
        rows[name] = {"skipped": None}
        if name in ("eager", "compiled") and device.type == "cpu" and largest > _MOST_OF_A_HOST * _physical():
            # A host may overcommit memory, and then kill the process.
            rows[name]["skipped"] = f"a tensor of {largest / 1e9:.0f} GB"
            continue
        try:
            contender = Contender(case, form, laid[form.prepared], device)
            norms = contender.norms()
            rows[name]["extra_bytes"] = contender.extra_bytes()
        except Exception as error:  # Memory, a compiler or a package failed: only this time is lost.
            rows[name]["skipped"] = _reason(error)
            keep(found)
            continue
        expected = expected or norms
        # Random masks have no common norm.
        if case.op == "orthogonal_masks" or _agree(expected, norms, size.precision):
            racing[name] = contender
        else:
            rows[name]["skipped"] = f"wrong: norms {norms}, the reference has {expected}"
        keep(found)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in racing}
    names = list(racing)
    for number in track(range(rounds), f"{case.op} {size.name}", rounds, "rounds"):
        turn = number % max(1, len(names))
        for name in names[turn:] + names[:turn]:
            if name not in racing:
                continue
            try:
                times[name].append(racing[name].once())
            except Exception as error:
                del racing[name]
                rows[name]["skipped"] = _reason(error)
        for name in racing:
            rows[name] |= _row(times[name], has_backward=bool(case.trained))
        keep(found)
    return found


def _row(pairs: Sequence[tuple[float, float]], has_backward: bool) -> dict[str, Any]:
    """Return the spread of a contender's times; a pair has the seconds of a forward and of its backward."""
    kinds = {"forward": [f for f, _ in pairs], "both": [f + b for f, b in pairs]}
    if has_backward:
        kinds["backward"] = [b for _, b in pairs]
    return {kind: _quantiles(values) for kind, values in kinds.items()}


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _agree(expected: Sequence[float], found: Sequence[float], precision: torch.dtype) -> bool:
    return all(abs(a - b) <= TOLERANCES[precision] * max(abs(a), 1e-6) for a, b in zip(expected, found, strict=True))


def _work(case: Case, fused: Pass, size: Size, batch: int) -> tuple[int, float]:
    """Return the bytes that a pass has to move, and the FLOPs of its products. They depend only on shapes."""
    inputs = case.inputs(size, batch, torch.device("meta"))
    with watching(lambda _: None):
        results = fused.run(inputs)
    return numbers(fused.reads(inputs)) + numbers(results), fused.flops(size, batch)


def _quantiles(seconds: Sequence[float]) -> dict[str, float]:
    ordered = sorted(seconds)

    def at(share: float) -> float:
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    return {"median": statistics.median(ordered), "p20": at(0.2), "p80": at(0.8)}


# The machine


def roof(device: torch.device) -> dict[str, float]:
    """Return measured rates of the device: bytes/s of a large copy (read and write), FLOP/s of large products."""
    source = torch.empty(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target, times = torch.empty_like(source), []
    for _ in range(10):
        synchronize(device)
        start = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        times.append(time.perf_counter() - start)
    side = SQUARE_SIDE[device.type]
    found = {"copy_bytes_per_s": 2 * source.numel() / min(times)}
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        found[f"{name}_flops_per_s"] = matmul_rate([Product(side, side, side)], dtype, device, 0.1)
    return found


def crossovers(contests: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Return by op the smallest measured batch from which on the fused form is not slower than any plain form.

    Forward and backward count together. Ops without a fused form on this machine are left out.
    """
    found: dict[str, int] = {}
    for op in dict.fromkeys(each["op"] for each in contests):
        lost = []
        batches = []
        for each in (c for c in contests if c["op"] == op):
            rows = {name: row["both"]["median"] for name, row in each["contenders"].items() if "both" in row}
            if "fused" in rows:
                batches.append(each["batch"])
                if rows["fused"] > min(rows.values()):
                    lost.append(each["batch"])
        if batches:
            won = [batch for batch in batches if batch > max(lost, default=0)]
            found[op] = min(won) if won else max(batches) + 1
    return found


def sizes_of(case: Case, batches: Sequence[int], precision: torch.dtype | None) -> list[tuple[Size, int]]:
    """Return every size of a case at every batch, in its own precision or the given one, each once."""
    sizes = (
        size._replace(batch=0, name=size.name.partition(" B=")[0], precision=precision or size.precision)
        for size in case.sizes
    )
    return [(size, batch) for size in dict.fromkeys(sizes) for batch in batches]


def show(contest: dict[str, Any], roof: dict[str, float], console: Console) -> None:
    """Print a contest as a table. `roof` may be empty."""
    matrix = contest["flops"] > 0
    unit = "TFLOP/s" if matrix else "GB/s"
    limit = roof.get(f"{contest['precision']}_flops_per_s" if matrix else "copy_bytes_per_s")
    table = Table(title=f"{contest['op']}, {contest['size']}, {contest['batch']} images, {contest['precision']}")
    for column in ("", "forward ms", "backward ms", "both ms", "p20 .. p80", unit, "of the roof", "extra memory"):
        table.add_column(column, justify="right" if column else "left")
    for name, row in contest["contenders"].items():
        if row["skipped"] or "both" not in row:
            table.add_row(name, row["skipped"] or "")
            continue
        both, extra = row["both"], row["extra_bytes"]
        rate = (contest["flops"] if matrix else contest["floor_bytes"]) / both["median"]
        table.add_row(
            name,
            f"{1e3 * row['forward']['median']:.3g}",
            f"{1e3 * row['backward']['median']:.3g}" if "backward" in row else "",
            f"{1e3 * both['median']:.3g}",
            f"{1e3 * both['p20']:.3g} .. {1e3 * both['p80']:.3g}",
            f"{rate / (1e12 if matrix else 1e9):.3g}",
            "" if limit is None else f"{rate / limit:.0%}",
            "" if extra is None else f"{extra / 2**20:,.0f} MiB",
        )
    console.print(table)
