"""``qsparse-moe bench decode``: options, and the table of its result."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.table import Table

from qsparse_moe.cli.console import print_json, result_console, write_json
from qsparse_moe.cli.option_names import naming_options
from qsparse_moe.cli.option_values import (
    SITE_HELP,
    check_name,
    check_no_effect,
    check_result_file,
    check_site,
    listed_names,
)
from qsparse_moe.config.schema import ModelConfig
from qsparse_moe.errors import ConfigError

logger = logging.getLogger(__name__)

Value = TypeVar("Value")
_PROMPT = 512
_PEERS = ("transformers", "llama.cpp")


def decode(
    weights: Annotated[
        str, typer.Option(help="Number formats of the weights: fp32, bf16, int8, ternary, with commas.")
    ] = "bf16,int8,ternary",
    head: Annotated[
        str, typer.Option(help="Number format of our output head: auto, as generate chooses it, fp32, bf16, or int8.")
    ] = "auto",
    sparsity: Annotated[str, typer.Option(help="S, with commas; 0 is always measured.")] = "0,0.4,0.5,0.6,0.75,0.9",
    site: Annotated[str | None, typer.Option(help=SITE_HELP, show_default="every site")] = None,
    selection: Annotated[
        str,
        typer.Option(help="topk, or shared: one set of features per expert, and only its rows and columns read."),
    ] = "topk",
    batch: Annotated[str, typer.Option(help="Sequences at once, with commas.")] = "1,2,4,8,16",
    # The default shape is that of the table in docs/results.md, for which the speeds of llama.cpp are known.
    layers: Annotated[int, typer.Option(help="Layers.", min=1)] = 8,
    hidden_size: Annotated[int, typer.Option(help="D, model width.", min=1)] = 1024,
    heads: Annotated[int, typer.Option(help="Attention heads.", min=1)] = 16,
    experts: Annotated[int, typer.Option(help="E, experts.", min=1)] = 32,
    experts_per_token: Annotated[int, typer.Option(help="A, experts per token.", min=1)] = 2,
    expert_hidden_size: Annotated[int, typer.Option(help="F, hidden width of an expert.", min=1)] = 2048,
    vocab_size: Annotated[int, typer.Option(help="V, ids of the vocabulary.", min=1)] = 8192,
    context: Annotated[int, typer.Option(help="Tokens in the cache before the first measured step.", min=1)] = 32,
    tokens: Annotated[int, typer.Option(help="Steps per measurement.", min=1)] = 32,
    prompt: Annotated[
        int | None, typer.Option(help="Tokens of the prompt whose prefill is timed; 0: none; default: 512.", min=0)
    ] = None,
    rounds: Annotated[int, typer.Option(help="Rounds in turn.", min=1)] = 5,
    device: Annotated[
        str,
        typer.Option(help="cpu, or cuda: the Triton engine beside the modules of training, without peers and prefill."),
    ] = "cpu",
    peers: Annotated[
        str | None,
        typer.Option(
            help="transformers, llama.cpp, with a comma; default: both. What is not installed is left out, and said."
        ),
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option(help="Where the weights for llama.cpp are written for a while; default: llama.cpp-models."),
    ] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; left out: PyTorch's choice.")] = None,
    output: Annotated[Path | None, typer.Option(help="Also write the results to this JSON file.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Time generation, with and without zeros, beside transformers and llama.cpp on the same shape."""
    check_result_file(output)
    check_name("--device", device, ("cpu", "cuda"))
    formats = listed_names("--weights", weights, ("fp32", "bf16", "int8", "ternary"))
    sparsities = _numbers("--sparsity", sparsity, float, lambda value: 0 <= value < 1, "S from 0 up to below 1")
    batches = _numbers("--batch", batch, int, lambda value: value >= 1, "whole numbers from 1")
    check_name("--selection", selection, ("topk", "shared"))
    check_site(site)
    # An empty text leaves all peers out; split, it would be a peer without a name.
    asked = ",".join(_PEERS) if peers is None else peers
    chosen_peers = listed_names("--peers", asked, _PEERS) if asked else []
    if device == "cuda":
        check_no_effect({"--prompt": prompt, "--peers": peers, "--folder": folder}, beside="--device cuda")
    elif "llama.cpp" not in chosen_peers:
        check_no_effect({"--folder": folder}, beside=f"--peers '{asked}'")
    listed_names("--head", head, ("auto", "fp32", "bf16", "int8"))
    # Only now, when all options have been checked: torch takes seconds to import.
    import torch

    from qsparse_moe.bench.decode import DecodeBenchmark, run_decode_benchmark
    from qsparse_moe.bench.decode_gpu import run_gpu_decode_benchmark
    from qsparse_moe.bench.llama_peer import WEIGHTS_FOLDER

    if threads:
        torch.set_num_threads(threads)
    model = ModelConfig.model_validate(
        {
            "hidden_size": hidden_size,
            "num_layers": layers,
            "num_heads": heads,
            "vocab_size": vocab_size,
            "moe": {
                "num_experts": experts,
                "experts_per_token": experts_per_token,
                "expert_hidden_size": expert_hidden_size,
                # This is the activation of Mixtral, whose shape both peers compute.
                "activation": "swiglu",
            },
            "sparsity": {"selection": selection},
        }
    )
    benchmark = DecodeBenchmark(
        model,
        formats,
        sparsities,
        batches,
        context,
        tokens,
        rounds,
        _PROMPT if prompt is None else prompt,
        chosen_peers,
        head=None if head == "auto" else head,  # type: ignore[arg-type]
        folder=folder or WEIGHTS_FOLDER,
        site=site,  # type: ignore[arg-type]
    )
    with naming_options():
        if device == "cpu":
            result = run_decode_benchmark(benchmark, logger.info)
        else:
            result = run_gpu_decode_benchmark(benchmark, torch.device(device), logger.info)
    if output:
        write_json(output, result)
    print_json(result) if json else _print_tables(result)


def _numbers(
    option: str, text: str, number: Callable[[str], Value], allowed: Callable[[Value], bool], rule: str
) -> list[Value]:
    try:
        values = [number(part) for part in text.split(",")]
    # No values are as wrong as a text that is no number: both get the message below.
    except ValueError:
        values = []
    if not values or not all(allowed(value) for value in values):
        raise ConfigError(f"{option} {text!r} must be {rule}, with commas between them")
    return values


def _print_tables(result: dict[str, Any]) -> None:
    console = result_console()
    for weight_format, measured in result["formats"].items():
        table = Table(title=f"Decoding with weights in {weight_format}, head in {measured['head']}")
        for column in (
            "batch",
            "engine",
            "tokens/s",
            "MB per step",
            "of the limit",
            "times our dense",
            "times the peers",
        ):
            table.add_column(column, justify="left" if column == "engine" else "right")
        for row in measured["decode"]:
            read = row.get("bytes_per_step")
            table.add_row(
                str(row["batch"]),
                row["contender"],
                f"{row['tokens_per_second']:.1f}",
                # The peers do not report which weights they read.
                "" if read is None else f"{read / 1e6:.1f}",
                "" if read is None else f"{row['share_of_limit']:.2f}",
                f"{row['times_ours_dense']['median']:.2f}",
                ", ".join(f"{name} {times['median']:.2f}" for name, times in row.get("times_peer", {}).items()),
            )
        console.print(table)
        if measured["prefill"]:
            prompt = result["shape"]["prompt"]
            table = Table(title=f"Prefill of {prompt} tokens with weights in {weight_format}")
            for column in ("engine", "tokens/s", "ours is times faster"):
                table.add_column(column, justify="left" if column == "engine" else "right")
            for row in measured["prefill"]:
                times = row["ours_times_faster"]["median"]
                table.add_row(row["contender"], f"{row['tokens_per_second']:.0f}", f"{times:.2f}")
            console.print(table)
    # Only a result of a CPU has the bandwidth.
    bandwidth = f"Read bandwidth {result['read_bandwidth'] / 1e9:.1f} GB/s; " if "read_bandwidth" in result else ""
    console.print(f"{bandwidth}medians of {result['shape']['rounds']} rounds")
