"""The page docs/gpu-day.md: the measurements of `mimae bench gpu`, next to the predictions of a step's cost model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mimae.bench.gpu.stages import STAGES

PREDICTED = {
    "pretrain, plain": "1,443 images/s, MFU 33 % (H100: 177 ms per step of 256 images)",
    "step, ViT-L": "795 images/s, MFU 39.5 % (H100: 322 ms per step of 256 images)",
}
"""Predictions of the cost model, +-15 %, made before any measurement on a GPU."""

_INTRODUCTION = """# Measurements on a GPU

`mimae bench gpu` runs everything that needs a GPU, in two calls of at most nine minutes. Each stage is stopped at its
limit, and the second call runs the remaining stages. `mimae bench gpu --render docs/gpu-day.md` writes this page from
`bench/results/gpu.json`. Predictions are those of a cost model, made before any measurement.
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
    for stage in STAGES:
        row = report.get("stages", {}).get(stage.name, {})
        found = row.get("result") or (row.get("before") or {}).get("result")
        measured = "; ".join(_measured(found)) if found else ""
        state = row.get("state", "not run")
        lines.append(f"| {stage.name} | {stage.seconds:.0f} | {state} | {measured} | {PREDICTED.get(stage.name, '')} |")
    return "\n".join(lines) + "\n"


def _measured(result: Any) -> Iterator[str]:
    """Yield the figures of a stage's result as text."""
    if isinstance(result, str):  # This is pytest's XML.
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
