"""Export as an ONNX graph, which normalises pixels and returns tokens and features."""

from __future__ import annotations

import contextlib
import io
import warnings
from pathlib import Path

import torch

from mimae.errors import UserError
from mimae.model.units import Model
from mimae.transfer.targets.base import Exported, Options, Target, write_config
from mimae.transfer.targets.torch import example, graph_config

OPSET = 20


def _write(exported: Exported, options: Options, folder: Path) -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"an ONNX export needs {error.name}: pip install 'mimae[onnx]'") from error
    module, outputs, _ = exported.graph(options)
    images, dynamic = example(exported, options)
    config = graph_config(exported, options, outputs)
    # An ONNX file cannot exceed 2 GB, so large weights are stored in a separate file.
    large = sum(parameter.numel() * 4 for parameter in module.parameters()) > 1_900_000_000
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            (images,),
            folder / "model.onnx",
            dynamo=True,
            dynamic_shapes=dynamic,
            input_names=["images"],
            output_names=config["outputs"],
            opset_version=OPSET,
            external_data=large,
            optimize=False,  # Runtimes optimise anyway; without it the weights keep their names.
            verbose=False,
        )
    write_config(folder, config)


TARGET = Target(
    title="onnxruntime",
    write=_write,
    check=lambda exported, options: "onnx",
    loading="""import onnxruntime

session = onnxruntime.InferenceSession("DIR/model.onnx")
found = session.run(None, {"images": images})  # a list of the outputs; the graph normalises the pixels""",
    models=(Model,),
    is_graph=True,
    modules=("onnxruntime",),
)
