"""Start of a model from given weights: how they fit the model, and their copy into this rank's parts of it."""

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
    (r"\b[qv]_bias\b", "biases of queries and values, but not of keys"),
)
"""Features that our encoder lacks, by patterns of the names of their tensors."""

_IN_A_BLOCK = re.compile(r"(?:vit\.)?(?:encoder\.)?(?:blocks|layers?)\.\d+\.")
_NUMBER = re.compile(r"\.blocks\.(\d+)\.")
_OPTIONAL = re.compile(
    r"encoder\.(?:cls_token|pos_embed|norm\..*|blocks\.\d+\.attn\.qkv\.bias|patch_embed\.proj\.bias)"
)
"""Encoder weights that a ViT may lack. They keep the seed's values, which are zero for biases."""

_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16, 1664: 16}
"""Number of heads of the published ViTs, by width."""

_CHUNK = 1 << 22
"""Number of elements that are checked at once."""


@dataclass
class Fit:
    """A report on how the weights of a source fit a model."""

    source: Source
    tensors: dict[str, Stored] = field(default_factory=dict)
    """Tensors that are copied into the model, by the model's names."""
    new: list[str] = field(default_factory=list)
    """Names in the model that keep the seed's weights."""
    left: list[str] = field(default_factory=list)
    """Names in the source that are not used."""
    interpolated: list[str] = field(default_factory=list)
    """Descriptions of the tensors that were resampled for another size."""
    notes: list[str] = field(default_factory=list)
    """Notes for the user."""
    found: dict[str, Any] = field(default_factory=dict)
    """Measurements with the weights."""

    @property
    def has_decoder(self) -> bool:
        """True if the whole decoder of the model starts from the source."""
        return any(n.startswith("decoder.") for n in self.tensors) and not any(
            n.startswith("decoder.") for n in self.new
        )

    def measured(
        self, losses: Mapping[str, float], shares: Mapping[str, float], normalize_pixels: bool, images: int
    ) -> None:
        """Record whether the decoder predicts normalised or raw pixels.

        `losses` are L_rec on `images` training images for both kinds of pixels. `shares` are these losses divided by
        the loss of a prediction of zeros.
        """
        best = min(shares, key=lambda kind: shares[kind])
        said = self.source.known.normalize_pixels
        self.found["reconstruction"] = {"images": images, "loss": dict(losses), "share_of_zeros": dict(shares)}
        told = " and ".join(f"{losses[kind]:.3f} for {kind} pixels" for kind in losses)
        measured = f"L_rec of its decoder on {images} training images is {told}"
        key = f"objective.normalize_pixels={str(normalize_pixels).lower()}"
        if said is None and shares[best] >= 1:
            self.notes.append(f"{measured}: it is no better than a prediction of zeros, so it fits neither")
            return
        best = best if said is None else "normalised" if said else "raw"
        why = "it predicts" if said is None else "by its own settings it predicts"
        if (best == "normalised") == normalize_pixels:
            self.notes.append(f"{measured}: {why} {best} pixels, as {key} asks")
        else:
            self.notes.append(
                f"WARNING: {measured}: {why} {best} pixels, but {key} trains it for the other kind; "
                f"use objective.normalize_pixels={str(not normalize_pixels).lower()}"
            )

    def lines(self) -> list[str]:
        """Return a summary for the user, as a few lines of text."""
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
        """Return the contents of init.json. The call may read the whole source to compute its SHA-256."""
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
    """Return names as one line. Groups of three and more (encoder, decoder) are given by their number of tensors."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.partition(".")[0], []).append(name)
    told = [
        ", ".join(map(printable, found)) if len(found) < 3 else f"{printable(group)} ({len(found)} tensors)"
        for group, found in groups.items()
    ]
    return ", ".join(told[:6]) + (f" and {len(told) - 6} more" if len(told) > 6 else "")


def fit(source: Source, model: Model, parts: Mapping[str, Part]) -> Fit:
    """Fit the weights of a source to a model, and return the report.

    The model has our `Encoder` as `encoder`, and may have our `Decoder` as `decoder`. Raises RunError if the weights do
    not fit such a model.
    """
    encoder = model.encoder
    assert isinstance(encoder, Encoder)
    # Positions are a parameter or a buffer. The shape of a sharded parameter is not the whole shape, so parts are used.
    wanted = {"encoder.pos_embed": encoder.pos_embed.shape} | {name: part.shape for name, part in parts.items()}
    found = Fit(source)
    try:
        names = sort(source.tensors)
    except ValueError as error:
        raise RunError(f"model.init={source.name} is not a ViT of a known kind: {error}") from error
    tensors = {
        ours: source.tensors[theirs[0]] if len(theirs) == 1 else Joined([source.tensors[name] for name in theirs])
        for ours, theirs in names.placed.items()
    }
    _check_kind(source, tensors, names.left)
    _check_numbers(source, tensors)
    _check_sizes(source, tensors, encoder)
    _place_encoder(found, tensors, model, encoder, wanted)
    if (lacking := [n for n in wanted if n.startswith("encoder.") and n not in found.tensors]) and (
        missing := [name for name in lacking if not _OPTIONAL.fullmatch(name)]
    ):
        raise RunError(f"model.init={source.name} lacks {in_words(missing[:2])} of the encoder: it is incomplete")
    _place_decoder(found, tensors, getattr(model, "decoder", None), encoder, wanted)
    for name in names.left:
        # Outside encoder and decoder, names of other projects may mean something else.
        if source.is_ours and name in parts and source.tensors[name].shape == parts[name].shape:
            found.tensors[name] = source.tensors[name]
        else:
            found.left.append(name)
    found.new = [name for name in wanted if name not in found.tensors]
    _compare(found, encoder)
    return found


def place(found: Fit, model: nn.Module, parts: Mapping[str, Part]) -> None:
    """Copy the fitting tensors into this rank's parts of a model, and into the encoder's positions if they are a
    buffer.

    This is a collective. Raises RunError on every rank if a tensor has a number that is not finite.
    """
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
    """Raise RunError for weights of a model that is not a ViT like ours."""
    if not any(name.startswith("encoder.") for name in tensors):
        some = ", ".join(printable(name) for name in list(source.tensors)[:3])
        raise RunError(f"model.init={source.name} holds no weights of a ViT: its tensors are called {some}, ...")
    for name in left:
        for pattern, what in FOREIGN:
            if re.search(pattern, name) and not source.is_ours:
                raise RunError(f"model.init={source.name} is a ViT with {what} ({printable(name)}), which ours lacks")
        if _IN_A_BLOCK.match(name) and not source.is_ours:
            raise RunError(f"model.init={source.name}: {printable(name)} does not exist in our blocks")
    activation = source.known.activation
    if activation not in (None, "gelu"):
        raise RunError(f"model.init={source.name} has the activation {printable(activation)}; ours is gelu")


def _check_numbers(source: Source, tensors: Mapping[str, Stored]) -> None:
    """Raise RunError for weights that are not floating-point numbers, such as quantised ones without their scales."""
    for name, stored in tensors.items():
        if not stored.dtype.is_floating_point:
            raise RunError(
                f"model.init={source.name}: {name} has numbers of type {str(stored.dtype).removeprefix('torch.')}; "
                "legal are floating-point numbers, so convert quantised weights first"
            )


def _check_sizes(source: Source, tensors: Mapping[str, Stored], encoder: Encoder) -> None:
    """Raise RunError if the weights are for another size than `encoder`'s. The message has the settings that fit."""
    settings, known = encoder.settings, source.known
    projection = tensors.get("encoder.patch_embed.proj.weight")
    if projection is not None:
        shape = tuple(projection.shape)
        if len(shape) != 4 or shape[2] != shape[3]:
            raise RunError(f"model.init={source.name}: its patch embedding has the shape {shape}, not (D, 3, P, P)")
        if shape[1] != 3:
            raise RunError(
                f"model.init={source.name}: its patch embedding takes images of {shape[1]} channels, but images here "
                "have 3"
            )
    widths = [tensor.shape[-1] for name, tensor in tensors.items() if re.fullmatch(r"encoder\..*norm\d?\.weight", name)]
    widths += [projection.shape[0]] if projection is not None else []
    depth = len({found[1] for name in tensors if name.startswith("encoder.") and (found := _NUMBER.search(name))})
    ours = {"width": settings.width, "depth": settings.depth, "mlp_width": settings.mlp}
    theirs = {"width": widths[0] if widths else settings.width, "depth": depth}
    mlp_in, mlp_out = (tensors.get(f"encoder.blocks.0.mlp.{name}.weight") for name in ("fc1", "fc2"))
    if mlp_in is not None and mlp_out is not None and mlp_in.shape[0] == 2 * mlp_out.shape[-1]:
        raise RunError(f"model.init={source.name} is a ViT with SwiGLU or another gated MLP, which ours lacks")
    theirs["mlp_width"] = settings.mlp if mlp_in is None else mlp_in.shape[0]
    if ours["mlp_width"] / ours["width"] == theirs["mlp_width"] / theirs["width"]:  # It follows from the width.
        theirs["mlp_width"] = ours["mlp_width"]
    if known.heads is not None:
        ours["heads"], theirs["heads"] = settings.heads, known.heads
    if other := [key for key in ours if ours[key] != theirs[key]]:
        differences = ", ".join(f"{key} {theirs[key]} instead of {ours[key]}" for key in other)
        keys = " ".join(f"model.{key}={theirs[key]}" for key in other)
        raise RunError(f"model.init={source.name} is a ViT of another size, {differences}; set {keys}")


def _place_encoder(
    found: Fit, tensors: Mapping[str, Stored], model: Model, encoder: Encoder, wanted: Mapping[str, torch.Size]
) -> None:
    source = found.source
    for name in [name for name in tensors if name.startswith("encoder.")]:
        stored = tensors[name]
        if name not in wanted:  # For example the final norm, if the task's head has another one.
            found.left.append(name)
            continue
        if name == "encoder.pos_embed":
            stored = _positions(found, stored, encoder)
            if model.num_sizes > 1 and not positions.are_sincos(whole(stored), encoder.grid):
                raise RunError(
                    f"model.init={source.name}: its positions are not the fixed sines and cosines that every stage of "
                    "schedule.resolution computes for its images; legal is schedule.resolution=[]"
                )
        elif name == "encoder.patch_embed.proj.weight" and stored.shape != wanted[name]:
            before, after = stored.shape[-1], encoder.grid.patch_size
            stored = Mapped(positions.resized_projection(whole(stored), after))
            found.interpolated.append(f"patch projection {before} x {before} -> {after} x {after} px")
            found.notes.append(
                f"the patches were {before} px wide, and are {after} px here: a resampled projection is a rough start"
            )
        if stored.shape != wanted[name]:
            raise RunError(
                f"model.init={source.name}: {name} has shape {tuple(stored.shape)}, but ours has {tuple(wanted[name])}"
            )
        found.tensors[name] = stored


def _positions(found: Fit, stored: Stored, encoder: Encoder) -> Stored:
    """Return the positions of a source, interpolated for the grid of `encoder` if necessary."""
    source, wanted = found.source, encoder.grid
    shape = tuple(stored.shape)
    rows = shape[1] if len(shape) == 3 and shape[0] == 1 else 0
    grids = [positions.grid_of(count, source.known.grid, wanted) for count in (rows - 1, rows) if count > 0]
    grid = next(filter(None, grids), None)
    if grid is None or shape[2] != encoder.width:
        raise RunError(
            f"model.init={source.name}: positions of shape {shape} fit neither a square grid of patches nor the "
            f"{wanted.rows} x {wanted.columns} patches here"
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
    """Place the decoder of a source if all of it fits; otherwise the model's decoder keeps the seed's weights."""
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
            found.notes.append("its decoder predicts patches of another size, so ours starts from the seed")
            return
        keys = [f"decoder.width={width}", f"decoder.depth={depth}"]
        keys += [f"decoder.heads={known.decoder_heads}"] if known.decoder_heads is not None else []
        found.notes.append(f"its decoder does not fit, so ours starts from the seed; to use it, set {' '.join(keys)}")
        return
    if table is not None:
        grid = positions.grid_of(table.shape[1] - 1, known.grid, encoder.grid)
        if grid is None or len(table.shape) != 3 or not positions.are_sincos(whole(table), grid):
            raise RunError(
                f"model.init={source.name}: the decoder's positions are not the fixed sin-cos positions of ours"
            )
    found.tensors |= theirs


def _patch_size(tensors: Mapping[str, Stored]) -> int | None:
    projection = tensors.get("encoder.patch_embed.proj.weight")
    return None if projection is None else projection.shape[-1]


def _compare(found: Fit, encoder: Encoder) -> None:
    """Add notes about facts of the source that differ from the settings of the run."""
    known, settings = found.source.known, encoder.settings
    if known.norm_eps is not None and known.norm_eps != settings.norm_eps:
        found.notes.append(
            f"its norms were trained with an epsilon of {known.norm_eps:g}; model.norm_eps={settings.norm_eps:g} gives "
            f"nearly the same features, model.norm_eps={known.norm_eps:g} exactly the same"
        )
    usual = _HEADS.get(settings.width)
    if known.heads is None and usual not in (None, settings.heads):
        found.notes.append(
            f"it does not state its number of heads; published ViTs of width {settings.width} have {usual}, but "
            f"model.heads={settings.heads}"
        )
    for key in ("mean", "std"):
        theirs, ours = getattr(known, key), tuple(getattr(encoder, key).tolist())
        if theirs is not None and any(abs(a - b) > 1e-3 for a, b in zip(theirs, ours, strict=True)):
            shown = "[" + ", ".join(f"{value:g}" for value in theirs) + "]"
            found.notes.append(f"it was trained with data.{key}={shown}, but the run has another value")
    if "encoder.norm.weight" in found.new:
        found.notes.append("it has no final norm: the encoder's norm starts from the seed")
