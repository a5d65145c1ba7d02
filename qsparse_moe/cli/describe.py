"""``qsparse-moe describe``: the size, the work and the sparsity of a model, counted from its settings alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from qsparse_moe.accounting.densities import kept_features
from qsparse_moe.accounting.flops import forward_flops
from qsparse_moe.accounting.parameters import count_by_part, count_parameters
from qsparse_moe.cli.console import print_json, result_console
from qsparse_moe.cli.run_folder import find_run
from qsparse_moe.config.load import load_config
from qsparse_moe.config.schema import ModelConfig, RunConfig, Site
from qsparse_moe.config.shapes import layer_sites, model_sites, site_width
from qsparse_moe.sparsity.plan import SparsityPlan
from qsparse_moe.training.run_folder import CONFIG_FILE


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("describe")(describe)


def describe(
    path: Annotated[Path, typer.Argument(metavar="CONFIG|RUN", help="YAML file or run folder.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings such as model.sparsity.default=0.5.", show_default=False)
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Count a model's parameters and operations. With routing alone and with Q-Sparse; nothing is built."""
    file = find_run(path) / CONFIG_FILE if path.is_dir() else path
    description = describe_run(load_config(file, overrides or ()))
    print_json(description) if json else _print_tables(description)


def describe_run(config: RunConfig) -> dict[str, Any]:
    """The figures of a run's model, in the form of ``--json``.

    ``stored`` counts every parameter, ``active`` those that a token uses by routing, ``kept`` those whose input
    Q-Sparse keeps too. Operations are per token of a forward pass over a full row.
    """
    model, context = config.model, config.data.sequence_length
    flops = forward_flops(model, context)
    return {
        "name": config.training.name,
        "parameters": vars(count_parameters(model)),
        "parameters_by_part": {part: vars(counted) for part, counted in count_by_part(model).items()},
        "forward_flops_per_token": {"context": context, **vars(flops)},
        "mean_sparsity": SparsityPlan.from_config(model).mean,
        "sites": {site: _site(model, site) for site in model_sites(model)},
        "tokens_per_step": config.training.global_batch_size * context,
        "tokens": config.training.steps * config.training.global_batch_size * context,
    }


def _site(model: ModelConfig, site: Site) -> dict[str, int]:
    plan = SparsityPlan.from_config(model)
    layers = [layer for layer in range(model.num_layers) if site in layer_sites(model, layer)]
    kept = [k for layer in layers for k in kept_features(model, plan, layer, site)]
    return {"layers": len(layers), "width": site_width(model, site), "least_kept": min(kept), "most_kept": max(kept)}


def _print_tables(description: dict[str, Any]) -> None:
    console = result_console()
    for table in (_parameter_table(description), _flops_table(description), _site_table(description)):
        console.print(table)
    steps = f"{description['tokens_per_step']:,} tokens a step, {description['tokens']:,} in the run"
    console.print(steps)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(columns[0])
    for column in columns[1:]:
        table.add_column(column, justify="right")
    return table


def _parameter_table(description: dict[str, Any]) -> Table:
    table = _table("Parameters", "part", "stored", "active by routing", "and kept by Q-Sparse")
    for part, counted in description["parameters_by_part"].items():
        table.add_row(part, *_counts(counted))
    table.add_section()
    table.add_row("all", *_counts(description["parameters"]))
    return table


def _counts(counted: dict[str, float]) -> list[str]:
    return [f"{counted[kind]:,.0f}" for kind in ("stored", "active", "kept")]


def _flops_table(description: dict[str, Any]) -> Table:
    flops = description["forward_flops_per_token"]
    table = _table(f"Operations of a token, forward, {flops['context']} tokens of context", "", "FLOPs")
    table.add_row("with routing: what a dense kernel multiplies", f"{flops['routed']:,.0f}")
    table.add_row("and Q-Sparse: what is left if every zero is skipped", f"{flops['kept']:,.0f}")
    table.add_row("of these, attention scores", f"{flops['attention_scores']:,.0f}")
    table.add_row("of these, the selection (at least)", f"{flops['selection']:,.0f}")
    return table


def _site_table(description: dict[str, Any]) -> Table:
    mean = description["mean_sparsity"]
    table = _table(f"Q-Sparse: mean S {mean:.4f}", "site", "layers", "width", "K")
    for site, place in description["sites"].items():
        least, most = place["least_kept"], place["most_kept"]
        table.add_row(
            site, str(place["layers"]), str(place["width"]), str(least) if least == most else f"{least} to {most}"
        )
    return table
