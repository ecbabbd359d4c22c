"""Arguments of the commands that inspect a machine, a data set or a run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer


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
        print(f"{key:<12}{value}")


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
        print(title)
        width = max(map(len, section))
        for name, found in section.items():
            print(f"  {name:{width}}  {found}")


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
    print(out)
    for bad in batch.bad:
        print(f"replaced: {bad.path}: {bad.reason}")


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
    from mimae.errors import UserError
    from mimae.outside.files import Folder
    from mimae.outside.output import as_json
    from mimae.outside.text import say
    from mimae.tools.replay import HERE, logged, replay, report

    if not (run / "config.yaml").is_file():
        raise UserError(f"{run} is not a run directory: it has no config.yaml")
    recipe = load_run(run, [*HERE, *(overrides or ())], {"run": {"dir": str(run)}})
    if split > 1:
        accumulate = recipe.schedule.accumulate * split
        recipe = load_recipe(recipe, [f"schedule.accumulate={accumulate}"]).recipe
        print(f"--split {split}: the MI terms compare fewer images than in the run, so their losses differ")
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
            print(f"{made}: mimae pretrain {target}/config.yaml run.dir={target} continues from there")
    elif (source / "latest").is_file() and not (source / "config.yaml").exists():
        raise CheckpointError(
            f"{source} is DeepSpeed's own checkpoint: convert it first, with python -m "
            "deepspeed.checkpoint.ds_to_universal"
        )
    else:
        written = write(source, target, adam)
        if as_json({"written": written}):
            return
        print(
            f'{written}: with "checkpoint": {{"load_universal": true}} in DeepSpeed\'s settings '
            f"engine.load_checkpoint({str(target)!r}, load_lr_scheduler_states=False) continues there, and returns "
            "the buffers in the client state"
        )


def evaluate(
    run: Annotated[Path, typer.Argument(help="a run of a classifier, or one of its checkpoints")],
    data: Annotated[str | None, typer.Option(help="labelled images [default: the run's data.val_path]")] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="the measures, with those of each class")
    ] = None,
    picture: Annotated[Path | None, typer.Option(metavar="FILE.png", help="the confusion matrix")] = None,
    average: Annotated[bool, typer.Option("--average", help="the moving average of the weights")] = False,
) -> None:
    """Measure a trained classifier on labelled images.

    Its accuracy, overall and for each class.
    """
    from mimae.outside.files import write_atomically
    from mimae.outside.output import as_json
    from mimae.telemetry import confusion
    from mimae.tools.classifier import evaluate as run_evaluation
    from mimae.tools.classifier import load

    trained = load(run, average)
    name, found = run_evaluation(trained, data)
    classes = [trained.classes.name(place) for place in range(len(trained.classes))]
    measures = {"images": found.images, "top1": found.top1, "loss": found.loss}
    measures |= {"top5": found.top5} if len(classes) > 5 else {}
    shares = dict(zip(classes, found.per_class(), strict=True))
    report = {"run": str(run), "step": trained.step, "data": name, **measures, "classes": shares}
    if out is not None:
        write_atomically(out, json.dumps(report, indent=2) + "\n")
    if picture is not None:
        picture.write_bytes(confusion.matrix(found.confusion, classes))
    if as_json(report):
        return
    print(f"step {trained.step:,} of {run} on {found.images:,} images of {name}")
    print("  ".join(f"{key} {value:.4f}" for key, value in measures.items() if key != "images"))
    worst = sorted(shares, key=lambda key: 2 if shares[key] is None else shares[key])  # type: ignore[arg-type,return-value]
    width = max(map(len, worst[:20]))
    for key in worst[:20]:
        share = shares[key]
        print(f"  {key:<{width}}  {'no images' if share is None else f'{share:.4f}'}")
    if len(worst) > 20:
        print(f"  ... and {len(worst) - 20} classes with more, which --out lists")


def predict(
    run: Annotated[Path, typer.Argument(help="a run of a classifier, or one of its checkpoints")],
    data: Annotated[str, typer.Argument(metavar="PATH", help="images, in any form of data.path; labels are not read")],
    out: Annotated[Path, typer.Option(metavar="FILE.csv", help="a line for each image, in order")],
    top: Annotated[int, typer.Option(help="classes for each image, the most probable first", min=1)] = 1,
    average: Annotated[bool, typer.Option("--average", help="the moving average of the weights")] = False,
) -> None:
    """Write the class of each image of a data set, with its probability."""
    from mimae.errors import UserError
    from mimae.outside.output import as_json
    from mimae.tools.classifier import as_csv, heading, load, predictions

    trained = load(run, average)
    images = unread = 0
    try:
        with out.open("w", encoding="utf-8", errors="surrogateescape") as file:
            file.write(as_csv(heading(trained, top)))
            for row in predictions(trained, data, top):
                file.write(as_csv(row))
                images, unread = images + 1, unread + (len(row) == 1)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror}") from error
    if as_json({"file": out, "images": images, "unreadable": unread}):
        return
    print(
        f"{out}: {images:,} images"
        + (f", of which {unread:,} cannot be read: their lines have no class" * (unread > 0))
    )
