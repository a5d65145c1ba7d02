"""Write the result of ``bench moe`` as Markdown: ``python -m qsparse_moe.bench.moe_text RESULT.json FILE...``.

The section between two marker comments in every FILE is replaced.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BEGIN = "<!-- bench moe: made by python -m qsparse_moe.bench.moe_text -->"
END = "<!-- end of bench moe -->"
_USAGE = "usage: python -m qsparse_moe.bench.moe_text RESULT.json FILE..."


def moe_markdown(result: dict[str, Any]) -> str:
    """Return shape and machine, one table per precision and load, and the profiles of our layers."""
    parts = [_head(result)]
    for layer in result["layers"]:
        parts += [_times(layer), *_profiles(layer)]
    return "\n\n".join(parts) + "\n"


def with_section(text: str, result: dict[str, Any]) -> str:
    """Return ``text`` with the section between its markers replaced.

    Raises:
        ValueError: one of the markers is missing.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the section must be between the lines {BEGIN!r} and {END!r}; add both lines to the file")
    return f"{before}{BEGIN}\n\n{moe_markdown(result)}\n{END}{after}"


def _head(result: dict[str, Any]) -> str:
    shape, machine = result["shape"], result["machine"]
    peak = ", ".join(f"{name} {value / 1e9:,.0f} GFLOP/s" for name, value in result["peak"].items())
    return (
        f"{shape['tokens']} tokens, D {shape['hidden_size']}, F {shape['expert_hidden_size']}, "
        f"E {shape['num_experts']}, A {shape['experts_per_token']}, SwiGLU, S {result['sparsity']:g} with Q-Sparse; "
        "forward, and backward to input, router, and experts; "
        f"{shape['flops'] / 1e9:,.1f} GFLOP in the experts' products; {result['rounds']} rounds in turn, "
        f"{result['calls']} timed calls per turn, {result['clock']} time. "
        f"{machine['accelerator'] or machine['processor']}, {machine['cores']} cores, {machine['threads']} threads, "
        f"torch {machine['torch']}; commit {machine['commit']}, {machine['date']}. Matrix peak, measured: {peak}."
    )


def _times(layer: dict[str, Any]) -> str:
    # Every one of our layers is compared with the same peers.
    peers = list(next(iter(layer["times_as_fast_as"].values())))
    counts = layer["rows_per_expert"]
    # 1 for an even load.
    busiest = max(counts) * len(counts) / sum(counts)
    lines = [
        f"**{layer['precision']}, {layer['load']} load** (the busiest expert has {busiest:.2f} times the mean rows). "
        "× NAME: speed-up over that layer, median (minimum to maximum) of the rounds.",
        "",
        "| layer | ms | GFLOP/s | share of peak | MB | " + " | ".join(f"× {peer}" for peer in peers) + " |",
        "| --- " * (5 + len(peers)) + "|",
    ]
    for name, seconds in layer["seconds"].items():
        ratios = layer["times_as_fast_as"].get(name, {})
        cells = [
            name,
            f"{1e3 * seconds:.1f}",
            f"{layer['flops_per_second'][name] / 1e9:,.0f}",
            f"{layer['share_of_peak'][name]:.2f}",
            f"{layer['peak_bytes'][name] / 1e6:,.0f}",
            *(_ratio(ratios[peer]) if peer in ratios else "" for peer in peers),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    left_out = "; ".join(f"{name} ({reason})" for name, reason in layer["left_out"].items())
    return "\n".join(lines) + (f"\n\nLeft out: {left_out}." if left_out else "")


def _profiles(layer: dict[str, Any]) -> Iterator[str]:
    for name, profile in layer["profile"].items():
        operators = ", ".join(
            f"`{o['name']}` {100 * o['share']:.1f} % ({o['calls']})" for o in profile["operators"][:8]
        )
        copies = [f"{c['operator']} in `{c['place']}` {c['bytes'] / 1e6:.1f} MB" for c in profile["copies"]]
        waits = [f"{w['operator']} in `{w['place']}` ({w['calls']})" for w in profile["waits"]]
        yield (
            f"- {name}: self time by operator (calls): {operators}\n"
            f"  - copies and gathers: {'; '.join(copies) or 'none'}\n"
            f"  - waits of the host for a value: {'; '.join(waits) or 'none'}"
        )


def _ratio(found: dict[str, float]) -> str:
    return f"{found['median']:.2f} ({found['min']:.2f} to {found['max']:.2f})"


def main(arguments: list[str]) -> None:
    """Replace the section in every file of ``arguments``, the command line."""
    if len(arguments) < 2:
        sys.exit(_USAGE)
    result = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    for path in map(Path, arguments[1:]):
        path.write_text(with_section(path.read_text(encoding="utf-8"), result), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
