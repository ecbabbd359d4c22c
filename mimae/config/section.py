"""The base of every settings class. Each room owns its section; `config.recipe.Recipe` is the tree of them."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

Resume = Literal["fixed", "free", "rounding"]
"""Whether a run that is resumed may change a key. fixed: it may not, since other weights would follow; free: it may,
and the weights stay the same; rounding: it may, and the weights differ by rounding alone."""

PATH: dict[str, Any] = {"format": "path"}
"""`json_schema_extra` of a field whose text is a path: `~`, `$VAR` and `${VAR}` are expanded in it."""


class Section(BaseModel):
    """A section of a recipe: unknown keys are refused and values do not change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    on_resume: ClassVar[Resume] = "fixed"
    """Default for the keys of this section that do not say otherwise, see `setting`."""

    @classmethod
    def resume_of(cls, key: str) -> Resume:
        """Return whether a run that is resumed may change a key of this section."""
        extra = cls.model_fields[key].json_schema_extra
        said: Any = extra.get("resume") if isinstance(extra, dict) else None
        return said or cls.on_resume


def setting(default: Any, *, resume: Resume, **details: Any) -> Any:
    """Return pydantic's Field for a key that a resumed run may change otherwise than its section says."""
    return Field(default, json_schema_extra={"resume": resume}, **details)
