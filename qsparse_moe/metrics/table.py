"""The list of metrics as Markdown: ``python -m qsparse_moe.metrics.table FILE...`` rewrites it between two marks."""

from __future__ import annotations

import sys
from pathlib import Path

from qsparse_moe.metrics.names import METRICS, Metric

BEGIN = "<!-- metrics: made by python -m qsparse_moe.metrics.table -->"
END = "<!-- end of metrics -->"
_LAYERS = {"none": "", "file": "`metrics.jsonl`", "chart": "`metrics.jsonl`, TensorBoard"}
_ELSEWHERE = {
    "curve": "no; TensorBoard alone",
    "histogram": "TensorBoard, *Histograms*",
    "image": "TensorBoard, *Images*",
}


def metrics_markdown() -> str:
    """One row a metric: name, unit, definition, and where its values by layer are found."""
    head = "| Metric | Unit | What it is | By layer in |\n| --- | --- | --- | --- |\n"
    rows = (f"| `{m.name}` | {m.unit} | {m.definition} | {_by_layer_in(m)} |\n" for m in METRICS)
    return head + "".join(rows)


def _by_layer_in(metric: Metric) -> str:
    return _ELSEWHERE.get(metric.kind, _LAYERS[metric.layers])


def with_table(text: str) -> str:
    """``text`` with the table between its marks made anew.

    Raises:
        ValueError: one of the marks is missing.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the table stands between {BEGIN!r} and {END!r}; add both lines where it belongs")
    return f"{before}{BEGIN}\n\n{metrics_markdown()}\n{END}{after}"


def main(paths: list[str]) -> None:
    """Rewrite the table in every file named; for the command line."""
    if not paths:
        sys.exit("usage: python -m qsparse_moe.metrics.table FILE...")
    for path in map(Path, paths):
        path.write_text(with_table(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
