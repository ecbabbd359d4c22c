"""Opening of the source of weights that model.init names.

It is a run, a checkpoint, a file, a folder of timm or transformers, or a model in timm's cache.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from mimae import distributed
from mimae.checkpoints import checkpoint, dcp
from mimae.checkpoints.contents import is_inside, read_manifest
from mimae.config.kept import load_run
from mimae.config.recipe import Recipe, RunRecipe
from mimae.config.texts import expanded
from mimae.errors import RunError, UserError
from mimae.model.geometry import Grid
from mimae.outside.reading import read_text
from mimae.outside.text import printable
from mimae.weights import files, names
from mimae.weights.source import InCheckpoint, Known, Source, Stored

T = TypeVar("T")

TIMM, AVERAGE = "timm:", "average:"
"""Prefixes of model.init for a model in timm's cache, and for the moving average of a run."""

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""File names of weights in a folder of transformers or timm; the first one is preferred."""

INIT = "init.json"
"""Name of the file in a run's directory that describes the weights from which the run started."""

_JSON_BYTES = 1 << 24
_MAE = "CC-BY-NC-4.0"
_OF_MAE = ("mae_pretrain_vit", "mae_visualize_vit", "mae_finetuned_vit", "facebook/vit-mae", "facebook--vit-mae")
"""Substrings of the paths of facebookresearch's published weights and of transformers' copies of them."""


def open_source(init: str) -> Source:
    """Open the source that model.init names. This is a collective.

    Raises RunError on every rank if any rank cannot open it, or if the ranks see different files.
    """
    name = init.removeprefix(AVERAGE)
    if init.startswith(TIMM):
        return agreed(lambda: _open_timm(init), _sign)
    kind, path = agreed(lambda: _kind(init, name), lambda found: found[0])
    if kind == "run":
        return agreed(lambda: _open_run(init, path, init.startswith(AVERAGE)), lambda _: "")
    return agreed(lambda: _open_path(init, path), _sign)


def agreed(make: Callable[[], T], sign: Callable[[T], str]) -> T:
    """Return the result of `make`, if it succeeds on all ranks and `sign` gives equal texts for their results.

    Otherwise RunError is raised on every rank. This is a collective.
    """
    results, wrong, mine = list[T](), "", ""
    try:
        results.append(make())
        mine = sign(results[0])
    except UserError as error:
        wrong = str(error)
    all_wrong, signs = zip(*distributed.gather_objects((wrong, mine)), strict=True)
    if first := next(filter(None, all_wrong), ""):
        raise RunError(first)
    if len(set(signs)) > 1:
        raise RunError("model.init: the ranks do not see the same file; it has to be on storage that all nodes share")
    return results[0]


def _sign(source: Source) -> str:
    sizes = sorted((path.name, path.stat().st_size) for path in source.paths)
    return json.dumps([sizes, sorted((name, [*tensor.shape]) for name, tensor in source.tensors.items())])


def _kind(init: str, name: str) -> tuple[Literal["run", "path"], Path]:
    """Return whether `name` is a run, or a file or folder of weights, and its path."""
    try:
        path = Path(expanded(name))
    except ValueError as error:
        raise RunError(f"model.init={init}: {error}") from error
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
    except (OSError, ValueError):
        is_folder = is_file = False
    if not is_folder and not is_file:
        raise RunError(
            f"model.init={init}: there is no file or folder {path}{_perhaps_timm(name)}; mimae downloads nothing, so "
            "published weights have to be downloaded first"
        )
    if is_folder and ((path / "config.yaml").exists() or (path / ".metadata").exists()):
        return "run", path
    if init.startswith(AVERAGE):
        raise RunError(f"model.init={init}: {path} is not a run of mimae, and only such runs have a moving average")
    return "path", path


def _perhaps_timm(name: str) -> str:
    import timm

    return f"; for the model of timm, write {TIMM}{name}" if timm.is_model(name.partition(".")[0]) else ""


def _open_run(init: str, path: Path, average: bool) -> Source:
    """Open a run (its newest complete checkpoint) or one checkpoint. This is a collective."""
    try:
        run = checkpoint.run_of(path)
        recipe = load_run(run, (), None, RunRecipe)
        found, _ = checkpoint.use_at(path, lambda _: None)
        reader = dcp.Reader(found.path)
        described = reader.described.state_dict_metadata
    except UserError as error:
        raise RunError(f"model.init={init}: {error}") from error
    sections = {"ema.": {}, "model.": {}} if average else {"model.": {}}  # type: dict[str, dict[str, Stored]]
    for prefix, tensors in sections.items():
        tensors |= {
            name.removeprefix(prefix): InCheckpoint(reader, name, of.size)
            for name, of in described.items()
            if name.startswith(prefix) and isinstance(of, dcp.TensorStorageMetadata)
        }
    if average and not sections["ema."]:
        raise RunError(f"model.init={init}: {found.path} has no moving average; the run's ema.decay was null")
    grid = Grid.of(recipe.data.size_hw, recipe.model.patch_size)
    known = Known(
        heads=recipe.model.heads,
        decoder_heads=recipe.decoder.heads if isinstance(recipe, Recipe) else None,
        norm_eps=recipe.model.norm_eps,
        grid=(grid.rows, grid.columns),
        mean=recipe.data.mean,
        std=recipe.data.std,
        normalize_pixels=recipe.objective.normalize_pixels if isinstance(recipe, Recipe) else None,
        licence=_licence_of_run(run),
    )
    step = f"step {found.state.get('step', 0)} of a run"
    # With `average` the parameters are those of the average; buffers have no average and are those of the model.
    tensors = sections["model."] | sections.get("ema.", {})
    kind = f"the moving average at {step}" if average else step
    return Source(init, kind, tensors, known, read_manifest(found.path), (found.path,), is_ours=True)


def _open_path(init: str, path: Path) -> Source:
    """Open a file of weights, a folder of timm or transformers, or a folder with one file of weights."""
    if path.is_file():
        return _source(init, (path,), _json(path.parent / "config.json") if path.name in WEIGHTS else {}, path.parent)
    config, index = _json(path / "config.json"), _json(path / "model.safetensors.index.json")
    shards = index.get("weight_map")
    if isinstance(shards, dict):
        inside = sorted({str(name) for name in shards.values()})
        if wrong := [name for name in inside if not is_inside(name)]:
            raise RunError(f"model.init={init}: its index names {printable(wrong[0])}, which is not inside the folder")
        return _source(init, tuple(path / name for name in inside), config, path)
    found = [path / name for name in WEIGHTS if (path / name).is_file()][:1]
    found = found or [each for each in sorted(path.iterdir()) if each.suffix in (".safetensors", ".pth", ".pt", ".bin")]
    if len(found) != 1:
        what = f"{len(found)} files of weights, so model.init must name one" if found else "no file of weights"
        raise RunError(
            f"model.init={init}: the folder has {what}; legal is a run (with config.yaml), a folder with "
            f"{' or '.join(WEIGHTS)}, or a .safetensors, .pth, .pt or .bin file"
        )
    return _source(init, (found[0],), config, path)


def _open_timm(init: str) -> Source:
    """Open a model of timm from the cache of huggingface_hub or of torch.hub. Nothing is downloaded."""
    import timm
    import torch
    from huggingface_hub import try_to_load_from_cache

    name = init.removeprefix(TIMM)
    config = timm.get_pretrained_cfg(name) if timm.is_model(name.partition(".")[0]) else None
    if config is None or not config.has_weights:
        near = ", ".join(timm.list_pretrained(f"*{name.partition('.')[0]}*")[:5])
        raise RunError(f"model.init={init}: timm has no weights of this name{f'; it has {near}' if near else ''}")
    places = [Path(str(config.file))] if config.file else []
    if config.hf_hub_id:
        cached = [try_to_load_from_cache(config.hf_hub_id, each) for each in WEIGHTS]
        places += [Path(each) for each in cached if isinstance(each, str)]
    if config.url:
        places.append(Path(torch.hub.get_dir(), "checkpoints", str(config.url).rpartition("/")[2]))
    found = next((each for each in places if each.is_file()), None)
    if found is None:
        raise RunError(
            f"model.init={init}: its weights are not in timm's cache, and mimae downloads nothing; on a machine "
            f'with a network run: python -c "import timm; timm.create_model({name!r}, pretrained=True)"'
        )
    return _source(init, (found,), {"pretrained_cfg": config.to_dict()}, found.parent)


def _source(init: str, paths: tuple[Path, ...], config: Mapping[str, Any], folder: Path) -> Source:
    tensors: dict[str, Stored] = {}
    known = Known()
    for path in paths:
        found, known = files.read(path)
        tensors |= found
    known = _of_config(config, _json(folder / "preprocessor_config.json"), known)
    if known.licence is None:
        is_mae = any(mark in part for mark in _OF_MAE for part in (init, *map(str, paths)))
        known = known._replace(licence=_MAE if is_mae else _licence_of_card(folder))
    return Source(init, names.kind(tensors), tensors, known, {}, paths)


def _of_config(config: Mapping[str, Any], processor: Mapping[str, Any], known: Known) -> Known:
    """Return the facts in config.json and preprocessor_config.json of transformers or timm."""
    ours, pretrained = (_mapping(config.get(key)) for key in ("model_args", "pretrained_cfg"))
    is_transformers = "model_type" in config
    size = config.get("image_size") if is_transformers else ours.get("img_size", pretrained.get("input_size"))
    patch = config.get("patch_size") if is_transformers else ours.get("patch_size")
    return known._replace(
        heads=_integer(config.get("num_attention_heads") if is_transformers else ours.get("num_heads")),
        decoder_heads=_integer(config.get("decoder_num_attention_heads")),
        norm_eps=_number(config.get("layer_norm_eps")),
        activation=config["hidden_act"] if isinstance(config.get("hidden_act"), str) else None,
        grid=_grid(size, patch),
        mean=_triple(processor.get("image_mean", pretrained.get("mean"))),
        std=_triple(processor.get("image_std", pretrained.get("std"))),
        normalize_pixels=_boolean(config.get("norm_pix_loss")) if is_transformers else known.normalize_pixels,
        licence=pretrained["license"] if isinstance(pretrained.get("license"), str) else None,
    )


def _json(path: Path) -> Mapping[str, Any]:
    """Return the contents of a JSON file, or an empty mapping if there is none. Raises RunError if it is damaged."""
    try:
        found = json.loads(read_text(path, _JSON_BYTES))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{path} cannot be read: {getattr(error, 'strerror', None) or printable(error)}") from error
    if not isinstance(found, dict):
        raise RunError(f"{path} has no settings: it is not a JSON object")
    return found


def _licence_of_run(run: Path) -> str | None:
    """Return the licence that a run inherited from its start weights, or None."""
    try:
        found = _json(run / INIT).get("licence")
    except RunError:
        return None
    return found if isinstance(found, str) else None


def _licence_of_card(folder: Path) -> str | None:
    """Return the licence in the metadata block of a folder's README.md (a model card of the hub), or None."""
    try:
        lines = read_text(folder / "README.md", _JSON_BYTES).splitlines()
    except OSError:
        return None
    if not lines or lines[0].strip() != "---":
        return None
    head = lines[1 : next((i for i, line in enumerate(lines[1:], 1) if line.strip() == "---"), 1)]
    found = next((line.partition(":")[2].strip() for line in head if line.startswith("license:")), "")
    return printable(found)[:100] or None


def _mapping(found: Any) -> Mapping[str, Any]:
    return found if isinstance(found, dict) else {}


def _integer(found: Any) -> int | None:
    return found if isinstance(found, int) and not isinstance(found, bool) else None


def _number(found: Any) -> float | None:
    return float(found) if isinstance(found, int | float) and not isinstance(found, bool) else None


def _boolean(found: Any) -> bool | None:
    return found if isinstance(found, bool) else None


def _triple(found: Any) -> tuple[float, ...] | None:
    is_triple = isinstance(found, list | tuple) and len(found) == 3 and all(_number(each) is not None for each in found)
    return tuple(map(float, found)) if is_triple else None


def _grid(size: Any, patch: Any) -> tuple[int, int] | None:
    """Return rows and columns of patches for an image `size`: a side, (height, width) or (channels, height, width)."""
    sides = [size, size] if _integer(size) else list(size)[-2:] if isinstance(size, list | tuple) else []
    if len(sides) != 2 or not all(map(_integer, sides)) or not _integer(patch) or patch <= 0:
        return None
    return sides[0] // patch, sides[1] // patch
