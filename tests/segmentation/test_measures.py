"""Tests of intersection over union, against values computed by hand and against torchmetrics."""

from __future__ import annotations

import math

import pytest
import torch

from mimae.segmentation.measures import Evaluation, confusion


def test_a_case_worked_out_by_hand() -> None:
    """Class 0 has 3/5: 3 of its 4 pixels and 1 pixel of class 1 are predicted. Class 1 has 2/4: 2 of 3, and 1 other.

    Class 2 does not occur, and one pixel is ignored.
    """
    true = torch.tensor([[0, 0, 0, 0], [1, 1, 1, -1]], dtype=torch.int16)
    found = torch.tensor([[0, 0, 0, 1], [1, 1, 0, 2]])
    made = Evaluation(confusion(true, found, 3), images=1, left_out=0)
    assert made.per_class == [0.6, 0.5, None]
    assert made.miou == pytest.approx(0.55) and made.pixel_accuracy == pytest.approx(5 / 7)
    assert made.absent == [2]


def test_a_class_that_is_found_where_there_is_none_counts_as_0() -> None:
    made = Evaluation(confusion(torch.tensor([0, 0]), torch.tensor([0, 1]), 3), images=1, left_out=0)
    assert made.per_class == [0.5, 0.0, None] and made.miou == 0.25 and made.absent == [1, 2]


def test_nothing_but_ignored_pixels_gives_no_number() -> None:
    made = Evaluation(confusion(torch.tensor([-1]), torch.tensor([0]), 2), images=1, left_out=0)
    assert made.per_class == [None, None] and math.isnan(made.miou) and math.isnan(made.pixel_accuracy)


def test_torchmetrics_agrees() -> None:
    """There are 20 classes, of which the last two do not occur. A tenth of the pixels is ignored."""
    metrics = pytest.importorskip("torchmetrics.classification", reason="torchmetrics is not installed")
    generator = torch.Generator().manual_seed(0)
    true = torch.randint(0, 18, (3, 40, 41), generator=generator)
    found = torch.where(torch.rand(true.shape, generator=generator) < 0.6, true, true.flip(1))
    true[torch.rand(true.shape, generator=generator) < 0.1] = -1
    made = Evaluation(confusion(true, found, 20), images=3, left_out=0)
    each = metrics.MulticlassJaccardIndex(20, average="none", ignore_index=-1)(found, true)
    mean = metrics.MulticlassJaccardIndex(20, average="macro", ignore_index=-1)(found, true)
    assert made.miou == pytest.approx(mean.item(), abs=1e-6)
    assert made.per_class[:18] == pytest.approx(each[:18].tolist(), abs=1e-6) and made.per_class[18:] == [None, None]
