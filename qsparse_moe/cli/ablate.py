"""``qsparse-moe ablate``: the runs of a grid file, and a table of what they came to."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qsparse_moe.ablation.grid import Grid, load_grid
from qsparse_moe.cli.console import print_json

if TYPE_CHECKING:
    from qsparse_moe.ablation.results import Outcome


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("ablate")(ablate)


def ablate(
    grid: Annotated[Path, typer.Argument(help="Grid file.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings of every run, such as training.steps=50.", show_default=False)
    ] = None,
    ranks: Annotated[int, typer.Option(help="Processes a run.", min=1)] = 1,
    jobs: Annotated[int, typer.Option(help="Runs at the same time.", min=1)] = 1,
    output_dir: Annotated[str, typer.Option(help="Folder for the grid's folder of runs.")] = "runs/ablations",
    output: Annotated[Path | None, typer.Option(help="Folder of the results; left out: the grid's.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Train every run of a grid file; finished runs are kept. Ends with 1 where a run broke."""
    loaded = load_grid(grid, overrides or (), output_dir=output_dir)
    from qsparse_moe.ablation.report import markdown, write_results
    from qsparse_moe.ablation.run import run_grid

    outcomes = run_grid(loaded, ranks=ranks, jobs=jobs, tell=_Teller(loaded))
    folder = output or loaded.folder
    write_results(loaded, outcomes, folder)
    if json:
        print_json({"grid": loaded.name, "results": [outcome.as_dict() for outcome in outcomes]})
    else:
        print(markdown(loaded, outcomes))
        print(f"\nwritten to {folder}")
    if not all(outcome.finished for outcome in outcomes):
        raise typer.Exit(1)


class _Teller:
    """A line on standard error for every run that ends."""

    def __init__(self, grid: Grid) -> None:
        self._done, self._all = 0, len(grid.runs)

    def __call__(self, outcome: Outcome) -> None:
        self._done += 1
        bits = outcome.bits_per_byte
        said = outcome.error or ("no validation" if bits is None else f"{bits:.4f} bits a byte")
        print(f"{self._done}/{self._all}  {outcome.id}  {said}", file=sys.stderr, flush=True)
