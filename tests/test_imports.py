"""The direction of imports: cli -> verbs -> model, objective, data, engines -> kernels, randomness."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "mimae"

# A part is a module or package right below mimae. Lowest first: a part imports only from its own layer and
# from those listed before it. A new part takes its place here.
LAYERS = (
    {"kernels"},
    {"errors", "settings", "randomness", "distributed", "dcp", "nodes"},
    {"masking", "model", "posterior", "objective", "adamw", "optimizer", "data", "engines"},
    {"recipes", "config", "checkpoint", "saving", "guards", "lock", "telemetry", "diagnostics", "pictures", "watchdog"},
    {"exposure", "loop", "transfer", "plan", "bench", "configs", "doctor", "show", "status", "replay", "shortage"},
    {"launch"},
    {"submit"},
    {"cli"},
    {"__main__"},
)
LAYER = {part: depth for depth, parts in enumerate(LAYERS) for part in parts}


def imported(source: str, module: str, is_package: bool = False) -> Iterator[str]:
    """Full names that `module` imports, inside functions too; not what only a type checker sees."""
    tree = ast.parse(source)
    unseen: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            unseen.update(inner for statement in node.body for inner in ast.walk(statement))
    for node in ast.walk(tree):
        if node in unseen:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")[: None if is_package else -1]
                base = ".".join([*parents[: len(parents) - node.level + 1], *filter(None, [node.module])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def modules() -> Iterator[tuple[str, Path]]:
    """Each module of the package by its full name; the links' targets are reached through the links."""
    folders = [PACKAGE]
    while folders:
        for entry in sorted(folders.pop().iterdir()):
            if entry.is_dir() and entry.name.isidentifier() and entry.name != "__pycache__":
                folders.append(entry)
            elif entry.suffix == ".py":
                name = ".".join(["mimae", *entry.relative_to(PACKAGE).with_suffix("").parts])
                yield name.removesuffix(".__init__"), entry


def part(name: str) -> str | None:
    """The part of mimae that a full name lies in; None for other packages and for mimae's own attributes."""
    root, *rest = name.split(".")
    if root != "mimae" or not rest or rest[0] in ("__version__", "*"):
        return None
    return rest[0]


EDGES = {
    (name, target)
    for name, path in modules()
    if name != "mimae"  # the facade: it imports everything, when asked for it
    for target in imported(path.read_text(), name, path.name == "__init__.py")
}


def test_every_part_has_a_layer() -> None:
    parts = {found for name, _ in modules() if (found := part(name))}
    assert {"kernels", "data", "model", "cli"} <= parts, "the package was not walked"
    assert parts <= LAYER.keys(), f"give these a place in LAYERS: {sorted(parts - LAYER.keys())}"


def test_nothing_lower_imports_anything_higher() -> None:
    wrong = [
        f"{name} imports {target}"
        for name, target in sorted(EDGES)
        if (source := part(name)) and (aim := part(target)) and LAYER.get(aim, 99) > LAYER.get(source, -1)
    ]
    assert not wrong, "\n".join(wrong)


def test_parts_do_not_import_each_other_in_a_circle() -> None:
    graph: dict[str, set[str]] = {}
    for name, target in EDGES:
        source, aim = part(name), part(target)
        if source and aim and source != aim:
            graph.setdefault(source, set()).add(aim)
    TopologicalSorter(graph).prepare()  # raises CycleError with the circle


def test_kernels_depend_on_torch_and_triton_alone() -> None:
    allowed = {"mimae", "torch", "triton", "__future__", *sys.stdlib_module_names}
    targets = {target for name, target in EDGES if part(name) == "kernels"}
    assert any(target.startswith("torch") for target in targets), "the kernels were not read"
    assert {target.split(".")[0] for target in targets} <= allowed
    assert {part(target) for target in targets} <= {None, "kernels"}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import mimae.loop", {"mimae.loop"}),
        ("from mimae import loop, __version__", {"mimae.loop", "mimae.__version__"}),
        ("def verb():\n    from mimae.loop import pretrain", {"mimae.loop.pretrain"}),
        ("from . import settings", {"mimae.data.settings"}),
        ("from ..loop import pretrain", {"mimae.loop.pretrain"}),
        ("if TYPE_CHECKING:\n    import mimae.loop\nelse:\n    import os", {"os"}),
    ],
)
def test_the_reader_sees_every_form_of_import(source: str, expected: set[str]) -> None:
    assert set(imported(source, "mimae.data.order")) == expected


def test_the_reader_resolves_relative_imports_of_a_package() -> None:
    assert list(imported("from .order import Plan", "mimae.data", True)) == ["mimae.data.order.Plan"]
