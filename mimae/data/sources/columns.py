"""Which columns of a Parquet file hold images and classes."""

from __future__ import annotations

import json
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
    """Return the columns that hold images and classes.

    They are found by the keys of the settings, else by Hugging Face's notes in the file, else by type and name. Raises
    ValueError.
    """
    import pyarrow.types as kinds  # type: ignore[import-untyped]

    schema, features = file.schema_arrow, _features(file.schema_arrow)
    image = _image_column(schema, features, settings)
    label, dropped = _label_column(schema, features, settings)
    given = features.get(label, {}).get("names") if label is not None else None
    classes = given if isinstance(given, list) and all(isinstance(each, str) for each in given) else None
    if image not in _structs(schema):
        return Columns(image, None, label, classes, dropped)
    inner = {field.name: field.type for field in schema.field(image).type.fields}
    path = f"{image}.path" if "path" in inner and kinds.is_string(inner["path"]) else None
    return Columns(f"{image}.bytes", path, label, classes, dropped)


def _features(schema: Any) -> dict[str, dict[str, Any]]:
    """Return Hugging Face's notes about the columns."""
    notes: Any = None
    with suppress(ValueError, RecursionError):
        notes = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    # Every level may be null, or something else.
    return {k: v for k, v in _inner(_inner(notes, "info"), "features").items() if isinstance(v, dict)}


def _noted(features: dict[str, dict[str, Any]], kind: str) -> list[str]:
    """Return the names of the columns that the notes say to be of a kind."""
    return [name for name, value in features.items() if value.get("_type") == kind]


def _is_bytes(kind: Any) -> bool:
    import pyarrow.types as kinds  # type: ignore[import-untyped]

    return kinds.is_binary(kind) or kinds.is_large_binary(kind) or kinds.is_binary_view(kind)


def _structs(schema: Any) -> list[str]:
    """Return the columns that are structs with a field `bytes`, which is Hugging Face's form of images."""
    import pyarrow.types as kinds  # type: ignore[import-untyped]

    return [
        field.name
        for field in schema
        if kinds.is_struct(field.type)
        and any(inner.name == "bytes" and _is_bytes(inner.type) for inner in field.type.fields)
    ]


def _image_column(schema: Any, features: dict[str, dict[str, Any]], settings: DataSettings) -> str:
    """Return the column of images. Raises ValueError if there is none, or if several have its name."""
    structs, key = _structs(schema), settings.image_key
    plain = [field.name for field in schema if _is_bytes(field.type)]
    images = [name for name in _noted(features, "Image") if name in structs] + structs
    images += [name for name in plain if name in _IMAGES]
    if not images and len(plain) == 1:
        images = plain  # Nothing else can be meant.
    if key is not None:
        images = [name for name in (key, key.removesuffix(".bytes")) if name in structs + plain]
    if images:
        return _once(schema, images[0])
    legal = ", ".join(structs + plain)
    if key is not None:
        raise ValueError(
            f"data.image_key={key} is not a column of image bytes; legal: {legal or 'none'} of {_listed(schema)}"
        )
    advice = f"; data.image_key names one of {legal}" if legal else ""
    raise ValueError(f"it has no column of image bytes{advice}; its columns are {_listed(schema)}")


def _label_column(schema: Any, features: dict[str, dict[str, Any]], settings: DataSettings) -> tuple[str | None, str]:
    """Return the column of classes, or None, and why a column that seems to hold them is not used.

    Raises ValueError if data.label_key names no such column, or if several columns have the name of one.
    """
    import pyarrow.types as kinds  # type: ignore[import-untyped]

    def is_class(name: str) -> bool:
        kind = schema.field(name).type
        return kinds.is_integer(kind) or (settings.index_version > 1 and (is_text(kind) or kinds.is_boolean(kind)))

    names = (*_noted(features, "ClassLabel"), *_LABELS) if settings.label_key is None else (settings.label_key,)
    present = [_once(schema, name) for name in names if name in schema.names]
    label = next(filter(is_class, present), None)
    if settings.label_key is not None and label is None:
        raise ValueError(
            f"data.label_key={settings.label_key} is not a column of numbers or names; its columns are "
            f"{_listed(schema)}"
        )
    is_dropped = present and label is None
    return label, f"column {present[0]} is of type {schema.field(present[0]).type}" if is_dropped else ""


def _once(schema: Any, name: str) -> str:
    """Return the name of a column. Raises ValueError if several columns have it."""
    if (often := schema.names.count(name)) > 1:
        raise ValueError(f"it has {often} columns called {name}; rename or remove one of them")
    return name


def _listed(schema: Any) -> str:
    """Return the columns and their types in words."""
    return ", ".join(f"{field.name} ({field.type})" for field in schema)


def _inner(value: Any, key: str) -> dict[str, Any]:
    found = value.get(key) if isinstance(value, dict) else None
    return found if isinstance(found, dict) else {}
