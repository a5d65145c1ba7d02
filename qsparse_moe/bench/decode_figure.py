"""Draw results of ``bench decode``: ``python -m qsparse_moe.bench.decode_figure RESULT.json... IMAGE...``.

One panel per number format of the weights: tokens per second of one sequence against S, ours and the peers.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from qsparse_moe.ablation.grid.panels import panels_of
from qsparse_moe.bench.decode import OURS, TRANSFORMERS

_USAGE = "usage: python -m qsparse_moe.bench.decode_figure RESULT.json... IMAGE..."


class Speed(NamedTuple):
    """Tokens per second over the rounds of a measurement."""

    median: float
    low: float
    high: float


class FormatSpeeds(NamedTuple):
    """The speeds with weights in one number format."""

    title: str
    ours: dict[float, Speed]
    """By S, from the lowest."""
    peers: dict[str, Speed]
    """By the name of the contender, from the slowest."""


def speeds_by_format(result: dict[str, Any], batch: int = 1) -> list[FormatSpeeds]:
    """Return the speeds of a result of ``bench decode`` with ``batch`` sequences, in the order of its formats."""
    found = []
    for weight_format, measured in result["formats"].items():
        speeds = {
            row["contender"]: _speed(row, result["shape"]["tokens"])
            for row in measured["decode"]
            if row["batch"] == batch
        }
        prefix = f"{OURS} S "
        ours = {float(name.removeprefix(prefix)): speed for name, speed in speeds.items() if name.startswith(prefix)}
        peers = {name: speed for name, speed in speeds.items() if not name.startswith(prefix)}
        # Results of before the head had a format of its own lack it.
        head = f", head in {measured['head']}" if "head" in measured else ""
        found.append(
            FormatSpeeds(
                f"weights in {weight_format}{head}",
                dict(sorted(ours.items())),
                dict(sorted(peers.items(), key=lambda pair: pair[1].median)),
            )
        )
    return found


def draw(formats: Sequence[FormatSpeeds]) -> Any:
    """Return a figure with one panel per number format; bands are the range of the rounds."""
    figure, axes = panels_of([one.title for one in formats])
    for axis, one in zip(axes, formats, strict=True):
        _draw_ours(axis, one.ours)
        colours = {TRANSFORMERS: "0.5"}
        for name, speed in one.peers.items():
            colour = colours.setdefault(name, f"C{len(colours)}")
            axis.axhline(speed.median, color=colour, linestyle=":", label=name)
        axis.set_xlabel("S at every site")
        axis.set_ylim(bottom=0)
        axis.legend(loc="upper left", fontsize=7)
    axes[0].set_ylabel("tokens per second, one sequence")
    return figure


def _draw_ours(axis: Any, ours: dict[float, Speed]) -> None:
    sparsities = list(ours)
    axis.fill_between(
        sparsities, [one.low for one in ours.values()], [one.high for one in ours.values()], color="C0", alpha=0.2
    )
    axis.plot(sparsities, [one.median for one in ours.values()], color="C0", marker="o", label="ours")
    if 0.0 in ours:
        axis.axhline(ours[0.0].median, color="C0", linestyle="--", linewidth=1, label="ours without zeros (S 0)")


def _speed(row: dict[str, Any], tokens: int) -> Speed:
    by_round = [row["batch"] * tokens / seconds for seconds in row["seconds_by_round"]]
    return Speed(row["tokens_per_second"], min(by_round), max(by_round))


def main(arguments: list[str]) -> None:
    """Draw all results side by side into every image of ``arguments``; the ending of a name is its format."""
    results = [path for path in arguments if path.endswith(".json")]
    images = [path for path in arguments if path not in results]
    if not results or not images:
        sys.exit(_USAGE)
    read = (json.loads(Path(path).read_text(encoding="utf-8")) for path in results)
    figure = draw([one for result in read for one in speeds_by_format(result)])
    for path in images:
        figure.savefig(path)


if __name__ == "__main__":
    main(sys.argv[1:])
