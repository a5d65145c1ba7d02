"""Cells of a sparsity plan: one cell per (layer, site, expert), the unit that grids and allocations change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from qsparse_moe.config.schema import Site
from qsparse_moe.config.shapes import EXPERT_SITES
from qsparse_moe.sparsity.plan import SparsityPlan


class Cell(NamedTuple):
    """One entry of a plan, which holds one S."""

    layer: int
    site: Site
    expert: int | None
    """None at a site without experts, and in the figures of a grid also where all experts of the layer share one S."""

    @property
    def name(self) -> str:
        """Return the label for tables, such as ``layer 1, expert_hidden, expert 3``."""
        where = f"layer {self.layer}, {self.site}"
        return where if self.expert is None else f"{where}, expert {self.expert}"


def cells_of(plan: SparsityPlan) -> list[Cell]:
    """Return all cells of the plan, in its order."""
    return [
        Cell(layer, site, expert if site in EXPERT_SITES else None)
        for (layer, site), values in plan.values.items()
        for expert in range(len(values))
    ]


def sparsity_of(plan: SparsityPlan, cell: Cell) -> float:
    """Return S of one cell."""
    # A site without experts has a single value, at index 0.
    return plan.values[cell.layer, cell.site][cell.expert or 0]


def with_cells(plan: SparsityPlan, changed: Mapping[Cell, float]) -> SparsityPlan:
    """Return ``plan`` with another S in some cells, without its thresholds: each was calibrated for the old S."""
    values = {key: list(own) for key, own in plan.values.items()}
    for cell, sparsity in changed.items():
        values[cell.layer, cell.site][cell.expert or 0] = sparsity
    return replace(plan, values={key: tuple(own) for key, own in values.items()}, thresholds={})
