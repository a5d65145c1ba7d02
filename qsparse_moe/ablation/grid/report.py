"""Write the results of a grid as JSON lines, figures, Markdown tables, and a page."""

from __future__ import annotations

import json
import logging
import os
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from qsparse_moe.ablation.grid.comparison_figure import draw_comparisons
from qsparse_moe.ablation.grid.comparison_report import COMPARISONS, comparison_parts, comparisons_dict
from qsparse_moe.ablation.grid.dense_comparison import FIGURES
from qsparse_moe.ablation.grid.figures import existing, grid_drawings, write_figures
from qsparse_moe.ablation.grid.kept_lines import lines_to_write, names_of, set_aside
from qsparse_moe.ablation.grid.load import Grid
from qsparse_moe.ablation.grid.markdown_table import table
from qsparse_moe.ablation.grid.page import NOT_STARTED, UNFINISHED, grid_page, unfinished
from qsparse_moe.ablation.grid.results import RESULTS, RunResult
from qsparse_moe.ablation.grid.search import finished_bits, samples
from qsparse_moe.ablation.grid.verdicts import decide
from qsparse_moe.ablation.page.html import PAGE, html_of
from qsparse_moe.ablation.page.images import pixels
from qsparse_moe.ablation.page.parts import Drawing
from qsparse_moe.config.labels import place_label
from qsparse_moe.errors import naming
from qsparse_moe.metrics.tensorboard import write_pictures

logger = logging.getLogger(__name__)

REPORT = "report.md"
FIGURES_RUN = "figures"
"""Folder of the figures for TensorBoard, which lists it as a run beside those of the grid."""


def write_results(grid: Grid, results: Sequence[RunResult], folder: Path, *, command: Sequence[str] = ()) -> None:
    """Write ``results.jsonl``, ``report.md``, the page, the verdicts if the grid makes claims, and the figures.

    No file is ever half written. Lines of measured runs that are in the ``results.jsonl`` of the folder, or among the
    earlier results of the grid, and not among ``results`` become its last lines, and the report names these runs. A
    ``results.jsonl`` with a line that cannot be read is renamed and not replaced.

    Args:
        grid: the grid.
        results: the results of its runs so far; ``results.jsonl`` has a line for each run that finished or failed.
        folder: the folder of the report, which is created.
        command: the command that trains the grid, for the page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / RESULTS
    lines = lines_to_write([one for one in results if one.finished or one.error], grid.earlier.values(), file)
    if lines.kept:
        logger.warning("%s keeps the lines of %s that this report does not have", file, names_of(lines.kept))
    sections = report_sections(grid, results, kept=lines.kept)
    # Figures come first, because report.md links only to those that were drawn.
    drawings = report_drawings(grid, results)
    figures = write_figures(drawings, folder)
    report = "\n\n".join([_joined(sections), *(f"![{title}]({name})" for name, title in figures.items())])
    page = grid_page(grid, sections, results, drawings, command)
    texts = [(RESULTS, lines.text), (REPORT, report + "\n"), (PAGE, html_of(page))]
    if grid.comparisons:
        texts.append((COMPARISONS, json.dumps(comparisons_dict(grid, results), indent=1) + "\n"))
    if aside := set_aside(file):
        logger.warning("%s has lines that cannot be read, and is now %s", file, aside.name)
    for name, text in texts:
        part = folder / f"{name}.part"
        with naming(part):
            part.write_text(text, "utf-8")
            os.replace(part, folder / name)
    if drawings:
        named = {f"ablation/{name}": pixels(drawing.figure) for name, drawing in drawings.items()}
        write_pictures(folder / FIGURES_RUN, named, 0)


def report_drawings(grid: Grid, results: Sequence[RunResult]) -> dict[str, Drawing]:
    """Return the figures that apply to the results, and that of the claims if the grid makes any."""
    # Those of a search would mix its values, of which the comparisons take the best.
    drawings = grid_drawings([result.as_dict() for result in results]) if grid.best_over is None else {}
    if grid.comparisons:
        drawn = draw_comparisons(decide(grid, samples(grid, finished_bits(results))))
        drawings |= existing({"comparisons": ("Differences of the claims, with intervals", drawn)})
    return drawings


def markdown(grid: Grid, results: Sequence[RunResult]) -> str:
    """Return the tables of quality and cost per variant, gradient norms if they were logged, and the failed runs."""
    return _joined(report_sections(grid, results))


def _joined(sections: Mapping[str, Sequence[str]]) -> str:
    return "\n\n".join(part for parts in sections.values() for part in parts)


def report_sections(grid: Grid, results: Sequence[RunResult], *, kept: Sequence[str] = ()) -> dict[str, list[str]]:
    """Return the paragraphs and tables of the report by the title of their section.

    Args:
        grid: the grid.
        results: the results of its runs so far.
        kept: the ids of other runs whose lines ``results.jsonl`` keeps.
    """
    seeds = {result.seed for result in results}
    claims = comparison_parts(grid, results)
    # Otherwise the tables of a long grid would be mostly dashes; the runs that are missing are counted below them.
    shown = {result.variant for result in results if result.finished or result.error} or set(grid.variants)
    grid = replace(grid, runs=tuple(run for run in grid.runs if run.variant in shown))
    spread = "mean ± standard deviation over the seeds" if len(seeds) > 1 else "one seed: no spread known"
    sections = {
        "Claims": claims,
        "Quality": [
            f"Validation bits per byte after the last step; {spread}; the difference from the first variant is taken "
            "seed by seed.",
            _quality(grid, results),
        ],
        "Cost": [
            "Cost, counted for the routed experts (active) and for their nonzero features (needed). Stored parameters "
            "exclude embedding and head. MFLOP per token in training: executed by dense kernels, and remaining if "
            "every zero were skipped (needed). MB at N: weights that one step of generation with N tokens reads. "
            "Tokens/s: measured in training, median. Values that are the same for all variants are listed once, above "
            "the table.",
            *_cost(grid, results),
            *_natural_zeros(grid, results),
            *_against_dense(grid, results),
        ],
    }
    if any(result.layer_grad_norms for result in results):
        sections["Gradient norms"] = [
            "Gradient norm by layer, over its matrices and before clipping: mean over the logged steps of the second "
            "half of a run, then mean ± standard deviation over the seeds.",
            _gradients(grid, results),
        ]
    broken = [result for result in results if not result.finished]
    if broken:
        sections[UNFINISHED] = [f"{len(broken)} of {len(results)} runs did not finish:", _broken(broken)]
    if kept:
        sections["Runs outside of this report"] = [
            f"The last lines of {RESULTS} are those of {names_of(kept)} that were measured before and are not in this "
            "report: the grid does not have them any more, its searches do not need them now, or they have no other "
            "result here."
        ]
    return {title: parts for title, parts in sections.items() if parts}


def _quality(grid: Grid, results: Sequence[RunResult]) -> str:
    """Return the table of quality with one row per variant; a missing run has a dash."""
    seeds = list(dict.fromkeys(result.seed for result in results))
    bits = {(result.variant, result.seed): result.bits_per_byte for result in results}
    first = grid.variants[0]
    rows = []
    for variant in grid.variants:
        found = [bits.get((variant, seed)) for seed in seeds]
        # Differences within a seed cancel its effect, which is often larger than that of the variant.
        pairs = [(bits.get((first, seed)), value) for seed, value in zip(seeds, found, strict=True)]
        rows.append(
            [
                variant,
                *("–" if value is None else f"{value:.4f}" for value in found),
                *([_spread([value for value in found if value is not None])] if len(seeds) > 1 else []),
                _spread([b - a for a, b in pairs if a is not None and b is not None], sign="+"),
            ]
        )
    mean = ["mean ± spread"] if len(seeds) > 1 else []
    head = ["variant", *(f"seed {seed}" for seed in seeds), *mean, f"against {first}"]
    return table(head, rows, caption="Validation bits per byte")


def _cost(grid: Grid, results: Sequence[RunResult]) -> list[str]:
    """Return a line of the values that all variants share, and a table of the columns in which they differ."""
    by_variant: dict[str, list[RunResult]] = defaultdict(list)
    for result in results:
        by_variant[result.variant].append(result)
    rows = []
    for variant in grid.variants:
        found = by_variant[variant]
        rates = [result.tokens_per_second for result in found if result.tokens_per_second]
        needed, left = _mean(found, "kept_parameters"), _mean(found, "kept_training_flops_per_token")
        rows.append(
            [
                variant,
                # The seeds of a variant share its sizes and its plan.
                f"{found[0].sparsity:.3g}",
                f"{found[0].total_parameters:,}",
                f"{found[0].active_parameters:,}",
                f"{needed:,.0f}",
                f"{found[0].training_flops_per_token / 1e6:.3f}",
                f"{left / 1e6:.3f}",
                *(f"{_mean(found, name) / 1e6:.3f}" for name in ("weight_bytes_1", "weight_bytes_16")),
                f"{statistics.median(rates):,.0f}" if rates else "–",
            ]
        )
    head = ["variant", "mean S", "parameters stored", "active", "needed", "MFLOP executed", "MFLOP needed"]
    head += ["MB at 1", "MB at 16", "tokens/s"]
    columns = list(zip(*rows, strict=True))
    differs = [i for i, values in enumerate(columns) if i == 0 or len(set(values)) > 1 or len(rows) == 1]
    common = [f"{head[i]} {columns[i][0]}" for i in range(len(head)) if i not in differs]
    parts = [table([head[i] for i in differs], [[row[i] for i in differs] for row in rows], caption="Cost")]
    return ([f"The same for all variants: {', '.join(common)}."] if common else []) + (
        parts if len(differs) > 1 else []
    )


def _natural_zeros(grid: Grid, results: Sequence[RunResult]) -> list[str]:
    """Return a note with a table if S lies below the natural zeros in a variant, else nothing."""
    rows = []
    for variant in grid.variants:
        found = [entry for result in results if result.variant == variant for entry in result.natural_zeros]
        for site in dict.fromkeys(entry[0] for entry in found):
            _, layers, zeros, chosen = zip(*(entry for entry in found if entry[0] == site), strict=True)
            # An empty list means every layer, whatever the other seeds have.
            where = place_label(layers=sorted(set().union(*layers)) if all(layers) else None, site=site)
            rows.append([variant, where, f"{statistics.mean(chosen):.3f}", f"{statistics.mean(zeros):.3f}"])
    if not rows:
        return []
    note = (
        "Below the natural level of zeros: at these sites the activation function produces more zeros than S asks "
        "for, so the loss of these variants says little about S there. A selection has an effect only if S exceeds the "
        "measured zeros (mean over the seeds, last evaluation)."
    )
    return [note, table(["variant", "site", "requested S", "measured zeros"], rows, caption="Natural zeros")]


def _against_dense(grid: Grid, results: Sequence[RunResult]) -> list[str]:
    """Return a note and a table of the differences from S = 0 if the grid asks for them, else nothing."""
    if grid.compare_dense is None:
        return []
    rows = []
    for variant in grid.variants:
        found = [result.against_dense for result in results if result.variant == variant and result.against_dense]
        values = [[value for one in found if (value := one[name]) is not None] for name in FIGURES]
        rows.append([variant, *(_spread(own) for own in values)])
    note = (
        f"Against the same model at S = 0, on {grid.compare_dense} validation sequences: fractions of its routing "
        "choices, and of the first choices, that change; KL divergence of the next-token distributions in nats per "
        "token; fraction of the tokens with the same likeliest next token. A dash: not compared, because the selection "
        "is ReLU, the model has no experts, the run did not finish, or its comparison failed (see its log)."
    )
    head = ["variant", "choices changed", "first changed", "KL divergence", "top-1 agreement"]
    return [note, table(head, rows, caption="Against S = 0")]


def _mean(results: Sequence[RunResult], name: str) -> float:
    return statistics.mean(getattr(result, name) for result in results)


def _gradients(grid: Grid, results: Sequence[RunResult]) -> str:
    """Return the gradient norms with one row per variant and one column per layer.

    Three significant digits and not a fixed number of decimals: layers may differ by orders of magnitude.
    """
    found: dict[tuple[str, int], list[float]] = defaultdict(list)
    for result in results:
        for layer, norm in enumerate(result.layer_grad_norms or ()):
            found[result.variant, layer].append(norm)
    layers = range(1 + max(layer for _, layer in found))
    rows = [
        [variant, *(_spread(found.get((variant, layer), ()), digits=".3g") for layer in layers)]
        for variant in grid.variants
    ]
    return table(["variant", *(f"layer {layer}" for layer in layers)], rows, caption="Gradient norm by layer")


def _broken(results: Sequence[RunResult]) -> str:
    """Return one line per run with an error, and one for all others if they are many."""
    named, others = unfinished(results)
    lines = [f"- `{name}`: {reason}" for name, reason in named]
    return "\n".join([*lines, f"- {others} runs: {NOT_STARTED}"] if others else lines)


def _spread(values: Sequence[float], sign: str = "", digits: str = ".4f") -> str:
    if not values:
        return "–"
    mean = f"{statistics.mean(values):{sign}{digits}}"
    return f"{mean} ± {statistics.stdev(values):{digits}}" if len(values) > 1 else mean
