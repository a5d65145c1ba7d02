"""``qsparse-moe allocate``: make a plan of S and experts per token, and compare it with other plans."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from qsparse_moe.ablation.allocation.budget import Budget, check_decoding, parse_budget, parse_front
from qsparse_moe.ablation.allocation.defaults import NUM_RANDOM, ROUNDS
from qsparse_moe.cli.allocation_files import (
    FOLDER,
    check_no_report,
    check_report,
    write_joint_reports,
    write_sparsity_reports,
)
from qsparse_moe.cli.calibrate import check_output, settings_for, write_plan
from qsparse_moe.cli.console import is_rank_zero, print_json, result_console
from qsparse_moe.cli.option_values import MODEL_HELP, DataOption, ShardOption, check_shard, check_sparsity
from qsparse_moe.cli.sensitivity import rich_table
from qsparse_moe.config.file_sources import sources_overrides
from qsparse_moe.errors import ConfigError
from qsparse_moe.runs.find import ModelFolder, find_model
from qsparse_moe.runs.folder import load_run_config

if TYPE_CHECKING:
    from qsparse_moe.ablation.allocation.budget import Quantity
    from qsparse_moe.ablation.allocation.joint_run import JointAllocation


PLANS = "plans"
"""The folder of all plans, in that of the reports."""


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("allocate")(allocate)


def allocate(
    run: Annotated[Path, typer.Argument(help=MODEL_HELP, show_default=False)],
    output: Annotated[Path, typer.Option(help="JSON file to write the plan to.", show_default=False)],
    budget: Annotated[
        str | None,
        typer.Option(
            help="Budget of both sparsities, S and experts per token: bytes=0.5@batch=1, flops=0.6, parameters=0.4, or "
            "ms=0.5. A value up to 1 is a share of the dense model's cost. The options below allocate S alone."
        ),
    ] = None,
    front: Annotated[
        str | None,
        typer.Option(help="With --budget: also compare at the shares LOW:HIGH:STEP of its quantity, as 0.3:0.9:0.1."),
    ] = None,
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
    held_out: Annotated[
        int | None,
        typer.Option(
            help="With --budget: number of validation sequences to compare on; default: training.evaluation_rows.",
            min=1,
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(help="Number of passes that improve the plan.", min=1)] = ROUNDS,
    random: Annotated[int, typer.Option(help="Number of random plans to compare with.", min=0)] = NUM_RANDOM,
    greedy: Annotated[
        bool, typer.Option(help="With --budget: compare with a greedy plan, which takes longest.")
    ] = True,
    train: Annotated[
        int,
        typer.Option(
            "--train",
            "--train-steps",
            help="Number of steps to train the model further under each plan before comparing.",
            min=0,
        ),
    ] = 0,
    decode: Annotated[
        bool,
        typer.Option("--decode", help="With --budget: also measure the decode engine native under every plan."),
    ] = False,
    data: DataOption = None,
    report: Annotated[
        Path | None, typer.Option(help="Markdown file to write the comparison to, with a page (.html) beside it.")
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option(
            help="With --budget: folder for allocation.json, report.md, report.html, and figures; default: "
            "RUN/allocation."
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the output file if there is one.")] = False,
    shard: ShardOption = None,
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Device to run on.")] = "cpu",
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Distribute a budget of sparsity so that the loss rises least, and compare with other plans of the same cost.

    Runs on one process or under the deepspeed launcher.
    """
    found_model = find_model(run)
    run_dir = found_model.path
    check_shard(shard, "allocate")
    given = {"--sparsity": sparsity, "--parameters": parameters, "--flops": flops, "--bytes": bytes_}
    if budget is not None:
        budgets = joint_budgets(budget, front, others=[name for name, value in given.items() if value is not None])
        check_decoding(budgets[0], decode=decode)
        check_no_report(report)
        if is_rank_zero():  # as below
            check_output(output, force=force)
        sources = sources_overrides(data or (), load_run_config(found_model.config_folder).data)
        summary = _jointly(
            found_model,
            budgets,
            output,
            folder or run_dir / FOLDER,
            options={
                "num_sequences": rows,
                "num_held_out": held_out,
                "rounds": rounds,
                "num_random": random,
                "greedy": greedy,
                "train_steps": train,
                "decode": decode,
            },
            force=force,
            device=device,
            overrides=sources,
            shard=shard,
        )
        if is_rank_zero():
            print_json(summary) if json else _print_joint(summary)
        return
    check_no_joint_options({"--front": front, "--held-out": held_out, "--folder": folder, "--decode": decode or None})
    quantity, target = requested_budget(sparsity=sparsity, parameters=parameters, flops=flops, bytes_=bytes_)
    check_report(report)
    # Before the plans are made, which takes minutes.
    if is_rank_zero():  # on one rank only: another might check after this one has written the file
        check_output(output, force=force)
    from qsparse_moe.ablation.allocation.report import as_dict
    from qsparse_moe.ablation.allocation.run import allocate_run

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
        shard=shard,
    )
    if not is_rank_zero():
        return
    write_plan(found.plan, output, force=force)
    summary = as_dict(found, run_dir=run_dir, output=output)
    # An allocated plan contains no thresholds, so a run that selects by thresholds has to rank its features to use it.
    summary["settings"] = list(settings_for(load_run_config(found_model.config_folder), output, selection="topk"))
    write_sparsity_reports(found, summary, report)
    if json:
        print_json(summary)
    else:
        _print_summary(summary)


def joint_budgets(budget: str, front: str | None, *, others: Sequence[str]) -> list[Budget]:
    """Return the budget of the plan, and behind it those of the front.

    Raises:
        ConfigError: a budget is malformed, or ``others`` names a second one.
    """
    if others:
        raise ConfigError(
            f"--budget ({budget}) and {' and '.join(others)}: give one budget; --budget allocates both sparsities, the "
            "other options S alone"
        )
    first = parse_budget(budget)
    shares = [] if front is None else [share for share in parse_front(front) if share != first.value]
    return [first, *(Budget(first.quantity, share, first.batch) for share in shares)]


def check_no_joint_options(given: Mapping[str, object]) -> None:
    """Raise ConfigError if an option is given that only --budget has."""
    wrong = [name for name, value in given.items() if value is not None]
    if wrong:
        raise ConfigError(f"{' and '.join(wrong)}: only with --budget, such as --budget bytes=0.5@batch=1")


def _jointly(
    found_model: ModelFolder,
    budgets: list[Budget],
    output: Path,
    folder: Path,
    *,
    options: dict[str, Any],
    force: bool,
    device: str,
    overrides: Sequence[str],
    shard: bool | None,
) -> dict[str, Any]:
    """Allocate and compare, write all files, and return the JSON."""
    from qsparse_moe.ablation.allocation.joint_plans import JOINT
    from qsparse_moe.ablation.allocation.joint_report import as_dict, write_plans
    from qsparse_moe.ablation.allocation.joint_run import JointOptions, allocate_budgets

    if is_rank_zero():
        (folder / PLANS).mkdir(parents=True, exist_ok=True)
    settings = list(settings_for(load_run_config(found_model.config_folder), output, selection="topk"))

    def write(found: JointAllocation) -> dict[str, Any]:
        """Write everything that is known so far, because a front takes hours."""
        if len(found.results) == 1:
            write_plan(found.results[0].plans[JOINT], output, force=force)
        write_plans(found.results[-1], folder / PLANS)
        summary = as_dict(found, run_dir=found_model.path, output=output) | {"settings": settings}
        write_joint_reports(found, summary, folder)
        print(f"compared {found.results[-1].budget.text}", file=sys.stderr, flush=True)
        return summary

    summary: dict[str, Any] = {}
    allocate_budgets(
        found_model.path,
        budgets,
        JointOptions(**options),
        device=device,
        overrides=overrides,
        shard=shard,
        notify=lambda found: summary.update(write(found)) if is_rank_zero() else None,
    )
    return summary


def _print_joint(summary: dict[str, Any]) -> None:
    from qsparse_moe.ablation.allocation.joint_report import DECODE_HEAD, HEAD, decode_rows, joint_rows

    console, dense = result_console(), summary["dense"]["cost"]
    for budget in summary["budgets"]:
        title = f"{budget['budget']}, on {summary['held_out_rows']} held-out sequences"
        console.print(rich_table(title, HEAD, joint_rows(budget, dense)))
        for name, reason in budget["left_out"].items():
            console.print(f"no plan {name}: {reason}")
        if budget["decoding"]:
            console.print(rich_table("Decoding with the engine native", DECODE_HEAD, decode_rows(budget)))
        if budget["after_training"]:
            rows = joint_rows(budget, dense, after_training=True)
            console.print(rich_table(f"After {summary['train_steps']} steps of training", HEAD, rows))
    console.print(f"plan              {summary['output']}", soft_wrap=True)
    console.print(f"to use it         {shlex.join(summary['settings'])}", soft_wrap=True)


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
