"""The page of a grid: the sections and the figures of its report, what is unfinished, and what to run next."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence

from qsparse_moe.ablation.grid.load import Grid
from qsparse_moe.ablation.grid.markdown_table import MarkdownTable
from qsparse_moe.ablation.grid.results import RunResult
from qsparse_moe.ablation.grid.search import finished_bits, samples
from qsparse_moe.ablation.grid.verdicts import ClaimVerdicts, decide
from qsparse_moe.ablation.page.commands import PROGRAM
from qsparse_moe.ablation.page.parts import Command, Drawing, Page, Part, Section, Table
from qsparse_moe.runs.folder import run_folder

UNFINISHED = "Unfinished runs"
"""Title of the section that names them."""
NOT_STARTED = "not started, or stopped"
MOST_UNFINISHED = 12
"""Number of runs without an error and without an end up to which the report names each of them."""


def unfinished(results: Sequence[RunResult]) -> tuple[list[tuple[str, str]], int]:
    """Return name and reason of every run with an error, and the number of the others, which are named if few."""
    without = sum(not result.error for result in results)
    few = without <= MOST_UNFINISHED
    named = [(result.id, _one_line(result.error)) for result in results if result.error or few]
    return named, 0 if few else without


def _one_line(error: str | None) -> str:
    return " ".join((error or NOT_STARTED).split())


def grid_page(
    grid: Grid,
    sections: Mapping[str, Sequence[str]],
    results: Sequence[RunResult],
    drawings: Mapping[str, Drawing],
    command: Sequence[str],
) -> Page:
    """Return the page of a report.

    Args:
        grid: the grid.
        sections: paragraphs and tables by the title of their section.
        results: the results so far.
        drawings: the figures by name.
        command: the command that trains the grid; if empty, the page proposes none.
    """
    finished = [result for result in results if result.finished]
    facts = [
        ("finished", f"{len(finished)} of {len(results)} runs"),
        ("variants", f"{len({result.variant for result in results}):,}"),
        ("seeds", f"{len({result.seed for result in results}):,}"),
    ]
    found = []
    if drawings:
        found.append(Section("Figures", list(drawings.values())))
    for title, parts in sections.items():
        own = [_part(part) for part in parts]
        if title == UNFINISHED:
            own[1:] = _unfinished(results)
        found.append(Section(title, own))
    following = _next(grid, results, command) if command else []
    if following:
        found.append(Section("What to run next", following))
    return Page(f"Grid {grid.name}", facts, found)


def _part(part: str) -> Part:
    return Table(part.caption, part.head, part.rows) if isinstance(part, MarkdownTable) else part


def _unfinished(results: Sequence[RunResult]) -> list[Part]:
    named, others = unfinished([result for result in results if not result.finished])
    parts: list[Part] = [Table("Runs that did not finish", ("run", "state"), named)] if named else []
    return [*parts, f"{others} runs: {NOT_STARTED}"] if others else parts


def _next(grid: Grid, results: Sequence[RunResult], command: Sequence[str]) -> list[Part]:
    parts: list[Part] = []
    missing = sum(not result.finished for result in results)
    if missing:
        parts.append(Command(f"Train the {missing} unfinished runs; finished ones are kept", command))
    parts += _open_claims(decide(grid, samples(grid, finished_bits(results))), command)
    best = _best(grid, results)
    if best is not None:
        name, folder = best
        parts.append(Command(f"Find what tolerates more sparsity in {name}", [PROGRAM, "sensitivity", folder]))
    if any(result.finished for result in results) and grid.folder.is_dir():
        parts.append(Command("Curves and figures of all runs", [PROGRAM, "tensorboard", str(grid.folder)]))
    return parts


def _open_claims(decided: Sequence[ClaimVerdicts], command: Sequence[str]) -> list[Part]:
    """Return how many seeds would decide the claims that are open over all cells, and the command to repeat."""
    seeds = []
    for one in decided:
        last = one.cells[-1] if one.cells else None
        if last is not None and last.verdict == "not decided":
            seeds += [pair.seeds_needed for pair in last.pairs if pair.seeds_needed is not None]
    if not seeds:
        return []
    enough = f"with {max(seeds)} seeds all that seeds can decide"
    first = f"with {min(seeds)} seeds the first one, " if min(seeds) < max(seeds) else ""
    return [Command(f"Decide more claims: {first}{enough}. Add seeds to the grid file, then", command)]


def _best(grid: Grid, results: Sequence[RunResult]) -> tuple[str, str] | None:
    """Return name and folder of a run of the variant with the lowest mean loss; None if it cannot be measured."""
    losses: dict[str, list[float]] = defaultdict(list)
    for result in results:
        if result.finished and result.bits_per_byte is not None:
            losses[result.variant].append(result.bits_per_byte)
    if not losses:
        return None
    variant = min(losses, key=lambda name: statistics.mean(losses[name]))
    done = {result.id for result in results if result.finished}
    run = next(run for run in grid.runs if run.variant == variant and run.id in done)
    folder = run_folder(run.config)
    # Sensitivities need a ranking of the features.
    is_ranked = run.config.model.sparsity.selection in ("topk", "block")
    return (run.id, str(folder)) if is_ranked and folder.is_dir() else None
