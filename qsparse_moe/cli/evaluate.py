"""``qsparse-moe evaluate``: evaluate a run's newest checkpoint on validation sequences."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from qsparse_moe.cli.console import is_rank_zero, print_json, result_console
from qsparse_moe.cli.evaluation_options import (
    BatchSize,
    Chat,
    Compare,
    Data,
    Engine,
    Head,
    Limit,
    ModelOptions,
    NewTokens,
    NumPrompts,
    Output,
    PromptTokens,
    Shots,
    TaskFolder,
    Tasks,
    Weights,
    check_combinations,
    check_formats,
    plan_label,
)
from qsparse_moe.cli.option_names import naming_options
from qsparse_moe.cli.option_values import MODEL_HELP, ShardOption, check_shard, check_sparsity
from qsparse_moe.errors import ConfigError
from qsparse_moe.runs.find import find_model
from qsparse_moe.runs.folder import load_run_config
from qsparse_moe.sparsity.plan import SparsityPlan

if TYPE_CHECKING:
    from qsparse_moe.training.evaluate import Evaluation

_BATCH_SIZE = 8
_NUM_PROMPTS = 16


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("evaluate")(evaluate)


def evaluate(
    run: Annotated[Path, typer.Argument(help=MODEL_HELP, show_default=False)],
    rows: Annotated[
        int | None, typer.Option(help="Number of validation sequences; default: training.evaluation_rows.", min=1)
    ] = None,
    sparsity: Annotated[float | None, typer.Option(help="S at every site, in place of the run's.")] = None,
    plan_file: Annotated[Path | None, typer.Option("--plan", help="Plan file, in place of the run's S.")] = None,
    data: Data = None,
    tasks: Tasks = None,
    task_folder: TaskFolder = None,
    limit: Limit = None,
    shots: Shots = None,
    chat: Chat = False,
    compare: Compare = None,
    prompts: NumPrompts = None,
    prompt_tokens: PromptTokens = None,
    new_tokens: NewTokens = None,
    batch_size: BatchSize = None,
    output: Output = None,
    engine: Engine = "training",
    weights: Weights = "auto",
    head: Head = "auto",
    shard: ShardOption = None,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Device to run on.")] = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Evaluate a trained model. The loss can be computed by several processes under the deepspeed launcher."""
    found = find_model(run)
    if tasks is not None and compare is not None:
        raise ConfigError("--tasks and --compare are two evaluations; give one of them per call")
    mode = "--tasks" if tasks is not None else "--compare" if compare is not None else ""
    check_combinations(
        {
            "--rows": rows,
            "--data": data,
            "--shard": shard,
            "--task-folder": task_folder,
            "--limit": limit,
            "--shots": shots,
            "--chat": chat,
            "--batch-size": batch_size,
            "--output": output,
            "--prompts": prompts,
            "--prompt-tokens": prompt_tokens,
            "--new-tokens": new_tokens,
        },
        mode=mode,
    )
    check_formats(weights, head, engine)
    check_shard(shard, "evaluate")
    if shard and engine == "inference":
        raise ConfigError(
            "--shard has no effect with --engine inference, which copies all weights of a layer into the layout of "
            "generation on every rank; leave out one of them"
        )
    # Before torch is imported, as all checks of options are.
    plan = requested_plan(run, sparsity=sparsity, plan_file=plan_file)
    model = ModelOptions(found, plan, plan_label(sparsity, plan_file), engine, weights, head, device)
    if tasks is not None:
        from qsparse_moe.cli.task_scores import TaskOptions, evaluate_and_print

        names = tuple(filter(None, (name.strip() for name in tasks.split(","))))
        options = TaskOptions(names, task_folder, limit, shots, batch_size or _BATCH_SIZE, chat)
        evaluate_and_print(model, options, output=output, as_json=json)
    elif compare is not None:
        from qsparse_moe.cli.comparison import CompareOptions, compare_and_print

        num_prompts = _NUM_PROMPTS if prompts is None else prompts
        files, size = tuple(data or ()), batch_size or _BATCH_SIZE
        comparison = CompareOptions(compare, rows, files, num_prompts, prompt_tokens, new_tokens, size)
        compare_and_print(model, comparison, output=output, as_json=json)
    else:
        _evaluate_loss(model, rows=rows, files=tuple(data or ()), shard=shard, as_json=json)


def _evaluate_loss(
    model: ModelOptions, *, rows: int | None, files: Sequence[str], shard: bool | None, as_json: bool
) -> None:
    from qsparse_moe.interop.trained_model import load_trained
    from qsparse_moe.training.evaluate import evaluate_run

    if model.engine == "inference":
        from qsparse_moe.inference.evaluate import decoding_forward

        forward_of, shard = partial(decoding_forward, weights=model.weights, head=model.head), False
    else:
        forward_of = None
    run_dir = model.found.path
    with naming_options():
        evaluation = evaluate_run(
            run_dir,
            num_sequences=rows,
            device=model.device,
            plan=model.plan,
            files=files,
            forward_of=forward_of,
            load=load_trained,
            shard=shard,
        )
    if is_rank_zero():
        summary = {"run_dir": str(run_dir), **evaluation.as_dict()}
        print_json(summary) if as_json else _print_figures(evaluation, files)


def requested_plan(run_dir: Path, *, sparsity: float | None, plan_file: Path | None) -> SparsityPlan | None:
    """Return the plan given in place of the run's, or None to use the run's. Needs no torch.

    Raises:
        ConfigError: S is given in two ways, is outside [0, 1), is for another model, or has no effect on this run.
    """
    if sparsity is not None and plan_file is not None:
        raise ConfigError("--sparsity and --plan both give the S to evaluate with; keep one of them")
    check_sparsity("--sparsity", sparsity)
    if sparsity is None and plan_file is None:
        return None
    config = load_run_config(find_model(run_dir).config_folder).model
    plan = None if plan_file is None else SparsityPlan.load(plan_file)
    # If the option were ignored, the result would look as if it had been measured at the requested S.
    if config.sparsity.selection == "relu" and not (plan and (plan.experts_per_token or plan.top_p)):
        way = "--plan" if sparsity is None else "--sparsity"
        raise ConfigError(
            f"{way} changes nothing on {run_dir}: model.sparsity.selection is relu, which selects the positive "
            "features whatever S is; leave the option out"
        )
    if plan is not None:
        plan.check_fits(config, file=plan_file)
        return plan
    assert sparsity is not None
    # A uniform plan has S and no thresholds, and only calibration can find these.
    if config.sparsity.selection == "threshold":
        raise ConfigError(
            f"--sparsity ({sparsity}) needs thresholds, because model.sparsity.selection is threshold in {run_dir}; "
            "make a plan with qsparse-moe calibrate --sparsity, and name it with --plan"
        )
    # The option is about S alone: the experts per token stay those of the run.
    return SparsityPlan.from_config(config).with_(sparsity=sparsity)


def _print_figures(evaluation: Evaluation, files: Sequence[str]) -> None:
    console = result_console()
    where = f"all text of {', '.join(files)}, {evaluation.rows}" if files else f"{evaluation.rows} validation"
    console.print(f"after step {evaluation.step}, on {where} sequences", soft_wrap=True)
    console.print(f"mean S            {evaluation.sparsity:.4f}")
    console.print(f"loss              {evaluation.loss:.4f} nats per token")
    console.print(f"perplexity        {evaluation.perplexity:.3f}")
    console.print(f"bits per byte     {evaluation.bits_per_byte:.4f}")
    if evaluation.unigram_bits_per_byte is not None:
        ratio = evaluation.bits_per_byte / evaluation.unigram_bits_per_byte
        console.print(
            f"unigram model     {evaluation.unigram_bits_per_byte:.4f}; the model has {ratio:.3f} times as many bits"
        )
