"""Test that follows docs/tutorial.md word by word."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from PIL import Image

from tests.test_cli import launch
from tests.test_documents import ROOT, commands


@pytest.mark.slow  # 200 steps, a probe and two pictures
def test_the_tutorial_ends_with_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    typed = [command.text for command in commands(ROOT / "docs/tutorial.md")]
    assert len(typed) == 7
    for command in typed:
        program, *arguments = shlex.split(command)
        assert program == "mimae" and launch(monkeypatch, *arguments) == 0, f"{command}: {capfd.readouterr().err}"
    for picture in ("samples.png", "reconstructions.png"):
        assert Image.open(tmp_path / picture).width > 100
    assert "reconstructions" in (tmp_path / "runs/tutorial/report.html").read_text().lower()
    found = json.loads((tmp_path / "runs/tutorial/probe.json").read_text())["features"]
    assert found["this run"]["knn"] > max(found["raw pixels"]["knn"], found["random encoder"]["knn"])
