"""``qsparse-moe fit-law``: fit laws of the loss to results files, with intervals and the best S of each law."""

from __future__ import annotations

import json as json_text
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.table import Table

from qsparse_moe.cli.console import print_json, result_console
from qsparse_moe.cli.option_values import check_folder
from qsparse_moe.errors import ConfigError

if TYPE_CHECKING:
    from qsparse_moe.ablation.law.study import Study

_FILE = "law.json"


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("fit-law")(fit_law)


def fit_law(
    results: Annotated[
        list[Path],
        typer.Argument(help="Results files of ablate, or folders that contain a results.jsonl.", show_default=False),
    ],
    form: Annotated[
        list[str] | None,
        typer.Option(
            help="Form to fit; can be repeated. Default: all forms that the runs determine.", show_default=False
        ),
    ] = None,
    unit: Annotated[
        Literal["nats", "bits", "bits-per-byte"],
        typer.Option(help="Unit of the loss: nats per token, bits per token, or bits per byte."),
    ] = "nats",
    points: Annotated[
        Literal["all", "last"], typer.Option(help="Use every evaluation of a run, or only the last one.")
    ] = "all",
    min_tokens: Annotated[int, typer.Option(help="Ignore evaluations before this number of tokens.", min=0)] = 0,
    bootstrap: Annotated[
        int, typer.Option(help="Number of bootstrap samples of the runs for the intervals.", min=20)
    ] = 200,
    level: Annotated[
        float, typer.Option(help="Fraction of the bootstrap samples inside an interval.", min=0.5, max=0.999)
    ] = 0.95,
    tolerance: Annotated[
        float,
        typer.Option(
            help="Relative increase of the reducible loss that still counts as close to the best S.",
            min=0.0001,
            max=1.0,
        ),
    ] = 0.01,
    kept_parameters: Annotated[
        float | None,
        typer.Option(
            help="Needed parameters per token (active ones whose input is not zero) at which to find the best S; "
            "default: the geometric mean of the runs.",
            min=1.0,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap samples.", min=0)] = 0,
    output: Annotated[
        Path | None, typer.Option(help="Folder for law.json and the figures.", show_default=False)
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier law in the folder.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Fit laws of the loss in model size, experts, sparsity, and tokens to the results of runs."""
    # Before the fits, which take minutes.
    if output is not None:
        check_no_law(output, force=force)
    elif force:
        raise ConfigError(
            "--force replaces an earlier law in --output, which is not given; name it, or leave out --force"
        )
    from qsparse_moe.ablation.law.read import read_runs
    from qsparse_moe.ablation.law.study import Choices, as_dict, study

    choices = Choices(tuple(form or ()), bootstrap, level, tolerance, kept_parameters, seed)
    runs = read_runs(results, unit=unit, last_only=points == "last", min_tokens=min_tokens)
    done = study(runs, unit=unit, choices=choices, notify=_print_report)
    summary = as_dict(done)
    if output is not None:
        summary["figures"] = write_law(done, summary, output)
    print_json(summary) if json else print_summary(summary, output)


def check_no_law(output: Path, *, force: bool) -> None:
    """Raise ConfigError unless a law can be written to the folder ``output``; nothing is created."""
    check_folder("--output", output)
    if (output / _FILE).exists() and not force:
        raise ConfigError(f"--output ({output}) contains a {_FILE}; name another folder, or add --force")


def write_law(done: Study, summary: dict[str, Any], output: Path) -> list[str]:
    """Write the figures and then ``law.json`` to ``output``; return the names of the figures."""
    from qsparse_moe.ablation.law.figures import draw
    from qsparse_moe.runs.folder import write_atomically

    try:
        output.mkdir(parents=True, exist_ok=True)
        # law.json comes last: a folder that has it is complete and is not replaced without --force.
        figures = draw(done, output)
        write_atomically(output / _FILE, json_text.dumps(summary | {"figures": figures}, indent=2) + "\n")
    except OSError as error:
        raise ConfigError(f"--output ({output}) cannot be written ({error.strerror}); name another folder") from None
    return figures


def _print_report(form: str, resamples: int) -> None:
    # The escape code clears the rest of the line, because the text before may have been longer.
    if sys.stderr.isatty():
        print(
            f"\r{form}: {resamples} bootstrap samples\x1b[K", end="" if resamples else "\n", file=sys.stderr, flush=True
        )
    elif not resamples:
        print(f"fitting {form}", file=sys.stderr, flush=True)


def print_summary(summary: dict[str, Any], output: Path | None) -> None:
    """Print the tables of forms, constants, and S*."""
    console = result_console()
    ranges = summary["ranges"]
    console.print(
        f"{summary['points']} evaluations of {summary['runs']} runs ({summary['configurations']} configurations); "
        f"{summary['left_out']} unfinished runs left out. Loss in {summary['unit']}.\n"
        f"N {_range(ranges['total'], ',.0f')}, needed {_range(ranges['kept'], ',.0f')}, A/E "
        f"{_range(ranges['expert_share'], '.3g')}, S {_range(ranges['sparsity'], '.2f')}, D "
        f"{_range(ranges['tokens'], ',.0f')} tokens. N and needed without embedding and head."
    )
    spread = summary["seed_spread"]
    noise = "no configuration has two seeds" if spread is None else f"seeds of one configuration differ by {spread:.2%}"
    console.print(f"\nForms: RMS of ln(measured/predicted), the best on held-out runs marked *; {noise}")
    console.print(_forms_table(summary))
    for name, found in summary["forms"].items():
        console.print(f"\n{name}: {found['formula']}\n{found['source']}", soft_wrap=True)
        console.print(_constants_table(found, summary))
    if any(found["optima"] for found in summary["forms"].values()):
        console.print(
            f"\nS* at {summary['kept_parameters']:,.0f} needed parameters per token and "
            f"{ranges['tokens'][1]:,.0f} tokens"
        )
        console.print(_optimum_table(summary))
        console.print(
            "S* is the S with the smallest reducible loss (searched from 0 to 0.95); within: the S whose reducible "
            "loss is this close to the smallest; loses beyond: the S from which on the dense model is better; at edge: "
            "bootstrap samples whose S* is 0 or 0.95; !: above every S of the runs. The interval of the printed law "
            "comes from the rounding of its constants."
        )
        console.print(f"warning: {summary['printed']['warning']}")
    for name, reason in summary["not_fitted"].items():
        console.print(f"not fitted: {name}: {reason}")
    if output is not None:
        console.print(f"written to {output}: {', '.join([_FILE, *summary['figures']])}", soft_wrap=True)


def _forms_table(summary: dict[str, Any]) -> Table:
    table = Table()
    columns = ("form", "constants", "fitted runs", "held-out runs", "largest size held out", "longest sparse held out")
    for column in columns:
        table.add_column(column, justify="left" if column == "form" else "right")
    for name, found in summary["forms"].items():
        errors = [found[f"{name}_error"] for name in ("fit", "held_out", "largest_held_out", "longest_held_out")]
        marked = f"{name} *" if name == summary["best"] else name
        table.add_row(marked, str(len(found["constants"])), *("–" if e is None else f"{e:.2%}" for e in errors))
    return table


def _constants_table(found: dict[str, Any], summary: dict[str, Any]) -> Table:
    table = Table()
    columns = ["constant", "value", f"{summary['level']:.0%} interval"]
    if found["printed_unit"]:
        columns.append(f"in its paper ({found['printed_unit']})")
    for column in columns:
        table.add_column(column, justify="left" if column == "constant" else "right")
    for constant, of in found["constants"].items():
        cells = [constant, f"{of['value']:.4g}", _range(of["interval"], ".4g")]
        table.add_row(*cells, *([f"{of['printed']:g}"] if found["printed_unit"] else []))
    return table


def _optimum_table(summary: dict[str, Any]) -> Table:
    table = Table()
    sure = f"{summary['level']:.0%} interval"
    columns = (
        "A/E",
        "S*",
        sure,
        f"within {summary['tolerance']:.1%}",
        sure,
        "dense worse by",
        "loses beyond",
        "at edge",
    )
    table.add_column("form")
    for column in columns:
        table.add_column(column, justify="right")
    for name, found in summary["forms"].items():
        for best in found["optima"]:
            beyond = best["worse_than_dense_beyond"]
            table.add_row(
                name,
                "any" if best["expert_share"] is None else f"{best['expert_share']:.3g}",
                f"{best['sparsity']:.3f}{_beyond(best['sparsity'], summary)}",
                *(_ends(best[ends]) for ends in ("interval", "band", "band_interval")),
                f"{best['dense_excess']:.2%}",
                "–" if beyond is None else f"{beyond:.3f}",
                f"{best['at_edge_share']:.0%}",
            )
    printed = summary["printed"]
    cells = (f"{printed['sparsity']:.3f}", _ends(printed["rounding"]), _ends(printed["band"]))
    table.add_row("q-sparse, printed", "any", *cells, "", "", "", "")
    return table


def _beyond(sparsity: float, summary: dict[str, Any]) -> str:
    """Return the mark of an S* above the largest S of the runs, where the law extrapolates."""
    return " !" if sparsity > summary["ranges"]["sparsity"][1] else ""


def _range(ends: list[float] | tuple[float, float], form: str) -> str:
    return f"{ends[0]:{form}} to {ends[1]:{form}}"


def _ends(ends: list[float] | tuple[float, float]) -> str:
    return f"{ends[0]:.3f}–{ends[1]:.3f}"
