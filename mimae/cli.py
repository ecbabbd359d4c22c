"""The command line: the commands of `mimae`, and the exit codes (see `errors`).

A command is one typed function in the `command.py` of its folder. Its arguments and its docstring are the help; its
body imports what it needs when it runs. Command modules import little, so that every --help is instant.
"""

from __future__ import annotations

import errno
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from functools import wraps
from itertools import pairwise
from typing import Annotated, Any

import typer

from mimae import __version__
from mimae.bench.controls.command import controls
from mimae.bench.data.command import data as bench_data
from mimae.bench.gpu.command import gpu
from mimae.bench.harness.command import drill, flat, fuzz, soak
from mimae.bench.ops.command import kernels, traffic
from mimae.bench.step.command import budget, engines, step
from mimae.bench.tasks.command import starts, tasks
from mimae.config.command import config, settings
from mimae.data.command import check, pack
from mimae.errors import EXIT_MISTAKE, ConfigError, UserError
from mimae.evaluate.command import probe
from mimae.launch.command import detect, extend, finetune, linear, pretrain, segment, submit
from mimae.outside import output
from mimae.outside.text import Loss, Stream, losses, open_standard_streams, say
from mimae.outside.threads import yield_cores
from mimae.report.command import compare, profile, report, watch
from mimae.tools.command import convert, doctor, evaluate, plan, predict, replay, show, status
from mimae.transfer.command import embed, export, features_map, neighbours, reconstruct

Quiet = Annotated[bool, typer.Option("--quiet", help="no progress: only results and errors")]
AsJson = Annotated[bool, typer.Option("--json", help="print the result as JSON; all else goes to stderr")]

_REFUSALS = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP),
    *(errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE),
)
"""Reasons for which the system refuses a file that a user names. Others, such as a missing file, may be our fault."""

_FULL = (errno.ENOSPC, errno.EDQUOT)
"""Reasons why a file that is open cannot grow. Such an error does not name the file."""


def _command(verb: Callable[..., None]) -> Callable[..., None]:
    """Return a verb with the two options that all commands have."""

    @wraps(verb)
    def command(*, quiet: bool, as_json: bool, **arguments: Any) -> None:
        with output.mode(quiet=quiet, machine=as_json):
            try:
                _run(verb, arguments)
                return
            except UserError as mistake:
                if not as_json:
                    raise
                _report(mistake, one_line=True)
        raise typer.Exit(EXIT_MISTAKE)

    signature = inspect.signature(verb, eval_str=True)
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=annotation)
        for name, annotation in {"quiet": Quiet, "as_json": AsJson}.items()
    ]
    parameters = [*signature.parameters.values(), *added]
    command.__annotations__ = {each.name: each.annotation for each in parameters}
    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return command


def _run(verb: Callable[..., None], arguments: dict[str, Any]) -> None:
    """Run a verb. A file that the system refuses, and results that could not be printed, are mistakes of the user.

    Raises UserError for them, and typer.Exit with the exit code of a verb that has one.
    """
    before = losses()
    try:
        verb(**arguments)
    except OSError as error:
        if error.errno not in (_FULL if error.filename is None else _REFUSALS):
            raise
        file = "a file" if error.filename is None else os.fsdecode(error.filename)
        raise UserError(f"{file} cannot be used: {error.strerror}") from error
    except typer.Exit as end:
        if end.exit_code:
            raise
    _check_printed(before)


def _check_printed(before: Mapping[Stream, Loss]) -> None:
    """Raise UserError if something could not be printed on stdout since its losses were `before`."""
    lost = losses().get("stdout")
    # A reader that closed the pipe, as `head` does, has what it wants.
    if lost is not None and lost != before.get("stdout") and lost.reason != os.strerror(errno.EPIPE):
        raise UserError(f"the results are not complete: stdout cannot be written ({lost.reason})")


def _group(help: str, **verbs: Callable[..., None]) -> typer.Typer:
    """Return a group of commands without rich, because importing rich takes longer than the rest of --help."""
    group = typer.Typer(
        help=help,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
    for name, verb in verbs.items():
        group.command(name)(_command(verb))
    return group


app = _group(
    "MI-MAE: pretraining by masking and mutual information.",
    pretrain=pretrain,
    finetune=finetune,
    linear=linear,
    detect=detect,
    segment=segment,
    extend=extend,
    evaluate=evaluate,
    predict=predict,
    config=config,
    settings=settings,
    plan=plan,
    doctor=doctor,
    submit=submit,
    status=status,
    report=report,
    watch=watch,
    compare=compare,
    profile=profile,
    replay=replay,
    convert=convert,
    probe=probe,
    export=export,
    embed=embed,
    reconstruct=reconstruct,
    neighbours=neighbours,
    map=features_map,
    drill=drill,
)
app.add_typer(
    _group(
        "Measure the speed and memory of a step and of its ops, and run the controls of the method.",
        kernels=kernels,
        gpu=gpu,
        step=step,
        budget=budget,
        traffic=traffic,
        data=bench_data,
        engines=engines,
        tasks=tasks,
        starts=starts,
        soak=soak,
        flat=flat,
        fuzz=fuzz,
        controls=controls,
    ),
    name="bench",
)
app.add_typer(_group("Check data sets, pack them, show samples.", check=check, pack=pack, show=show), name="data")


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        before = losses()
        say(__version__)
        _check_printed(before)


def main() -> None:
    """Run the command line. A mistake of the user is printed without a traceback."""
    open_standard_streams()
    yield_cores(os.environ)  # This comes before any command imports torch.
    for stream in (sys.stdout, sys.stderr):
        # A file name must not end a command because the terminal's encoding lacks its characters.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        app(_under_new_names(sys.argv[1:]), prog_name="mimae")
    except UserError as mistake:
        _report(mistake)
        sys.exit(EXIT_MISTAKE)
    except OSError as error:  # --help, which is printed before any command runs
        if error.filename is not None or error.errno not in (*_FULL, errno.EIO):
            raise
        _report(UserError(f"stdout cannot be written ({error.strerror})"))
        sys.exit(EXIT_MISTAKE)


def _under_new_names(arguments: list[str]) -> list[str]:
    """Return the arguments of a bench with `--out FILE.json` in place of `--json FILE.json`, its old name."""
    found = list(arguments)
    if arguments[:1] in (["drill"], ["bench"]):
        for i, (option, value) in enumerate(pairwise(arguments)):
            if option == "--json" and value.endswith(".json"):
                found[i] = "--out"
                say(f"--json {value} has a new name: it is read as --out {value}", error=True)
    return found


def _report(mistake: UserError, one_line: bool = False) -> None:
    """Print a mistake on stderr, if this rank is the one to report it."""
    rank = os.environ.get("RANK", "0")
    # A mistake in the settings concerns every rank; one in the data may concern only one rank.
    if rank == "0" or not isinstance(mistake, ConfigError):
        said = str(mistake)
        if one_line:
            said = "; ".join(line.strip() for line in said.splitlines()).replace(":; ", ": ", 1)
        say(f"mimae{f' (rank {rank})' if rank != '0' else ''}: {said}", error=True)
