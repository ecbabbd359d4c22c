"""`mimae plan --scaling`: a recipe on growing numbers of GPUs, and the parts of its steps (docs/scaling.md).

Weak scaling keeps the images per GPU constant, strong scaling the images per step. The ideal is computing without
waits.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mimae.errors import UserError
from mimae.plan.communication import OF_OBJECTIVE
from mimae.plan.cost import Fleet, Row, row
from mimae.plan.memory import Layout, Parameters, parameters

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from mimae.config.recipe import Recipe

MOST = 1024
"""GPUs."""
CORES = 14
"""Assumed cores of a node for each GPU."""
CORE_RATE = 509
"""Images per second that a core decodes, crops and resizes: `torch` in bench/results/data-cpu.json."""

TERMS = {
    "computing": "#000000",
    "weights gathered,\ngradients scattered": "#0072b2",
    "gradients, all-reduced": "#d55e00",
    "latents and sums": "#cc79a7",
    "data": "#009e73",
}
ENGINES = {"ddp": "#d55e00", "fsdp, a replica a node": "#0072b2", "fsdp": "#56b4e9"}


class Point(NamedTuple):
    """A step of an engine on a number of GPUs."""

    gpus: int
    row: Row

    @property
    def data(self) -> float:
        """Seconds that the loaders need for the images of a step."""
        return self.row.recipe.schedule.batch_size / (self.gpus * CORES * CORE_RATE)

    @property
    def seconds(self) -> float:
        """Return the seconds of a step. The next batch is loaded in parallel."""
        return max(self.row.seconds, self.data)

    @property
    def images_per_s(self) -> float:
        return self.row.recipe.schedule.batch_size / self.seconds

    @property
    def efficiency(self) -> float:
        return self.row.computing / self.seconds

    def terms(self) -> dict[str, float]:
        """Return the seconds of a step by the keys of TERMS, hidden ones included.

        Loading runs in parallel to the rest.
        """
        found = dict.fromkeys(TERMS, 0.0) | {"computing": self.row.computing, "data": self.data}
        for each in self.row.traffic:
            if each.what in OF_OBJECTIVE:
                found["latents and sums"] += each.seconds
            elif each.kind == "all-reduce":
                found["gradients, all-reduced"] += each.seconds
            else:
                found["weights gathered,\ngradients scattered"] += each.seconds
        return found


def points(recipe: Recipe, engine: str, fleet: Fleet, count: Parameters, images: int | None) -> list[Point]:
    """Return the points of an engine of ENGINES on whole nodes, from one to MOST GPUs, if it fits.

    `images` is the number of images per GPU and step (weak scaling); None stands for the recipe's images per step
    (strong scaling). Images that do not fit at once are split into micro-batches.
    """
    found, gpus = [], fleet.per_node
    while gpus <= MOST:
        replicas = gpus // fleet.per_node if engine == "fsdp, a replica a node" else 1
        layout = Layout(engine.partition(",")[0], gpus, replicas)
        batch = recipe.schedule.batch_size if images is None else images * gpus
        fitting = _fitting(recipe, batch, layout, fleet._replace(gpus=gpus), count)
        found += [] if fitting is None else [Point(gpus, fitting)]
        gpus *= 2
    return found


def _fitting(recipe: Recipe, batch: int, layout: Layout, fleet: Fleet, count: Parameters) -> Row | None:
    """Return the smallest power of two of micro-batches that fits."""
    accumulate = 1
    while batch % (fleet.gpus * accumulate) == 0:
        schedule = recipe.schedule.model_copy(update={"batch_size": batch, "accumulate": accumulate})
        found = row(recipe.model_copy(update={"schedule": schedule}), layout, fleet, count)
        if found.fits:
            return found
        accumulate *= 2
    return None


def report(recipe: Recipe, fleet: Fleet, name: str, path: Path) -> str:
    """Draw both kinds of scaling into the file `path` with the title `name`, and return the figures as text.

    Raises UserError if there is nothing to draw.
    """
    engine = "fsdp, a replica a node" if recipe.engine.replicas > 1 else recipe.engine.kind
    if engine not in ENGINES:
        raise UserError(f"engine.kind={engine}: scaling is drawn for ddp and fsdp")
    images, count = recipe.schedule.batch_size // fleet.gpus, parameters(recipe)
    kinds = {
        f"weak scaling: {images} images a GPU": images,
        f"strong scaling: {recipe.schedule.batch_size} images a step": None,
    }
    found = {
        kind: {each: points(recipe, each, fleet, count, images) for each in ENGINES} for kind, images in kinds.items()
    }
    lines, terms = [], "; ".join(term.replace("\n", " ") for term in TERMS)
    for kind, engines in found.items():
        if not engines[engine]:
            raise UserError(f"{kind}: {engine} fits on no number of GPUs; model.checkpointing=full needs less memory")
        lines += [kind, f"  {'':<23}{'GPUs':>6}{'images/s':>10}{'of ideal':>10}{'ms a step':>13}: {terms}"]
        lines += [_line(each, point) for each, line in engines.items() for point in line]
    _draw(found, engine, fleet, f"{name}: {count.total / 1e6:,.0f} M parameters on {fleet.gpu.name}", path)
    return "\n".join([*lines, "", _assumed(fleet), f"wrote {path}"])


def _line(engine: str, point: Point) -> str:
    terms = "".join(f"{1e3 * seconds:>9,.1f}" for seconds in point.terms().values())
    return (
        f"  {engine:<23}{point.gpus:>6,}{point.images_per_s:>10,.0f}{point.efficiency:>10.0%}"
        f"{1e3 * point.seconds:>13,.1f}: {terms}"
    )


def _assumed(fleet: Fleet) -> str:
    from mimae.plan import communication as c

    return (
        f"assumed: {fleet.share:.0%} of the peak while computing; nodes of {fleet.per_node}; {c.LINKS:.0%} of "
        f"{fleet.gpu.link:g} GB/s in a node and of {fleet.gpu.network:g} GB/s a GPU between nodes;\n"
        f"{c.HOP_INSIDE * 1e6:g} and {c.HOP_ACROSS * 1e6:g} µs a hop; communication hides behind {c.OVERLAP:.0%} of "
        f"computing; {CORES} cores a GPU, each making {CORE_RATE} images/s"
    )


def _draw(found: dict[str, dict[str, list[Point]]], engine: str, fleet: Fleet, title: str, path: Path) -> None:
    """Draw the picture. `engine` is the one whose steps are divided into terms."""
    from matplotlib.figure import Figure
    from PIL import Image

    figure = Figure(figsize=(11, 8.5), layout="constrained")
    axes: Any = figure.subplots(3, 2, sharex=True, sharey="row", height_ratios=(3, 3, 2))
    for column, (kind, engines) in zip(axes.T, found.items(), strict=True):
        column[0].set_title(kind, fontsize=11)
        _throughput(column[0], engines)
        _terms(column[1], engine, engines[engine])
        _data(column[2], engines, fleet)
        column[2].set_xlabel("GPUs")
    for ax in axes.flat:
        ax.set_xscale("log", base=2)
        ax.set_xlim(fleet.per_node * 0.9, MOST * 1.5)
        ax.set_yscale("log")
        ax.grid(color="#e5e5e5", linewidth=0.6)
        ax.xaxis.set_major_formatter("{x:,.0f}")
        ax.spines[["top", "right"]].set_visible(False)
    rows = {"images/s": "engines", "seconds of a step": "what a step has", "images/s of a node": "data"}
    for (left, right), (label, legend) in zip(axes, rows.items(), strict=True):
        left.set_ylabel(label)
        right.legend(
            title=legend, loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8, frameon=False, alignment="left"
        )
    figure.suptitle(title, fontsize=13)
    figure.supxlabel(_assumed(fleet), fontsize=8, color="#555555")
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=100)
    # With few colours a picture takes a third of the bytes.
    Image.open(drawn).convert("RGB").quantize(64).save(path, optimize=True)


def _throughput(ax: Axes, engines: dict[str, list[Point]]) -> None:
    longest = max(engines.values(), key=len)
    ideal = [point.row.recipe.schedule.batch_size / point.row.computing for point in longest]
    ax.plot(_gpus(longest), ideal, "--", color="#888888", label="ideal: computing only")
    for engine, line in engines.items():
        ax.plot(_gpus(line), [p.images_per_s for p in line], "o-", ms=4, color=ENGINES[engine], label=engine)
    best = max((line[-1] for line in engines.values() if line), key=lambda point: point.images_per_s)
    ax.annotate(f" {best.efficiency:.0%}", (best.gpus, best.images_per_s), fontsize=9)


def _terms(ax: Axes, engine: str, line: list[Point]) -> None:
    ax.plot(_gpus(line), [point.seconds for point in line], color="#888888", linewidth=6, alpha=0.4, label="the step")
    for term, color in TERMS.items():
        seconds = [point.terms()[term] or math.nan for point in line]
        ax.plot(_gpus(line), seconds, "o-", ms=3, color=color, label=term)
    ax.set_title(f"{engine}: terms, hidden or not", fontsize=10)
    late = next((point.gpus for point in line if point.efficiency < 0.5), None)
    if late is not None:
        ax.axvline(late, color="#888888", linestyle=":")
        where = ax.get_xaxis_transform()
        ax.text(late, 0.98, " waits longer\n than it computes", transform=where, fontsize=8, va="top")


def _data(ax: Axes, engines: dict[str, list[Point]], fleet: Fleet) -> None:
    for engine, line in engines.items():
        needed = [p.row.images_per_s * fleet.per_node / p.gpus for p in line]
        ax.plot(_gpus(line), needed, "o-", ms=4, color=ENGINES[engine], label=f"{engine} needs")
    ax.axhline(fleet.per_node * CORES * CORE_RATE, color=TERMS["data"], linestyle="--", label="loaders make")


def _gpus(line: Sequence[Point]) -> list[int]:
    return [point.gpus for point in line]
