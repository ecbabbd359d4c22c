"""Names of the weights of a ViT and of MAE's decoder in mimae ("ours"), facebookresearch's MAE, timm and transformers.

    ours                         facebookresearch     timm         transformers, as on its hub
    encoder.cls_token            cls_token            cls_token    vit.embeddings.cls_token
    encoder.blocks.0.attn.qkv.*  blocks.0.attn.qkv.*  as left      vit.encoder.layer.0.attention.attention.{query,...}.*
    decoder.embed.*              decoder_embed.*                   decoder.decoder_embed.*

All projects have the same shapes, with one exception: transformers has separate tensors for queries, keys and values,
each of which is a third of the rows of our `qkv`, in this order. A ViTModel without a decoder has the names of
transformers without `vit.`.

transformers has three spellings. Its hub and version 4 use the one above. Version 5 uses
`vit.layers.0.attention.q_proj` in memory, and saves the decoder's blocks as `decoder.decoder_encoder.layer.0`. All
spellings are read, and the first one is written. This module needs no torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

State = Mapping[str, "Tensor"]
"""Tensors by our names: `encoder.*`, `decoder.*`, and `decoder.pos_embed`, which checkpoints do not have."""

# Ours -> transformers', for tensors outside the blocks.
_ENCODER = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}
# Ours -> facebookresearch's, and transformers' (after the prefix `decoder.`).
_DECODER = {
    "embed": "decoder_embed",
    "mask_token": "mask_token",
    "pos_embed": "decoder_pos_embed",
    "norm": "decoder_norm",
    "head": "decoder_pred",
}
# Ours -> transformers', inside a block: the spelling of the hub, then the spelling of version 5 in memory.
_BLOCK = {
    "norm1": ("layernorm_before", "layernorm_before"),
    "norm2": ("layernorm_after", "layernorm_after"),
    "attn.proj": ("attention.output.dense", "attention.o_proj"),
    "mlp.fc1": ("intermediate.dense", "mlp.fc1"),
    "mlp.fc2": ("output.dense", "mlp.fc2"),
}
_QKV = (
    ("attention.attention.query", "attention.q_proj"),
    ("attention.attention.key", "attention.k_proj"),
    ("attention.attention.value", "attention.v_proj"),
)

_LEAF = re.compile(r"(.*)\.(weight|bias)")
_OURS_IN_A_BLOCK = re.compile(r"(encoder|decoder)\.blocks\.(\d+)\.(.+)")
_THEIRS_IN_A_BLOCK = re.compile(
    r"(?:vit\.)?(?:encoder\.layers?|layers)\.(?P<encoder>\d+)\.(?P<in_encoder>.+)"
    r"|decoder\.(?:decoder_layers|decoder_encoder\.layer)\.(?P<decoder>\d+)\.(?P<in_decoder>.+)"
)
_WRAPPERS = re.compile(r"(?:(?:module|_orig_mod|model)\.)+")


class Place(NamedTuple):
    """The place of another project's tensor in our model."""

    name: str
    """Our name of the tensor."""
    third: int | None = None
    """Part of our tensor: 0, 1, 2 for queries, keys and values; None for the whole tensor."""


def to_timm(state: State) -> dict[str, Tensor]:
    """Return the weights of an encoder under timm's names.

    Raises ValueError for names that timm's ViT does not have, such as those of a decoder.
    """
    if wrong := [name for name in state if not _is_ours(name) or not name.startswith("encoder.")]:
        raise ValueError(f"timm's ViT has no {wrong[0]}")
    return {name.removeprefix("encoder."): tensor for name, tensor in state.items()}


def to_mae(state: State) -> dict[str, Tensor]:
    """Return the weights of an encoder, or of encoder and decoder, under the names of facebookresearch's MAE.

    Raises ValueError for names that it does not have.
    """
    found = {}
    for name, tensor in state.items():
        if not _is_ours(name):
            raise ValueError(f"MAE has no {name}")
        side, _, rest = name.partition(".")
        stem, leaf = _split(rest)
        found[rest if side == "encoder" else _DECODER.get(stem, f"decoder_{stem}") + leaf] = tensor
    return found


def to_transformers(state: State) -> dict[str, Tensor]:
    """Return the weights under the names of transformers' hub.

    The names are those of a ViTMAEForPreTraining if `state` has a decoder, else those of a ViTModel. Raises ValueError
    for names that these models do not have.
    """
    vit = "vit." if any(name.startswith("decoder.") for name in state) else ""
    found = {}
    for name, tensor in state.items():
        if not _is_ours(name):
            raise ValueError(f"transformers' ViT has no {name}")
        stem, leaf = _split(name)
        if (block := _OURS_IN_A_BLOCK.fullmatch(stem)) is None:
            side, _, rest = stem.partition(".")
            found[(f"{vit}{_ENCODER[rest]}" if side == "encoder" else f"decoder.{_DECODER[rest]}") + leaf] = tensor
            continue
        side, number, inside = block.groups()
        inner = [spelling for spelling, _ in _QKV] if inside == "attn.qkv" else [_BLOCK[inside][0]]
        prefix = f"{vit}encoder.layer" if side == "encoder" else "decoder.decoder_layers"
        for spelling, part in zip(inner, tensor.chunk(len(inner)), strict=True):
            found[f"{prefix}.{number}.{spelling}{leaf}"] = part
    return found


def place(name: str) -> Place | None:
    """Return the place in our model of a tensor by its name, in any of the spellings, or None if it has no place."""
    name = _WRAPPERS.sub("", name) if _WRAPPERS.match(name) else name
    stem, leaf = _split(name)
    if found := _THEIRS_IN_A_BLOCK.fullmatch(stem):
        side = "encoder" if found["encoder"] else "decoder"
        inside = _FROM_BLOCK.get(found[f"in_{side}"])
        return None if inside is None else Place(f"{side}.blocks.{found[side]}.{inside.name}{leaf}", inside.third)
    if (ours := _FROM_NAMES.get(stem)) is not None:
        return Place(ours + leaf)
    for side, blocks in (("encoder", "blocks."), ("decoder", "decoder_blocks.")):
        if stem.startswith(blocks):
            stem = f"{side}.blocks.{stem.removeprefix(blocks)}"
    found = _OURS_IN_A_BLOCK.fullmatch(stem)
    return Place(stem + leaf) if found and found[3] in ("attn.qkv", *_BLOCK) else None


class Sorted(NamedTuple):
    """The names of a file, assigned to our names."""

    placed: dict[str, tuple[str, ...]]
    """The name in the file by our name; three names for queries, keys and values, which are one tensor of ours."""
    left: tuple[str, ...]
    """Names that our models do not have."""


def sort(names: Iterable[str]) -> Sorted:
    """Assign the tensor names of a file to our names.

    Raises ValueError if two names have the same place, or if only some of queries, keys and values are there.
    """
    found: dict[str, dict[int | None, str]] = {}
    left = []
    for name in names:
        if (its := place(name)) is None:
            left.append(name)
            continue
        row = found.setdefault(its.name, {})
        if row and (its.third is None or None in row or its.third in row):
            raise ValueError(f"{next(iter(row.values()))} and {name} are both {its.name}")
        row[its.third] = name
    for ours, row in found.items():
        if None not in row and len(row) < len(_QKV):
            raise ValueError(f"{next(iter(row.values()))} is there without the rest of {ours}")
    return Sorted({ours: tuple(row[key] for key in sorted(row, key=str)) for ours, row in found.items()}, tuple(left))


def kind(names: Iterable[str]) -> str:
    """Return a text that says from which project these names are."""
    known = set(names)
    if any(name.startswith(("vit.", "embeddings.", "decoder.decoder_")) for name in known):
        return "names of transformers"
    return "names of MAE, with its decoder" if "decoder_embed.weight" in known else "names of timm and MAE"


def _split(name: str) -> tuple[str, str]:
    """Return a name without `.weight` or `.bias`, and the part that was removed."""
    found = _LEAF.fullmatch(name)
    return (found[1], f".{found[2]}") if found else (name, "")


def _is_ours(name: str) -> bool:
    return place(name) == Place(name)


_FROM_BLOCK = {theirs: Place(ours) for ours, spellings in _BLOCK.items() for theirs in spellings} | {
    theirs: Place("attn.qkv", third) for third, spellings in enumerate(_QKV) for theirs in spellings
}
_FROM_NAMES = {
    each: f"encoder.{ours}"
    for ours, theirs in _ENCODER.items()
    for each in (f"encoder.{ours}", ours, theirs, f"vit.{theirs}")
} | {
    each: f"decoder.{ours}"
    for ours, theirs in _DECODER.items()
    for each in (f"decoder.{ours}", theirs, f"decoder.{theirs}")
}
