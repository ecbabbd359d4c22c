"""Arguments of the commands that inspect a machine, a data set or a run."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mimae.outside.text import printable, say
from mimae.plan.command import plan as plan_pretraining

if TYPE_CHECKING:
    from mimae.tools.predict import Evaluated

_SHOWN = 20
"""Classes that an evaluation prints."""


def status(run: Annotated[Path, typer.Argument(help="the run's directory")]) -> None:
    """Report the state of a run.

    Shows if it is running, its progress, and its last checkpoint.
    """
    from mimae.outside.output import as_json
    from mimae.tools.status import look

    found = look(run)
    if as_json(found):
        return
    for key, value in found.items():
        say(f"{key:<12}{value}")


def doctor() -> None:
    """Report what this machine has, and what can be used.

    Shows versions, GPUs, the implementation of each op with the reason, back ends, and obstacles to their use.
    """
    from contextlib import redirect_stdout

    from mimae.outside.output import as_json
    from mimae.tools.doctor import examine

    with redirect_stdout(sys.stderr):  # Some packages print a greeting when they are imported.
        report = examine()
    if as_json(report):
        return
    for title, section in report.items():
        say(title)
        width = max(map(len, section))
        for name, found in section.items():
            say(f"  {name:{width}}  {found}")


def show(
    path: Annotated[str, typer.Argument(help="a data path, as in data.path")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="settings")] = None,
    out: Annotated[Path, typer.Option(metavar="FILE.png", help="file for the picture")] = Path("samples.png"),
    recipe: Annotated[str | None, typer.Option(help="path or name of a recipe [default: default settings]")] = None,
    images: Annotated[int, typer.Option(help="number of samples to show", min=1, max=256)] = 8,
    epoch: Annotated[int, typer.Option(help="epoch of the crops, flips and masks", min=0)] = 0,
) -> None:
    """Draw samples as a recipe crops them, with their masks."""
    from mimae.config.load import load_recipe
    from mimae.data.loading.batch import DataError
    from mimae.outside.output import as_json
    from mimae.tools.show import show

    resolved = load_recipe(recipe or {}, overrides or (), {"data": {"path": path}}).recipe
    picture, batch = show(resolved, images, epoch)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(picture)
    except OSError as error:
        raise DataError(f"cannot write the picture {out}: {error.strerror}") from error
    if as_json({"picture": out, "replaced": [bad._asdict() for bad in batch.bad]}):
        return
    say(out)
    for bad in batch.bad:
        say(f"replaced: {printable(bad.path)}: {printable(bad.reason)}")


def replay(
    run: Annotated[Path, typer.Argument(help="the run's directory")],
    step: Annotated[int, typer.Option(help="the optimizer step, as in metrics.jsonl", min=1)],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="of this machine")] = None,
    split: Annotated[int, typer.Option(help="number of parts of each micro-batch, to save memory", min=1)] = 1,
) -> None:
    """Run one step of a run again, and find values that are not finite.

    Exits with 1 if anything in the step is not finite.
    """

    from mimae.config.kept import load_run
    from mimae.config.load import load_recipe
    from mimae.config.recipe import RunRecipe
    from mimae.errors import UserError
    from mimae.outside.files import Folder
    from mimae.outside.output import as_json
    from mimae.tools.replay import HERE, logged, replay, report

    if not (run / "config.yaml").is_file():
        raise UserError(f"{run} is not a run directory: it has no config.yaml")
    recipe = load_run(run, [*HERE, *(overrides or ())], {"run": {"dir": str(run)}}, RunRecipe)
    if split > 1:
        accumulate = recipe.schedule.accumulate * split
        recipe = load_recipe(recipe, [f"schedule.accumulate={accumulate}"], None, RunRecipe).recipe
        say(f"--split {split}: losses that depend on the whole micro-batch, as the MI terms do, differ from the run's")
    findings = replay(recipe, step)
    name = f"replay/step-{step:08d}.png"
    then = logged(run, step)
    document = findings._asdict() | {"step": step, "is_finite": findings.is_finite, "in_the_run": then}
    if not as_json(document | {"picture": run / name}):
        say(report(findings, then))
    try:
        Folder(run).replace(name, findings.picture)
        say(run / name)
    except OSError as error:
        say(f"{run / name} cannot be written: {error.strerror}")
    raise typer.Exit(0 if findings.is_finite else 1)


def convert(
    source: Annotated[Path, typer.Argument(help="a run, one of its checkpoints, or a universal checkpoint")],
    target: Annotated[Path, typer.Argument(help="a folder for the universal checkpoint, or a run with a config.yaml")],
    adam: Annotated[
        Literal["torch", "deepspeed"],
        typer.Option(help="owner of the AdamW that will continue from it"),
    ] = "torch",
) -> None:
    """Convert a checkpoint to DeepSpeed's universal format, or back.

    The kind of SOURCE decides the direction.
    """
    from mimae.errors import CheckpointError
    from mimae.outside.output import as_json
    from mimae.tools.convert import read, root_of, write

    if root_of(source) is not None:
        made = read(source, target)
        if not as_json({"written": made}):
            say(f"{made}: the command that started {target} continues from there")
    elif (source / "latest").is_file() and not (source / "config.yaml").exists():
        raise CheckpointError(
            f"{source} is DeepSpeed's own checkpoint: convert it first, with python -m "
            "deepspeed.checkpoint.ds_to_universal"
        )
    else:
        written = write(source, target, adam)
        if as_json({"written": written}):
            return
        say(
            f'{written}: with "checkpoint": {{"load_universal": true}} in DeepSpeed\'s settings '
            f"engine.load_checkpoint({str(target)!r}, load_lr_scheduler_states=False) continues there, and returns "
            "the buffers in the client state"
        )


Settings = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="settings, as segment.val_masks=FOLDER")
]
Average = Annotated[bool, typer.Option("--average", help="the moving average of the weights")]


def evaluate(
    run: Annotated[Path, typer.Argument(help="a run, or one of its checkpoints")],
    overrides: Settings = None,
    data: Annotated[str | None, typer.Option(help="labelled images [default: the run's data.val_path]")] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="the measures, with those of each class")
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="what the run draws of an evaluation, as a confusion matrix")
    ] = None,
    average: Average = False,
) -> None:
    """Measure a trained model on labelled images.

    With the measures of its task, overall and for each class.
    """
    from mimae.errors import UserError
    from mimae.outside.files import write_atomically
    from mimae.outside.output import as_json
    from mimae.tools.predict import evaluate as run_evaluation
    from mimae.train.trained import load

    trained = load(run, average, overrides or (), data)
    found = run_evaluation(trained, draw=picture is not None)
    details = found.details
    report = {"run": str(run), "step": trained.step, "data": found.data, **found.measures}
    if details is not None:
        report |= {"images": details.images, "left_out": details.left_out}
        report |= {"of_classes": details.measure, "classes": details.classes}
    if not as_json(report):
        _print_evaluation(run, trained.step, found)
    try:
        if out is not None:
            write_atomically(out, json.dumps(report, indent=2) + "\n")
        if picture is not None and found.picture is not None:
            write_atomically(picture, found.picture)
    except OSError as error:
        raise UserError(f"{error.filename} cannot be written: {error.strerror}") from error


def _print_evaluation(run: Path, step: int, found: Evaluated) -> None:
    details = found.details
    left_out = f", {details.left_out:,} left out, which cannot be read" if details and details.left_out else ""
    number = f"{details.images:,} images of " if details else ""
    say(f"step {step:,} of {run} on {number}{found.data}{left_out}")
    say("  ".join(f"{key} {value:.4f}" for key, value in found.measures.items()))
    if details is not None:
        _print_classes(details.measure, details.classes)


def _print_classes(measure: str, classes: Mapping[str, float | None]) -> None:
    """Print a measure of each class, the worst first."""
    worst = sorted(classes, key=lambda key: 2.0 if (value := classes[key]) is None else value)
    names = [printable(key) for key in worst[:_SHOWN]]
    width = max(map(len, names), default=0)
    say(f"{measure} of each class:")
    for key, name in zip(worst, names, strict=False):
        value = classes[key]
        say(f"  {name:<{width}}  {'absent' if value is None else f'{value:.4f}'}")
    if len(worst) > _SHOWN:
        say(f"  ... and {len(worst) - _SHOWN} classes with more, which --out lists")


def predict(
    run: Annotated[Path, typer.Argument(help="a run, or one of its checkpoints")],
    data: Annotated[str, typer.Argument(metavar="PATH", help="an image, or images in any form of data.path")],
    out: Annotated[
        Path,
        typer.Option(metavar="OUT", help="FILE.csv of classes, FILE.json of objects as COCO has them, FOLDER of masks"),
    ],
    overrides: Settings = None,
    overlays: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="masks, objects: a picture of each image with them")
    ] = None,
    top: Annotated[
        int | None, typer.Option(help="classes: how many for each image, the most probable first [default: 1]", min=1)
    ] = None,
    average: Average = False,
) -> None:
    """Write what a trained model finds in each image of a data set: its class, its objects, or a mask.

    Labels are not read. What is found goes to OUT image by image.
    """
    from mimae.outside.output import as_json
    from mimae.tools.predict import predict as run_prediction
    from mimae.tools.predict import predictor
    from mimae.train.predictors.base import Options
    from mimae.train.trained import load

    trained = load(run, average, overrides or ())
    finds = predictor(trained, Options(top, overlays))
    found = run_prediction(trained, finds, data, out, overlays)
    if as_json({"file": out, "images": found.images, "unreadable": found.unread}):
        return
    unread = f", of which {found.unread:,} cannot be read" * (found.unread > 0)
    say(f"{out}: {finds.out} of {found.images:,} images{unread}")
    for path in found.listed:
        say(f"  {printable(path)}")
    if found.unread > len(found.listed):
        say(f"  and {found.unread - len(found.listed):,} more")


@wraps(plan_pretraining)
def plan(**given: Any) -> None:
    """Plan a recipe of any task; those of pretraining as `mimae.plan` does."""
    from mimae.config.load import load_recipe
    from mimae.config.recipe import Recipe, RunRecipe

    resolved = load_recipe(given["recipe"], given["overrides"] or (), None, RunRecipe).recipe
    if isinstance(resolved, Recipe):
        plan_pretraining(**given)
        return
    from mimae.errors import UserError
    from mimae.outside.output import as_json
    from mimae.plan.cost import Fleet
    from mimae.plan.gpus import find_gpu
    from mimae.tools.plan import document, report

    for option, is_given in (("--dry-run", given["dry_run"]), ("--scaling", given["scaling"] is not None)):
        if is_given:
            raise UserError(
                f"{option} is for pretraining, which has formulas of its own; the plan of task={resolved.task} is "
                "counted on fake tensors in any case"
            )
    fleet = Fleet(find_gpu(given["gpu"]), given["gpus"], given["nodes_of"], given["share"])
    found = document(resolved, fleet, given["images"])
    if not as_json(found):
        say(report(found, fleet))
