"""Tests of damaged and malicious checkpoints: each gives one clear error, and an older intact checkpoint is used."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import os
import pickle
import random
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from mimae import distributed
from mimae.checkpoints import checkpoint, dcp
from mimae.checkpoints.saving import Saver
from mimae.checkpoints.settings import CheckpointSettings
from mimae.errors import CheckpointError

TENSORS = {"model.w": torch.arange(6.0).view(2, 3), "model.b": torch.ones(3)}


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    distributed.setup()
    yield
    distributed.shutdown()


@pytest.fixture
def newest(tmp_path: Path) -> Path:
    """Return the newer of two checkpoints, of steps 1 and 2."""
    each = Saver(tmp_path, CheckpointSettings(), torch.device("cpu"))
    for step in (1, 2):
        each.start(step, TENSORS, {"data": "images", "steps": 9, "measures": {"knn": float("nan")}})
        assert each.finish()
    return tmp_path / "checkpoints/step-00000002"


def seal(path: Path) -> None:
    """Make the manifest match the files again, as an attacker would."""
    manifest = {}
    for file in path.iterdir():
        if file.name != "manifest.json" and file.is_file():
            content = file.read_bytes()
            manifest[file.name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (path / "manifest.json").write_text(json.dumps(manifest))


def assert_passed_over(path: Path, capsys: pytest.CaptureFixture[str], *words: str) -> None:
    """Assert that the checkpoint gives one line of error with these words, and that the run uses the previous one."""
    with pytest.raises(CheckpointError) as caught:
        dcp.load_whole(checkpoint.load(path).path, "model.")
    assert all(word in str(caught.value) for word in words), caught.value
    assert len(str(caught.value)) < 1000 and "\x1b" not in str(caught.value)
    found = checkpoint.use(path.parent.parent, lambda each: dcp.load_whole(each.path, "model."))
    assert found is not None and found[0].state["step"] == 1 and torch.equal(found[1]["w"], TENSORS["model.w"])
    assert "trying the previous one" in capsys.readouterr().out


def _changed(state: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {key: value for key, value in (state | changes).items() if value != "absent"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        *(
            ({"step": step}, "step = ")
            for step in (-5, "x", None, float("nan"), 1e30, 1.5, True, [1], 10**40, "absent")
        ),
        ({"steps": -1}, "steps = -1"),
        ({"steps": "absent"}, "lacks steps"),
        ({"data": "absent"}, "lacks data"),
        ({"data": None}, "data = None"),
        ({"for_good": "yes"}, "for_good = 'yes'"),
        ({"measures": [0.5]}, "measures = [0.5]"),
        ({"measures": {"knn": "\x1b[2J"}}, "measures.knn"),
        ({"measures": {"knn": 10**400}}, "measures.knn"),
        ({"skipped_to": "x"}, "skipped_to"),
    ],
)
def test_a_state_with_a_wrong_value(
    newest: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], said: str
) -> None:
    state = json.loads((newest / "state.json").read_text())
    (newest / "state.json").write_text(json.dumps(_changed(state, **changes)))
    seal(newest)
    assert_passed_over(newest, capsys, "state.json is broken", said)


@pytest.mark.parametrize("file", ["state.json", "manifest.json"])
@pytest.mark.parametrize("content", ["", "[]", "null", "{", "\ud800", "[" * 100_000, '{"a": 1}', '"\\u001b[2J"'])
def test_json_that_is_no_state_or_manifest(
    newest: Path, capsys: pytest.CaptureFixture[str], file: str, content: str
) -> None:
    (newest / file).write_bytes(content.encode(errors="surrogatepass"))
    if file == "state.json":
        seal(newest)
    assert_passed_over(newest, capsys, file)


@pytest.mark.parametrize("name", ["../fifo", "/dev/zero", "..", ".", "a/b", "a\0b", "\x1b[2J", ""])
def test_a_manifest_names_files_of_the_checkpoint_alone(
    newest: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    os.mkfifo(newest.parent / "fifo")
    manifest = json.loads((newest / "manifest.json").read_text())
    (newest / "manifest.json").write_text(json.dumps(manifest | {name: {"bytes": 0, "sha256": "0" * 64}}))
    assert_passed_over(newest, capsys, "not a file of the checkpoint")


@pytest.mark.parametrize(
    "entry", [None, 5, {}, {"bytes": -1, "sha256": ""}, {"bytes": "x", "sha256": ""}, {"bytes": 3}]
)
def test_a_manifest_says_size_and_digest(newest: Path, capsys: pytest.CaptureFixture[str], entry: Any) -> None:
    manifest = json.loads((newest / "manifest.json").read_text())
    (newest / "manifest.json").write_text(json.dumps(manifest | {"__0_0.distcp": entry}))
    assert_passed_over(newest, capsys, "__0_0.distcp")


@pytest.mark.parametrize("file", ["state.json", "manifest.json", ".metadata", "__0_0.distcp"])
@pytest.mark.parametrize("kind", ["fifo", "device", "link", "folder", "absent", "huge"])
def test_only_regular_files_are_opened(newest: Path, capsys: pytest.CaptureFixture[str], file: str, kind: str) -> None:
    """Otherwise reading a FIFO would wait, and reading /dev/zero would never end."""
    path = newest / file
    path.rename(newest.parent.parent / "moved")
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "link":
        path.symlink_to(newest.parent.parent / "moved")
    elif kind == "folder":
        path.mkdir()
    elif kind == "huge":
        with path.open("wb") as sparse:
            sparse.truncate(10**12)
    assert_passed_over(newest, capsys, file)


def describe(path: Path, change: Callable[[Any], Any]) -> None:
    """Rewrite .metadata with a change, and make the manifest match."""
    found: Any = copy.deepcopy(dcp.Reader(path).described)
    (path / ".metadata").write_bytes(pickle.dumps(change(found) or found))
    seal(path)


def _set(attribute: str, value: Any) -> Callable[[Metadata], None]:
    return lambda found: setattr(found, attribute, value)


def _tensor(attribute: str, value: Any) -> Callable[[Metadata], None]:
    return lambda found: setattr(found.state_dict_metadata["model.w"], attribute, value)


def _chunk(attribute: str, value: Any) -> Callable[[Metadata], None]:
    def change(found: Metadata) -> None:
        of = found.state_dict_metadata["model.w"]
        assert isinstance(of, TensorStorageMetadata)
        object.__setattr__(of.chunks[0], attribute, value)

    return change


def _place(attribute: str, value: Any) -> Callable[[Metadata], None]:
    def change(found: Metadata) -> None:
        for place in found.storage_data.values():  # type: ignore[union-attr]
            object.__setattr__(place, attribute, value)

    return change


@pytest.mark.parametrize(
    "change",
    [
        lambda _: 5,
        lambda _: {"state_dict_metadata": {}},
        _set("state_dict_metadata", 5),
        _set("storage_data", None),
        _set("storage_data", {}),
        _tensor("size", torch.Size([2**31, 2**31])),
        _tensor("size", (2, 3)),
        _tensor("size", torch.Size([2, 4])),
        _tensor("chunks", 5),
        _tensor("chunks", []),
        _tensor("properties", None),
        _chunk("offsets", torch.Size([0])),
        _chunk("sizes", torch.Size([2**40, 3])),
        _chunk("sizes", None),
        _place("relative_path", "../moved"),
        _place("relative_path", "/dev/zero"),
        _place("relative_path", "\x1b[2J"),
        _place("relative_path", 5),
        _place("offset", -1),
        _place("offset", 10**12),
        _place("length", 10**12),
        _place("length", 1),
        _place("length", "x"),
        _place("transform_descriptors", ["zstd"]),
    ],
)
def test_a_description_is_not_believed(
    newest: Path, capsys: pytest.CaptureFixture[str], change: Callable[[Any], Any]
) -> None:
    describe(newest, change)
    assert_passed_over(newest, capsys, ".metadata describes no checkpoint")


def test_a_place_of_the_memo_costs_no_memory(newest: Path) -> None:
    file = newest / ".metadata"
    for put in (b"r\xff\xff\xff\x7f", b"p2147483647\n"):
        file.write_bytes(b"\x80\x02}" + put + b".")
        with pytest.raises(CheckpointError, match="it stores object 2147483647 after 0 others"):
            _ = dcp.Reader(newest).described


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_a_description_may_have_any_protocol(newest: Path, protocol: int) -> None:
    found = dcp.Reader(newest).described
    (newest / ".metadata").write_bytes(pickle.dumps(found, protocol))
    assert dcp.Reader(newest).described.state_dict_metadata.keys() == found.state_dict_metadata.keys()


def test_the_same_bytes_are_no_more_tensors_than_they_hold(newest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A thousand names for one piece of a file would need a thousand times its memory."""

    def multiply(found: Metadata) -> None:
        of = found.state_dict_metadata["model.w"]
        (index, place), *_ = [pair for pair in found.storage_data.items() if pair[0].fqn == "model.w"]  # type: ignore
        for i in range(1000):
            found.state_dict_metadata[f"model.w{i}"] = of
            found.storage_data[type(index)(f"model.w{i}", index.offset)] = place  # type: ignore[index]

    describe(newest, multiply)
    assert_passed_over(newest, capsys, "larger than its files")


def _rewrite_pieces(path: Path, pack: Callable[[Any], bytes]) -> None:
    """Replace the content of the pieces of model.w and model.b, and make the description match."""

    def change(found: Metadata) -> None:
        content = b""
        for index, place in found.storage_data.items():  # type: ignore[union-attr]
            piece = pack(TENSORS[index.fqn])
            object.__setattr__(place, "offset", len(content))
            object.__setattr__(place, "length", len(piece))
            content += piece
        (path / "__0_0.distcp").write_bytes(content)

    describe(path, change)


def _saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _deflated(tensor: Any) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(_saved(tensor))) as source, zipfile.ZipFile(buffer, "w") as target:
        for each in source.infolist():
            target.writestr(each.filename, source.read(each), zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def test_pieces_that_fit_their_description_are_read(newest: Path) -> None:
    """The unchanged pieces of the next test are readable, so that its errors come from its changes."""
    _rewrite_pieces(newest, _saved)
    assert torch.equal(dcp.load_whole(checkpoint.load(newest).path, "model.")["w"], TENSORS["model.w"])


@pytest.mark.parametrize(
    "pack",
    [
        lambda tensor: _saved(tensor.double()),
        lambda tensor: _saved(tensor[None]),
        lambda tensor: _saved([tensor]),
        lambda tensor: _saved(tensor)[:-20] + b"x" * 400,
        lambda tensor: b"junk" * 400,
        _deflated,
    ],
)
def test_pieces_are_tensors_of_their_description(
    newest: Path, capsys: pytest.CaptureFixture[str], pack: Callable[[Any], bytes]
) -> None:
    _rewrite_pieces(newest, pack)
    assert_passed_over(newest, capsys, "cannot be loaded")


def test_a_pickle_in_a_piece_runs_no_code(newest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Harm:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "harm"),)

    _rewrite_pieces(newest, lambda _: _saved(Harm()))
    assert_passed_over(newest, capsys, "cannot be loaded")
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("seed", range(4))
def test_bytes_that_change_at_random_are_an_error_or_nothing(
    newest: Path, seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """The manifest matches again, so digests detect nothing. The damaged checkpoint is refused with a message, or
    loads.
    """
    draw, original = random.Random(seed), {file.name: file.read_bytes() for file in newest.iterdir()}
    for _ in range(40):
        name = draw.choice([".metadata", "state.json", "__0_0.distcp", "manifest.json"])
        content = bytearray(original[name])
        for _ in range(draw.choice([1, 1, 3, 20])):
            content[draw.randrange(len(content))] = draw.randrange(256)
        (newest / name).write_bytes(content[: draw.randrange(len(content))] if draw.random() < 0.2 else content)
        if name != "manifest.json":
            seal(newest)
        try:
            dcp.load_whole(checkpoint.load(newest).path, "model.")
        except CheckpointError as error:
            assert "\x1b" not in str(error)
        for each, whole in original.items():
            (newest / each).write_bytes(whole)
    capsys.readouterr()


def test_names_that_are_no_steps_are_no_checkpoints(newest: Path) -> None:
    for name in ("step-x", "step-00000009.bak", "step-3", "step-\x1b[2J", "step-" + "9" * 40):
        (newest.parent / name).mkdir()
    (newest.parent / "step-00000007").write_text("a file")
    assert checkpoint.names(newest.parent.parent) == ["step-00000007", "step-00000002", "step-00000001"]
    found = checkpoint.find(newest.parent.parent)
    assert found is not None and found.state["step"] == 2


def test_links_among_the_checkpoints_are_removed_and_not_what_they_lead_to(newest: Path, tmp_path: Path) -> None:
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim/file").write_text("precious")
    for name in ("step-00000003", "step-00000004", ".step-00000004.tmp"):
        (newest.parent / name).symlink_to(tmp_path / "victim")
    each = Saver(tmp_path, CheckpointSettings(keep=1), torch.device("cpu"))
    each.start(4, TENSORS, {"data": "images", "steps": 9})
    assert each.finish() and checkpoint.names(tmp_path) == ["step-00000004"]
    assert not (newest.parent / "step-00000004").is_symlink() and (tmp_path / "victim/file").read_text() == "precious"


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"step-00000009", b"\x1b[2J", b"x" * 10_000])
def test_a_pointer_is_a_hint(newest: Path, content: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    (newest.parent.parent / "latest").write_bytes(content)
    found = checkpoint.find(newest.parent.parent)
    assert found is not None and found.state["step"] == 2
    said = capsys.readouterr().out
    assert "which does not exist" in said and "\x1b" not in said
