"""``qsparse-moe bench moe``: the options, and the table of the result."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from qsparse_moe.cli.console import print_json, result_console, write_json
from qsparse_moe.cli.option_values import check_result_file, check_sparsity, listed_names
from qsparse_moe.errors import ConfigError

if TYPE_CHECKING:
    from qsparse_moe.bench.moe_peers import LayerShape

Size = Annotated[int | None, typer.Option(min=1, help="Default: the value of the device's default shape.")]


def moe(
    precision: Annotated[
        str | None,
        typer.Option(help="fp32, bf16, or both, separated by a comma; default: those in which the device is fast."),
    ] = None,
    load: Annotated[str, typer.Option(help="balanced, skewed, or both, separated by a comma.")] = "balanced,skewed",
    tokens: Size = None,
    hidden_size: Size = None,
    expert_hidden_size: Size = None,
    experts: Size = None,
    experts_per_token: Size = None,
    # The limit of an option is inclusive in typer, and S = 1 would leave no feature.
    sparsity: Annotated[float, typer.Option(help="S at both sites of our layers with Q-Sparse.")] = 0.5,
    rounds: Annotated[int, typer.Option(help="Number of rounds; every round times each layer once.", min=1)] = 7,
    calls: Annotated[int, typer.Option(help="Number of timed calls per round and layer.", min=1)] = 1,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="Number of CPU threads; default: PyTorch's choice.")] = None,
    clock: Annotated[
        str, typer.Option(help="wall, or processor: CPU time of the process, for a CPU shared with other work.")
    ] = "wall",
    output: Annotated[Path | None, typer.Option(help="Also write the results to this JSON file.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Time an MoE layer, forward and backward, and compare with other libraries and with the dense products in it.

    The default shape is 4096 tokens, D 512, F 768, E 16, A 2 on a CPU and 16384, 2048, 1024, 64, 8 on CUDA.
    """
    check_result_file(output)
    import torch

    from qsparse_moe.bench.moe_layer import DTYPES, SHAPES, MoEBenchmark, run_moe_benchmark
    from qsparse_moe.bench.routing import LOADS
    from qsparse_moe.kernels.onednn import needs_fp32

    check_sparsity("--sparsity", sparsity)
    where = torch.device(device)
    # A CPU without instructions for bf16 computes it in fp32, so its time would be that of fp32 and two casts.
    fast = [name for name, dtype in DTYPES.items() if not needs_fp32(dtype, where)]
    default = "bf16" if where.type == "cuda" else ",".join(fast)
    precisions = listed_names("--precision", precision or default, DTYPES)
    sizes = {
        "tokens": tokens,
        "hidden_size": hidden_size,
        "expert_hidden_size": expert_hidden_size,
        "num_experts": experts,
        "experts_per_token": experts_per_token,
    }
    (clocked,) = listed_names("--clock", clock, ("wall", "processor"))
    if threads:
        torch.set_num_threads(threads)
    result = run_moe_benchmark(
        MoEBenchmark(
            shape=_shape(SHAPES[where.type], sizes),
            precisions=tuple(precisions),
            loads=tuple(listed_names("--load", load, LOADS)),
            sparsity=sparsity,
            rounds=rounds,
            calls=calls,
            device=where,
            clock=time.process_time if clocked == "processor" else None,
        )
    )
    if output:
        write_json(output, result)
    print_json(result) if json else _print_layers(result)


def _shape(default: LayerShape, sizes: dict[str, int | None]) -> LayerShape:
    shape = type(default)(**asdict(default) | {name: size for name, size in sizes.items() if size is not None})
    if not shape.experts_per_token <= shape.num_experts <= shape.hidden_size:
        raise ConfigError(
            f"--experts-per-token ({shape.experts_per_token}) must be at most --experts ({shape.num_experts}), and "
            f"that at most --hidden-size ({shape.hidden_size}), whose first features hold the router's logits"
        )
    return shape


def _print_layers(result: dict[str, Any]) -> None:
    console = result_console()
    for layer in result["layers"]:
        # Every one of our layers is compared with the same peers, so the first one names the columns.
        peers = list(next(iter(layer["times_as_fast_as"].values())))
        table = Table(title=f"MoE layer, {layer['precision']}, {layer['load']} load")
        table.add_column("layer", no_wrap=True)
        for column in ("ms", "GFLOP/s", "of peak", "MB", *(f"× {peer}" for peer in peers)):
            table.add_column(column)
        for name, seconds in layer["seconds"].items():
            ratios = layer["times_as_fast_as"].get(name, {})
            table.add_row(
                name,
                f"{1e3 * seconds:.1f}",
                f"{layer['flops_per_second'][name] / 1e9:,.0f}",
                f"{layer['share_of_peak'][name]:.2f}",
                f"{layer['peak_bytes'][name] / 1e6:,.0f}",
                *(f"{ratios[peer]['median']:.2f}" if peer in ratios else "" for peer in peers),
            )
        console.print(table)
        for name, reason in layer["left_out"].items():
            console.print(f"left out: {name}: {reason}")
    console.print("× NAME: speed relative to that layer, median over the rounds")
