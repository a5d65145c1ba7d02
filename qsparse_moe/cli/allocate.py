"""``qsparse-moe allocate``: make a plan of S and experts per token, and compare it with other plans."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from qsparse_moe.ablation.allocation.budget import Budget, check_decoding
from qsparse_moe.ablation.allocation.defaults import NUM_RANDOM, ROUNDS
from qsparse_moe.cli.allocation_files import (
    FOLDER,
    check_joint_folder,
    check_no_report,
    check_report,
    write_joint_reports,
    write_sparsity_reports,
)
from qsparse_moe.cli.allocation_options import check_no_joint_options, given_once, joint_budgets, requested_budget
from qsparse_moe.cli.calibrate import check_output, settings_for, write_plan
from qsparse_moe.cli.console import is_rank_zero, print_json, result_console
from qsparse_moe.cli.option_values import MODEL_HELP, DataOption, ShardOption, check_folder, check_shard
from qsparse_moe.cli.sensitivity import rich_table
from qsparse_moe.config.file_sources import sources_overrides
from qsparse_moe.runs.find import ModelFolder, find_model
from qsparse_moe.runs.folder import load_run_config

if TYPE_CHECKING:
    from qsparse_moe.ablation.allocation.joint_run import JointAllocation


# Lists, so that a budget that is given twice can be refused; the help shows one number.
_NUMBER = "<float>"
PLANS = "plans"
"""The folder of all plans, in that of the reports."""


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("allocate")(allocate)


def allocate(
    run: Annotated[Path, typer.Argument(help=MODEL_HELP, show_default=False)],
    output: Annotated[Path, typer.Option(help="JSON file to write the plan to.", show_default=False)],
    budget: Annotated[
        list[str] | None,
        typer.Option(
            help="Budget of both sparsities, S and experts per token: bytes=0.5@batch=1, flops=0.6, parameters=0.4, "
            "ms=0.5, or ms=0.2ms. A value up to 1 without ms behind it is a share of the dense model's cost. The "
            "options below allocate S alone.",
            metavar="<budget>",
            show_default=False,
        ),
    ] = None,
    front: Annotated[
        str | None,
        typer.Option(help="With --budget: also compare at the shares LOW:HIGH:STEP of its quantity, as 0.3:0.9:0.1."),
    ] = None,
    sparsity: Annotated[
        list[float] | None,
        typer.Option(help="Budget: mean S, with each matrix weighted by how many tokens use it.", metavar=_NUMBER),
    ] = None,
    parameters: Annotated[
        list[float] | None, typer.Option(help="Budget: needed parameters per token.", metavar=_NUMBER)
    ] = None,
    flops: Annotated[
        list[float] | None, typer.Option(help="Budget: FLOPs per token in the forward pass.", metavar=_NUMBER)
    ] = None,
    bytes_: Annotated[
        list[float] | None,
        typer.Option("--bytes", help="Budget: bytes of weights read per step.", metavar=_NUMBER),
    ] = None,
    batch: Annotated[
        int | None, typer.Option(help="Number of tokens per step, for --bytes; default: 1.", min=1)
    ] = None,
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
        bool | None,
        typer.Option(
            "--greedy/--no-greedy",
            help="With --budget: compare with a greedy plan, which takes longest; default: --greedy.",
            show_default=False,
        ),
    ] = None,
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
    force: Annotated[
        bool, typer.Option("--force", help="Replace the output file, and an earlier allocation in the folder.")
    ] = False,
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
    limits = {option: given_once(option, values) for option, values in given.items()}
    joint = given_once("--budget", budget)
    if joint is not None:
        others = [option for option, value in limits.items() if value is not None]
        budgets = joint_budgets(joint, front, others=others, batch=batch)
        check_decoding(budgets[0], decode=decode)
        check_no_report(report)
        reports = folder or run_dir / FOLDER
        if is_rank_zero():  # as below
            check_output(output, force=force)
            check_folder("--folder", reports)
            check_joint_folder(reports, force=force)
        sources = sources_overrides(data or (), load_run_config(found_model.config_folder).data)
        summary = _jointly(
            found_model,
            budgets,
            output,
            reports,
            options={
                "num_sequences": rows,
                "num_held_out": held_out,
                "rounds": rounds,
                "num_random": random,
                "greedy": greedy is not False,
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
    check_no_joint_options(
        {
            "--front": front,
            "--held-out": held_out,
            "--folder": folder,
            "--decode": decode,
            "--greedy": greedy is True,
            "--no-greedy": greedy is False,
        }
    )
    quantity, target = requested_budget(
        sparsity=limits["--sparsity"],
        parameters=limits["--parameters"],
        flops=limits["--flops"],
        bytes_=limits["--bytes"],
        batch=batch,
    )
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
        batch=batch or 1,
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

    settings = list(settings_for(load_run_config(found_model.config_folder), output, selection="topk"))

    def write(found: JointAllocation) -> dict[str, Any]:
        """Write everything that is known so far, because a front takes hours."""
        if len(found.results) == 1:
            write_plan(found.results[0].plans[JOINT], output, force=force)
        (folder / PLANS).mkdir(parents=True, exist_ok=True)
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
