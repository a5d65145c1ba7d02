"""``qsparse-moe bench drop-in``: the options, and the table of the result."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from qsparse_moe.cli.console import print_json, result_console, write_json
from qsparse_moe.cli.option_values import check_result_file, check_sparsity, listed_names
from qsparse_moe.config.schema import ModelConfig, MoEConfig


def drop_in(
    precision: Annotated[str, typer.Option(help="fp32, bf16, or both, separated by a comma.")] = "fp32",
    layers: Annotated[int, typer.Option(help="Number of layers.", min=1)] = 2,
    hidden_size: Annotated[int, typer.Option(help="D, the width of the model.", min=1)] = 512,
    heads: Annotated[int, typer.Option(help="Number of attention heads.", min=1)] = 8,
    experts: Annotated[int, typer.Option(help="E, the number of experts.", min=1)] = 16,
    experts_per_token: Annotated[int, typer.Option(help="A, the number of experts per token.", min=1)] = 2,
    expert_hidden_size: Annotated[int, typer.Option(help="F, the hidden width of an expert.", min=1)] = 768,
    rows: Annotated[int, typer.Option(help="Number of sequences per training step.", min=1)] = 4,
    sequence_length: Annotated[int, typer.Option(help="Number of tokens per sequence.", min=2)] = 128,
    prompt: Annotated[int, typer.Option(help="Number of tokens of the prompt of a generation.", min=1)] = 16,
    new_tokens: Annotated[int, typer.Option(help="Number of tokens that a generation adds.", min=1)] = 24,
    sparsity: Annotated[float, typer.Option(help="S at every site of the model with Q-Sparse.")] = 0.5,
    rounds: Annotated[int, typer.Option(help="Number of rounds; every round times each of them once.", min=1)] = 15,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="Number of CPU threads; default: PyTorch's choice.")] = None,
    clock: Annotated[
        str, typer.Option(help="wall, or processor: CPU time of the process, for a CPU shared with other work.")
    ] = "wall",
    output: Annotated[Path | None, typer.Option(help="Also write the results to this JSON file.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Time transformers' Mixtral with and without Q-Sparse inside: a training step, and generation."""
    check_result_file(output)
    import torch

    from qsparse_moe.bench.drop_in import DropInBenchmark, run_drop_in_benchmark
    from qsparse_moe.bench.step import DTYPES

    check_sparsity("--sparsity", sparsity)
    precisions = listed_names("--precision", precision, DTYPES)
    (clocked,) = listed_names("--clock", clock, ("wall", "processor"))
    if threads:
        torch.set_num_threads(threads)
    moe = {
        "num_experts": experts,
        "experts_per_token": experts_per_token,
        "expert_hidden_size": expert_hidden_size,
        "activation": "swiglu",
    }
    model = ModelConfig(hidden_size=hidden_size, num_layers=layers, num_heads=heads, moe=MoEConfig.model_validate(moe))
    results = {
        name: run_drop_in_benchmark(
            DropInBenchmark(
                model,
                name,
                sparsity,
                rows,
                sequence_length,
                prompt,
                new_tokens,
                rounds,
                torch.device(device),
                time.process_time if clocked == "processor" else None,
            )
        )
        for name in precisions
    }
    if output:
        write_json(output, results)
    print_json(results) if json else _print_table(results)


def _print_table(results: dict[str, Any]) -> None:
    table = Table(title="Q-Sparse inside transformers' Mixtral")
    for column in ("precision", "work", "unchanged, ms", "with Q-Sparse, ms", "cost (least to most)"):
        table.add_column(column)
    for precision, result in results.items():
        for work, seconds in result["seconds"].items():
            cost = result["cost"][work]
            table.add_row(
                precision,
                work,
                *(f"{1e3 * value:.0f}" for value in seconds.values()),
                f"{cost['median']:.2f} ({cost['min']:.2f} to {cost['max']:.2f})",
            )
    result_console().print(table)
