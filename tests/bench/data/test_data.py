"""Tests of the loaders' bench and soak: the measurements are correct, and the soak's checks can fail."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder  # type: ignore[import-untyped]

from mimae.bench.data import command, data, feeds
from mimae.bench.harness import command as harness
from mimae.bench.harness import soak
from mimae.data.command import pack
from mimae.data.loading.batch import BadSample, Batch
from mimae.data.pixels.decode import BadImage, whole, why
from mimae.data.settings import DataSettings
from mimae.data.sources.open import open_source
from mimae.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return smooth pictures, like photographs; with noise, different resize filters give different results."""
    root = tmp_path_factory.mktemp("images")
    y, x = np.mgrid[0:90, 0:120]
    for i in range(24):
        pixels = np.stack([x * 2 + i, y * 2, 127 + 100 * np.sin((x + y + 9 * i) / 17)], -1)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / f"{i:02d}.jpg", quality=95)
    return root


def test_the_bench_writes_rates_ratios_shares_and_parity(folder: Path, tmp_path: Path) -> None:
    command.data(
        *(str(folder), 32, 8, 1, 1, 0.2, ["torch", "torchvision"], "vit_base_400ep", "NVIDIA H100", 0.45),
        tmp_path / "data.json",
        [f"copy={folder}"],
    )
    found = json.loads((tmp_path / "data.json").read_text())
    ours, peer = found["loaders"]["torch"], found["loaders"]["torchvision"]
    turn = ours["turns"][0]
    assert found["loaders"].keys() == {"torch", "torchvision", "torch, copy"}
    assert found["loaders"]["torch, copy"]["ratio_per_cpu_s"]["median"] > 0
    assert ours["images_per_s"] == turn["images"] / turn["seconds"] > 0
    assert ours["ratio"]["median"] == pytest.approx(ours["images_per_s"] / peer["images_per_s"])
    assert peer["ratio"]["median"] == 1 and ours["bytes"] > 50e6
    assert sum(ours["shares"].values()) == pytest.approx(1) and min(ours["shares"].values()) > 0
    assert ours["parity"]["mean"] < 0.5 and ours["parity"]["psnr_db"] > 40
    assert found["feeds"]["gpus"] == pytest.approx(ours["images_per_s"] / found["feeds"]["images_per_s_each"])


def test_parity_sees_another_window(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = feeds.Job(open_source(str(folder)), DataSettings(image_size=32), 8, 0)
    good = data.parity("torch", job)
    cut = data.random_window
    monkeypatch.setattr(data, "random_window", lambda *a: cut(*a)._replace(top=0))
    assert data.parity("torch", job)["psnr_db"] < good["psnr_db"] - 10


def test_webdataset_and_spdl_say_why_they_are_left_out_or_run(folder: Path, tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    files = open_source(str(folder))
    assert feeds.obstacle("webdataset", files, cpu) is not None
    pack(str(folder), tmp_path / "s.tar")
    shards = open_source(str(tmp_path / "s-00000.tar"))
    assert feeds.obstacle("torchvision", shards, cpu) == "it reads single files"
    for name, source in (("webdataset", shards), ("spdl", files)):
        if feeds.obstacle(name, source, cpu) is None:
            job = feeds.Job(source, DataSettings(image_size=32), 8, 1)
            assert data.turn(name, job, 0.2).images >= 8
        else:
            assert feeds.obstacle(name, source, cpu)


def test_torchvision_reads_what_a_list_names(folder: Path, tmp_path: Path) -> None:
    """Use equal names in two folders, an extension unknown to ImageFolder, one in capitals, and a relative list."""
    images = [tmp_path / "a" / "x.gif", tmp_path / "b" / "x.gif", tmp_path / "b" / "y.JPG"]
    for image, original in zip(images, sorted(folder.iterdir())):
        image.parent.mkdir(exist_ok=True)
        image.write_bytes(original.read_bytes())
    (tmp_path / "list.txt").write_text("a/x.gif\nb/x.gif\nb/y.JPG\n")
    source = open_source("list.txt", tmp_path)
    with ExitStack() as stack:
        found = ImageFolder(feeds._links(source, stack))
        assert [Path(path).resolve() for path, _ in found.samples] == [image.resolve() for image in images]
        assert found[2][0].size == (120, 90)


def test_a_folder_that_is_called_like_a_shard_holds_none(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "x.tar.d").symlink_to(folder)
    assert feeds._shards(open_source(str(tmp_path / "x.tar.d"))) == []


def test_damage_of_each_kind_is_seen(folder: Path) -> None:
    """Include a valid header without the tables after it, which only the decoder detects."""
    source = soak.Damaged(open_source(str(folder)), 1.0)
    reasons = set()
    for _ in range(60):
        try:
            whole(source.read(0), 1_000_000)
        except (BadImage, OSError) as error:
            reasons.add(" ".join(why(error).split()[:3]))
    assert {"the file is", "OSError: broken data", "the file cannot"} <= reasons


def test_too_few_images_and_unknown_loaders_are_told(folder: Path) -> None:
    rest: Any = ("vit_base_400ep", "NVIDIA H100", 0.45, None)
    with pytest.raises(UserError, match="24 images, fewer than a batch of 64"):
        command.data(str(folder), 32, 64, 1, 1, 0.1, None, *rest)
    with pytest.raises(UserError, match="--packed here: legal is NAME=PATH"):
        command.data(str(folder), batch=8, packed=["here"])
    with pytest.raises(UserError, match="--only turbo: legal are"):
        command.data(str(folder), 32, 8, 1, 1, 0.1, ["turbo"], *rest)


def test_a_soak_loses_and_repeats_nothing_and_names_what_it_replaced(folder: Path, tmp_path: Path) -> None:
    harness.soak(
        str(folder), ["torch"], 0.05, 0.2, 32, 8, 0.8, tmp_path / "soak.json", tmp_path / "soak.png"
    )  # raises typer.Exit where a check fails
    result = json.loads((tmp_path / "soak.json").read_text())["loaders"]["torch"]
    assert result["restarts"] >= 2 and result["epochs"] >= 1 and result["replaced"] > 0
    assert Image.open(tmp_path / "soak.png").size[0] > 500


def batch(slots: list[int], sources: list[int], bad: list[int]) -> Batch:
    named = [BadSample(i, "", "torn") for i in bad]
    return Batch(torch.zeros(len(slots), 1, 1, 3), torch.tensor(slots), torch.tensor(sources), 0, 0, named)


@pytest.mark.parametrize(
    ("batches", "lost", "repeated", "unnamed"),
    [
        ([batch([0, 1], [0, 1], []), batch([2, 3], [2, 3], [])], 0, 0, 0),
        ([batch([0, 1], [0, 1], []), batch([1, 3], [1, 3], [])], 1, 1, 0),
        ([batch([0, 1], [0, 2], [1]), batch([2, 3], [2, 0], [])], 0, 0, 1),
        # In a mixture, a second pass gives the same samples other slots.
        ([batch([4, 1], [0, 1], []), batch([6, 7], [2, 0], [3])], 0, 0, 0),
    ],
)
def test_the_account_can_fail(batches: list[Batch], lost: int, repeated: int, unnamed: int) -> None:
    account = soak.Account(2, 2, 4)
    for each in batches:
        account.add(each)
    account.end_epoch()
    assert SimpleNamespace(lost=account.lost, repeated=account.repeated, unnamed=account.unnamed) == SimpleNamespace(
        lost=lost, repeated=repeated, unnamed=unnamed
    )
