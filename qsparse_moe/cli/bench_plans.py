"""``qsparse-moe bench plans``: the options, and the table of the result."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from qsparse_moe.cli.console import print_json, result_console, write_json
from qsparse_moe.cli.option_names import naming_options
from qsparse_moe.cli.option_values import MODEL_HELP, DataOption, check_no_effect, check_result_file, listed_names
from qsparse_moe.config.file_sources import sources_overrides
from qsparse_moe.errors import ConfigError
from qsparse_moe.runs.find import find_model
from qsparse_moe.runs.folder import load_run_config

logger = logging.getLogger(__name__)


def plans(
    run: Annotated[Path, typer.Argument(help=MODEL_HELP, show_default=False)],
    plan: Annotated[
        list[Path] | None,
        typer.Option(help="File of a plan, such as allocate writes; can be repeated.", show_default=False),
    ] = None,
    weights: Annotated[
        str, typer.Option(help="Number formats of the weights: auto, fp32, bf16, int8, ternary, with commas.")
    ] = "auto",
    batch: Annotated[int, typer.Option(help="Texts at once; llama.cpp is measured with one.", min=1)] = 1,
    tokens: Annotated[int, typer.Option(help="Steps per measurement.", min=1)] = 64,
    rounds: Annotated[int, typer.Option(help="Rounds in turn, each with another text.", min=1)] = 9,
    texts: Annotated[int, typer.Option(help="Held-out texts for the losses.", min=1)] = 16,
    peers: Annotated[str, typer.Option(help="llama.cpp, or an empty text for none.")] = "llama.cpp",
    data: DataOption = None,
    folder: Annotated[
        Path | None,
        typer.Option(help="Where the weights for llama.cpp are written for a while; default: llama.cpp-models."),
    ] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; left out: PyTorch's choice.")] = None,
    clock: Annotated[
        str,
        typer.Option(help="wall, or processor: CPU time of all threads, for a CPU shared with other work."),
    ] = "wall",
    output: Annotated[Path | None, typer.Option(help="Also write the results to this JSON file.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Time decoding with a trained model, dense and under plans, beside llama.cpp with the same weights.

    All of them read the same held-out text; the table has its loss under each.
    """
    check_result_file(output)
    formats = listed_names("--weights", weights, ("auto", "fp32", "bf16", "int8", "ternary"))
    chosen_peers = listed_names("--peers", peers, ("llama.cpp",)) if peers else []
    if not chosen_peers:
        check_no_effect({"--folder": folder}, beside=f"--peers '{peers}'")
    (clocked,) = listed_names("--clock", clock, ("wall", "processor"))
    files = named_plans(plan or [])
    config = load_run_config(find_model(run).config_folder)
    overrides = sources_overrides(data or (), config.data)
    # Only now, when all options have been checked: torch takes seconds to import.
    import torch

    from qsparse_moe.bench.llama_peer import WEIGHTS_FOLDER
    from qsparse_moe.bench.plans import PlansBenchmark, run_plans_benchmark

    if threads:
        torch.set_num_threads(threads)
    benchmark = PlansBenchmark(
        run,
        files,
        formats,
        batch=batch,
        tokens=tokens,
        rounds=rounds,
        texts=texts,
        clock=clocked,
        llama_cpp=bool(chosen_peers),
        overrides=overrides,
        llama_folder=folder or WEIGHTS_FOLDER,
    )
    with naming_options():
        result = run_plans_benchmark(benchmark, logger.info)
    if output:
        write_json(output, result)
    print_json(result) if json else _print_tables(result)


def named_plans(files: list[Path]) -> dict[str, Path]:
    """Return the files by their names without the ending.

    Raises:
        ConfigError: two have the same name, or one has that of the dense model.
    """
    found = {file.stem: file for file in files}
    if len(found) < len(files) or "dense" in found:
        raise ConfigError(
            f"--plan ({', '.join(map(str, files))}): the names of the files become those of the rows, so they must "
            "differ, and dense is the model without a plan; rename a file"
        )
    return found


def _print_tables(result: dict[str, Any]) -> None:
    console = result_console()
    for weights, measured in result["formats"].items():
        table = Table(title=f"Decoding held-out text with weights in {weights}, head in {measured['head']}")
        for column in ("contender", "tokens/s", "times dense (least to most)", "MB per step", "loss", "same choices"):
            table.add_column(column, justify="left" if column == "contender" else "right")
        for row in measured["decode"]:
            times, read = row["times_dense"], row.get("bytes_per_step")
            table.add_row(
                row["contender"],
                f"{row['tokens_per_second']:,.0f}",
                f"{times['median']:.2f} ({times['min']:.2f} to {times['max']:.2f})",
                "" if read is None else f"{read / 1e6:.2f}",
                f"{row['loss']:.4f}",
                f"{row['same_choices_as_dense']:.1%}",
            )
        console.print(table)
    texts = result["texts"]
    console.print(f"medians of {result['rounds']} rounds; losses of {texts['labels']:,} tokens")
