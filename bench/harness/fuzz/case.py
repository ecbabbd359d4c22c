"""An input of the harness: files, words and environment variables; and its storage as JSON."""

from __future__ import annotations

import base64
import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple


class Special(NamedTuple):
    """A special file: a symbolic link to `value`, a FIFO, a folder, or a sparse file of `value` bytes."""

    kind: Literal["link", "fifo", "folder", "sparse"]
    value: str = ""


Content = bytes | Special


@dataclass(frozen=True)
class Case:
    """An input. Its meaning depends on its kind: `words` may be overrides, a data path or a verb."""

    files: Mapping[str, Content] = field(default_factory=dict)
    """Contents by relative path."""
    words: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Create the files in an existing folder. Names that the file system refuses are left out."""
        for name, content in self.files.items():
            path = folder / name
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                if isinstance(content, bytes):
                    path.write_bytes(content)
                elif content.kind == "link":
                    path.symlink_to(content.value)
                elif content.kind == "fifo":
                    os.mkfifo(path)
                elif content.kind == "folder":
                    path.mkdir(exist_ok=True)
                else:
                    with path.open("wb") as sparse:
                        sparse.truncate(int(content.value))
            except (OSError, ValueError):
                continue

    def to_json(self, kind: str) -> str:
        """Return the case as JSON, with its kind."""
        files = {name: list(each) if isinstance(each, Special) else _packed(each) for name, each in self.files.items()}
        tree = {"kind": kind, "words": self.words, "environment": self.environment, "files": files}
        return json.dumps(tree, indent=1) + "\n"


def from_json(text: str) -> tuple[str, Case]:
    """Return the kind and the case from the output of `to_json`."""
    tree = json.loads(text)
    files = {
        name: Special(*each) if isinstance(each, list) else zlib.decompress(base64.b85decode(each))
        for name, each in tree["files"].items()
    }
    return tree["kind"], Case(files, tree["words"], tree["environment"])


def _packed(content: bytes) -> str:
    return base64.b85encode(zlib.compress(content, 9)).decode()
