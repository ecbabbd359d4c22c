"""The profile of a pretraining step of ViT-B/16, with a trace for Perfetto in a folder next to the result.

`python -m mimae.bench.gpu.trace FILE [key=value ...]`.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from mimae.bench.gpu.train import photographs
from mimae.config.load import load_recipe
from mimae.config.recipe import RunRecipe
from mimae.outside.files import write_atomically
from mimae.report.profile import profile, show
from mimae.report.profile.advice import advise

IMAGES, DIFFERENT = 1024, 64
"""Number of files, and of photographs among them."""

STEPS = 5
"""Number of steps under the profiler."""


def main(file: Path, overrides: list[str]) -> None:
    """Profile the step, and write what `mimae profile --out` writes."""
    traces = file.with_suffix("")
    traces.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        photographs(Path(folder), IMAGES, DIFFERENT)
        given = [f"data.path={folder}", "data.val_path=null", *overrides]
        found = profile.measure(load_recipe("vit_base_400ep", given, None, RunRecipe).recipe, STEPS, traces)
    write_atomically(file, json.dumps(show.as_dict(found, advise(found)), indent=2) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
