"""Tests of evaluation on several ranks: the results equal those of one rank, and each rank does its share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mimae import distributed
from mimae.evaluate.share import evenly, gather_rows, share
from mimae.train.tasks.pretrain import Pretrain
from tests.image_folders import noise, two_classes
from tests.rank_processes import run_ranks
from tests.train.test_trainer import recipe


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of 30 images, one of which cannot be read."""
    folder = two_classes(tmp_path_factory.mktemp("images"), noise(30, seed=0))
    (folder / "a/04.png").write_bytes(b"no image")
    return folder


def evaluated(images: Path, tests: dict[str, Path], kinds: list[str]) -> dict[str, dict[str, Any]]:
    """Return the measures and this rank's number of predicted images, by test set and engine."""
    found, device = {}, distributed.setup()
    for kind in kinds:
        for name, test in tests.items():
            task = Pretrain(recipe(images, Path("unused"), f"engine.kind={kind}", f"data.val_path={test}"))
            engine, seen = task.engine(device), list[int]()
            predict = engine.model.predict

            def counted(given: torch.Tensor, *rest: Any, predict: Any = predict, seen: list[int] = seen) -> Any:
                seen.append(len(given))
                return predict(given, *rest)

            vars(engine.model)["predict"] = counted
            with torch.no_grad():
                measures = task.evaluate(engine.model.eval(), device)
            found[f"{kind}, {name}"] = measures | {"predicted": sum(seen)}
    return found


def test_two_ranks_find_what_one_finds(images: Path, tmp_path: Path) -> None:
    """Evaluate 7 images, of which one rank has 4 and the other 3, and 1 image.

    With 1 image, one rank has none, but still runs a forward pass, since FSDP needs all ranks.
    """
    tests = {
        "seven": two_classes(tmp_path / "seven", noise(7, seed=1)),
        "one": two_classes(tmp_path / "one", noise(1, seed=2)),
    }
    try:
        one = evaluated(images, tests, ["ddp"])
    finally:
        distributed.shutdown()
    (tmp_path / "ranks").mkdir()
    ranks = run_ranks(2, tmp_path / "ranks", evaluated, images, tests, ["ddp", "fsdp"])
    for kind in ("ddp", "fsdp"):
        for name, most in (("seven", 4), ("one", 1)):
            want, got = one[f"ddp, {name}"], [rank[f"{kind}, {name}"] for rank in ranks]
            assert got[0] == got[1], "measures are equal on every rank, and so is the work"
            assert got[0]["predicted"] == most
            assert got[0]["val_rec"] == pytest.approx(want["val_rec"], rel=1e-6)
            assert got[0]["knn"] == want["knn"]
    assert 0 < one["ddp, seven"]["knn"] < 1, "else it would not show a difference"


def shares(count: int) -> tuple[list[int], int, list[int]]:
    """Return this rank's share of `count` ids, and the shares of all ranks gathered."""
    mine = share(10 * torch.arange(count))
    return mine.ids.tolist(), mine.own, gather_rows(mine.ids[: mine.own]).tolist()


def all_shares() -> dict[int, Any]:
    return {count: shares(count) for count in (1, 3, 7)}


def test_shares_are_as_long_and_hold_each_id_once(tmp_path: Path) -> None:
    ranks = run_ranks(3, tmp_path, all_shares)
    for count in (1, 3, 7):
        lengths = {len(rank[count][0]) for rank in ranks}
        own = [i for rank in ranks for i in rank[count][0][: rank[count][1]]]
        assert lengths == {-(-count // 3)}
        assert sorted(own) == [10 * i for i in range(count)]
        assert all(rank[count][2] == own for rank in ranks), "rows are gathered in the order of ranks"


def test_a_huge_source_is_asked_for_images_that_it_has() -> None:
    """Use ids up to 2^24 + 3, which float32 cannot represent."""
    huge: Any = range(2**24 + 4)  # only its length is used
    ids = evenly(huge, 2048).tolist()
    assert (len(ids), ids[0], ids[-1]) == (2048, 0, len(huge) - 1)
