"""The page docs/gpu-day.md: the measurements of `mimae bench gpu`, next to the predictions of a step's cost model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mimae.bench.gpu import details
from mimae.bench.gpu.predicted import predictions
from mimae.bench.gpu.stages import STAGES

_INTRODUCTION = """# Measurements on a GPU

`mimae bench gpu` runs everything that needs a GPU, in two calls of at most nine minutes. Each stage is stopped at its
limit, and the second call runs the remaining stages. `mimae bench gpu --render docs/gpu-day.md` writes this page from
`bench/results/gpu.json`. Predictions are for one H100, by the cost model of [budget.md](budget.md).
"""


def render(report: Mapping[str, Any]) -> str:
    """Return the page for a report, which may be empty or have only some of the stages."""
    lines = [_INTRODUCTION]
    if report:
        machine, versions = report["machine"], report["versions"]
        lines.append(
            f"Measured on {report['date']} in {report['calls']} calls: {machine['gpu']}, driver {machine['driver']}, "
            f"NCCL {machine['nccl']}, torch {versions['torch']}, triton {versions['triton']}.\n"
        )
    else:
        lines.append("Nothing has been measured on a GPU yet.\n")
    lines += ["| stage | limit, s | state | measured | predicted |", "| --- | ---: | --- | --- | --- |"]
    predicted, results = predictions(), {}
    for stage in STAGES:
        row = report.get("stages", {}).get(stage.name, {})
        found = row.get("result") or (row.get("before") or {}).get("result")
        measured = "; ".join(_measured(found)) if found else ""
        if isinstance(found, dict):
            results[stage.name] = found
        state = row.get("state", "not run")
        lines.append(f"| {stage.name} | {stage.seconds:.0f} | {state} | {measured} | {predicted.get(stage.name, '')} |")
    return "\n".join([*lines, *details.sections(results)]) + "\n"


def _measured(result: Any) -> Iterator[str]:
    """Yield the main figures of a stage's result as text; `details` has the others."""
    if isinstance(result, str):  # This is pytest's XML.
        head = result.partition("<testsuite ")[2].partition(">")[0].replace('"', "").split()
        counts = dict(field.split("=", 1) for field in head if "=" in field)
        yield ", ".join(f"{counts[key]} {key}" for key in ("tests", "failures", "errors", "skipped") if key in counts)
        return
    # A speed that is not known is null.
    for record in result.get("epochs", [])[-1:]:
        if record.get("images_per_s") is not None:
            yield f"{record['images_per_s']:,.0f} images/s"
        if record.get("mfu") is not None:
            yield f"MFU {100 * record['mfu']:.0f} %"
        if record.get("knn") is not None:
            yield f"kNN {record['knn']:.3f}, {len(result['pictures'])} pictures"
    if not result.get("epochs"):
        for record in result.get("metrics", [])[-1:]:
            speed = "" if record["images_per_s"] is None else f"{record['images_per_s']:,.0f} images/s "
            yield f"{speed}at step {record['step']}"
    for contest in result.get("contests", []):
        for name, row in contest["contenders"].items():
            if "images_per_s" in row:
                yield f"{name} {row['images_per_s']:,.0f} images/s"
            elif row.get("peak_bytes") is not None:
                yield f"{name} {row['peak_bytes'] / 2**30:.1f} GiB"
        if "op" in contest:
            yield _of_op(contest)
    if "machine_code" in result:
        failed = [row for row in result["machine_code"] if "error" in row]
        yield f"{len(result['machine_code']) - len(failed)} kernels in {result['seconds']:.0f} s, {len(failed)} failed"
    if "phases" in result:
        yield f"{1e3 * result['seconds']:.1f} ms a step of {result['images']} images"


def _of_op(contest: Mapping[str, Any]) -> str:
    """Return the time of the fused form and that of the fastest other one, in milliseconds."""
    times = {name: 1e3 * row["both"]["median"] for name, row in contest["contenders"].items() if "both" in row}
    others = sorted((name for name in times if name != "fused"), key=times.__getitem__)
    told = [f"{name} {times[name]:.3g} ms" for name in ("fused", *others[:1]) if name in times]
    return f"{contest['size']}, {contest['batch']:,} images: {', '.join(told) or 'no time'}"
