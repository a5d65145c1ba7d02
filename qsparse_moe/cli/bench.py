"""``qsparse-moe bench``: time parts of this package and of other libraries in the same run."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from qsparse_moe.cli.bench_decode import decode
from qsparse_moe.cli.bench_drop_in import drop_in
from qsparse_moe.cli.bench_moe import moe
from qsparse_moe.cli.bench_plans import plans
from qsparse_moe.cli.bench_prepare import prepare
from qsparse_moe.cli.bench_shared_features import shared_features
from qsparse_moe.cli.bench_start import start
from qsparse_moe.cli.console import print_json, result_console, write_json
from qsparse_moe.cli.option_values import (
    SITE_HELP,
    check_name,
    check_result_file,
    check_site,
    check_sparsity,
    listed_names,
)
from qsparse_moe.config.schema import ModelConfig, MoEConfig

if TYPE_CHECKING:
    from qsparse_moe.bench.step import StepBenchmark


def register(app: typer.Typer) -> None:
    """Add the verb with its benchmarks."""
    bench = typer.Typer(
        help="Time parts of this package and of other libraries in the same run.", rich_markup_mode=None
    )
    bench.callback()(_group)
    bench.command("step")(step)
    bench.command("ops")(ops)
    bench.command("moe")(moe)
    bench.command("metrics")(metrics)
    bench.command("decode")(decode)
    bench.command("plans")(plans)
    bench.command("drop-in")(drop_in)
    bench.command("prepare")(prepare)
    bench.command("start")(start)
    bench.command("shared-features")(shared_features)
    app.add_typer(bench, name="bench")


def _group() -> None:
    """Time parts of this package and of other libraries in the same run."""


def step(
    precision: Annotated[str, typer.Option(help="fp32, bf16, or both, separated by a comma.")] = "fp32,bf16",
    layers: Annotated[int, typer.Option(help="Number of layers.")] = 4,
    hidden_size: Annotated[int, typer.Option(help="D, the width of the model.")] = 512,
    heads: Annotated[int, typer.Option(help="Number of attention heads.")] = 8,
    experts: Annotated[int, typer.Option(help="E, the number of experts.")] = 16,
    experts_per_token: Annotated[int, typer.Option(help="A, the number of experts per token.")] = 2,
    expert_hidden_size: Annotated[int, typer.Option(help="F, the hidden width of an expert.")] = 768,
    rows: Annotated[int, typer.Option(help="Number of sequences in the batch.")] = 4,
    sequence_length: Annotated[int, typer.Option(help="Number of tokens per sequence.")] = 256,
    sparsity: Annotated[float, typer.Option(help="S of the model with Q-Sparse.")] = 0.5,
    site: Annotated[str | None, typer.Option(help=SITE_HELP, show_default="every site")] = None,
    selection: Annotated[
        str, typer.Option(help="topk, or shared: one set of features per expert, multiplied at its true size.")
    ] = "topk",
    gradient: Annotated[str, typer.Option(help="ste or masked: the gradient of the selection.")] = "ste",
    activation: Annotated[str, typer.Option(help="swiglu, as in Mixtral, or relu2glu.")] = "swiglu",
    rounds: Annotated[int, typer.Option(help="Number of rounds; every round times each of them once.", min=1)] = 7,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="Number of CPU threads; default: PyTorch's choice.")] = None,
    clock: Annotated[
        str, typer.Option(help="wall, or processor: CPU time of the process, for a CPU shared with other work.")
    ] = "wall",
    output: Annotated[Path | None, typer.Option(help="Also write the results to this JSON file.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Time a training step with and without Q-Sparse beside transformers' Mixtral of the same shape."""
    check_result_file(output)
    import torch

    from qsparse_moe.bench.step import DTYPES, StepBenchmark, run_step_benchmark

    check_sparsity("--sparsity", sparsity)
    precisions = listed_names("--precision", precision, DTYPES)
    check_name("--clock", clock, ("wall", "processor"))
    check_name("--selection", selection, ("topk", "shared"))
    check_name("--gradient", gradient, ("ste", "masked"))
    check_site(site)
    clock_function = time.process_time if clock == "processor" else None
    if threads:
        torch.set_num_threads(threads)
    moe = MoEConfig.model_validate(
        {
            "num_experts": experts,
            "experts_per_token": experts_per_token,
            "expert_hidden_size": expert_hidden_size,
            "activation": activation,
        }
    )
    model = ModelConfig(hidden_size=hidden_size, num_layers=layers, num_heads=heads, moe=moe)
    benchmarks = [
        StepBenchmark(
            model,
            name,
            sparsity,
            rows,
            sequence_length,
            rounds,
            torch.device(device),
            clock_function,
            selection=selection,
            gradient=gradient,
            site=site,  # type: ignore[arg-type]
        )
        for name in precisions
    ]
    results = {benchmark.precision: run_step_benchmark(benchmark) for benchmark in benchmarks}
    if output:
        write_json(output, results)
    print_json(results) if json else _print_tables(results, benchmarks[0])


def ops(
    precision: Annotated[str, typer.Option(help="fp32, bf16, or both, separated by a comma.")] = "fp32,bf16",
    rounds: Annotated[int, typer.Option(help="Number of rounds; every round times each of them once.", min=1)] = 7,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="Number of CPU threads; default: PyTorch's choice.")] = None,
    output: Annotated[Path | None, typer.Option(help="Also write the results to this JSON file.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Time every operation of the kernels, its reference and its fast versions, and top-K in stock PyTorch."""
    check_result_file(output)
    import torch

    from qsparse_moe.bench.ops import run_op_benchmarks
    from qsparse_moe.bench.step import DTYPES

    dtypes = {name: DTYPES[name] for name in listed_names("--precision", precision, DTYPES)}
    if threads:
        torch.set_num_threads(threads)
    result = run_op_benchmarks(dtypes, device=device, rounds=rounds)
    if output:
        write_json(output, result)
    print_json(result) if json else _print_operations(result)


def _print_operations(result: dict[str, Any]) -> None:
    table = Table(title=f"Operations on {result['device']}, milliseconds")
    for column in ("operation", "rows", "precision", "pass", "by", "ms"):
        table.add_column(column)
    for operation in result["operations"]:
        shape = " x ".join(str(size) for size in operation["shape"])
        # Finding a threshold has no gradient, and therefore no second pass.
        for passed in ("forward", "forward and backward"):
            for name, seconds in operation["seconds"].get(passed, {}).items():
                table.add_row(operation["name"], shape, operation["precision"], passed, name, f"{1e3 * seconds:.3f}")
    result_console().print(table)


def _print_tables(results: dict[str, Any], benchmark: StepBenchmark) -> None:
    table = Table(title=f"One training step of {benchmark.tokens} tokens")
    for column in ("precision", "model", "ms per step", "tokens/s", "times as fast as Mixtral (least to most)"):
        table.add_column(column)
    for precision, result in results.items():
        for name, seconds in result["seconds"].items():
            faster = result["times_faster_than_peer"].get(name)
            ratio = f"{faster['median']:.2f} ({faster['min']:.2f} to {faster['max']:.2f})" if faster else ""
            rate = f"{result['tokens_per_second'][name]:,.0f}"
            table.add_row(precision, name, f"{1e3 * seconds:.0f}", rate, ratio)
    console = result_console()
    console.print(table)
    for precision, result in results.items():
        if "shared_sets" in result:
            faster = result["shared_sets"]["times_faster_than_dense"]
            console.print(
                f"{precision}: with one step in {result['measure_interval']} that measures, "
                f"{faster['median']:.2f} ({faster['min']:.2f} to {faster['max']:.2f}) times as fast as without Q-Sparse"
            )


def metrics(
    config: Annotated[Path, typer.Argument(help="Run file.")] = Path("configs/tiny.yaml"),
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings by path, such as metrics.interval=20.", show_default=False)
    ] = None,
    # There must be 2: the first record is timed apart, and the cost of a record is the mean over the others.
    steps: Annotated[int, typer.Option(help="Number of steps of each run.", min=2)] = 40,
    rounds: Annotated[int, typer.Option(help="Number of rounds; every round times each of them once.", min=1)] = 5,
    output: Annotated[Path | None, typer.Option(help="Also write the result to this JSON file.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Time what recording metrics adds to a step, on one rank of the torch engine."""
    check_result_file(output)
    from qsparse_moe.config.load import load_config

    # A wrong setting is reported before torch is imported.
    loaded = load_config(config, overrides or ())
    from qsparse_moe.bench.metrics_cost import run_metrics_benchmark

    result = run_metrics_benchmark(loaded, steps=steps, rounds=rounds)
    if output:
        write_json(output, result)
    if json:
        print_json(result)
        return
    cost = result["cost"]
    result_console().print(
        f"a record every {result['interval']} steps costs {cost['median']:.1%} of a step ({cost['min']:.1%} to "
        f"{cost['max']:.1%} in {rounds} rounds): {1e3 * result['seconds_a_record']:.1f} ms per record, "
        f"{1e3 * result['seconds_a_step']:.1f} ms per step, and {result['seconds_once']:.1f} s once per run"
    )
