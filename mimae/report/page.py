"""report.html: a page about one run, which needs no network."""

from __future__ import annotations

import base64
import hashlib
import io
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import resources
from typing import Any

import numpy as np
from PIL import Image

from mimae import __version__
from mimae.objective.terms import LOSSES
from mimae.outside.files import Folder
from mimae.outside.progress import track
from mimae.report import plots
from mimae.report.curves import POINTS, thinned
from mimae.report.findings import findings
from mimae.report.html import Html, join, table, tag
from mimae.report.plots import Line
from mimae.report.runs import Picture, Run, leaves
from mimae.telemetry.records import ACCOUNT_KEYS, PHASES, number

PICTURES = 24
"""Maximal number of pictures on a page."""

PICTURE_BYTES = 3 << 20
"""Maximal size of all pictures together, in bytes; encoded as text they need a third more."""

_PICTURE_FILE, _PIXELS = 1 << 26, 1 << 26
_ROWS = 100

MEANINGS = {
    "loss": "the minimised sum of the weighted terms",
    "rec": "reconstruction: squared error of the hidden patches",
    "max_mi": "InfoNCE: falls as the views of an image agree",
    "min_mi": "CLUB per dimension: falls as a latent loses information that only its own input explains",
    "fit": "likelihood of the network V that CLUB needs; it trains only V",
    "gate": "weight of the MI terms: 0 closed, 1 open",
    "accuracy": "share of right predictions",
    "deviation": "mean deviation of the latents over images; near 0 they have collapsed",
    "effective_rank": "number of directions that the latents use; 1 is a collapse",
    "alignment": "squared distance between views of an image; lower is closer",
    "uniformity": "spread of latents over the sphere; lower is more even",
    "saturated": "share of V's log-variances at their limits, where CLUB is not a bound",
    "knn": "accuracy of nearest neighbours on held-out images",
    "val_rec": "reconstruction loss on held-out images",
    "grad_norm": "norm of the whole gradient before clipping",
    "exposed_communication": "share of a step in which ranks communicate and nothing computes",
    "mfu": "FLOPs of the model as a share of the device's peak",
}
"""Explanation of each column, for its plot."""

_GPU = {
    "gpu_power_watts": ("GPU power", "W, maximum over ranks"),
    "gpu_clock_mhz": ("GPU clock", "MHz, minimum over ranks"),
    "gpu_celsius": ("GPU temperature", "degrees Celsius, maximum over ranks"),
    "gpu_throttled": ("GPU throttled", "share of readings, maximum over ranks"),
}

_RANKS = {
    "seconds_data": ("waiting for data", "s of an epoch", 1.0),
    "seconds_forward": ("forward", "s of an epoch", 1.0),
    "seconds_backward": ("backward", "s of an epoch", 1.0),
    "exposed_communication": ("exposed communication", "% of a step", 100.0),
    "mem_peak_bytes": ("peak memory", "GiB", 2**-30),
}
"""Figures that are shown over ranks if ranks differ in them: title, unit and factor."""

_EPOCH_COMMON = frozenset(
    {*("epoch", "step", "images", "seconds", "images_per_s", "views_per_s", "data_wait", "mem_peak_bytes"),
     *("mem_reserved_bytes", "bytes_sent", "exposed_communication", "tflops", "mfu", *LOSSES)}
)  # fmt: skip


def page(run: Run) -> str:
    """Return the HTML page about a run."""
    parts = [_section(title, *content(run)) for title, content in track(_SECTIONS.items(), "page", len(_SECTIONS))]
    return document(run.name, join(*_head(run), *parts))


def document(title: str, body: Html) -> str:
    """Return a complete HTML document with the given body."""
    files = resources.files("mimae.report")
    style, script = (Html(files.joinpath(name).read_text("utf-8")) for name in ("page.css", "page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # The policy forbids the page to load anything and to run other scripts, whatever the run's files contain.
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", style),
    )
    foot = tag(
        "footer",
        f"Written by mimae {__version__}. If a curve has a band, the line is the mean of a segment of records, and the "
        "band shows its minimum and maximum.",
    )
    main = tag("main", body)
    return f"<!doctype html>\n{tag('html', head, tag('body', main, foot, tag('script', script)), lang='en')}\n"


def _section(title: str, *content: Html) -> Html:
    shown = join(*content)
    name = title.lower().replace(" ", "-")
    return tag("section", tag("h2", title), shown, id=name) if shown else Html()


def _head(run: Run) -> Iterator[Html]:
    yield tag("header", tag("h1", run.name), tag("p", run.state, class_="state"))
    steps, epochs = run.steps, run.epochs
    tiles = []
    for key in ("loss", "accuracy"):
        if steps.has(key):
            tiles.append((key, f"{steps.last(key):.4g}", "at the last logged step"))
    for key, way in run.directions.items():
        values = epochs[key][np.isfinite(epochs[key])]
        if len(values):
            best = values.max() if way == "max" else values.min()
            tiles.append((key, f"{best:.4g}", f"best of {len(values)} checks"))
    if steps.has("images_per_s"):
        tiles.append(("images/s", plots.readable(float(np.nanmedian(steps["images_per_s"]))), "median"))
    if steps.has("data_wait"):
        tiles.append(("waiting for data", f"{np.nanmean(steps['data_wait']):.1%}", "of the time"))
    if epochs.has("mfu"):
        tiles.append(("MFU", f"{epochs.last('mfu'):.1%}", "last epoch"))
    if steps.has("mem_peak_bytes"):
        tiles.append(("peak memory", _bytes(np.nanmax(steps["mem_peak_bytes"])), "of the main rank"))
    if epochs.has("seconds"):
        tiles.append(("time", _duration(float(np.nansum(epochs["seconds"]))), "of all epochs"))
    yield tag(
        "ul", *(tag("li", tag("span", name), tag("strong", value), tag("small", of)) for name, value, of in tiles),
        class_="tiles",
    )  # fmt: skip
    yield tag("ul", *(tag("li", each.text, class_=each.weight) for each in findings(run)), class_="findings")


def _curve(run: Run, key: str, title: str = "", unit: str = "", *, zero: bool = False, factor: float = 1.0) -> Html:
    """Return the plot of a column of metrics.jsonl."""
    curve = thinned(run.steps["step"], run.steps[key] * factor)
    title = title or key
    return plots.lines(title, [Line(title, curve)], unit=unit, zero=zero, note=MEANINGS.get(key, ""))


def _epoch_curve(
    run: Run, key: str, title: str = "", unit: str = "", *, zero: bool = False, factor: float = 1.0
) -> Html:
    """Return the plot of a column of epochs.jsonl."""
    done, values = run.by_epoch(key)
    curve = thinned(done, values * factor)
    title, note = title or key, MEANINGS.get(key, "")
    return plots.lines(title, [Line(title, curve)], unit=unit, x_label="epoch", zero=zero, note=note)


def _training(run: Run) -> Iterator[Html]:
    for key in run.losses:
        yield _curve(run, key)
    yield _curve(run, "lr", "learning rate")
    yield _curve(run, "grad_norm", "gradient norm")


def _plane(run: Run) -> Html:
    epochs = run.epochs
    shared, own = epochs["mi_lower_nats"], epochs["mi_upper_nats"]
    known = np.isfinite(shared) & np.isfinite(own)
    if known.sum() < 2:
        return Html()
    places = np.flatnonzero(known)[np.linspace(0, known.sum() - 1, min(known.sum(), POINTS)).astype(int)]
    most = ""
    if run.recipe is not None:
        batch = run.recipe.schedule.batch_size // run.recipe.schedule.accumulate
        most = f" The bound on shared information cannot exceed log {batch:,} = {math.log(batch):.2f} nats."
    names = [f"epoch {epochs['epoch'][place] + 1:g}" for place in places]
    return plots.path(
        "shared information and input information",
        *(own[places], shared[places], names),
        "estimate of the information between latent and its own input, nats (CLUB)",
        "lower bound of the information between views, nats (InfoNCE)",
        "Each point is an epoch, from faint to strong. Training goes well if the path moves up (views share more "
        f"information) and left (latents have less information that only their own input explains).{most}",
    )


def _health(run: Run) -> Iterator[Html]:
    known = {*_EPOCH_COMMON, *ACCOUNT_KEYS, *run.losses, *("mi_lower_nats", "mi_upper_nats")}
    for key in run.epochs.keys:
        if key not in known and not key.startswith("seconds_"):
            yield _epoch_curve(run, key)


def _speed(run: Run) -> Iterator[Html]:
    yield _curve(run, "images_per_s", "throughput", "images/s", zero=True)
    yield _curve(run, "data_wait", "waiting for data", "% of the time", zero=True, factor=100)
    yield _phases(run)
    yield _epoch_curve(run, "mem_peak_bytes", "peak memory", "GiB", zero=True, factor=2**-30)
    yield _epoch_curve(run, "mem_reserved_bytes", "reserved memory", "GiB", zero=True, factor=2**-30)
    yield _epoch_curve(run, "mfu", "MFU", "%", zero=True, factor=100)
    yield _epoch_curve(run, "exposed_communication", "exposed communication", "%", zero=True, factor=100)
    yield _epoch_curve(run, "workers_bytes_most", "memory of the loader's workers", "GiB", zero=True, factor=2**-30)
    for key, (title, unit) in _GPU.items():
        yield _epoch_curve(run, key, title, unit)
    for key, (title, unit, factor) in _RANKS.items():
        yield _over_ranks(run, key, title, unit, factor)


def _over_ranks(run: Run, key: str, title: str, unit: str, factor: float) -> Html:
    """Return the plot of a figure over ranks: minimum, mean and maximum. It is empty if the ranks do not differ."""
    epochs = run.epochs
    if not np.nansum(epochs[f"{key}_most"] - epochs[f"{key}_least"]) > 0:
        return Html()
    drawn = [
        Line(kind, thinned(epochs["epoch"] + 1, epochs[f"{key}_{kind}"] * factor)) for kind in ("most", "mean", "least")
    ]
    return plots.lines(f"{title}, over ranks", drawn, unit=unit, x_label="epoch", zero=True)


def _phases(run: Run) -> Html:
    """Return a plot of the phases' shares of time as stacked bars, at most 60."""
    epochs = run.epochs
    if not epochs.has("seconds_forward"):
        return Html()
    seconds = np.where(epochs["seconds"] > 0, epochs["seconds"], np.nan)
    known = [phase for phase in PHASES if epochs.has(f"seconds_{phase}")]
    shares = {phase: 100 * epochs[f"seconds_{phase}"] / seconds for phase in known}
    rest = np.maximum(0.0, 100 - np.sum([np.nan_to_num(share) for share in shares.values()], axis=0))
    shares["other"] = np.where(np.isnan(seconds), np.nan, rest)
    curves = {name: thinned(epochs["epoch"] + 1, share, 60) for name, share in shares.items()}
    x = next(iter(curves.values())).x
    note = "Other: logging, pictures, and the evaluation between two epochs."
    parts = {name: curve.y for name, curve in curves.items()}
    return plots.bars("where the time goes", x, parts, unit="% of an epoch", x_label="epoch", note=note)


def _pictures(run: Run) -> Iterator[Html]:
    shown = [(picture, found) for picture in _evenly(run.pictures) if (found := _jpeg(run, picture)) is not None]
    while len(shown) > 1 and sum(len(found) for _, found in shown) > PICTURE_BYTES:
        shown = [*shown[:-1:2], shown[-1]]
    if not shown or len(shown[0][1]) > PICTURE_BYTES:
        return
    images = [
        tag(
            "img",
            src=f"data:image/jpeg;base64,{base64.b64encode(found).decode()}",
            alt=f"Originals, views and their reconstructions after step {picture.step:,}",
            hidden=None if place == len(shown) - 1 else True,
            data_step=f"{picture.step:,}",
        )
        for place, (picture, found) in enumerate(shown)
    ]
    slider = tag("input", type="range", min=0, max=len(shown) - 1, value=len(shown) - 1, id="when")
    label = tag("label", "after step ", tag("output", f"{shown[-1][0].step:,}", for_="when"), for_="when")
    frame = tag("div", *images, class_="wide", tabindex=0)
    yield tag("div", label, slider if len(shown) > 1 else "", frame, class_="slides")
    if len(shown) < len(run.pictures):
        yield tag("p", f"{len(shown)} of {len(run.pictures):,} pictures; all are in the run's images/.", class_="note")


def _evenly(pictures: list[Picture]) -> list[Picture]:
    places = np.linspace(0, len(pictures) - 1, min(len(pictures), PICTURES)).round().astype(int)
    return [pictures[place] for place in dict.fromkeys(places.tolist())]


def _jpeg(run: Run, picture: Picture) -> bytes | None:
    """Return a picture as a JPEG that is small enough for a page, or None if it cannot be read."""
    try:
        with Image.open(io.BytesIO(Folder(run.path).read(picture.name, _PICTURE_FILE)), formats=["PNG"]) as image:
            if image.width * image.height > _PIXELS:
                return None
            small = image.convert("RGB")
            small.thumbnail((1400, 1400), Image.Resampling.BOX)
            made = io.BytesIO()
            small.save(made, "JPEG", quality=80, subsampling=0)
            return made.getvalue()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


def _probe(run: Run) -> Iterator[Html]:
    features = run.probe.get("features")
    if not isinstance(features, dict):
        return
    rows = {str(name): scores for name, scores in features.items() if isinstance(scores, dict)}
    measures = [key for key in ("linear", "few_labels", "knn") if any(key in scores for scores in rows.values())]
    shown = [(name, *(_figure(scores.get(key)) for key in measures)) for name, scores in rows.items()]
    few = f"{run.probe.get('few_labels', 'few')} labels"
    titles = {"linear": "linear probe", "few_labels": few, "knn": "nearest neighbours"}
    yield table(("frozen features", *(titles[key] for key in measures)), shown[:_ROWS], numeric=len(measures))


def _events(run: Run) -> Iterator[Html]:
    saves = [event for event in run.events if event["kind"] == "save"]
    if saves:
        spent = [number(event["details"].get("seconds")) for event in saves]
        took = f", {np.nanmean(spent):.2g} s each" if np.isfinite(spent).any() else ""
        yield tag("p", f"{len(saves):,} checkpoints were saved{took}.")
    others = [event for event in run.events if event["kind"] != "save"]
    if others:
        rows = [(_time(each), _step(each), each["kind"], _in_words(each["details"])) for each in others[-_ROWS:]]
        yield table(("time (UTC)", "step", "event", "details"), rows)
    if len(others) > _ROWS:
        yield tag("p", f"The last {_ROWS} of {len(others):,}; events.jsonl has all.", class_="note")


def _bad_samples(run: Run) -> Iterator[Html]:
    if run.bad_samples:
        yield table(("path", "reason"), [tuple(sample) for sample in run.bad_samples[:_ROWS]])
    if len(run.bad_samples) > _ROWS:
        yield tag("p", f"The first {_ROWS} of {len(run.bad_samples):,}; bad_samples.jsonl has all.", class_="note")


def _environment(run: Run) -> Iterator[Html]:
    facts = [*leaves(run.environment), *leaves(run.start, "init")]
    rows = [(key, str(value)[:500]) for key, value in facts if value is not None and value != []]
    if rows:
        yield table(("fact", "value"), rows[:_ROWS])


def _recipe(run: Run) -> Iterator[Html]:
    if run.recipe_fault:
        yield tag("p", f"config.yaml cannot be read: {run.recipe_fault}")
    changed = [each for each in run.settings if each.value != each.default]
    same = [each for each in run.settings if each.value == each.default]
    if changed:
        rows: list[tuple[object, ...]] = [(tag("code", each.key), *each[1:]) for each in changed]
        has_origins = any(each.origin for each in changed)
        heads = ("key", "value", "default", "set by")[: 4 if has_origins else 3]
        yield table(heads, [row[: len(heads)] for row in rows])
    if same:
        rows = [(tag("code", each.key), each.value) for each in same]
        title = tag("summary", f"{len(same)} keys with their defaults")
        yield tag("details", title, table(("key", "value"), rows))


def _in_words(details: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in details.items() if value is not None)[:500]


def _time(event: Mapping[str, Any]) -> str:
    return str(event.get("time", ""))[:19].replace("T", " ")


def _step(event: Mapping[str, Any]) -> str:
    step = number(event.get("step"))
    return f"{step:,.0f}" if math.isfinite(step) else ""


def _figure(value: Any) -> str:
    found = number(value)
    return f"{found:.3f}" if math.isfinite(found) else "–"


def _bytes(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def _duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min" if minutes else f"{seconds:.0f} s"


_SECTIONS: dict[str, Callable[[Run], Iterable[Html]]] = {
    "Training": _training,
    "Information plane": lambda run: [_plane(run)],
    "Health and measures": _health,
    "Reconstructions through training": _pictures,
    "Speed and memory": _speed,
    "Probe": _probe,
    "Events": _events,
    "Samples that could not be read": _bad_samples,
    "Environment": _environment,
    "Recipe": _recipe,
}
