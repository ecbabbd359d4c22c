"""Mutants: copies of a kernel module with one error each, which the module's tests have to detect.

A mutant is a copy of a module with one text replaced. Its launchers and kernels replace those of the module while one
of the checks of the test file runs. No mutation accesses memory outside its arguments. A test file describes its
mutants and gets its two tests from `mutant_tests`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest

from mimae.kernels.runtime import INTERPRETED

Check = Callable[[pytest.MonkeyPatch], None]
"""Function that runs a check of a test module."""


class Mutants(NamedTuple):
    """The mutations of a kernel module, and the checks of its test file that have to detect them."""

    module: str
    test: str
    """The name of the test module."""
    checks: dict[str, Check]
    mutations: list[tuple[str, str, str, str]]
    """Each mutation: a description, the check that detects it, the text, and its replacement. The first four always
    run, the others are slow tests."""


_numbers = count()


def mutant_tests(mutants: Mutants) -> tuple[Any, Any]:
    """Return a test of unchanged copies and a test of mutants.

    The first one shows that a mutant does not fail merely because it is a copy.
    """

    @pytest.mark.parametrize("check", mutants.checks)
    def test_an_unchanged_copy_passes(check: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        header = "from __future__ import annotations\n"
        _run(mutants, check, header, header + "\n", tmp_path, monkeypatch)

    @pytest.mark.parametrize(
        ("check", "old", "new"),
        [
            pytest.param(check, old, new, id=lost, marks=[pytest.mark.slow] if place >= 4 else [])
            for place, (lost, check, old, new) in enumerate(mutants.mutations)
        ],
    )
    def test_a_mutant_fails(check: str, old: str, new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(AssertionError):
            _run(mutants, check, old, new, tmp_path, monkeypatch)

    return _marked(test_an_unchanged_copy_passes), _marked(test_a_mutant_fails)


def _marked(test: Any) -> Any:
    interpreted = pytest.mark.skipif(not INTERPRETED, reason="a mutant may do anything to a GPU")
    # Mutants, and lanes of infonce past the edge, compute with arbitrary numbers.
    return pytest.mark.filterwarnings("ignore::RuntimeWarning")(interpreted(test))


def _copy_of(module: ModuleType, old: str, new: str, folder: Path) -> ModuleType:
    """Return a copy with a text that occurs once replaced; its ops are registered under a separate name."""
    assert module.__file__ is not None
    source = Path(module.__file__).read_text()
    if source.count(old) != 1:
        raise LookupError(f"{module.__name__} has {source.count(old)} times {old!r}: mend the mutation")
    name = f"mutant{next(_numbers)}"
    file = folder / f"{name}.py"
    # The ops of the extension are left out of the copy, because their shapes are already registered.
    source = source.replace("native.LOADED", "False").replace('custom_op("mimae::', f'custom_op("{name}::')
    file.write_text(source.replace(old, new))
    spec = spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    copy = module_from_spec(spec)
    sys.modules[name] = copy
    spec.loader.exec_module(copy)
    return copy


def _run(mutants: Mutants, check: str, old: str, new: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a check of the test file with the launchers and kernels of a copy of the module."""
    original = import_module(f"mimae.kernels.{mutants.module}")
    copy = _copy_of(original, old, new, folder)
    test, interface = sys.modules[mutants.test], import_module("triton.runtime.jit").KernelInterface
    replaced = {
        name: value
        for name, value in vars(original).items()
        if isinstance(value, interface) or name in ("launch_forward", "launch_backward", "places")
    }
    for name in replaced:
        monkeypatch.setattr(original, name, getattr(copy, name))
    for name, value in list(vars(test).items()):
        if value is original:
            monkeypatch.setattr(test, name, copy)
        elif name in replaced and value is replaced[name]:
            monkeypatch.setattr(test, name, getattr(copy, name))
    mutants.checks[check](monkeypatch)
