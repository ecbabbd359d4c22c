"""A profile as text for a terminal, and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mimae.optim.resolution import in_words
from mimae.report.profile.advice import Advice
from mimae.report.profile.phases import Phase
from mimae.report.profile.profile import Profile

_LARGEST = 0.001
"""Phases below this share of the step are summed up in the last row."""


def as_text(found: Profile, advice: Sequence[Advice]) -> str:
    """Return the whole profile as text for a terminal."""
    images = found.recipe.schedule.batch_size
    slower = sum(phase.seconds for phase in found.phases.values()) / found.seconds - 1
    head = (
        f"a step of {images} images on {found.device} takes {1e3 * found.seconds:.1f} ms without the profiler "
        f"({images / found.seconds:,.3g} images/s), {slower:+.0%} with it\n"
        f"named phases take {found.named:.1%} of it"
    )
    if found.recipe.schedule.resolution:
        size = in_words(found.recipe.data.size_hw)
        head += (
            f"\nimages have {size}, as at the end of the run; for an earlier stage: schedule.resolution=[] "
            "data.image_size=SIZE"
        )
    return "\n\n".join([head, _phases(found), _totals(found), _memory(found), _advice(advice)])


def as_dict(found: Profile, advice: Sequence[Advice]) -> dict[str, Any]:
    """Return the profile as JSON values."""
    return {
        "device": found.device,
        "images": found.recipe.schedule.batch_size,
        "seconds": found.seconds,
        "profiled_seconds": found.profiled_seconds,
        "named": found.named,
        "peak_flops_per_s": found.peak,
        "flops": found.flops,
        "planned_flops": found.planned_flops,
        "phases": {
            name: {
                "forward_seconds": phase.forward,
                "backward_seconds": phase.backward,
                "forward_flops": found.forward_flops.get(name, 0),
                "backward_flops": found.backward_flops.get(name, 0),
                "bytes": found.bytes.get(name, 0),
                "kept_bytes": found.memory.kept.get(name, 0),
                "launches": phase.launches,
                "waits": phase.waits,
            }
            for name, phase in found.phases.items()
        },
        "memory": {
            "peak": found.memory.peak,
            "owner": found.memory.owner,
            "categories": found.memory.categories,
            "planned": found.planned_memory,
            "resident": found.resident,
        },
        "advice": [each._asdict() for each in advice],
    }


def _phases(found: Profile) -> str:
    rows = [["phase", "forward", "backward", "share", "GFLOP", "TFLOP/s", "MFU lost", "moves", "keeps", "launches"]]
    total = sum(phase.seconds for phase in found.phases.values())
    small = Phase("")
    few = 0
    for name, phase in found.phases.items():
        if phase.seconds < _LARGEST * total:
            small.forward, small.backward = small.forward + phase.forward, small.backward + phase.backward
            small.launches += phase.launches
            few += 1
            continue
        rows.append(_row(found, name, phase, total))
    if few:
        rows.append(_row(found, f"{few} smaller ones", small, total))
    return "averages per step, in ms and MiB:\n" + aligned(rows)


def _row(found: Profile, name: str, phase: Phase, total: float) -> list[str]:
    flops = found.forward_flops.get(name, 0) + found.backward_flops.get(name, 0)
    rate = flops / phase.seconds if phase.seconds else 0.0
    # The share of the step in which the phase would not have been busy at the peak rate.
    lost = f"{max(0.0, phase.seconds - flops / found.peak) / total:.1%}" if found.peak else ""
    return [
        name,
        f"{1e3 * phase.forward:.2f}",
        f"{1e3 * phase.backward:.2f}" if phase.backward else "",
        f"{phase.seconds / total:.1%}",
        f"{flops / 1e9:.2f}" if flops else "",
        f"{rate / 1e12:.3f}" if flops else "",
        lost,
        _mib(found.bytes.get(name, 0)),
        _mib(found.memory.kept.get(name, 0)),
        f"{phase.launches:.0f}",
    ]


def _totals(found: Profile) -> str:
    rate = found.flops / found.seconds
    planned = "" if found.planned_flops is None else f", planned {found.planned_flops / 1e9:,.2f}"
    told = f"{found.flops / 1e9:,.2f} GFLOP a step{planned}; {rate / 1e12:.3f} TFLOP/s"
    if found.peak:
        told += f", {rate / found.peak:.1%} of the {found.peak / 1e12:.3f} TFLOP/s that large matrices reach"
    return told


def _memory(found: Profile) -> str:
    memory, planned = found.memory, dict(found.planned_memory)
    if planned:
        # The planner lists the memory of the losses separately; here it is part of the activations.
        planned["activations"] += planned.pop("losses")
        planned["work"] = planned.pop("workspace")
    rows = [["MiB at the peak", "measured", "planned"]]
    for name, value in memory.categories.items():
        rows.append([name, _mib(value) or "0", _mib(planned.get(name, 0)) or "–"])
    rows.append(["sum", _mib(memory.total), _mib(sum(planned.values())) or "–"])
    rows.append(["by the profiler", _mib(memory.peak), ""])
    if found.resident is not None:
        rows.append(["resident, the whole process", _mib(found.resident), ""])
    return f"the peak is in: {memory.owner}\n" + aligned(rows)


def _advice(advice: Sequence[Advice]) -> str:
    if not advice:
        return "no setting would save a notable share of the time"
    told = [f"  {each.saves:4.0%}  {each.text}" for each in advice]
    return "\n".join(["advice, with the share of the step that it saves at most:", *told])


def _mib(count: float) -> str:
    return f"{count / 2**20:,.1f}" if count else ""


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Return a table as text, with the first column left-aligned and the others right-aligned."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    cells = [
        [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))] for row in rows
    ]
    return "\n".join("  " + "  ".join(row).rstrip() for row in cells)
