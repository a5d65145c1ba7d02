"""Shared parts of the figures of a grid: panels side by side, a colour bar, and a legend beside the panels."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure

from qsparse_moe.ablation.grid.variants import VariantResult

LOSS = "validation loss, nats per token"
_LETTERS = {"hidden_size": "D", "num_layers": "L", "experts_per_token": "A"}


def panels_of(titles: Iterable[str]) -> tuple[Figure, list[Axes]]:
    """Return a figure with an empty panel for each title, side by side."""
    titles = list(titles)
    figure = Figure(figsize=(1 + 4.6 * len(titles), 4), dpi=120, layout="constrained")
    axes = [figure.add_subplot(1, len(titles), position + 1) for position in range(len(titles))]
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, fontsize=9)
        axis.tick_params(labelsize=8)
        axis.xaxis.label.set_fontsize(9)
        axis.yaxis.label.set_fontsize(9)
    return figure, axes


def colour_bar(figure: Figure, axes: Sequence[Axes], drawn: ScalarMappable, label: str, **settings: Any) -> None:
    """Add one colour bar for all ``axes``, with labels of the same font size."""
    axis = figure.colorbar(drawn, ax=axes, label=label, **settings).ax
    axis.tick_params(labelsize=8)
    axis.yaxis.label.set_fontsize(9)


def legend(figure: Figure, axes: Sequence[Axes], note: str = "") -> None:
    """Add one legend beside the panels, with each label once and an optional note as its title."""
    by_label: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            by_label.setdefault(label, handle)
    chosen = figure.legend(
        list(by_label.values()), list(by_label), loc="outside right upper", fontsize=7, title=note or None
    )
    chosen.get_title().set_fontsize(7)
    # The legend takes its width from the panels unless the figure grows with the longest label.
    figure.set_figwidth(figure.get_figwidth() + 0.06 * max(map(len, (note, *by_label))))
    # A long legend would otherwise be cut off at the bottom.
    high = 0.9 + 0.17 * len(by_label)
    if high > figure.get_figheight():
        figure.set_figheight(high)


def split_by(variants: Sequence[VariantResult], names: Sequence[str]) -> dict[str, list[VariantResult]]:
    """Return the variants by the title of their panel, which gives the values of ``names`` that vary."""
    varying = [name for name in names if len({variant.record[name] for variant in variants}) > 1]
    panels: dict[str, list[VariantResult]] = defaultdict(list)
    for variant in variants:
        panels[", ".join(f"{_LETTERS[name]}={variant.record[name]}" for name in varying)].append(variant)
    return panels
