"""The arguments of `mimae plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mimae.config.command import Overrides, RecipeName
from mimae.plan.gpus import GPUS


def plan(
    recipe: RecipeName,
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(help="GPUs of the run", min=1)] = 8,
    gpu: Annotated[str, typer.Option(help=f"one of {', '.join(GPUS)}")] = "h100",
    nodes_of: Annotated[int, typer.Option(help="GPUs of a node", min=1)] = 8,
    share: Annotated[float, typer.Option(help="share of the peak reached while computing", min=0.01, max=1)] = 0.45,
    images: Annotated[int, typer.Option(help="images in the data set [default: ImageNet-1k's]", min=1)] = 1_281_167,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="run a step on this number of ranks with fake tensors, and compare it with the plan",
        ),
    ] = False,
    scaling: Annotated[
        Path | None, typer.Option(help="write a picture here of the recipe on one node and more, up to 1,024 GPUs")
    ] = None,
) -> None:
    """Plan a run: its memory, communication and time by engine.

    The last line names the best engine.
    """
    from mimae.config.load import load_recipe
    from mimae.outside.output import as_json
    from mimae.outside.text import say
    from mimae.plan.advice import document, report
    from mimae.plan.cost import Fleet, micro_batch
    from mimae.plan.gpus import find_gpu
    from mimae.plan.memory import Layout

    resolved = load_recipe(recipe, overrides or ()).recipe
    fleet = Fleet(find_gpu(gpu), gpus, nodes_of, share)
    micro_batch(resolved, gpus)  # raises for a batch that cannot be dealt evenly
    if dry_run:
        from mimae.plan import dry

        layout = Layout(resolved.engine.kind, gpus, resolved.engine.replicas)
        agrees = dry.report(resolved, layout, fleet.gpu, nodes_of)
        as_json({"agrees": agrees, "tolerance": dry.TOLERANCE})
        raise typer.Exit(not agrees)
    if scaling is not None:
        from mimae.plan.scaling import report as draw

        told = draw(resolved, fleet, Path(recipe).stem, scaling)
        if not as_json({"picture": scaling}):
            say(told)
        return
    if not as_json(document(resolved, fleet, images)):
        say(report(resolved, fleet, images))
