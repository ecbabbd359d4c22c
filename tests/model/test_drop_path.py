"""Tests of drop path: the rates, the draws, and timm's gradients with the same masks."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from mimae.model.drop_path import keep_paths
from mimae.model.encoder import Encoder
from mimae.model.settings import ModelSettings
from mimae.randomness import initialise, materialise

DEPTH = 12


def test_the_rate_rises_linearly_from_zero() -> None:
    """A share of 20,000 images has a deviation of at most 0.0021, so 0.01 is more than four deviations."""
    kept = keep_paths(7, 3, torch.arange(20_000), 0.1, DEPTH)
    assert kept is not None and kept.shape == (20_000, DEPTH, 2)
    rates = torch.linspace(0, 0.1, DEPTH)
    dropped = (kept == 0).float()
    torch.testing.assert_close(dropped.mean(0), rates[:, None].expand(-1, 2), atol=0.01, rtol=0)
    assert (kept[:, 0] == 1).all(), "the first block is never skipped"
    expected = (1 / (1 - rates))[None, :, None].expand_as(kept)
    torch.testing.assert_close(kept[kept > 0], expected[kept > 0])
    pairs = torch.corrcoef(dropped.flatten(1)[:, 2:].T)
    assert (pairs - torch.eye(len(pairs))).abs().max() < 0.04


def test_a_draw_is_the_samples_own() -> None:
    """The draw does not depend on the batch, so ranks do not matter. It differs between epochs."""
    ids = torch.tensor([5, 1 << 40, 17])
    whole = keep_paths(0, 1, ids, 0.5, 4)
    assert whole is not None
    for i in range(3):
        assert torch.equal(keep_paths(0, 1, ids[i : i + 1], 0.5, 4), whole[i : i + 1])  # type: ignore[arg-type]
    assert not torch.equal(keep_paths(0, 2, ids, 0.5, 4), whole)  # type: ignore[arg-type]
    assert keep_paths(0, 1, ids, 0.0, 4) is None


class _Masked(nn.Module):
    """A replacement of timm's DropPath that multiplies by given numbers."""

    def __init__(self, keep: Tensor) -> None:
        super().__init__()
        self.keep = keep

    def forward(self, x: Tensor) -> Tensor:
        return x * self.keep[:, None, None]


@pytest.mark.parametrize("as_float", [False, True], ids=["uint8", "normalised"])
def test_outputs_and_gradients_are_timms_under_the_same_masks(as_float: bool) -> None:
    """Positions are learned, so that their gradients are compared too."""
    size = ModelSettings(size="tiny", patch_size=4, width=32, depth=3, heads=2)
    with torch.device("meta"):
        encoder = Encoder(size, (8, 12), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), learned_positions=True)
    materialise(encoder, "cpu")
    initialise(encoder, 0)
    encoder.double()
    with torch.no_grad():
        for p in encoder.parameters():
            p.add_(torch.linspace(-0.05, 0.05, p.numel(), dtype=torch.float64).view_as(p))
    other: Any = timm.create_model(
        "vit_tiny_patch16_224", patch_size=4, embed_dim=32, depth=3, num_heads=2, img_size=(8, 12), num_classes=0
    ).double()
    other.load_state_dict(encoder.state_dict())
    images = torch.randint(0, 256, (5, 8, 12, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    normalised = (images.double() / 255 - encoder.mean.double()) / encoder.std.double()
    keep = keep_paths(0, 0, torch.arange(5), 0.6, 3)
    assert keep is not None and (keep == 0).any() and (keep[:, 2] > 0).any()
    for i, block in enumerate(other.blocks):
        block.drop_path1, block.drop_path2 = (_Masked(keep[:, i, path].double()) for path in (0, 1))
    weights = torch.linspace(-1, 1, 32, dtype=torch.float64)
    ours = encoder(normalised if as_float else images, keep=keep)[:, 0]
    theirs = other.forward_features(normalised.permute(0, 3, 1, 2))
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    (ours * weights).sum().backward()
    (theirs * weights).sum().backward()
    gradients = dict(other.named_parameters())
    for name, parameter in encoder.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name].grad, atol=1e-5, rtol=1e-5, msg=name)
