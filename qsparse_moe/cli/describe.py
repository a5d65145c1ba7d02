"""``qsparse-moe describe``: count the parameters, FLOPs, bytes, and memory of a model from its settings alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from qsparse_moe.accounting.description import BATCHES, describe_run
from qsparse_moe.accounting.traffic import union
from qsparse_moe.cli.console import print_json, result_console
from qsparse_moe.config.load import load_config
from qsparse_moe.config.router_rules import untrained_router
from qsparse_moe.config.schema import RunConfig
from qsparse_moe.errors import ConfigError
from qsparse_moe.metrics.jsonl import read_metrics
from qsparse_moe.metrics.natural_zeros import natural_zeros, natural_zeros_warning
from qsparse_moe.runs.find import find_run
from qsparse_moe.runs.folder import CONFIG_FILE

_BAR = 40
_UNION_COLUMNS = {
    "routed": "experts",
    "input_rows": "rows of gate",
    "up_elements": "elements of up, gate first",
    "hidden_rows": "rows of down",
}
_UNITS = ("B", "KB", "MB", "GB", "TB")


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("describe")(describe)


def describe(
    path: Annotated[Path, typer.Argument(metavar="CONFIG|RUN", help="YAML file or run folder.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings such as model.sparsity.default=0.5.", show_default=False)
    ] = None,
    ranks: Annotated[int, typer.Option(help="Number of ranks over which the training state is sharded.", min=1)] = 1,
    measure: Annotated[
        int,
        typer.Option(help="For a run: number of validation sequences to measure routing and masks on.", min=0),
    ] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Count a model's parameters, FLOPs, bytes, and memory, with routing alone and with Q-Sparse; nothing is built.

    For a run folder, the tables also show the zeros measured in its last logged step, and with --measure the weights
    that real tokens need, compared with the formula for independent tokens.
    """
    folder = find_run(path) if path.is_dir() else None
    config = load_config(path if folder is None else folder / CONFIG_FILE, overrides or ())
    # The sizes of the embedding and the head depend on the tokenizer.
    config = with_vocabulary_size(config)
    # With other settings, the zeros that the run has measured do not apply.
    rows = read_metrics(folder / "metrics.jsonl") if folder is not None and not overrides else []
    if measure and (folder is None or overrides):
        raise ConfigError(
            f"--measure ({measure}) needs a run folder with a checkpoint and no other settings; got {path} with "
            f"{len(overrides or ())} settings. Name a folder made by qsparse-moe train, without settings"
        )
    description = describe_run(config, rows[-1] if rows else None, ranks=ranks)
    problem = untrained_router(config.model)
    # This is an error in train and a warning here, because a run that was trained this way can still be described.
    description["warnings"] = [problem] if problem else []
    description["warnings"] += [natural_zeros_warning(found) for found in natural_zeros(rows[-1] if rows else {})]
    if folder is not None and measure:
        description["measured_unions"] = _measure(folder, measure)
    print_json(description) if json else _print_tables(description)


def with_vocabulary_size(config: RunConfig) -> RunConfig:
    """Return ``config`` with its vocabulary size, read from the tokenizer unless it is set or known."""
    if config.model.vocab_size is not None or config.data.tokenizer == "bytes":
        return config
    # Imported here, because most calls need no tokenizer, which may have to be read from a file.
    from qsparse_moe.data.tokenizer import with_vocabulary

    return with_vocabulary(config)


def _measure(folder: Path, num_sequences: int) -> list[dict[str, Any]]:
    """Return the fractions of the experts' weights read by B real tokens and by B independent tokens."""
    from qsparse_moe.data.token_data import load_data
    from qsparse_moe.interop.trained_model import load_trained
    from qsparse_moe.model.unions import measured_unions

    config, model, _ = load_trained(folder)
    data = load_data(config.data)
    table, indices = data.evaluation_sequences(num_sequences)
    tokens_RS = table.batch(table.tokens(indices)).tokens_BS
    # A step has one token per sequence, so a batch of B needs B sequences.
    found = measured_unions(model, tokens_RS, [batch for batch in BATCHES if batch <= len(tokens_RS)])
    # The first batch has one token, whose frequencies the formula for independent tokens starts from.
    alone = {name: getattr(found[0], name) for name in _UNION_COLUMNS}
    return [
        {"batch": point.batch}
        | {
            name: {"measured": getattr(point, name), "independent": union(share, point.batch)}
            for name, share in alone.items()
        }
        for point in found
    ]


def _print_tables(description: dict[str, Any]) -> None:
    console = result_console()
    tables = (
        _parameter_table(description),
        _flops_table(description),
        _flops_by_site_table(description),
        _traffic_table(description),
        _memory_table(description),
        _site_table(description),
        *([_experts_table(description)] if description["experts_per_token"] else []),
    )
    for table in (*tables, *([_union_table(description)] if "measured_unions" in description else [])):
        console.print(table)
    steps = f"{description['tokens_per_step']:,} tokens per step, {description['tokens']:,} in the run"
    console.print(steps)
    for warning in description["warnings"]:
        console.print(f"warning: {warning}", soft_wrap=True, highlight=False, markup=False)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(columns[0])
    for column in columns[1:]:
        table.add_column(column, justify="right")
    return table


def _measured_column(description: dict[str, Any]) -> list[str]:
    measured = description["measured"]
    return [f"measured in step {measured['step']}"] if measured else []


def _parameter_table(description: dict[str, Any]) -> Table:
    table = _table(
        "Parameters", "part", "stored", "active by routing", "needed with Q-Sparse", *_measured_column(description)
    )
    measured = description["measured"]
    for part, counted in description["parameters_by_part"].items():
        table.add_row(part, *_counts(counted, measured and measured["parameters_by_part"][part]))
    table.add_section()
    table.add_row("all", *_counts(description["parameters"], measured and measured["parameters"]))
    table.add_row("with the full embedding", *_counts(description["parameters_with_embedding"], None))
    return table


def _counts(counted: dict[str, float], measured: dict[str, float] | None) -> list[str]:
    values = [counted[kind] for kind in ("stored", "active", "kept")] + ([measured["kept"]] if measured else [])
    return [f"{value:,.0f}" for value in values]


def _flops_table(description: dict[str, Any]) -> Table:
    forward, training = description["forward_flops_per_token"], description["training_flops_per_token"]
    measured = description["measured"]
    table = _table(
        f"FLOPs per token, {forward['context']} tokens of context",
        "",
        "forward",
        "forward and backward",
        *(f"forward, {column}" for column in _measured_column(description)),
    )
    rows = {
        "routed": "with routing, as dense kernels execute",
        "kept": "with Q-Sparse, if every zero is skipped",
        "attention_scores": "attention scores, included above",
        "selection": "selection, included above (at least)",
    }
    for name, label in rows.items():
        extra = [measured["forward_flops_per_token"][name]] if measured else []
        table.add_row(label, *(f"{value:,.0f}" for value in (forward[name], training[name], *extra)))
    return table


def _flops_by_site_table(description: dict[str, Any]) -> Table:
    table = _table("Forward FLOPs per token by site", "matrices behind", "routed", "with Q-Sparse", "selection")
    for name, flops in description["forward_flops_by_site"].items():
        table.add_row(name, *(f"{flops[kind]:,.0f}" for kind in ("routed", "kept", "selection")))
    return table


def _traffic_table(description: dict[str, Any]) -> Table:
    """Return the table of the union over B independent tokens, as bars that show fractions of all weights."""
    chosen = description["measured"] or description
    zeros = f", with the zeros of step {description['measured']['step']}" if description["measured"] else ""
    table = _table(f"Weights read per step of B independent tokens{zeros}", "B")
    table.caption, table.caption_justify = "░ by routing   █ with Q-Sparse", "left"
    table.add_column("fraction of all weights", min_width=_BAR)
    table.add_column("routed", justify="right")
    table.add_column("with Q-Sparse", justify="right")
    for point in chosen["bytes_read"]:
        routed, needed = (point[name] / point["stored"] for name in ("routed", "kept"))
        filled, outlined = round(_BAR * needed), round(_BAR * routed)
        bar = "█" * filled + "░" * (outlined - filled)
        table.add_row(str(point["batch"]), bar, _size(point["routed"]), _size(point["kept"]))
    return table


def _union_table(description: dict[str, Any]) -> Table:
    table = _table("Weights of the routed experts read per step of B real tokens", "B", *_UNION_COLUMNS.values())
    table.caption, table.caption_justify = (
        "in brackets: B independent tokens with the same frequencies",
        "left",
    )
    for point in description["measured_unions"]:
        shares = (point[name] for name in _UNION_COLUMNS)
        cells = (f"{100 * share['measured']:.1f} % ({100 * share['independent']:.1f} %)" for share in shares)
        table.add_row(str(point["batch"]), *cells)
    return table


def _memory_table(description: dict[str, Any]) -> Table:
    memory = description["memory"]
    title = f"Training state on one of {memory['ranks']} ranks"
    table = _table(title, "ZeRO stage", "weights", "gradients", "optimizer", "all")
    for stage, parts in memory["training_state_by_zero_stage"].items():
        table.add_row(stage, *(_size(parts[name]) for name in ("weights", "gradients", "optimizer", "total")))
    activations = memory["activations"]
    table.caption = (
        f"plus the activations of one micro-batch: {_size(activations['kept'])} saved for the backward pass"
        f"{_recomputed(activations['recomputed'])}; "
        f"key-value cache: {_size(memory['kv_cache_bytes_per_token'])} per token"
    )
    table.caption_justify = "left"
    return table


def _recomputed(num_bytes: float) -> str:
    return f", {_size(num_bytes)} more while a layer is recomputed" if num_bytes else ""


def _size(num_bytes: float) -> str:
    """Format bytes in the decimal unit that leaves one to three digits before the point."""
    unit = 0
    while num_bytes >= 1000 and unit < len(_UNITS) - 1:
        num_bytes, unit = num_bytes / 1000, unit + 1
    return f"{num_bytes:.3g} {_UNITS[unit]}"


def _experts_table(description: dict[str, Any]) -> Table:
    measured = description["measured"]
    table = _table("Experts per token of the plan", "layer", "at most", "top-p", *_measured_column(description))
    for own in description["experts_per_token"]:
        row = [str(own["layer"]), str(own["most"]), f"{own['top_p']:g}"]
        table.add_row(*row, *(["–" if own["measured"] is None else f"{own['measured']:.3g}"] if measured else []))
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
