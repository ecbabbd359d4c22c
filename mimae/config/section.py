"""The base of every settings class. Each part of the system owns its section; `config.Recipe` is the tree of them."""

from typing import Any

from pydantic import BaseModel, ConfigDict

PATH: dict[str, Any] = {"format": "path"}
"""`json_schema_extra` of a field whose text is a path: `~`, `$VAR` and `${VAR}` are expanded in it."""


class Section(BaseModel):
    """A section of a recipe: unknown keys are refused and values do not change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())
