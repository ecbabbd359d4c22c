"""Choice of an engine for a recipe on a number of GPUs, with the reason (docs/scaling.md)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mimae.optim.resolution import Stage, in_words, stages
from mimae.plan.communication import DISK, HOST, LINKS, OVERLAP
from mimae.plan.cost import USABLE, Fleet, Row, row, rows
from mimae.plan.flops import run_flops, step_flops
from mimae.plan.memory import Parameters, parameters

if TYPE_CHECKING:
    from mimae.config.recipe import Recipe


def advise(recipe: Recipe, fleet: Fleet, count: Parameters) -> tuple[Row | None, str]:
    """Return the best engine and the reason, or None and a hint if the model fits on no engine.

    The best engine is the fastest one that fits; of engines within 10 % it is the simplest, because the assumptions are
    no more exact than that. If none fits, checkpointing is tried before smaller micro-batches: it costs a third of the
    time, but smaller micro-batches give the MI terms fewer images to compare.
    """
    for tried, changes in _variants(recipe, fleet):
        table = rows(tried, fleet, count)
        fitting = [row for row in table if row.fits]
        if not fitting:
            continue
        fastest = max(row.images_per_s for row in fitting)
        best = next(row for row in fitting if row.images_per_s >= 0.9 * fastest)
        settings = " ".join([best.layout.settings, *changes])
        why = f"nothing fits without {' '.join(changes)}; {_reason(best, table)}" if changes else _reason(best, table)
        return best, f"take {settings}, micro-batches of up to {best.largest} images a GPU: {why}"
    return None, "no engine fits with one image a GPU: use more GPUs, or GPUs with more memory"


def _variants(recipe: Recipe, fleet: Fleet) -> list[tuple[Recipe, list[str]]]:
    """Return the recipe and variants of it that need less memory, each with its overrides."""
    found: list[tuple[Recipe, list[str]]] = [(recipe, [])]
    if recipe.model.checkpointing != "full":
        found.append((_with(recipe, "model", checkpointing="full"), ["model.checkpointing=full"]))
    smallest, changes = found[-1]
    images = recipe.schedule.batch_size // fleet.gpus
    # InfoNCE and CLUB compare the images of a micro-batch, so all GPUs together need at least two.
    for accumulate in range(recipe.schedule.accumulate + 1, min(images, recipe.schedule.batch_size // 2) + 1):
        if images % accumulate == 0:
            split = _with(smallest, "schedule", accumulate=accumulate)
            found.append((split, [*changes, f"schedule.accumulate={accumulate}"]))
    return found


def _with(recipe: Recipe, section: str, **values: Any) -> Recipe:
    return recipe.model_copy(update={section: getattr(recipe, section).model_copy(update=values)})


def _reason(best: Row, table: list[Row]) -> str:
    ddp = table[0]
    if best is ddp:
        return "the whole model fits on each GPU, and no engine is faster"
    if not ddp.fits:
        return f"ddp needs {_gib(ddp.memory.total)} GiB a GPU, this engine {_gib(best.memory.total)}"
    return f"ddp waits {ddp.exposed:.3g} s a step for the network, this engine {best.exposed:.3g} s"


def _steps(recipe: Recipe, dataset: int) -> int:
    schedule = recipe.schedule
    steps = schedule.epochs * (dataset // schedule.batch_size)
    return steps if schedule.max_steps is None else min(steps, schedule.max_steps)


def document(recipe: Recipe, fleet: Fleet, dataset: int) -> dict[str, Any]:
    """Return the figures of every engine, and the best one."""
    count, steps = parameters(recipe), _steps(recipe, dataset)
    best, advice = advise(recipe, fleet, count)
    return {
        "parameters": count.total,
        "gpus": fleet.gpus,
        "gpu": fleet.gpu.name,
        "images_per_step": recipe.schedule.batch_size,
        "steps": steps,
        "flops_per_step": run_flops(recipe),
        "stages": [
            {
                "size": stage.size_hw,
                "steps": stage.end - stage.first,
                "flops_per_step": step_flops(recipe, stage.size_hw),
            }
            for stage in stages(recipe.schedule, recipe.data.size_hw, steps)
        ],
        "engines": [
            {
                "settings": row.layout.settings,
                "fits": row.fits,
                "memory_bytes": row.memory._asdict() | {"total": row.memory.total},
                "largest_micro_batch": row.largest,
                "bytes_sent": sum(each.bytes for each in row.traffic),
                "seconds": row.seconds,
                "exposed_seconds": row.exposed,
                "images_per_s": row.images_per_s,
                "hours": steps * row.seconds / 3600,
            }
            for row in rows(recipe, fleet, count)
        ],
        "best": None if best is None else best.layout.settings,
        "advice": advice,
    }


def report(recipe: Recipe, fleet: Fleet, dataset: int) -> str:
    """Return all figures as text."""
    count, steps = parameters(recipe), _steps(recipe, dataset)
    table = rows(recipe, fleet, count)
    best, advice = advise(recipe, fleet, count)
    schedule = recipe.schedule
    micro = schedule.batch_size // (fleet.gpus * schedule.accumulate)
    flops = run_flops(recipe)
    planned = stages(schedule, recipe.data.size_hw, steps)
    lines = [
        f"{count.total / 1e6:,.1f} M parameters, {count.encoder / 1e6:,.1f} M of them in the encoder",
        f"{fleet.gpus} x {fleet.gpu.name}, {fleet.per_node} a node; {schedule.batch_size} images a step, "
        f"{micro} a GPU and micro-batch, {schedule.accumulate} micro-batches",
        f"{flops / schedule.batch_size / 1e12:.3g} TFLOP a training image, {flops / 1e15:.3g} PFLOP a step, "
        f"{flops / fleet.gpus / 1e12:.4g} TFLOP a GPU{', as means over the stages' * (len(planned) > 1)}",
        "",
        "GiB a GPU" + " " * 23 + "weights   grads   optim  activ.  losses    work   total       largest micro-batch",
    ]
    lines += [_memory_line(row) for row in table]
    lines += ["", "a step" + " " * 27 + "GB sent  exposed s  share  images/s    hours"]
    lines += [_speed_line(row, steps) for row in table]
    lines += ["", "GB sent by a GPU in a step, where it is more than 1 MB"]
    lines += [
        f"  {row.layout.settings.replace('engine.', ''):<30} "
        + "; ".join(f"{each.label} {each.bytes / 1e9:.3g}" for each in row.traffic if each.bytes > 1e6)
        for row in table
    ]
    if best is not None:
        of_stages = [row(best.recipe, best.layout, fleet, count, stage.size_hw) for stage in planned]
        # The first images are the smallest ones, and are needed the fastest.
        rate, nodes = of_stages[0].images_per_s, -(-fleet.gpus // fleet.per_node)
        height, width = planned[0].size_hw
        seconds = sum((stage.end - stage.first) * each.seconds for stage, each in zip(planned, of_stages, strict=True))
        if len(planned) > 1:
            lines += ["", "stages of schedule.resolution          steps  s a step  images/s    hours"]
            lines += [_stage_line(stage, each) for stage, each in zip(planned, of_stages, strict=True)]
        lines += [
            "",
            f"data: {rate:,.0f} images/s, {rate / nodes:,.0f} on each node, "
            f"{rate * height * width * 3 / nodes / 1e9:.3g} GB/s of pixels to its GPUs",
            f"time: {steps:,} steps of {seconds / max(steps, 1):.3g} s are {seconds / 3600:,.1f} hours",
        ]
    lines += [
        "",
        "assumed: "
        f"{fleet.share:.0%} of the peak while computing; {LINKS:.0%} of {fleet.gpu.link:g} GB/s in a node and of "
        f"{fleet.gpu.network:g} GB/s a GPU between nodes; communication hides behind {OVERLAP:.0%} of computing; "
        f"{USABLE:.0%} of {fleet.gpu.memory:g} GiB for a step; {HOST / 1e9:g} GB/s of the host for each GPU, "
        f"{DISK / 1e9:g} GB/s of a node's disk; "
        f"{dataset:,} images in the data set",
        "",
        advice,
    ]
    return "\n".join(lines)


def _gib(bytes: float) -> str:
    return f"{bytes / 2**30:.1f}"


def _memory_line(row: Row) -> str:
    parts = "".join(f"{_gib(part):>8}" for part in (*row.memory, row.memory.total))
    verdict = "fits" if row.fits else "too much"
    return f"  {row.layout.settings.replace('engine.', ''):<29}{parts}  {verdict:<8} {row.largest:>4}"


def _stage_line(stage: Stage, row: Row) -> str:
    steps = stage.end - stage.first
    return (
        f"  {in_words(stage.size_hw):<30} {steps:>11,} {row.seconds:>9.3g} {row.images_per_s:>9,.0f} "
        f"{steps * row.seconds / 3600:>8,.1f}"
    )


def _speed_line(row: Row, steps: int) -> str:
    sent = sum(each.bytes for each in row.traffic) / 1e9
    if not row.fits:
        return f"  {row.layout.settings.replace('engine.', ''):<30} {sent:>7.3g}"
    return (
        f"  {row.layout.settings.replace('engine.', ''):<30} {sent:>7.3g} {row.exposed:>10.3g} "
        f"{row.exposed / row.seconds:>6.0%} {row.images_per_s:>9,.0f} {steps * row.seconds / 3600:>8,.1f}"
    )
