"""Recipes, which make a tensor of our state dict out of tensors of a Hugging Face checkpoint.

D width, F hidden width, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """A stored tensor, or one half of its second dimension."""

    name: str
    shape: tuple[int, ...]
    """The shape of the whole tensor."""
    half: Literal["first", "second"] | None = None

    @property
    def rows(self) -> slice:
        """The part of the second dimension that is read."""
        middle = self.shape[1] // 2
        return slice(0, middle) if self.half == "first" else slice(middle, self.shape[1])


@dataclass(frozen=True)
class Recipe:
    """The shape of one of our tensors, its pieces, and how they are put together."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    form: Literal["joined", "transposed", "stacked"]
    """joined: one after the other along the first dimension; transposed: one matrix, transposed; stacked: each piece is
    one expert's matrix, transposed, or the only piece holds those of all experts."""

    def build(self, read: Callable[[Piece], Tensor], dtype: torch.dtype) -> Tensor:
        """Return the tensor, of ``dtype`` if it has several pieces. One piece at a time is in memory beside it."""
        if len(self.pieces) == 1:
            value = read(self.pieces[0])
            return value if self.form == "joined" else value.transpose(-1, -2)
        whole = torch.empty(self.shape, dtype=dtype)
        start = 0
        for index, piece in enumerate(self.pieces):
            value = read(piece)
            if self.form == "stacked":
                whole[index] = value.T
            else:
                whole[start : start + len(value)] = value
                start += len(value)
        return whole


Recipes = Mapping[str, Recipe]
"""The recipe of every tensor of our state dict by its name."""


def copied(name: str, *shape: int) -> Recipe:
    """Return the recipe of a tensor that is stored as it is."""
    return Recipe(shape, (Piece(name, shape),), "joined")


def joined(width: int, rows: Mapping[str, int]) -> Recipe:
    """Return the recipe of matrices ``(rows, width)``, by name, one below the other."""
    pieces = tuple(Piece(name, (number, width)) for name, number in rows.items())
    return Recipe((sum(rows.values()), width), pieces, "joined")


def transposed(name: str, inputs: int, outputs: int) -> Recipe:
    """Return the recipe of ``(inputs, outputs)`` from a stored ``(outputs, inputs)``."""
    return Recipe((inputs, outputs), (Piece(name, (outputs, inputs)),), "transposed")


def stacked(name: Callable[[int], str], num_experts: int, inputs: int, outputs: int) -> Recipe:
    """Return the recipe of ``(E, inputs, outputs)`` from E stored matrices ``(outputs, inputs)``.

    ``name`` gives the name of an expert's matrix.
    """
    pieces = tuple(Piece(name(expert), (outputs, inputs)) for expert in range(num_experts))
    return Recipe((num_experts, inputs, outputs), pieces, "stacked")


def fused_experts(prefix: str, num_experts: int, width: int, hidden: int) -> dict[str, Recipe]:
    """Return the recipes of the experts that are stored fused: gate and up in ``(E, 2F, D)``, down in ``(E, D, F)``."""
    fused, down = f"{prefix}.gate_up_proj", Piece(f"{prefix}.down_proj", (num_experts, width, hidden))
    shape = (num_experts, 2 * hidden, width)
    return {
        "w_gate": Recipe((num_experts, width, hidden), (Piece(fused, shape, "first"),), "stacked"),
        "w_up": Recipe((num_experts, width, hidden), (Piece(fused, shape, "second"),), "stacked"),
        "w_down": Recipe((num_experts, hidden, width), (down,), "stacked"),
    }
