"""Rules for all tests: GPU tests are skipped without a GPU, and slow machines cause no failures."""

from __future__ import annotations

import math
import os

import pytest
from hypothesis import settings

from mimae.outside.threads import yield_cores

yield_cores(os.environ)

import torch  # noqa: E402 -- its threads wait in the way that has just been set

if not torch.cuda.is_available():
    # This comes before triton is imported, so that its kernels run on CPU tensors in tests that select them.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The time of one example depends more on the machine's load than on the code.
settings.register_profile("mimae", deadline=None)
settings.load_profile("mimae")


@pytest.fixture(autouse=True)
def no_lines_of_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine a short command takes long enough for a line of progress, which no test expects on stderr."""
    monkeypatch.setattr("mimae.outside.progress.FIRST", math.inf)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
