"""The figures of a grid, each drawn only if the results vary what it shows."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from qsparse_moe.ablation.grid.expert_figures import expert_maps
from qsparse_moe.ablation.grid.panels import LOSS, colour_bar, panels_of, split_by
from qsparse_moe.ablation.grid.scan_figures import MEAN, loss_by_cell, loss_by_sparsity, sparsity_axis
from qsparse_moe.ablation.grid.variants import Record, VariantResult, variant_results
from qsparse_moe.ablation.page.parts import Drawing
from qsparse_moe.errors import naming

_SHAPE = ("hidden_size", "num_layers")
_MOST_PANELS = 4
_MOST_NAMES = 6
_WIDE = 8.0
"""Costs that differ by more than this factor get a logarithmic axis."""
_PAPER = {"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 0.5}


def grid_drawings(records: Sequence[Record]) -> dict[str, Drawing]:
    """Return the figures that apply to ``records`` by name."""
    variants = variant_results(records)
    return existing(
        {
            "loss-by-sparsity": ("Validation loss by S and experts", loss_by_sparsity(variants)),
            "loss-by-place": ("Change of the validation loss by S of the changed cells", loss_by_cell(variants)),
            "loss-by-expert": ("Change of the validation loss by changed expert", expert_maps(variants)),
            "loss-by-parameters": ("Validation loss by active parameters", loss_by_parameters(variants)),
            "iso-loss": ("Validation loss over E/A and S", iso_loss(variants)),
        }
    )


def existing(figures: Mapping[str, tuple[str, Figure | None]]) -> dict[str, Drawing]:
    """Return the figures that exist, from titles and figures by name. Their values are in the tables of the report."""
    return {name: Drawing(title, figure, ()) for name, (title, figure) in figures.items() if figure is not None}


def write_figures(drawings: Mapping[str, Drawing], folder: Path) -> dict[str, str]:
    """Write the figures as PNG files, and return their titles by file name."""
    for name, drawing in drawings.items():
        file = folder / f"{name}.png"
        # Renamed when complete, so that a reader never sees half a picture.
        part = folder / f"{file.name}.part"
        with naming(part):
            FigureCanvasAgg(drawing.figure).print_png(str(part))
        os.replace(part, file)
    return {f"{name}.png": drawing.title for name, drawing in drawings.items()}


def loss_by_parameters(variants: Sequence[VariantResult]) -> Figure | None:
    """Draw the loss against active parameters, by routing and with Q-Sparse, with the Pareto fronts.

    None if neither count varies.
    """
    names = {
        "active_parameters": "thousand parameters active by routing",
        "kept_parameters": "thousand needed parameters",
    }
    shown = [name for name in names if len({variant.record[name] for variant in variants}) > 1]
    if not shown:
        return None
    figure, axes = panels_of(dict.fromkeys(names[name] for name in shown))
    for axis, name in zip(axes, shown, strict=True):
        colored = _scatter(axis, variants, name)
        axis.set_xlabel(names[name])
        axis.set_title("")
    colour_bar(figure, axes, colored, MEAN)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper left", fontsize=7)
    return figure


def pareto_front(variants: Sequence[VariantResult], cost: str) -> list[VariantResult]:
    """Return the variants that no other beats in loss at the same or a lower ``cost``, in ascending cost."""
    front: list[VariantResult] = []
    # In ascending cost, a variant is on the front exactly if it is better than all cheaper ones.
    for variant in sorted(variants, key=lambda variant: (variant.record[cost], variant.loss)):
        if not front or variant.loss < front[-1].loss:
            front.append(variant)
    return front


def iso_loss(variants: Sequence[VariantResult]) -> Figure | None:
    """Draw contours of equal loss over E/A and S, in one panel per width, depth, and A with a complete map.

    None if there is no such panel.
    """
    if sparsity_axis(variants)[0] != MEAN:
        return None
    by_panel = split_by(variants, (*_SHAPE, "experts_per_token"))
    if len(by_panel) > _MOST_PANELS:
        # Panels may share several values of A, because the axis E / A still distinguishes the variants.
        by_panel = split_by(variants, _SHAPE)
    maps = {name: found for name, panel in by_panel.items() if (found := _complete_map(panel)) is not None}
    if not maps or len(maps) > _MOST_PANELS:
        return None
    figure, axes = panels_of(maps)
    levels = _levels([loss for _, _, losses in maps.values() for line in losses for loss in line])
    for axis, (ratios, sparsities, losses) in zip(axes, maps.values(), strict=True):
        filled = axis.contourf(sparsities, ratios, losses, levels=levels, cmap="viridis_r", extend="both")
        axis.contour(sparsities, ratios, losses, levels=levels, colors="black", linewidths=0.5)
        # Dots mark the measured variants; everything between them is interpolation.
        x, y = [s for s in sparsities for _ in ratios], [r for _ in sparsities for r in ratios]
        # The outermost dots lie on the border of the panel, which would cut them in half.
        axis.plot(x, y, "k.", markersize=4, clip_on=False)
        axis.set_yscale("log", base=2)
        axis.set_yticks(ratios, [f"{ratio:g}" for ratio in ratios])
        axis.set_xlabel(MEAN)
        axis.set_ylabel("E / A")
    colour_bar(figure, axes, filled, LOSS, format="%.4f")
    return figure


def _name(variant: VariantResult) -> str:
    """Return the labels of the choices that make up the variant."""
    labels = [label for label, _ in variant.record.get("choices") or ()]
    return ", ".join(labels) or str(variant.record["variant"])


def _scatter(axis: Axes, variants: Sequence[VariantResult], cost: str) -> PathCollection:
    front = pareto_front(variants, cost)
    x, y = [variant.record[cost] / 1e3 for variant in front], [variant.loss for variant in front]
    # Between two costs, the best loss that can be had is that of the cheaper variant.
    axis.step(x, y, "k--", where="post", linewidth=1, label="Pareto front", zorder=1)
    middle = (
        min(variant.record[cost] for variant in variants) + max(variant.record[cost] for variant in variants)
    ) / 2e3
    # More names than this overlap.
    for variant, left, low in zip(front, x, y, strict=True) if len(front) <= _MOST_NAMES else ():
        away = 4 if left <= middle else -4  # towards the middle, because names may be long
        side = "left" if away > 0 else "right"
        axis.annotate(
            _name(variant),
            (left, low),
            (away, -9),
            textcoords="offset points",
            ha=side,
            fontsize=6,
            zorder=3,
            bbox=_PAPER,
        )
    values = [variant.record[cost] for variant in variants]
    axis.margins(x=0.25, y=0.1)
    if max(values) > _WIDE * min(values):
        axis.set_xscale("log")
        axis.margins(x=0.15)
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_ylabel(LOSS)
    costs, losses = [variant.record[cost] / 1e3 for variant in variants], [variant.loss for variant in variants]
    return axis.scatter(costs, losses, c=[variant.record["sparsity"] for variant in variants], cmap="viridis", zorder=2)


def _complete_map(variants: Sequence[VariantResult]) -> tuple[list[float], list[float], list[list[float]]] | None:
    """Return E/A, S, and the loss at each pair; None unless there is exactly one variant at each of at least 2 x 2."""
    # Rounded, because the mean S over different numbers of experts differs in the last bits.
    found = {
        (p.record["num_experts"] / p.record["experts_per_token"], round(p.record["sparsity"], 6)): p.loss
        for p in variants
    }
    ratios, sparsities = sorted({ratio for ratio, _ in found}), sorted({sparsity for _, sparsity in found})
    is_complete = len(found) == len(variants) == len(ratios) * len(sparsities)
    if min(len(ratios), len(sparsities)) < 2 or not is_complete:
        return None
    return ratios, sparsities, [[found[ratio, sparsity] for sparsity in sparsities] for ratio in ratios]


def _levels(losses: Sequence[float]) -> list[float]:
    least, most = min(losses), max(losses)
    # Equal losses would give levels that do not increase, which contourf refuses.
    step = max(most - least, 1e-6) / 10
    return [least + step * index for index in range(11)]
