"""Tests of the documents' site: the build has no warnings, the search finds the settings, and no page is missing."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import typer.main

from mimae import cli
from tests.test_cli import verbs

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(find_spec("mkdocstrings_handlers") is None, reason="pip install 'mimae[docs]'")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the site. Every warning is an error."""
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_MKDOCS_2_WARNING", "1")
        build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder)))
    return folder


def test_the_search_finds_settings_commands_and_names(site: Path) -> None:
    index = json.loads((site / "search/search_index.json").read_text())
    separator = re.compile(index["config"]["separator"])

    def pages_with(word: str) -> set[str]:
        """Return the pages that contain a word, with the search's division of text into words."""
        return {
            entry["location"].partition("#")[0]
            for entry in index["docs"]
            if word in separator.split(re.sub(r"<[^>]+>", " ", f"{entry['title']} {entry['text']}"))
        }

    assert {"settings.html", "data.html"} <= pages_with("max_bad_fraction")
    assert "commands.html" in pages_with("neighbours") and "api.html" in pages_with("load_encoder")
    assert "faults.html" in pages_with("SIGTERM") and not pages_with("nosuchword")


def test_every_command_and_each_of_the_seven_additions_has_its_place(site: Path) -> None:
    reference = (site / "commands.html").read_text()
    for words in verbs(typer.main.get_group(cli.app)):
        assert f"Usage: mimae {' '.join(words)} " in reference, words
    additions = ["op", "loss-term", "mask-kind", "source-of-images", "engine", "tracker", "task"]
    for name in additions:
        (page,) = site.glob(f"adding-a*-{name}.html")
        title = f"Adding a{'n' if name[0] in 'oe' else ''} {name.replace('-', ' ')}"
        assert f"## {title}\n" in (ROOT / "CONTRIBUTING.md").read_text() and title in page.read_text()


def test_no_page_asks_another_server_for_anything(site: Path) -> None:
    fetched = re.compile(r"""<(?:script|img|link)\b[^>]*?\b(?:src|href)=["']?(https?://[^"'\s>]+)""")
    assert {url for page in site.glob("*.html") for url in fetched.findall(page.read_text())} == set()
