"""The README.md of an export: what the model is, how it was made, how it is opened, whose it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mimae import __version__
from mimae.checkpoints.checkpoint import Checkpoint
from mimae.outside.reading import read_text
from mimae.outside.text import printable
from mimae.transfer.targets.base import Exported, Options, Target

_BYTES = 1 << 24


def licence_of(run: Path) -> str | None:
    """Return the licence that a run inherited from the weights that it started from; None where it started from none,
    or from weights that name none."""
    found = _json(run / "init.json").get("licence")
    return printable(found)[:100] if isinstance(found, str) else None


def card(
    run: Path, found: Checkpoint, exported: Exported, target: Target, options: Options, average: bool, name: str
) -> str:
    """Return the text of the card, with the licence at its head as model hubs read it."""
    recipe, grid = exported.recipe, exported.grid
    model, masking = recipe.model, recipe.masking
    height, width = grid.size_hw
    licence = licence_of(run)
    head = ["---", *([f"license: {licence}"] if licence else []), "tags:", "- mimae", "- masked-autoencoder"]
    head += ["- image-feature-extraction", "---"]
    weights = "the moving average of the weights" if average else "the weights"
    rows = {
        "encoder": f"ViT, patches of {grid.patch_size} px, {model.depth} blocks of width {model.width}, "
        f"{model.heads} heads",
        "holds": "encoder and decoder" if options.decoder else "the encoder",
        "images": f"{height} x {width} px (height x width)",
        "normalisation": f"of pixels in [0, 1]: mean {_list(recipe.data.mean)}, deviation {_list(recipe.data.std)}",
        "resizing": "bicubic with antialiasing, of the largest central window with the images' aspect ratio",
        "features": "the mean of the patch tokens after the final norm, without the class token",
        "pretraining": _objective(exported),
        "views": f"{masking.num_masks} of an image, {masking.ratio:.0%} of the patches hidden ({masking.kind})",
        "data": printable(recipe.data.path),
        "length": f"step {found.state['step']:,}, {found.state.get('samples', 0):,} images seen; {weights} of it",
        "stored as": str(options.dtype).removeprefix("torch."),
        **_measures(run, found),
    }
    if target.is_graph:
        rows["input"] = (
            "uint8 (B, H, W, 3), 0 to 255" if options.given == "uint8" else "float32 (B, 3, H, W), 0 to 1"
        ) + "; the batch is dynamic; normalisation is inside"
        rows["size"] = (
            "any multiple of the patch size; some runtimes (TensorRT) refuse its bicubic interpolation of positions"
            if options.dynamic_size
            else "fixed"
        )
        rows["outputs"] = ", ".join(["tokens (class token first)", "features", *map("block_{}".format, options.blocks)])
    if options.decoder:
        kind = "normalised by each patch's mean and variance" if recipe.objective.normalize_pixels else "raw"
        rows["pixels that the decoder predicts"] = kind
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    rights = (
        f"{licence}, inherited from the weights that its pretraining started from."
        if licence
        else "None was chosen: whoever publishes this folder names one, as `license:` at the head of this file."
    )
    alone = "torch" if target.title.startswith("the code") else target.title
    return f"""{chr(10).join(head)}

# {printable(name)}

An image encoder, pretrained by MI-MAE (masked image modelling and mutual information, arXiv 2502.19718) and exported by
mimae {__version__} for {target.title}.

```python
{target.loading.replace("DIR", name)}
```

`python check.py` opens the folder with {alone} alone, and compares what the model gives for the images in check.npz
with what the encoder gave when it was exported.

| | |
| --- | --- |
{table}

## Licence

{rights}
"""


def _objective(exported: Exported) -> str:
    objective = exported.recipe.objective
    terms = ["reconstruction"]
    terms += [f"InfoNCE x {objective.max_mi:g}"] if objective.max_mi else []
    terms += [f"CLUB x {objective.min_mi:g}"] if objective.min_mi else []
    return " + ".join(terms)


def _measures(run: Path, found: Checkpoint) -> dict[str, str]:
    """Return what the run knows of its features: the measures of the checkpoint, and `mimae probe`'s."""
    told = {}
    measures = found.state.get("measures") or {}
    if values := [f"{key} {value:.3f}" for key, value in measures.items() if isinstance(value, float)]:
        told["measured while training"] = ", ".join(values)
    probed: Any = _json(run / "probe.json").get("features", {})
    if isinstance(probed, dict) and isinstance(row := probed.get("this run"), dict):
        values = [f"{key} {row[key]:.3f}" for key in ("linear", "few_labels", "knn") if isinstance(row.get(key), float)]
        told["mimae probe"] = ", ".join(values)
    return told


def _json(path: Path) -> dict[str, Any]:
    """Return a JSON file of a run; nothing where there is none, or it is broken."""
    try:
        found = json.loads(read_text(path, _BYTES))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _list(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:g}" for value in values)
