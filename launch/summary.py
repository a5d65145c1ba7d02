"""Print the end of launch/quickstart.sh: samples of the model, a table of results, and the next command.

``python launch/summary.py RUN`` reads ``evaluation.json``, ``description.json``, ``manifest.json``, ``metrics.jsonl``
and the two samples in the run folder.
"""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from qsparse_moe.metrics.jsonl import read_metrics


def make_summary(run: Path) -> Table:
    """Return the table of results: quality, parameters stored and active, and speed."""
    table = Table(title=str(run), title_justify="left", show_header=False)
    for name, value, remark in [*quality_rows(run), *parameter_rows(run), speed_row(run)]:
        table.add_row(name, value, remark)
    return table


def quality_rows(run: Path) -> list[tuple[str, str, str]]:
    evaluation = json.loads((run / "evaluation.json").read_text())
    ours, unigram = evaluation["bits_per_byte"], evaluation["unigram_bits_per_byte"]
    return [
        ("validation", f"{ours:.3f}", f"bits per byte, {ours / unigram:.3f} times the unigram model"),
        ("unigram byte model", f"{unigram:.3f}", "bits per byte on the same text"),
    ]


def parameter_rows(run: Path) -> list[tuple[str, str, str]]:
    counted = json.loads((run / "description.json").read_text())["parameters"]
    stored, active, needed = (round(counted[kind]) for kind in ("stored", "active", "kept"))
    return [
        ("parameters", f"{stored:,}", "stored"),
        ("active with MoE", f"{active:,}", f"per token, {active / stored:.0%} of them"),
        ("needed with MoE and Q-Sparse", f"{needed:,}", f"per token, {needed / stored:.0%} of them"),
    ]


def speed_row(run: Path) -> tuple[str, str, str]:
    last = read_metrics(run / "metrics.jsonl")[-1]
    ranks = json.loads((run / "manifest.json").read_text())["world_size"]
    remark = f"tokens/s in training on {ranks} processes, {last['seconds']:.0f} s for {last['step']} steps"
    return "speed", f"{last['tokens'] / last['seconds']:,.0f}", remark


def main(run: Path) -> None:
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    for name, how in (
        ("sample.txt", "always the most likely byte"),
        ("sample-drawn.txt", "sampled at temperature 0.8"),
    ):
        print(f"Sample, {how}, in {run / name}:\n")
        print((run / name).read_text(encoding="utf-8"))
    console.print(make_summary(run))
    print(f"\nTo see the metrics: .venv/bin/python -m qsparse_moe tensorboard {shlex.quote(str(run.parent))}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
