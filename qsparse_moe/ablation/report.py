"""The outcomes of a grid as lines of JSON and as Markdown tables."""

from __future__ import annotations

import json
import os
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from qsparse_moe.ablation.grid import Grid
from qsparse_moe.ablation.run import Outcome

RESULTS = "results.jsonl"
REPORT = "report.md"


def write_results(grid: Grid, outcomes: Sequence[Outcome], folder: Path) -> None:
    """Write ``results.jsonl`` and ``report.md``, each at once or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"grid": grid.name, **outcome.as_dict()}) for outcome in outcomes]
    for name, text in ((RESULTS, "\n".join(lines)), (REPORT, markdown(grid, outcomes))):
        part = folder / f"{name}.part"
        part.write_text(text + "\n", "utf-8")
        os.replace(part, folder / name)


def markdown(grid: Grid, outcomes: Sequence[Outcome]) -> str:
    """What the runs came to, and below it the gradient norms by layer where a run has them."""
    tables = [_quality(grid, outcomes)]
    if any(outcome.layer_grad_norms for outcome in outcomes):
        tables.append(
            "Gradient norm by layer, of the layer's matrices and before clipping: mean over the logged steps of the "
            "second half of a run, then mean ± spread over the seeds."
        )
        tables.append(_gradients(grid, outcomes))
    return "\n\n".join(tables)


def _quality(grid: Grid, outcomes: Sequence[Outcome]) -> str:
    """A row a variant: bits a byte by seed, mean and spread, and the distance from the first variant, seed by seed.

    The spread is the standard deviation over the seeds. A run that is missing has a dash.
    """
    seeds = list(dict.fromkeys(outcome.seed for outcome in outcomes))
    by_place = {(outcome.variant, outcome.seed): outcome for outcome in outcomes}
    head = ["variant", *(f"seed {seed}" for seed in seeds), "mean ± spread", f"against {grid.variants[0]}"]
    head += ["parameters kept", "tokens/s"]
    rows = []
    first = [by_place[grid.variants[0], seed].bits_per_byte for seed in seeds]
    for variant in grid.variants:
        found = [by_place[variant, seed] for seed in seeds]
        bits = [outcome.bits_per_byte for outcome in found]
        apart = [b - a for a, b in zip(first, bits, strict=True) if a is not None and b is not None]
        rates = [outcome.tokens_per_second for outcome in found if outcome.tokens_per_second]
        rows.append(
            [
                variant,
                *("–" if value is None else f"{value:.4f}" for value in bits),
                _spread([value for value in bits if value is not None]),
                _spread(apart, sign="+"),
                f"{found[0].kept_parameters:,.0f}",
                f"{statistics.median(rates):,.0f}" if rates else "–",
            ]
        )
    return _table(head, rows)


def _gradients(grid: Grid, outcomes: Sequence[Outcome]) -> str:
    """A row a variant, a column a layer. Three digits each: across the layers they may lie orders apart."""
    found: dict[tuple[str, int], list[float]] = defaultdict(list)
    for outcome in outcomes:
        for layer, norm in enumerate(outcome.layer_grad_norms or ()):
            found[outcome.variant, layer].append(norm)
    layers = range(1 + max(layer for _, layer in found))
    rows = [
        [variant, *(_spread(found.get((variant, layer), ()), digits=".3g") for layer in layers)]
        for variant in grid.variants
    ]
    return _table(["variant", *(f"layer {layer}" for layer in layers)], rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def _spread(values: Sequence[float], sign: str = "", digits: str = ".4f") -> str:
    if not values:
        return "–"
    mean = f"{statistics.mean(values):{sign}{digits}}"
    return f"{mean} ± {statistics.stdev(values):{digits}}" if len(values) > 1 else mean
