"""Compiles every kernel for this machine's GPU, as many at a time as there are cores: `python -m ... FILE`.

Later stages find them in triton's cache. What does not compile is named in the file with its error.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import torch

from mimae.bench.ops import offline
from mimae.bench.ops.cases import chosen
from mimae.kernels.runtime import Target
from mimae.outside.files import write_atomically


def main(file: Path) -> None:
    """Compile for the GPU that torch names first, and write the machine code's figures."""
    gpu = torch.cuda.get_device_properties(0)
    target = Target(10 * gpu.major + gpu.minor, gpu.multi_processor_count)
    began = time.monotonic()
    found = offline.machine_code(chosen([]), len(os.sched_getaffinity(0)), [target])
    result = {"seconds": time.monotonic() - began, "machine_code": found}
    write_atomically(file, json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
