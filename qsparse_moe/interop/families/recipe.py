"""Recipes, which make a tensor of our state dict out of tensors of a Hugging Face checkpoint.

D width, F hidden width, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Place = int | slice
"""Position of a piece in the first dimension of our tensor: one expert, or a range."""


@dataclass(frozen=True)
class Piece:
    """A stored tensor, or the matrix of one expert in a tensor that holds those of all experts."""

    name: str
    shape: tuple[int, ...]
    """The shape of the whole stored tensor."""
    expert: int | None = None
    half: Literal["first", "second"] | None = None
    """The half of the expert's rows that is the piece; None: all of them."""
    order: tuple[int, ...] | None = None
    """The rows of the stored tensor in the order in which ours has them; None: the same order."""

    @property
    def index(self) -> tuple[int, slice] | None:
        """The index of the piece in the stored tensor; None if it is all of it."""
        if self.expert is None:
            return None
        middle = self.shape[1] // 2
        rows = {None: slice(None), "first": slice(0, middle), "second": slice(middle, self.shape[1])}
        return self.expert, rows[self.half]

    def in_our_order(self, value: Tensor) -> Tensor:
        """Return the rows of the stored tensor in the order of ours."""
        return value if self.order is None else value[torch.tensor(self.order)]

    def in_stored_order(self, value: Tensor) -> Tensor:
        """Return rows in our order in that of the stored tensor."""
        return value if self.order is None else value[torch.tensor(self.order).argsort()]


@dataclass(frozen=True)
class Recipe:
    """The shape of one of our tensors, its pieces, and how they are put together."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    form: Literal["joined", "transposed", "stacked"]
    """joined: one after the other along the first dimension; transposed: one matrix, transposed; stacked: each piece is
    one expert's matrix, transposed."""
    keeps_dtype: bool = False
    """Whether it is a buffer, which has its stored dtype whatever that of the weights is."""

    def build(self, read: Callable[[Piece], Tensor], dtype: torch.dtype) -> Tensor:
        """Return the tensor, of ``dtype`` if it has several pieces. One piece at a time is in memory beside it."""
        if len(self.pieces) == 1:
            return self.part(read(self.pieces[0]))
        whole = torch.empty(self.shape, dtype=dtype)
        for place, piece in self.places():
            # A matrix, not a stack of one: only so does torch transpose in tiles, five times as fast.
            whole[place] = self._oriented(read(piece))
        return whole

    def places(self) -> Iterator[tuple[Place, Piece]]:
        """Yield every piece with its place in our tensor; the places follow each other."""
        start = 0
        for index, piece in enumerate(self.pieces):
            if self.form == "stacked":
                yield index, piece
            else:
                rows = self.shape[0] if self.form == "transposed" else piece.shape[0]
                yield slice(start, start + rows), piece
                start += rows

    def part(self, piece: Tensor) -> Tensor:
        """Return a piece as the part of our tensor that it is, without a copy."""
        return self._oriented(piece)[None] if self.form == "stacked" else self._oriented(piece)

    def stored(self, part: Tensor, piece: Piece) -> Tensor:
        """Return a part of our tensor, at the place of ``piece``, as it is stored: the inverse of ``build``."""
        return piece.in_stored_order(self._oriented(part))

    def _oriented(self, value: Tensor) -> Tensor:
        return value if self.form == "joined" else value.T


Recipes = Mapping[str, Recipe]
"""The recipe of every tensor of our state dict by its name."""


def copied(name: str, *shape: int) -> Recipe:
    """Return the recipe of a tensor that is stored as it is."""
    return Recipe(shape, (Piece(name, shape),), "joined")


def buffer(name: str, *shape: int) -> Recipe:
    """Return the recipe of a buffer that is stored as it is."""
    return Recipe(shape, (Piece(name, shape),), "joined", keeps_dtype=True)


def joined(width: int, rows: Mapping[str, int], orders: Mapping[str, tuple[int, ...]] | None = None) -> Recipe:
    """Return the recipe of matrices ``(rows, width)``, by name, one below the other.

    ``orders`` has the ``Piece.order`` of those whose rows ours has in another order.
    """
    pieces = tuple(Piece(name, (number, width), order=(orders or {}).get(name)) for name, number in rows.items())
    return Recipe((sum(rows.values()), width), pieces, "joined")


def joined_vectors(sizes: Mapping[str, int]) -> Recipe:
    """Return the recipe of vectors of these sizes, by name, one after the other."""
    pieces = tuple(Piece(name, (size,)) for name, size in sizes.items())
    return Recipe((sum(sizes.values()),), pieces, "joined")


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
    fused, down = (f"{prefix}.gate_up_proj", (num_experts, 2 * hidden, width)), (num_experts, width, hidden)
    experts = range(num_experts)
    first, second = (tuple(Piece(*fused, expert, half) for expert in experts) for half in ("first", "second"))
    downs = tuple(Piece(f"{prefix}.down_proj", down, expert) for expert in experts)
    return {
        "w_gate": Recipe((num_experts, width, hidden), first, "stacked"),
        "w_up": Recipe((num_experts, width, hidden), second, "stacked"),
        "w_down": Recipe((num_experts, hidden, width), downs, "stacked"),
    }
