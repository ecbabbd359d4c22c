"""Tests of the commands of the second half of docs/weights.md, run as a reader types them."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mimae import cli

PAGE = (Path(__file__).parents[2] / "docs/weights.md").read_text().partition("## Export the encoder")[2]
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]
(PYTHON,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_every_command_of_the_page_runs(
    run: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(COMMANDS) == 5
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/mine").symlink_to(run)
    for name, number in (("a.jpg", "00"), ("b.jpg", "02")):
        shutil.copy(images / f"a/{number}.png", tmp_path / name)
    for command in COMMANDS:
        arguments = shlex.split(command.replace("/data/images", str(images)))
        monkeypatch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert not ended.value.code, f"{command}: {capsys.readouterr().err}"
    made = {"exports", "features.npz", "reconstructions.png", "neighbours.png", "map.png"}
    assert made <= {path.name for path in tmp_path.iterdir()}
    names: dict[str, Any] = {"images": torch.zeros(2, 8, 12, 3, dtype=torch.uint8)}
    exec(PYTHON, names)
    assert names["features"].shape == (2, 12) and names["last"].shape == (2, 12, 2, 3)
