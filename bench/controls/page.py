"""docs/controls.md, rendered from the JSON files of the trials and from nothing else."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mimae.bench.controls.time_to import render_times
from mimae.bench.controls.trials import CHOICES, CONTROLS, JUDGE, Result
from mimae.evaluate.knn import NEIGHBOURS
from mimae.evaluate.probe import MEASURES


def load_results(folder: Path) -> list[Result]:
    """Return the results in a folder, by name."""
    return [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]


def render(controls: Iterable[Result], tuning: Iterable[Result]) -> str:
    """docs/controls.md."""
    return "\n".join([*_render_controls(list(controls)), *_render_tuning(list(tuning))]) + "\n"


def _render_controls(results: list[Result]) -> Iterator[str]:
    yield (
        "# The controls\n\n"
        "Made by `mimae bench controls` from the files of bench/results/controls; do not edit. All trained controls of "
        "a table see equally many views (images x masks) in equally many optimizer steps, and one probe judges all: "
        "frozen features, the mean of the patch tokens of the whole image, standardised; a linear classifier of all "
        "training images; one of few labels, the mean of 5 draws; the vote of the "
        f"{NEIGHBOURS} nearest training images. Accuracies on the test set: mean ± standard deviation over seeds.\n"
    )
    if not results:
        yield "Not yet run.\n"
    if any(r["kind"] == "mae" and r["settings"].get("masking.rounding", "nearest") == "nearest" for r in results):
        yield (
            "Control 2 was trained by this system's own rules in four places where MAE's code has others: weight decay "
            "of the tokens, rounding of the number of visible patches (without effect here), the first step of the "
            "warm-up, the initial bias of the patch projection. The recipes `*_mae` have taken MAE's rules since.\n"
        )
    for data in sorted({result["data"] for result in results}):
        every = [result for result in results if result["data"] == data]
        here = [result for result in every if result["kind"] in CONTROLS]
        probed, epoch = here[0]["probe"], here[0]["last_epoch"]
        yield (
            f"## {data}\n\n{probed['train_images']:,} training and {probed['test_images']:,} test images of "
            f"{probed['classes']} classes; {here[0]['views']:,} views in {epoch['step']:,} steps; {_where(here)}.\n"
        )
        yield from _render_judge(every)
        yield (
            f"| control | seeds | linear probe | {probed['few_labels']} labels | {NEIGHBOURS} neighbours "
            "| L_rec | minutes |\n|---|---|---|---|---|---|---|"
        )
        # Untrained baselines depend at most on the seed, so the trials of one control give them for all.
        if untrained := [result for result in here if "raw pixels" in result["probe"]["features"]]:
            yield _row("1. raw pixels", untrained[:1], "raw pixels", trained=False)
            yield _row("1. random encoder", untrained, "random encoder", trained=False)
        for kind, control in CONTROLS.items():
            if rows := [result for result in here if result["kind"] == kind]:
                yield _row(control.meaning, rows, "this run", trained=True)
        yield ""
        yield from _render_differences(here)
        yield from _render_choices(every)
        yield from render_times(every)


def _render_judge(results: list[Result]) -> Iterator[str]:
    """Yield a caveat if a result is from the probe that did not fit its classifiers to convergence."""
    if any(result["settings"].get(JUDGE) is None for result in results):
        yield (
            "The linear classifiers that judged these runs were not fitted to the end: weakly penalised ones stayed up "
            "to 1e-2 nats above their minimum. Accuracies of the linear probe and of few labels move once the runs are "
            "judged again, single draws most; those of the neighbours do not.\n"
        )


def _render_choices(results: list[Result]) -> Iterator[str]:
    """Return lines that compare MI-MAE with its forms with less work in the decoder."""
    if not any(result["kind"] in CHOICES for result in results):
        return
    yield "Less work in the decoder by choice, after equal steps and after equal time of training:\n"
    yield (
        f"| MI-MAE | steps | seeds | linear probe | few labels | {NEIGHBOURS} neighbours | L_rec | minutes |\n"
        "|---|---|---|---|---|---|---|---|"
    )
    default = CONTROLS["mi_mae"]._replace(meaning="the default: all hidden patches, self-attention")
    for kind, row in {"mi_mae": default, **CHOICES}.items():
        if rows := [result for result in results if result["kind"] == kind]:
            yield _row(f"{row.meaning} | {rows[0]['last_epoch']['step']:,}", rows, "this run", trained=True)
    yield ""


def _render_differences(results: list[Result]) -> Iterator[str]:
    """Return lines with the differences of MI-MAE from the controls that it must beat, seed by seed."""
    lines = []
    for other in ("orthogonal", "mae"):
        pairs = {kind: {r["seed"]: r for r in results if r["kind"] == kind} for kind in ("mi_mae", other)}
        seeds = sorted(pairs["mi_mae"].keys() & pairs[other].keys())
        if seeds:
            cells = [
                _difference([[_score(pairs[kind][seed], key) for seed in seeds] for kind in ("mi_mae", other)])
                for key in MEASURES
            ]
            lines.append(f"| {CONTROLS[other].meaning} | {len(seeds)} | {' | '.join(cells)} |")
    if lines:
        yield 'MI-MAE less a control, of equal seeds; "clear" where the two sets of seeds do not overlap:\n'
        yield "| MI-MAE less | seeds | linear probe | few labels | neighbours |\n|---|---|---|---|---|"
        yield from lines
        yield ""


def _difference(sides: list[list[float]]) -> str:
    ours, theirs = sides
    clear = len(ours) > 1 and (min(ours) > max(theirs) or max(ours) < min(theirs))
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    return _spread(differences, "+.3f") + (", clear" if clear else "")


def _render_tuning(results: list[Result]) -> Iterator[str]:
    if not results:
        return
    here = results[0]["probe"]
    yield (
        "## Tuning\n\n"
        f"Every trial that was made to choose the recipes' defaults: {len(results)} runs, trained on four fifths of a "
        f"training set ({here['train_images']:,} images) and judged on the fifth held out ({here['test_images']:,}); "
        f"the test set was not looked at. Overrides are of the recipe named; {_where(results)}.\n"
    )
    yield from _render_judge(results)
    yield (
        f"| data | trial | overrides | seeds | linear probe | {here['few_labels']} labels | {NEIGHBOURS} neighbours "
        "| deviation of z |\n|---|---|---|---|---|---|---|---|"
    )
    for data, kind in sorted({(result["data"], result["kind"]) for result in results}):
        rows = [result for result in results if (result["data"], result["kind"]) == (data, kind)]
        overrides = " ".join(f"`{override}`" for override in rows[0]["overrides"])
        cells = [_spread([_score(row, key) for row in rows]) for key in MEASURES]
        cells.append(_spread([row["last_epoch"]["deviation"] for row in rows]))
        yield f"| {data} | {kind} | {rows[0]['recipe']} {overrides} | {len(rows)} | {' | '.join(cells)} |"


def _row(meaning: str, results: list[Result], features: str, trained: bool) -> str:
    cells = [_spread([_score(result, key, features) for result in results]) for key in MEASURES]
    if trained:
        cells.append(_spread([result["last_epoch"]["rec"] for result in results]))
        cells.append(f"{statistics.fmean(result['seconds'] for result in results) / 60:.1f}")
    else:
        cells += ["", ""]
    return f"| {meaning} | {len(results)} | {' | '.join(cells)} |"


def _score(result: Mapping[str, Any], measure: str, features: str = "this run") -> float:
    return float(result["probe"]["features"][features][measure])


def _spread(values: Sequence[float | None], form: str = ".3f") -> str:
    known = [value for value in values if value is not None]  # null in a file stands for a value that was not finite.
    if not known:
        return ""
    mean = f"{statistics.fmean(known):{form}}"
    return f"{mean} ± {statistics.stdev(known):.3f}" if len(known) > 1 else mean


def _where(results: list[Result]) -> str:
    """Return machine, versions and dates as text."""
    machines = sorted({f"{r['machine']['cpu']}, {r['threads']} thread{'s' * (r['threads'] > 1)}" for r in results})
    versions = sorted({f"torch {r['versions']['torch']}" for r in results})
    dates = sorted({r["date"] for r in results})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return f"{' and '.join(machines)} a run, {' and '.join(versions)}, {when}"
