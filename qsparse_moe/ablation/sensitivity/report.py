"""Write sensitivities as JSON, CSV, and Markdown."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qsparse_moe.ablation.sensitivity.estimate import DRAWS
from qsparse_moe.ablation.sensitivity.measure import CellChange, Sensitivity
from qsparse_moe.ablation.sensitivity.routing_changes import PlanAgreement, RoutingChange
from qsparse_moe.ablation.sensitivity.stored import Measured
from qsparse_moe.runs.folder import write_atomically

# Version 2 added the changes of routing and of whole plans.
FORMAT = "qsparse_moe.sensitivity/2"
_COLUMNS = (
    "layer",
    "site",
    "expert",
    "sparsity",
    "estimate",
    "estimate_low",
    "estimate_high",
    "first_order",
    "exact",
    "exact_low",
    "exact_high",
)
_MOST_LISTED = 10
AGREEMENT_HEAD = ("S", "points", "Spearman", "Pearson", "first order alone", "halves", "decided", "over decided")
"""The columns of ``agreement_rows``. The columns after Pearson are rank correlations and one count."""
CELLS_HEAD = ("cell", "S", "estimate", "exact")
"""The columns of ``costliest_rows`` and ``cheapest_rows``."""
ROUTING_HEAD = ("layer", "ranks in use", "estimate", "exact")
"""The columns of ``routing_rows``."""
READING = (
    "Halves: rank correlation of the exact changes over one half of the documents with those over the other half; no "
    "estimate can be expected to rank better. Decided: number of changes whose interval excludes 0."
)


def as_dict(found: Sensitivity, *, run_dir: Path, step: int) -> dict[str, Any]:
    """Return everything as values that JSON can hold. The keys are public: they keep the names of earlier versions."""
    return {
        "format": FORMAT,
        "run_dir": str(run_dir),
        "step": step,
        "mean_sparsity": found.plan.mean,
        "rows": found.num_sequences,
        "documents": found.documents,
        "loss": found.loss,
        "estimate_seconds": found.estimate_seconds,
        "exact_seconds": found.exact_seconds,
        "evaluations": found.evaluations,
        "times_cheaper": found.times_cheaper,
        "agreement": [asdict(one) for one in found.agreement],
        "points": [_row(change) for change in found.changes],
        "routing": [_routing_row(change) for change in found.routing],
        "plans": None if found.plans is None else asdict(found.plans),
    }


def _routing_row(change: RoutingChange) -> dict[str, Any]:
    exact_low, exact_high = change.exact_interval or (None, None)
    choice = change.cell.choice
    return {
        "layer": change.cell.layer,
        "change": choice.name,
        "experts_per_token": choice.experts,
        "skipped_rank": choice.skipped,
        "estimate": change.estimate,
        "estimate_low": change.estimate_interval[0],
        "estimate_high": change.estimate_interval[1],
        "first_order": change.first_order,
        "exact": change.exact,
        "exact_low": exact_low,
        "exact_high": exact_high,
    }


def _row(change: CellChange) -> dict[str, Any]:
    exact_low, exact_high = change.exact_interval or (None, None)
    values = (
        *change.cell,
        change.sparsity,
        change.estimate,
        *change.estimate_interval,
        change.first_order,
        change.exact,
        exact_low,
        exact_high,
    )
    return dict(zip(_COLUMNS, values, strict=True))


def write_csv(changes: Sequence[CellChange], file: Path) -> None:
    """Write one line per change; ``expert`` is empty at a site without experts, ``exact`` if nothing was evaluated."""
    # The whole text is built first, because the file is replaced at once.
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(_row(change) for change in changes)
    write_atomically(file, text.getvalue())


def markdown(found: Sensitivity, *, title: str) -> str:
    """Return the agreement of estimate and evaluation, and the most sensitive cells."""
    parts = [
        f"# {title}",
        f"Loss {found.loss:.4f} nats per token at mean S {found.plan.mean:.3f}, on {found.num_sequences} "
        f"validation sequences of {found.documents} documents. Changes are in nats per token; intervals are 95 % "
        "by bootstrap over documents.",
    ]
    if found.exact_seconds is not None:
        parts += [
            f"The estimate took {found.estimate_seconds:.2f} s, one forward and {1 + DRAWS} backward passes; the "
            f"evaluations {found.exact_seconds:.1f} s, {found.evaluations} forward passes: "
            f"{found.times_cheaper:.0f} times as long.",
            table(AGREEMENT_HEAD, agreement_rows(found)),
            READING,
        ]
    parts += ["Most sensitive cells:", table(CELLS_HEAD, costliest_rows(found))]
    if found.routing:
        parts += ["Other ranks of choice in one layer:", table(ROUTING_HEAD, routing_rows(found))]
    if found.plans is not None:
        parts.append(plans_line(found.plans))
    return "\n\n".join(parts) + "\n"


def routing_rows(found: Measured) -> list[tuple[str, ...]]:
    """Return the changes of routing as text, in the order of ``ROUTING_HEAD``."""
    return [
        (
            str(change.cell.layer),
            change.cell.choice.name,
            _with_interval(change.estimate, change.estimate_interval),
            "–"
            if change.exact is None or change.exact_interval is None
            else _with_interval(change.exact, change.exact_interval),
        )
        for change in found.routing
    ]


def plans_line(plans: PlanAgreement) -> str:
    """Return the agreement of whole plans in one sentence."""
    alone, routed = f"Spearman {plans.spearman:.3f}, Pearson {plans.pearson:.3f}", plans.with_routing
    said = f"{len(plans.evaluated)} random plans of both sparsities, estimated as a whole and evaluated: "
    if routed is None:
        return f"{said}{alone}."
    return (
        f"{said}Spearman {routed.spearman:.3f}, Pearson {routed.pearson:.3f} with the evaluated change of every choice "
        f"of ranks of one layer; {alone} without any evaluation."
    )


def agreement_rows(found: Measured) -> list[tuple[str, ...]]:
    """Return the cells of the agreement table as text, in the order of ``AGREEMENT_HEAD``."""
    return [
        (
            "all" if one.sparsity is None else f"{one.sparsity:.3g}",
            str(one.points),
            *(_correlation(value) for value in (one.spearman, one.pearson, one.spearman_first_order)),
            _correlation(one.spearman_halves),
            str(one.decided),
            _correlation(one.spearman_decided),
        )
        for one in found.agreement
    ]


def _correlation(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def costliest_rows(found: Measured) -> list[tuple[str, ...]]:
    """Return the ten most sensitive cells at their costliest S, by the evaluated change if there is one."""
    by_cell: dict[Any, CellChange] = {}
    for change in sorted(found.changes, key=_cost):
        by_cell[change.cell] = change
    # Sorted ascending before, so that the costliest S of each cell was stored last.
    return _cell_rows(sorted(by_cell.values(), key=_cost, reverse=True))


def cheapest_rows(found: Measured) -> list[tuple[str, ...]]:
    """Return the ten least sensitive cells at the largest S that was tried, in the same form."""
    largest = max(change.sparsity for change in found.changes)
    return _cell_rows(sorted((change for change in found.changes if change.sparsity == largest), key=_cost))


def _cell_rows(changes: Sequence[CellChange]) -> list[tuple[str, ...]]:
    return [
        (
            change.cell.name,
            f"{change.sparsity:.3g}",
            _with_interval(change.estimate, change.estimate_interval),
            "–"
            if change.exact is None or change.exact_interval is None
            else _with_interval(change.exact, change.exact_interval),
        )
        for change in changes[:_MOST_LISTED]
    ]


def _cost(change: CellChange) -> float:
    return change.estimate if change.exact is None else change.exact


def _with_interval(value: float, interval: tuple[float, float]) -> str:
    return f"{value:+.4f} ({interval[0]:+.4f} to {interval[1]:+.4f})"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))
