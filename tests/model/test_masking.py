"""Tests of masks: they are disjoint, of exact size, uniform, and functions of the sample only."""

from __future__ import annotations

from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from mimae.config.load import load_recipe
from mimae.kernels import orthogonal_masks, philox_words
from mimae.model.geometry import Grid, geometry
from mimae.model.masking import DRAWS, draw, targets, views
from mimae.model.settings import MASK_KINDS, MaskingSettings

# L with N and K such that N K <= L. Grids need not be square, so every L is legal.
SHAPES = st.integers(2, 60).flatmap(
    lambda L: st.integers(1, L - 1).flatmap(
        lambda K: st.tuples(st.just(L), st.integers(1, L // K), st.just(K)),
    )
)


@given(SHAPES, st.integers(0, 2**32 - 1), st.integers(0, 1000))
def test_views_are_disjoint_complete_and_ascending(shape: tuple[int, int, int], seed: int, epoch: int) -> None:
    L, N, K = shape
    visible, hidden = orthogonal_masks(seed, epoch, torch.tensor([0, 3, 2**40]), L, N, K)
    assert visible.dtype == hidden.dtype == torch.int32
    assert visible.shape == (3, N, K) and hidden.shape == (3, N, L - K)
    for shown, hid in zip(visible, hidden, strict=True):
        assert shown.unique().numel() == N * K, "a patch is in two views"
        for view in range(N):
            assert sorted([*shown[view].tolist(), *hid[view].tolist()]) == list(range(L))
            assert shown[view].tolist() == sorted(shown[view].tolist())
            assert hid[view].tolist() == sorted(hid[view].tolist())


@given(SHAPES, st.permutations(range(6)))
def test_a_mask_is_its_samples_own(shape: tuple[int, int, int], order: list[int]) -> None:
    """The mask does not depend on the batch and on the order of its samples."""
    ids = torch.arange(100, 106)
    whole, _ = orthogonal_masks(1, 2, ids, *shape)
    shuffled, _ = orthogonal_masks(1, 2, ids[order], *shape)
    alone, _ = orthogonal_masks(1, 2, ids[3:4], *shape)
    assert torch.equal(shuffled, whole[order])
    assert torch.equal(alone, whole[3:4])


def test_views_take_their_ranks_by_definition() -> None:
    """The ranks are those of sorting (word l, l) in plain Python, for a prime L that N K does not fill."""
    words = philox_words(9, 1, 4, torch.tensor([77]), 13)[0].tolist()
    ranked = [patch for _, patch in sorted((word, patch) for patch, word in enumerate(words))]
    visible, _ = orthogonal_masks(9, 4, torch.tensor([77]), 13, 3, 4)
    assert visible[0].tolist() == [sorted(ranked[4 * view : 4 * view + 4]) for view in range(3)]


@pytest.mark.parametrize("kind", ["orthogonal", "independent"])
def test_marginals_and_pairs_are_uniform(kind: str) -> None:
    """Marginal and joint probabilities are those of uniform masks.

    In every view each patch is shown with probability K/L and each pair with K(K-1)/L(L-1). A pair with one patch in
    each of two views has probability K^2/L(L-1) if the views are disjoint, else (K/L)^2.
    """
    L, K, images = 8, 2, 40_000
    masking = MaskingSettings(kind=kind, num_masks=4, ratio=0.75)
    visible, _ = draw(masking, 5, 0, torch.arange(images), Grid(1, L, 4))
    shown = torch.zeros(images, 4, L).scatter_(2, visible.long(), 1.0)
    together = torch.einsum("bnl,bnm->nlm", shown, shown) / images
    across = torch.einsum("bl,bm->lm", shown[:, 0], shown[:, 1]) / images
    same = torch.eye(L, dtype=torch.bool)
    five_sigma = 5 * (0.25 * 0.75 / images) ** 0.5
    assert (together[:, same] - K / L).abs().max() < five_sigma
    assert (together[:, ~same] - K * (K - 1) / (L * (L - 1))).abs().max() < five_sigma
    if kind == "orthogonal":
        assert across[same].max() == 0
        assert (across[~same] - K * K / (L * (L - 1))).abs().max() < five_sigma
    else:
        assert (across - (K / L) ** 2).abs().max() < five_sigma


def test_every_kind_of_the_settings_is_listed() -> None:
    legal = set(get_args(MaskingSettings.model_fields["kind"].annotation))
    assert MASK_KINDS.keys() == DRAWS.keys() == legal


@pytest.mark.parametrize("kind", MASK_KINDS)
@pytest.mark.parametrize("predict", ["hidden", "next_view"])
def test_a_kind_draws_what_the_geometry_says(kind: str, predict: str) -> None:
    """The planner and the checks of settings depend on the geometry of a kind and on whether its views are disjoint."""
    sections = {
        "data": {"image_size": [12, 20]},
        "masking": {"kind": kind, "num_masks": 3, "ratio": 0.72},
        "model": {"patch_size": 4, "width": 16, "heads": 2},
        "decoder": {"predict": predict if MASK_KINDS[kind].is_disjoint else "hidden"},
    }
    recipe = load_recipe(sections).recipe
    sizes, ids = geometry(recipe), torch.tensor([7, 2**40, 0, 3])
    assert (sizes.grid, sizes.visible) == (Grid(3, 5, 4), 4)
    visible, targets = views(recipe, 5, 2, ids)
    hidden = draw(recipe.masking, 5, 2, ids, sizes.grid)[1]
    assert visible.dtype == targets.dtype == torch.int32
    assert visible.shape == (4, 3, sizes.visible) and targets.shape == (4, 3, sizes.targets)
    both = torch.cat([visible, hidden], 2)
    assert torch.equal(both.sort(2).values, torch.arange(15, dtype=torch.int32).expand(4, 3, 15))
    assert torch.equal(visible, visible.sort(2).values) and torch.equal(hidden, hidden.sort(2).values)
    assert torch.equal(views(recipe, 5, 2, ids.flip(0))[0], visible.flip(0)), "a mask is its sample's own"
    assert not torch.equal(views(recipe, 6, 2, ids)[0], visible) and not torch.equal(
        views(recipe, 5, 3, ids)[0], visible
    )
    many = views(recipe, 5, 2, torch.arange(200))[0].flatten(1)
    most = max(image.unique(return_counts=True)[1].max().item() for image in many)
    assert (most == 1) == MASK_KINDS[kind].is_disjoint


def test_a_grid_leaves_out_what_fills_no_patch() -> None:
    grid = Grid.of((33, 20), 8)
    assert (grid.rows, grid.columns, grid.patches, grid.values, grid.size_hw) == (4, 2, 8, 192, (32, 16))


def test_kinds_agree_for_one_view_and_epochs_differ() -> None:
    ids, grid = torch.arange(8), Grid(4, 4, 2)
    kinds = ("orthogonal", "independent")
    single = [draw(MaskingSettings(kind=kind, num_masks=1), 3, 1, ids, grid)[0] for kind in kinds]
    assert torch.equal(single[0], single[1])
    assert not torch.equal(single[0], draw(MaskingSettings(num_masks=1), 3, 2, ids, grid)[0])
    assert not torch.equal(single[0], draw(MaskingSettings(num_masks=1), 4, 1, ids, grid)[0])


def test_each_view_predicts_what_it_hides_or_what_the_next_one_shows() -> None:
    """There are three views of 13 patches with 4 visible each, so one patch is in no view and not predicted by
    next_view.
    """
    visible, hidden = orthogonal_masks(2, 0, torch.arange(5), 13, 3, 4)
    assert targets("hidden", visible, hidden) is hidden
    predicted = targets("next_view", visible, hidden)
    for image in range(5):
        shown = visible[image].tolist()
        assert predicted[image].tolist() == [shown[1], shown[2], shown[0]]
        assert sorted(predicted[image].flatten().tolist()) == sorted(visible[image].flatten().tolist())
        assert all(set(predicted[image, view].tolist()) <= set(hidden[image, view].tolist()) for view in range(3))


def test_too_many_views_are_refused() -> None:
    with pytest.raises(ValueError, match="5 disjoint views of 4 patches need 20 patches, the image has 16"):
        orthogonal_masks(0, 0, torch.arange(2), 16, 5, 4)
    with pytest.raises(ValidationError):
        MaskingSettings(ratio=1.0)


@pytest.mark.parametrize("ratio", [0.6, 0.75, 0.8, 0.9])
def test_rounding_down_shows_as_many_patches_as_mae(ratio: float) -> None:
    """MAE's code keeps int(L (1 - ratio)) patches, which transformers' port of it confirms.

    Of 25 patches with ratio 0.8 both keep 4, because 1 - 0.8 is slightly below 0.2. For an image of 2 patches MAE keeps
    none; here at least 1 is shown.
    """
    modeling = pytest.importorskip("transformers.models.vit_mae.modeling_vit_mae")
    port = SimpleNamespace(config=SimpleNamespace(mask_ratio=ratio), random_masking=None)
    masking, differ = MaskingSettings(num_masks=1, ratio=ratio, rounding="down"), 0
    for patches in range(2, 200):
        kept, _, _ = modeling.ViTMAEEmbeddings.random_masking(port, torch.zeros(1, patches, 1))
        assert masking.num_visible(patches) == max(kept.shape[1], 1)
        nearest = MaskingSettings(num_masks=1, ratio=ratio).num_visible(patches)
        assert nearest == min(max(round(patches * (1 - ratio)), 1), patches - 1)
        differ += nearest != masking.num_visible(patches)
    assert differ > 50
    visible, hidden = draw(masking, 0, 0, torch.arange(3), Grid(1, 199, 4))
    assert (visible.shape[2], hidden.shape[2]) == (masking.num_visible(199), 199 - masking.num_visible(199))
