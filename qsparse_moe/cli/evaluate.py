"""``qsparse-moe evaluate``: how a run's newest checkpoint does on validation rows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from qsparse_moe.cli.console import is_rank_zero, print_json, result_console
from qsparse_moe.cli.run_folder import find_run

if TYPE_CHECKING:
    from qsparse_moe.training.evaluate import Evaluation


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("evaluate")(evaluate)


def evaluate(
    run: Annotated[Path, typer.Argument(help="Run folder.", show_default=False)],
    rows: Annotated[
        int | None, typer.Option(help="Validation rows; without it training.evaluation_rows.", min=1)
    ] = None,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where it runs.")] = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Evaluate a run's newest checkpoint. Alone, or on the ranks of the deepspeed launcher."""
    run_dir = find_run(run)
    from qsparse_moe.training.evaluate import evaluate_run

    evaluation = evaluate_run(run_dir, num_rows=rows, device=device)
    if is_rank_zero():
        print_json({"run_dir": str(run_dir), **evaluation.as_dict()}) if json else _print_figures(evaluation)


def _print_figures(evaluation: Evaluation) -> None:
    console = result_console()
    ratio = evaluation.bits_per_byte / evaluation.unigram_bits_per_byte
    console.print(f"after step {evaluation.step}, on {evaluation.rows} validation rows")
    console.print(f"loss              {evaluation.loss:.4f} nats a token")
    console.print(f"perplexity        {evaluation.perplexity:.3f}")
    console.print(f"bits a byte       {evaluation.bits_per_byte:.4f}")
    console.print(f"unigram model's   {evaluation.unigram_bits_per_byte:.4f}, of which this is {ratio:.3f}")
