"""The stages of `mimae bench gpu`, in the order of what they are worth."""

from __future__ import annotations

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


def _step(name: str, seconds: float, *arguments: str, batch: int = 256) -> Stage:
    command = ["mimae", "bench", "step", "--out", "{result}", *arguments, "--batch", str(batch)]
    return Stage(name, command, seconds, least=30, smaller=["--batch", str(batch // 2)])


def _variants(*variants: str) -> list[str]:
    return [part for variant in variants for part in ("--variant", variant)]


_OPS = ("embed_visible", "fill_masked", "pixel_loss", "view_latents", "infonce", "club", "orthogonal_masks")

STAGES = (
    Stage("compile", ["mimae.bench.gpu.compile", "{result}"], 50),
    *(
        Stage(
            f"pretrain, {name}",
            ["mimae.bench.gpu.train", "{result}", f"compile={compile}", "schedule.batch_size=256"],
            seconds,
            least=45,
            smaller=["schedule.batch_size=128"],
        )
        for name, compile, seconds in (("plain", "on", 90), ("graphs", "graphs", 70))
    ),
    _step("step, attention", 65, *_variants("model.attention=sdpa", "model.attention=cudnn"), "--rounds", "3"),
    _step(
        "step, less work",
        75,
        *_variants("decoder.predict=next_view", "decoder.heads=8", "model.checkpointing=selective"),
        *("--rounds", "3"),
    ),
    *(
        Stage(
            f"op {op}",
            ["mimae", "bench", "kernels", "--out", "{result}", "--op", op, "--batch", "1024", "--rounds", "15"],
            24 if op == "infonce" else 14,
            least=10,
        )
        for op in _OPS
    ),
    Stage("tests", ["pytest", "-m", "gpu", "-v", "--durations=10", "--junitxml={result}", str(TESTS)], 60),
    _step("step, ViT-L", 55, *("--model", "large", "--rounds", "3"), *_variants("compile=on"), batch=128),
    _step("step, eager", 50, "--rounds", "3"),
    *(_step(f"step, {peer}", 45, "--peer", peer, "--rounds", "3", batch=64) for peer in ("transformers", "lightly")),
)
"""Together at most twelve minutes. The first pretraining compiles the blocks, and later stages find them in a cache.
A missing peer, or one that fails, costs its own stage alone."""
