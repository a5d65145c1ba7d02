"""``qsparse-moe allocate``: make a plan with one S per layer, site, and expert, and compare it with other plans."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from qsparse_moe.cli.calibrate import check_output, settings_for, write_plan
from qsparse_moe.cli.console import print_json, result_console
from qsparse_moe.cli.option_values import MODEL_HELP, DataOption, check_sparsity
from qsparse_moe.cli.sensitivity import rich_table
from qsparse_moe.config.file_sources import sources_overrides
from qsparse_moe.errors import ConfigError
from qsparse_moe.runs.find import find_model

if TYPE_CHECKING:
    from qsparse_moe.ablation.allocation.cost import Quantity


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("allocate")(allocate)


def allocate(
    run: Annotated[Path, typer.Argument(help=MODEL_HELP, show_default=False)],
    output: Annotated[Path, typer.Option(help="JSON file to write the plan to.", show_default=False)],
    sparsity: Annotated[
        float | None, typer.Option(help="Budget: mean S, with each matrix weighted by how many tokens use it.")
    ] = None,
    parameters: Annotated[float | None, typer.Option(help="Budget: needed parameters per token.")] = None,
    flops: Annotated[float | None, typer.Option(help="Budget: FLOPs per token in the forward pass.")] = None,
    bytes_: Annotated[float | None, typer.Option("--bytes", help="Budget: bytes of weights read per step.")] = None,
    batch: Annotated[int, typer.Option(help="Number of tokens per step, for --bytes.", min=1)] = 1,
    rows: Annotated[
        int | None,
        typer.Option(
            help="Number of training sequences to make the plans from; default: 4,096 tokens per expert.", min=1
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(help="Number of passes that improve the plan.", min=1)] = 3,
    random: Annotated[int, typer.Option(help="Number of random plans to compare with.", min=0)] = 5,
    train: Annotated[
        int, typer.Option(help="Number of steps to train the model further under each plan before comparing.", min=0)
    ] = 0,
    data: DataOption = None,
    report: Annotated[Path | None, typer.Option(help="Markdown file to write the comparison to.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the output file if there is one.")] = False,
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Device to run on.")] = "cpu",
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Distribute a budget of sparsity so that the loss rises least, and compare with other plans of the same cost."""
    found_model = find_model(run)
    run_dir = found_model.path
    quantity, target = requested_budget(sparsity=sparsity, parameters=parameters, flops=flops, bytes_=bytes_)
    # Before the plans are made, which takes minutes.
    check_output(output, force=force)
    from qsparse_moe.ablation.allocation.report import as_dict, markdown
    from qsparse_moe.ablation.allocation.run import allocate_run
    from qsparse_moe.runs.folder import load_run_config, write_atomically

    found = allocate_run(
        run_dir,
        quantity,
        target,
        batch=batch,
        num_sequences=rows,
        rounds=rounds,
        num_random=random,
        train_steps=train,
        device=device,
        overrides=sources_overrides(data or (), load_run_config(found_model.config_folder).data),
    )
    write_plan(found.plan, output, force=force)
    summary = as_dict(found, run_dir=run_dir, output=output)
    # An allocated plan contains no thresholds, so a run that selects by thresholds has to rank its features to use it.
    summary["settings"] = list(settings_for(load_run_config(found_model.config_folder), output, selection="topk"))
    if report is not None:
        write_atomically(report, markdown(found, title=f"Plans for {run_dir}"))
    if json:
        print_json(summary)
    else:
        _print_summary(summary)


def requested_budget(
    *, sparsity: float | None, parameters: float | None, flops: float | None, bytes_: float | None
) -> tuple[Quantity, float]:
    """Return the quantity that the budget limits, and the limit.

    Raises:
        ConfigError: not exactly one is given, S is outside [0, 1), or another value is negative.
    """
    given: dict[Quantity, float | None] = {
        "sparsity": sparsity,
        "parameters": parameters,
        "flops": flops,
        "bytes": bytes_,
    }
    budgets = [(quantity, value) for quantity, value in given.items() if value is not None]
    if len(budgets) != 1:
        options = " and ".join(f"--{quantity}" for quantity, _ in budgets) or "no budget"
        raise ConfigError(f"{options}: give exactly one of --sparsity, --parameters, --flops, --bytes")
    quantity, target = budgets[0]
    # S has a check of its own, because it also has an upper limit: at S = 1 no feature would be left.
    check_sparsity("--sparsity", sparsity)
    if target < 0.0:
        raise ConfigError(
            f"--{quantity} ({target}) must be at least 0; qsparse-moe describe prints the value of the run"
        )
    return quantity, target


def _print_summary(summary: dict[str, Any]) -> None:
    from qsparse_moe.ablation.allocation.report import HEAD, comparison_rows

    console, rows = result_console(), summary["held_out_rows"]
    summary = summary | {"outcomes": summary["outcomes"] + summary["alternatives"]}
    for title, name in (("Without training", "outcomes"), ("After training", "after_training")):
        if summary[name]:
            console.print(rich_table(f"{title}, on {rows} held-out sequences", HEAD, comparison_rows(summary[name])))
    console.print(
        f"budget            {summary['quantity']} {summary['target']:,.6g}, planned {summary['planned']:,.6g}"
    )
    # With soft_wrap, rich breaks no line that a user copies as a path or a command.
    console.print(f"plan              {summary['output']}", soft_wrap=True)
    console.print(f"to use it         {shlex.join(summary['settings'])}", soft_wrap=True)
