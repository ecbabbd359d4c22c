"""`mimae bench tasks`: both contenders learn from the same batch, and the table has what the file has."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from mimae import distributed
from mimae.bench.tasks.tasks import CONTESTS, OURS, _made, show


@pytest.mark.slow
@pytest.mark.parametrize("task", CONTESTS)
def test_both_contenders_learn(task: str, tmp_path: Path) -> None:
    """Both losses fall at every step: the batch is the same one, and its pixels tell the classes.

    A contender that knows nothing begins near the logarithm of the number of classes, in each of its losses. The first
    losses may differ by a half: random heads add the spread of their logits, and our loss of segmentation is divided by
    all pixels, the ignored ones too (a quarter of them here).
    """
    make, baseline, _ = CONTESTS[task]
    distributed.setup()
    try:
        losses = []
        for name in (OURS, baseline):
            step = _made(make, tmp_path, name)
            losses.append([step() for _ in range(4)])
    finally:
        distributed.shutdown()
    assert losses[0][0] == pytest.approx(losses[1][0], rel=0.5)
    assert all(after < before for each in losses for before, after in pairwise(each))


def test_the_table_shows_the_file() -> None:
    each = {
        "images_per_cpu_s": {OURS: 3.0, "plain": 2.0},
        "ratio": {"median": 1.5, "min": 1.4, "max": 1.6},
        "peak_bytes": {OURS: 2**30, "plain": 2**31},
    }
    assert show({"tasks": {"classify": each}}).splitlines()[2:] == [
        "| classify | mimae | 3.00 | 1024 MiB | 1.50 (1.40 to 1.60) |",
        "| classify | plain | 2.00 | 2048 MiB |  |",
    ]
