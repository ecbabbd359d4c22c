"""Reading of weight files (torch.save, safetensors). They are memory-mapped, and opening them never runs code."""

from __future__ import annotations

import argparse
import os
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy._core.multiarray import scalar
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mimae.errors import RunError
from mimae.outside.reading import open_regular
from mimae.outside.text import printable
from mimae.weights.source import Known, Mapped, Stored

HARMLESS: list[Any] = [argparse.Namespace, scalar, np.dtype, *{type(np.dtype(code)) for code in "?bhilqBHILQefd"}]
"""Types that a file may contain in addition to tensors and Python's numbers, strings and containers. MAE's code saves
its arguments and its losses with the weights."""

_STATES = ("model", "state_dict", "model_state_dict", "module")
"""Keys under which a file may keep the weights."""

_NOT_ALLOWED = re.compile(r"GLOBAL (\S+)")
_LONGEST = 300


def read(path: Path) -> tuple[dict[str, Stored], Known]:
    """Return the tensors of a file, and the facts that it states about them.

    Raises RunError, which names the file, if it cannot be read or has no weights.
    """
    start = _first_bytes(path)
    if path.suffix == ".safetensors" or start[8:9] == b"{":
        return _safetensors(path), Known()
    found = _torch(path, is_zip=start[:4] == b"PK\x03\x04")
    state = next((found[key] for key in _STATES if isinstance(found.get(key), Mapping)), found)
    tensors = {name: tensor for name, tensor in state.items() if isinstance(name, str) and isinstance(tensor, Tensor)}
    if not tensors:
        raise RunError(
            f"{path} holds {_some(list(found)) or 'nothing'}, and no weights: legal is a dictionary of tensors by "
            f"name, itself or under {', '.join(_STATES[:-1])} or {_STATES[-1]}"
        )
    size = path.stat().st_size
    for name, tensor in tensors.items():
        if not _is_plain(tensor) or tensor.numel() * tensor.element_size() > size:
            raise RunError(f"{path}: {printable(name)} is not a plain tensor of numbers stored in the file")
    return {name: Mapped(tensor) for name, tensor in tensors.items()}, _of_arguments(found.get("args"))


def _first_bytes(path: Path) -> bytes:
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            return file.read(9)
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror}") from error


def _safetensors(path: Path) -> dict[str, Stored]:
    try:
        file = safe_open(path, "pt")
        # The tensors are memory-mapped; no values are read here.
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise RunError(f"{path} is not a safetensors file, or is damaged: {_line(error)}") from error
    return {name: Mapped(tensor) for name, tensor in tensors.items() if _is_plain(tensor)}


def _torch(path: Path, is_zip: bool) -> dict[Any, Any]:
    """Return the dictionary that torch.save wrote to a file. Raises RunError."""
    try:
        with torch.serialization.safe_globals(HARMLESS):
            if is_zip:
                with zipfile.ZipFile(path) as archive:
                    if any(each.compress_type != zipfile.ZIP_STORED for each in archive.infolist()):
                        raise RunError(f"{path} is a compressed archive, which torch.save does not write")
            # Only zip archives, which torch has written since version 1.6, can be memory-mapped.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch warns about pickles that it did not write.
                found = torch.load(path, map_location="cpu", mmap=is_zip, weights_only=True)
    except RunError:
        raise
    except Exception as error:  # Bytes of unknown origin can cause any exception.
        if codes := _code(path, error):
            raise RunError(
                f"{path} contains Python objects, whose loading would run code: {printable(codes)}; only tensors, "
                "numbers, text and argparse's arguments are read. If you trust the file, save only its state_dict anew"
            ) from error
        raise RunError(
            f"{path} is not a file of torch.save or safetensors, or is damaged ({path.stat().st_size:,} bytes): "
            f"{_line(error)}"
        ) from error
    if not isinstance(found, dict):
        raise RunError(f"{path} holds a {type(found).__name__}, not a dictionary of tensors by name")
    return found


def _code(path: Path, error: Exception) -> str:
    """Return the globals that a pickle asks for and that are not allowed; an empty string for other errors."""
    try:
        with torch.serialization.safe_globals(HARMLESS):
            if names := torch.serialization.get_unsafe_globals_in_checkpoint(path):
                return ", ".join(sorted(names)[:5])
    except Exception:  # The file is no archive, or is damaged.
        pass
    found = _NOT_ALLOWED.search(str(error))
    return found[1] if found else ""


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) is Tensor and tensor.layout == torch.strided and not tensor.is_meta


def _of_arguments(found: Any) -> Known:
    """Return the facts about the weights in the arguments that MAE's code saves."""
    given = vars(found) if isinstance(found, argparse.Namespace) else {}
    normalised = given.get("norm_pix_loss")
    return Known(normalize_pixels=normalised if isinstance(normalised, bool) else None)


def _line(error: Exception) -> str:
    """Return the first sentence of a library's error message."""
    said = " ".join(printable(str(error)).split())
    if not said or said.startswith("Weights only load failed"):
        return "its bytes are no tensors" if said else "it ends too early"
    return re.split(r"\. (?=[A-Z])|: (?=Please|In PyTorch)", said)[0].rstrip(".")[:_LONGEST]


def _some(names: list[Any]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(printable(str(name))[:60] for name in names[:5]) + more
