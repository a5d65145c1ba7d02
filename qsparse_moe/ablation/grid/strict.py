"""The rules that every part of a grid file has in common."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


# Frozen and strict as the run configuration, so that a typo is an error and not an ignored key.
class Strict(BaseModel):
    """A part of a grid file: unknown keys and wrong types are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


Seeds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
"""Seeds of runs; at least one."""
