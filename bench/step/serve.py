"""The training step of another version of this package, measured in a process of its own (see `version.py`).

This file runs as a script. `mimae` is then the other version, and `meters` the module beside this file. It reads a
request a line, and answers each with a line of JSON.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import meters  # type: ignore[import-not-found]
import torch

try:
    from mimae.bench.step.contenders import Ours, batch_of, with_attention
    from mimae.bench.step.memory import peak_memory
    from mimae.bench.step.operators import time_by_kind
    from mimae.config.load import load_recipe
    from mimae.model.mimae import MIMAE
except ImportError:  # Until November 2026 these were in other files.
    from mimae.bench.step import Ours, batch_of, peak_memory, time_by_kind  # type: ignore
    from mimae.config import load as load_recipe  # type: ignore
    from mimae.model import MIMAE  # type: ignore

    def with_attention(recipe: Any, device: torch.device) -> Any:  # type: ignore
        """Return the recipe as it is: these versions did not choose."""
        return recipe


def contender(recipe: Any, device: torch.device) -> Any:
    """Return this version with new weights, whose values do not matter for a step's time."""
    model = MIMAE(recipe.data, recipe.masking, recipe.model, recipe.decoder, recipe.objective)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return Ours(recipe, model.state_dict(), batch_of(recipe), device)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # Whatever the other version prints goes to stderr.
    given = json.loads(sys.argv[1])
    torch.set_num_threads(given["threads"])
    device = torch.device(given["device"])
    recipe = with_attention(load_recipe(given["recipe"], given["overrides"]).recipe, device)
    ours = None
    for line in sys.stdin:
        request = json.loads(line)
        if request["what"] == "peak":
            answer: Any = peak_memory("mimae", recipe, device)
        elif request["what"] == "allocated":
            answer = meters.allocated(lambda: contender(recipe, torch.device("cpu")))
        else:
            ours = ours or contender(recipe, device)
            if request["what"] == "kinds":
                answer = time_by_kind(ours)
            else:
                if request["what"] == "warm_up":
                    ours.warm_up()
                answer = meters.timed(ours.step, request["steps"])
        print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    main()
