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

# Text stays text, which is smaller than outlines. The salt and the missing date make equal figures equal files.
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
    """Return the figure as SVG with its text as text, in about half of matplotlib's bytes."""
    found = io.BytesIO()
    with matplotlib.rc_context(_SETTINGS):
        # Not print_svg of the canvas, which would leave the figure with another number of dots per inch.
        figure.savefig(found, format="svg", metadata={"Date": None})
    return _short(found.getvalue().decode()).encode()


def _short(drawn: str) -> str:
    """Return the same drawing in fewer characters; its text stays as it is.

    Figures are most of a page. A quarter of matplotlib's SVG is indentation, and half of the rest are styles that many
    marks share, names that nothing refers to, and digits below a hundredth of a point.
    """
    drawn = re.sub(r"\n\s*", "\n", drawn)
    drawn = re.sub(r"<metadata>.*?</metadata>\n", "", drawn, flags=re.DOTALL)
    used, classes = set(re.findall(r"#([\w.-]+)", drawn)), dict[str, str]()

    def short(tag: re.Match[str]) -> str:
        found = re.sub(r' id="([\w.-]+)"', lambda name: name[0] if name[1] in used else "", tag[0])
        found = re.sub(r' transform="rotate\(-0 [^"]*"', "", found)
        found = re.sub(r' (?:d|x|y|width|height)="[^"]*"', _rounded, found)
        return re.sub(r' style="([^"]*)"', lambda style: f' class="{_class_of(style[1], classes)}"', found)

    # Texts have no angle brackets of their own, since these are escaped in them.
    drawn = re.sub(r"<\w[^<>]*>", short, drawn)
    return drawn.replace("</style>", "".join(f".{name}{{{style}}}" for style, name in classes.items()) + "</style>", 1)


def _class_of(style: str, classes: dict[str, str]) -> str:
    return classes.setdefault(style, f"s{len(classes)}")


def _rounded(attribute: re.Match[str]) -> str:
    return re.sub(r"\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}", attribute[0])


def pixels(figure: Figure) -> np.ndarray:
    """Return the figure as ``(height, width, 3)`` bytes."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
