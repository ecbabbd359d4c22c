"""Bytes that the fused ops move, against the least they could and against eager PyTorch, without a GPU.

The kernels are counted in triton's interpreter at small sizes, with the tiles of a production size. The traffic is a
linear function of a few quantities (images, programs of the grid). It is fitted to some of the counts, checked against
all, and extrapolated to the production size, whose launches are recorded on meta tensors. The machine code comes from
`offline`. The result does not depend on the machine, so a bound that holds here also holds in CI. The command fails if
a bound does not hold.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mimae.bench.ops import offline
from mimae.bench.ops.cases import chosen
from mimae.bench.ops.cases.case import Bound, Case, Inputs, Pass, Size, numbers, recorded
from mimae.bench.ops.counting import TorchTraffic, Traffic, counting, total
from mimae.kernels.runtime import H100, Launch, Target
from mimae.outside.progress import track

H100_BYTES_PER_S = 3.35e12
"""Memory bandwidth of an H100 SXM in bytes/s, from its data sheet."""

WIDTH = 150
"""Width of the tables in characters; narrower tables would cut figures off."""

META, CPU = torch.device("meta"), torch.device("cpu")
Row = dict[str, Any]


NEGLIGIBLE = 1 << 16
"""Smallest floor in bytes for ratios: for passes with a smaller one, the scalars that programs read would dominate."""


# Counting one case


def measure(op: str, size: Size) -> Row:
    """Return the bytes that a case moves at a production size. Needs Triton's interpreter."""
    (case,) = chosen([op])
    inputs = case.inputs(size, size.batch, META)
    passes = [_measure_pass(case, each, size, inputs) for each in case.passes]
    return {"op": case.op, "size": size.name, "batch": size.batch, "passes": passes, "eager": eager(case, size)}


def _measure_pass(case: Case, fused: Pass, size: Size, inputs: Inputs) -> Row:
    count = fused.counted
    with TorchTraffic() as operators:
        launches, results = recorded(fused, inputs, H100)
    rows, counts = [], []
    for point in count.points:
        small = size if point.width is None else size._replace(width=point.width)
        seen, moved = _count(fused, case.inputs(small, point.batch, CPU), Target(H100.capability, point.processors))
        check_tiles(seen, launches, count.adaptive)
        rows.append(count.terms(small, point.batch, seen))
        counts.append(moved)
    moved = extrapolated(rows, counts, count.terms(size, size.batch, launches))
    kernels = total(list(moved.values()))
    floor = numbers(fused.reads(inputs)) + numbers(results)
    return {
        "name": fused.name,
        "launches": len(launches) + operators.operators,
        "floor_bytes": floor,
        "issued_bytes": kernels.issued + operators.moved,
        "unique_bytes": kernels.unique + operators.moved,
        "extra_bytes": _extra(launches, inputs, results),
        "flops": fused.flops(size, size.batch),
        "predicted_h100_us_at_floor": 1e6 * floor / H100_BYTES_PER_S,
        "by_argument": {name: traffic._asdict() for name, traffic in moved.items()},
    }


def _count(fused: Pass, inputs: Inputs, target: Target) -> tuple[list[Launch], dict[str, Traffic]]:
    """Return the bytes that a pass moves, by `kernel.argument`."""
    with counting(target) as launches:
        fused.run(inputs)
    moved: dict[str, Traffic] = {}
    for launch in launches:
        for name, traffic in launch.traffic.items():
            key = f"{launch.launch.kernel.__name__}.{name}"
            moved[key] = total([traffic, moved.get(key, Traffic())])
    return [launch.launch for launch in launches], moved


def check_tiles(small: Sequence[Launch], production: Sequence[Launch], adaptive: Sequence[str]) -> None:
    """Raise RuntimeError if a counted kernel is not the one that production launches."""

    def variant(launch: Launch) -> tuple[str, dict[str, Any]]:
        name, kinds = launch.kernel.__name__, inspect.get_annotations(launch.kernel.fn)
        fixed = {key for key, kind in kinds.items() if "constexpr" in str(kind) and f"{name}.{key}" not in adaptive}
        return name, {key: launch.arguments[key] for key in fixed}

    wanted = [variant(launch) for launch in production]
    for name, tile in map(variant, small):
        if (name, tile) not in wanted:
            raise RuntimeError(f"{name} was counted with {tile}, which is not among {wanted}")


def extrapolated(
    rows: Sequence[Sequence[float]], counts: Sequence[Mapping[str, Traffic]], wanted: Sequence[float]
) -> dict[str, Traffic]:
    """Return the counts at `wanted`, by the linear function of `rows` that fits all counts.

    Raises RuntimeError if there is none, if there are not more counts than coefficients, so that nothing would be
    checked, or if the counts do not determine the value at `wanted`.
    """
    matrix = numpy.asarray(rows, float)
    scale = numpy.abs(matrix).max(0)
    matrix, aim = matrix / scale, numpy.asarray(wanted, float) / scale
    rank = numpy.linalg.matrix_rank(matrix)
    if rank == len(matrix) or numpy.linalg.matrix_rank([*matrix, aim]) > rank:
        raise RuntimeError(f"{len(matrix)} counts of rank {rank} do not determine and check the traffic: {rows}")
    result = {}
    for name in counts[0]:
        seen = numpy.asarray([count[name] for count in counts], float)
        coefficients, *_ = numpy.linalg.lstsq(matrix, seen, rcond=None)
        off = numpy.abs(matrix @ coefficients - seen).max()
        if off > 1e-6 * max(1.0, seen.max()):
            raise RuntimeError(f"{name} is not linear: off by {off} bytes of {seen.tolist()} at {rows}")
        result[name] = Traffic(*(round(float(value)) for value in aim @ coefficients))
    return result


def _extra(launches: Sequence[Launch], inputs: Inputs, results: Sequence[Tensor]) -> int:
    """Return the bytes of memory that the launches use in addition to inputs and results."""

    def storages(values: Any) -> dict[int, int]:
        tensors = (value.untyped_storage() for value in values if isinstance(value, Tensor))
        return {storage._cdata: storage.nbytes() for storage in tensors}

    used = storages(value for launch in launches for value in launch.arguments.values())
    return sum(size for key, size in (used.items() - storages([*inputs.values(), *results]).items()))


def eager(case: Case, size: Size) -> Row:
    """Return the bytes that the eager form moves, forward and backward."""
    with FakeTensorMode():
        inputs = case.prepare(size, case.inputs(size, size.batch, CPU))
        leaves = [inputs[name].requires_grad_() for name in case.trained]
        with TorchTraffic() as forward:
            results = case.eager(inputs)
        with TorchTraffic() as backward:
            if leaves:
                upstream = [inputs[name] for name in case.upstream] or [torch.ones_like(each) for each in results]
                torch.autograd.grad(results[: len(upstream)], leaves, upstream)
    return {
        "forward_bytes": forward.moved,
        "backward_bytes": backward.moved,
        "operators": forward.operators + backward.operators,
        "largest_bytes": max(forward.largest, backward.largest),
    }


def count(cases: Sequence[Case], processes: int) -> list[Row]:
    """Count every case at each of its sizes, in fresh processes."""
    jobs = [(case.op, size) for case in cases for size in case.sizes]
    with offline.fresh_processes(processes, interpret=True) as pool:
        return list(track(pool.map(measure, *zip(*jobs)), "traffic", len(jobs)))


# Judging and showing


def bound_of(op: str) -> Bound:
    """Return the bounds of an op's case."""
    (case,) = chosen([op])
    return case.bound


def eager_ratio(row: Row) -> float:
    """Return the bytes of eager PyTorch over those that the fused passes issue."""
    eager = row["eager"]["forward_bytes"] + row["eager"]["backward_bytes"]
    return eager / sum(fused["issued_bytes"] for fused in row["passes"])


def beyond_bounds(row: Row, bound: Bound) -> list[str]:
    """Return a line for each figure of a row that exceeds its bound."""
    found = []

    def judge(where: str, what: str, value: float, limit: float | None, sign: int = 1) -> None:
        if limit is not None and sign * value > sign * limit:
            found.append(f"{where}, {row['size']}: {what} {value:.3f}, bound {limit}")

    for fused in row["passes"]:
        name, floor = fused["name"], max(fused["floor_bytes"], NEGLIGIBLE)
        judge(name, "issued bytes over floor", fused["issued_bytes"] / floor, bound.issued)
        judge(name, "different bytes over floor", fused["unique_bytes"] / floor, bound.unique)
        judge(name, "extra memory over that of inputs and results", fused["extra_bytes"] / floor, bound.extra)
    judge(row["op"], "bytes of eager PyTorch over issued", eager_ratio(row), bound.eager, sign=-1)
    return found


def flaws(binary: Row) -> list[str]:
    """Return a line for each flaw of a kernel's machine code."""
    where = f"{binary['kernel']} of {binary['op']}, {binary['size']}, sm_{binary['capability']}"
    if "error" in binary:
        return [f"{where}: does not compile ({binary['error']})"]
    found = []
    if binary["local_bytes"]:
        found.append(f"{binary['local_bytes']} bytes of a thread spilled")
    if not binary["fits"]:
        found.append(f"{binary['shared_bytes']} bytes of shared memory do not fit")
    if bound_of(binary["op"]).hopper and binary["capability"] == 90 and "HMMA" in binary["matrix"]:
        found.append("matrix products of one warp, where Hopper has those of four")
    return [f"{where}: {flaw}" for flaw in found]


def show(result: Mapping[str, Any], console: Console) -> None:
    """Print a result as tables."""
    traffic = Table(
        title="megabytes between memory and processors, counted in the interpreter at small sizes; for an H100's grid",
        caption="least: each input and each result once; its time is a prediction, at 3.35 TB/s",
    )
    for column in ("pass", "size", "images", "launches", "least", "issued", "of least", "different", "eager", "extra"):
        traffic.add_column(column, justify="left" if column in ("pass", "size") else "right")
    traffic.add_column("µs at least", justify="right")
    for row in result["traffic"]:
        for fused, eager in zip(row["passes"], ("forward_bytes", "backward_bytes")):
            least = fused["floor_bytes"]
            traffic.add_row(
                fused["name"],
                row["size"],
                f"{row['batch']:,}",
                str(fused["launches"]),
                *(f"{each / 1e6:,.4g}" for each in (least, fused["issued_bytes"])),
                *(f"{fused[key] / least:.3f}" for key in ("issued_bytes", "unique_bytes")),
                *(f"{each / 1e6:,.4g}" for each in (row["eager"][eager], fused["extra_bytes"])),
                f"{fused['predicted_h100_us_at_floor']:,.1f}",
            )
        traffic.add_row(f"eager over issued: {eager_ratio(row):,.1f}", end_section=True)
    console.print(traffic)
    if result["machine_code"]:
        console.print(_code_table(result["machine_code"]))


def render(result: Mapping[str, Any]) -> str:
    """Return a result as a Markdown page: traffic, and machine code with one row per kernel and size."""
    versions = " and ".join(f"{package} {version}" for package, version in result["versions"].items())
    lines = [
        "# Memory traffic of the kernels, counted without a GPU",
        "",
        f"This page is rendered from `bench/results/traffic.json`, measured with {versions}. `mimae bench traffic`",
        "writes the file with `--out`, and this page with `--render`. Columns are in megabytes. *least*: each input",
        "and each result once. *issued*: all bytes that loads and stores request. *different*: the requested bytes",
        "without repeated requests. The time is a prediction for the least bytes at the",
        f"{H100_BYTES_PER_S / 1e12:g} TB/s of an H100. `infonce` is in fp32, as in training, unless bf16 is named.",
        "",
        "| pass | size | images | launches | least | issued | of least | different | eager | extra | µs at least |",
        "| --- | --- |" + " ---: |" * 9,
    ]
    for row in result["traffic"]:
        for fused, eager in zip(row["passes"], ("forward_bytes", "backward_bytes")):
            least, issued, unique = (fused[key] for key in ("floor_bytes", "issued_bytes", "unique_bytes"))
            ratios = " | ".join(f"{each / max(least, NEGLIGIBLE):.3f}" for each in (issued, unique))
            moved = [least, issued, row["eager"][eager], fused["extra_bytes"]]
            least_mb, issued_mb, eager_mb, extra_mb = (f"{each / 1e6:,.{1 if each else 0}f}" for each in moved)
            lines.append(
                f"| {fused['name']} | {row['size']} | {row['batch']:,} | {fused['launches']} | {least_mb} "
                f"| {issued_mb} | {ratios} | {eager_mb} | {extra_mb} | {fused['predicted_h100_us_at_floor']:,.1f} |"
            )
    kernels: dict[tuple[str, str], dict[int, list[Row]]] = {}
    for binary in result["machine_code"]:
        of_kernel = kernels.setdefault((f"{binary['op']}{binary['kernel']}", binary["size"]), {})
        of_kernel.setdefault(binary["capability"], []).append(binary)
    found = sorted({binary["capability"] for binary in result["machine_code"]})
    lines += [
        "",
        "## Machine code",
        "",
        "The cells have registers and spilled bytes per thread, KiB of shared memory per block, and the matrix",
        "instructions. If a kernel has variants, they are those of the variant with the most registers.",
        "",
        "| kernel | size |" + "".join(f" sm_{capability} |" for capability in found),
        "| --- | --- |" + " --- |" * len(found),
    ]
    for (kernel, size), of_kernel in kernels.items():
        cells = (_cell(max(of_kernel[capability], key=_registers)) for capability in found)
        lines.append(f"| {kernel} | {size} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _registers(binary: Row) -> float:
    return math.inf if "error" in binary else binary["registers"]


def _cell(binary: Row) -> str:
    if "error" in binary:
        return "does not compile"
    matrix = "".join(f", {count} {kind}" for kind, count in binary["matrix"].items())
    return f"{binary['registers']}, {binary['local_bytes']}, {binary['shared_bytes'] / 1024:.0f}{matrix}"


def _code_table(binaries: Sequence[Row]) -> Table:
    table = Table(
        title="machine code, compiled without a GPU",
        caption="spilled: bytes per thread; shared: KiB per block; blocks: resident blocks per multiprocessor",
    )
    for column in (
        "kernel",
        "size",
        "sm",
        "registers",
        "spilled",
        "shared",
        "blocks",
        "occupancy",
        "matrix",
        "128 bit",
    ):
        table.add_column(column, justify="left" if column in ("kernel", "size", "matrix") else "right")
    for binary in binaries:
        if "error" in binary:
            table.add_row(f"{binary['op']}{binary['kernel']}", binary["size"], str(binary["capability"]), "no")
            continue
        table.add_row(
            f"{binary['op']}{binary['kernel']}",
            binary["size"],
            *(str(binary[key]) for key in ("capability", "registers", "local_bytes")),
            f"{binary['shared_bytes'] / 1024:.0f}",
            str(binary["blocks"]),
            f"{binary['occupancy']:.0%}",
            ", ".join(f"{count} {kind}" for kind, count in binary["matrix"].items()),
            f"{binary['wide_share']:.0%}",
        )
    return table
