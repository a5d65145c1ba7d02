"""Table of the metrics in Markdown: ``python -m qsparse_moe.metrics.table FILE...`` rewrites it in these files."""

from __future__ import annotations

import sys
from pathlib import Path

from qsparse_moe.metrics.names import METRICS, Metric

BEGIN = "<!-- metrics: made by python -m qsparse_moe.metrics.table -->"
END = "<!-- end of metrics -->"
_LAYERS = {"none": "", "file": "`metrics.jsonl`", "chart": "`metrics.jsonl`, TensorBoard"}
_ELSEWHERE = {
    "curve": "not by layer; TensorBoard only",
    "histogram": "TensorBoard, *Histograms*",
    "image": "TensorBoard, *Images*",
}


def metrics_markdown() -> str:
    """Return one table row per metric: name, unit, definition, and where its values by layer are found."""
    head = "| Metric | Unit | Definition | By layer in |\n| --- | --- | --- | --- |\n"
    rows = (f"| `{m.name}` | {m.unit} | {m.definition} | {_by_layer_in(m)} |\n" for m in METRICS)
    return head + "".join(rows)


def _by_layer_in(metric: Metric) -> str:
    if metric.kind == "evaluated":
        return "TensorBoard, by `evaluate`" if metric.layers == "chart" else ""
    return _ELSEWHERE.get(metric.kind, _LAYERS[metric.layers])


def with_table(text: str) -> str:
    """Return ``text`` with a new table between the two marks.

    Raises:
        ValueError: one of the two marks is missing.
    """
    # The marks are HTML comments, so that the page shows the table alone.
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the table lies between the lines {BEGIN!r} and {END!r}; add both lines where it belongs")
    return f"{before}{BEGIN}\n\n{metrics_markdown()}\n{END}{after}"


def main(paths: list[str]) -> None:
    """Rewrite the table in every file of ``paths``; for the command line."""
    if not paths:
        sys.exit("usage: python -m qsparse_moe.metrics.table FILE...")
    for path in map(Path, paths):
        path.write_text(with_table(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
