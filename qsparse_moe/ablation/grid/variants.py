"""Combine the records of a grid per variant, over its seeds, and find the cells in which variants differ in S.

Imports no torch, so that figures can be drawn without it.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from qsparse_moe.ablation.cells import Cell
from qsparse_moe.config.labels import place_label, ranges_text, setting_label
from qsparse_moe.config.schema import Site
from qsparse_moe.config.shapes import EXPERT_SITES

Record = Mapping[str, Any]
"""A line of ``results.jsonl``."""
S_PATHS = ("model.sparsity.default", "model.sparsity.sites", "model.sparsity.overrides", "model.sparsity.plan")
"""Settings of S. Variants that differ only in these belong to one line of a figure."""


class VariantResult(NamedTuple):
    """The result of one variant of a grid over its seeds."""

    record: Record
    """The record of its first seed; settings and sizes are the same for all seeds."""
    loss: float
    """Mean of the loss over the seeds."""
    spread: float
    """Standard deviation over the seeds; 0 with one seed."""
    by_seed: Mapping[int, float] = {}
    """Loss of every finished run, by seed."""


def variant_results(records: Sequence[Record]) -> list[VariantResult]:
    """Return one result per variant from its finished runs, in the order of the records."""
    by_variant: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        if record["finished"] and record["loss"] is not None:
            by_variant[record["variant"]].append(record)
    variants = []
    for found in by_variant.values():
        losses = [record["loss"] for record in found]
        spread = statistics.stdev(losses) if len(losses) > 1 else 0.0
        by_seed = {record.get("seed", index): record["loss"] for index, record in enumerate(found)}
        variants.append(VariantResult(found[0], statistics.mean(losses), spread, by_seed))
    return variants


def seeds_text(variants: Sequence[VariantResult]) -> str:
    """Return the note of a figure that says how many seeds its marks average."""
    counts = {max(len(variant.by_seed), 1) for variant in variants}
    if counts == {1}:
        return "one seed: no spread known"
    least, most = min(counts), max(counts)
    return f"mean ± standard deviation over {least if least == most else f'{least} to {most}'} seeds"


def is_sparsity(path: str) -> bool:
    """Return whether ``path`` is a setting of S."""
    return any(path == known or path.startswith(f"{known}.") for known in S_PATHS)


def other_settings(variant: VariantResult) -> dict[str, str]:
    """Return the settings of the variant other than S, by path, as text."""
    return {path: repr(value) for path, value in variant.record["settings"].items() if not is_sparsity(path)}


def varied_sparsity(variants: Iterable[VariantResult]) -> dict[Cell, list[float]]:
    """Return S per cell and variant, for the cells in which not all variants have the same S.

    The expert of a cell is None where no variant distinguishes the experts of the layer.
    """
    entries = [variant.record.get("varied_sparsity") or () for variant in variants]
    # A site is split into experts as soon as one variant lists them. A variant that gives all experts one S must then
    # be expanded to the same experts, or its S would be missing from their cells.
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
                found[Cell(layer, site, expert)].append(sparsity)
    return {cell: values for cell, values in found.items() if len(set(values)) > 1}


def changed_cells(base: VariantResult, variant: VariantResult) -> dict[Cell, float]:
    """Return S of ``variant`` in the cells in which it differs from ``base``."""
    return {cell: values[1] for cell, values in varied_sparsity((base, variant)).items()}


def cells_label(cells: Iterable[Cell]) -> str:
    """Return a short label of the cells, such as ``layer 3 experts 0-1 expert_hidden``."""
    by_expert: dict[tuple[Site, tuple[int | None, ...]], list[int]] = defaultdict(list)
    experts: dict[tuple[int, Site], list[int | None]] = defaultdict(list)
    for layer, site, expert in cells:
        experts[layer, site].append(expert)
    for (layer, site), own in experts.items():
        by_expert[site, tuple(own)].append(layer)
    by_layers: dict[tuple[str, tuple[int | None, ...]], list[Site]] = defaultdict(list)
    for (site, chosen), numbers in by_expert.items():
        by_layers[ranges_text(numbers), chosen].append(site)
    # Layers of equal experts and sites of equal layers are merged, because a legend has little space.
    words = []
    for (layers, chosen), sites in by_layers.items():
        numbers = [expert for expert in chosen if expert is not None]
        every = bool(EXPERT_SITES & set(sites)) and not numbers
        which = ranges_text(numbers) if numbers else None
        text = place_label(layers, " and ".join(sites), which)
        words.append(f"{text}, every expert" if every else text)
    return "; ".join(words)


def choice_labels(variant: VariantResult, paths: set[str]) -> list[str]:
    """Return the labels of the choices of the variant that set some of ``paths``."""
    choices = variant.record.get("choices") or ()
    if choices:
        return [label for label, own in choices if paths & set(own)]
    return [setting_label(path, value) for path, value in variant.record["settings"].items() if path in paths]
