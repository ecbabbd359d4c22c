"""`mimae export`: a trained model of any task as a folder that other libraries open without this project."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import io
import os
import runpy
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mimae import kernels
from mimae.checkpoints import checkpoint
from mimae.errors import UserError
from mimae.model.mimae import MIMAE
from mimae.outside.files import made_beside
from mimae.outside.progress import Progress
from mimae.train.trained import load
from mimae.transfer.card import card
from mimae.transfer.checks import comparison, vit
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
"""Kinds of exports by the value of --to."""

_VIT = "from mimae.transfer.checks.vit import vit\n"
"""Import of the modules in `checks` whose format holds weights and nothing to run."""

BOUND = comparison.BOUND
"""Largest allowed absolute difference of an output, in fp32 with the stored weights."""

ROUNDING = 0.05
"""Largest allowed relative change of the features, |difference| / |features|, by rounding the weights to bf16."""


class Report(NamedTuple):
    """The result of an export."""

    folder: Path
    step: int
    differences: dict[str, float] | None
    """Largest absolute difference of each output; None if the library that opens the folder is not installed."""
    rounding: float | None
    """Relative change of the features by rounded weights; None for fp32."""


def export(run: Path, to: str, out: Path, options: Options, average: bool = False) -> Report:
    """Write the folder OUT atomically, and compare its outputs with the model's.

    Raises UserError if the format cannot express the model, if OUT exists, and if the outputs differ.
    """
    target = TARGETS[to]
    _refuse_options(to, target, options)
    if os.path.lexists(out):
        raise UserError(f"{out} exists already: remove it, or give another --out")
    trained = load(run, average, device=torch.device("cpu"))
    task, found = trained.task, trained.checkpoint
    exported = Exported(task.recipe, trained.model, tuple(task.outputs()))
    _refuse(to, target, options, exported)
    depth = task.recipe.model.depth
    if wrong := [block for block in options.form.blocks if not 0 <= block < depth]:
        raise UserError(f"--blocks {wrong[0]}: the encoder has blocks 0 to {depth - 1}")
    rounding = _rounded(exported, options.dtype)
    progress = Progress("exporting", 3)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with made_beside(out) as temporary:
            temporary.mkdir()
            progress.begin("writing the weights")
            target.write(exported, options, temporary)
            progress.begin("writing check.py")
            _write_check(exported, target, options, temporary)
            progress.begin("running check.py")
            differences = _differences(exported, target, options, temporary)
            about = card(checkpoint.run_of(run), found, exported, target, options, average, out.name)
            (temporary / "README.md").write_text(about)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror or error}") from error
    finally:
        progress.close()
    return Report(out, trained.step, differences, rounding)


def _refuse(to: str, target: Target, options: Options, exported: Exported) -> None:
    """Raise UserError for a model that a kind of export cannot hold."""
    if not isinstance(exported.model, target.models):
        exported.graph(Options())  # A model that no kind can hold says why.
        holders = ", ".join(name for name, each in TARGETS.items() if isinstance(exported.model, each.models))
        raise UserError(f"--to {to} holds pretrained encoders; a run of task={exported.recipe.task} goes to {holders}")
    if options.decoder and not isinstance(exported.model, MIMAE):
        raise UserError(f"--decoder: a run of task={exported.recipe.task} has none")


def _refuse_options(to: str, target: Target, options: Options) -> None:
    """Raise UserError for options that the kind of export does not have."""
    graphs = ", ".join(name for name, each in TARGETS.items() if each.is_graph)
    given = {
        "--blocks": bool(options.form.blocks),
        "--input": options.form.given != "uint8",
        "--dynamic-size": options.form.dynamic_size,
    }
    if not target.is_graph and (wrong := [name for name, is_given in given.items() if is_given]):
        raise UserError(f"{wrong[0]} is for graphs ({graphs}); --to {to} holds weights for a library's own model")
    if target.is_graph and options.dtype != torch.float32:
        raise UserError(
            f"--dtype bf16 rounds stored weights, but a graph (--to {to}) computes in fp32: cast it when you load it"
        )
    if options.decoder and not target.has_decoder:
        holders = ", ".join(name for name, each in TARGETS.items() if each.has_decoder)
        raise UserError(f"--decoder: --to {to} has only the encoder; exports with the decoder are {holders}")


@torch.no_grad()
def _rounded(exported: Exported, dtype: torch.dtype) -> float | None:
    """Round the weights of the model as they will be stored, and return the relative change of its features."""
    if dtype == torch.float32:
        return None
    images, (*_, name) = _images(exported), exported.graph(Options()).outputs
    before = _expected(exported, Options(), images)[name]
    positions = [tensor for key, tensor in exported.model.named_buffers() if key.endswith("pos_embed")]
    for tensor in (*exported.model.parameters(), *positions):
        tensor.copy_(tensor.to(dtype))
    share = float((_expected(exported, Options(), images)[name] - before).norm() / before.norm())
    if not share <= ROUNDING:
        raise UserError(
            f"rounded to bf16 the weights change the {name} by {share:.1%}, more than {ROUNDING:.0%}: export in fp32"
        )
    return share


def _images(exported: Exported, more: tuple[int, int] = (0, 0)) -> Tensor:
    """Return images for the comparison, uint8 (3, H, W, 3): noise, a colour gradient, a checkerboard.

    They have `more` (rows, columns) patches than the run's images.
    """
    rows, columns, patch = exported.grid
    height, width = (rows + more[0]) * patch, (columns + more[1]) * patch
    noise = kernels.philox_words(0, 0, 0, torch.arange(height), 3 * width).view(height, width, 3) & 255
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    slope = torch.stack([255 * y // height, 255 * x // width, 255 * (y + x) // (height + width)], -1)
    field = (255 * ((y // 3 + x // 3) % 2))[..., None].expand(-1, -1, 3)
    return torch.stack([noise, slope, field]).to(torch.uint8)


@torch.no_grad()
def _expected(exported: Exported, options: Options, images: Tensor) -> dict[str, Tensor]:
    """Return the outputs of the model for images, by name."""
    return exported.graph(options).expected(images)


@torch.no_grad()
def _decoded(exported: Exported, images: Tensor) -> dict[str, Tensor]:
    """Return the noise that chooses visible patches (the quarter with the least noise), and the decoder's outputs."""
    patches, model = exported.grid.patches, exported.mimae
    words = kernels.philox_words(1, 0, 0, torch.arange(len(images)), patches)
    noise = words.double().div(2.0**32).float()
    order = noise.argsort(1)
    # The number of visible patches is rounded down, as in MAE's code.
    visible, hidden = (part.sort(1).values[:, None] for part in order.tensor_split([int(patches * 0.25)], 1))
    predictions = model.predict(images, visible.int(), hidden.int())
    normalize = exported.recipe.objective.normalize_pixels
    loss = kernels.pixel_loss(
        *(predictions, images, hidden, model.encoder.mean, model.encoder.std, normalize), scale=1 / hidden.numel()
    )
    return {"noise": noise, "hidden": hidden[:, 0], "predictions": predictions[:, 0], "loss": loss}


def _write_check(exported: Exported, target: Target, options: Options, folder: Path) -> None:
    """Write check.py, and check.npz with images and the model outputs for them."""
    images = _images(exported)
    stored = {"images": images, **_expected(exported, options, images)}
    if target.check(exported, options) == "transformers_mae":
        stored |= _decoded(exported, images)
    np.savez(folder / "check.npz", **{name: tensor.numpy() for name, tensor in stored.items()})  # type: ignore[arg-type]
    module = import_module(f"mimae.transfer.checks.{target.check(exported, options)}")
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
    """Run check.py, for a graph of dynamic size also at two other sizes, and return the largest differences.

    Raises UserError if a difference is too large. Returns None if the library is not installed.
    """
    if any(importlib.util.find_spec(module) is None for module in target.modules):
        return None
    with contextlib.redirect_stderr(io.StringIO()):  # This hides the progress bar of transformers.
        check = runpy.run_path(str(folder / "check.py"))
        found: dict[str, float] = check["differences"](check["outputs"])
    if options.form.dynamic_size:
        for more in ((2, 0), (0, 1)):
            images = _images(exported, more)
            given, expected = check["outputs"](images.numpy()), _expected(exported, options, images)
            for name, values in given.items():
                found[name] = max(found[name], float((torch.from_numpy(values) - expected[name]).abs().max()))
    # The condition is not "worst > BOUND", so that NaN is refused too.
    if wrong := [name for name, worst in found.items() if not worst <= BOUND]:
        told = ", ".join(f"{name} {found[name]:.1e}" for name in wrong)
        raise UserError(
            f"not exported: the outputs of {target.title} differ from the model by more than {BOUND:.0e} ({told})"
        )
    return found
