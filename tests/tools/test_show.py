"""Tests of `mimae data show`: the picture shows the samples and masks of training."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mimae import cli
from mimae.config.load import load_recipe
from mimae.data.loading.loader import make_loader
from mimae.data.sources.open import open_source
from mimae.model.masking import views
from mimae.telemetry.pictures import HIDDEN
from mimae.tools.show import masked, show
from tests.data.conftest import write_images


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_images(tmp_path / "images", [f"{i}.png" for i in range(5)], 48, 48)
    (tmp_path / "images" / "2.png").write_bytes(b"no image")
    return tmp_path / "images"


SETTINGS = ["data.image_size=128", "model.patch_size=32", "seed=4"]
"""Settings with panels of 128 pixels, which the picture shows unscaled."""


def test_the_batch_is_the_first_of_training(folder: Path) -> None:
    recipe = load_recipe({}, SETTINGS, {"data": {"path": str(folder)}}).recipe
    picture, batch = show(recipe, images=3, epoch=2)
    data = recipe.data.model_copy(update={"workers": 0})
    expected = next(make_loader(data, open_source(str(folder)), seed=4, batch_size=3).epoch(2))
    assert torch.equal(batch.images, expected.images)
    sheet = np.asarray(Image.open(io.BytesIO(picture)))
    tiles = [sheet[-14 - 128 :, left : left + 128][:128] for left in (14, 14 + 128 + 14, 2 * (14 + 128) + 14)]
    np.testing.assert_array_equal(tiles[1], batch.images[2].numpy())
    visible, _ = views(recipe, 4, 2, batch.sample_ids)
    np.testing.assert_array_equal(tiles[2], masked(batch.images, visible, 32)[2, 0].numpy())


def test_masked_shows_the_visible_patches_alone() -> None:
    """Use 2 x 3 patches of 4 pixels, so that swapped rows and columns fail the test."""
    images = torch.randint(0, 256, (1, 8, 12, 3), generator=torch.Generator().manual_seed(0)).byte()
    views = masked(images, torch.tensor([[[1, 5], [0, 3]]], dtype=torch.int32), 4)
    grey = torch.tensor(HIDDEN, dtype=torch.uint8)
    for view, patches in enumerate(({1, 5}, {0, 3})):
        for patch in range(6):
            row, column = divmod(patch, 3)
            place = (slice(4 * row, 4 * row + 4), slice(4 * column, 4 * column + 4))
            expected = images[0][place] if patch in patches else grey.expand(4, 4, 3)
            assert torch.equal(views[0, view][place], expected)


def test_the_verb(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out = folder.parent / "new" / "picture.png"

    def launch(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["mimae", "data", "show", str(folder), *arguments])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        return int(exit.value.code or 0)

    assert launch(*SETTINGS, "--out", str(out), "--images", "99") == 0
    text = capsys.readouterr().out
    assert text.startswith(f"{out}\n") and f"replaced: {folder}/2.png: no header" in text
    # There are five rows of 128 pixels; the columns are centre crop, sample and four views.
    image = Image.open(out)
    assert image.height > 5 * 128 and image.width > 6 * 128
    assert launch("model.patch_size=0") == 2
    assert "model.patch_size = 0" in capsys.readouterr().err
