"""``qsparse-moe evaluate --tasks``: scores of lm-evaluation-harness, as a table, in JSON, and in TensorBoard."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from qsparse_moe.cli.console import print_json, result_console, write_json
from qsparse_moe.cli.evaluation_files import EvaluationFiles
from qsparse_moe.cli.evaluation_options import ModelOptions, check_one_process, report_progress
from qsparse_moe.cli.option_names import naming_options

if TYPE_CHECKING:
    from qsparse_moe.inference.generator import Generator
    from qsparse_moe.inference.tasks.load import LoadedTasks
    from qsparse_moe.inference.tasks.scores import TaskScore


_SAME = ("step", "sparsity", "engine", "chat", "limit", "lm_eval_version")
"""What must be the same so that the results of two calls are joined in one file."""


@dataclass(frozen=True)
class TaskOptions:
    """The options of ``evaluate`` that concern tasks."""

    names: tuple[str, ...]
    task_folder: Path | None
    limit: int | None
    shots: int | None
    batch_size: int
    chat: bool


def evaluate_and_print(model: ModelOptions, options: TaskOptions, *, output: Path | None, as_json: bool) -> None:
    """Evaluate the tasks, write the results, and print them."""
    check_one_process("--tasks")
    with naming_options():
        from qsparse_moe.inference.tasks.load import load_tasks
        from qsparse_moe.inference.tasks.scores import evaluate_tasks

        # Before the weights are read, because a task may be unknown or its data set missing.
        tasks = load_tasks(options.names, task_folder=options.task_folder, shots=options.shots)
        files = EvaluationFiles.of(model.found, _name(model), output)
        generator = _generator(model, tasks)
        found = evaluate_tasks(
            generator,
            tasks,
            limit=options.limit,
            batch_size=options.batch_size,
            token_by_token=model.engine == "inference",
            chat=options.chat,
            notify=report_progress,
        )
    summary: dict[str, Any] = {
        "run_dir": str(model.found.path),
        "step": generator.step,
        "sparsity": generator.model.sparsity_plan.mean,
        "engine": model.engine,
        "chat": options.chat,
        "limit": options.limit,
        "truncated_requests": found.num_truncated,
        "lm_eval_version": found.harness_version,
        "results": [score.as_dict() for score in found.scores],
    }
    # Printed first: what took hours is not lost to a full disk.
    print_json(summary) if as_json else _print_table(found.scores, summary)
    _write(summary, files)


def _name(model: ModelOptions) -> str:
    return "tasks" if model.plan_name is None else f"tasks/{model.plan_name}"


def _generator(model: ModelOptions, tasks: LoadedTasks) -> Generator:
    from qsparse_moe.inference.generator import Generator

    # Without generated text the engine is not used, and building it may compile for a minute.
    needs_engine = tasks.generates or model.engine == "inference"
    return Generator.load(
        model.found.path,
        engine="auto" if needs_engine else "torch",
        weights=model.weights,
        head=model.head,
        plan=model.plan,
        device=model.device,
    )


def _write(summary: dict[str, Any], files: EvaluationFiles) -> None:
    results = _with_other_tasks(summary, files.json)
    write_json(files.json, summary | {"results": results})
    if files.tensorboard is None:
        return
    from qsparse_moe.metrics.evaluation import EvaluationFigures, write_evaluation

    scalars = {f"tasks/{one['task']}/{one['name']}": one["value"] for one in results}
    write_evaluation(files.tensorboard, EvaluationFigures(scalars), summary["step"])


def _with_other_tasks(summary: dict[str, Any], file: Path) -> list[dict[str, Any]]:
    """Return the new results, and those of other tasks of the same model that the file holds already."""
    new: list[dict[str, Any]] = summary["results"]
    names = {one["task"] for one in new}
    try:
        earlier = json.loads(file.read_text("utf-8"))
        same = all(earlier[key] == summary[key] for key in _SAME)
        return [*(one for one in earlier["results"] if same and one["task"] not in names), *new]
    except FileNotFoundError:
        return new
    except (ValueError, KeyError, TypeError):
        # Not a file of this verb, or half of one: it is replaced, as any earlier result is.
        return new


def _print_table(scores: tuple[TaskScore, ...], summary: dict[str, Any]) -> None:
    table = Table(title=f"After step {summary['step']}, mean S {summary['sparsity']:.4f}", title_justify="left")
    for column, justify in (("task", "left"), ("version", "left"), ("shots", "right"), ("metric", "left")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for column in ("value", "± standard error", "samples"):
        table.add_column(column, justify="right")
    for one in scores:
        error = "–" if one.standard_error is None else f"{one.standard_error:.4f}"
        counts = ["–" if count is None else str(count) for count in (one.num_shots, one.num_samples)]
        table.add_row(one.task, one.version or "–", counts[0], one.name, f"{one.value:.4f}", error, counts[1])
    console = result_console()
    console.print(table)
    if summary["truncated_requests"]:
        console.print(
            "requests that were longer than the model's data.sequence_length and lost their first tokens: "
            f"{summary['truncated_requests']}"
        )
