"""Plots of a page: lines, the path of the information plane, stacked bars.

The drawing is an SVG that can be stretched. The text around it is HTML, so that it keeps its size on a phone. A plot is
complete without a script. The page has the plot's values as JSON, which `page.js` shows at the cursor.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mimae.report.curves import Curve
from mimae.report.html import Html, join, tag
from mimae.report.runs import Floats

SIDE = 1000
"""Width and height of a drawing in its own units."""

_LOGARITHMIC = 30.0
"""A curve is drawn on a logarithmic scale if its maximum is more than this many times its median."""


_SMALLEST = 1e-200
"""A smaller range counts as empty."""


class Line(NamedTuple):
    """A line of a plot."""

    label: str
    curve: Curve


class Scale(NamedTuple):
    """A range of values on an axis."""

    low: float
    high: float
    is_log: bool = False

    def places(self, values: Floats) -> Floats:
        """Return positions on the axis: 0 to 1 for values in the range."""
        low, high = self.low, self.high
        if self.is_log:
            values, low, high = np.log(np.maximum(values, low / 10)), math.log(low), math.log(high)
        return (values - low) / (high - low)

    def ticks(self, count: int, whole: bool = False) -> list[float]:
        """Return about `count` round values of the range; with `whole` only whole numbers."""
        if self.is_log:
            first, last = math.ceil(math.log10(self.low)), math.floor(math.log10(self.high))
            every = max(1, -(-(last - first + 1) // (count + 1)))
            powers = [10.0**power for power in range(first, last + 1, every)]
            return powers or [self.low, self.high]
        step = round_step((self.high - self.low) / count)
        step = max(1.0, step) if whole else step
        first = math.ceil(self.low / step - 1e-9)
        return [place * step for place in range(first, math.floor(self.high / step + 1e-9) + 1)]


def round_step(least: float) -> float:
    """Return the smallest 1, 2 or 5 times a power of ten that is not below `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))


def scale(values: Floats, zero: bool = False, whole: bool = False) -> Scale:
    """Return a range that shows `values`; with `zero` it begins at 0, with `whole` it has no margin."""
    values = values[np.isfinite(values)]
    if not len(values):
        return Scale(0.0, 1.0)
    low, high, middle = float(values.min()), float(values.max()), float(np.median(values))
    if not zero and not whole and low > 0 and high > _LOGARITHMIC * middle:
        return Scale(low / 1.1, high * 1.1, is_log=True)
    if zero:
        return Scale(min(0.0, low), high * 1.05 if high > _SMALLEST else 1.0)
    if high - low <= max(1e-9 * max(abs(low), abs(high)), _SMALLEST):  # A single value is in the middle.
        low, high = low - (abs(low) / 2 or 1), high + (abs(high) / 2 or 1)
        return Scale(low, high)
    margin = 0 if whole else 0.05 * (high - low)
    return Scale(low - margin, high + margin)


def lines(
    title: str,
    drawn: Sequence[Line],
    *,
    unit: str = "",
    x_label: str = "step",
    note: str = "",
    zero: bool = False,
    x_scale: Scale | None = None,
) -> Html:
    """Return a plot of lines with common axes. It is empty if no line has a finite value."""
    drawn = [line for line in drawn if np.isfinite(line.curve.y).any()]
    if not drawn:
        return Html()
    x = x_scale or scale(np.concatenate([line.curve.x for line in drawn]), whole=True)
    y = scale(np.concatenate([_shown(line.curve) for line in drawn]), zero)
    parts = []
    for tone, (_, curve) in enumerate(drawn):
        across = x.places(curve.x)
        if curve.low is not None and curve.high is not None:
            parts.append(tag("path", class_=f"band tone{tone % 8}", d=_band(across, y, curve.low, curve.high)))
        up = y.places(curve.y)
        parts.append(tag("path", class_=f"line tone{tone % 8}", d=_path(across, up)))
        lone = [piece[0] for piece in _pieces(np.isfinite(across) & np.isfinite(up)) if len(piece) == 1]
        if lone:
            dots = "".join(_dot(across, up, place) for place in lone)
            parts.append(tag("path", class_=f"point tone{tone % 8}", d=dots))
    summary = "; ".join(f"{line.label}: {_first_to_last(line.curve)}" for line in drawn)
    data = {
        "x": {"low": x.low, "high": x.high, "label": x_label},
        "y": {"low": y.low, "high": y.high, "log": y.is_log},
        "lines": [{"label": label, "x": _short(curve.x, 9), "y": _short(curve.y)} for label, curve in drawn],
    }
    names = [line.label for line in drawn]
    return _figure(title, unit, f"{title}: {summary}", join(*parts), x, y, x_label, names, note, data)


def path(title: str, x: Floats, y: Floats, names: Sequence[str], x_label: str, y_label: str, note: str) -> Html:
    """Return a plot of points that are joined by a line in their order; `names` has the name of each point."""
    x_scale, y_scale = scale(x), scale(y)
    across, up = x_scale.places(x), y_scale.places(y)
    dots = [
        tag("path", class_="dot", style=f"stroke: var(--ramp{round(9 * place / max(1, len(x) - 1))})",
            d=_dot(across, up, place))
        for place in range(len(x)) if np.isfinite(across[place]) and np.isfinite(up[place])
    ]  # fmt: skip
    drawing = join(tag("path", class_="line faint", d=_path(across, up)), *dots)
    data = {
        "x": {"low": x_scale.low, "high": x_scale.high, "label": x_label},
        "y": {"low": y_scale.low, "high": y_scale.high, "log": y_scale.is_log, "label": y_label},
        "points": {"names": list(names), "x": _short(x), "y": _short(y)},
    }
    summary = f"{title}: from ({x[0]:.3g}, {y[0]:.3g}) {names[0]} to ({x[-1]:.3g}, {y[-1]:.3g}) {names[-1]}"
    return _figure(title, y_label, summary, drawing, x_scale, y_scale, x_label, [], note, data)


def bars(title: str, x: Floats, parts: dict[str, Floats], *, unit: str, x_label: str, note: str = "") -> Html:
    """Return a plot of stacked bars, one for each x, with the first part at the bottom. It is empty if no part has a
    finite value."""
    parts = {name: part for name, part in parts.items() if np.isfinite(part).any()}
    if not parts:
        return Html()
    total = np.sum([np.nan_to_num(part) for part in parts.values()], axis=0)
    x_scale, y_scale = Scale(0.0, float(len(x))), scale(total, zero=True)
    base, drawn = np.zeros(len(x)), []
    for tone, part in enumerate(parts.values()):
        top = base + np.nan_to_num(part)
        rows = zip(range(len(x)), y_scale.places(base), y_scale.places(top))
        width = SIDE / len(x)
        shape = "".join(
            f"M{width * (place + 0.08):.1f} {SIDE * (1 - low):.1f}V{SIDE * (1 - high):.1f}h{width * 0.84:.1f}"
            f"V{SIDE * (1 - low):.1f}z"
            for place, low, high in rows
            if high > low
        )
        drawn.append(tag("path", class_=f"bar tone{tone % 8}", d=shape))
        base = top
    centres = np.arange(len(x)) + 0.5
    data = {
        "x": {"low": 0, "high": len(x), "label": x_label, "names": _short(x, 9)},
        "y": {"low": y_scale.low, "high": y_scale.high, "log": False},
        "lines": [{"label": name, "x": _short(centres), "y": _short(part)} for name, part in parts.items()],
    }
    means = ", ".join(f"{name} {np.nanmean(part):.3g}" for name, part in parts.items())
    every = max(1, -(-len(x) // 6))
    ticks = [(place + 0.5, f"{x[place]:g}") for place in range(0, len(x), every)]
    summary = f"{title}, {unit} on average: {means}"
    return _figure(title, unit, summary, join(*drawn), x_scale, y_scale, x_label, list(parts), note, data, ticks)


def _figure(
    title: str,
    unit: str,
    summary: str,
    drawing: Html,
    x: Scale,
    y: Scale,
    x_label: str,
    names: Sequence[str],
    note: str,
    data: Mapping[str, object],
    x_ticks: list[tuple[float, str]] | None = None,
) -> Html:
    y_ticks = [(float(y.places(np.array([tick]))[0]), readable(tick)) for tick in y.ticks(5)]
    at = (
        x_ticks
        if x_ticks is not None
        else [(tick, readable(tick)) for tick in x.ticks(4, whole=x_label in ("step", "epoch"))]
    )
    across = [(float(x.places(np.array([tick]))[0]), label) for tick, label in at]
    grid = "".join(f"M0 {SIDE * (1 - place):.0f}H{SIDE}" for place, _ in y_ticks)
    svg = tag(
        "svg",
        tag("path", class_="grid", d=grid),
        drawing,
        viewBox=f"0 0 {SIDE} {SIDE}",
        preserveAspectRatio="none",
        role="img",
        aria_label=summary,
    )
    return tag(
        "figure",
        tag("figcaption", tag("strong", title), " ", tag("span", unit, class_="unit")),
        _legend(names) if len(names) > 1 else "",
        tag(
            "div",
            svg,
            *(tag("span", label, class_="y", style=f"bottom:{100 * place:.2f}%") for place, label in y_ticks),
            *(tag("span", label, class_="x", style=f"left:{100 * place:.2f}%") for place, label in across),
            tag("i", class_="cursor", hidden=True),
            class_="area",
            tabindex=0,
            role="group",
            aria_label=f"{title}: arrow keys read its values",
        ),
        tag("p", x_label, class_="x-label"),
        tag("output", class_="readout", aria_live="polite"),
        tag("p", note, class_="note") if note else "",
        tag("script", as_json(data), type="application/json"),
        class_="plot",
    )


def _legend(names: Sequence[str]) -> Html:
    entries = (tag("li", tag("i", class_=f"swatch tone{tone % 8}"), name) for tone, name in enumerate(names))
    return tag("ul", *entries, class_="legend")


def as_json(data: object) -> Html:
    """Return JSON that cannot end the HTML element that contains it."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return Html(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def readable(value: float) -> str:
    """Return a number in short form: 12k, 1.5M, 0.003."""
    if value and not 1e-4 <= abs(value) < 1e15:
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 10 * size or abs(value) == size or (abs(value) > size and unit != "k"):
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}"


def _shown(curve: Curve) -> Floats:
    """Return the values that an axis has to show: the whole line, and its band without rare spikes."""
    if curve.low is None or curve.high is None or not np.isfinite(curve.low).any():
        return curve.y
    return np.concatenate([curve.y, [np.nanquantile(curve.low, 0.01), np.nanquantile(curve.high, 0.99)]])


def _path(across: Floats, up: Floats) -> str:
    """Return the SVG path of a line, which is broken at NaN."""
    pieces = _pieces(np.isfinite(across) & np.isfinite(up))
    return "".join("M" + "L".join(_point(across, up, place) for place in piece) for piece in pieces)


def _dot(across: Floats, up: Floats, place: int) -> str:
    """Return the SVG path of a dot: a line of length 0 with round caps.

    A circle would become an ellipse when the drawing is stretched.
    """
    return f"M{_point(across, up, place)}h0"


def _point(across: Floats, up: Floats, place: int) -> str:
    return f"{_unit(across[place])} {_unit(1 - up[place])}"


def _band(across: Floats, y: Scale, low: Floats, high: Floats) -> str:
    """Return the SVG path of the area between two lines, in pieces between gaps."""
    bottom, top = y.places(low), y.places(high)
    parts = []
    for piece in _pieces(np.isfinite(low) & np.isfinite(high)):
        there = [_point(across, top, place) for place in piece]
        back = [_point(across, bottom, place) for place in reversed(piece)]
        parts.append("M" + "L".join([*there, *back]) + "z")
    return "".join(parts)


def _pieces(is_there: NDArray[np.bool_]) -> list[range]:
    edges = np.flatnonzero(np.diff(np.concatenate([[0], is_there.astype(int), [0]])))
    return [range(start, end) for start, end in zip(edges[::2], edges[1::2])]


def _unit(place: float) -> str:
    # Positions far outside the drawing are limited, because SVG renderers do not handle huge numbers well.
    return f"{min(max(place, -1), 2) * SIDE:.0f}"


def _first_to_last(curve: Curve) -> str:
    finite = np.flatnonzero(np.isfinite(curve.y))
    first, last = finite[0], finite[-1]
    return f"{curve.y[first]:.4g} at {curve.x[first]:g} to {curve.y[last]:.4g} at {curve.x[last]:g}"


def _short(values: NDArray[np.floating[Any]], digits: int = 5) -> list[float | None]:
    return [float(f"{value:.{digits}g}") if math.isfinite(value) else None for value in values.tolist()]
