"""Tests of a rank's place: the values in the environment, and leftovers of other jobs."""

from __future__ import annotations

import pytest

from mimae.errors import UserError
from mimae.ranks import place
from mimae.ranks.place import Place

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "29500"}


def test_a_rank_finds_its_place_and_a_lone_process_has_none() -> None:
    assert place.find(TORCHRUN) == Place(1, 4)
    assert place.find({"RANK": "3", "WORLD_SIZE": "4", place.STORE: "file:x"}) == Place(3, 4)
    assert place.find({"RANK": "0", "WORLD_SIZE": "1"}) == Place(0, 1), "nobody is to be met"
    for nobody in ({}, {"MASTER_ADDR": "a", "MASTER_PORT": "1"}, {"WORLD_SIZE": "1", "LOCAL_RANK": "0"}, {"RANK": ""}):
        assert place.find(nobody) is None


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"WORLD_SIZE": ""}, "RANK=1 is in the environment without WORLD_SIZE,.*unset RANK"),
        ({"MASTER_PORT": ""}, "RANK=1 is in the environment without MASTER_PORT,"),
        ({"RANK": ""}, "WORLD_SIZE=4 is in the environment but RANK is not.*unset WORLD_SIZE"),
        ({"RANK": "one"}, "RANK='one' in the environment: legal are whole numbers from 0"),
        ({"RANK": "-1"}, "RANK='-1'"),
        ({"RANK": "4"}, "RANK=4 in the environment: legal is 0 to 3, since WORLD_SIZE=4"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE='0' in the environment: legal are whole numbers from 1"),
        ({"WORLD_SIZE": "4.0"}, "WORLD_SIZE='4.0'"),
        ({"LOCAL_RANK": "gpu"}, "LOCAL_RANK='gpu'"),
        ({"LOCAL_WORLD_SIZE": "?"}, "LOCAL_WORLD_SIZE="),
        ({"MASTER_PORT": "http"}, "MASTER_PORT='http'"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT=70000 in the environment: legal is 1 to 65535"),
    ],
)
def test_what_is_left_over_or_no_number_is_told_by_its_name(changes: dict[str, str], told: str) -> None:
    with pytest.raises(UserError, match=told):
        place.find(TORCHRUN | changes)
