"""A short pretraining of ViT-B/16 on a synthetic folder of photographs, with what its records and nvidia-smi say.

`python -m mimae.bench.gpu.train FILE [key=value ...]`. FILE is written every few seconds while it trains. In a value,
{images} stands for the folder.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

import mimae
from mimae.outside.files import write_atomically
from mimae.telemetry.environment import gpu_facts

IMAGES, DIFFERENT = 8192, 128
"""Number of files, and of photographs among them: the others are links."""

CLASSES = 4
"""Number of subfolders, which are the classes of nearest neighbours."""

STEPS = 60
"""Number of steps. Warm-up and compilation fall into the first ones."""

EVERY = 3.0
"""Seconds between two readings of the clocks, after which the file is written."""


def photographs(folder: Path, count: int, different: int, seed: int = 0) -> None:
    """Write JPEGs of 500 x 375 pixels and about ImageNet's size in bytes: smooth colours under fine noise.

    They are in CLASSES subfolders.
    """
    random = np.random.default_rng(seed)

    def file(number: int) -> Path:
        return folder / str(number % different % CLASSES) / f"{number:05}.jpg"

    for number in range(CLASSES):
        (folder / str(number)).mkdir()
    for number in range(different):
        coarse = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((500, 375))
        noise = random.integers(-20, 21, (375, 500, 3))
        pixels = np.clip(np.asarray(coarse) + noise, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(file(number), quality=90)
    for number in range(different, count):
        file(number).hardlink_to(file(number % different))


def summary(run: Path) -> dict[str, Any]:
    """Return the records of a run: each logged step, each epoch with its phases, MFU and memory, and its pictures.

    `chosen` has what `auto` became.
    """
    found: dict[str, Any] = {"chosen": {}, "pictures": [each.name for each in _pictures(run)]}
    if (run / "config.yaml").exists():
        config = yaml.safe_load((run / "config.yaml").read_text())
        found["chosen"] = {"attention": config["model"]["attention"], "loader": config["data"]["loader"]}
    for name in ("metrics", "epochs"):
        lines = (run / f"{name}.jsonl").read_text().splitlines() if (run / f"{name}.jsonl").exists() else []
        found[name] = []
        for line in lines:
            with suppress(ValueError):  # the last line may be half written
                found[name].append(json.loads(line))
    return found


def _pictures(run: Path) -> list[Path]:
    return sorted((run / "images").glob("*.png"))


def main(file: Path, overrides: list[str]) -> None:
    """Train, and write the run's records beside the clocks that were read meanwhile.

    The last picture is kept next to FILE.
    """
    clocks: list[Any] = []
    is_over = threading.Event()
    with tempfile.TemporaryDirectory() as folder:
        images, run = Path(folder) / "images", Path(folder) / "run"
        images.mkdir()
        photographs(images, IMAGES, DIFFERENT)

        def write() -> None:
            result = {"overrides": overrides, **summary(run), "clocks": clocks}
            write_atomically(file, json.dumps(result, indent=2) + "\n")

        def watch() -> None:
            while not is_over.wait(EVERY):
                clocks.append(gpu_facts()["gpu_clocks"])
                write()

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            mimae.pretrain(
                "vit_base_400ep",
                f"data.path={images}",
                "data.val_path=null",
                f"run.dir={run}",
                f"schedule.max_steps={STEPS}",
                "telemetry.log_every_steps=10",
                "telemetry.images_every_epochs=0",
                "telemetry.trackers=[]",
                *(override.replace("{images}", str(images)) for override in overrides),
            )
        finally:
            is_over.set()
            thread.join()
            write()
            for picture in _pictures(run)[-1:]:
                shutil.copy(picture, file.with_suffix(".png"))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
