"""Read the content of ``sensitivity.json`` back, for the figures and the page of a report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from qsparse_moe.ablation.cells import Cell
from qsparse_moe.ablation.routing import Choice, RoutingCell
from qsparse_moe.ablation.sensitivity.measure import Agreement, CellChange, Sensitivity
from qsparse_moe.ablation.sensitivity.routing_changes import PlanAgreement, RoutingChange, WithRouting


@dataclass(frozen=True)
class StoredSensitivity:
    """The part of a ``Sensitivity`` that its JSON holds, with the same names."""

    changes: tuple[CellChange, ...]
    """Without the changes over the halves of the documents."""
    agreement: tuple[Agreement, ...]
    routing: tuple[RoutingChange, ...]
    plans: PlanAgreement | None
    exact_seconds: float | None


Measured = Sensitivity | StoredSensitivity
"""Sensitivities as they were measured, or as their JSON holds them."""

FIRST_FORMAT = "qsparse_moe.sensitivity/1"
"""The format of JSON without routing and whole plans, which is still read."""


def stored(content: Mapping[str, Any]) -> StoredSensitivity:
    """Return the changes in the content of ``sensitivity.json``; version 1 has none of routing and whole plans."""
    plans = content.get("plans")
    return StoredSensitivity(
        changes=tuple(
            CellChange(Cell(one["layer"], one["site"], one["expert"]), one["sparsity"], **_figures(one))
            for one in content["points"]
        ),
        agreement=tuple(Agreement(**one) for one in content["agreement"]),
        routing=tuple(
            RoutingChange(RoutingCell(one["layer"], _choice(one)), **_figures(one))
            for one in content.get("routing", ())
        ),
        plans=None if plans is None else _plans(plans),
        exact_seconds=content["exact_seconds"],
    )


def _plans(plans: Mapping[str, Any]) -> PlanAgreement:
    routed = plans.get("with_routing")
    found = PlanAgreement(tuple(plans["estimated"]), tuple(plans["evaluated"]), plans["spearman"], plans["pearson"])
    if routed is None:
        return found
    return replace(found, with_routing=WithRouting(tuple(routed["estimated"]), routed["spearman"], routed["pearson"]))


def _choice(one: Mapping[str, Any]) -> Choice:
    return Choice(one["experts_per_token"], skipped=one["skipped_rank"])


def _figures(one: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "estimate": one["estimate"],
        "estimate_interval": (one["estimate_low"], one["estimate_high"]),
        "first_order": one["first_order"],
        "exact": one["exact"],
        "exact_interval": None if one["exact"] is None else (one["exact_low"], one["exact_high"]),
        "exact_halves": None,
    }
