"""The interface of a kind of export, and functions that several kinds share."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from mimae.errors import UserError
from mimae.model.encoder import Encoder
from mimae.model.geometry import Grid
from mimae.model.mimae import MIMAE
from mimae.model.portable import Form, Graph
from mimae.model.units import Model

_DEFAULT = Form()


@dataclass(frozen=True)
class Options:
    """Options of an export."""

    dtype: torch.dtype = torch.float32
    """Dtype of the stored weights."""
    decoder: bool = False
    """True to include MAE's decoder, so that pretraining can continue elsewhere."""
    form: Form = _DEFAULT
    """Inputs and outputs of a graph."""


class Exported(NamedTuple):
    """A trained model that is exported, in fp32 with the values that will be stored."""

    recipe: Any
    """Recipe of the task of the run."""
    model: Model
    classes: tuple[str, ...] = ()
    """Names of the classes that a fine-tuned model tells apart, in the order of its outputs."""

    @property
    def encoder(self) -> Encoder:
        """The encoder."""
        encoder = self.model.encoder
        assert isinstance(encoder, Encoder)
        return encoder

    @property
    def mimae(self) -> MIMAE:
        """The model of a pretraining run."""
        assert isinstance(self.model, MIMAE)
        return self.model

    def graph(self, options: Options) -> Graph:
        """Return the model in plain operators, without gradients. Raises UserError where it cannot be a graph."""
        graph = self.model.graph(options.form)
        graph.module.eval().requires_grad_(False)
        return graph

    @property
    def grid(self) -> Grid:
        """The grid of patches of an image."""
        return self.encoder.grid

    def state(self, decoder: bool = False) -> dict[str, Tensor]:
        """Return the weights under our names: `encoder.*`, and with `decoder` also `decoder.*` with its positions."""
        found = {f"encoder.{name}": tensor for name, tensor in self.encoder.state_dict().items()}
        if decoder:
            found |= {f"decoder.{name}": tensor for name, tensor in self.mimae.decoder.state_dict().items()}
            found["decoder.pos_embed"] = self.mimae.decoder.pos_embed
        return found

    def description(self) -> dict[str, Any]:
        """Return the description that this project needs to open an export: `mimae` in every config.json."""
        data, model = self.recipe.data, self.recipe.model
        return {
            "image_size": list(self.grid.size_hw),
            "patch_size": model.patch_size,
            "width": model.width,
            "depth": model.depth,
            "heads": model.heads,
            "mlp_width": model.mlp,
            "norm_eps": model.norm_eps,
            "mean": list(data.mean),
            "std": list(data.std),
            **({"task": self.recipe.task, "classes": self.classes} if self.classes else _POOLING),
        }


_POOLING = {"pooling": "mean of the patch tokens"}


class Target(NamedTuple):
    """A kind of export."""

    title: str
    """The library that opens it, with its version if that matters."""
    write: Callable[[Exported, Options, Path], None]
    """Function that writes all files but card and check. Raises UserError if the format cannot express the model."""
    check: Callable[[Exported, Options], str]
    """Function that returns the name of the module of `mimae.transfer.checks` that becomes check.py."""
    loading: str
    """Python code for the card that opens the folder; DIR stands for the folder."""
    models: tuple[type[Model], ...] = (MIMAE,)
    """Models that it can hold."""
    is_graph: bool = False
    """True if it is a computation graph, which takes what `Form` has."""
    has_decoder: bool = False
    """True if it can contain MAE's decoder."""
    modules: tuple[str, ...] = ()
    """Modules that its check needs, in addition to torch."""


def write_config(folder: Path, values: Mapping[str, Any], name: str = "config.json") -> None:
    """Write a JSON file."""
    (folder / name).write_text(json.dumps(values, indent=2) + "\n")


def write_weights(folder: Path, state: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Write model.safetensors."""
    tensors = {name: tensor.detach().to(dtype).contiguous() for name, tensor in state.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # safetensors makes files that only the owner can read.


def need_norm_eps(exported: Exported, what: str) -> None:
    """Raise UserError for norms with another epsilon than 1e-6."""
    if (eps := exported.recipe.model.norm_eps) != 1e-6:
        raise UserError(
            f"{what} has 1e-06 as epsilon of its norms, but this run has model.norm_eps={eps:g}: use --to "
            "transformers, onnx, torch or safetensors"
        )


def need_square(exported: Exported, what: str) -> None:
    """Raise UserError for images that are not square."""
    height, width = exported.grid.size_hw
    if height != width:
        raise UserError(
            f"{what} takes only square images, but this run's have {height} x {width} pixels: use --to timm, onnx, "
            "torch or safetensors"
        )


def need_mae(exported: Exported, what: str) -> None:
    """Raise UserError for a decoder that is not MAE's."""
    decoder = exported.recipe.decoder
    for key, value, legal in (("predict", decoder.predict, "hidden"), ("attention", decoder.attention, "self")):
        if value != legal:
            raise UserError(
                f"the decoder of this run has decoder.{key}={value}, but {what} supports only {legal}: leave out "
                "--decoder to export only the encoder"
            )


def preprocessor(exported: Exported) -> dict[str, Any]:
    """Return transformers' preprocessor_config.json."""
    height, width = exported.grid.size_hw
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(exported.recipe.data.mean),
        "image_std": list(exported.recipe.data.std),
    }
