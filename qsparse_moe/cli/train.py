"""``qsparse-moe train``: train one run from its YAML file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qsparse_moe.cli.console import is_rank_zero, print_json, result_console
from qsparse_moe.cli.progress import TrainingProgress
from qsparse_moe.config.load import load_config
from qsparse_moe.config.rules import check_trainable, check_world_size
from qsparse_moe.runs.find import find_initial_weights
from qsparse_moe.runs.folder import check_run_folder, check_steps, init_from
from qsparse_moe.training.distributed.launcher_environment import launcher_world_size

if TYPE_CHECKING:
    from qsparse_moe.runs.report import StepReport, TrainingResult


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("train")(train)


def train(
    config: Annotated[Path, typer.Argument(help="YAML file of the run.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings such as training.steps=50.", show_default=False)
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the summary as one JSON object.")] = False,
) -> None:
    """Train a model. Runs on one process or under the deepspeed launcher."""
    run = load_config(config, overrides or ())
    check_world_size(run, launcher_world_size())
    if is_rank_zero():  # on one rank only: another might check after this one has created the folder
        # A run that resumes was allowed to start, perhaps by a version without this rule.
        resumes = check_run_folder(run)
        if not resumes:
            check_trainable(run)
        check_steps(run)
        if (weights := init_from(run, resumes=resumes)) is not None:
            find_initial_weights(weights)
    # Imported after all checks: a wrong setting is reported within a second.
    from qsparse_moe.data.tokenizer import with_vocabulary

    run = with_vocabulary(run)
    from qsparse_moe.interop.training import train as train_run
    from qsparse_moe.metrics.recorder import Recorder

    with TrainingProgress(run.training.steps) as progress:
        result = train_run(run, listeners=(Recorder(run), progress))
    if is_rank_zero():
        summary = summarize(result, progress.last)
        print_json(summary) if json else _print_summary(summary)
    # The code is 128 + N after a signal, so that a scheduler does not take a stopped run for a finished one.
    raise typer.Exit(result.exit_code)


def summarize(result: TrainingResult, last: StepReport | None) -> dict[str, Any]:
    """Return the summary of a run in the form of ``--json``; ``last`` is None if no step was left to do."""
    return {
        "run_dir": str(result.run_dir),
        "step": result.step,
        "tokens": result.tokens,
        "seconds": result.seconds,
        "loss": last.losses["loss"] if last else None,
        "tokens_per_second": last.tokens_per_second if last else None,
        "validation": result.validation,
        "stopped_by": result.stopped_by,
    }


def _print_summary(summary: dict[str, Any]) -> None:
    console = result_console()
    console.print(f"{summary['step']} steps, {summary['tokens']:,} tokens, {summary['seconds']:.1f} s of training")
    if summary["loss"] is not None:
        console.print(f"loss of the last step        {summary['loss']:.4f} nats per token")
    if summary["validation"] is not None:
        console.print(f"validation                   {summary['validation']['bits_per_byte']:.4f} bits per byte")
    console.print(f"run folder                   {summary['run_dir']}", soft_wrap=True)
