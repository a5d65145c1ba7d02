"""``qsparse-moe sensitivity``: measure how the loss changes with the S of one layer, site, and expert."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.table import Table

from qsparse_moe.cli.console import is_rank_zero, print_json, result_console
from qsparse_moe.cli.option_values import MODEL_HELP, DataOption, ShardOption, check_folder, check_shard, check_sparsity
from qsparse_moe.config.file_sources import sources_overrides
from qsparse_moe.errors import ConfigError
from qsparse_moe.metrics.natural_zeros import warn_of_natural_zeros
from qsparse_moe.runs.find import find_model
from qsparse_moe.runs.folder import load_run_config

if TYPE_CHECKING:
    from qsparse_moe.ablation.sensitivity.measure import Sensitivity

FOLDER = "sensitivity"
_REPORTED_EVERY = 20


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("sensitivity")(sensitivity)


def sensitivity(
    run: Annotated[Path, typer.Argument(help=MODEL_HELP, show_default=False)],
    values: Annotated[
        str, typer.Option(help="Values of S to try in each cell, separated by commas.")
    ] = "0,0.25,0.5,0.6,0.7,0.8,0.9",
    at: Annotated[float | None, typer.Option(help="S of the other cells, in place of the run's.")] = None,
    estimate_only: Annotated[
        bool,
        typer.Option(
            "--estimate-only",
            help="Only estimate: one forward and a few backward passes instead of one evaluation per cell.",
        ),
    ] = False,
    rows: Annotated[
        int | None, typer.Option(help="Number of validation sequences; default: training.evaluation_rows.", min=1)
    ] = None,
    plans: Annotated[
        int,
        typer.Option(
            help="Number of random plans of S and experts per token to evaluate beside their estimate; 0 or above 2."
        ),
    ] = 0,
    data: DataOption = None,
    output: Annotated[Path | None, typer.Option(help="Folder for the report; default: RUN/sensitivity.")] = None,
    shard: ShardOption = None,
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Device to run on.")] = "cpu",
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Find the layers, sites, and experts that tolerate more sparsity. Writes JSON, CSV, reports, and heat maps.

    Runs on one process or under the deepspeed launcher.
    """
    model_folder = find_model(run)
    run_dir = model_folder.path
    tried = parse_values(values)
    check_sparsity("--at", at)
    if plans < 0 or plans in (1, 2):
        raise ConfigError(
            f"--plans ({plans}) must be 0 or at least 3, because two points always have a perfect rank order"
        )
    check_shard(shard, "sensitivity")
    folder = output or run_dir / FOLDER
    if is_rank_zero():  # before the measurement, which may take hours
        check_folder("--output", folder)
    from qsparse_moe.ablation.page.commands import run_of
    from qsparse_moe.ablation.sensitivity.measure import measure_run
    from qsparse_moe.ablation.sensitivity.report import as_dict

    if is_rank_zero():
        warn_of_natural_zeros(run_dir)
    found, step = measure_run(
        run_dir,
        tried,
        sparsity=at,
        exact=not estimate_only,
        num_plans=plans,
        num_sequences=rows,
        device=device,
        overrides=sources_overrides(data or (), load_run_config(model_folder.config_folder).data),
        shard=shard,
        notify=_print_report,
    )
    if not is_rank_zero():
        return
    summary = as_dict(found, run_dir=run_dir, step=step)
    write_report(found, summary, folder, tensorboard=run_of(run_dir) / "tensorboard")
    if json:
        print_json(summary)
    else:
        _print_summary(found, folder)


def parse_values(text: str) -> tuple[float, ...]:
    """Return the values of ``--values`` in ascending order, each once.

    Raises:
        ConfigError: one is not a number in [0, 1).
    """
    try:
        # A value that is given twice would be evaluated twice in every cell, hence the set.
        values = sorted({float(part) for part in text.split(",")})
    except ValueError:
        # Outside the range, so that the rule below reports it.
        values = [-1.0]
    if not all(0.0 <= value < 1.0 for value in values):
        raise ConfigError(f"--values ({text}) must be numbers in [0, 1) separated by commas, such as 0,0.5,0.75")
    return tuple(values)


def write_report(found: Sensitivity, summary: dict[str, Any], folder: Path, *, tensorboard: Path) -> None:
    """Write JSON, CSV, the reports, and the figures to ``folder``, and the figures to ``tensorboard`` as well."""
    import json

    from qsparse_moe.ablation.page.html import PAGE, write_page
    from qsparse_moe.ablation.page.images import pixels
    from qsparse_moe.ablation.sensitivity.figures import sensitivity_drawings, write_figures
    from qsparse_moe.ablation.sensitivity.page import sensitivity_page
    from qsparse_moe.ablation.sensitivity.report import markdown, write_csv
    from qsparse_moe.metrics.tensorboard import write_pictures
    from qsparse_moe.runs.folder import write_atomically

    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "sensitivity.json", json.dumps(summary, indent=1) + "\n")
    write_csv(found.changes, folder / "sensitivity.csv")
    title = f"Sensitivities of {summary['run_dir']} after step {summary['step']}"
    drawings = sensitivity_drawings(found)
    pictures = "".join(f"\n![{file.stem}]({file.name})\n" for file in write_figures(drawings, folder))
    write_atomically(folder / "report.md", markdown(found, title=title) + pictures)
    write_page(sensitivity_page(summary, drawings), folder / PAGE)
    named = {f"{FOLDER}/{name}": pixels(drawing.figure) for name, drawing in drawings.items()}
    write_pictures(tensorboard, named, summary["step"])


def _print_report(done: int, of: int) -> None:
    # A line per evaluation would be hundreds of lines, and the last one always appears.
    if is_rank_zero() and (done == of or done % _REPORTED_EVERY == 0):
        print(f"evaluated {done}/{of}", file=sys.stderr, flush=True)


def _print_summary(found: Sensitivity, folder: Path) -> None:
    from qsparse_moe.ablation.sensitivity.report import (
        AGREEMENT_HEAD,
        ROUTING_HEAD,
        agreement_rows,
        costliest_rows,
        plans_line,
        routing_rows,
    )

    console = result_console()
    if found.agreement:
        console.print(
            rich_table(
                "Estimate against evaluation",
                AGREEMENT_HEAD,
                agreement_rows(found),
            )
        )
        console.print(
            f"estimate          {found.estimate_seconds:.2f} s; {found.evaluations} evaluations "
            f"{found.exact_seconds:.1f} s, {found.times_cheaper:.0f} times as long"
        )
    head = ("cell", "S", "estimate", "exact")
    console.print(rich_table("Cells with the largest change of the loss, nats per token", head, costliest_rows(found)))
    if found.routing:
        console.print(rich_table("Other ranks of choice in one layer", ROUTING_HEAD, routing_rows(found)))
    if found.plans is not None:
        console.print(f"whole plans       {plans_line(found.plans)}", soft_wrap=True)
    console.print(
        f"loss              {found.loss:.4f} nats per token, on {found.num_sequences} sequences of {found.documents} "
        "documents"
    )
    console.print(f"written to        {folder}", soft_wrap=True)


def rich_table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Return a table with the first column aligned left and the others aligned right."""
    table = Table(title=title, title_justify="left")
    for place, column in enumerate(head):
        table.add_column(column, justify="right" if place else "left")
    for row in rows:
        table.add_row(*row)
    return table
