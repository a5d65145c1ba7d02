"""Heat maps (layers x experts) of a change of the loss, with one colour scale for all panels and hatched noise.

L layers, E experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, SymLogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from qsparse_moe.ablation.grid.panels import colour_bar
from qsparse_moe.ablation.page.parts import Table
from qsparse_moe.data.packing import Array

UNIT = "change of the loss,\n1/1000 nats per token"
# More cells than this are too small on the page for a readable number.
_MOST_LABELLED = 160
_MOST_COLUMNS = 3
_WIDEST = 11.0
"""Largest width of a line of panels, in inches."""
_WIDE = 30.0
"""The scale becomes logarithmic away from 0 when the largest change exceeds the median change by this factor."""
_MISSING = "0.82"


@dataclass(frozen=True)
class CellMap:
    """One panel of the figure."""

    title: str
    layers: tuple[int, ...]
    """The layer that each row of the map shows."""
    change_LE: Array
    """The change of the loss in nats per token; nan where there is no such cell."""
    noise_LE: Array
    """bool, true where the change cannot be distinguished from 0."""


def scale_over(changes: Iterable[float]) -> Normalize:
    """Return a colour scale in thousandths of a nat that covers all of ``changes``, given in nats per token.

    The scale is symmetric around 0. It is logarithmic away from 0 if the changes differ by orders of magnitude.
    """
    sizes = np.abs(1000 * np.asarray([change for change in changes if np.isfinite(change)]))
    # A scale from 0 to 0 has no colours, so changes that are all 0 get a tiny range.
    largest = max(float(sizes.max(initial=0.0)), 1e-9)
    others = sizes[sizes > 1e-6 * largest]
    # The median leaves out exact zeros, such as experts without tokens, which would hide the typical size.
    typical = float(np.median(others)) if len(others) else largest
    if largest <= _WIDE * typical:
        return Normalize(-largest, largest)
    linear = 10.0 ** np.floor(np.log10(typical))
    return SymLogNorm(linear, linscale=0.5, vmin=-largest, vmax=largest)


def draw_maps(
    panels: Sequence[CellMap], scale: Normalize, *, title: str, missing: str, noise: str | None, note: str = ""
) -> Figure:
    """Draw every panel on one scale, in thousandths of a nat per token. White means no change.

    Args:
        panels: the panels in reading order, up to three per line.
        scale: the result of ``scale_over`` for these panels, or for those of several figures that are compared.
        title: the title of the figure.
        missing: the reason why a grey cell has no value, for the legend.
        noise: the criterion for hatched cells, for the legend; None if the noise is unknown and no cell is hatched.
        note: an optional second line of the title.
    """
    num_experts = max(panel.change_LE.shape[1] for panel in panels)
    most_layers = max(len(panel.layers) for panel in panels)
    wide, high = min(_WIDEST, max(2.6, 0.55 * num_experts + 1.0)), 1.1 + max(0.9, min(6.0, 0.4 * most_layers))
    # A figure that a page has to shrink cannot be read.
    num_columns = min(len(panels), _MOST_COLUMNS, max(1, int(_WIDEST // wide)))
    num_rows = -(-len(panels) // num_columns)
    size = max(6.4, num_columns * wide + 1.6), num_rows * high + (1.3 if noise or note else 0.9)
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    figure.suptitle("\n".join(filter(None, (title, note))), fontsize=9)
    axes = [figure.add_subplot(num_rows, num_columns, index + 1) for index in range(len(panels))]
    for axis, panel in zip(axes, panels, strict=True):
        image = axis.imshow(1000 * panel.change_LE, cmap="RdBu_r", norm=scale, aspect="auto")
        # The background shows where there is no cell; it is grey, because white means no change.
        axis.set_facecolor(_MISSING)
        axis.set_title(panel.title, fontsize=8)
        axis.set_ylabel("layer", fontsize=8)
        step = -(-len(panel.layers) // 16)  # at most 16 tick labels fit side by side
        axis.set_yticks(range(0, len(panel.layers), step), [str(n) for n in panel.layers[::step]], fontsize=8)
        _label_experts(axis, panel.change_LE.shape[1])
        _hatch_noise(axis, panel.noise_LE)
        if panel.change_LE.size <= _MOST_LABELLED:
            _write_values(axis, panel, scale)
    colour_bar(figure, axes, image, UNIT, pad=0.02)
    legend_entries = []
    if noise is not None:
        legend_entries.append(Patch(facecolor="white", edgecolor="0.5", hatch="////", label=noise))
    if any(np.isnan(panel.change_LE).any() for panel in panels):
        legend_entries.append(Patch(facecolor=_MISSING, label=missing))
    if legend_entries:
        figure.legend(
            handles=legend_entries, loc="outside lower center", ncols=len(legend_entries), fontsize=8, frameon=False
        )
    return figure


def map_table(panel: CellMap) -> Table:
    """Return the values of one heat map in thousandths of a nat per token, with a dash where there is none."""
    count = panel.change_LE.shape[1]
    head = ("layer", *(f"expert {expert}" for expert in range(count))) if count > 1 else ("layer", "change")
    rows = [
        (str(layer), *("–" if np.isnan(value) else f"{1000 * value:+.4f}" for value in values))
        for layer, values in zip(panel.layers, panel.change_LE, strict=True)
    ]
    return Table(f"{panel.title}, 1/1000 nats per token", head, rows)


def _label_experts(axis: Axes, num_experts: int) -> None:
    if num_experts == 1:
        axis.set_xticks([])
        return
    step = -(-num_experts // 16)
    axis.set_xticks(range(0, num_experts, step), [str(e) for e in range(0, num_experts, step)], fontsize=8)
    axis.set_xlabel("expert", fontsize=8)


def _hatch_noise(axis: Axes, noise_LE: Array) -> None:
    for row, column in np.argwhere(noise_LE):
        axis.add_patch(
            Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, hatch="////", edgecolor="0.6", linewidth=0.0)
        )


def _write_values(axis: Axes, panel: CellMap, scale: Normalize) -> None:
    """Write each value into its cell. Noise is grey on a white box, so that the hatching does not cross the digits."""
    # Five digits must fit into the width of a cell.
    size = 7 if panel.change_LE.shape[1] <= 18 else 6
    for row, column in np.argwhere(~np.isnan(panel.change_LE)):
        value, is_noise = 1000 * panel.change_LE[row, column], bool(panel.noise_LE[row, column])
        # Black digits are hard to read on both ends of the colour map.
        dark = abs(float(scale(value)) - 0.5) > 0.3 and not is_noise
        box = {"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.9} if is_noise else None
        weight, colour = ("normal", "0.35") if is_noise else ("bold", "white" if dark else "black")
        axis.text(
            column, row, _short(value), ha="center", va="center", fontsize=size, color=colour, weight=weight, bbox=box
        )


def _short(value: float) -> str:
    if value and abs(value) < 0.005:
        return "≈0"
    # From 99.5 on, two significant digits would be written with an exponent, such as +1e+02.
    return f"{value:+.0f}" if abs(value) >= 99.5 else f"{value:+.2g}" if value else "0"
