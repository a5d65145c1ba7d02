"""Heat maps of layers by experts as pictures. L layers, E experts.

A map has the same colour scale in every step, so that two pictures can be compared; values beyond the scale take the
colour of its end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Colormap, Normalize, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont
from PIL import Image, ImageDraw, ImageFont

from qsparse_moe.metrics.experts import expert_ratios
from qsparse_moe.sparsity.stats import Stats

Pixels = np.ndarray
_MISSING = "#d0d0d0"
# With more cells, the numbers in them are too small to be read.
_MOST_LABELLED = 160


@dataclass(frozen=True)
class Scale:
    """The colour scale of a map: from ``low`` to ``high`` in a colour map of matplotlib."""

    low: float
    high: float
    colours: str
    title: str
    middle: float | None = None
    """Value at the middle of the colour map; None: halfway between ``low`` and ``high``."""


def heat_maps(stats: Stats) -> dict[str, np.ndarray]:
    """Return the maps ``(L, E)`` of one logged step by name: the values of ``experts.expert_ratios``."""
    return {name: ratio_LE.numpy() for name, ratio_LE in expert_ratios(stats).items()}


def scale_of(name: str, num_experts: int) -> Scale:
    """Return the scale of the map ``name``, the same in every step."""
    if name == "load":
        # The largest possible load is E. Beyond 4 a map of many experts would show all others in one colour.
        high = min(4.0, max(2.0, float(num_experts)))
        # White at 1, an even load; the two halves of the scale are of different length.
        return Scale(0.0, high, "RdBu_r", "Load: routed tokens over the layer's mean", middle=1.0)
    site, quantity = name.split("/")
    where = site.replace("_", " ")
    if quantity == "kept_energy":
        # From 0.5: top-K keeps the largest magnitudes, so less than half of the energy is rare and needs no own colour.
        return Scale(0.5, 1.0, "viridis", f"Energy after the selection at {where}")
    if quantity == "zeros":
        return Scale(0.0, 1.0, "magma", f"Fraction of zeros at {where}")
    return Scale(0.0, 1.0, "cividis_r", f"Unused features at {where}")


class HeatMap:
    """Picture of one map. The frame is drawn once; each step draws only the cells, in a fraction of the time."""

    def __init__(self, scale: Scale, layers: Sequence[int], num_experts: int) -> None:
        """``layers`` are the numbers of the layers that have experts, in order."""
        # A column of 0.42 inch holds a number such as 12.34, a row of 0.36 inch its height.
        figure = Figure(figsize=(2.2 + 0.42 * max(num_experts, 8), 1.6 + 0.36 * len(layers)), dpi=100)
        self._canvas = FigureCanvasAgg(figure)
        self._axes = axes = figure.add_subplot()
        colours = _colour_map(scale.colours)
        empty = np.full((len(layers), num_experts), np.nan)
        self._image = axes.imshow(empty, cmap=colours, norm=_norm(scale), aspect="auto")
        axes.set_xlabel("expert")
        axes.set_ylabel("layer")
        # More than 32 labels would overlap.
        step = -(-num_experts // 32)
        axes.set_xticks(range(0, num_experts, step), [str(e) for e in range(0, num_experts, step)])
        axes.set_yticks(range(len(layers)), [str(layer) for layer in layers])
        axes.set_title(scale.title)
        figure.colorbar(self._image, ax=axes)
        figure.tight_layout()
        self._canvas.draw()
        self._frame = self._canvas.copy_from_bbox(figure.bbox)
        cells = [(expert, row) for row in range(len(layers)) for expert in range(num_experts)]
        # Pixels are counted from the top, matplotlib's from the bottom.
        self._centres = [(x, figure.bbox.height - y) for x, y in axes.transData.transform(cells)]
        self._font = ImageFont.truetype(findfont("DejaVu Sans"), 12) if len(cells) <= _MOST_LABELLED else None

    def draw(self, values_LE: np.ndarray) -> Pixels:
        """Return the picture of one step, ``(height, width, 3)`` bytes."""
        self._canvas.restore_region(self._frame)
        self._image.set_data(np.ma.masked_invalid(values_LE))
        self._axes.draw_artist(self._image)
        for spine in self._axes.spines.values():
            self._axes.draw_artist(spine)
        # A copy, because the next step draws into the same buffer.
        picture = Image.fromarray(np.asarray(self._canvas.buffer_rgba())[..., :3].copy())
        if self._font is not None:
            self._write(picture, values_LE.flatten())
        return np.asarray(picture)

    def _write(self, picture: Image.Image, values: np.ndarray) -> None:
        """Write the numbers into the cells."""
        # With PIL: a text of matplotlib takes most of a millisecond.
        pen = ImageDraw.Draw(picture)
        backgrounds = self._image.cmap(self._image.norm(values))
        for centre, value, background in zip(self._centres, values.tolist(), backgrounds, strict=True):
            if value == value:  # not NaN: an expert without a token
                pen.text(centre, f"{value:.2f}", fill=_readable(background), font=self._font, anchor="mm")


def _norm(scale: Scale) -> Normalize:
    if scale.middle is None:
        return Normalize(scale.low, scale.high)
    return TwoSlopeNorm(scale.middle, scale.low, scale.high)


def _colour_map(name: str) -> Colormap:
    return colormaps[name].with_extremes(bad=_MISSING)


def _readable(background: Any) -> str:
    """Return black or white, whichever has more contrast by the luminance of ITU-R BT.601."""
    red, green, blue = background[:3]
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"
