"""The arguments of the verbs that train, one for each task, of `mimae extend` and of `mimae submit`."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from mimae.config.command import Overrides, RecipeName
from mimae.outside.text import say

Ranks = Annotated[int | None, typer.Option(help="processes on this machine [default: one for each GPU]", min=1)]
Nodes = Annotated[int, typer.Option(help="machines; the same command runs on each", min=1)]
Rendezvous = Annotated[str | None, typer.Option(help="HOST:PORT where they meet; HOST is one of them")]
Restarts = Annotated[int, typer.Option(help="restarts after a process died", min=0)]
Wait = Annotated[int, typer.Option(help="seconds after which a missing or silent node is lost", min=1)]
SecretFile = Annotated[
    Path | None, typer.Option(help="key file, the same on each, to sign messages between nodes [default: MIMAE_SECRET]")
]


def _verb(task: str, help: str, check: Callable[[Any], None] = lambda _: None) -> Callable[..., None]:
    """Return the command that trains recipes of a task; `check` raises UserError for those it is not for."""

    def train(
        recipe: RecipeName,
        overrides: Overrides = None,
        ranks: Ranks = None,
        nodes: Nodes = 1,
        rendezvous: Rendezvous = None,
        restarts: Restarts = 3,
        wait: Wait = 300,
        secret_file: SecretFile = None,
    ) -> None:
        from mimae.config.load import load_recipe
        from mimae.config.recipe import RECIPES

        resolved = load_recipe(recipe, overrides or (), None, RECIPES[task]).recipe  # Raises for another task's.
        check(resolved)
        job = (ranks, nodes, rendezvous, restarts, wait, secret_file)
        _launch(recipe, overrides or (), Path(resolved.run.dir), *job)

    train.__doc__ = help
    return train


def _launch(recipe: str, overrides: Sequence[str], run: Path, *job: Any) -> None:
    """Train in the processes of a job, whose options are the arguments of `default_job`, and exit."""
    # Set before torch is loaded. torch's store logs a lost node as a C++ trace; our own message is in plain words.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from mimae.launch import processes

    code = processes.train(recipe, overrides, processes.default_job(*job))
    _tell(run, code)
    raise typer.Exit(code)


def _tell(run: Path, code: int) -> None:
    """Print the state of a run, for --json: its last records, as they are in metrics.jsonl and epochs.jsonl."""
    from mimae.outside.files import Folder
    from mimae.outside.output import as_json
    from mimae.telemetry import records

    def last(name: str) -> dict[str, Any] | None:
        return next(reversed([*records.read(Folder(run), name, 1 << 18, tail=True)]), None)

    as_json({"run": run, "exit_code": code, "step": last("metrics.jsonl"), "epoch": last("epochs.jsonl")})


pretrain = _verb("pretrain", "Pretrain by a recipe, or resume an interrupted run.\n\nUses all GPUs of the machine.")

finetune = _verb(
    "classify",
    "Fine-tune a classifier by a recipe, or resume an interrupted run.\n\nUses all GPUs of the machine.",
)


def _is_linear(recipe: Any) -> None:
    from mimae.errors import UserError

    if recipe.finetune.freeze != "all":
        raise UserError(
            f"finetune.freeze={recipe.finetune.freeze}: mimae linear trains a classifier on a frozen encoder, "
            "finetune.freeze=all; mimae finetune trains the encoder too"
        )


linear = _verb(
    "classify",
    "Train a linear classifier on a frozen encoder, or resume an interrupted run.\n\nAs mimae finetune, by recipes "
    "with finetune.freeze=all.",
    _is_linear,
)

segment = _verb(
    "segment",
    "Train a model that finds the class of each pixel, or resume an interrupted run.\n\nUses all GPUs of the machine.",
)


def extend(
    run: Annotated[Path, typer.Argument(help="directory of the run")],
    overrides: Annotated[list[str], typer.Argument(metavar="KEY=VALUE...", help="for example schedule.epochs=800")],
    ranks: Ranks = None,
    nodes: Nodes = 1,
    rendezvous: Rendezvous = None,
    restarts: Restarts = 3,
    wait: Wait = 300,
    secret_file: SecretFile = None,
) -> None:
    """Train a run longer than it was planned, by a new schedule from its last step on.

    The images of each epoch, their order and their masks do not change. The learning rate rises from its present value
    to its peak in schedule.warmup_epochs epochs, and then follows schedule.shape. The same command resumes an
    interrupted extension.
    """
    from mimae.errors import UserError

    if not (run / "config.yaml").is_file():
        raise UserError(f"{run} is not a run directory: it has no config.yaml")
    for override in overrides:
        if override.partition("=")[0].strip() in ("run.dir", "run.extend"):
            raise UserError(
                f"{override}: mimae extend continues {run} where it is; model.init={run} starts another run from its "
                "weights"
            )
    asked = [*overrides, f"run.dir={run}", "run.extend=true"]
    _launch(str(run / "config.yaml"), asked, run, ranks, nodes, rendezvous, restarts, wait, secret_file)


detect = _verb("detect", "Train a detector of boxes and masks, from an encoder or from random weights.")


def submit(
    recipe: RecipeName,
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(help="machines", min=1)] = 1,
    gpus: Annotated[int, typer.Option(help="GPUs of each machine, with one rank for each GPU", min=1)] = 8,
    time: Annotated[
        str, typer.Option(help="time limit of a job: minutes, HH:MM:SS or D-HH; a run may take many jobs")
    ] = "24:00:00",
    partition: Annotated[str | None, typer.Option(help="SLURM's partition")] = None,
    account: Annotated[str | None, typer.Option(help="SLURM's account")] = None,
    qos: Annotated[str | None, typer.Option(help="SLURM's quality of service")] = None,
    constraint: Annotated[str | None, typer.Option(help="features of the machines, for example a100")] = None,
    cpus: Annotated[int, typer.Option(help="cores for each GPU", min=1)] = 12,
    memory: Annotated[str | None, typer.Option(help="memory of a machine, for example 480G [default: SLURM's]")] = None,
    container: Annotated[str | None, typer.Option(help="container image to run in (pyxis' --container-image)")] = None,
    seeds: Annotated[
        str | None, typer.Option(help="for example 0,1,2: a job array with one run for each seed, in run.dir/seed-K")
    ] = None,
    restarts: Restarts = 3,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the script without submitting it")] = False,
) -> None:
    """Submit a run to SLURM.

    When the job's time ends or the job is preempted, the run is saved and the job is queued again.
    """
    from mimae.config.load import load_recipe
    from mimae.config.recipe import RunRecipe
    from mimae.launch.job import check_ranks
    from mimae.launch.submit import Training, check_time, executor, runs
    from mimae.outside.output import as_json

    numbers = _numbers(seeds)
    resolved = load_recipe(recipe, overrides or (), None, RunRecipe).recipe
    check_ranks(resolved, nodes * gpus)
    jobs = [Training(recipe, each, gpus, restarts) for each in runs(recipe, overrides or (), numbers)]
    # A seed that is not legal has to be found before anything is in the queue.
    directories = [load_recipe(recipe, job.overrides, None, RunRecipe).recipe.run.dir for job in jobs]
    folder = Path(resolved.run.dir) / "slurm"
    made = executor(
        *(folder, container, dry_run),
        job_name="mimae",
        nodes=nodes,
        ntasks_per_node=1,
        gpus_per_node=gpus,
        cpus_per_task=cpus * gpus,
        time=check_time(time),
        partition=partition,
        account=account,
        qos=qos,
        constraint=constraint,
        mem=memory,
    )
    if dry_run:
        script = made._make_submission_file_text(made._submitit_command_str, "JOB")
        if not as_json({"script": script}):
            say(script.removesuffix("\n"))
        return
    submitted = made.map_array(lambda job: job(), jobs) if len(jobs) > 1 else [made.submit(jobs[0])]
    _tell_jobs(submitted, directories)


def _numbers(seeds: str | None) -> list[int]:
    """Return the seeds of --seeds. Raises UserError if one is no integer or is given twice."""
    from mimae.errors import UserError

    try:
        numbers = [int(seed) for seed in seeds.split(",")] if seeds else []
    except ValueError as error:
        raise UserError(f"--seeds {seeds}: legal is a list of integers, for example 0,1,2") from error
    if len(set(numbers)) < len(numbers):
        raise UserError(f"--seeds {seeds}: two jobs would share a run directory; give each seed once")
    return numbers


def _tell_jobs(jobs: Sequence[Any], directories: Sequence[str]) -> None:
    """Print each submitted job with the directory of its run."""
    from mimae.outside.output import as_json

    told = [
        {"job": job.job_id, "run": directory, "output": job.paths.stdout}
        for job, directory in zip(jobs, directories, strict=True)
    ]
    if as_json(told):
        return
    for each in told:
        say(f"job {each['job']}: {each['run']}; output in {each['output']}")
