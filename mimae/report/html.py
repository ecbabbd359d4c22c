"""Generation of HTML in which text cannot become markup: every string is escaped unless this module made it."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from mimae.outside.text import printable

_VOID = frozenset({"img", "input", "meta"})


class Html(str):
    """A piece of a page."""


def tag(name: str, /, *children: object, **attributes: object) -> Html:
    """Return an element with children and attributes.

    `class_="a"` is the attribute class, `data_x` is data-x. None leaves an attribute out, True gives one without a
    value. Children that are not Html are escaped as text.
    """
    shown = "".join(_attribute(key, value) for key, value in attributes.items() if value is not None)
    return Html(f"<{name}{shown}>" + ("" if name in _VOID else f"{join(*children)}</{name}>"))


def join(*children: object) -> Html:
    """Concatenate the children. Those that are not Html are text; their control characters are escaped."""
    return Html("".join(child if isinstance(child, Html) else escape(printable(child)) for child in children))


def table(head: tuple[str, ...], rows: Sequence[tuple[object, ...]], numeric: int = 0) -> Html:
    """Return a table whose last `numeric` columns are numbers."""
    first = len(head) - numeric
    kinds = [None if place < first else "number" for place in range(len(head))]
    titles = join(*(tag("th", title, scope="col", class_=kind) for title, kind in zip(head, kinds)))
    body = join(*(tag("tr", *(tag("td", cell, class_=kind) for cell, kind in zip(row, kinds))) for row in rows))
    # A wide table can be scrolled separately, also with the keyboard.
    return tag("div", tag("table", tag("thead", tag("tr", titles)), tag("tbody", body)), class_="wide", tabindex=0)


def _attribute(key: str, value: object) -> str:
    name = key.rstrip("_").replace("_", "-")
    return f" {name}" if value is True else f' {name}="{escape(printable(value))}"'
