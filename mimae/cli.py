"""The launcher: one command per verb. What a verb needs is imported inside it, so that --help is instant.

Exit codes: see `errors`.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import Annotated

import typer

from mimae import __version__
from mimae.errors import EXIT_MISTAKE, UserError

_OWN_ARGUMENTS = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def _plain(help: str | None = None) -> typer.Typer:
    """A group of commands without rich, whose import takes longer than the rest of --help."""
    return typer.Typer(
        help=help,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )


app = _plain("MI-MAE: pretraining by masking and mutual information.")
bench = _plain("Measure: speed and memory of a step and of its ops, the controls of the method.")
app.add_typer(bench, name="bench")
data = _plain("Data sets: look at them, pack them into shards.")
app.add_typer(data, name="data")

RecipeArgument = Annotated[str, typer.Argument(help="path or name of a recipe")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="overrides: masking.ratio=0.6")]


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(__version__)


@app.command()
def pretrain(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    ranks: Annotated[
        int | None, typer.Option(help="processes on this machine [default: one for each GPU]", min=1)
    ] = None,
    nodes: Annotated[int, typer.Option(help="machines; the same command runs on each", min=1)] = 1,
    rendezvous: Annotated[str | None, typer.Option(help="HOST:PORT where they meet, HOST being one of them")] = None,
    restarts: Annotated[int, typer.Option(help="new starts after a process died", min=0)] = 3,
    wait: Annotated[int, typer.Option(help="seconds after which a missing or silent node is lost", min=1)] = 300,
) -> None:
    """Pretrain by a recipe, or go on with an interrupted run. All GPUs of the machine take part."""
    # Before torch is loaded: what its store says of a node that is lost is said again, in words for people.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from mimae.launch import processes as launch

    job = launch.default_job(ranks, nodes, rendezvous, restarts, wait)
    raise typer.Exit(launch.pretrain(recipe, overrides or (), job))


@app.command()
def config(recipe: RecipeArgument, overrides: Overrides = None) -> None:
    """Print what a recipe resolves to, and whence each value."""
    from mimae.config import recipe as config

    print(config.explain(config.load(recipe, overrides or ())), end="")


@app.command()
def settings() -> None:
    """Print the reference of all settings (Markdown)."""
    from mimae.config import recipe as config

    print(config.reference(), end="")


def _mount(parent: typer.Typer, verb: str, module: str, help: str) -> None:
    """A verb whose arguments are those of `main` in its module, imported when the verb is used."""

    def run(context: typer.Context) -> None:
        command = _plain()
        command.command()(import_module(module).main)
        command(context.args, prog_name=context.command_path)

    parent.command(verb, help=help, context_settings=_OWN_ARGUMENTS)(run)


_mount(
    app,
    "plan",
    "mimae.plan.command",
    "What a recipe needs on so many GPUs, and the engine to take.",
)
_mount(app, "doctor", "mimae.tools.doctor", "What this machine has, what each part uses of it, and why.")
_mount(
    app, "submit", "mimae.launch.submit", "Pretrain as a SLURM job that saves and is queued again when its time ends."
)
_mount(app, "status", "mimae.tools.status", "Where a run stands.")
_mount(app, "replay", "mimae.tools.replay", "Run one step of a run again, and tell what in it is not finite.")
_mount(app, "convert", "mimae.tools.convert", "A checkpoint as DeepSpeed's universal one, and back.")
_mount(app, "probe", "mimae.evaluate.probe", "Judge frozen features: linear, few labels, kNN.")
_mount(
    app,
    "drill",
    "mimae.bench.harness.drill",
    "Harm tiny runs in every way, have them go on, and compare their weights.",
)
_mount(data, "check", "mimae.data.tools.check", "Look at every sample: what is broken, what comes twice.")
_mount(data, "pack", "mimae.data.tools.pack", "Write tar shards of a data set, resized if asked.")
_mount(data, "show", "mimae.tools.show", "A picture of samples as they are trained on, and of their masks.")
_mount(bench, "kernels", "mimae.bench.ops.kernels", "Time and memory of every op, beside plain PyTorch.")
_mount(bench, "gpu", "mimae.bench.gpu", "All that needs a GPU, into one file.")
_mount(bench, "step", "mimae.bench.step.step", "Speed and memory of a training step, with baselines.")
_mount(
    bench, "traffic", "mimae.bench.ops.traffic", "Bytes that the fused ops move, and their machine code; no GPU needed."
)
_mount(bench, "data", "mimae.bench.data.data", "Images per second of each loader, beside torchvision's and others'.")
_mount(bench, "engines", "mimae.bench.step.engines", "Speed and memory of each engine on this CPU, two ranks each.")
_mount(bench, "soak", "mimae.bench.harness.soak", "A loader for minutes while images go bad at random.")
_mount(bench, "controls", "mimae.bench.controls.controls", "Pretrain and probe the controls of the method.")


def main() -> None:
    try:
        app(prog_name="mimae")
    except UserError as mistake:
        rank = os.environ.get("RANK", "0")
        # A mistake in the settings is every rank's; one in the data may be one rank's alone.
        if rank == "0" or type(mistake).__name__ != "ConfigError":
            print(f"mimae{f' (rank {rank})' if rank != '0' else ''}: {mistake}", file=sys.stderr)
        sys.exit(EXIT_MISTAKE)
