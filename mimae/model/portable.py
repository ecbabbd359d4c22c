"""Models in plain operators, for graphs: pixels in, normalisation inside, named outputs.

Letters in shapes: B images, L patches, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimae.errors import UserError
from mimae.model.encoder import Encoder

Input = Literal["uint8", "float"]
"""uint8: (B, H, W, 3); float: (B, 3, H, W), fp32 in [0, 1]."""


class Form(NamedTuple):
    """Inputs and outputs of a graph."""

    given: Input = "uint8"
    """Pixels that it takes."""
    blocks: tuple[int, ...] = ()
    """Blocks of an encoder whose maps it gives too."""
    dynamic_size: bool = False
    """It takes images of any size."""


class Graph(NamedTuple):
    """A model as a graph."""

    module: nn.Module
    """Images, as `Form.given` says, -> tensors by name."""
    outputs: tuple[str, ...]
    """Their names in order."""
    expected: Callable[[Tensor], dict[str, Tensor]]
    """Outputs of the model itself for images uint8 (B, H, W, 3)."""


class PortableEncoder(nn.Module):
    """The forward of an encoder on whole images, with its weights under their names."""

    pos_embed: Tensor
    mean: Tensor
    std: Tensor

    def __init__(self, encoder: Encoder, form: Form) -> None:
        super().__init__()
        self.patch_embed, self.cls_token, self.blocks = encoder.patch_embed, encoder.cls_token, encoder.blocks
        self.norm, self.grid, self.form = encoder.norm, encoder.grid, form
        self.register_buffer("pos_embed", encoder.pos_embed.detach().clone())
        self.register_buffer("mean", encoder.mean.view(3, 1, 1).clone())
        self.register_buffer("std", encoder.std.view(3, 1, 1).clone())

    def encode(self, images: Tensor, blocks: tuple[int, ...] = ()) -> tuple[Tensor, list[Tensor]]:
        """-> tokens (B, 1 + L, D) after the final norm, and what each of `blocks` gives for the patches,
        (B, D, rows, columns)."""
        pixels = images.permute(0, 3, 1, 2).float() / 255 if self.form.given == "uint8" else images
        pixels = (pixels - self.mean) / self.std
        projection = self.patch_embed.get_submodule("proj")
        weight, bias = projection.get_parameter("weight"), projection.get_parameter("bias")
        plane = F.conv2d(pixels, weight, bias, stride=self.grid.patch_size)
        tokens = torch.cat([self.cls_token.expand(plane.shape[0], -1, -1), plane.flatten(2).transpose(1, 2)], 1)
        tokens = tokens + self._positions(plane)
        found = dict[int, Tensor]()
        for number, block in enumerate(self.blocks):
            tokens = block(tokens)
            if number in blocks:
                found[number] = tokens[:, 1:].transpose(1, 2).reshape(plane.shape)
        return self.norm(tokens), [found[number] for number in blocks]

    def _positions(self, plane: Tensor) -> Tensor:
        if not self.form.dynamic_size:
            return self.pos_embed
        token, patches = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        known = patches.transpose(1, 2).unflatten(2, (self.grid.rows, self.grid.columns))
        resized = F.interpolate(known, plane.shape[2:], mode="bicubic", align_corners=False)
        return torch.cat([token, resized.flatten(2).transpose(1, 2)], 1)


class Portable(PortableEncoder):
    """Images -> tokens (B, 1 + L, D), features (B, D), and block_N (B, D, rows, columns) before the final norm."""

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        tokens, maps = self.encode(images, self.form.blocks)
        named = {f"block_{number}": each for number, each in zip(self.form.blocks, maps)}
        return {"tokens": tokens, "features": tokens[:, 1:].mean(1), **named}


class PortableHead(nn.Module):
    """Images -> logits, of a model with an encoder and a head."""

    def __init__(
        self,
        encoder: Encoder,
        form: Form,
        parts: nn.Module,
        head: Callable[[Tensor, list[Tensor]], Tensor],
        blocks: tuple[int, ...] = (),
    ) -> None:
        """`head` maps the tokens and the maps of `blocks` to logits, with the modules in `parts`."""
        super().__init__()
        self.encoder, self.parts, self.head, self.blocks = PortableEncoder(encoder, form), parts, head, blocks

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(*self.encoder.encode(images, self.blocks))}


def head_graph(
    encoder: Encoder,
    form: Form,
    parts: Mapping[str, nn.Module],
    head: Callable[[Tensor, list[Tensor]], Tensor],
    expected: Callable[[Tensor], Tensor],
    blocks: tuple[int, ...] = (),
) -> Graph:
    """Return the graph of an encoder and a head, see `PortableHead`. Raises UserError for what only encoders have."""
    if form.blocks or form.dynamic_size:
        raise UserError(
            f"--{'blocks' if form.blocks else 'dynamic-size'} is for pretrained encoders; the graph of a fine-tuned "
            f"model takes {encoder.grid.size_hw[0]} x {encoder.grid.size_hw[1]} pixels and gives its logits"
        )
    module = PortableHead(encoder, form, nn.ModuleDict(parts), head, blocks)
    return Graph(module, ("logits",), lambda images: {"logits": expected(images)})


def encoder_graph(encoder: Encoder, form: Form) -> Graph:
    """Return the graph of an encoder."""

    def expected(images: Tensor) -> dict[str, Tensor]:
        tokens = encoder.tokens(images)
        maps = zip(form.blocks, encoder.maps(images, form.blocks), strict=True)
        return {"tokens": tokens, "features": tokens[:, 1:].mean(1)} | {
            f"block_{number}": each for number, each in maps
        }

    outputs = ("tokens", "features", *(f"block_{number}" for number in form.blocks))
    return Graph(Portable(encoder, form), outputs, expected)
