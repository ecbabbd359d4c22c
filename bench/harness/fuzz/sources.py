"""Fuzzing of tar shards, lists of files and mixtures: they are opened and read, and compared with their contents."""

from __future__ import annotations

import hashlib
import io
import json
import random
import tarfile
from functools import lru_cache
from pathlib import Path

import numpy as np
import yaml

from mimae.bench.harness.fuzz.case import Case, Content, Special
from mimae.bench.harness.fuzz.draws import ODD_TEXTS, damaged, odd, times, yaml_text
from mimae.bench.harness.fuzz.forked import Wrong
from mimae.bench.harness.fuzz.formats import tar
from mimae.bench.harness.fuzz.images import account, bases, batch_of, damaged_image
from mimae.bench.harness.fuzz.kind import Kind
from mimae.data.loading.samples import EachDecoder
from mimae.data.settings import DataSettings
from mimae.data.sources.base import Source
from mimae.data.sources.open import open_source
from mimae.data.tools.check import _look_at
from mimae.outside.text import printable

_SETTINGS = DataSettings(image_size=16, max_pixels=1_000_000)
_READ = 64
"""Number of samples of a source that are read."""


def read(source: Source, settings: DataSettings = _SETTINGS) -> str:
    """Read the first samples of a source in two ways; return the reason why one is bad, or an empty string.

    Raises Wrong if the results do not fit the source, and DataError if too many samples are bad.
    """
    total, labels = len(source), source.labels
    if labels is not None and (labels.shape != (total,) or labels.dtype != np.int64 or int(labels.min()) < 0):
        raise Wrong(f"labels {labels!r} of {total} samples")
    if labels is not None and source.classes is not None and int(labels.max()) >= len(source.classes):
        raise Wrong(f"label {labels.max()} of {len(source.classes)} classes")
    if sum(share.samples for share in source.shares) != total or total < 1:
        raise Wrong(f"shares {source.shares} of {total} samples")
    if any(printable(note, lines=True) != note for note in source.notes):
        raise Wrong(f"notes {source.notes!r}")
    assert len(source.fingerprint) == 64
    ids = range(min(_READ, total))
    samples, broken = _look_at((source, settings), ids)
    if int(samples["ok"].sum()) + len(broken) != len(ids):
        raise Wrong(f"{samples['ok'].sum()} readable and {len(broken)} broken of {len(ids)}")
    reason = account(batch_of(settings, source, 0, EachDecoder()), total)
    return reason or (broken[0].reason if broken else "")


# Shards


@lru_cache(1)
def shards() -> list[bytes]:
    """Return valid archives in the formats ustar, GNU and pax, with classes, JSON, folders and long names."""
    every = [(name, data) for name, data, _ in bases()][:8]
    made = []
    for style, label, folder in (
        (tarfile.USTAR_FORMAT, "cls", ""),
        (tarfile.GNU_FORMAT, "json", "a/"),
        (tarfile.PAX_FORMAT, "txt", "é" * 60 + "/"),
    ):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=style) as archive:
            for i, (name, data) in enumerate(every):
                text = {
                    "cls": b"%d" % (i % 3),
                    "json": json.dumps({"label": f"class {i % 2}"}).encode(),
                    "txt": b"a caption",
                }
                for ending, content in ((name.rpartition(".")[2], data), (label, text[label])):
                    info = tarfile.TarInfo(f"{folder}{i:03}.{ending}")
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
        made.append(file.getvalue())
    return made


def make_shards(draw: random.Random) -> Case:
    every = shards()
    base = draw.choice(every)
    data, chance = base, draw.random()
    if chance < 0.7:
        data = tar(draw, data, every)
    if chance > 0.6 and chance < 0.97:
        data = damaged(draw, data, every)
    files: dict[str, Content] = {"shards/1.tar": data}
    path = "shards"
    if draw.random() < 0.15:
        files["shards/2.tar"] = draw.choice((*every, damaged(draw, base, every), b""))
        path = draw.choice(("shards", "shards/{1..2}.tar", "shards/*.tar", "shards/{1,2,1}.tar"))
    if draw.random() < 0.1:
        name, image = damaged_image(draw)
        files[draw.choice((f"shards/{name}", "shards/3.tar", "shards/notes.txt", "shards/4.parquet"))] = image
    if draw.random() < 0.05:
        files["shards/5.tar"] = draw.choice(
            (
                Special("fifo"),
                Special("link", "../canary"),
                Special("link", "5.tar"),
                Special("sparse", str(10**13)),
                Special("folder"),
            )
        )
    keys = (
        draw.choice(("null", "null", "null", "png", "jpg", "x.jpg", "cls", "")),
        draw.choice(("null", "null", "null", "cls", "json", "label")),
    )
    return Case(
        files,
        [
            path,
            *keys,
            json.dumps(_sound(base, data) if list(files) == ["shards/1.tar"] and keys == ("null", "null") else []),
        ],
    )


def _sound(base: bytes, data: bytes) -> list[str]:
    """Return the SHA-256 of each image in an archive that precedes the first changed byte."""
    same = next((i for i, (ours, theirs) in enumerate(zip(base, data)) if ours != theirs), min(len(base), len(data)))
    found = []
    with tarfile.open(fileobj=io.BytesIO(base)) as archive:
        for info in archive:
            end = info.offset_data + -(-info.size // 512) * 512
            # The next header has to be unchanged too; an extension header there cannot affect earlier members.
            if end <= same and not info.name.endswith((".cls", ".json", ".txt")):
                found.append(hashlib.sha256(base[info.offset_data : info.offset_data + info.size]).hexdigest())
    return found


def use_shards(folder: Path, case: Case) -> str:
    path, image_key, label_key, sound = case.words
    keys = {"image_key": image_key, "label_key": label_key}
    settings = _SETTINGS.model_copy(update={key: None if value == "null" else value for key, value in keys.items()})
    source = open_source(path, folder, settings)
    for i, digest in enumerate(json.loads(sound)):
        if hashlib.sha256(source.read(i)).hexdigest() != digest:
            raise Wrong(f"sample {i}, {source.path(i)}, which precedes the damage, has changed")
    return read(source, settings)


# Lists


def make_lists(draw: random.Random) -> Case:
    ending = draw.choice(("txt", "tsv", "csv"))
    separator = draw.choice(("\t", "\t", ",", " ", ";")) if draw.random() < 0.3 else ("," if ending == "csv" else "\t")
    lines = []
    label = draw.choice((None, lambda i: i % 3, lambda i: f"class {i % 3}"))
    for i in range(draw.choice((1, 3, 12))):
        name = f"images/{i % 4}.png"
        lines.append([name] if label is None else [name, str(label(i))])
    for _ in times(draw, 3):
        at = draw.randrange(len(lines))
        chance = draw.random()
        if chance < 0.4:
            lines[at][draw.randrange(len(lines[at]))] = str(draw.choice(ODD_TEXTS))
        elif chance < 0.5:
            lines[at].append(str(odd(draw))[:1000])
        elif chance < 0.6:
            lines.insert(
                draw.choice((0, at)),
                draw.choice((["path", "label"], [""], ["# a remark"], ["images/9.png"], ['"images/0.png'])),
            )
        elif chance < 0.7:
            lines *= draw.choice((2, 300 if len(lines) < 100 else 2))
    text = draw.choice(("\n", "\n", "\r\n", "\r")).join(separator.join(line) for line in lines)
    encoding = draw.choice(("utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-32", "latin-1"))
    data = text.encode(encoding, "replace" if encoding == "latin-1" else "surrogatepass")
    if draw.random() < 0.4:
        data = damaged(draw, data)
    files: dict[str, Content] = {f"list.{ending}": data}
    if draw.random() < 0.03:
        files = {
            f"list.{ending}": draw.choice(
                (Special("fifo"), Special("sparse", str(10**12)), Special("folder"), Special("link", "/dev/zero"))
            )
        }
    path = f"list.{ending}" if draw.random() < 0.85 else str(draw.choice(ODD_TEXTS))
    files |= {f"images/{i}.png": bases()[6 + i % 2][1] for i in range(4)}
    return Case(files, [path])


def use_lists(folder: Path, case: Case) -> str:
    source = open_source(case.words[0], folder, _SETTINGS)
    content = next(iter(case.files.values()))
    if case.words[0].startswith("list.t") and isinstance(content, bytes) and b"\r" not in content:
        lines = [line for line in content.removeprefix(b"\xef\xbb\xbf").split(b"\n") if line]
        if len(source) != len(lines):
            raise Wrong(f"{len(source)} samples from {len(lines)} lines")
    return read(source)


# Mixtures


def make_mixtures(draw: random.Random) -> Case:
    sources: dict[object, object] = {"images": 3, "shards": 1, "list.txt": 0.5, "one": 2, "00010": 1}
    tree: dict[object, object] = {
        "draws": draw.choice((10, 100)),
        "sources": {name: weight for name, weight in sources.items() if draw.random() < 0.6},
    }
    for _ in times(draw, 3):
        chance = draw.random()
        inner = tree.get("sources")
        if chance < 0.25:
            tree[draw.choice(("draws", "sources", draw.choice(ODD_TEXTS)))] = odd(draw)
        elif chance < 0.6 and isinstance(inner, dict) and inner:
            inner[draw.choice(list(inner))] = odd(draw)
        elif chance < 0.8 and isinstance(inner, dict):
            inner[draw.choice(ODD_TEXTS)] = draw.choice((1, 1, odd(draw)))
    text = yaml_text(draw, tree)
    image = bases()[6][1]
    files: dict[str, Content] = {f"{name}/{i}.png": image for name in ("images", "one", "00010") for i in range(2)}
    files |= {"shards/0.tar": shards()[0], "list.txt": b"images/0.png\nimages/1.png\n"}
    return Case({"mixture.yaml": text} | files, ["mixture.yaml"])


def use_mixtures(folder: Path, case: Case) -> str:
    source = open_source(case.words[0], folder, _SETTINGS)
    content = yaml.safe_load(case.files["mixture.yaml"]) if isinstance(case.files["mixture.yaml"], bytes) else {}
    if sum(share.draws for share in source.shares) != content["draws"]:
        raise Wrong(f"draws {[share.draws for share in source.shares]} of {content['draws']}")
    return read(source)


def _prepare() -> None:
    shards()


SHARDS = Kind(make_shards, use_shards, _prepare, memory=300 << 20)
LISTS = Kind(make_lists, use_lists, bases, memory=300 << 20)
MIXTURES = Kind(make_mixtures, use_mixtures, _prepare, memory=300 << 20)
