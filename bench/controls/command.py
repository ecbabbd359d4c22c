"""The arguments of `mimae bench controls`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def controls(
    data: Annotated[
        list[str] | None, typer.Option(help="photos, or cifar=TRAIN:TEST; repeatable [default: photos]")
    ] = None,
    tune: Annotated[
        Path | None, typer.Option(help="run the trials that this file lists, on a split of the training set")
    ] = None,
    threads: Annotated[int, typer.Option(help="number of threads of a run", min=1)] = 1,
    jobs: Annotated[int, typer.Option(help="number of runs at a time", min=1)] = 2,
    results: Annotated[Path, typer.Option(help="folder of the result files")] = Path("bench/results"),
    runs: Annotated[Path, typer.Option(help="folder of the runs")] = Path("runs/controls"),
    docs: Annotated[Path, typer.Option(help="the page to write")] = Path("docs/controls.md"),
    render_only: Annotated[bool, typer.Option("--render", help="only write the page")] = False,
) -> None:
    """Pretrain and probe the controls of the method.

    With --tune, run the trials of a tuning. Finished trials are not run again.
    """
    import signal

    from mimae.bench.controls.page import load_results, render
    from mimae.bench.controls.running import Processes, Stopped, run_trials
    from mimae.bench.controls.trials import control_trials, tuning_trials
    from mimae.outside.output import as_json

    sets = data or ["photos"]
    stopped = False
    if not render_only:
        out = results / ("controls" if tune is None else "tuning")
        trials = [
            trial
            for each in sets
            for trial in (control_trials(each) if tune is None else tuning_trials(tune, each, runs))
        ]
        runner = Processes(threads)
        before = {number: signal.signal(number, runner.stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            run_trials(trials, out, runs if tune is None else runs / "tuning", jobs, runner)
        except Stopped:
            stopped = True
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    docs.parent.mkdir(parents=True, exist_ok=True)
    docs.write_text(render(load_results(results / "controls"), load_results(results / "tuning")), encoding="utf-8")
    if not as_json({"page": docs, "stopped": stopped}):
        print(f"wrote {docs}")
    if stopped:
        print("stopped: the same command continues from here")
        raise typer.Exit(75)
