"""End of every check.py: the comparison of the outputs of a library with those that were stored at the export.

A check.py is the source of a module of this folder, which defines `outputs`, followed by the source of these functions.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
BOUND = 1e-4
"""Largest difference that is allowed in fp32."""


def differences(outputs: Callable[[np.ndarray], dict[str, np.ndarray]]) -> dict[str, float]:
    """Return the largest absolute difference of each output."""
    stored = np.load(HERE / "check.npz")
    found = outputs(stored["images"])
    return {name: float(np.abs(values - stored[name]).max()) for name, values in found.items()}


def report(found: dict[str, float]) -> None:
    """Print the differences, and exit with 1 if one of them is too large or no number."""
    print("\n".join(f"{name}: differs by {worst:.1e} at most (allowed: {BOUND:.0e})" for name, worst in found.items()))
    sys.exit(not max(found.values()) <= BOUND)
