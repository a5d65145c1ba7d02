"""Figures as addresses that contain the image, and as pixels."""

from __future__ import annotations

import base64
import io
import re
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Text stays text, which is smaller than outlines, and names few fonts, because every text names all of them. The salt
# and the missing date make equal figures equal files.
_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "qsparse_moe",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],
}
_LARGEST_SVG = 120_000
"""Bytes above which a figure with many marks is stored as pixels."""
_SHARP = 1.6
"""Pixels of such a figure per pixel of its size on the page, for screens with small pixels."""


def image_address(figure: Figure) -> str:
    """Return the figure as a ``data:`` address for the ``src`` of an image: SVG, or PNG if that would be large."""
    vector = svg(figure)
    if len(vector) <= _LARGEST_SVG:
        return f"data:image/svg+xml;base64,{base64.b64encode(vector).decode()}"
    found = io.BytesIO()
    figure.savefig(found, format="png", dpi=_SHARP * figure.dpi)
    return f"data:image/png;base64,{base64.b64encode(found.getvalue()).decode()}"


def svg(figure: Figure) -> bytes:
    """Return the figure as SVG with its text as text."""
    found = io.BytesIO()
    with matplotlib.rc_context(_SETTINGS):
        # Not print_svg of the canvas, which would leave the figure with another number of dots per inch.
        figure.savefig(found, format="svg", metadata={"Date": None})
    # A quarter of the file is indentation.
    return re.sub(rb"\n\s*", b"\n", found.getvalue())


def pixels(figure: Figure) -> np.ndarray:
    """Return the figure as ``(height, width, 3)`` bytes."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
