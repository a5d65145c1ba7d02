"""Cells: the single places of a model whose sparsity is looked at by itself, a (layer, site, expert) each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from qsparse_moe.config.schema import Site
from qsparse_moe.config.shapes import EXPERT_SITES
from qsparse_moe.sparsity.plan import SparsityPlan


class Cell(NamedTuple):
    """One S of a plan."""

    layer: int
    site: Site
    expert: int | None
    """None at a site without experts."""

    @property
    def name(self) -> str:
        """For tables: ``layer 1, expert_hidden, expert 3``."""
        where = f"layer {self.layer}, {self.site}"
        return where if self.expert is None else f"{where}, expert {self.expert}"


def cells_of(plan: SparsityPlan) -> list[Cell]:
    """All cells in the order of the plan."""
    return [
        Cell(layer, site, expert if site in EXPERT_SITES else None)
        for (layer, site), values in plan.values.items()
        for expert in range(len(values))
    ]


def sparsity_of(plan: SparsityPlan, cell: Cell) -> float:
    """S of one cell."""
    return plan.values[cell.layer, cell.site][cell.expert or 0]


def with_cells(plan: SparsityPlan, changed: Mapping[Cell, float]) -> SparsityPlan:
    """``plan`` with another S in some cells; without thresholds, which belong to an S."""
    values = {place: list(own) for place, own in plan.values.items()}
    for cell, sparsity in changed.items():
        values[cell.layer, cell.site][cell.expert or 0] = sparsity
    return SparsityPlan({place: tuple(own) for place, own in values.items()})
