"""Tests of `mimae embed`: the features of every image, in every file format, also after interruptions."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pyarrow import parquet
from safetensors import safe_open

from mimae.data.loading.loader import evaluation_batches
from mimae.data.sources.open import open_source
from mimae.errors import UserError
from mimae.transfer import command
from mimae.transfer import embed as module
from mimae.transfer.embed import Job, Request, embed
from mimae.transfer.load import load
from tests.data.conftest import encoded

CHECKOUT = Path(__file__).parents[2]


@pytest.fixture
def expected(run: Path, images: Path) -> dict[str, np.ndarray]:
    """Return the features of each image by itself; image 3 (b/03.png) cannot be read."""
    encoder, data, _ = load(run)
    source = open_source(str(images))
    ids = [i for i in range(11) if not source.path(i).endswith("03.png")]
    (batch,) = evaluation_batches(data, source, 11, ids)
    with torch.no_grad():
        tokens = encoder.tokens(batch.images)
        return {
            "ids": np.array(ids),
            "pooled": tokens[:, 1:].mean(1).numpy(),
            "class": tokens[:, 0].numpy(),
            "tokens": tokens[:, 1:].numpy(),
            "maps": encoder.maps(batch.images, [2])[0].numpy(),
        }


def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use parts of four samples: the last of three parts is short, and so is its batch."""
    monkeypatch.setattr(module, "_PART_ROWS", 4)


@pytest.mark.parametrize("what", ["pooled", "class", "tokens", "maps"])
def test_each_kind_of_features_is_what_the_encoder_gives(
    run: Path, images: Path, tmp_path: Path, expected: dict[str, np.ndarray], what: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_parts(monkeypatch)
    request = Request(what, (2,) if what == "maps" else (), batch=2)
    (unreadable,) = embed(run, str(images), tmp_path / "out.npz", request)
    assert unreadable.startswith(f"{images}/b/03.png: no header of an image")
    with np.load(tmp_path / "out.npz") as found:
        np.testing.assert_array_equal(found["ids"], expected["ids"])
        assert [Path(path).name for path in found["paths"]][:6] == [f"{i:02}.png" for i in (0, 2, 4, 6, 8, 10)]
        np.testing.assert_array_equal(found["labels"], [0] * 6 + [1] * 4)
        assert found["classes"].tolist() == ["a", "b"]
        np.testing.assert_allclose(found["block_2" if what == "maps" else "features"], expected[what], atol=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.npz"]


def test_parquet_and_safetensors_hold_the_same(
    run: Path, images: Path, tmp_path: Path, expected: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    small_parts(monkeypatch)
    request = Request("tokens", dtype="float16", batch=2)
    for out in ("out.parquet", "out"):
        embed(run, str(images), tmp_path / out, request)
    table = parquet.read_table(tmp_path / "out.parquet")
    assert table.column_names == ["id", "path", "label", "features"]
    assert json.loads(table.schema.metadata[b"classes"]) == ["a", "b"]
    np.testing.assert_array_equal(table["id"].to_numpy(), expected["ids"])
    rows = np.array(table["features"].to_pylist(), np.float16)
    np.testing.assert_allclose(rows, expected["tokens"], atol=4e-3)
    index = json.loads((tmp_path / "out/index.json").read_text())
    assert index["classes"] == ["a", "b"] and index["samples"] == 10 and list(index["parts"].values()) == [4, 3, 3]
    parts, paths = [], []
    for name in index["parts"]:
        with safe_open(tmp_path / "out" / name, "np") as file:
            parts.append(file.get_tensor("features"))
            paths += json.loads(file.metadata()["texts"])["paths"]
    np.testing.assert_array_equal(np.concatenate(parts), rows)
    assert paths == table["path"].to_pylist()


def test_a_call_that_was_interrupted_goes_on_to_the_same_file(
    run: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Interrupt after the first part, and again while the parts are joined into the file."""
    small_parts(monkeypatch)
    request = Request(batch=2)
    embed(run, str(images), tmp_path / "whole.npz", request)
    out, seen = tmp_path / "out.npz", [0]

    class Interrupted(BaseException):
        pass

    def stop(*args: object) -> None:
        seen[0] += 1
        if seen[0] == 3:  # during the second of three parts
            raise Interrupted

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(module.Progress, "add", stop)
        embed(run, str(images), out, request)
    assert [path.name for path in (tmp_path / "out.npz.parts").glob("part-*")] == ["part-00000.safetensors"]
    with pytest.raises(UserError, match=r"out.npz.parts holds the parts of another .*\(what differ\)"):
        embed(run, str(images), out, Request("class", batch=2))
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(module, "finish", lambda *args: stop(seen.__setitem__(0, 2)))
        embed(run, str(images), out, request)
    assert "4 of 11 images were embedded before" in capsys.readouterr().err
    (tmp_path / "out.npz.parts/part-00001.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match=r"part-00001.safetensors is damaged .* the same command makes it again"):
        embed(run, str(images), out, request)
    assert not out.exists()
    (tmp_path / "out.npz.parts/part-00001.safetensors").unlink()
    embed(run, str(images), out, request)
    assert out.read_bytes() == (tmp_path / "whole.npz").read_bytes()
    with pytest.raises(UserError, match="exists already"):
        embed(run, str(images), out, request)


@pytest.mark.parametrize(
    ("request_", "out", "said"),
    [
        (Request(), "x.safetensors", r"legal endings are .npz and .parquet; without one it is a folder"),
        (Request("maps"), "x.npz", r"--what maps needs --blocks, such as 0,2"),
        (Request("maps", (3,)), "x.npz", r"--blocks 3: the encoder has blocks 0 to 2"),
        (Request("class", (1,)), "x.npz", r"--what class takes none"),
    ],
    ids=["ending", "no blocks", "no such block", "blocks for nothing"],
)
def test_mistakes_are_said_in_words(
    run: Path, images: Path, tmp_path: Path, request_: Request, out: str, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        embed(run, str(images), tmp_path / out, request_)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["3,x", "1,1"])
def test_numbers_are_read_from_a_list(text: str) -> None:
    assert command.numbers("--blocks", "3,5") == (3, 5) and command.numbers("--blocks", None) == ()
    with pytest.raises(UserError, match="--blocks"):
        command.numbers("--blocks", text)


def test_the_size_of_a_part_is_bounded_in_bytes_and_in_whole_batches(run: Path, images: Path) -> None:
    assert Job(run, str(images), Request(batch=100)).rows == 8100
    assert Job(run, str(images), Request("maps", (0, 1, 2), batch=64)).rows == 64 * 128
    wide = Job(run, str(images), Request("tokens", batch=64))
    assert wide.rows * 6 * 12 * 4 <= module._PART_BYTES


@pytest.mark.slow
def test_memory_is_flat_and_a_killed_call_of_two_processes_leaves_the_same_file(run: Path, tmp_path: Path) -> None:
    """Embed 6,000 images of a shard with two processes, kill them, and continue with one: the file must not differ."""
    pixels = np.random.default_rng(0).integers(0, 256, (16, 8, 12, 3), np.uint8)
    files = [encoded(each) for each in pixels]
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        for i in range(6_000):
            entry = tarfile.TarInfo(f"{i:05}.png")
            entry.size = len(files[i % 16])
            tar.addfile(entry, io.BytesIO(files[i % 16]))
    source, peak = str(tmp_path / "images.tar"), []
    script = (
        "import sys; from pathlib import Path; from mimae.transfer import embed as m; m._PART_ROWS = 256\n"
        "if __name__ == '__main__': m.embed(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), m.Request(), False, "
        "int(sys.argv[4]))"
    )
    (tmp_path / "script.py").write_text(script)

    def start(out: str, ranks: int) -> subprocess.Popen[bytes]:
        arguments = [sys.executable, tmp_path / "script.py", run, source, tmp_path / out, str(ranks)]
        return subprocess.Popen([*map(str, arguments)], cwd=CHECKOUT, env=os.environ | {"PYTHONPATH": str(CHECKOUT)})

    whole = start("whole.npz", 1)
    while whole.poll() is None:
        parts = len(list(tmp_path.glob("whole.npz.parts/part-*")))
        peak.append((parts, anonymous(whole.pid)))
        time.sleep(0.1)
    assert whole.returncode == 0
    middle = [memory for parts, memory in peak if 2 <= parts <= 4]
    late = [memory for parts, memory in peak if parts >= 20]
    assert max(late) < max(middle) + 16 * 1024, "more than 16 MiB more after 4,000 further images"
    first = start("out.npz", 2)
    while len(list(tmp_path.glob("out.npz.parts/part-*"))) < 5:
        assert first.poll() is None
        time.sleep(0.05)
    first.kill()
    first.wait()
    time.sleep(3)  # The worker processes end with their parent.
    written = sorted(tmp_path.glob("out.npz.parts/part-*"))
    time.sleep(2)
    assert 5 <= len(written) < 24 and sorted(tmp_path.glob("out.npz.parts/part-*")) == written
    assert start("out.npz", 1).wait() == 0
    assert (tmp_path / "out.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()


def anonymous(process: int) -> int:
    """Return the anonymous memory of a process, in KiB."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))
