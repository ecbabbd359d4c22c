"""The base of every settings class. Each folder owns its section; the recipe classes are the trees of sections."""

from __future__ import annotations

from functools import cache
from typing import Annotated, Any, ClassVar, Literal, TypeGuard

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter

Resume = Literal["fixed", "free", "rounding"]
"""Permission of a resumed run to change a key. fixed: no, because the weights would change; free: yes, and the weights
do not change; rounding: yes, and the weights change only by rounding."""

PATH: dict[str, Any] = {"format": "path"}
"""`json_schema_extra` of a field that is a path, in which `~`, `$VAR` and `${VAR}` are expanded."""


def _is_a_range(scale: tuple[float, float]) -> tuple[float, float]:
    if not 0 < scale[0] <= scale[1] <= 10:
        raise ValueError("legal: [low, high] with 0 < low <= high <= 10")
    return scale


Scale = Annotated[tuple[float, float], AfterValidator(_is_a_range)]
"""The range of the random scale of an image."""


class Section(BaseModel):
    """A section of a recipe. Unknown keys are refused, and values cannot change after validation."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=(), defer_build=True
    )

    on_resume: ClassVar[Resume] = "fixed"
    """Default for the keys of this section; `setting` gives a key another value."""

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
        """Return whether a resumed run may change a key of this section: fixed, free or rounding."""
        extra = cls.model_fields[key].json_schema_extra
        said: Any = extra.get("resume") if isinstance(extra, dict) else None
        return said or cls.on_resume


def is_section(kind: Any) -> TypeGuard[type[Section]]:
    """Return whether the annotation of a field is a section."""
    return isinstance(kind, type) and issubclass(kind, Section)


def setting(default: Any, *, resume: Resume, **details: Any) -> Any:
    """Return pydantic's Field for a key whose permission to change on resume differs from its section's."""
    return Field(default, json_schema_extra={"resume": resume}, **details)
