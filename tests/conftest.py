"""What all tests share: GPU tests are skipped where there is none, and slow machines are no failure."""

from __future__ import annotations

import pytest
from hypothesis import settings

# The time of one example says more about the machine's load than about the code.
settings.register_profile("mimae", deadline=None)
settings.load_profile("mimae")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    needy = [item for item in items if item.get_closest_marker("gpu")]
    if needy:
        import torch

        if not torch.cuda.is_available():
            for item in needy:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
