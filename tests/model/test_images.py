"""Tests of an encoder with images in every supported form, and of other sizes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import nn

from mimae.model.encoder import Encoder
from mimae.model.geometry import Grid
from mimae.model.images import batch_of
from mimae.model.positions import resampled
from mimae.model.settings import ModelSettings
from mimae.randomness import initialise

CPU = torch.device("cpu")
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    """Build an encoder for images that are not square, so that an exchange of rows and columns is detected."""
    made = Encoder(ModelSettings(size="tiny", patch_size=4, width=12, depth=3, heads=2), (8, 12), *IMAGENET)
    initialise(made, 0)
    return made.eval()


@pytest.fixture(scope="module")
def vit(encoder: Encoder) -> nn.Module:
    options: dict[str, Any] = {"img_size": (8, 12), "patch_size": 4, "embed_dim": 12, "depth": 3, "num_heads": 2}
    made = timm.create_model("vit_tiny_patch16_224", num_classes=0, **options)
    assert isinstance(made, nn.Module)
    made.load_state_dict(encoder.state_dict())
    return made.eval()


def pixels(height: int, width: int, count: int = 2) -> torch.Tensor:
    return torch.randint(0, 256, (count, height, width, 3), generator=torch.Generator().manual_seed(1)).byte()


def normalised(images: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(each)[:, None, None] for each in IMAGENET)
    return (images.permute(0, 3, 1, 2) / 255 - mean) / std


def test_every_form_of_the_same_images_is_the_same_batch() -> None:
    images = pixels(8, 12)
    arrays = images.numpy()
    forms: list[Any] = [
        images,
        arrays,
        list(images),
        tuple(arrays),
        [Image.fromarray(each) for each in arrays],
    ]
    for form in forms:
        assert torch.equal(batch_of(form, CPU), images)
    grey = Image.fromarray(arrays[0, ..., 0])
    for one in (grey, np.asarray(grey.convert("RGB"))):
        assert torch.equal(batch_of(one, CPU), images[:1, ..., :1].expand(-1, -1, -1, 3))


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (torch.zeros(2, 8, 12, 3), "not torch.float32"),
        (torch.zeros(2, 3, 8, 12, dtype=torch.uint8), r"not torch.uint8 \(2, 3, 8, 12\)"),
        ([pixels(8, 12)[0], pixels(8, 8)[0]], "one size; found"),
        ([], "no image"),
        ([pixels(8, 12)], "one size; found"),
    ],
    ids=["floats", "channels first", "two sizes", "none", "a list of batches"],
)
def test_other_images_are_refused_in_words(images: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        batch_of(images, CPU)


def test_tokens_and_features_are_those_of_timm(encoder: Encoder, vit: Any) -> None:
    images = pixels(8, 12)
    with torch.no_grad():
        theirs = vit.forward_features(normalised(images))
        assert (encoder.tokens(images) - theirs).abs().max() < 1e-5
        assert (
            encoder.features([Image.fromarray(each.numpy()) for each in images]) - theirs[:, 1:].mean(1)
        ).abs().max() < 1e-5


def test_maps_are_those_of_timm_before_the_norm(encoder: Encoder, vit: Any) -> None:
    images = pixels(8, 12)
    with torch.no_grad():
        theirs = vit.forward_intermediates(normalised(images), indices=[0, 2], norm=False, intermediates_only=True)
        ours = encoder.maps(images, [-1, 0, 2])
    assert [each.shape for each in ours] == [(2, 12, 2, 3)] * 3
    for found, expected in zip(ours, (theirs[1], theirs[0], theirs[1]), strict=True):
        assert (found - expected).abs().max() < 1e-5
    with pytest.raises(ValueError, match="block 3 of 3: legal is 0 to 2"):
        encoder.maps(images, [3])


@pytest.mark.parametrize("size", [(16, 8), (4, 24)], ids=["larger and turned", "smaller in one side alone"])
def test_another_size_has_interpolated_positions(encoder: Encoder, vit: Any, size: tuple[int, int]) -> None:
    """They equal timm's without antialiasing, as in MAE's code; timm's default uses antialiasing."""
    grid, other = Grid(2, 3, 4), Grid.of(size, 4)
    expected = resample_abs_pos_embed(
        vit.pos_embed, [other.rows, other.columns], [grid.rows, grid.columns], antialias=False
    )
    assert torch.equal(resampled(encoder.pos_embed, grid, other), expected)
    images = pixels(*size)
    with torch.no_grad():
        tokens = torch.cat([vit.cls_token.expand(2, -1, -1), vit.patch_embed.proj(normalised(images)).flatten(2).mT], 1)
        theirs = vit.norm(vit.blocks(tokens + expected))
        assert (encoder.tokens(images) - theirs).abs().max() < 1e-5


def test_the_own_grid_keeps_its_positions(encoder: Encoder) -> None:
    assert resampled(encoder.pos_embed, encoder.grid, encoder.grid) is encoder.pos_embed
