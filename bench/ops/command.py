"""The arguments of `mimae bench kernels` and `mimae bench traffic`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer


def kernels(
    op: Annotated[list[str] | None, typer.Option(help="ops to time; repeatable [default: all]")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="images; repeatable", min=1)] = None,
    rounds: Annotated[int, typer.Option(help="rounds of every contender", min=1)] = 30,
    compiled: Annotated[bool, typer.Option(help="also time the eager forms under torch.compile")] = True,
    precision: Annotated[
        str | None, typer.Option(help="precision of the products: bf16 or fp32 [default: bf16; infonce in both]")
    ] = None,
    rates: Annotated[
        bool, typer.Option("--roof/--no-roof", help="measure the rates of copies and products first")
    ] = True,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="write the result here, anew after each number")
    ] = None,
) -> None:
    """Measure time and memory of every op.

    Fused and reference beside eager PyTorch and torch.compile.
    """

    from functools import partial

    import torch
    from rich.console import Console

    from mimae.bench.machine import describe
    from mimae.bench.ops.cases import CASES
    from mimae.bench.ops.kernels import BATCHES, FIRST_ROUNDS, contest, crossovers, roof, show, sizes_of
    from mimae.errors import UserError
    from mimae.outside.files import write_atomically
    from mimae.outside.output import as_json

    known, dtypes = {case.op: case for case in CASES}, {"bf16": torch.bfloat16, "fp32": torch.float32}
    unknown = [name for name in op or () if name not in known]
    if unknown or precision not in (None, *dtypes):
        wrong = f"--op {unknown[0]}: legal is {', '.join(known)}" if unknown else f"--precision {precision}"
        raise UserError(f"{wrong}; precision is bf16 or fp32")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.allow_tf32 = False  # This is the default for products: fp32 is fp32 for every contender.
    result = {"bench": "kernels", **describe(device), "rounds": rounds, "roof": roof(device) if rates else {}}
    contests: list[dict[str, Any]] = []

    def write(number: int, found: dict[str, Any]) -> None:
        """Write all that was found so far: the next number may never come. A second contest keeps the first's times."""
        earlier = contests[number]["contenders"] if number < len(contests) else {}
        rows = {name: {**earlier.get(name, {}), **row} for name, row in found["contenders"].items()}
        contests[number : number + 1] = [{**found, "contenders": {**earlier, **rows}}]
        result.update(contests=contests, crossovers=crossovers(contests))
        if out is not None:
            write_atomically(out, json.dumps(result, indent=2) + "\n")

    places = [
        (known[name], *place)
        for name in op or known
        for place in sizes_of(known[name], batch or BATCHES, dtypes.get(precision or ""))
    ]
    for last in (False, True) if compiled else (True,):
        for number, (case, size, images) in enumerate(places):
            count = rounds if last else min(rounds, FIRST_ROUNDS)
            contest(case, size, images, device, count, compiled and last, partial(write, number))
            if last:
                show(contests[number], result["roof"], Console())
    if not as_json(result) and out is not None:
        print(f"wrote {out}")


def traffic(
    op: Annotated[list[str] | None, typer.Option(help="ops to count; repeatable [default: all]")] = None,
    machine_code: Annotated[
        bool, typer.Option(help="compile for sm_80, 90 and 100 too; minutes, then from triton's cache")
    ] = True,
    jobs: Annotated[int, typer.Option(help="processes at a time", min=1)] = 2,
    out: Annotated[Path | None, typer.Option(metavar="FILE.json", help="write the result here")] = None,
    page: Annotated[
        Path | None, typer.Option("--render", help="render the result that --out names to this page, without a run")
    ] = None,
) -> None:
    """Count the bytes that the fused ops move; no GPU needed.

    Bytes are compared with their floor and with eager PyTorch, and the machine code is inspected. Fails if an op
    exceeds its bound.
    """
    from importlib import metadata

    from rich.console import Console

    from mimae.bench.ops import offline
    from mimae.bench.ops.cases import chosen
    from mimae.bench.ops.traffic import WIDTH, beyond_bounds, bound_of, count, flaws, render, show
    from mimae.errors import UserError
    from mimae.kernels import runtime
    from mimae.outside.output import as_json

    if page is not None:
        if out is None or not out.exists():
            raise UserError("--render shows a result: name its file by --out")
        page.write_text(render(json.loads(out.read_text())))
        as_json({"page": page})
        return
    if runtime.triton is None:
        raise UserError("the kernels are counted and compiled by triton, which is not installed")
    cases = chosen(op)
    result: dict[str, Any] = {
        "bench": "traffic",
        "versions": {package: metadata.version(package) for package in ("torch", "triton")},
        "traffic": count(cases, jobs),
        "machine_code": offline.machine_code(cases, jobs) if machine_code else [],
    }
    if not as_json(result):
        show(result, Console(width=WIDTH))
    if out is not None:
        out.write_text(json.dumps(result, indent=2) + "\n")
        print(f"wrote {out}")
    beyond = [line for row in result["traffic"] for line in beyond_bounds(row, bound_of(row["op"]))]
    beyond += [line for binary in result["machine_code"] for line in flaws(binary)]
    for line in beyond:
        print(f"beyond its bound: {line}")
    if beyond:
        raise typer.Exit(1)
