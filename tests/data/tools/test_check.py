"""`mimae data check`: samples that the loader would replace are broken, and duplicates are found."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mimae import cli
from mimae.data import command
from mimae.data.loading import processes
from mimae.data.loading.batch import DataError
from mimae.data.settings import DataSettings
from mimae.data.tools.check import check, summary
from mimae.data.tools.duplicates import NEAR, near_duplicates, perceptual_hash, same
from tests.data.conftest import encoded, photograph, write_images


def copy_of(pixels: np.ndarray, size: tuple[int, int], quality: int) -> bytes:
    """Make a smaller JPEG of an image, as on the web."""
    file = io.BytesIO()
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=quality)
    return file.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    one, two = photograph(1, 120, 160), photograph(2, 90, 70)
    files = {
        "a/1.png": encoded(one),
        "a/2.jpg": copy_of(one, (100, 75), 70),
        "a/3.webp": encoded(two, "WEBP"),
        "b/1 again.png": encoded(one),
        "b/plain.png": encoded(np.full((50, 60, 3), 200, np.uint8)),
        "b/plain too.png": encoded(np.full((40, 60, 3), 90, np.uint8)),
        "b/empty.jpg": b"",
        "b/large.png": encoded(np.zeros((300, 400), np.uint8)),
        "b/cut.png": encoded(two)[:3000],
    }
    for name, data in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    (tmp_path / "b" / "gone.png").symlink_to("nowhere")
    return tmp_path


@pytest.mark.parametrize("workers", [1, 3])
def test_summary(folder: Path, workers: int) -> None:
    found = summary(check(str(folder), DataSettings(max_pixels=100_000), workers))
    counts = {key: found[key] for key in ("samples", "readable", "formats", "sides", "classes")}
    assert counts == {
        "samples": 10,
        "readable": 6,
        "formats": {"PNG": 4, "JPEG": 1, "WEBP": 1},
        "sides": {
            "height": {"min": 40, "median": 75, "max": 120},
            "width": {"min": 60, "median": 70, "max": 160},
        },
        "classes": {"count": 2, "smallest": 3, "largest": 7},
    }
    assert found["bytes"] == sum((folder / name).stat().st_size for name in ("a/1.png", "a/2.jpg", "a/3.webp")) + sum(
        (folder / "b" / name).stat().st_size for name in ("1 again.png", "plain.png", "plain too.png")
    )
    broken = {os.path.basename(bad["path"]): bad["reason"] for bad in found["broken"]}
    assert list(broken) == ["cut.png", "empty.jpg", "gone.png", "large.png"]
    for name, reason in {"cut": "truncated", "empty": "empty", "gone": "No such file", "large": "max_pixels"}.items():
        assert any(name in file and reason in text for file, text in broken.items())
    assert found["exact_duplicates"] == [[f"{folder}/a/1.png", f"{folder}/b/1 again.png"]]
    # Uniform images all have similar hashes, so they are left out.
    assert found["near_duplicates"] == [[f"{folder}/a/1.png", f"{folder}/a/2.jpg"]]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit code says whether a sample is broken."""
    monkeypatch.setattr(sys, "argv", ["mimae", "data", "check", *arguments])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    assert isinstance(exit.value.code, int)
    return exit.value.code


def test_the_verb_prints_a_table_or_json(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "b" / os.fsdecode(b"caf\xe9.jpg")).write_bytes(b"[bold]no image")
    assert run(monkeypatch, str(folder), "--workers", "1", "--max-pixels", "1000000") == 1
    text = capsys.readouterr().out
    expected = ("│ 11 ", "│ 4 (36.364%)", "PNG 5", "caf\\udce9.jpg: no header", "b'[bold]no image'", "1 again.png")
    assert all(part in text for part in expected), text
    assert run(monkeypatch, str(folder), "--workers", "1", "--json", "--max-pixels", "1000000") == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["samples"], found["readable"], len(found["broken"])) == (11, 7, 4)


def test_duplicates_alone_are_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("1.png", "2.png"):
        (tmp_path / name).write_bytes(encoded(photograph(1, 40, 50)))
    assert run(monkeypatch, str(tmp_path), "--workers", "1") == 0


def test_title_is_the_name_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Names with rich's markup or with invalid UTF-8 are printed."""
    name = "[red]x" + os.fsdecode(b"\xe9")
    write_images(tmp_path / name, ["0.png"], 16, 16)
    monkeypatch.chdir(tmp_path)
    command.check(name, workers=1, max_pixels=1000)
    assert "[red]x\\udce9\n" in capsys.readouterr().out.replace(" ", "")


def test_nothing_readable(tmp_path: Path) -> None:
    (tmp_path / "1.png").touch()
    found = summary(check(str(tmp_path), DataSettings(max_pixels=1000), 1))
    assert (found["readable"], found["sides"], found["exact_duplicates"]) == (0, {"height": None, "width": None}, [])


# Duplicates


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30))
def test_same_groups_what_is_equal(values: list[int]) -> None:
    digests = np.array([bytes([value]) * 16 for value in values], "V16")
    ids = 100 + np.arange(len(values))
    groups = {value: [100 + i for i, v in enumerate(values) if v == value] for value in values}
    assert same(digests, ids) == sorted(group for group in groups.values() if len(group) > 1)


@given(st.data())
def test_near_duplicates_are_the_linked_ones(data: st.DataObject) -> None:
    """The groups equal those of all pairs, for hashes around few centres, so that many pairs are near the limit."""
    centres = data.draw(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=3))
    flips = st.lists(st.integers(0, 63), max_size=4).map(lambda bits: sum(1 << bit for bit in set(bits)))
    values = [data.draw(st.sampled_from(centres)) ^ data.draw(flips) for _ in range(data.draw(st.integers(1, 14)))]
    told = [i for i, value in enumerate(values) if 6 <= value.bit_count() <= 58]
    groups = [{i} for i in told]
    for i in told:
        for j in told:
            if (values[i] ^ values[j]).bit_count() <= NEAR:
                one, other = (next(group for group in groups if k in group) for k in (i, j))
                if one is not other:
                    one |= other
                    groups.remove(other)
    expected = sorted(sorted(group) for group in groups if len(group) > 1)
    assert near_duplicates(np.array(values, np.uint64), np.arange(len(values))) == expected


def test_hash_keeps_to_the_picture() -> None:
    """A smaller, compressed or darker copy differs in a few bits; another picture or a mirrored copy in many."""
    first, second = photograph(3, 200, 300), photograph(4, 200, 300)

    def look(pixels: np.ndarray) -> int:
        return perceptual_hash(np.asarray(Image.fromarray(pixels).resize((9, 8), Image.Resampling.BICUBIC)))

    small = np.asarray(Image.open(io.BytesIO(copy_of(first, (90, 60), 60))))
    dark = (first * 0.7 + 10).astype(np.uint8)
    assert all((look(first) ^ look(other)).bit_count() <= NEAR for other in (small, dark))
    assert all((look(first) ^ look(other)).bit_count() > 10 for other in (second, np.ascontiguousarray(first[:, ::-1])))


# Processes


def _half(shared: int, item: int) -> int:
    if item == shared:
        os._exit(9)
    return item // 2


def test_work_of_several_processes_comes_in_order() -> None:
    assert list(processes.over(range(50), _half, -1, workers=3, title="halving")) == [i // 2 for i in range(50)]
    assert list(processes.over([], _half, -1, workers=3, title="halving")) == []


def test_process_that_dies_is_told_in_words() -> None:
    with pytest.raises(DataError, match=r"halving: a process died.*fewer --workers"):
        list(processes.over(range(5), _half, 3, workers=1, title="halving"))


# Unexpected files in a folder


def test_dark_images_are_told_with_what_mends_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(3):
        values = np.random.default_rng(i).integers(0, 4000, (20, 20)).astype(np.uint16)
        values[0, 0] = 4000
        (tmp_path / f"{i}.png").write_bytes(encoded(values))
    (note,) = summary(check(str(tmp_path), DataSettings(), 1))["notes"]
    assert "3 images of 16 bits per channel have values up to 4,000" in note
    assert "16 of 255: data.range=4095 makes it white" in note
    assert summary(check(str(tmp_path), DataSettings(range=4095), 1), 4095)["notes"] == []
    command.check(str(tmp_path), workers=1)
    assert "data.range=4095" in capsys.readouterr().out


def test_an_image_of_one_row_takes_no_memory(tmp_path: Path) -> None:
    """Very long images are subsampled: the weights of a resize from 50 million columns to nine would take gigabytes."""
    (tmp_path / "1.png").write_bytes(encoded(np.zeros((1, 2_000_000), np.uint8)))
    found = summary(check(str(tmp_path), DataSettings(), 1))
    assert found["sides"]["width"]["max"] == 2_000_000


def test_names_and_reasons_are_printed_without_what_a_terminal_obeys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = os.fsencode(tmp_path) + b"/caf\xe9\x1b[31m"
    os.mkdir(folder)
    for name in (b"ok.png", b"\x9b2J\n.png"):
        with open(folder + b"/" + name, "wb") as file:
            file.write(encoded(photograph(0, 16, 16)) if name == b"ok.png" else b"\x1b[2J no image")
    monkeypatch.setattr(sys, "argv", ["mimae", "data", "check", os.fsdecode(folder), "--workers", "1"])
    with pytest.raises(SystemExit):
        cli.main()
    text = capsys.readouterr().out
    assert "\\x1b[31m" in text and "\\udce9" in text and "\\x1b" in text
    assert all(character.isprintable() or character == "\n" for character in text)
