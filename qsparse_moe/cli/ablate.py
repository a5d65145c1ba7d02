"""``qsparse-moe ablate``: train the runs of a grid file, and write tables and figures of their results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qsparse_moe.ablation.grid.earlier_results import with_earlier_results
from qsparse_moe.ablation.grid.load import Grid, GridRun, load_grid
from qsparse_moe.ablation.grid.placement import Launcher, Placement
from qsparse_moe.cli.console import print_json
from qsparse_moe.cli.grid_progress import GridProgress
from qsparse_moe.cli.option_values import check_folder, check_no_effect
from qsparse_moe.errors import CheckpointError, ConfigError
from qsparse_moe.runs.folder import is_finished

if TYPE_CHECKING:
    from qsparse_moe.ablation.grid.results import RunResult


OUTPUT_DIR = "runs/ablations"


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("ablate")(ablate)


def ablate(
    grid: Annotated[Path, typer.Argument(help="Grid file.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings of every run, such as training.steps=50.", show_default=False)
    ] = None,
    ranks: Annotated[int, typer.Option(help="Number of processes per run.", min=1)] = 1,
    jobs: Annotated[int, typer.Option(help="Number of runs at the same time.", min=1)] = 1,
    devices: Annotated[str, typer.Option(help="CUDA devices to distribute over the runs, such as 0,1.")] = "",
    launcher: Annotated[
        Launcher, typer.Option(help="auto: the deepspeed launcher if a run has several ranks.")
    ] = "auto",
    task: Annotated[
        int | None, typer.Option(help="Train only the run with this index, as one task of a job array.")
    ] = None,
    list_runs: Annotated[bool, typer.Option("--list", help="Print the index, state, and id of each run.")] = False,
    report_only: Annotated[bool, typer.Option(help="Write the report of the runs so far, and start none.")] = False,
    results: Annotated[
        Path | None,
        typer.Option(
            help="The results.jsonl of an earlier report of this grid, or its folder: its finished runs are not "
            "trained again.",
            show_default=False,
        ),
    ] = None,
    output_dir: Annotated[str, typer.Option(help="Folder that will contain the folder of this grid.")] = OUTPUT_DIR,
    output: Annotated[
        Path | None, typer.Option(help="Folder for the results; default: the folder of the grid.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Train every run of a grid file. Finished runs are not repeated. The exit code is 1 if a run failed."""
    if (task is not None) + list_runs + report_only > 1:
        raise ConfigError("--task, --list, and --report-only exclude each other; give only one of them")
    if task is not None:
        # The tasks of an array run at the same time, and the report is written by --report-only behind them.
        check_no_effect({"--output": output}, beside="--task")
    if list_runs:
        trained = {"--ranks": ranks if ranks > 1 else None, "--jobs": jobs if jobs > 1 else None, "--devices": devices}
        check_no_effect({**trained, "--output": output}, beside="--list")
    if output is not None:
        check_folder("--output", output)
    # The whole grid is loaded even for one task, so that a mistake in any run is reported before the first one trains.
    loaded = load_grid(grid, overrides or (), output_dir=output_dir)
    if results is not None:
        loaded = with_earlier_results(loaded, results, trains=not (report_only or list_runs))
    # An empty text splits into one empty name, which the filter removes.
    placement = Placement(ranks, jobs, tuple(filter(None, devices.split(","))), launcher)
    if list_runs:
        _print_list(loaded, json)
        return
    chosen = loaded if task is None else _only(loaded, task)
    # Imported after --list, which needs no torch.
    from qsparse_moe.ablation.grid.run import run_grid
    from qsparse_moe.ablation.grid.search import results_so_far

    stopped_by = 0
    if report_only:
        found = results_so_far(loaded)
    else:
        with GridProgress(chosen.num_needed - len(chosen.earlier)) as progress:
            found, stopped_by = run_grid(chosen, placement, notify=progress)
    # Tasks of an array run at the same time: the report is written once, when they are done.
    folder = None if task is not None else output or loaded.folder
    command = _command(grid, overrides or (), placement, results, output_dir, output)
    _print_report(chosen, found, folder, json, command)
    # The code with which a shell reports a process that a signal ended.
    if stopped_by:
        raise typer.Exit(128 + stopped_by)
    # Unfinished runs are no failure of --report-only, which exists to report on a grid that is still being trained.
    if not report_only and not all(result.finished for result in found):
        raise typer.Exit(1)


def _only(grid: Grid, task: int) -> Grid:
    if not 0 <= task < len(grid.runs):
        raise ConfigError(
            f"--task ({task}) must be the index of a run of {grid.name}, 0 to {len(grid.runs) - 1}; --list prints them"
        )
    # A task is trained whether or not a search needs it, and decides no claim alone.
    run = grid.runs[task]
    own = {run.id: grid.earlier[run.id]} if run.id in grid.earlier else {}
    return replace(grid, runs=(run,), best_over=None, comparisons=(), earlier=own)


def _command(
    grid: Path,
    overrides: Sequence[str],
    placement: Placement,
    results: Path | None,
    output_dir: str,
    output: Path | None,
) -> list[str]:
    """Return the command that trains the runs of this report, without the options that have their defaults."""
    given = {
        "--ranks": placement.ranks if placement.ranks > 1 else None,
        "--jobs": placement.jobs if placement.jobs > 1 else None,
        "--devices": ",".join(placement.devices) or None,
        "--launcher": placement.launcher if placement.launcher != "auto" else None,
        "--results": results,
        "--output-dir": output_dir if output_dir != OUTPUT_DIR else None,
        "--output": output,
    }
    options = [part for name, value in given.items() if value is not None for part in (name, str(value))]
    return ["qsparse-moe", "ablate", str(grid), *overrides, *options]


def _print_report(
    grid: Grid, results: list[RunResult], folder: Path | None, json: bool, command: Sequence[str]
) -> None:
    from qsparse_moe.ablation.grid.comparison_report import comparisons_dict
    from qsparse_moe.ablation.grid.report import markdown, write_results

    if folder is not None:
        write_results(grid, results, folder, command=command)
    if json:
        content: dict[str, Any] = {"grid": grid.name, "results": [result.as_dict() for result in results]}
        if grid.comparisons:
            content["comparisons"] = comparisons_dict(grid, results)
        print_json(content)
    else:
        print(markdown(grid, results))
        if folder is not None:
            print(f"\nwritten to {folder}")


def _print_list(grid: Grid, json: bool) -> None:
    states = _states(grid)
    runs = [
        {"index": i, "id": run.id, "state": state} for i, (run, state) in enumerate(zip(grid.runs, states, strict=True))
    ]
    if json:
        print_json({"grid": grid.name, "runs": runs})
        return
    width = max(len(state) for state in ("finished", *states))
    for run in runs:
        print(f"{run['index']:>4}  {run['state']:<{width}}  {run['id']}")


def _states(grid: Grid) -> list[str]:
    """Return the state of every run; a run that depends on a search is to do only if its value is the best."""
    states = ["finished" if run.id in grid.earlier else _state(run) for run in grid.runs]
    if grid.best_over is None:
        return states
    from qsparse_moe.ablation.grid.search import finished_bits, is_needed, results_so_far, samples

    known = samples(grid, finished_bits(results_so_far(grid)))
    for position, run in enumerate(grid.runs):
        if states[position] == "to do" and not is_needed(grid, run, known):
            searched = (run.entry, grid.cell(run)) in known
            states[position] = "not best" if searched else "waits for the search"
    return states


def _state(run: GridRun) -> str:
    try:
        return "finished" if is_finished(run.config) else "to do"
    # Listed and not raised, because the other runs of the grid can still be trained.
    except (ConfigError, CheckpointError):
        return "refused"
