"""``qsparse-moe evaluate --compare``: differences from a reference as tables, in JSON, and in TensorBoard."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from qsparse_moe.cli.console import print_json, result_console, write_json
from qsparse_moe.cli.evaluation_files import EvaluationFiles
from qsparse_moe.cli.evaluation_options import ModelOptions, check_one_process, report_progress
from qsparse_moe.cli.option_names import naming_options

if TYPE_CHECKING:
    from rich.console import Console

    from qsparse_moe.inference.comparison.continuations import ContinuationChange
    from qsparse_moe.inference.comparison.measure import Comparison
    from qsparse_moe.inference.comparison.run import ComparedModels


@dataclass(frozen=True)
class CompareOptions:
    """The options of ``evaluate`` that concern a comparison."""

    reference: str
    rows: int | None
    files: tuple[str, ...]
    prompts: int
    prompt_tokens: int | None
    new_tokens: int | None
    batch_size: int


def compare_and_print(model: ModelOptions, options: CompareOptions, *, output: Path | None, as_json: bool) -> None:
    """Compare the model with the reference, write the results, and print them."""
    check_one_process("--compare")
    name = f"comparison/{model.plan_name or 'run'}-against-{Path(options.reference).stem}"
    files = EvaluationFiles.of(model.found, name, output)
    from qsparse_moe.inference.comparison.run import compare_folder

    with naming_options():
        compared = compare_folder(
            model.found.path,
            options.reference,
            plan=model.plan,
            num_sequences=options.rows,
            files=options.files,
            num_prompts=options.prompts,
            prompt_tokens=options.prompt_tokens,
            new_tokens=options.new_tokens,
            batch_size=options.batch_size,
            engine="auto" if model.engine == "inference" else "torch",
            weights=model.weights,
            head=model.head,
            device=model.device,
            notify=report_progress,
        )
    # Printed first: what took long is not lost to a full disk.
    print_json(compared.as_dict()) if as_json else _print_tables(compared)
    write_json(files.json, compared.as_dict())
    if files.tensorboard is not None:
        from qsparse_moe.inference.comparison.figures import comparison_figures
        from qsparse_moe.metrics.evaluation import write_evaluation

        write_evaluation(files.tensorboard, comparison_figures(compared), compared.step)


def _print_tables(compared: ComparedModels) -> None:
    console, found = result_console(), compared.comparison
    console.print(
        f"after step {compared.step}, mean S {compared.sparsity:.4f}, against {compared.reference} with mean S "
        f"{compared.reference_sparsity:.4f}, on {found.outputs.num_tokens} tokens of "
        f"{compared.num_sequences} sequences",
        soft_wrap=True,
    )
    console.print(f"KL divergence      {found.outputs.kl_divergence:.4f} nats per token")
    console.print(f"top-1 agreement    {found.outputs.top1_agreement:.4f}")
    console.print(
        f"loss               {found.outputs.loss:.4f}, reference {found.outputs.reference_loss:.4f} nats per token"
    )
    if found.continuations is not None:
        _print_texts(console, found.continuations)
    console.print(_layer_table(found))


def _print_texts(console: Console, texts: ContinuationChange) -> None:
    median = texts.median_first_difference
    console.print(
        f"greedy text        {texts.agreement:.4f} of the tokens agree, on {texts.num_prompts} prompts of at most "
        f"{texts.new_tokens} new tokens",
        soft_wrap=True,
    )
    console.print(
        f"first difference   {'none in most prompts' if median is None else f'at token {median:g} (median, from 0)'}; "
        f"{texts.never_parts:.4f} of the prompts never part",
        soft_wrap=True,
    )
    console.print(
        f"drift              the reference would choose {texts.drift_agreement:.4f} of the model's tokens, and gives "
        f"them {texts.drift_log_probability:.4f} nats (its own: {texts.reference_log_probability:.4f})",
        soft_wrap=True,
    )


def _layer_table(found: Comparison) -> Table:
    """Return one row per layer; a layer without a router has a dash."""
    table = Table(title="By layer", title_justify="left")
    head = ("layer", "choices changed", "first changed", "changed locally", "hidden error", "cosine", "error locally")
    for column in head:
        table.add_column(column, justify="right")
    for layer in found.layers:
        routing, local = layer.routing, layer.local_routing
        changes = (
            ("–", "–", "–")
            if routing is None or local is None
            else (f"{value:.4f}" for value in (routing.choices_changed, routing.first_changed, local.choices_changed))
        )
        hidden = (layer.hidden.error, layer.hidden.cosine, layer.local_hidden.error)
        table.add_row(str(layer.layer), *changes, *(f"{value:.4f}" for value in hidden))
    return table
