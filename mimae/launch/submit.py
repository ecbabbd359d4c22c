"""A SLURM job of a run, written and submitted through submitit: `mimae submit`.

SLURM's signal before the end of the job's time, or before it is preempted, saves the run, and the job is queued again
and goes on from there: a run of days is a job of hours, repeated.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from mimae.config import recipe as config
from mimae.errors import EXIT_SAVED, UserError
from mimae.files import Folder
from mimae.launch import processes as launch

GRACE_SECONDS = 180
"""Between SLURM's signal and the end of the job: time to save."""


class Pretraining(NamedTuple):
    """What SLURM runs on each node: the launcher of its ranks."""

    recipe: str
    overrides: tuple[str, ...]
    ranks: int
    restarts: int

    def __call__(self) -> int:
        """Returns the launcher's exit code; after a signal the job's first node has it queued again."""
        code = launch.pretrain(self.recipe, self.overrides, launch.default_job(self.ranks, 1, None, self.restarts))
        if code == EXIT_SAVED and os.environ.get("SLURM_NODEID", "0") == "0":
            subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], check=True)
        return code


def minutes(time: str) -> int:
    """SLURM's forms of a time, rounded up: `90` (minutes), `12:00:00`, `2-00`, `1-12:30:00`. Raises UserError."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time)
    if match is None:
        raise UserError(f"--time {time}: legal are minutes, HH:MM:SS and D-HH[:MM[:SS]]")
    days, first, second, third = match.groups()
    if days is not None:
        seconds = ((int(days) * 24 + int(first)) * 60 + int(second or 0)) * 60 + int(third or 0)
    elif third is not None:
        seconds = (int(first) * 60 + int(second)) * 60 + int(third)
    else:
        seconds = int(first) * 60 + int(second or 0)
    return -(-seconds // 60)


def executor(folder: Path, container: str | None, is_dry: bool, **parameters: Any) -> Any:
    """submitit's, with the job's parameters. Raises UserError without submitit, or without SLURM unless `is_dry`."""
    if find_spec("submitit") is None:
        raise UserError("submitit is not installed: pip install 'mimae[slurm]'")
    import submitit

    class Writer(submitit.SlurmExecutor):
        """Writes scripts where there is no SLURM too."""

        @classmethod
        def affinity(cls) -> int:
            return 2

    if not is_dry and submitit.SlurmExecutor.affinity() <= 0:
        raise UserError("there is no srun on this machine: submit from a login node of the cluster, or add --dry-run")
    if not is_dry:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            Folder(folder.parent).folder(folder.name)  # which must not be a link
        except OSError as error:
            raise UserError(f"{folder} cannot be written: {error.strerror}") from error
    # The Python inside a container is not the one that submits.
    made = (Writer if is_dry else submitit.SlurmExecutor)(folder, python="python" if container else None)
    made.update_parameters(
        # The signal that launcher and ranks take for a wish to save, so that submitit does not act on one of its own.
        setup=["export SUBMITIT_PREEMPT_SIGNAL=USR1"],
        additional_parameters={"requeue": True, "open-mode": "append", "signal": f"USR1@{GRACE_SECONDS}"},
        **({"srun_args": [f"--container-image={container}"]} if container else {}),
        **{key: value for key, value in parameters.items() if value is not None},
    )
    return made


def runs(recipe: str, overrides: Sequence[str], seeds: Sequence[int]) -> list[tuple[str, ...]]:
    """The overrides of each run: one, or one for each seed in a directory of its own. Raises UserError."""
    directory = config.load(recipe, overrides).recipe.run.dir
    if not seeds:
        return [tuple(overrides)]
    return [(*overrides, f"seed={seed}", f"run.dir={directory}/seed-{seed}") for seed in seeds]


def main(
    recipe: Annotated[str, typer.Argument(help="path or name of a recipe")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="overrides")] = None,
    nodes: Annotated[int, typer.Option(help="machines", min=1)] = 1,
    gpus: Annotated[int, typer.Option(help="GPUs of each, one rank a GPU", min=1)] = 8,
    time: Annotated[str, typer.Option(help="of a job: minutes, HH:MM:SS or D-HH; the run may take many")] = "24:00:00",
    partition: Annotated[str | None, typer.Option(help="SLURM's partition")] = None,
    account: Annotated[str | None, typer.Option(help="SLURM's account")] = None,
    qos: Annotated[str | None, typer.Option(help="SLURM's quality of service")] = None,
    constraint: Annotated[str | None, typer.Option(help="features of the machines, as a100")] = None,
    cpus: Annotated[int, typer.Option(help="cores for each GPU", min=1)] = 12,
    memory: Annotated[str | None, typer.Option(help="of a machine, as 480G [default: SLURM's]")] = None,
    container: Annotated[str | None, typer.Option(help="image to run in (pyxis' --container-image)")] = None,
    seeds: Annotated[str | None, typer.Option(help="0,1,2: an array of a run for each seed, in run.dir/seed-K")] = None,
    restarts: Annotated[int, typer.Option(help="new starts after a process died", min=0)] = 3,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the script and submit nothing")] = False,
) -> None:
    """Submit a run to SLURM; saved and queued again when its time ends or it is preempted."""
    try:
        numbers = [int(seed) for seed in seeds.split(",")] if seeds else []
    except ValueError as error:
        raise UserError(f"--seeds {seeds}: legal is a list of integers, as 0,1,2") from error
    jobs = [Pretraining(recipe, each, gpus, restarts) for each in runs(recipe, overrides or (), numbers)]
    folder = Path(config.load(recipe, overrides or ()).recipe.run.dir) / "slurm"
    made = executor(
        *(folder, container, dry_run),
        job_name="mimae",
        nodes=nodes,
        ntasks_per_node=1,
        gpus_per_node=gpus,
        cpus_per_task=cpus * gpus,
        time=minutes(time),
        partition=partition,
        account=account,
        qos=qos,
        constraint=constraint,
        mem=memory,
    )
    if dry_run:
        print(made._make_submission_file_text(made._submitit_command_str, "JOB"), end="")
        return
    submitted = made.map_array(lambda job: job(), jobs) if len(jobs) > 1 else [made.submit(jobs[0])]
    for job, each in zip(submitted, jobs, strict=True):
        print(f"job {job.job_id}: {config.load(recipe, each.overrides).recipe.run.dir}; output in {job.paths.stdout}")
