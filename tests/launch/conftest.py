"""A fixture that ensures that no test of the launcher leaves a process running."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.launched import Launched


@pytest.fixture(autouse=True)
def none_left() -> Iterator[None]:
    yield
    Launched.end_all()
