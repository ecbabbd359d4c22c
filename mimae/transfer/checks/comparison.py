"""The end of every check.py: the comparison of a library's outputs with those that were stored at the export.

A check.py consists of a module of this folder, which defines `outputs`, and of the source of these functions.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
BOUND = 1e-4
"""Largest allowed difference in fp32."""


def differences(outputs: Callable[[np.ndarray], dict[str, np.ndarray]]) -> dict[str, float]:
    """Return the largest absolute difference of each output."""
    stored = np.load(HERE / "check.npz")
    found = outputs(stored["images"])
    return {name: float(np.abs(values - stored[name]).max()) for name, values in found.items()}


def report(found: dict[str, float]) -> None:
    """Print the differences, and exit with 1 if one of them is too large or NaN."""
    print("\n".join(f"{name}: differs by {worst:.1e} at most (allowed: {BOUND:.0e})" for name, worst in found.items()))
    sys.exit(not max(found.values()) <= BOUND)
