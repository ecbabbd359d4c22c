"""Which columns of a Parquet file hold images and classes."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import suppress
from typing import Any, NamedTuple

from mimae.data.settings import DataSettings

_IMAGES = ("image", "img", "bytes", "jpg", "jpeg", "png", "webp")
_LABELS = ("label", "labels", "cls", "fine_label")


class Columns(NamedTuple):
    """Dotted names of the columns; the class names if the file tells them."""

    image: str
    path: str | None
    label: str | None
    classes: list[str] | None
    dropped: str = ""
    """Why a column that seems to hold classes is not used."""


def is_text(kind: Any) -> bool:
    import pyarrow.types as kinds  # type: ignore[import-untyped]

    return kinds.is_string(kind) or kinds.is_large_string(kind) or kinds.is_string_view(kind)


def find_columns(file: Any, settings: DataSettings) -> Columns:
    """Which columns hold images and classes: by their keys, else by Hugging Face's own notes in the file, else by type
    and name. Raises ValueError."""
    import pyarrow.types as kinds  # type: ignore[import-untyped]

    schema = file.schema_arrow
    notes: Any = None
    with suppress(ValueError, RecursionError):
        notes = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    # Every level may be null, or something else.
    features = {k: v for k, v in _inner(_inner(notes, "info"), "features").items() if isinstance(v, dict)}

    def feature(kind: str) -> list[str]:
        return [name for name, value in features.items() if value.get("_type") == kind]

    def is_bytes(kind: Any) -> bool:
        return kinds.is_binary(kind) or kinds.is_large_binary(kind) or kinds.is_binary_view(kind)

    structs = [
        field.name
        for field in schema
        if kinds.is_struct(field.type)
        and any(inner.name == "bytes" and is_bytes(inner.type) for inner in field.type.fields)
    ]
    every = [field.name for field in schema if is_bytes(field.type)]
    plain = [name for name in every if name in _IMAGES]
    noted = [name for name in feature("Image") if name in structs]
    images = noted + structs + plain
    if not images and len(every) == 1:
        images = every  # Nothing else can be meant.
    if settings.image_key is not None:
        images = [
            name for name in (settings.image_key, settings.image_key.removesuffix(".bytes")) if name in structs + every
        ]
    if not images:
        raise ValueError(_no_images(schema, structs + every, settings.image_key))

    often = Counter(schema.names)

    def once(name: str) -> str:
        if often[name] > 1:
            raise ValueError(f"it has {often[name]} columns called {name}; rename or remove one of them")
        return name

    once(images[0])

    def is_class(name: str) -> bool:
        kind = schema.field(name).type
        return kinds.is_integer(kind) or (settings.index_version > 1 and (is_text(kind) or kinds.is_boolean(kind)))

    names = (*feature("ClassLabel"), *_LABELS) if settings.label_key is None else (settings.label_key,)
    present = [once(name) for name in names if name in schema.names]
    label = [name for name in present if is_class(name)]
    listed = ", ".join(f"{field.name} ({field.type})" for field in schema)
    if settings.label_key is not None and not label:
        raise ValueError(
            f"data.label_key={settings.label_key} is not a column of numbers or names; its columns are {listed}"
        )
    dropped = f"column {present[0]} is of type {schema.field(present[0]).type}" if present and not label else ""
    given = features.get(label[0], {}).get("names") if label else None
    classes = given if isinstance(given, list) and all(isinstance(each, str) for each in given) else None
    column = label[0] if label else None
    if images[0] not in structs:
        return Columns(images[0], None, column, classes, dropped)
    inner = {field.name: field.type for field in schema.field(images[0]).type.fields}
    path = f"{images[0]}.path" if "path" in inner and kinds.is_string(inner["path"]) else None
    return Columns(f"{images[0]}.bytes", path, column, classes, dropped)


def _no_images(schema: Any, legal: list[str], image_key: str | None) -> str:
    listed = ", ".join(f"{field.name} ({field.type})" for field in schema)
    if image_key is not None:
        return (
            f"data.image_key={image_key} is not a column of image bytes; legal: {', '.join(legal) or 'none'} of "
            f"{listed}"
        )
    advice = f"; data.image_key names one of {', '.join(legal)}" if legal else ""
    return f"it has no column of image bytes{advice}; its columns are {listed}"


def _inner(value: Any, key: str) -> dict[str, Any]:
    found = value.get(key) if isinstance(value, dict) else None
    return found if isinstance(found, dict) else {}
