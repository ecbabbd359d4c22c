"""Damaged files and folders of weights, as other projects write them: a small model starts from each."""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import random
import struct
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save
from torch import Tensor

from mimae.bench.harness.fuzz.case import Case, Content, Special
from mimae.bench.harness.fuzz.draws import ODD_TEXTS, damaged, integer, json_text, odd, times
from mimae.bench.harness.fuzz.forked import Wrong
from mimae.bench.harness.fuzz.formats import rezipped
from mimae.bench.harness.fuzz.kind import Kind
from mimae.bench.harness.fuzz.recipes import TINY
from mimae.config.load import load_recipe
from mimae.model.mimae import MIMAE, build
from mimae.outside.text import printable
from mimae.randomness import Part
from mimae.weights.names import to_mae, to_transformers
from mimae.weights.open import open_source
from mimae.weights.start import fit, place

Weights = dict[str, Tensor]

_CONFIGS: dict[str, dict[str, Any]] = {
    "timm": {
        "architecture": "vit_tiny_patch16_224",
        "model_args": {"img_size": 8, "patch_size": 2, "num_heads": 2, "embed_dim": 16, "depth": 1},
        "pretrained_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "license": "mit", "input_size": [3, 8, 8]},
    },
    "transformers": {
        "model_type": "vit_mae",
        "hidden_size": 16,
        "num_attention_heads": 2,
        "decoder_num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 2,
        "layer_norm_eps": 1e-12,
        "hidden_act": "gelu",
        "norm_pix_loss": True,
    },
}


_CARD = b"---\nlicense: \x1b[2Jx\n---\n"
_ODD_SHAPES = (
    (),
    (0,),
    (1,),
    (16,),
    (16, 0),
    (16, 1),
    (1, 17, 16),
    (16, 3, 4, 4),
    (1, 5, 16),
    (1, 0, 16),
    (2, 2, 2, 2),
)
_ODD_BLOCKS = ("999", "-1", "10" * 40)


class _Code:
    """Unpickles by running a command that writes outside of the case."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.system, ("echo written > ../canary/file",)


class _Opened:
    """Unpickles by opening a file outside of the case for writing."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return open, ("../canary/file", "w")


@lru_cache(1)
def _model() -> MIMAE:
    return build(load_recipe(yaml.safe_load(TINY), []).recipe)


@lru_cache(1)
def _weights() -> tuple[Weights, Weights]:
    """Return the weights of encoder and decoder under the names of MAE's code and of transformers."""
    ours = {name: tensor for name, tensor in _model().state_dict().items() if not name.startswith("objective.")}
    return to_mae(ours), to_transformers(ours)


def make_weights(draw: random.Random) -> Case:
    style = draw.choice(("mae", "mae", "file", "timm", "transformers", "index"))
    weights = dict(_weights()[style in ("transformers", "index")])
    for _ in times(draw) if draw.random() < 0.4 else ():
        _change(draw, weights)
    if style == "mae":
        return Case({"w.pth": _special(draw) or _pickled(draw, weights)}, ["w.pth"])
    if style == "file":
        return Case({"w.safetensors": _special(draw) or _safetensors(draw, weights)}, ["w.safetensors"])
    files: dict[str, Content] = {}
    config = _CONFIGS["timm" if style == "timm" else "transformers"]
    files["w/config.json"] = json_text(draw, config) if draw.random() < 0.4 else json.dumps(config).encode()
    if style == "index":
        half = len(weights) // 2
        parts = {"a.safetensors": list(weights)[:half], "b.safetensors": list(weights)[half:]}
        index = {"weight_map": {name: file for file, names in parts.items() for name in names}}
        files["w/model.safetensors.index.json"] = json_text(draw, index) if draw.random() < 0.7 else _bytes(index)
        for file, names in parts.items():
            files[f"w/{file}"] = _safetensors(draw, {name: weights[name] for name in names})
    elif draw.random() < 0.8:
        files["w/model.safetensors"] = _special(draw) or _safetensors(draw, weights)
    else:
        files["w/pytorch_model.bin"] = _pickled(draw, weights)
    if draw.random() < 0.1:
        name = draw.choice(("w/README.md", "w/preprocessor_config.json", "w/config.json", "w/config.yaml", "w/x.pth"))
        files[name] = draw.choice(
            (b"---\nlicense: \x1b[2Jx\n---\n", b"\xff\xfe", b"", json_text(draw, {"image_mean": []}))
        )
    return Case(files, ["w"])


def _bytes(tree: object) -> bytes:
    return json.dumps(tree).encode()


def _special(draw: random.Random) -> Special | None:
    if draw.random() > 0.04:
        return None
    kinds = (Special("fifo"), Special("folder"), Special("link", "/dev/zero"), Special("sparse", str(10**12)))
    return draw.choice((*kinds, Special("link", "../canary/file")))


def _change(draw: random.Random, weights: Weights) -> None:
    """Change a tensor in a file that stays well-formed: its name, shape, type or values."""
    name = draw.choice(list(weights))
    tensor, chance = weights[name], draw.random()
    if chance < 0.15:
        del weights[name]
    elif chance < 0.3:
        weights[str(draw.choice(ODD_TEXTS)).encode(errors="replace").decode()[:300]] = weights.pop(name)
    elif chance < 0.4:
        other = draw.choice(
            (f"blocks.{draw.choice(('999', '-1', '10' * 40))}.attn.qkv.weight", "head.weight", f"{name}.x")
        )
        weights[other] = tensor
    elif chance < 0.6:
        shapes = (
            (),
            (0,),
            (1,),
            (*tensor.shape, 1),
            (tensor.shape[0], 0),
            tensor.shape[::-1],
            (1, 17, 16),
            (16, 3, 4, 4),
        )
        weights[name] = torch.zeros(draw.choice(shapes))
    elif chance < 0.8:
        kinds = (torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.int64, torch.bool)
        weights[name] = tensor.to(draw.choice(kinds))
    else:
        weights[name] = torch.full_like(tensor, draw.choice((float("nan"), float("inf"), 1e38, 0.0)))


def _pickled(draw: random.Random, weights: Weights) -> bytes:
    """Return a file of torch.save, with other things beside the weights or damage at times."""
    tree: Any = {"model": weights, "args": argparse.Namespace(norm_pix_loss=draw.random() < 0.5), "epoch": 3}
    chance = draw.random()
    if chance < 0.08:
        tree["epoch"] = draw.choice((_Code(), _Opened(), print))
    elif chance < 0.2:
        tree[draw.choice(("model", "args", "epoch", "state_dict"))] = _plain(draw)
    elif chance < 0.25:
        tree = draw.choice((_plain(draw), [tree], weights, {"module": tree}))
    elif chance < 0.3:
        first = next(iter(weights))
        strange = (weights[first].to_sparse(), torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.quint8))
        tree["model"] = {**weights, first: draw.choice((*strange, torch.empty(3, device="meta")))}
    if draw.random() < 0.05:
        return pickle.dumps(draw.choice((_Code(), _Opened(), {"model": 1})))
    made = io.BytesIO()
    torch.save(tree, made, _use_new_zipfile_serialization=draw.random() < 0.85)
    content = made.getvalue()
    change: Callable[[bytes], bytes] = partial(damaged, draw)
    if (chance := draw.random()) < 0.4:
        return rezipped(draw, content, change)
    return damaged(draw, content) if chance < 0.7 else content


def _plain(draw: random.Random) -> Any:
    """Return an odd value that pickle can write."""
    value = odd(draw)
    return value.encode(errors="replace") if isinstance(value, str) else value


def _safetensors(draw: random.Random, weights: Weights) -> bytes:
    """Return a file of safetensors, at times with another header that its length fits, or with other bytes."""
    data = save({name: tensor.clone().contiguous() for name, tensor in weights.items()})
    if (chance := draw.random()) < 0.35:
        return data
    if chance < 0.6:
        return damaged(draw, data)
    (length,) = struct.unpack("<Q", data[:8])
    header = json_text(draw, json.loads(data[8 : 8 + length]))
    size = struct.pack("<Q", len(header)) if draw.random() < 0.85 else integer(draw, 8, len(header))
    return size + header + data[8 + length :]


def use_weights(folder: Path, case: Case) -> str:
    """Start a small model from the weights, as a run does."""
    model = _model()
    parts = {name: Part(parameter, 0, parameter.shape) for name, parameter in model.named_parameters()}
    found = fit(open_source(case.words[0]), model, parts)
    place(found, model, parts)
    if wrong := [name for name, value in model.named_parameters() if not value.isfinite().all()]:
        raise Wrong(f"{wrong[0]} is not finite")
    if not all(name in parts or name in dict(model.named_buffers()) for name in found.tensors):
        raise Wrong("something was placed that the model does not have")
    told = "\n".join(found.lines())
    if printable(told, lines=True) != told:
        raise Wrong(f"what is told of the weights is not printable: {told!r}")
    json.dumps(found.record(), allow_nan=False)
    return ""


WEIGHTS = Kind(make_weights, use_weights, _weights, memory=500 << 20)
