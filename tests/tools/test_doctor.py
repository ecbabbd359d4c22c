"""Tests of `mimae doctor`: text and JSON reports, also with packages that are missing or broken."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from mimae import cli
from mimae.kernels import runtime
from mimae.tools import doctor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FOREIGN = ("amp_C", "apex", "deepspeed", "xformers")
Install = Callable[[dict[str, str]], None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Put packages, given as file -> text, before the installed ones in the import path."""

    def forget() -> None:
        for module in [name for name in sys.modules if name.split(".")[0] in FOREIGN]:
            del sys.modules[module]

    def write(files: dict[str, str]) -> None:
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    forget()
    monkeypatch.syspath_prepend(tmp_path)
    yield write
    forget()


def printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    monkeypatch.setattr(sys, "argv", ["mimae", "doctor", *options])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    assert not exit.value.code
    return capsys.readouterr().out


def test_text_and_json_tell_the_same(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    told = json.loads(printed(monkeypatch, capsys, "--json"))
    assert told["versions"]["torch"] == torch.__version__
    lines = [" ".join(line.split()) for line in printed(monkeypatch, capsys).splitlines()]
    assert lines == [
        " ".join(line.split())
        for title, section in told.items()
        for line in (title, *(f"{name} {found}" for name, found in section.items()))
    ]


def test_each_op_is_listed_with_the_implementation_that_runs() -> None:
    ops = doctor.examine()["ops"]
    assert {"orthogonal_masks", "embed_visible", "infonce_grad", "club_terms"} <= ops.keys()
    assert "prefer" not in ops
    for op, told in ops.items():
        assert told.split(":")[0] == runtime.chosen(op, torch.empty(0, device=DEVICE))


def test_pypi_s_apex_is_told_from_nvidia_s(install: Install) -> None:
    install({"apex/__init__.py": "raise RuntimeError('not to be imported')"})
    assert "is not NVIDIA's" in doctor.examine()["optimizer.impl"]["apex"]
    install({"apex/optimizers/__init__.py": "", "apex/optimizers/fused_adam.py": ""})
    assert "NVIDIA" not in doctor.examine()["optimizer.impl"]["apex"]


def test_an_xformers_whose_extension_does_not_load(install: Install) -> None:
    install(
        {
            "xformers/__init__.py": "print('greetings')",
            "xformers/ops.py": "def memory_efficient_attention(q, k, v): return q + k + v",
            "xformers/_cpp_lib.py": "_cpp_library_load_exception = OSError('undefined symbol\\nin line 2')",
        }
    )
    told = doctor.examine()["model.attention"]["xformers"]
    assert told == "usable; its own extension does not load (OSError: undefined symbol)"


def test_broken_packages_become_lines(
    install: Install, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(
        {
            "xformers/__init__.py": "print('greetings'); raise OSError('libtorch.so is missing')",
            "deepspeed/__init__.py": "raise RuntimeError('no compiler\\nmore')",
        }
    )
    told = json.loads(printed(monkeypatch, capsys, "--json"))  # without the output that a package prints
    assert told["model.attention"]["xformers"] == "broken: OSError: libtorch.so is missing"
    if DEVICE.type == "cpu":
        assert told["optimizer.impl"]["deepspeed"] == "broken: RuntimeError: no compiler"
