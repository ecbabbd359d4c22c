"""Fixtures that write run directories by hand, as a run would leave them; nothing is trained."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mimae.config.load import load_recipe
from mimae.config.printing import as_yaml

MakeRun = Callable[..., Path]


def lines(records: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def step_record(step: int, **more: Any) -> dict[str, Any]:
    falling = 0.4 + 2 * math.exp(-step / 50)
    return {
        "step": step,
        "epoch": step / 100,
        "samples": 32 * step,
        "loss": 1.5 * falling,
        "rec": falling,
        "max_mi": falling / 2,
        "gate": 1.0,
        "lr": 1e-3,
        "grad_norm": 0.5,
        "images_per_s": 200.0,
        "views_per_s": 800.0,
        "data_wait": 0.01,
        "mem_peak_bytes": 2**30,
        **more,
    }


def epoch_record(epoch: int, **more: Any) -> dict[str, Any]:
    shares = {"data": 1.0, "forward": 40.0, "backward": 50.0, "optimizer": 7.0, "checkpoint": 1.0}
    return {
        "epoch": epoch,
        "step": 100 * (epoch + 1),
        "images": 3200,
        "seconds": 100.0,
        "images_per_s": 32.0,
        "data_wait": 0.01,
        "mem_peak_bytes": 2**30,
        "mi_lower_nats": 2 + epoch / 10,
        "mi_upper_nats": 60 - epoch,
        "rec": 0.5,
        **{f"seconds_{phase}": seconds for phase, seconds in shares.items()},
        "effective_rank": 20.0,
        "knn": 0.7 + epoch / 100,
        **more,
    }


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Make a run of quickstart with `steps` records and three epochs."""

    def make(
        name: str = "run",
        steps: Iterable[Mapping[str, Any]] | None = None,
        epochs: Iterable[Mapping[str, Any]] | None = None,
        overrides: tuple[str, ...] = (),
    ) -> Path:
        run = tmp_path / name
        (run / "images").mkdir(parents=True)
        recipe = load_recipe("quickstart", [f"run.dir={run}", *overrides]).recipe
        (run / "config.yaml").write_text(as_yaml(recipe))
        (run / "metrics.jsonl").write_text(lines(steps or [step_record(step) for step in range(10, 310, 10)]))
        (run / "epochs.jsonl").write_text(lines(epochs or [epoch_record(epoch) for epoch in range(3)]))
        event = {"time": "2026-01-01T00:00:00+00:00", "step": 300, "kind": "finish", "details": {}}
        (run / "events.jsonl").write_text(lines([event]))
        (run / "environment.json").write_text('{"python": "3.11", "packages": {"torch": "2.14"}}')
        for step in (100, 300):
            png = io.BytesIO()
            Image.new("RGB", (40, 20), (step % 256, 0, 0)).save(png, "PNG")
            (run / f"images/step-{step:08d}.png").write_bytes(png.getvalue())
        return run

    return make
