"""The direction of imports, and that no two modules import each other, not even for a type checker.

A room is a folder of mimae/, or a file right in it.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping, Set
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "mimae"

# Lowest first: a module imports only from its own layer and from those before it. A name stands for a room, for a
# module `room.module`, or (`settings`) for the module of that name in every room; the most precise one counts. A new
# room takes its place here.
LAYERS = (
    {"kernels", "outside", "errors", "ranks.place", "ranks.messages", "config.section"},
    {"settings"},
    {"model.geometry", "objective.terms", "optim.resolution"},
    {"config"},
    {"randomness", "ranks"},
    {"distributed"},
    {"model", "objective", "optim", "data", "checkpoints", "engines", "telemetry", "weights"},
    {"detection", "segmentation"},
    {"faults", "plan", "transfer.load"},
    {"evaluate"},
    {"train"},
    {"tools", "configs", "transfer"},
    {"launch"},
    {"bench", "report"},
    {"cli"},
    {"__main__"},
)
DEPTH = {name: depth for depth, names in enumerate(LAYERS) for name in names}
EVERY_ROOM = {"settings"}

KNOWN_CIRCLES: set[frozenset[str]] = set()


def imported(source: str, module: str, is_package: bool = False) -> Iterator[str]:
    """Yield the full names that `module` imports: inside functions and for type checkers too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")[: None if is_package else -1]
                base = ".".join([*parents[: len(parents) - node.level + 1], *filter(None, [node.module])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def modules() -> Iterator[tuple[str, Path]]:
    """Yield each module of the package by its full name; the links' targets are reached through the links."""
    folders = [PACKAGE]
    while folders:
        for entry in sorted(folders.pop().iterdir()):
            if entry.is_dir() and entry.name.isidentifier() and entry.name != "__pycache__":
                folders.append(entry)
            elif entry.suffix == ".py":
                name = ".".join(["mimae", *entry.relative_to(PACKAGE).with_suffix("").parts])
                yield name.removesuffix(".__init__"), entry


MODULES = dict(modules())


def module_of(name: str) -> str | None:
    """Return the module of a full name, or None for other packages and for attributes of mimae itself."""
    while name.startswith("mimae."):
        if name in MODULES:
            return name
        name = name.rpartition(".")[0]
    return None


def room(module: str) -> str:
    return module.split(".")[1]


def layer(module: str) -> int:
    """Return the depth of a module in LAYERS."""
    parts = module.split(".")[1:]
    names = (".".join(parts), parts[-1] if parts[-1] in EVERY_ROOM else "", parts[0])
    return next(DEPTH[name] for name in names if name in DEPTH)


# The package itself is the facade: it imports everything on demand.
IMPORTS = {
    name: set(imported(path.read_text(), name, path.name == "__init__.py"))
    for name, path in MODULES.items()
    if name != "mimae"
}
GRAPH = {
    name: {module for target in targets if (module := module_of(target)) and module != name}
    for name, targets in IMPORTS.items()
}


def circles(graph: Mapping[str, Set[str]]) -> set[frozenset[str]]:
    """Return the sets of modules that reach each other (Tarjan's strongly connected components of two or more)."""
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found = set()

    def visit(name: str) -> None:
        order[name] = lowest[name] = len(order)
        stack.append(name)
        for target in graph.get(name, ()):
            if target not in order:
                visit(target)
                lowest[name] = min(lowest[name], lowest[target])
            elif target in stack:
                lowest[name] = min(lowest[name], order[target])
        if lowest[name] == order[name]:
            start = stack.index(name)
            members = frozenset(stack[start:])
            del stack[start:]
            if len(members) > 1:
                found.add(members)

    for name in graph:
        if name not in order:
            visit(name)
    return found


def test_every_room_has_a_layer() -> None:
    rooms = {room(name) for name in GRAPH}
    assert {"kernels", "data", "model", "cli"} <= rooms, "the package was not walked"
    listed = {name for name in DEPTH if "." not in name} - EVERY_ROOM
    assert rooms == listed, f"LAYERS and mimae/ differ in {sorted(rooms ^ listed)}"
    assert {f"mimae.{name}" for name in DEPTH if "." in name} <= GRAPH.keys(), "LAYERS names a module that is not there"


def test_nothing_lower_imports_anything_higher() -> None:
    wrong = [
        f"{name} imports {target}"
        for name, targets in sorted(GRAPH.items())
        for target in sorted(targets)
        if layer(target) > layer(name)
    ]
    assert not wrong, "\n".join(wrong)


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert circles(GRAPH) == KNOWN_CIRCLES


def test_the_most_precise_name_gives_the_layer() -> None:
    order = ["config.section", "model.settings", "config.recipe", "model.encoder", "train.trainer", "cli"]
    depths = [layer(f"mimae.{name}") for name in order]
    assert depths == sorted(set(depths))
    assert layer("mimae.model.settings") == layer("mimae.train.settings")


def test_circles_are_found() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": {"e"}, "e": {"d"}, "f": {"a"}}
    assert circles(graph) == {frozenset("abc"), frozenset("de")}
    assert circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == set()


def test_settings_stand_alone() -> None:
    """The settings of every room need only pydantic and their common base class, so that they load without torch."""
    found = {name for name in GRAPH if name.endswith(".settings")}
    assert {f"mimae.{name}.settings" for name in ("data", "engines", "model", "optim", "train")} <= found
    allowed = {"mimae.config.section", "pydantic", *sys.stdlib_module_names}
    for name in found:
        targets = {module_of(target) or target.split(".")[0] for target in IMPORTS[name]}
        assert targets <= allowed, f"{name} imports {sorted(targets - allowed)}"


def test_recipes_are_read_without_torch() -> None:
    allowed = {"mimae", "pydantic", "typer", "yaml", *sys.stdlib_module_names}
    reached = {name for name in GRAPH if room(name) == "config"}
    while more := {target for name in reached for target in GRAPH[name]} - reached:
        reached |= more
    assert "mimae.engines.settings" in reached
    for name in reached:
        targets = {target.split(".")[0] for target in IMPORTS[name]}
        assert targets <= allowed, f"{name} imports {sorted(targets - allowed)}"


def test_kernels_depend_on_torch_and_triton_alone() -> None:
    allowed = {"mimae", "torch", "triton", "__future__", *sys.stdlib_module_names}
    kernels = {name for name in GRAPH if room(name) == "kernels"}
    targets = {target for name in kernels for target in IMPORTS[name]}
    assert any(target.startswith("torch") for target in targets), "the kernels were not read"
    assert {target.split(".")[0] for target in targets} <= allowed
    assert {room(target) for name in kernels for target in GRAPH[name]} == {"kernels"}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import mimae.train", {"mimae.train"}),
        ("from mimae import train, __version__", {"mimae.train", "mimae.__version__"}),
        ("def verb():\n    from mimae.train import pretrain", {"mimae.train.pretrain"}),
        ("from . import settings", {"mimae.data.settings"}),
        ("from ..train import pretrain", {"mimae.train.pretrain"}),
        ("if TYPE_CHECKING:\n    import mimae.train\nelse:\n    import os", {"mimae.train", "os"}),
    ],
)
def test_the_reader_sees_every_form_of_import(source: str, expected: set[str]) -> None:
    assert set(imported(source, "mimae.data.order")) == expected


def test_the_reader_resolves_relative_imports_of_a_package() -> None:
    assert list(imported("from .order import Plan", "mimae.data", True)) == ["mimae.data.order.Plan"]


def test_a_name_is_found_in_its_module() -> None:
    assert module_of("mimae.errors.UserError") == "mimae.errors"
    assert module_of("mimae.data") == "mimae.data"
    assert module_of("torch.nn") is None
