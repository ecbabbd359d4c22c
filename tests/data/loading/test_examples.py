"""Examples with targets: made in workers, replaced where they cannot be used, and moved as the images are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mimae.data.loading.batch import DataError
from mimae.data.loading.examples import Example
from mimae.data.loading.loader import evaluation_batches, make_loader
from mimae.data.loading.to_device import Transfer
from mimae.data.pixels.augment import centre_window
from mimae.data.pixels.decode import BadImage, Encoded, region
from mimae.data.settings import DataSettings
from mimae.data.sources.open import open_source
from mimae.randomness import Purpose, words
from tests.data.conftest import write_images

SETTINGS = DataSettings(image_size=8, crop_scale=None, workers=2, max_bad_fraction=1.0)


class Squares:
    """Reads the central square of an image, shrunk by dots, with its mean value and a random word."""

    def __init__(self, refused: tuple[int, ...] = ()) -> None:
        self.refused = refused

    def __call__(self, encoded: Encoded, source_id: int, sample_id: int, epoch: int) -> Example:
        if source_id in self.refused:
            raise BadImage("this one has no target")
        square = region(encoded, lambda height, width: centre_window(height, width, (8, 8)))
        pixels = torch.from_numpy(np.ascontiguousarray(square[::4, ::4]))
        word = words(0, Purpose.AUGMENT, epoch, torch.tensor([sample_id]), 1)[0]
        return Example(pixels, {"mean": pixels.double().mean(), "word": word})


@pytest.fixture
def images(tmp_path: Path) -> Path:
    write_images(tmp_path, [f"{i}.png" for i in range(8)])
    return tmp_path


def test_targets_come_with_their_images_and_resume_inside_an_epoch(images: Path) -> None:
    source = open_source(str(images), settings=SETTINGS)
    loader = make_loader(SETTINGS, source, seed=3, batch_size=4, reader=Squares())
    try:
        batches = list(Transfer(torch.device("cpu"))(loader.epoch(1)))
        again = next(loader.epoch(1, first_step=1))
    finally:
        loader.close()
    assert len(batches) == 2 and torch.equal(again.targets["word"], batches[1].targets["word"])
    for batch in batches:
        assert torch.equal(batch.targets["mean"], batch.images.double().mean((1, 2, 3)))
        assert torch.equal(batch.targets["word"][:, 0], words(0, Purpose.AUGMENT, 1, batch.sample_ids, 1)[:, 0])


def test_an_example_that_cannot_be_made_is_replaced_and_listed(images: Path) -> None:
    settings = SETTINGS.model_copy(update={"workers": 0})
    source = open_source(str(images), settings=settings)
    (batch,) = evaluation_batches(settings, source, 8, reader=Squares(refused=(2, 5)))
    assert sorted(bad.id for bad in batch.bad if bad.id in (2, 5)) >= [2, 5]
    assert {bad.reason for bad in batch.bad} == {"this one has no target"}
    assert not {2, 5} & set(batch.source_ids.tolist())
    others = [i for i in range(8) if i not in (2, 5)]
    assert batch.source_ids[others].tolist() == others


def test_a_loader_without_targets_is_refused(images: Path) -> None:
    settings = SETTINGS.model_copy(update={"loader": "dali_cpu"})
    with pytest.raises(DataError, match="makes images alone"):
        make_loader(settings, open_source(str(images), settings=settings), seed=0, batch_size=4, reader=Squares())
