"""The arguments of `mimae bench step` and `mimae bench engines`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer


def step(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="overrides: masking.ratio=0.6")
    ] = None,
    peers: Annotated[
        bool, typer.Option("--peers", help="add transformers' and lightly's MAE, with one view per image")
    ] = False,
    peer: Annotated[
        list[str] | None, typer.Option(help="compare only with transformers or lightly, with one view; repeatable")
    ] = None,
    recipe: Annotated[str | None, typer.Option(help="path or name of a recipe [default: default settings]")] = None,
    model: Annotated[str | None, typer.Option(help="model.size [default: the recipe's]")] = None,
    batch: Annotated[int, typer.Option(help="images per step; at one view per image times --masks", min=2)] = 4,
    masks: Annotated[int | None, typer.Option(help="masking.num_masks [default: the recipe's]")] = None,
    precision: Annotated[str | None, typer.Option(help="fp32 or bf16 [default: the recipe's]")] = None,
    baseline: Annotated[
        list[str] | None,
        typer.Option(
            help="eager or compiled: the same method in plain PyTorch; repeatable "
            "[default: eager, or none beside --variant, --peer and --against]"
        ),
    ] = None,
    variant: Annotated[
        list[str] | None,
        typer.Option(help="this system with other settings: key=value, several in quotes; repeatable"),
    ] = None,
    against: Annotated[
        list[Path] | None, typer.Option(metavar="CHECKOUT", help="another version of this repository; repeatable")
    ] = None,
    rounds: Annotated[
        int, typer.Option(help="number of rounds, with a turn of every contender in each; 0: only memory", min=0)
    ] = 5,
    memory: Annotated[
        bool | None,
        typer.Option(
            "--memory/--no-memory",
            help="count memory, and measure each contender's peak in a process of its own "
            "[default: yes; without rounds only count]",
        ),
    ] = None,
    matrix_rate: Annotated[
        bool, typer.Option("--roof/--no-roof", help="measure the rate of matrix products first")
    ] = True,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="write the result here, anew after each number")
    ] = None,
) -> None:
    """Measure speed and memory of a training step.

    Compares this system with the same method in plain PyTorch, with other MAEs, with other settings of its own and with
    other versions of it, in turns. Each computes attention in the way that is fastest on this machine; another version
    does what its runs did. The gate is open, images are noise, and no data is loaded or downloaded.
    """

    import torch
    from rich.console import Console

    from mimae.bench.machine import describe
    from mimae.bench.step.contenders import PEERS, PLAIN, check_baselines, with_attention
    from mimae.bench.step.contest import Another, Contest, Result, compete, reason, untimed
    from mimae.bench.step.memory import count_memory, measure_memory
    from mimae.bench.step.roof import roof
    from mimae.bench.step.table import show
    from mimae.config.load import load_recipe
    from mimae.config.recipe import Recipe
    from mimae.engines.make import check_machine, setup_of
    from mimae.errors import UserError
    from mimae.model.mimae import obstacles
    from mimae.outside.files import write_atomically
    from mimae.outside.output import as_json

    named = {"model.size": model, "masking.num_masks": masks, "precision": precision}
    chosen = [f"{key}={value}" for key, value in named.items() if value is not None]
    given = [*(overrides or ()), *chosen, f"schedule.batch_size={batch}", "schedule.accumulate=1"]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def load(*more: str) -> Recipe:
        return load_recipe(recipe or {}, [*given, *more, "objective.gate_loss=null"]).recipe

    def ready(found: Recipe) -> Recipe:
        check_machine(setup_of(found), device, obstacles(found, device))
        return with_attention(found, device)

    ours = ready(load())
    views = ours.masking.num_masks
    for option, names, legal in (("--peer", peer, PEERS), ("--baseline", baseline, PLAIN)):
        if unknown := sorted(set(names or ()) - {*legal}):
            raise UserError(f"{option} {unknown[0]}: legal is {' or '.join(legal)}")
    asked = {text: load(*text.split()) for text in variant or ()}
    variants: dict[str, Recipe] = {}
    absent: dict[str, str] = {}
    for text, found in asked.items():
        try:
            variants[text] = ready(found)
        except UserError as error:  # This machine cannot run it.
            absent[text] = reason(error)
    versions = [Another(checkout, recipe, [*given, "objective.gate_loss=null"]) for checkout in against or ()]
    contests = []
    if baseline or asked or versions or not peer:
        plain = baseline or ([] if asked or versions else ["eager"])
        contests.append(Contest(ours, plain, variants, versions, absent))
    if peers or peer:
        one_view = ["masking.num_masks=1", "objective.max_mi=0", "objective.min_mi=0"]
        contests.append(Contest(ready(load(*one_view, f"schedule.batch_size={batch * views}")), peer or PEERS, {}))
    for contest in contests:
        if contest.others:
            check_baselines(contest.recipe)

    result = {"bench": "step", **describe(device), "rounds": rounds, "model": ours.model.model_dump()}
    result["decoder"] = ours.decoder.model_dump()
    result["roof"] = roof(ours, device) if rounds and matrix_rate else {}
    done: list[Result] = []

    def write(running: Result | None = None) -> None:
        """Write all that was found so far: the next number may never come."""
        result["contests"] = [*done, *([] if running is None else [running])]
        if out is not None:
            write_atomically(out, json.dumps(result, indent=2) + "\n")

    for contest in contests:
        done.append(compete(contest, rounds, device, write) if rounds else untimed(contest))
        write()
    held = list(zip(contests, done))
    if memory or (memory is None and rounds):
        measure_memory(held, device, write)
    if memory is not False:
        count_memory(held)
        write()
    if not as_json(result):
        show(result, Console())
    if out is not None:
        print(f"wrote {out}")


def engines(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="overrides: model.size=tiny")
    ] = None,
    engine: Annotated[
        list[str] | None, typer.Option(help="engine to compare with ddp; repeatable [default: all]")
    ] = None,
    ranks: Annotated[int, typer.Option(help="number of processes of an engine", min=1)] = 2,
    batch: Annotated[int, typer.Option(help="number of images in a step, over all ranks", min=2)] = 8,
    rounds: Annotated[int, typer.Option(help="number of rounds, with a step of every engine in each", min=1)] = 7,
    out: Annotated[Path | None, typer.Option(metavar="FILE.json", help="write the result here")] = None,
) -> None:
    """Measure speed and memory of each engine on this CPU.

    Every engine is compared with ddp.
    """

    import torch

    from mimae.bench.machine import describe
    from mimae.bench.step.engines import ENGINES, MODEL, measure, sent_bytes, table
    from mimae.config.load import load_recipe
    from mimae.errors import UserError
    from mimae.outside.output import as_json
    from mimae.plan.memory import parameters

    names = list(dict.fromkeys(["ddp", *(engine or ENGINES)]))
    if unknown := set(names) - ENGINES.keys():
        raise UserError(f"--engine {', '.join(sorted(unknown))}: legal is {', '.join(ENGINES)}")
    given = [*MODEL, "compile=off", f"schedule.batch_size={batch}", *(overrides or ())]
    recipes = {name: load_recipe({}, [*given, *ENGINES[name]]).recipe for name in names}
    ours = recipes["ddp"]
    result = {
        "bench": "engines",
        **describe(torch.device("cpu")),
        "ranks": ranks,
        "images": batch,
        "precision": ours.precision,
        "parameters": parameters(ours).total,
        "model": ours.model.model_dump(),
        "decoder": ours.decoder.model_dump(),
    }
    result["engines"] = {
        name: {**row, "sent_bytes": sent_bytes(recipes[name], ranks)}
        for name, row in measure(recipes, ranks, rounds).items()
    }
    if not as_json(result):
        print(table(result))
    if out is not None:
        out.write_text(json.dumps(result, indent=2) + "\n")
        print(f"wrote {out}")


def budget(
    earlier: Annotated[
        Path | None, typer.Option("--against", metavar="CHECKOUT", help="count a block of another version too")
    ] = None,
    out: Annotated[Path, typer.Option(metavar="FILE.json", help="the file with the counts")] = Path(
        "bench/results/budget.json"
    ),
    docs: Annotated[Path, typer.Option(help="the page to write")] = Path("docs/budget.md"),
    render_only: Annotated[bool, typer.Option("--render", help="only write the page")] = False,
) -> None:
    """Count the bytes that a block moves, and predict a step on an H100; no GPU needed.

    Blocks are compiled for the counts, which takes minutes. The page needs `kept-bytes.json` and `traffic.json` beside
    FILE.
    """
    from mimae.bench.step.budget import measure, render
    from mimae.errors import UserError
    from mimae.outside.files import write_atomically
    from mimae.outside.output import as_json

    def read(file: Path) -> Any:
        if not file.exists():
            raise UserError(f"{file} is missing; the page needs kept-bytes.json and traffic.json beside {out.name}")
        return json.loads(file.read_text())

    kept, traffic = (read(out.with_name(name)) for name in ("kept-bytes.json", "traffic.json"))
    if not render_only:
        write_atomically(out, json.dumps(measure(earlier), indent=2) + "\n")
    docs.parent.mkdir(parents=True, exist_ok=True)
    docs.write_text(render(read(out), kept, traffic), encoding="utf-8")
    if not as_json({"page": docs}):
        print(f"wrote {docs}")
