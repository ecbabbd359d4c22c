"""Tests of the registry of engines, and of the properties that engines declare."""

from __future__ import annotations

import itertools
from typing import get_args

import pytest
import torch

from mimae.config.load import load_recipe
from mimae.engines.make import ENGINES, check_machine, setup_of
from mimae.engines.settings import EngineSettings
from mimae.errors import UserError


def test_every_kind_has_an_engine() -> None:
    assert set(get_args(EngineSettings.model_fields["kind"].annotation)) == ENGINES.keys()


def test_what_is_spread_grows_with_the_stage() -> None:
    spread = [ENGINES[kind].spreads for kind in ("ddp", "zero1", "zero2", "zero3")]
    assert all(less < more for less, more in itertools.pairwise(spread))
    assert ENGINES["fsdp"].spreads == spread[-1]


@pytest.mark.parametrize("kind", [kind for kind, engine in ENGINES.items() if engine.spreads])
def test_lars_needs_whole_weights(kind: str) -> None:
    settings = load_recipe({"engine": {"kind": kind}, "optimizer": {"kind": "lars"}}).recipe
    with pytest.raises(UserError, match=r"optimizer\.kind=lars cannot run .*norms of whole weights"):
        check_machine(setup_of(settings), torch.device("cpu"), {})
