"""Loading of the model of a run, and of the encoder of a run or an export."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mimae.checkpoints import checkpoint
from mimae.config.kept import load_run
from mimae.config.recipe import Recipe, RunRecipe
from mimae.data.settings import DataSettings
from mimae.errors import CheckpointError, UserError
from mimae.model.encoder import Encoder
from mimae.model.mimae import MIMAE, outline
from mimae.model.settings import ModelSettings
from mimae.model.units import fill
from mimae.outside.reading import read_text
from mimae.outside.text import printable
from mimae.weights.names import sort

T = TypeVar("T")

_CONFIG_BYTES = 1 << 20


class Loaded(NamedTuple):
    """An encoder in eval mode, and the settings of the data on which it was trained."""

    encoder: Encoder
    data: DataSettings
    checkpoint: str | None = None
    """The name of the checkpoint; None for an export."""


def load_encoder(path: str | Path, average: bool = False) -> Encoder:
    """Return the encoder of a run (its newest complete checkpoint), of one checkpoint, or of an export, in eval mode.

    The run may be of any task whose model keeps the encoder's norm; a classifier with `fc_norm` has none. With
    `average` the weights are the run's moving average. The state_dict of the encoder loads into the timm ViT of the
    same size. Raises CheckpointError if there is no such encoder, ConfigError for a damaged config.yaml.
    """
    return load(path, average).encoder


def load(path: str | Path, average: bool = False) -> Loaded:
    """Return the encoder as `load_encoder` does, with its data settings."""
    path = Path(path)
    if (path / "config.json").is_file() and not (path / "config.yaml").exists():
        if average:
            raise CheckpointError(f"{path} is an export, which has only one set of weights: leave out --average")
        return _of_export(path)
    recipe = load_run(checkpoint.run_of(path), (), None, RunRecipe)
    # The weights do not depend on the attention backend of the training, which may not exist on this machine.
    settings = recipe.model.model_copy(update={"attention": "auto"})

    def read(_: checkpoint.Checkpoint, tensors: dict[str, Tensor]) -> Encoder:
        own = {name.removeprefix("encoder."): value for name, value in tensors.items() if name.startswith("encoder.")}
        return _encoder(settings, recipe.data, own)

    found, encoder = use_weights(path, recipe, average, "the encoder", read)
    return Loaded(encoder, recipe.data, found.name)


def _encoder(settings: ModelSettings, data: DataSettings, tensors: dict[str, Tensor]) -> Encoder:
    """Return an encoder in eval mode. Raises ValueError for other tensors than its weights."""
    with torch.device("meta"):
        encoder = Encoder(settings, data.size_hw, data.mean, data.std)
    fill(encoder, tensors, "cpu")
    return encoder.eval()


class Trained(NamedTuple):
    """The whole model of a run, in eval mode, with its recipe and checkpoint."""

    recipe: Recipe
    model: MIMAE
    checkpoint: checkpoint.Checkpoint


def load_model(path: str | Path, average: bool = False) -> Trained:
    """Return the model (encoder, decoder and objective) of a run or of one checkpoint.

    Raises CheckpointError if there is none, ConfigError for a damaged config.yaml.
    """
    path = Path(path)
    recipe = load_run(checkpoint.run_of(path))
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"attention": "auto"})})

    def read(_: checkpoint.Checkpoint, tensors: dict[str, Tensor]) -> MIMAE:
        model = outline(recipe)
        fill(model, tensors, "cpu")
        return model.eval()

    found, model = use_weights(path, recipe, average, "the model", read)
    return Trained(recipe, model, found)


def use_weights(
    path: Path,
    recipe: RunRecipe,
    average: bool,
    what: str,
    read: Callable[[checkpoint.Checkpoint, dict[str, Tensor]], T],
) -> tuple[checkpoint.Checkpoint, T]:
    """Return a checkpoint of a run, and what `read` makes of it and its weights.

    With `average` the weights are the run's moving average. Raises CheckpointError if there is none, or if `read` finds
    that the weights are not `what` the recipe describes.
    """
    if average and recipe.ema.decay is None:
        raise CheckpointError(f"{path} has no moving average: the run's ema.decay was null")

    def action(found: checkpoint.Checkpoint) -> T:
        averages = found.tensors("ema") if average else {}
        if average and not averages:
            raise CheckpointError(f"{found.path} has no moving average")
        weights = found.tensors("model") | averages
        try:
            return read(found, weights)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:  # Names, shapes or the task's state differ.
            if isinstance(error, UserError):
                raise
            said = printable(" ".join(str(error).split()))[:300]
            raise CheckpointError(f"{found.path} does not hold {what} of config.yaml: {said}") from error

    return checkpoint.use_at(path, action)


def _of_export(folder: Path) -> Loaded:
    """Return the encoder of a folder that `mimae export` wrote. Raises CheckpointError."""
    try:
        config = json.loads(read_text(folder / "config.json", _CONFIG_BYTES))
        if not isinstance(config, dict) or not isinstance(config.get("mimae"), dict):
            raise CheckpointError(
                f"{folder} is neither a run nor an export of a run: its config.json does not name mimae. To start a "
                "run from published weights of other projects, use model.init"
            )
        told: dict[str, Any] = config["mimae"]
        sizes = {key: told[key] for key in ("patch_size", "width", "depth", "heads", "mlp_width", "norm_eps")}
        size = tuple(told["image_size"])
        data = DataSettings(image_size=size, mean=tuple(told["mean"]), std=tuple(told["std"]))
        tensors = _weights_of(folder)
        placed = sort(tensors).placed
        state = {
            ours.removeprefix("encoder."): torch.cat([tensors[each] for each in theirs]).float()
            for ours, theirs in placed.items()
            if ours.startswith("encoder.")
        }
        return Loaded(_encoder(ModelSettings(**sizes), data, state), data)
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        if isinstance(error, CheckpointError):
            raise
        said = printable(" ".join(f"{type(error).__name__}: {error}".split()))[:300]
        raise CheckpointError(f"{folder} cannot be opened as an export: {said}") from error


def _weights_of(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of an export by their names in the export. Raises CheckpointError."""
    if (file := folder / "model.safetensors").is_file():
        return load_file(file)
    if (file := folder / "model.pth").is_file():
        return dict(torch.load(file, map_location="cpu", weights_only=True)["model"])
    if (file := folder / "model.pt2").is_file():
        return dict(torch.export.load(file).state_dict)
    if (file := folder / "model.onnx").is_file():
        return _of_graph(file)
    raise CheckpointError(f"{folder} has no weights: no model.safetensors, model.pth, model.pt2 or model.onnx")


def _of_graph(file: Path) -> dict[str, Tensor]:
    """Return the weights of an ONNX graph. It stores the weights of linear layers transposed and without names."""
    try:
        import onnx
    except ImportError as error:
        raise CheckpointError(f"to open {file} needs onnx: pip install 'mimae[onnx]'") from error
    graph = onnx.load(file).graph
    tensors = {each.name: torch.from_numpy(onnx.numpy_helper.to_array(each).copy()) for each in graph.initializer}
    products = {node.output[0]: node.input[1] for node in graph.node if node.op_type == "MatMul"}
    for node in graph.node:
        if node.op_type == "Add":
            for bias, product in (node.input, node.input[::-1]):
                if bias.endswith(".bias") and bias in tensors and products.get(product) in tensors:
                    tensors[bias.removesuffix("bias") + "weight"] = tensors[products[product]].T
    return tensors
