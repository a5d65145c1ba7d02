"""``qsparse-moe bench start``: the options, and the table of the result."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from qsparse_moe.cli.console import print_json, result_console, write_json
from qsparse_moe.cli.option_values import check_result_file
from qsparse_moe.config.load import load_config

_MB = 1e6


def start(
    config: Annotated[Path, typer.Argument(help="Run file; its model and layout are built.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Settings by path, such as training.precision=bf16.", show_default=False),
    ] = None,
    values: Annotated[int, typer.Option(help="Number of values per timed draw.", min=1)] = 2**24,
    rounds: Annotated[int, typer.Option(help="Number of rounds; every round draws them in both ways.", min=1)] = 5,
    output: Annotated[Path | None, typer.Option(help="Also write the result to this JSON file.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Build a model on the launcher's ranks and report their peak memory, and the speed at which weights are drawn.

    Nothing is read or written, and no step is taken. It needs Linux, whose kernel reports the peak of a process.
    """
    check_result_file(output)
    # A wrong setting is reported before torch is imported.
    loaded = load_config(config, overrides or ())
    from qsparse_moe.bench.start import run_start_benchmark

    result = run_start_benchmark(loaded, values=values, rounds=rounds)
    # The figures of all ranks are those of rank 0's result.
    if result is None:
        return
    if output:
        write_json(output, result)
    if json:
        print_json(result)
        return
    console = result_console()
    console.print(_table(result))
    draw = result["draw"]
    console.print(
        f"a draw takes {draw['ours_wall']:.1f} s per billion values ({draw['ours_processor']:.1f} s of the processor), "
        f"trunc_normal_ {draw['trunc_normal_wall']:.1f} s ({draw['trunc_normal_processor']:.1f} s)"
    )


def _table(result: dict[str, Any]) -> Table:
    table = Table(title=f"{result['parameters']:,} parameters, in MB")
    for column in ("rank", "seconds", "before", "peak above", "kept", "largest layer", "peak / (kept + layer)"):
        table.add_column(column, justify="right")
    for rank, one in enumerate(result["ranks"]):
        sizes = [f"{one[name] / _MB:,.1f}" for name in ("before", "peak", "state", "largest_layer")]
        ratio = one["peak"] / (one["state"] + one["largest_layer"])
        table.add_row(str(rank), f"{one['seconds']:.1f}", *sizes, f"{ratio:.2f}")
    return table
