"""The README.md of an export: the model, its pretraining, the code that opens it, and its licence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from mimae import __version__
from mimae.checkpoints.checkpoint import Checkpoint
from mimae.model.classifier import Classifier
from mimae.model.mimae import MIMAE
from mimae.outside.reading import read_text
from mimae.outside.text import printable
from mimae.transfer.targets.base import Exported, Options, Target

_BYTES = 1 << 24
_NAMED = 20
"""Classes that a card names."""


def licence_of(run: Path) -> str | None:
    """Return the licence that a run inherited from its start weights, or None if there is none."""
    found = _json(run / "init.json").get("licence")
    return printable(found)[:100] if isinstance(found, str) else None


def card(
    run: Path, found: Checkpoint, exported: Exported, target: Target, options: Options, average: bool, name: str
) -> str:
    """Return the text of the card. It begins with the metadata, such as the licence, that model hubs read."""
    recipe, grid = exported.recipe, exported.grid
    model = recipe.model
    height, width = grid.size_hw
    licence = licence_of(run)
    about = _pretrained(exported) if isinstance(exported.model, MIMAE) else _fine_tuned(exported)
    head = ["---", *([f"license: {licence}"] if licence else []), "tags:", "- mimae", "- masked-autoencoder"]
    head += [f"- {about.tag}", "---"]
    weights = "the moving average of the weights" if average else "the weights"
    rows = {
        "encoder": f"ViT, patches of {grid.patch_size} px, {model.depth} blocks of width {model.width}, "
        f"{model.heads} heads",
        "contents": "encoder and decoder" if options.decoder else about.holds,
        "images": f"{height} x {width} px (height x width)",
        "normalisation": f"of pixels in [0, 1]: mean {_list(recipe.data.mean)}, deviation {_list(recipe.data.std)}",
        **about.rows,
        "data": printable(recipe.data.path),
        "length": f"step {found.state['step']:,}, {found.state.get('samples', 0):,} images seen; {weights}",
        "stored as": str(options.dtype).removeprefix("torch."),
        **_measures(run, found),
    }
    if target.is_graph:
        rows["input"] = (
            "uint8 (B, H, W, 3), 0 to 255" if options.form.given == "uint8" else "float32 (B, 3, H, W), 0 to 1"
        ) + "; any batch size; the graph normalises the pixels"
        rows["size"] = (
            "any multiple of the patch size; some runtimes (TensorRT) refuse its bicubic interpolation of positions"
            if options.form.dynamic_size
            else "fixed"
        )
        rows["outputs"] = ", ".join(exported.graph(options).outputs).replace("tokens", "tokens (class token first)")
    if options.decoder:
        kind = "normalised by each patch's mean and variance" if recipe.objective.normalize_pixels else "raw"
        rows["pixels that the decoder predicts"] = kind
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    rights = (
        f"{licence}, inherited from the weights from which its pretraining started."
        if licence
        else "No licence was chosen. To publish this folder, add one as `license:` at the head of this file."
    )
    alone = "torch" if target.title.startswith("the code") else target.title
    return f"""{chr(10).join(head)}

# {printable(name)}

{about.what}, exported by mimae {__version__} for {target.title}.

```python
{target.loading.replace("DIR", name)}
```

`python check.py` opens the folder with {alone}, without mimae. It compares the model's outputs for the images in
check.npz with the outputs that it had when it was exported.

| | |
| --- | --- |
{table}

## Licence

{rights}
"""


class _About(NamedTuple):
    """Texts of a card that depend on the kind of model."""

    what: str
    tag: str
    """Task name on model hubs."""
    holds: str
    rows: dict[str, str]


def _pretrained(exported: Exported) -> _About:
    masking = exported.recipe.masking
    return _About(
        "An image encoder, pretrained by MI-MAE (masked image modelling and mutual information, arXiv 2502.19718)",
        "image-feature-extraction",
        "the encoder",
        {
            "resizing": "bicubic with antialiasing, of the largest central window with the images' aspect ratio",
            "features": "the mean of the patch tokens after the final norm, without the class token",
            "pretraining": _objective(exported),
            "views": f"{masking.num_masks} of an image, {masking.ratio:.0%} of the patches hidden ({masking.kind})",
        },
    )


def _fine_tuned(exported: Exported) -> _About:
    """Return what is said of a model that tells classes apart: of images, or of their pixels."""
    named = exported.classes[:_NAMED]
    more = f", ... ({len(exported.classes)} in all)" * (len(exported.classes) > _NAMED)
    rows = {"classes": printable(", ".join(named)) + more}
    if isinstance(exported.model, Classifier):
        share = exported.recipe.evaluation.crop
        rows["resizing"] = f"bicubic with antialiasing, of the central window with {share:g} of the largest one's sides"
        rows["pooling"] = {"mean": "mean of the patch tokens", "class_token": "class token"}[exported.model.pooling]
        what, tag = f"A classifier of images in {len(exported.classes)} classes", "image-classification"
    else:
        rows["resizing"] = "bilinear with antialiasing, to the smallest size that covers the window"
        what, tag = f"A model that tells apart {len(exported.classes)} classes of pixels", "image-segmentation"
    return _About(f"{what}, fine-tuned on a ViT", tag, "encoder and head", rows)


def _objective(exported: Exported) -> str:
    objective = exported.recipe.objective
    terms = ["reconstruction"]
    terms += [f"InfoNCE x {objective.max_mi:g}"] if objective.max_mi else []
    terms += [f"CLUB x {objective.min_mi:g}"] if objective.min_mi else []
    return " + ".join(terms)


def _measures(run: Path, found: Checkpoint) -> dict[str, str]:
    """Return the measures of the features: those of the checkpoint, and those of `mimae probe`."""
    told = {}
    measures = found.state.get("measures") or {}
    if values := [f"{key} {value:.3f}" for key, value in measures.items() if isinstance(value, float)]:
        told["measured while training"] = ", ".join(values)
    name = found.name
    files = (_json(run / file) for file in (f"probe-{name}.json", "probe.json"))
    # Older files do not name their checkpoint.
    probed: Any = next(
        (file.get("features", {}) for file in files if file and file.get("checkpoint", name) == name), {}
    )
    if isinstance(probed, dict) and isinstance(row := probed.get("this run"), dict):
        values = [f"{key} {row[key]:.3f}" for key in ("linear", "few_labels", "knn") if isinstance(row.get(key), float)]
        told["mimae probe"] = ", ".join(values)
    return told


def _json(path: Path) -> dict[str, Any]:
    """Return the contents of a JSON file of a run, or an empty mapping if it is missing or damaged."""
    try:
        found = json.loads(read_text(path, _BYTES))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _list(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:g}" for value in values)
