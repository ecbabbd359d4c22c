"""The base of every settings class. Each room owns its section; `config.recipe.Recipe` is the tree of them."""

from __future__ import annotations

from functools import cache
from typing import Annotated, Any, ClassVar, Literal, TypeGuard

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter

Resume = Literal["fixed", "free", "rounding"]
"""Whether a run that is resumed may change a key. fixed: it may not, since other weights would follow; free: it may,
and the weights stay the same; rounding: it may, and the weights differ by rounding alone."""

PATH: dict[str, Any] = {"format": "path"}
"""`json_schema_extra` of a field whose text is a path: `~`, `$VAR` and `${VAR}` are expanded in it."""


def _is_a_range(scale: tuple[float, float]) -> tuple[float, float]:
    if not 0 < scale[0] <= scale[1] <= 10:
        raise ValueError("legal: [low, high] with 0 < low <= high <= 10")
    return scale


Scale = Annotated[tuple[float, float], AfterValidator(_is_a_range)]
"""The range of the random scale of an image."""


class Section(BaseModel):
    """A section of a recipe: unknown keys are refused and values do not change after validation."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=(), defer_build=True
    )

    on_resume: ClassVar[Resume] = "fixed"
    """Default for the keys of this section that do not say otherwise, see `setting`."""

    @classmethod
    @cache
    def schemas(cls) -> dict[str, Any]:
        """Return the JSON schema of each dotted key of this section and of the sections in it."""
        inner = {name: kind for name, field in cls.model_fields.items() if is_section(kind := field.annotation)}
        if not inner:
            return cls.model_json_schema()["properties"]
        # The schema of a whole tree takes much longer than those of its sections, which trees share.
        found: dict[str, Any] = {}
        for name, field in cls.model_fields.items():
            if name in inner:
                found |= {f"{name}.{key}": schema for key, schema in inner[name].schemas().items()}
            else:
                found[name] = TypeAdapter(field.rebuild_annotation()).json_schema()
        return found

    @classmethod
    def resume_of(cls, key: str) -> Resume:
        """Return whether a run that is resumed may change a key of this section."""
        extra = cls.model_fields[key].json_schema_extra
        said: Any = extra.get("resume") if isinstance(extra, dict) else None
        return said or cls.on_resume


def is_section(kind: Any) -> TypeGuard[type[Section]]:
    """Return whether the annotation of a field is a section."""
    return isinstance(kind, type) and issubclass(kind, Section)


def setting(default: Any, *, resume: Resume, **details: Any) -> Any:
    """Return pydantic's Field for a key that a resumed run may change otherwise than its section says."""
    return Field(default, json_schema_extra={"resume": resume}, **details)
