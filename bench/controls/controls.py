"""The controls for a fair comparison (method 4): equal views, equal optimizer steps, one probe for all.

Every trial is one `mimae pretrain` and one `mimae probe` in processes of their own, and leaves one JSON file;
a trial that has its file is not run again, and an interrupted trial resumes from its checkpoint.
docs/controls.md is rendered from those files and from nothing else.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
import yaml

from mimae.bench.machine import describe
from mimae.config.kept import load_run
from mimae.config.load import load_recipe
from mimae.config.recipe import FREE_KEYS, Recipe, flat
from mimae.data.sources.base import Source
from mimae.data.sources.open import open_source
from mimae.errors import UserError
from mimae.evaluate.knn import NEIGHBOURS
from mimae.evaluate.linear import FOLDS, TOLERANCE
from mimae.evaluate.probe import MEASURES
from mimae.evaluate.samples import ranks_in_class
from mimae.optim.schedule import total_steps
from mimae.optim.settings import ScheduleSettings
from mimae.outside.files import write_atomically
from mimae.outside.progress import track

RECIPES = {"photos": "quickstart", "cifar": "cifar10"}
"""Recipe of MI-MAE for each data set. The recipes of the other controls add a suffix to its name."""


class Control(NamedTuple):
    """One row of a table."""

    suffix: str
    meaning: str
    seeds: tuple[int, ...]
    stretch: float = 1.0
    """Number of optimizer steps, relative to MI-MAE."""


CONTROLS = {
    "mae": Control("_mae", "2. MAE: one mask, N times the images", (0, 1, 2)),
    "independent": Control("_independent", "3. N independent masks, no MI", (0,)),
    "orthogonal": Control("_orthogonal", "4. N orthogonal masks, no MI", (0, 1, 2)),
    "max_mi": Control("_max_mi", "5. control 4 + L_max", (0,)),
    "mi_mae": Control("", "6. control 5 + L_min: MI-MAE", (0, 1, 2)),
}

CHOICES = {
    "next_view": Control("_next_view", "`decoder.predict=next_view`", (0, 1, 2)),
    "next_view_long": Control("_next_view", "the same for as long as the default takes", (0, 1, 2), stretch=1.3),
    "cross": Control("_cross", "`decoder.attention=cross`", (0, 1, 2)),
    "cross_long": Control("_cross", "the same for as long as the default takes", (0, 1, 2), stretch=1.12),
}
"""Forms of MI-MAE with less work in the decoder. A stretch is the time of a step of quickstart over that of a step of
the form (one CPU thread, two rounds of 100 steps: 1.21 and 1.39, 1.08 and 1.15)."""

_PLACES = (*FREE_KEYS, "data.path")
"""Settings on which no result depends, and the paths of the data set, which is identified by its name."""

_ANY_LOADER = ("data.loader", "auto")

_JUDGE = "probe.tolerance"
"""Key of a result's settings that is not in recipes. Results of the older probe, which stopped early, lack it."""


class Trial(NamedTuple):
    """A run to evaluate. `settings` is its whole recipe by dotted key, without keys on which no result depends."""

    name: str
    data: str
    kind: str
    seed: int
    recipe: str
    overrides: list[str]
    paths: list[str]
    views: int
    settings: dict[str, Any]


Result = dict[str, Any]
Runner = Callable[[Trial, Path], Result]
"""Function that trains and probes a trial in a separate folder, and resumes it there after an interruption."""


class Stopped(Exception):
    """The trial was asked to stop and has saved its state."""


# Which trials


def parse_data(data: str) -> tuple[str, list[str]]:
    """Return the name and the overrides of the data set `photos` or `cifar=TRAIN:TEST`. Raises UserError."""
    name, _, places = data.partition("=")
    parts = places.split(":") if places else []
    if name not in RECIPES or len(parts) not in (0, 2) or not all(parts):
        raise UserError(f"--data {data}: legal is NAME or NAME=TRAIN:TEST, NAME one of {', '.join(RECIPES)}")
    return name, [f"{key}={place}" for key, place in zip(("data.path", "data.val_path"), parts, strict=False)]


def make_trial(
    name: str, data: str, kind: str, recipe: str, overrides: list[str], paths: list[str], samples: int, seed: int
) -> Trial:
    """Resolve the recipe. The number of steps follows from `samples`, the size of the training set."""
    resolved = load_recipe(recipe, [*overrides, *paths, f"seed={seed}"]).recipe
    batch = resolved.schedule.batch_size
    steps = total_steps(resolved.schedule, samples // batch)
    settings = {key: value for key, value in flat(resolved).items() if key not in _PLACES}
    settings[_JUDGE] = TOLERANCE
    views = steps * batch * resolved.masking.num_masks
    return Trial(name, data, kind, seed, recipe, overrides, paths, views, settings)


def control_trials(data: str) -> list[Trial]:
    """Return the trials of all controls and choices on one data set, seed by seed.

    Raises UserError if controls would see different numbers of views.
    """
    name, paths = parse_data(data)
    recipe = load_recipe(RECIPES[name], paths).recipe
    path = recipe.data.path
    samples = sum(share.draws for share in open_source(path).shares)
    rows = {**CONTROLS, **CHOICES}
    trials = [
        make_trial(
            *(f"{name}-{kind}-{seed}", name, kind, RECIPES[name] + row.suffix),
            *(stretched(recipe.schedule, samples, row.stretch), paths, samples, seed),
        )
        for seed in sorted({seed for row in rows.values() for seed in row.seeds})
        for kind, row in rows.items()
        if seed in row.seeds
    ]
    views = {trial.recipe: trial.views for trial in trials if trial.kind in CONTROLS}
    if len(set(views.values())) > 1:
        raise UserError(
            f"the controls on {samples:,} images of {path} would see different numbers of views "
            f"({', '.join(f'{recipe}: {count:,}' for recipe, count in views.items())}); set schedule.max_steps in them"
        )
    return trials


def stretched(schedule: ScheduleSettings, samples: int, stretch: float) -> list[str]:
    """Return the overrides that make a schedule `stretch` times as long; none for 1."""
    if stretch == 1:
        return []
    per_epoch = samples // schedule.batch_size
    steps = round(total_steps(schedule, per_epoch) * stretch)
    return [f"schedule.max_steps={steps}", f"schedule.epochs={-(-steps // per_epoch)}"]


def hold_out(source: Source, folder: Path) -> list[str]:
    """Split a labelled source into list files: four fifths for training and a stratified fifth for evaluation.

    Returns the overrides that name them. The split depends only on the labels.
    """
    if source.labels is None:
        raise UserError(f"{source.name} has no labels: settings cannot be tuned on it")
    held = (ranks_in_class(torch.from_numpy(source.labels), seed=0) % FOLDS == 0).tolist()
    folder.mkdir(parents=True, exist_ok=True)
    overrides = []
    for key, name, part in (("data.path", "train.tsv", False), ("data.val_path", "held.tsv", True)):
        rows = [f"{source.path(i)}\t{source.labels[i]}\n" for i in range(len(source)) if held[i] == part]
        write_atomically(folder / name, "".join(rows))
        overrides.append(f"{key}={folder / name}")
    return overrides


def tuning_trials(file: Path, data: str, folder: Path) -> list[Trial]:
    """Return the trials that `file` lists, on a split of the training set of `data`; its test set is not used.

    The file is YAML: `recipe`, `overrides` of all, and `trials`, each `name: {seeds: [0], overrides: [...]}`.
    """
    name, paths = parse_data(data)
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        recipe, shared, listed = content["recipe"], content["overrides"], content["trials"]
        rows = [(kind, list(row["overrides"]), seed) for kind, row in listed.items() for seed in row["seeds"]]
    except OSError as error:
        raise UserError(f"cannot read the list of trials {file}: {error.strerror}") from error
    except (yaml.YAMLError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{file} is not a list of trials ({error!r}): it holds `recipe`, `overrides` and `trials`, each of them "
            f"`name: {{seeds: [0], overrides: [objective.max_mi=0.1]}}`"
        ) from error
    source = open_source(load_recipe(recipe, paths).recipe.data.path)
    split = hold_out(source, folder.absolute() / f"{name}-split")
    samples = len(open_source(split[0].partition("=")[2]))
    return [
        make_trial(f"{name}-{kind}-{seed}", name, kind, recipe, [*shared, *overrides], split, samples, seed)
        for kind, overrides, seed in rows
    ]


# Running them


def finished(trial: Trial, out: Path) -> bool:
    """Return whether `out` has the trial's result. Raises UserError if it has a result of other settings."""
    file = out / f"{trial.name}.json"
    if not file.exists():
        return False
    # Before a key existed, every run behaved as with the key's default.
    old = {**flat(Recipe()), **json.loads(file.read_text())["settings"]}
    if changed := _changed(old, trial.settings):
        raise UserError(
            f"{file} is the result of other settings: {'; '.join(changed)}. Move it away, and the folder of its run, "
            f"to run the trial again, or give another --results and --runs"
        )
    return True


def _changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return a text with the `new` settings that differ from `old` or are missing there."""
    return [f"{key} was {old.get(key)!r}, is {value!r}" for key, value in new.items() if old.get(key) != value]


def run_trials(trials: Sequence[Trial], out: Path, runs: Path, jobs: int, runner: Runner) -> None:
    """Run the trials without a result in `out`, `jobs` at a time, and write each result when it is there.

    A trial that fails does not stop the others; UserError names the failed ones at the end. Raises Stopped.
    """
    out.mkdir(parents=True, exist_ok=True)
    left = [trial for trial in trials if not finished(trial, out)]
    print(f"{len(trials) - len(left)} of {len(trials)} trials have their result in {out}", flush=True)
    failures = []
    with ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(runner, trial, runs / trial.name): trial for trial in left}
        for future in track(as_completed(futures), "trials", len(futures)):
            trial = futures[future]
            try:
                result = future.result()
            except UserError as error:
                failures.append(f"{trial.name}: {error}")
                print(f"{trial.name} failed", flush=True)
                continue
            except Stopped:
                continue
            write_atomically(out / f"{trial.name}.json", json.dumps(record(trial, result), indent=2) + "\n")
            scores = " / ".join(f"{result['probe']['features']['this run'][key]:.3f}" for key in MEASURES)
            print(f"{trial.name}: {scores} in {result['seconds']:.0f} s", flush=True)
    if failures:
        raise UserError("\n".join([f"{len(failures)} of {len(left)} trials failed:", *failures]))
    if not all(finished(trial, out) for trial in trials):
        raise Stopped


def record(trial: Trial, result: Result) -> Result:
    """Return the content of a result file, without the paths of this machine."""
    known = {key: value for key, value in trial._asdict().items() if key != "paths"}
    return {"bench": "controls", **describe(torch.device("cpu")), **known, **result}


def _check_trained(trial: Trial, run: Path) -> None:
    """Raise UserError if an existing run was not trained with all settings of its trial.

    A run that is older than a key continues without it.
    """
    trained = flat(load_run(run))
    wanted = {key: value for key, value in trial.settings.items() if key in trained and (key, value) != _ANY_LOADER}
    if changed := _changed(trained, wanted):
        raise UserError(f"{run} was trained with other settings: {'; '.join(changed)}. Remove it to train it anew")


class Processes:
    """Runner of trials: each in separate processes, which are asked to save and stop when this process is."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.stopping = False
        self.lock = threading.RLock()
        self.running: set[subprocess.Popen[bytes]] = set()

    def __call__(self, trial: Trial, run: Path) -> Result:
        run.parent.mkdir(parents=True, exist_ok=True)
        quiet = ["telemetry.trackers=[]", "telemetry.images_every_epochs=0", "telemetry.probe_every_epochs=0"]
        ours = [f"run.dir={run}", f"seed={trial.seed}", f"data.workers={self.threads}", *quiet]
        with run.with_suffix(".log").open("ab") as log:
            self._wait(["pretrain", trial.recipe, *trial.overrides, *trial.paths, *ours], log)
            _check_trained(trial, run)
            self._wait(["probe", str(run), *([] if trial.kind == "mi_mae" else ["--no-baselines"])], log)
        epochs = [json.loads(line) for line in (run / "epochs.jsonl").read_text().splitlines()]
        probed = json.loads((run / "probe.json").read_text())
        return {
            "threads": self.threads,
            "seconds": sum(epoch["seconds"] for epoch in epochs),
            "last_epoch": epochs[-1],
            "probe": {key: value for key, value in probed.items() if key not in ("train", "test")},
        }

    def _wait(self, arguments: list[str], log: Any) -> None:
        """Run a command to its end. Raises Stopped if it saved on a signal, UserError if it failed."""
        environment = os.environ | {"OMP_NUM_THREADS": str(self.threads), "PYTHONUNBUFFERED": "1"}
        with self.lock:
            if self.stopping:
                raise Stopped
            process = subprocess.Popen(
                [sys.executable, "-m", "mimae", *arguments],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # Ctrl-C is for this process, which forwards it as a signal to save.
            )
            self.running.add(process)
        code = process.wait()
        with self.lock:
            self.running.remove(process)
        if self.stopping:
            raise Stopped
        if code:
            tail = Path(log.name).read_text(errors="replace").strip().splitlines()[-3:]
            raise UserError("\n  ".join([f"exit code {code}, the end of {log.name}:", *tail]))

    def stop(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal: running trials save and stop, and no new ones start."""
        with self.lock:
            self.stopping = True
            for process in self.running:
                process.terminate()


# The table


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
    yield from _render_judge(results)
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


def _render_judge(results: list[Result]) -> Iterator[str]:
    """Yield a caveat if a result is from the probe that did not fit its classifiers to convergence."""
    if any(result["settings"].get(_JUDGE) is None for result in results):
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
