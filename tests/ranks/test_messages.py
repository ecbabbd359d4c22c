"""Tests of messages between processes: JSON, signed where there is a secret, and never code."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from mimae.ranks import messages, unpickling
from mimae.ranks.messages import SECRET, MessageError


class Harm:
    """Object that creates a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return Path.mkdir, (self.folder,)


def test_a_message_comes_back_and_belongs_to_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SECRET, raising=False)
    value = {"steps": [1, 2.5, None], "name": "é"}
    assert messages.unpack(messages.pack(value, "a").encode(), "a") == value
    monkeypatch.setenv(SECRET, "0123456789abcdef")
    signed = messages.pack(value, "a").encode()
    assert messages.unpack(signed, "a") == value
    with pytest.raises(MessageError, match="the message b is not signed"):
        messages.unpack(signed, "b")


@pytest.mark.parametrize("change", ["bit", "none", "short", "unsigned", "other secret"])
def test_with_a_secret_nothing_else_is_taken(monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    monkeypatch.setenv(SECRET, "another secret of a job" if change == "other secret" else "the secret of the job")
    signed = messages.pack([1], "a").encode()
    monkeypatch.setenv(SECRET, "the secret of the job")
    wrong = {"bit": signed[:-2] + b"2]", "none": b"", "short": signed[:10], "unsigned": b"[1]", "other secret": signed}
    with pytest.raises(MessageError, match="not signed with this job's secret"):
        messages.unpack(wrong[change], "a")


def test_a_pickle_is_no_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SECRET, raising=False)
    for text in (pickle.dumps(Harm(tmp_path / "harm")), b"\xff", b"[" * 100_000, b""):
        with pytest.raises(MessageError, match="is not JSON"):
            messages.unpack(text, "a")
    assert not (tmp_path / "harm").exists()


def test_torchs_collectives_of_objects_make_no_foreign_objects(tmp_path: Path) -> None:
    """Check the unpickler of torch's object collectives, which a run replaces in torch's module while it lasts."""
    module = dist.distributed_c10d
    before = module._unpickler
    harm = pickle.dumps(Harm(tmp_path / "harm"))
    sent, size = module._object_to_tensor(ValueError("kept"), "cpu", None)
    with unpickling.restricted():
        assert isinstance(module._tensor_to_object(sent, size, None), ValueError)
        with pytest.raises(pickle.UnpicklingError, match=r"pathlib\S*\.Path\.mkdir|getattr has no place"):
            module._tensor_to_object(_bytes(harm), len(harm), None)
    assert module._unpickler is before and not (tmp_path / "harm").exists()


@pytest.mark.parametrize("named", ["builtins eval", "builtins getattr", "os system", "torch load"])
def test_no_function_is_legal(named: str) -> None:
    module, name = named.split()
    with pytest.raises(pickle.UnpicklingError, match=f"{module}.{name} has no place"):
        unpickling.Unpickler.find_class(_unpickler(), module, name)


def _unpickler() -> unpickling.Unpickler:
    import io

    return unpickling.Unpickler(io.BytesIO())


def _bytes(data: bytes) -> Any:
    import torch

    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
