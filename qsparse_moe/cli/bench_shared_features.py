"""``qsparse-moe bench shared-features``: the options, and the table of the result."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from qsparse_moe.cli.console import print_json, result_console, write_json
from qsparse_moe.cli.option_values import MODEL_HELP, check_result_file
from qsparse_moe.errors import ConfigError
from qsparse_moe.runs.find import find_model

_COLUMNS = ("union", "overlap", "kept_per_token", "kept_shared", "kept_average", "relative", "relative_average")


def shared_features(
    run: Annotated[Path, typer.Argument(help=MODEL_HELP, show_default=False)],
    fractions: Annotated[str, typer.Option(help="Values of K / D, separated by commas.")] = "0.5,0.25,0.125",
    group: Annotated[int, typer.Option(help="Number of tokens of a group.", min=2)] = 128,
    rows: Annotated[int, typer.Option(help="Number of validation sequences.", min=2)] = 64,
    output: Annotated[Path | None, typer.Option(help="Also write the result to this JSON file.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure how alike the features of an expert's tokens are, which model.sparsity.selection shared relies on.

    The tokens that an expert gets are compared with others of the same layer, pushed through the same expert. In a
    dense model any tokens are compared.
    """
    check_result_file(output)
    shares = parse_fractions(fractions)
    folder = find_model(run).path
    from qsparse_moe.ablation.sensitivity.documents import validation_documents
    from qsparse_moe.ablation.shared_features import measure_sharing
    from qsparse_moe.data.token_data import load_data
    from qsparse_moe.interop.trained_model import load_trained
    from qsparse_moe.sparsity.plan import SparsityPlan

    config, model, step = load_trained(folder, "cpu", overrides=("model.sparsity.selection=topk",))
    # The features before any selection.
    model.set_sparsity(SparsityPlan.uniform(config.model, 0.0))
    data = load_data(config.data)
    text = validation_documents(data, num_sequences=rows, batch_size=config.training.micro_batch_size)
    found = measure_sharing(model, text, fractions=shares, group=group)
    if not found:
        raise ConfigError(
            f"--group ({group}) must be at most the number of tokens that an expert gets in half of --rows ({rows}) "
            "sequences; use smaller groups, or more sequences"
        )
    result = {"run": str(run), "step": step, "group": group, "sequences": rows, "measured": found}
    if output:
        write_json(output, result)
    print_json(result) if json else result_console().print(_table(found, group))


def parse_fractions(text: str) -> tuple[float, ...]:
    """Return the values of ``--fractions``.

    Raises:
        ConfigError: one is not a number in (0, 1).
    """
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        # Outside of the range, so that the rule below reports it.
        values = (0.0,)
    if not all(0.0 < value < 1.0 for value in values):
        raise ConfigError(f"--fractions ({text}) must be numbers in (0, 1) separated by commas, such as 0.5,0.25")
    return values


def _table(found: list[dict[str, Any]], group: int) -> Table:
    """Return the means over the layers."""
    table = Table(title=f"Groups of {group} tokens, means over layers and experts")
    for column in ("site", "tokens", "K / D", *(name.replace("_", " ") for name in _COLUMNS)):
        table.add_column(column)
    by_row: dict[tuple[str, str, float], list[dict[str, Any]]] = {}
    for entry in found:
        by_row.setdefault((entry["site"], entry["kind"], entry["fraction"]), []).append(entry)
    for (site, kind, fraction), entries in sorted(by_row.items(), key=lambda item: (*item[0][:2], -item[0][2])):
        means = (sum(entry[name] for entry in entries) / len(entries) for name in _COLUMNS)
        table.add_row(site, kind, f"{fraction:g}", *(f"{value:.3f}" for value in means))
    return table
