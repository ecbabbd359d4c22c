"""Export as a program of `torch.export`, which normalises pixels and returns tokens and features."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim

from mimae.model.units import Model
from mimae.transfer.targets.base import Exported, Options, Target, write_config


def example(exported: Exported, options: Options) -> tuple[Tensor, dict[str, dict[int, Any]]]:
    """Return images for tracing a graph, and their dynamic dimensions."""
    rows, columns, patch = exported.grid
    if options.form.dynamic_size:  # The sides differ from the run's, so that a size traced as a constant is detected.
        height, width = (rows + 1) * patch, (columns + 2) * patch
    else:
        height, width = exported.grid.size_hw
    dynamic: dict[int, Any] = {0: Dim("batch", min=1)}
    if options.form.given == "uint8":
        images, sides = torch.zeros(2, height, width, 3, dtype=torch.uint8), (1, 2)
    else:
        images, sides = torch.zeros(2, 3, height, width), (2, 3)
    if options.form.dynamic_size:
        dynamic = dict.fromkeys((0, *sides), Dim.AUTO)
    return images, {"images": dynamic}


def graph_config(exported: Exported, options: Options, outputs: Sequence[str]) -> dict[str, Any]:
    """Return config.json of a graph."""
    return {
        "input": options.form.given,
        "layout": "NHWC, 0 to 255" if options.form.given == "uint8" else "NCHW, 0 to 1",
        "size": "any multiple of the patch size" if options.form.dynamic_size else list(exported.grid.size_hw),
        "outputs": list(outputs),
        "mimae": exported.description(),
    }


def _write(exported: Exported, options: Options, folder: Path) -> None:
    graph = exported.graph(options)
    images, dynamic = example(exported, options)
    with torch.no_grad():
        program = torch.export.export(graph.module, (images,), dynamic_shapes=dynamic)
    torch.export.save(program, folder / "model.pt2")
    write_config(folder, graph_config(exported, options, graph.outputs))


TARGET = Target(
    title="torch",
    write=_write,
    check=lambda exported, options: "torch",
    loading="""import torch

model = torch.export.load("DIR/model.pt2").module()
found = model(images)  # a dict of the outputs below; the model normalises the pixels""",
    models=(Model,),
    is_graph=True,
)
