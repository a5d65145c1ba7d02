"""``qsparse-moe bench prepare``: the options, and the table of the result."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from qsparse_moe.cli.console import print_json, result_console, write_json
from qsparse_moe.cli.option_values import check_no_effect, check_result_file
from qsparse_moe.config.schema import SourceConfig

_VOCABULARY = 16384


def prepare(
    files: Annotated[
        str | None,
        typer.Option(help="Glob of text files; default: the standard library of this Python.", show_default=False),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="Hugging Face tokenizer, or bytes; default: a byte-level BPE of the text.", show_default=False
        ),
    ] = None,
    vocabulary: Annotated[
        int | None, typer.Option(help="Number of tokens of a BPE that is made; default: 16384.", min=300)
    ] = None,
    shard_bytes: Annotated[int, typer.Option(help="data.shard_bytes.", min=1)] = 1_000_000,
    processes: Annotated[
        int | None, typer.Option(help="Number of processes; default: one per CPU core.", min=1, show_default=False)
    ] = None,
    rounds: Annotated[int, typer.Option(help="Number of rounds; every round times each of them once.", min=1)] = 3,
    output: Annotated[Path | None, typer.Option(help="Also write the results to this JSON file.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Time the preparation of text beside the tokenizer alone and datasets.map."""
    check_result_file(output)
    if tokenizer is not None:
        check_no_effect({"--vocabulary": vocabulary}, beside=f"--tokenizer {tokenizer}")
    from qsparse_moe.bench.prepare import PrepareBenchmark, run_prepare_benchmark

    source = SourceConfig() if files is None else SourceConfig(kind="text", path=files)
    count = processes or len(os.sched_getaffinity(0))
    result = run_prepare_benchmark(
        PrepareBenchmark(source, tokenizer, vocabulary or _VOCABULARY, shard_bytes, count, rounds)
    )
    if output:
        write_json(output, result)
    print_json(result) if json else _print_table(result)


def _print_table(result: dict[str, Any]) -> None:
    table = Table(
        title=f"{result['tokens']:,} tokens in {result['documents']:,} documents, {result['processes']} cores"
    )
    for column in ("by", "seconds", "processor ns per token", "speed of the tokenizer alone", "by processor time"):
        table.add_column(column)
    for name, seconds in result["seconds"]["wall"].items():
        used = min(result["seconds"]["processor"][name]) / result["tokens"]
        ratios = (result["speed_of_tokenizer"][clock][name] for clock in ("wall", "processor"))
        shown = [f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})" for ratio in ratios]
        table.add_row(name, f"{min(seconds):.2f}", f"{1e9 * used:,.0f}", *shown)
    result_console().print(table)
