"""Tests that waiting threads sleep, unless the user chose otherwise, and that this is set before torch is imported."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from mimae.outside.threads import SPINS, yield_cores

DOOR = "import os, sys; sys.argv = ['mimae', '--version']; from mimae.cli import main; {}; main()"
CHECK = "print([os.environ.get(name) for name in ('GOMP_SPINCOUNT', 'KMP_BLOCKTIME')], 'torch' in sys.modules)"


@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"])
def test_what_the_user_has_set_stays(name: str) -> None:
    environment = {name: "active"}
    yield_cores(environment)
    assert environment == {name: "active"}


def test_the_command_line_sets_it_before_torch_is_imported() -> None:
    at_the_end = DOOR.format(f"import atexit; atexit.register(lambda: {CHECK})")
    clean = {key: value for key, value in os.environ.items() if key not in (*SPINS, "OMP_WAIT_POLICY")}
    said = subprocess.run([sys.executable, "-c", at_the_end], env=clean, capture_output=True, text=True, check=True)
    assert said.stdout.splitlines()[-1] == "['1000', '0'] False"
