"""Tests that parts which the decoder leaves out, recomputes or compiles change no loss and no gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mimae.config.load import load_recipe
from mimae.engines.compiling import compile_units
from mimae.model import blocks, decoder
from mimae.model.masking import views
from mimae.model.mimae import MIMAE, build
from mimae.model.settings import Checkpointing, ModelSettings
from tests.rounding import DRAWS, excess, nudge

DECODERS = [
    pytest.param({}, id="hidden, self"),
    pytest.param({"predict": "next_view"}, id="next view, self"),
    pytest.param({"attention": "cross"}, id="hidden, cross"),
]


def make(settings: dict[str, Any], **model: Any) -> tuple[MIMAE, tuple[Tensor, Tensor, Tensor]]:
    """Return a small float64 model without initial zeros and ones, and a batch: 3 images, 2 views, 3 x 5 patches."""
    sections = {
        "data": {"image_size": [12, 20]},
        "masking": {"num_masks": 2},
        "model": {"patch_size": 4, "width": 24, "depth": 2, "heads": 3, **model},
        "decoder": {"width": 16, "depth": 3, "heads": 2, **settings},
        "objective": {"posterior_width": 5},
    }
    recipe = load_recipe(sections).recipe
    made = build(recipe).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    images = torch.randint(0, 256, (3, 12, 20, 3), generator=generator, dtype=torch.uint8)
    return made, (images, *views(recipe, 0, 0, torch.arange(3)))


def gradients(model: MIMAE, batch: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    loss = model(*batch).loss
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad.clone() for name, p in model.named_parameters()}


def worst(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """Return the largest relative difference. The bias of keys is left out, because its gradient is only rounding."""
    scale = max(value.norm().item() for value in want.values())
    return max(torch.dist(got[name], want[name]).item() for name in want) / scale


@pytest.mark.parametrize("settings", DECODERS[:2])
def test_the_last_block_answers_for_the_targets_as_if_for_all(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = make(settings)
    sliced = gradients(model, batch)
    seen: list[int] = []

    def whole(layers: nn.ModuleList, tokens: Tensor, encoder: ModelSettings, first: int) -> Tensor:
        seen.append(first)
        return blocks.run_blocks(layers, tokens, encoder)[:, :, first:]

    monkeypatch.setattr(decoder, "run_blocks", whole)
    assert worst(sliced, gradients(model, batch)) < 1e-12
    assert seen == [batch[1].shape[2] + 1], "the decoder did not ask for the targets alone"


@pytest.mark.parametrize("attention", ["sdpa", "plain"])
@pytest.mark.parametrize("checkpointing", ["selective", "full"])
@pytest.mark.parametrize("settings", DECODERS)
def test_recomputed_activations_are_the_same(
    settings: dict[str, Any], checkpointing: Checkpointing, attention: str
) -> None:
    kept, batch = make(settings)
    recomputing, _ = make(settings, checkpointing=checkpointing, attention=attention)
    assert worst(gradients(recomputing, batch), gradients(kept, batch)) < 1e-12


def test_a_target_looks_at_other_targets_with_self_attention_only() -> None:
    for attention, apart in (("cross", True), ("self", False)):
        model, (images, visible, hidden) = make({"attention": attention})
        alone = model.predict(images, visible, hidden[:, :, 2:5])
        among = model.predict(images, visible, hidden)[:, :, 2:5]
        assert (torch.dist(alone, among) < 1e-12 * among.norm()) == apart


@pytest.mark.slow
def test_compiled_blocks_train_the_same() -> None:
    """In fp32 forward and backward agree up to rounding, also in the decoder's last block."""
    eager, batch = make({"depth": 2})
    expected, nudged = gradients(eager.float(), batch), []
    for number in range(DRAWS):
        moved, _ = make({"depth": 2})
        nudge(moved.float().parameters(), number)
        nudged.append(gradients(moved, batch))
    compiled, _ = make({"depth": 2})
    compile_units(compiled.float(), "on", "none", torch.device("cpu"))
    assert excess(gradients(compiled, batch), expected, nudged) < 1
