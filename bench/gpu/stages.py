"""The stages of `mimae bench gpu`, in the order of what they are worth."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

TESTS = Path(__file__).resolve().parents[2] / "tests"
"""A checkout has them, an installed wheel does not."""


class Stage(NamedTuple):
    """A command of `python -m`. `{result}` in an argument stands for the file that the stage writes."""

    name: str
    arguments: list[str]
    seconds: float
    """The stage is cut off after this time."""
    least: float = 20
    """Less time than this is not worth a start."""
    smaller: list[str] = []  # noqa: RUF012 -- the default of a named tuple is never changed
    """Arguments that are added for a second try, where memory ran out."""


def gpu_tests(folder: Path) -> list[str]:
    """Return the test files of a folder that have tests for a GPU, those of the kernels first."""
    files = [file for file in folder.rglob("test_*.py") if re.search(r"mark\.gpu\b", file.read_text())]
    return [os.path.relpath(file) for file in sorted(files, key=lambda file: (file.parent.name != "kernels", file))]


def _pretrain(name: str, seconds: float, *overrides: str) -> Stage:
    command = ["mimae.bench.gpu.train", "{result}", "schedule.batch_size=256", *overrides]
    return Stage(name, command, seconds, least=40, smaller=["schedule.batch_size=128"])


def _step(name: str, seconds: float, *arguments: str, recipe: str = "vit_base_400ep", batch: int = 256) -> Stage:
    command = ["mimae", "bench", "step", "--out", "{result}", "--recipe", recipe, "--no-roof", *arguments]
    return Stage(name, [*command, "--batch", str(batch)], seconds, least=30, smaller=["--batch", str(batch // 2)])


def _variants(*variants: str) -> list[str]:
    return [part for variant in variants for part in ("--variant", variant)]


def _timed(*variants: str) -> list[str]:
    return ["--no-memory", "--rounds", "3", *_variants(*variants)]


_OPS = ("embed_visible", "fill_masked", "pixel_loss", "view_latents", "infonce", "club", "orthogonal_masks")

_OP = ["mimae", "bench", "kernels", "--out", "{result}", "--no-roof", "--batch", "1024", "--batch", "256"]

_EVALUATED = ("data.val_path={images}", "telemetry.probe_every_epochs=1", "telemetry.images_every_epochs=1")

STAGES = (
    Stage("compile", ["mimae.bench.gpu.compile", "{result}"], 50),
    _pretrain("pretrain, plain", 90, "compile=on"),
    _pretrain("pretrain, graphs", 65, "compile=graphs"),
    _step("step, attention", 80, *_timed(*(f"model.attention={name}" for name in ("sdpa", "cudnn", "xformers")))),
    _step(
        "step, less work",
        105,
        *_timed("decoder.predict=next_view", "model.residual=bf16", "decoder.heads=8", "model.checkpointing=selective"),
    ),
    *(Stage(f"op {op}", [*_OP, "--op", op, "--rounds", "15"], 40 if op == "infonce" else 30) for op in _OPS),
    Stage(
        "tests",
        ["pytest", "-m", "gpu", "-v", "--durations=10", "--junitxml={result}", *(gpu_tests(TESTS) or [str(TESTS)])],
        80,
    ),
    _pretrain("evaluate", 55, "compile=on", "schedule.max_steps=32", *_EVALUATED),
    Stage("trace", ["mimae.bench.gpu.trace", "{result}", "compile=on", "schedule.batch_size=256"], 50, least=40),
    _step(
        "step, ViT-L",
        60,
        *_timed("decoder.predict=next_view decoder.heads=8 model.residual=bf16"),
        recipe="vit_large_400ep",
        batch=128,
    ),
    _step("step, eager", 50, *_timed()),
    *(_step(f"step, {peer}", 40, "--peer", peer, *_timed(), batch=64) for peer in ("transformers", "lightly")),
    _step(
        "step, memory",
        65,
        *("--rounds", "0", "--memory", *_variants("model.residual=bf16", "model.checkpointing=selective")),
    ),
)
"""Together they fit into two calls. The first pretraining compiles the blocks, and later stages find them in a cache.
Timed stages measure no memory. A missing peer, or one that fails, costs its own stage alone."""
