"""`mimae plan`: what a recipe costs on so many GPUs, with each engine, and which to take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mimae.config import recipe as config
from mimae.errors import UserError
from mimae.plan.gpus import GPUS, find_gpu


def main(
    recipe: Annotated[str, typer.Argument(help="path or name of a recipe")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="overrides")] = None,
    gpus: Annotated[int, typer.Option(help="GPUs of the run", min=1)] = 8,
    gpu: Annotated[str, typer.Option(help=f"one of {', '.join(GPUS)}")] = "h100",
    nodes_of: Annotated[int, typer.Option(help="GPUs of a node", min=1)] = 8,
    share: Annotated[float, typer.Option(help="of the peak, while computing", min=0.01, max=1)] = 0.45,
    images: Annotated[int, typer.Option(help="images in the data set [default: ImageNet-1k's]", min=1)] = 1_281_167,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="a step of the recipe's engine on so many ranks, without their memory: is the plan right?"
        ),
    ] = False,
    scaling: Annotated[
        Path | None, typer.Option(help="a picture here of the recipe on one node and on more, to 1,024 GPUs")
    ] = None,
) -> None:
    """Plan a run: memory, communication and time by engine, and which to take."""
    from mimae.plan.cost import Fleet

    resolved = config.load(recipe, overrides or ()).recipe
    fleet = Fleet(find_gpu(gpu), gpus, nodes_of, share)
    parts = gpus * resolved.schedule.accumulate
    if resolved.schedule.batch_size % parts:
        near = max(round(resolved.schedule.batch_size / parts), 1) * parts
        raise UserError(
            f"schedule.batch_size={resolved.schedule.batch_size} must be divisible by {parts} = GPUs ({gpus}) x "
            f"schedule.accumulate={resolved.schedule.accumulate}, as {near} is"
        )
    if dry_run:
        from mimae.plan import dry
        from mimae.plan.memory import Layout

        layout = Layout(resolved.engine.kind, gpus, resolved.engine.replicas)
        raise typer.Exit(not dry.report(resolved, layout, fleet.gpu, nodes_of))
    if scaling is not None:
        from mimae.plan.scaling import report as draw

        print(draw(resolved, fleet, Path(recipe).stem, scaling))
        return
    from mimae.plan.advice import report

    print(report(resolved, fleet, images))
