"""Tests that a short training run with the fused ops has the losses of plain PyTorch, step by step."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from mimae import kernels
from mimae.config.load import load_recipe
from mimae.kernels import infonce
from mimae.kernels.runtime import INTERPRETED, Impl, Launch, watching
from mimae.model.masking import views
from mimae.model.mimae import build
from mimae.objective.terms import LOSSES
from tests.rounding import FACTOR, nudge

pytestmark = [
    pytest.mark.skipif(not INTERPRETED, reason="on a GPU other products than the ops' differ too"),
    # Lanes past the edge compute with nothing; their results are not stored.
    pytest.mark.filterwarnings("ignore:(divide by zero|invalid value) encountered:RuntimeWarning"),
]

STEPS = 8
# 6 patches in a grid that is not square, 3 views, and all terms with notable weights.
RECIPE = load_recipe(
    {
        "precision": "fp32",
        "data": {"image_size": [8, 12]},
        "masking": {"num_masks": 3, "ratio": 2 / 3},
        "model": {"patch_size": 4, "width": 8, "depth": 1, "heads": 2},
        "decoder": {"width": 8, "depth": 1, "heads": 2},
        "objective": {"max_mi": 0.5, "min_mi": 0.5, "learn_temperature": True, "posterior_width": 8},
    }
).recipe


def losses(impl: Impl, dtype: torch.dtype, steps: int = STEPS, draw: int | None = None) -> Tensor:
    """Return L, L_rec, L_max, L_min and L_fit (steps, 5) of a run with four images, two per step.

    bf16 uses autocast. `draw` changes the weights in their last bit.
    """
    model = build(RECIPE).to(torch.float64 if dtype == torch.float64 else torch.float32)
    if draw is not None:
        nudge(model.parameters(), draw, dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    images = torch.randint(256, (4, 8, 12, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    rows = []
    with kernels.prefer(impl):
        for step in range(steps):
            ids = torch.arange(2) + step % 2 * 2
            visible, hidden = views(RECIPE, RECIPE.seed, step // 2, ids)
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                found = model(images[ids], visible, hidden)
            found.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            rows.append(torch.stack([found.columns[key] for key in LOSSES]))
    return torch.stack(rows).double()


@pytest.fixture(scope="module")
def exact() -> Tensor:
    return losses("reference", torch.float64)


def allowed(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the allowed distance of a fused run's losses from those in float64, for each loss.

    It is `rounding`'s factor times the largest distance of plain PyTorch's losses, with weights changed in their last
    bit.
    """
    errors = torch.stack([(losses("reference", dtype, draw=draw) - exact).abs().amax(0) for draw in range(3)])
    return FACTOR * (errors.amax(0) + torch.finfo(torch.float32).eps * exact.abs().amax(0))


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(infonce, "_tiles", lambda *_: infonce.Tiles(16, 16, 16, warps=4, stages=2))


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_losses_of_a_fused_run(dtype: torch.dtype, exact: Tensor) -> None:
    most, seen = allowed(exact, dtype), list[Launch]()
    with watching(seen.append):
        fused = losses("triton", dtype)
    assert {launch.kernel.fn.__module__ for launch in seen} >= {f"mimae.kernels.{op}" for op in MUTANTS}
    assert exact[-1, 0] < 0.7 * exact[0, 0], "it learns"
    assert ((fused - exact).abs() <= most).all(), (fused - exact).abs() / most


def without_the_first(result: Any) -> Any:
    """Return a gradient that lacks its first row. AdamW would not react to a gradient that is only scaled."""
    gradient = result if isinstance(result, Tensor) else result[0]
    gradient[0] = 0
    return result


def without_the_first_of_its_gradient(result: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    result[1][0] = 0
    return result


MUTANTS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "orthogonal_masks": ("launch_forward", lambda lists: tuple(each.flip(0) for each in lists)),
    "embed_visible": ("launch_backward", without_the_first),
    "fill_masked": ("launch_backward", without_the_first),
    "pixel_loss": ("launch_forward", without_the_first_of_its_gradient),
    "view_latents": ("launch_backward", without_the_first),
    "infonce": ("launch_backward", without_the_first),
    "club": ("launch_backward", without_the_first),
}


@pytest.mark.slow
@pytest.mark.parametrize("op", MUTANTS)
def test_a_wrong_gradient_shows(op: str, exact: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """The losses of the second step differ by a hundred times the allowed distance."""
    module, (name, change) = import_module(f"mimae.kernels.{op}"), MUTANTS[op]
    original = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *arguments: change(original(*arguments)))
    off = (losses("triton", torch.float32, steps=2) - exact[:2]).abs()
    assert (off > 100 * allowed(exact, torch.float32)).any()
