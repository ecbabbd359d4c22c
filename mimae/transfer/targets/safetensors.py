"""Export of the weights under this project's names, with the sizes in config.json, for code of your own."""

from __future__ import annotations

from pathlib import Path

from mimae.transfer.targets.base import Exported, Options, Target, write_config, write_weights


def _write(exported: Exported, options: Options, folder: Path) -> None:
    write_config(folder, {"mimae": exported.description()})
    write_weights(folder, exported.encoder.state_dict(), options.dtype)


TARGET = Target(
    title="torch and safetensors",
    write=_write,
    check=lambda exported, options: "safetensors",
    loading="""from safetensors.torch import load_file

weights = load_file("DIR/model.safetensors")  # the names of timm's VisionTransformer
# check.py has the whole forward in 30 lines of torch; mimae.load_encoder("DIR") opens the folder too""",
    modules=("safetensors",),
)
