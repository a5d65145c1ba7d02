"""The rows of a grid's results as points: the seeds of a variant together, and where its S is another. No torch."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from qsparse_moe.config.labels import place_label, ranges_text, setting_label
from qsparse_moe.config.schema import Site
from qsparse_moe.config.shapes import EXPERT_SITES

Row = Mapping[str, Any]
S_PATHS = ("model.sparsity.default", "model.sparsity.sites", "model.sparsity.overrides", "model.sparsity.plan")
"""Settings of S: a point of a line may differ from the next in them."""
Cell = tuple[int, Site, int | None]
"""Layer, site, and expert, which is None where all experts of the layer have one S or the site has none."""


class VariantResult(NamedTuple):
    """A point of a grid: the rows of its seeds as one."""

    row: Row
    loss: float
    spread: float
    """Standard deviation over the seeds; 0 with one seed."""
    by_seed: Mapping[int, float] = {}
    """The loss of every finished run."""


def variant_results(rows: Sequence[Row]) -> list[VariantResult]:
    """Return the finished runs, the seeds of a variant as one point, in their order."""
    by_variant: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row["finished"] and row["loss"] is not None:
            by_variant[row["variant"]].append(row)
    points = []
    for found in by_variant.values():
        losses = [row["loss"] for row in found]
        spread = statistics.stdev(losses) if len(losses) > 1 else 0.0
        by_seed = {row.get("seed", place): row["loss"] for place, row in enumerate(found)}
        points.append(VariantResult(found[0], statistics.mean(losses), spread, by_seed))
    return points


def seeds_text(points: Sequence[VariantResult]) -> str:
    """Return what the marks of a figure are over the seeds."""
    counts = {max(len(point.by_seed), 1) for point in points}
    if counts == {1}:
        return "one seed: no spread known"
    least, most = min(counts), max(counts)
    return f"mean ± standard deviation over {least if least == most else f'{least} to {most}'} seeds"


def is_sparsity(path: str) -> bool:
    """Return whether ``path`` is a setting of S."""
    return any(path == known or path.startswith(f"{known}.") for known in S_PATHS)


def other_settings(point: VariantResult) -> dict[str, str]:
    """Return what the point sets beside S, by path, as text."""
    return {path: repr(value) for path, value in point.row["settings"].items() if not is_sparsity(path)}


def varied_sparsity(points: Iterable[VariantResult]) -> dict[Cell, list[float]]:
    """Return S of every point at each place that is not the same in all of them; experts apart where they differ."""
    entries = [point.row.get("varied_sparsity") or () for point in points]
    split = {(layer, site) for own in entries for layer, site, experts, _ in own if experts is not None}
    known = {(layer, site): set[int]() for layer, site in split}
    for layer, site, experts, _ in (entry for own in entries for entry in own):
        if experts is not None:
            known[layer, site].update(experts)
    found: dict[Cell, list[float]] = defaultdict(list)
    for own in entries:
        for layer, site, experts, sparsity in own:
            listed: Sequence[int | None] = (
                experts if experts is not None else sorted(known.get((layer, site), ())) or [None]
            )
            for expert in listed:
                found[layer, site, expert].append(sparsity)
    return {place: values for place, values in found.items() if len(set(values)) > 1}


def changed_cells(base: VariantResult, point: VariantResult) -> dict[Cell, float]:
    """Return S of ``point`` wherever it is another than that of ``base``."""
    return {place: values[1] for place, values in varied_sparsity((base, point)).items()}


def cells_label(places: Iterable[Cell]) -> str:
    """Return the places in few words: ``layer 3 experts 0-1 expert_hidden``."""
    by_expert: dict[tuple[Site, tuple[int | None, ...]], list[int]] = defaultdict(list)
    experts: dict[tuple[int, Site], list[int | None]] = defaultdict(list)
    for layer, site, expert in places:
        experts[layer, site].append(expert)
    for (layer, site), own in experts.items():
        by_expert[site, tuple(own)].append(layer)
    by_layers: dict[tuple[str, tuple[int | None, ...]], list[Site]] = defaultdict(list)
    for (site, chosen), numbers in by_expert.items():
        by_layers[ranges_text(numbers), chosen].append(site)
    words = []
    for (layers, chosen), sites in by_layers.items():
        numbers = [expert for expert in chosen if expert is not None]
        every = bool(EXPERT_SITES & set(sites)) and not numbers
        which = ranges_text(numbers) if numbers else None
        text = place_label(layers, " and ".join(sites), which)
        words.append(f"{text}, every expert" if every else text)
    return "; ".join(words)


def choice_labels(point: VariantResult, paths: set[str]) -> list[str]:
    """Return the labels of the point's variant and settings of axes that set some of ``paths``."""
    choices = point.row.get("choices") or ()
    if choices:
        return [label for label, own in choices if paths & set(own)]
    return [setting_label(path, value) for path, value in point.row["settings"].items() if path in paths]
