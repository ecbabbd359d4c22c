"""Compiles every kernel for this machine's GPU, as many at a time as there are cores: `python -m ... FILE`.

Later stages find them in triton's cache. What does not compile is named in the file with its error. The rates of copies
and of matrix products are measured here, once for all stages.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from mimae.bench.ops import kernels, offline
from mimae.bench.ops.cases import chosen
from mimae.bench.step import roof
from mimae.config.load import load_recipe
from mimae.kernels.runtime import Target
from mimae.outside.files import write_atomically


def main(file: Path, device: torch.device) -> None:
    """Compile for the GPU that torch names first, and write the machine code's figures; then measure the rates."""
    gpu = torch.cuda.get_device_properties(0)
    target = Target(10 * gpu.major + gpu.minor, gpu.multi_processor_count)
    result: dict[str, Any] = {}
    began = time.monotonic()

    def write(**found: Any) -> None:
        result.update(found)
        write_atomically(file, json.dumps(result, indent=2) + "\n")

    def keep(found: list[dict[str, Any]]) -> None:
        write(seconds=time.monotonic() - began, machine_code=found)

    offline.machine_code(chosen([]), len(os.sched_getaffinity(0)), [target], keep)
    write(roof=kernels.roof(device))
    write(roof_of_step=roof.roof(load_recipe("vit_base_400ep", ["schedule.batch_size=256"]).recipe, device))


if __name__ == "__main__":
    main(Path(sys.argv[1]), torch.device("cuda"))
