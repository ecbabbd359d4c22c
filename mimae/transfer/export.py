"""`mimae export`: a pretrained model as a folder that others open without this project."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import io
import runpy
import shutil
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mimae import kernels
from mimae.checkpoints import checkpoint
from mimae.errors import UserError
from mimae.outside.progress import Progress
from mimae.transfer.card import card
from mimae.transfer.checks import comparison, vit
from mimae.transfer.load import load_model
from mimae.transfer.targets import mae, onnx, safetensors, timm, transformers
from mimae.transfer.targets import torch as torch_target
from mimae.transfer.targets.base import Exported, Options, Target

TARGETS: dict[str, Target] = {
    "timm": timm.TARGET,
    "transformers": transformers.TARGET,
    "mae": mae.TARGET,
    "onnx": onnx.TARGET,
    "torch": torch_target.TARGET,
    "safetensors": safetensors.TARGET,
}
"""Kinds of exports by the word after --to."""

_VIT = "from mimae.transfer.checks.vit import vit\n"
"""Import of the modules in `checks` whose format holds weights and nothing to run."""

BOUND = comparison.BOUND
"""Largest absolute difference of an output, in fp32 with the stored weights."""

ROUNDING = 0.05
"""Largest share by which the rounding of the weights to bf16 may change the features, as |difference| / |features|."""


class Report(NamedTuple):
    """Result of an export."""

    folder: Path
    step: int
    differences: dict[str, float] | None
    """Largest absolute difference of each output; None where the library that opens the folder is not installed."""
    rounding: float | None
    """Share by which rounded weights changed the features; None for fp32."""


def export(run: Path, to: str, out: Path, options: Options, average: bool = False) -> Report:
    """Write the folder OUT, whole or not at all, and hold its outputs to the encoder's.

    Raises UserError for what cannot be expressed, where OUT is there, and where the outputs differ.
    """
    target = TARGETS[to]
    _refuse(to, target, options)
    if out.exists():
        raise UserError(f"{out} is there already: remove it, or give another --out")
    recipe, model, found = load_model(run, average)
    depth = recipe.model.depth
    if wrong := [block for block in options.blocks if not 0 <= block < depth]:
        raise UserError(f"--blocks {wrong[0]}: the encoder has blocks 0 to {depth - 1}")
    exported = Exported(recipe, model)
    rounding = _rounded(exported, options.dtype)
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    progress = Progress("exporting", 3)
    try:
        temporary.mkdir(parents=True)
        progress.begin("writing the weights")
        target.write(exported, options, temporary)
        progress.begin("writing check.py")
        _write_check(exported, target, options, temporary)
        progress.begin("running check.py")
        differences = _differences(exported, target, options, temporary)
        about = card(checkpoint.run_of(run), found, exported, target, options, average, out.name)
        (temporary / "README.md").write_text(about)
        temporary.rename(out)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror or error}") from error
    finally:
        progress.close()
        shutil.rmtree(temporary, ignore_errors=True)
    return Report(out, int(found.state["step"]), differences, rounding)


def _refuse(to: str, target: Target, options: Options) -> None:
    """Raise UserError for options that a kind of export does not have."""
    graphs = ", ".join(name for name, each in TARGETS.items() if each.is_graph)
    given = {
        "--blocks": bool(options.blocks),
        "--input": options.given != "uint8",
        "--dynamic-size": options.dynamic_size,
    }
    if not target.is_graph and (wrong := [name for name, is_given in given.items() if is_given]):
        raise UserError(f"{wrong[0]} is for graphs ({graphs}); --to {to} holds weights for a library's own model")
    if target.is_graph and options.dtype != torch.float32:
        raise UserError(
            f"--dtype bf16 rounds stored weights; a graph (--to {to}) computes in fp32, cast it where it runs"
        )
    if options.decoder and not target.has_decoder:
        holders = ", ".join(name for name, each in TARGETS.items() if each.has_decoder)
        raise UserError(f"--decoder: --to {to} holds the encoder alone; with the decoder go {holders}")


@torch.no_grad()
def _rounded(exported: Exported, dtype: torch.dtype) -> float | None:
    """Give the model the values that will be stored, and return by what share its features change."""
    if dtype == torch.float32:
        return None
    images = _images(exported)
    before = exported.encoder.features(images)
    for tensor in (*exported.model.parameters(), exported.encoder.pos_embed):
        tensor.copy_(tensor.to(dtype))
    exported.model.decoder.pos_embed.copy_(exported.model.decoder.pos_embed.to(dtype))
    share = float((exported.encoder.features(images) - before).norm() / before.norm())
    if not share <= ROUNDING:
        raise UserError(
            f"rounded to bf16 the weights change the features by {share:.1%}, more than {ROUNDING:.0%}: export in fp32"
        )
    return share


def _images(exported: Exported, more: tuple[int, int] = (0, 0)) -> Tensor:
    """Return images to compare with, uint8 (3, H, W, 3): noise, a coloured slope, a chequered field. `more` patches
    make them larger than the run's."""
    rows, columns, patch = exported.grid
    height, width = (rows + more[0]) * patch, (columns + more[1]) * patch
    noise = kernels.philox_words(0, 0, 0, torch.arange(height), 3 * width).view(height, width, 3) & 255
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    slope = torch.stack([255 * y // height, 255 * x // width, 255 * (y + x) // (height + width)], -1)
    field = (255 * ((y // 3 + x // 3) % 2))[..., None].expand(-1, -1, 3)
    return torch.stack([noise, slope, field]).to(torch.uint8)


@torch.no_grad()
def _expected(exported: Exported, options: Options, images: Tensor) -> dict[str, Tensor]:
    """Return what the encoder gives for images."""
    tokens = exported.encoder.tokens(images)
    maps = exported.encoder.maps(images, options.blocks)
    named = {f"block_{number}": each for number, each in zip(options.blocks, maps, strict=True)}
    return {"tokens": tokens, "features": tokens[:, 1:].mean(1), **named}


@torch.no_grad()
def _decoded(exported: Exported, images: Tensor) -> dict[str, Tensor]:
    """Return what the decoder gives where a quarter of the patches is seen, those of least noise; and the noise."""
    patches, model = exported.grid.patches, exported.model
    words = kernels.philox_words(1, 0, 0, torch.arange(len(images)), patches)
    noise = words.double().div(2.0**32).float()
    order = noise.argsort(1)
    # As MAE's code rounds it.
    visible, hidden = (part.sort(1).values[:, None] for part in order.tensor_split([int(patches * 0.25)], 1))
    predictions = model.predict(images, visible.int(), hidden.int())
    normalize = exported.recipe.objective.normalize_pixels
    loss = kernels.pixel_loss(
        *(predictions, images, hidden, model.encoder.mean, model.encoder.std, normalize), scale=1 / hidden.numel()
    )
    return {"noise": noise, "hidden": hidden[:, 0], "predictions": predictions[:, 0], "loss": loss}


def _write_check(exported: Exported, target: Target, options: Options, folder: Path) -> None:
    """Write check.py, and check.npz with images and what the encoder gives for them."""
    images = _images(exported)
    stored = {"images": images, **_expected(exported, options, images)}
    if target.check(options) == "transformers_mae":
        stored |= _decoded(exported, images)
    np.savez(folder / "check.npz", **{name: tensor.numpy() for name, tensor in stored.items()})  # type: ignore[arg-type]
    module = import_module(f"mimae.transfer.checks.{target.check(options)}")
    imports = "import sys\nfrom collections.abc import Callable\nfrom pathlib import Path\n"
    source = inspect.getsource(module)
    # check.py stands alone, so what the module shares with others is written out at its end.
    shared = [inspect.getsource(each) for each in (comparison.differences, comparison.report)]
    if _VIT in source:
        shared.insert(0, inspect.getsource(vit.vit))
    start = source.replace(_VIT, "").replace("from pathlib import Path\n", imports, 1)
    main = 'if __name__ == "__main__":\n    report(differences(outputs))\n'
    text = "\n\n".join([start, f"BOUND = {BOUND}\n", *shared, main])
    (folder / "check.py").write_text(text)


def _differences(exported: Exported, target: Target, options: Options, folder: Path) -> dict[str, float] | None:
    """Run check.py, and for a graph of dynamic size its outputs at two other sizes too. Raises UserError."""
    if any(importlib.util.find_spec(module) is None for module in target.modules):
        return None
    with contextlib.redirect_stderr(io.StringIO()):  # transformers shows a bar
        check = runpy.run_path(str(folder / "check.py"))
        found: dict[str, float] = check["differences"](check["outputs"])
    if options.dynamic_size:
        for more in ((2, 0), (0, 1)):
            images = _images(exported, more)
            given, expected = check["outputs"](images.numpy()), _expected(exported, options, images)
            for name, values in given.items():
                found[name] = max(found[name], float((torch.from_numpy(values) - expected[name]).abs().max()))
    # Not "worst > BOUND": a difference that is no number is refused too.
    if wrong := [name for name, worst in found.items() if not worst <= BOUND]:
        told = ", ".join(f"{name} {found[name]:.1e}" for name in wrong)
        raise UserError(
            f"not exported: what {target.title} gives differs from the encoder by more than {BOUND:.0e} ({told})"
        )
    return found
