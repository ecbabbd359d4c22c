"""docs/gpu-day.md: what `mimae bench gpu` has measured, beside what the cost model of a step predicts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mimae.bench.gpu.stages import STAGES

PREDICTED = {
    "pretrain, plain": "1,443 images/s, MFU 33 % (H100: 177 ms a step of 256 images)",
    "step, ViT-L": "795 images/s, MFU 39.5 % (H100: 322 ms a step of 256 images)",
}
"""Predictions of the cost model, +-15 %, made before any GPU was at hand."""

_INTRODUCTION = """# A day with a GPU

`mimae bench gpu` runs all that needs a GPU, in two calls of at most nine minutes: each stage is cut off at its limit,
and the second call goes on with what is left. `mimae bench gpu --render docs/gpu-day.md` writes this page from
`bench/results/gpu.json`. Predictions are those of a cost model and were made before; they are no measurements.
"""


def render(report: Mapping[str, Any]) -> str:
    """Return the page of a report, which may be empty or hold a part of the stages."""
    lines = [_INTRODUCTION]
    if report:
        machine, versions = report["machine"], report["versions"]
        lines.append(
            f"Measured on {report['date']} in {report['calls']} calls: {machine['gpu']}, driver {machine['driver']}, "
            f"NCCL {machine['nccl']}, torch {versions['torch']}, triton {versions['triton']}.\n"
        )
    else:
        lines.append("No GPU has been measured yet.\n")
    lines += ["| stage | limit, s | state | measured | predicted |", "| --- | ---: | --- | --- | --- |"]
    for stage in STAGES:
        row = report.get("stages", {}).get(stage.name, {})
        found = row.get("result") or (row.get("before") or {}).get("result")
        measured = "; ".join(_measured(found)) if found else ""
        state = row.get("state", "not run")
        lines.append(f"| {stage.name} | {stage.seconds:.0f} | {state} | {measured} | {PREDICTED.get(stage.name, '')} |")
    return "\n".join(lines) + "\n"


def _measured(result: Any) -> Iterator[str]:
    """Yield the figures of a stage's result in words."""
    if isinstance(result, str):  # pytest's XML
        head = result.partition("<testsuite ")[2].partition(">")[0].replace('"', "").split()
        counts = dict(field.split("=", 1) for field in head if "=" in field)
        yield ", ".join(f"{counts[key]} {key}" for key in ("tests", "failures", "errors", "skipped") if key in counts)
        return
    for record in result.get("epochs", [])[-1:]:
        yield f"{record['images_per_s']:,.0f} images/s"
        if record.get("mfu") is not None:
            yield f"MFU {record['mfu']:.0%}"
    if not result.get("epochs"):
        for record in result.get("metrics", [])[-1:]:
            yield f"{record['images_per_s']:,.0f} images/s at step {record['step']}"
    for contest in result.get("contests", []):
        if "contenders" in contest:
            for name, row in contest["contenders"].items():
                if isinstance(row, dict) and "images_per_s" in row:
                    yield f"{name} {row['images_per_s']:,.0f} images/s"
    if "machine_code" in result:
        failed = [row for row in result["machine_code"] if "error" in row]
        yield f"{len(result['machine_code']) - len(failed)} kernels in {result['seconds']:.0f} s, {len(failed)} failed"
