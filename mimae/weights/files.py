"""Files of weights: those of torch.save and of safetensors, mapped into memory, and opened without running any code."""

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
"""All that a file may hold beside tensors and Python's own numbers, texts and containers: MAE's code saves its
arguments and its losses with the weights."""

_STATES = ("model", "state_dict", "model_state_dict", "module")
"""Names under which a file keeps the weights."""

_NOT_ALLOWED = re.compile(r"GLOBAL (\S+)")
_LONGEST = 300


def read(path: Path) -> tuple[dict[str, Stored], Known]:
    """Return the tensors of a file, and what it says of them. Raises RunError, naming the file."""
    start = _first_bytes(path)
    if path.suffix == ".safetensors" or start[8:9] == b"{":
        return _safetensors(path), Known()
    found = _torch(path, is_zip=start[:4] == b"PK\x03\x04")
    state = next((found[key] for key in _STATES if isinstance(found.get(key), Mapping)), found)
    tensors = {name: tensor for name, tensor in state.items() if isinstance(name, str) and isinstance(tensor, Tensor)}
    if not tensors:
        raise RunError(
            f"{path} holds {_some(list(found)) or 'nothing'}, and no weights: legal is a dictionary of tensors by "
            f"name, or one under {', '.join(_STATES[:-1])} or {_STATES[-1]}"
        )
    size = path.stat().st_size
    for name, tensor in tensors.items():
        if not _is_plain(tensor) or tensor.numel() * tensor.element_size() > size:
            raise RunError(f"{path}: {printable(name)} is no plain tensor of numbers that lies in the file")
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
        # Mapped from the file: nothing is read here.
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise RunError(f"{path} is no safetensors file, or is torn: {_line(error)}") from error
    return {name: Mapped(tensor) for name, tensor in tensors.items() if _is_plain(tensor)}


def _torch(path: Path, is_zip: bool) -> dict[Any, Any]:
    """Return what torch.save wrote."""
    try:
        with torch.serialization.safe_globals(HARMLESS):
            if is_zip:
                with zipfile.ZipFile(path) as archive:
                    if any(each.compress_type != zipfile.ZIP_STORED for each in archive.infolist()):
                        raise RunError(f"{path} is a compressed archive, which torch.save does not write")
            # Only archives, which torch writes since version 1.6, can be mapped.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about pickles that torch did not write
                found = torch.load(path, map_location="cpu", mmap=is_zip, weights_only=True)
    except RunError:
        raise
    except Exception as error:  # whatever the bytes of a stranger come to
        if codes := _code(path, error):
            raise RunError(
                f"{path} holds Python objects, which loading would run as code: {printable(codes)}; only tensors, "
                "numbers, text and argparse's arguments are read. Whoever trusts the file saves its state_dict alone"
            ) from error
        raise RunError(
            f"{path} is no file of torch.save or safetensors, or is torn ({path.stat().st_size:,} bytes): "
            f"{_line(error)}"
        ) from error
    if not isinstance(found, dict):
        raise RunError(f"{path} holds a {type(found).__name__}, and no dictionary of tensors by name")
    return found


def _code(path: Path, error: Exception) -> str:
    """Return the names that a pickle asks for and does not get; nothing where it is not that."""
    try:
        with torch.serialization.safe_globals(HARMLESS):
            if names := torch.serialization.get_unsafe_globals_in_checkpoint(path):
                return ", ".join(sorted(names)[:5])
    except Exception:  # no archive, or torn
        pass
    found = _NOT_ALLOWED.search(str(error))
    return found[1] if found else ""


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) is Tensor and tensor.layout == torch.strided and not tensor.is_meta


def _of_arguments(found: Any) -> Known:
    """Return what the arguments that MAE's code saves say of the weights."""
    given = vars(found) if isinstance(found, argparse.Namespace) else {}
    normalised = given.get("norm_pix_loss")
    return Known(normalize_pixels=normalised if isinstance(normalised, bool) else None)


def _line(error: Exception) -> str:
    """Return the first sentence of an error of a library."""
    said = " ".join(printable(str(error)).split())
    if not said or said.startswith("Weights only load failed"):
        return "its bytes are no tensors" if said else "it ends too early"
    return re.split(r"\. (?=[A-Z])|: (?=Please|In PyTorch)", said)[0].rstrip(".")[:_LONGEST]


def _some(names: list[Any]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(printable(str(name))[:60] for name in names[:5]) + more
