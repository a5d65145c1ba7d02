"""The options of ``qsparse-moe evaluate``, and which of them go together. Imports no torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from qsparse_moe.errors import ConfigError
from qsparse_moe.runs.find import ModelFolder
from qsparse_moe.sparsity.plan import SparsityPlan

Data = Annotated[
    list[str] | None,
    typer.Option(
        help="File or glob (.jsonl, .parquet, else text) in place of the validation data; can be repeated.",
        show_default=False,
    ),
]
Engine = Annotated[
    Literal["training", "inference"],
    typer.Option(
        help="training: all tokens of a sequence at once. inference: token by token, as generation decodes; slower."
    ),
]
Weights = Annotated[
    str,
    typer.Option(
        help="With --engine inference: number format of the weights: auto (that of training), fp32, bf16, int8, or "
        "ternary."
    ),
]
Head = Annotated[
    str,
    typer.Option(
        help="With --engine inference: number format of the output head: auto (int8 with int8 weights, else that "
        "of training), fp32, bf16, or int8."
    ),
]
Tasks = Annotated[
    str | None,
    typer.Option(
        help="Tasks of lm-evaluation-harness in place of the validation data, separated by commas, such as "
        "hellaswag,arc_easy; * matches any text.",
        show_default=False,
    ),
]
TaskFolder = Annotated[
    Path | None, typer.Option(help="With --tasks: folder with YAML files of further tasks.", show_default=False)
]
Limit = Annotated[
    int | None, typer.Option(help="With --tasks: number of documents per task, the first ones; default: all.", min=1)
]
Shots = Annotated[
    int | None,
    typer.Option(help="With --tasks: solved examples in front of each question; default: as each task sets.", min=0),
]
Chat = Annotated[
    bool, typer.Option("--chat", help="With --tasks: write questions and examples with the model's chat template.")
]
BatchSize = Annotated[
    int | None,
    typer.Option(help="With --tasks or --compare: sequences that are computed together; default: 8.", min=1),
]
Output = Annotated[
    Path | None,
    typer.Option(
        help="With --tasks or --compare: folder for the JSON file; default: RUN/evaluation.", show_default=False
    ),
]

Compare = Annotated[
    str | None,
    typer.Option(
        help="Reference to compare with in place of the loss: dense (the same weights with S = 0), a plan file, or the "
        "folder of another model.",
        show_default=False,
    ),
]
NumPrompts = Annotated[
    int | None,
    typer.Option(
        "--prompts", help="With --compare: number of prompts that both models continue; 0: none; default: 16.", min=0
    ),
]
PromptTokens = Annotated[
    int | None,
    typer.Option(help="With --compare: tokens per prompt; default: half of data.sequence_length.", min=1),
]
NewTokens = Annotated[
    int | None,
    typer.Option(help="With --compare: new tokens per prompt; default: half of data.sequence_length.", min=1),
]

_MODES: Mapping[str, tuple[str, ...]] = {
    "--rows": ("", "--compare"),
    "--data": ("", "--compare"),
    "--shard": ("",),
    "--task-folder": ("--tasks",),
    "--limit": ("--tasks",),
    "--shots": ("--tasks",),
    "--chat": ("--tasks",),
    "--batch-size": ("--tasks", "--compare"),
    "--output": ("--tasks", "--compare"),
    "--prompts": ("--compare",),
    "--prompt-tokens": ("--compare",),
    "--new-tokens": ("--compare",),
}
"""By option, the options that ask for an evaluation which it applies to; empty: the plain evaluation of the loss."""
_REPORTED_EVERY = 20


@dataclass(frozen=True)
class ModelOptions:
    """The options that concern the model."""

    found: ModelFolder
    plan: SparsityPlan | None
    plan_name: str | None
    """Name of the plan in file names; None if the model has its own."""
    engine: Literal["training", "inference"]
    weights: str
    head: str
    device: Literal["auto", "cpu", "cuda"]


def plan_label(sparsity: float | None, plan_file: Path | None) -> str | None:
    """Return the name of the plan that replaces the model's own, for file names; None if none does."""
    if plan_file is not None:
        return plan_file.stem
    return None if sparsity is None else f"S{sparsity:g}"


def check_combinations(given: Mapping[str, Any], *, mode: str) -> None:
    """Raise ConfigError if an option was given that does not apply to the evaluation that was asked for.

    Args:
        given: the values of options by name; None, False, and empty values were not given.
        mode: ``--tasks``, ``--compare``, or empty.
    """
    for option, value in given.items():
        if value is None or value is False or value == [] or mode in _MODES[option]:
            continue
        if mode:
            shown = "" if value is True else f" ({value})"
            raise ConfigError(f"{option}{shown} has no effect with {mode}; leave out one of them")
        raise ConfigError(f"{option} ({value}) applies to {' and '.join(_MODES[option])} only; add it, or leave it out")
    if given.get("--data") and given.get("--rows") is not None:
        raise ConfigError(
            f"--rows ({given['--rows']}) limits the validation data, but --data reads all text of its files; keep one "
            "of them"
        )


def check_formats(weights: str, head: str, engine: str) -> None:
    """Raise ConfigError if a number format was given that only the engines of generation have."""
    for option, value in (("--weights", weights), ("--head", head)):
        if value != "auto" and engine != "inference":
            raise ConfigError(f"{option} ({value}) applies to generation only; add --engine inference")


def check_one_process(option: str) -> None:
    """Raise ConfigError under a launcher with several processes, each of which would repeat the same work."""
    world_size = os.environ.get("WORLD_SIZE", "1")
    if world_size != "1":
        raise ConfigError(
            f"{option} runs in one process, and the launcher started {world_size} (WORLD_SIZE); start qsparse-moe "
            "evaluate without it"
        )


def report_progress(done: int, of: int) -> None:
    """Print a line on standard error for some of the finished parts, and for the last one."""
    if done == of or done % _REPORTED_EVERY == 0:
        print(f"evaluated {done}/{of}", file=sys.stderr, flush=True)
