"""Groups of fine-tuning: each layer of an encoder learns more slowly than the next one (layer-wise decay, as in BEiT
and in MAE's code)."""

from __future__ import annotations

import re

import torch

from mimae.optim.groups import Group, Rule, is_matrix

_BLOCK = re.compile(r"encoder\.blocks\.(\d+)\.")
_EMBEDDINGS = ("encoder.patch_embed.", "encoder.cls_token", "encoder.pos_embed")


def layer_of(name: str, depth: int) -> int:
    """Return the layer of a parameter: 0 for the embeddings, i + 1 for block i, depth + 1 for all that follows."""
    if block := _BLOCK.match(name):
        return int(block[1]) + 1
    return 0 if name.startswith(_EMBEDDINGS) else depth + 1


def groups(peak: float, weight_decay: float, layer_decay: float, depth: int) -> Rule:
    """Return the rule for a model with an `encoder` of `depth` blocks.

    The learning rate of layer l is peak * layer_decay^(depth + 1 - l). Matrices have weight decay and are adapted by
    LARS; biases, scales, tokens and positions are not.
    """

    def rule(name: str, shape: torch.Size) -> Group:
        scale = layer_decay ** (depth + 1 - layer_of(name, depth))
        is_decayed = is_matrix(name, shape)
        return Group(peak * scale, weight_decay if is_decayed else 0.0, adapt=is_decayed)

    return rule
