"""Figures of the loss against S: at all sites, or in the cells that a grid scans, with one line per group of cells."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from qsparse_moe.ablation.cells import Cell
from qsparse_moe.ablation.grid.panels import LOSS, legend, panels_of, split_by
from qsparse_moe.ablation.grid.variants import (
    VariantResult,
    cells_label,
    changed_cells,
    choice_labels,
    is_sparsity,
    other_settings,
    seeds_text,
    varied_sparsity,
)

_SHAPE = ("hidden_size", "num_layers")
_SHAPE_PATHS = ("model.hidden_size", "model.num_layers", "model.num_heads", "model.num_kv_heads")
_EXPERT_PATHS = ("model.moe.num_experts", "model.moe.experts_per_token", "model.moe.expert_hidden_size")
_MOST_PANELS = 4
_MOST_LINES = 12  # ten colours, two of them once more with a dashed line
_MOST_CHARACTERS = 70
MEAN = "mean S of the plan"


def loss_by_sparsity(variants: Sequence[VariantResult]) -> Figure | None:
    """Draw the loss against S, with one line per E, A, and further varied settings, and one panel per width and depth.

    S is that of the cells in which the grid varies it, which the axis names, or the mean of the plan if both agree.
    None if S does not vary, or if variants set it in different cells.
    """
    axis_label, sparsities = sparsity_axis(variants)
    # A single S is no curve.
    if len(set(sparsities)) < 2:
        return None
    # A variant contains dicts, so it cannot be a key itself.
    x_of = dict(zip(map(id, variants), sparsities, strict=True))
    panels = split_by(variants, _SHAPE)
    if len(panels) > _MOST_PANELS:
        return None
    figure, axes = panels_of(panels)
    for axis, panel in zip(axes, panels.values(), strict=True):
        for position, (label, line) in enumerate(_lines(panel).items()):
            line = sorted(line, key=lambda variant: x_of[id(variant)])
            x, y = [x_of[id(variant)] for variant in line], [variant.loss for variant in line]
            bars = [variant.spread for variant in line] if any(variant.spread for variant in line) else None
            axis.errorbar(x, y, bars, label=label, color=f"C{position % 10}", marker="o", markersize=4, capsize=2)
        axis.set_xlabel(axis_label)
        axis.set_ylabel(LOSS)
    legend(figure, axes, seeds_text(variants))
    return figure


def sparsity_axis(variants: Sequence[VariantResult]) -> tuple[str, list[float]]:
    """Return the label of the S axis and S of every variant; no values if no single S describes each variant."""
    cells = varied_sparsity(variants)
    if cells:
        by_variant = list(zip(*cells.values(), strict=True)) if _complete(cells, len(variants)) else []
        # Several values of S in one variant have no single position on the axis.
        if not by_variant or any(len(set(values)) > 1 for values in by_variant):
            return "", []
        found = [values[0] for values in by_variant]
        if all(math.isclose(value, variant.record["sparsity"]) for value, variant in zip(found, variants, strict=True)):
            return MEAN, found
        return f"S at {shortened(cells_label(cells))}", found
    ways = {frozenset(path for path in variant.record["settings"] if is_sparsity(path)) for variant in variants}
    whole = not any(
        path.startswith(("model.sparsity.overrides", "model.sparsity.plan")) for way in ways for path in way
    )
    return (
        (MEAN, [variant.record["sparsity"] for variant in variants])
        if len(ways - {frozenset()}) <= 1 and whole
        else ("", [])
    )


def shortened(label: str) -> str:
    """Return ``label``, or a general phrase if it is too long for an axis."""
    return label if len(label) <= _MOST_CHARACTERS else "the cells that the grid varies"


def _complete(cells: Mapping[Cell, Sequence[float]], num_variants: int) -> bool:
    return all(len(values) == num_variants for values in cells.values())


def loss_by_cell(variants: Sequence[VariantResult]) -> Figure | None:
    """Draw the change of the loss against S of the changed cells, with one line per group of cells.

    The change is that against the first variant, seed by seed, so that effects of a seed on both do not widen the
    spread. None if no group of cells has two values of S, or if there are too many lines to distinguish.
    """
    if not variants or sparsity_axis(variants)[1]:
        return None
    base, lines = variants[0], defaultdict[tuple[Cell, ...], list[tuple[float, VariantResult]]](list)
    for variant in variants[1:]:
        changed = changed_cells(base, variant)
        # Only variants that change nothing but S, and to one value, have a position on the axis.
        if changed and len(set(changed.values())) == 1 and other_settings(variant) == other_settings(base):
            lines[tuple(changed)].append((next(iter(changed.values())), variant))
    if not lines or max(map(len, lines.values())) < 2 or len(lines) > _MOST_LINES:
        return None
    figure, axes = panels_of([""])
    axes[0].axhline(0.0, color="0.5", linewidth=0.8, linestyle=":", label=str(base.record["variant"]), zorder=0)
    for position, (cells, line) in enumerate(lines.items()):
        # The first variant starts the line at its own S, if that is one value in all of these cells.
        begin = _sparsity_at(base, cells, line[0][1])
        line = sorted([*([] if begin is None else [(begin, base)]), *line], key=lambda pair: pair[0])
        changes = [_change(base, variant) for _, variant in line]
        # A small shift per line, so that error bars at the same S do not cover each other.
        shift = 0.006 * (position - (len(lines) - 1) / 2)
        axes[0].errorbar(
            [s + shift for s, _ in line],
            [change for change, _ in changes],
            [spread for _, spread in changes] if any(spread for _, spread in changes) else None,
            label=shortened(cells_label(cells)),
            color=f"C{position % 10}",
            linestyle="-" if position < 10 else "--",
            marker="o",
            markersize=4,
            capsize=2,
        )
    axes[0].set_xlabel("S of the cells that the line names")
    axes[0].set_ylabel("change of the validation loss, nats per token")
    legend(figure, axes, seeds_text(variants))
    return figure


def _change(base: VariantResult, variant: VariantResult) -> tuple[float, float]:
    """Return the mean change over the common seeds and its standard deviation, which is 0 with one common seed."""
    changes = [variant.by_seed[seed] - base.by_seed[seed] for seed in base.by_seed if seed in variant.by_seed]
    if not changes:
        return variant.loss - base.loss, 0.0
    return statistics.mean(changes), statistics.stdev(changes) if len(changes) > 1 else 0.0


def _sparsity_at(base: VariantResult, cells: Sequence[Cell], other: VariantResult) -> float | None:
    """Return S of ``base`` in cells in which ``other`` differs; None if it is not the same in all of them."""
    both = varied_sparsity((base, other))
    values = {both[cell][0] for cell in cells}
    return values.pop() if len(values) == 1 else None


def _lines(variants: Sequence[VariantResult]) -> dict[str, list[VariantResult]]:
    """Return the variants of a panel by label: E and A, and the other settings that vary besides S."""
    known = (*_SHAPE_PATHS, *_EXPERT_PATHS)
    paths = {
        path
        for variant in variants
        for path in variant.record["settings"]
        if not is_sparsity(path) and path not in known
    }
    # Settings that are the same in the whole panel do not distinguish lines.
    varying = {path for path in paths if len({repr(variant.record["settings"].get(path)) for variant in variants}) > 1}
    lines: dict[str, list[VariantResult]] = defaultdict(list)
    for variant in variants:
        experts = f"E={variant.record['num_experts']}, A={variant.record['experts_per_token']}"
        lines[", ".join([experts, *choice_labels(variant, varying)])].append(variant)
    return lines
