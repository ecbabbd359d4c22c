"""Pages of the site that are made from other files, so that nothing is written twice (mkdocs calls these functions).

README, CONTRIBUTING and SECURITY stay where readers of the repository look for them; the site has their sections as
pages. The reference of the commands comes from the command line itself, and that of the Python API from the code.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import typer.main
from mkdocs.structure.files import File

from mimae import cli

ROOT = Path(__file__).parents[1]

API = {
    "mimae": ["run", "pretrain"],
    "mimae.transfer.load": ["load_encoder"],
    "mimae.config.load": ["load_recipe"],
    "mimae.model.mimae": ["MIMAE"],
    "mimae.model.encoder": ["Encoder"],
    "mimae.errors": ["UserError", "ConfigError", "RunError", "CheckpointError"],
    "mimae.objective.loss": ["Loss"],
    "mimae.objective.terms": ["Term"],
    "mimae.engines.base": ["Engine"],
    "mimae.data.sources.base": ["Source"],
    "mimae.telemetry.trackers": ["Tracker"],
    "mimae.train.task": ["Task"],
}
"""Names of docs/python.md by their module; the ops of mimae.kernels are added from its list."""

HOMES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "SECURITY.md": "operations.md"}
"""Page that a file outside of docs/ is on the site."""


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are made."""
    for name, text in made().items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turn links to files of the repository that the site lacks into their paths."""
    return linked(markdown, {file.src_uri for file in files}) if page.file.src_uri not in made() else markdown


@cache
def made() -> dict[str, str]:
    """Return the made pages by name."""
    readme, contributing = sections("README.md"), sections("CONTRIBUTING.md")
    start = ["Two commands", "Your own images", "After pretraining", "In Python"]
    method = ["Which choices are ours", "Where it differs from MAE"]
    pages = {
        "index.md": readme[""] + "".join(readme[title] for title in ("Recipes", "How fast")),
        "getting-started.md": "# Getting started\n\n" + "".join(readme[title] for title in start),
        "method.md": "# Choices of the method\n\n" + "".join(readme[title] for title in method),
        "operations.md": "# Operations\n\n" + readme["Several GPUs, machines, engines"] + _lower(_read("SECURITY.md")),
        "commands.md": commands(),
        "api.md": api(),
        "contributing.md": "".join(text for title, text in contributing.items() if not title.startswith("Adding ")),
    }
    for title, text in contributing.items():
        if title.startswith("Adding "):
            pages[f"{title.lower().replace(' ', '-')}.md"] = text.replace("## ", "# ", 1)
    present = {path.name for path in (ROOT / "docs").glob("*.md")} | set(pages)
    images = {f"images/{path.name}" for path in (ROOT / "docs/images").iterdir()}
    return {name: linked(text, present | images, at_root=True) for name, text in pages.items()}


def sections(file: str) -> dict[str, str]:
    """Return the sections of a file by their titles (level 2); "" is what comes before the first."""
    parts = re.split(r"^## (.+)\n", _read(file), flags=re.MULTILINE)
    return {"": parts[0]} | {title: f"## {title}\n{text}" for title, text in zip(parts[1::2], parts[2::2], strict=True)}


def linked(markdown: str, present: set[str], at_root: bool = False) -> str:
    """Return a page with links that hold on the site; a link to another file becomes the file's path.

    `at_root`: the links are relative to the repository's root, and not to docs/.
    """
    titles = {title: _page_of(title) for title in sections("README.md") if title}

    def replace(match: re.Match[str]) -> str:
        image, text, target = match.groups()
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target):
            return match[0]
        if not path:
            page = next((page for title, page in titles.items() if _slug(title) == anchor), None)
            return f"[{text}]({page}#{anchor})" if at_root and page else match[0]
        full = (ROOT / path if at_root else ROOT / "docs" / path).resolve().relative_to(ROOT).as_posix()
        name = HOMES.get(full) or full.removeprefix("docs/")
        if name in present:
            return f"{image}[{text}]({name}{'#' + anchor if anchor else ''})"
        return text if text.strip("`") in full else f"{text} (`{full}`)"

    return re.sub(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", replace, markdown)


def commands() -> str:
    """Return the reference of the commands: the help of each."""
    parts = ["# Commands\n\nThe output of `mimae COMMAND --help`, for every command.\n"]
    for words, text in _helps(typer.main.get_group(cli.app), "mimae"):
        parts.append(f"## {words}\n\n```text\n{text.rstrip()}\n```\n")
    return "\n".join(parts)


def _helps(group: Any, *path: str) -> Iterator[tuple[str, str]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _helps(command, *path, name)
        else:
            context = command.make_context(name, ["--help"], resilient_parsing=True)
            context.info_name = " ".join([*path, name])
            yield context.info_name, command.get_help(context)


def api() -> str:
    """Return the reference of the Python API."""
    from mimae import kernels

    names = {**API, "mimae.kernels": [name for name in kernels.__all__ if callable(getattr(kernels, name))]}
    parts = ["# Python API in detail\n\nFrom the code. [The public Python API](python.md) says which names stay.\n"]
    for module, members in names.items():
        parts.append(f"## `{module}`\n")
        for name in members:
            home = getattr(getattr(__import__(module, fromlist=[name]), name), "__module__", module)
            home = home if home.startswith("mimae.") else module
            parts.append(f"::: {home}.{name}\n    options: {{heading_level: 3}}\n")
    return "\n".join(parts)


def _page_of(title: str) -> str:
    """Return the page that has a section of README."""
    if title in ("Which choices are ours", "Where it differs from MAE"):
        return "method.md"
    if title == "Several GPUs, machines, engines":
        return "operations.md"
    return "index.md" if title in ("Recipes", "How fast") else "getting-started.md"


def _slug(title: str) -> str:
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def _lower(markdown: str) -> str:
    """Return a page with its headings one level lower."""
    return re.sub(r"^#", "##", markdown, flags=re.MULTILINE)


def _read(file: str) -> str:
    return (ROOT / file).read_text(encoding="utf-8")
