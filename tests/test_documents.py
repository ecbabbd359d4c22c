"""Tests of every command in README, SECURITY and docs/*.md: cheap ones are run, others are parsed.

For commands that need a GPU or take hours, recipe and overrides are loaded, with the paths that they name. Other tests
run docs/tutorial.md, the second half of docs/weights.md, and README's command for one's own images.
"""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer.main

from mimae import cli
from mimae.config.load import load_recipe
from mimae.config.recipe import RECIPES, RunRecipe
from tests.data.conftest import write_images
from tests.report.conftest import MakeRun, make_run, step_record  # noqa: F401 (make_run is a fixture)
from tests.test_cli import launch

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "SECURITY.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

TASKS = {"pretrain": "pretrain", "finetune": "classify", "linear": "classify", "segment": "segment", "detect": "detect"}

NOT_OURS = [
    r"apt install libaio-dev",
    r"pip install .+",
    r"python -m deepspeed\.checkpoint\.ds_to_universal .+",
    r"openssl rand -hex 32 > \S+",
    r"chmod 600 \S+",
    r"for seed in [\d ]+",
]
"""Commands of other programs. They are not run, because they install packages or need another library's files."""


class Command(NamedTuple):
    """A command of a page."""

    page: str
    text: str


def commands(page: Path) -> Iterator[Command]:
    """Yield the commands in a page's fenced shell blocks, without comments and with continued lines joined."""
    for block in re.findall(r"^```(?:sh|bash)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            line = re.sub(r"(^|\s)#.*", "", line).strip()
            for part in re.split(r"\s&&\s|;\s*", line):
                part = re.sub(r"^(do|done)\b\s*", "", part.strip())
                if part:
                    yield Command(page.name, " ".join(part.split()))


EVERY = [command for page in PAGES for command in commands(page)]


def words_of(command: Command) -> list[str] | None:
    """Return the arguments of a mimae command, without the program name and without marks of optional parts."""
    text = command.text.replace("[KEY=VALUE ...]", "")
    words = shlex.split(re.sub(r"\[(--?\w[^\]]*)\]", lambda option: option[1].split(" | ")[-1], text))
    if words[0] == "srun":
        words = words[next(i for i, word in enumerate(words) if word == "mimae") :]
    return words[1:] if words[0] in ("mimae", ".venv/bin/mimae") else None


def parsed(arguments: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Parse a command like the command line; return its words and its parameters. Raises an error for a mistake."""
    command: Any = typer.main.get_group(cli.app)
    words: list[str] = []
    while hasattr(command, "commands"):
        words.append(arguments[0])
        command, arguments = command.commands[arguments[0]], arguments[1:]
    return words, command.make_context(" ".join(words), list(arguments)).params


def test_pages_have_commands() -> None:
    assert len(EVERY) > 30 and {"README.md", "data.md", "weights.md"} <= {command.page for command in EVERY}


@pytest.mark.parametrize("command", EVERY, ids=lambda command: f"{command.page}: {command.text}"[:70])
def test_a_command_is_one_that_the_command_line_takes(command: Command) -> None:
    arguments = words_of(command)
    if arguments is None:
        program, *rest = command.text.split()
        if program == "make":
            assert re.search(rf"^{rest[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        else:
            without_settings = re.sub(r'^([A-Z_]+=("[^"]*"|\S*) )+', "", command.text)
            assert any(re.fullmatch(each, without_settings) for each in NOT_OURS), f"no rule covers {command.text}"
        return
    words, given = parsed([word.replace("$seed", "0").replace("$CIFAR", "cifar") for word in arguments])
    recipe = given.get("recipe")
    if recipe and "/" not in recipe and recipe != "RECIPE":
        tree = RECIPES[TASKS[words[0]]] if words[0] in TASKS else RunRecipe
        load_recipe(recipe, given.get("overrides") or (), None, tree)


def test_a_wrong_command_is_found() -> None:
    for text in (
        "mimae probe RUN --nosuch",
        "mimae nosuch",
        "rm -rf build",
        "mimae pretrain quickstart masking.nosuch=1",
    ):
        with pytest.raises(Exception):  # noqa: B017 (each parser has its own)
            test_a_command_is_one_that_the_command_line_takes(Command("x.md", text))


def test_cheap_commands_run(
    make_run: MakeRun,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The commands are those of docs/data.md and docs/report.md, with four images and an untrained run."""
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "images", [f"{'ab'[i % 2]}/{i}.png" for i in range(4)], 40, 40)
    run = make_run(steps=[step_record(step) for step in range(10, 210, 10)])
    (tmp_path / "runs").mkdir()
    for name in ("quickstart", "a", "b", "seed-0", "seed-1", "new"):
        shutil.copytree(run, tmp_path / "runs" / name)
    places = {"PATH": "images", "SRC": "images", "DIR/NAME.tar": "packed/set.tar", "FILE.png": "samples.png"}
    places |= {"RECIPE": "quickstart", "/tmp/a.html": "a.html"}
    ran = []
    for command in EVERY:
        arguments = words_of(command)
        is_cheap = arguments is not None and arguments[0] in ("report", "compare", "data")
        if arguments and is_cheap and command.page != "tutorial.md":
            for unknown in ("--image-key", "KEY", "--label-key", "KEY", "--range", "4095"):
                arguments = [word for word in arguments if word != unknown]
            assert launch(monkeypatch, *(places.get(word, word) for word in arguments)) == 0, (
                f"{command.text}: {capsys.readouterr().err}"
            )
            ran.append(command.text)
    assert len(ran) == 8
    made = {"a.html", "compare.html", "base.json", "packed", "samples.png"}
    assert made <= {path.name for path in tmp_path.iterdir()}
