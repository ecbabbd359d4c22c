"""The commands `mimae report`, `watch`, `compare` and `profile`, which analyse runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mimae.config.command import Overrides, RecipeName

RunPath = Annotated[Path, typer.Argument(help="the run's directory")]


def report(
    run: RunPath,
    out: Annotated[Path | None, typer.Option(metavar="FILE.html", help="the page [default: RUN/report.html]")] = None,
) -> None:
    """Write an HTML page about a run: curves, pictures, speed, memory, faults, recipe.

    The page is one file and needs no network. The run may still be in progress.
    """
    from mimae.outside.files import write_report
    from mimae.outside.output import as_json
    from mimae.outside.text import say
    from mimae.report.page import page
    from mimae.report.runs import read

    made = write_report(run, "report.html", page(read(run)), out)
    if not as_json({"page": made}):
        say(made)


def watch(
    run: RunPath,
    every: Annotated[float, typer.Option(help="seconds between two updates", min=0.2)] = 2.0,
) -> None:
    """Watch a run in the terminal, from its files, until it is finished.

    If stdout is not a terminal, the view is printed once. With --json each update is a line, until the run is finished.
    """
    from mimae.report.watch import watch

    watch(run, every)


def compare(
    runs: Annotated[list[Path], typer.Argument(help="directories of runs", metavar="RUN...")],
    baseline: Annotated[
        Path | None,
        typer.Option(help="a file that --save wrote, or a run; a regression or a missing figure gives exit code 1"),
    ] = None,
    tolerance: Annotated[
        float, typer.Option(help="a share; a figure that is worse by less is no regression", min=0.0, max=1.0)
    ] = 0.05,
    save: Annotated[Path | None, typer.Option(metavar="FILE.json", help="save these runs as a baseline")] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE.html", help="also write a page with the curves")] = None,
) -> None:
    """Compare runs: settings first, then curves, speed, memory, measures.

    Runs that differ only in the seed form one group, with a spread. With --baseline the exit code is 1 if a figure is
    worse by the tolerance or more and by more than noise explains, or if a run lacks a figure of the baseline.
    """
    from mimae.errors import UserError
    from mimae.outside.files import write_atomically
    from mimae.outside.output import as_json
    from mimae.outside.text import say
    from mimae.report import compare

    summaries = [compare.summary(run) for run in runs]
    reference = compare.load(baseline) if baseline is not None else []
    found = compare.contrast(summaries, reference, tolerance=tolerance)
    if not as_json(compare.as_dict(found)):
        say(compare.as_text(found))
        if baseline is not None:
            say("\n" + compare.verdict(found, tolerance))
    try:
        if save is not None:
            compare.save(save, summaries)
        if out is not None:
            write_atomically(out, compare.as_page(found))
    except OSError as error:
        raise UserError(f"{error.filename} cannot be written: {error.strerror}") from error
    if baseline is not None:
        raise typer.Exit(1 if found.regressions or found.missing else 0)


def profile(
    recipe: RecipeName,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(help="number of steps that are profiled", min=1, max=1000)] = 20,
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="write profile.json and a trace for Perfetto to this folder")
    ] = None,
) -> None:
    """Profile the training step of a recipe of any task on this machine.

    Prints time, FLOPs and memory by phase next to the planned figures, then advice that saves time. Nothing is saved.
    """
    import json

    from mimae.config.load import load_recipe
    from mimae.config.recipe import RunRecipe
    from mimae.errors import UserError
    from mimae.outside.files import write_atomically
    from mimae.outside.output import as_json
    from mimae.outside.text import say
    from mimae.report.profile import profile, show
    from mimae.report.profile.advice import advise

    resolved = load_recipe(recipe, overrides or (), None, RunRecipe).recipe
    try:
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
        found = profile.measure(resolved, steps, out)
        advice = advise(found)
        document = show.as_dict(found, advice)
        if out is not None:
            write_atomically(out / "profile.json", json.dumps(document, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"{error.filename or out} cannot be written: {error.strerror}") from error
    if as_json(document):
        return
    say(show.as_text(found, advice))
    if out is not None:
        say(f"\n{out / 'profile.json'}; {out / 'trace.json.gz'} opens in ui.perfetto.dev")
