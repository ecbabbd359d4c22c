"""How the threads of a process wait for each other's work."""

from __future__ import annotations

from collections.abc import MutableMapping

SPINS = {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "0"}
"""Variables of GNU's and of LLVM's OpenMP, and how long a thread of theirs spins before it sleeps."""

_SAME = ("OMP_WAIT_POLICY", *SPINS)


def yield_cores(environment: MutableMapping[str, str]) -> None:
    """Set that threads which wait for each other soon sleep, unless the user has set how they wait.

    OpenMP reads the variables when torch is imported. By default its threads spin for milliseconds: where other
    processes want the cores too (the run's own loader does), they spin away the time of the thread that they wait for,
    and a step takes many times as long. The thousand turns of a loop that are left bridge the gap between two
    operators, so that idle cores lose nothing.
    """
    if not any(name in environment for name in _SAME):
        environment.update(SPINS)
