"""A model starts from weights: how they fit it, and their copy into the parts of it that a rank holds."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import nn

from mimae.checkpoints.contents import describe
from mimae.errors import RunError
from mimae.model.blocks import Attention
from mimae.model.decoder import Decoder
from mimae.model.encoder import Encoder
from mimae.model.units import Model
from mimae.outside.text import printable
from mimae.randomness import Part
from mimae.weights import positions
from mimae.weights.names import sort
from mimae.weights.open import agreed
from mimae.weights.source import Joined, Mapped, Source, Stored, whole

FOREIGN = (
    (r"\b(ls[12]|gamma_[12]|gamma|layer_scale\d?|lambda1)\b", "LayerScale"),
    (r"\b(reg_token|register_tokens|storage_tokens)\b", "register tokens"),
    (r"\b(dist_token|distillation_token)\b", "a distillation token"),
    (r"\battn\.norm\b|\b([qk]_norm|query_norm|key_norm|inner_attn_ln)\b", "qk-norm or another norm inside attention"),
    (r"\bmlp\.(fc1_[gx]|w\d+|gate_proj|up_proj|weights_in|norm)\b", "SwiGLU or another MLP than two layers"),
    (r"relative_position|rel_pos|\brope\b|freqs", "relative or rotary positions"),
    (r"\b(norm_pre|pre_layrnorm)\b", "a norm before the first block"),
    (r"\b[qv]_bias\b", "biases of queries and values alone"),
)
"""Features that our encoder lacks, by the names of the tensors that show it."""

_IN_A_BLOCK = re.compile(r"(?:vit\.)?(?:encoder\.)?(?:blocks|layers?)\.\d+\.")
_NUMBER = re.compile(r"\.blocks\.(\d+)\.")
_OPTIONAL = re.compile(
    r"encoder\.(?:cls_token|pos_embed|norm\..*|blocks\.\d+\.attn\.qkv\.bias|patch_embed\.proj\.bias)"
)
"""Encoder weights that a ViT may lack: seeded ones take their place, which are zero where a ViT has none."""

_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16, 1664: 16}
"""Heads of the published ViTs, by width."""

_CHUNK = 1 << 22
"""Elements that are copied, and looked at, at once."""


@dataclass
class Fit:
    """How the weights of a source fit a model."""

    source: Source
    tensors: dict[str, Stored] = field(default_factory=dict)
    """Tensors that go into the model, by its names."""
    new: list[str] = field(default_factory=list)
    """Names in the model that keep the seed's weights."""
    left: list[str] = field(default_factory=list)
    """Names in the source that go nowhere."""
    interpolated: list[str] = field(default_factory=list)
    """Tensors that were resampled for another size, in words."""
    notes: list[str] = field(default_factory=list)
    """Notes for the user."""
    found: dict[str, Any] = field(default_factory=dict)
    """Measurements with the weights."""

    @property
    def has_decoder(self) -> bool:
        """Return whether the model's decoder starts from the source, all of it."""
        return any(n.startswith("decoder.") for n in self.tensors) and not any(
            n.startswith("decoder.") for n in self.new
        )

    def measured(
        self, losses: Mapping[str, float], shares: Mapping[str, float], normalize_pixels: bool, images: int
    ) -> None:
        """Note which pixels the decoder predicts: `losses` are L_rec on training images, of normalised and of raw
        pixels, and `shares` the same in units of the loss of a prediction of zeros."""
        best = min(shares, key=lambda kind: shares[kind])
        said = self.source.known.normalize_pixels
        self.found["reconstruction"] = {"images": images, "loss": dict(losses), "share_of_zeros": dict(shares)}
        told = " and ".join(f"{losses[kind]:.3f} for {kind} pixels" for kind in losses)
        measured = f"L_rec of its decoder on {images} training images is {told}"
        key = f"objective.normalize_pixels={str(normalize_pixels).lower()}"
        if said is None and shares[best] >= 1:
            self.notes.append(f"{measured}: no better than a prediction of zeros, so it fits neither")
            return
        best = best if said is None else "normalised" if said else "raw"
        why = "it predicts" if said is None else "by its own settings it predicts"
        if (best == "normalised") == normalize_pixels:
            self.notes.append(f"{measured}: {why} {best} pixels, as {key} asks")
        else:
            self.notes.append(
                f"WARNING: {measured}: {why} {best} pixels, and {key} trains it for the others; "
                f"objective.normalize_pixels={str(not normalize_pixels).lower()} fits it"
            )

    def lines(self) -> list[str]:
        """Return what a person should know, a few lines."""
        source, values = self.source, sum(prod(each.shape) for each in self.tensors.values())
        told = {
            f"placed, {values:,} values": in_words(self.tensors),
            "new, from the seed": in_words(self.new),
            "left over": in_words(self.left),
            "interpolated": "; ".join(self.interpolated),
        }
        licence = source.known.licence
        return [
            f"the weights start from {source.name} ({source.kind})",
            *(f"  {what}: {names}" for what, names in told.items() if names),
            *(f"  {note}" for note in self.notes),
            *([f"  their licence is {licence}, which this run inherits"] if licence else []),
        ]

    def record(self) -> dict[str, Any]:
        """Return the contents of init.json. Reads the whole source, for its SHA-256."""
        source = self.source
        return {
            "source": source.name,
            "kind": source.kind,
            "paths": [str(path.absolute()) for path in source.paths],
            "files": source.files or describe(source.paths),
            "licence": source.known.licence,
            "placed": sorted(self.tensors),
            "new": self.new,
            "left_over": self.left,
            "interpolated": self.interpolated,
            "notes": self.notes,
            **self.found,
        }


def in_words(names: Iterable[str]) -> str:
    """Return names in a line: those of an encoder, a decoder and the like as a number, few others one by one."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.partition(".")[0], []).append(name)
    told = [
        ", ".join(map(printable, found)) if len(found) < 3 else f"{printable(group)} ({len(found)} tensors)"
        for group, found in groups.items()
    ]
    return ", ".join(told[:6]) + (f" and {len(told) - 6} more" if len(told) > 6 else "")


def fit(source: Source, model: Model, parts: Mapping[str, Part]) -> Fit:
    """Return how a source fits a model that has our `Encoder` as `encoder`, and may have our `Decoder` as `decoder`.

    Raises RunError, in one sentence, for weights that are not those of such a model.
    """
    encoder = model.encoder
    assert isinstance(encoder, Encoder)
    # Positions are a parameter or a buffer; a parameter itself may be spread, and does not say its whole shape.
    wanted = {"encoder.pos_embed": encoder.pos_embed.shape} | {name: part.shape for name, part in parts.items()}
    found = Fit(source)
    try:
        names = sort(source.tensors)
    except ValueError as error:
        raise RunError(f"model.init={source.name} is no ViT that is known here: {error}") from error
    tensors = {
        ours: source.tensors[theirs[0]] if len(theirs) == 1 else Joined([source.tensors[name] for name in theirs])
        for ours, theirs in names.placed.items()
    }
    _check_kind(source, tensors, names.left)
    _check_sizes(source, tensors, encoder)
    _place_encoder(found, tensors, encoder, wanted)
    if (lacking := [n for n in wanted if n.startswith("encoder.") and n not in found.tensors]) and (
        missing := [name for name in lacking if not _OPTIONAL.fullmatch(name)]
    ):
        raise RunError(f"model.init={source.name} lacks {in_words(missing[:2])} of the encoder: it is not whole")
    _place_decoder(found, tensors, getattr(model, "decoder", None), encoder, wanted)
    for name in names.left:
        # Beyond encoder and decoder the names of others mean something else.
        if source.is_ours and name in parts and source.tensors[name].shape == parts[name].shape:
            found.tensors[name] = source.tensors[name]
        else:
            found.left.append(name)
    found.new = [name for name in wanted if name not in found.tensors]
    _compare(found, encoder)
    return found


def place(found: Fit, model: nn.Module, parts: Mapping[str, Part]) -> None:
    """Copy what fits into this rank's parts of a model, and into the positions of its encoder where they are no
    parameter. A collective: raises RunError on every rank where a part holds a number that is not finite."""
    buffers = dict(model.named_buffers())

    @torch.no_grad()
    def copy() -> None:
        for name, stored in found.tensors.items():
            held = parts.get(name) or Part(buffers[name], 0, buffers[name].shape)
            values = held.values.detach().view(-1)
            stored.copy_to(values, held.start)
            if not all(bool(piece.isfinite().all()) for piece in values.split(_CHUNK)):
                raise RunError(f"model.init={found.source.name}: {name} holds numbers that are not finite")

    agreed(copy, lambda _: "")


def _check_kind(source: Source, tensors: Mapping[str, Stored], left: Iterable[str]) -> None:
    """Raise RunError for weights of something else than a ViT as ours."""
    if not any(name.startswith("encoder.") for name in tensors):
        some = ", ".join(printable(name) for name in list(source.tensors)[:3])
        raise RunError(f"model.init={source.name} holds no weights of a ViT: its tensors are called {some}, ...")
    for name in left:
        for pattern, what in FOREIGN:
            if re.search(pattern, name) and not source.is_ours:
                raise RunError(f"model.init={source.name} is a ViT with {what} ({printable(name)}), which ours has not")
        if _IN_A_BLOCK.match(name) and not source.is_ours:
            raise RunError(f"model.init={source.name}: {printable(name)} has no place in a block of ours")
    activation = source.known.activation
    if activation not in (None, "gelu"):
        raise RunError(f"model.init={source.name} has the activation {printable(activation)}; ours is gelu")


def _check_sizes(source: Source, tensors: Mapping[str, Stored], encoder: Encoder) -> None:
    """Raise RunError for an encoder of another size than `encoder`, with the settings that would take it."""
    settings, known = encoder.settings, source.known
    projection = tensors.get("encoder.patch_embed.proj.weight")
    if projection is not None:
        shape = tuple(projection.shape)
        if len(shape) != 4 or shape[2] != shape[3]:
            raise RunError(f"model.init={source.name}: its patch embedding has the shape {shape}, not (D, 3, P, P)")
        if shape[1] != 3:
            raise RunError(
                f"model.init={source.name}: its patch embedding takes images of {shape[1]} channels, and the images "
                "here have 3"
            )
    widths = [tensor.shape[-1] for name, tensor in tensors.items() if re.fullmatch(r"encoder\..*norm\d?\.weight", name)]
    widths += [projection.shape[0]] if projection is not None else []
    depth = len({found[1] for name in tensors if name.startswith("encoder.") and (found := _NUMBER.search(name))})
    ours = {"width": settings.width, "depth": settings.depth, "mlp_width": settings.mlp}
    theirs = {"width": widths[0] if widths else settings.width, "depth": depth}
    mlp_in, mlp_out = (tensors.get(f"encoder.blocks.0.mlp.{name}.weight") for name in ("fc1", "fc2"))
    if mlp_in is not None and mlp_out is not None and mlp_in.shape[0] == 2 * mlp_out.shape[-1]:
        raise RunError(f"model.init={source.name} is a ViT with SwiGLU or another gated MLP, which ours has not")
    theirs["mlp_width"] = settings.mlp if mlp_in is None else mlp_in.shape[0]
    if ours["mlp_width"] / ours["width"] == theirs["mlp_width"] / theirs["width"]:  # follows from the width
        theirs["mlp_width"] = ours["mlp_width"]
    if known.heads is not None:
        ours["heads"], theirs["heads"] = settings.heads, known.heads
    if other := [key for key in ours if ours[key] != theirs[key]]:
        differences = ", ".join(f"{key} {theirs[key]} and not {ours[key]}" for key in other)
        keys = " ".join(f"model.{key}={theirs[key]}" for key in other)
        raise RunError(f"model.init={source.name} is another ViT, of {differences}; {keys} takes it")


def _place_encoder(
    found: Fit, tensors: Mapping[str, Stored], encoder: Encoder, wanted: Mapping[str, torch.Size]
) -> None:
    source = found.source
    for name in [name for name in tensors if name.startswith("encoder.")]:
        stored = tensors[name]
        if name not in wanted:  # as the final norm, where a task's head has one of its own
            found.left.append(name)
            continue
        if name == "encoder.pos_embed":
            stored = _positions(found, stored, encoder)
        elif name == "encoder.patch_embed.proj.weight" and stored.shape != wanted[name]:
            before, after = stored.shape[-1], encoder.grid.patch_size
            stored = Mapped(positions.resized_projection(whole(stored), after))
            found.interpolated.append(f"patch projection {before} x {before} -> {after} x {after} px")
            found.notes.append(
                f"the patches were {before} px wide, and are {after} px here: a resampled projection is a rough start"
            )
        if stored.shape != wanted[name]:
            raise RunError(
                f"model.init={source.name}: {name} has the shape {tuple(stored.shape)}, and ours {tuple(wanted[name])}"
            )
        found.tensors[name] = stored


def _positions(found: Fit, stored: Stored, encoder: Encoder) -> Stored:
    """Return the positions of a source for the grid of `encoder`."""
    source, wanted = found.source, encoder.grid
    shape = tuple(stored.shape)
    rows = shape[1] if len(shape) == 3 and shape[0] == 1 else 0
    grids = [positions.grid_of(count, source.known.grid, wanted) for count in (rows - 1, rows) if count > 0]
    grid = next(filter(None, grids), None)
    if grid is None or shape[2] != encoder.width:
        raise RunError(
            f"model.init={source.name}: positions of the shape {shape} are those of no square grid of patches, nor of "
            f"the {wanted.rows} x {wanted.columns} patches here"
        )
    if (grid.rows, grid.columns) == (wanted.rows, wanted.columns) and rows == 1 + grid.patches:
        return stored
    table = positions.with_class_token(whole(stored), grid)
    if (grid.rows, grid.columns) != (wanted.rows, wanted.columns):
        found.interpolated.append(f"positions {grid.rows} x {grid.columns} -> {wanted.rows} x {wanted.columns}")
    return Mapped(positions.for_grid(table, grid, wanted))


def _place_decoder(
    found: Fit,
    tensors: Mapping[str, Stored],
    decoder: nn.Module | None,
    encoder: Encoder,
    wanted: Mapping[str, torch.Size],
) -> None:
    """Place the decoder of a source where it fits as a whole; else the model's own begins new."""
    source, known = found.source, found.source.known
    theirs = {name: stored for name, stored in tensors.items() if name.startswith("decoder.")}
    table = theirs.pop("decoder.pos_embed", None)
    if not theirs:
        return
    if not isinstance(decoder, Decoder):
        found.left += theirs
        return
    other = [name for name, stored in theirs.items() if name not in wanted or stored.shape != wanted[name]]
    other += [name for name in wanted if name.startswith("decoder.") and name not in theirs]
    heads = next((each.heads for each in decoder.modules() if isinstance(each, Attention)), None)
    if other or known.decoder_heads not in (None, heads):
        found.left += theirs
        depth = len({match[1] for name in theirs if (match := _NUMBER.search(name))})
        embed = theirs.get("decoder.embed.weight")
        width = embed.shape[0] if embed is not None else "?"
        if encoder.grid.patch_size != _patch_size(tensors):
            found.notes.append("its decoder predicts patches of another size, and ours begins new")
            return
        keys = [f"decoder.width={width}", f"decoder.depth={depth}"]
        keys += [f"decoder.heads={known.decoder_heads}"] if known.decoder_heads is not None else []
        found.notes.append(f"its decoder does not fit, and ours begins new; {' '.join(keys)} would take it")
        return
    if table is not None:
        grid = positions.grid_of(table.shape[1] - 1, known.grid, encoder.grid)
        if grid is None or len(table.shape) != 3 or not positions.are_sincos(whole(table), grid):
            raise RunError(
                f"model.init={source.name}: the decoder's positions are not the fixed sines and cosines that ours has"
            )
    found.tensors |= theirs


def _patch_size(tensors: Mapping[str, Stored]) -> int | None:
    projection = tensors.get("encoder.patch_embed.proj.weight")
    return None if projection is None else projection.shape[-1]


def _compare(found: Fit, encoder: Encoder) -> None:
    """Note what a source says of itself and the run has otherwise."""
    known, settings = found.source.known, encoder.settings
    if known.norm_eps is not None and known.norm_eps != settings.norm_eps:
        found.notes.append(
            f"its norms were trained with an epsilon of {known.norm_eps:g}: model.norm_eps={known.norm_eps:g} is the "
            f"same, model.norm_eps={settings.norm_eps:g} nearly so"
        )
    usual = _HEADS.get(settings.width)
    if known.heads is None and usual not in (None, settings.heads):
        found.notes.append(
            f"nothing in it says how many heads it has; published ViTs of width {settings.width} have {usual}, and "
            f"model.heads={settings.heads}"
        )
    for key in ("mean", "std"):
        theirs, ours = getattr(known, key), tuple(getattr(encoder, key).tolist())
        if theirs is not None and any(abs(a - b) > 1e-3 for a, b in zip(theirs, ours, strict=True)):
            shown = "[" + ", ".join(f"{value:g}" for value in theirs) + "]"
            found.notes.append(f"it was trained with data.{key}={shown}, and the run has another")
    if "encoder.norm.weight" in found.new:
        found.notes.append("it has no final norm: the encoder's begins new")
