"""The base class of all groups of settings, and the types that several of them share. Imports no torch."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

LARGEST = 10**12
"""Largest value of a whole number without a narrower range. Rules search for divisors and multiples, which would take
unlimited time for a number of unlimited size."""
LARGEST_WIDTH = 2**24
"""Largest number of features, channels, or tokens per sequence."""
SMALLEST_GUARD = 10**6
"""An upper limit of at least this value only guards the arithmetic: a message names it only if it is exceeded."""

PositiveInt = Annotated[int, Field(ge=1, le=LARGEST)]
NonNegativeInt = Annotated[int, Field(ge=0, le=LARGEST)]
Width = Annotated[int, Field(ge=1, le=LARGEST_WIDTH)]
# Infinity would pass a lower limit. The types with two limits exclude it by themselves.
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Texts = Annotated[tuple[str, ...], Field(strict=False)]
"""A list in YAML, a tuple here: a frozen section must not hold a list that can be changed. ``strict=False`` admits the
list; the items stay strict."""


class Section(BaseModel):
    """A group of settings: frozen, and strict about names and types."""

    # Unless strict, "50" and 1 would pass as 50 and true. The docstrings become the descriptions in the JSON
    # schema and in docs/settings.md.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)
