"""Run tasks of lm-evaluation-harness on a model, and return their scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from qsparse_moe.data.chat import open_template
from qsparse_moe.errors import ArgumentError
from qsparse_moe.inference.generator import Generator
from qsparse_moe.inference.tasks.load import LoadedTasks


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task, or the aggregate of a group of tasks."""

    task: str
    metric: str
    filter: str
    """The processing of the answers before they are compared; ``none`` for most tasks."""
    value: float
    standard_error: float | None
    """Standard error that the harness estimates; None if it has no estimate."""
    num_samples: int | None
    """Number of evaluated documents; None for a group."""
    num_shots: int | None
    """Number of solved examples in front of each question; None for a group."""
    version: str | None
    """Version of the task in the harness, or in its YAML file."""
    higher_is_better: bool | None

    @property
    def name(self) -> str:
        """The metric, with the filter if there is one."""
        return self.metric if self.filter == "none" else f"{self.metric}/{self.filter}"

    def as_dict(self) -> dict[str, Any]:
        """Return the fields and the name."""
        return {"name": self.name, **asdict(self)}


@dataclass(frozen=True)
class TaskScores:
    """The scores of all tasks of one call."""

    scores: tuple[TaskScore, ...]
    num_truncated: int
    """Number of requests whose context was longer than the model reads at once, so that its beginning was cut off."""
    harness_version: str


def evaluate_tasks(
    generator: Generator,
    tasks: LoadedTasks,
    *,
    limit: int | None = None,
    batch_size: int = 8,
    token_by_token: bool = False,
    chat: bool = False,
    notify: Callable[[int, int], None] = lambda done, of: None,
) -> TaskScores:
    """Return the scores of ``generator``'s model on ``tasks``.

    Args:
        generator: the model with its tokenizer; its engine generates the text of tasks that need some.
        tasks: see ``load_tasks``. They can be evaluated once, because the harness stores the answers in them.
        limit: number of documents per task, the first ones; None is all.
        batch_size: number of sequences that are computed together.
        token_by_token: see ``HarnessModel``.
        chat: write every question, and each solved example as a turn of its own, with the model's chat template.
        notify: called with the number of finished requests and of all, per type of request.

    Raises:
        ConfigError: an argument is wrong.
        DataError: the model has no chat template, or it cannot write a question.
    """
    for name, value in (("limit", limit), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise ArgumentError(f"{{{name}}} ({value}) must be at least 1")
    import lm_eval
    from lm_eval.evaluator import evaluate

    from qsparse_moe.inference.tasks.model import HarnessModel

    template = open_template(generator.config.data, generator.tokenizer) if chat else None
    model = HarnessModel(
        generator, batch_size=batch_size, token_by_token=token_by_token, chat_template=template, notify=notify
    )
    found = evaluate(
        model,
        {"tasks": tasks.tasks, "groups": tasks.groups, "group_map": tasks.group_map},
        limit=limit,
        log_samples=False,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
    )
    rows = {**found["results"], **found.get("groups", {})}
    scores = tuple(score for task, row in rows.items() for score in _scores(task, row, found))
    return TaskScores(scores, model.num_truncated, lm_eval.__version__)


def _scores(task: str, row: Mapping[str, Any], found: Mapping[str, Any]) -> list[TaskScore]:
    """Return the scores in the harness's row of one task, whose keys are ``METRIC,FILTER``."""
    samples = found.get("n-samples", {}).get(task)
    version = found.get("versions", {}).get(task)
    scores = []
    for key, value in row.items():
        metric, comma, filter_name = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = row.get(f"{metric}_stderr,{filter_name}")
        scores.append(
            TaskScore(
                task=task,
                metric=metric,
                filter=filter_name,
                value=float(value),
                # The harness writes N/A where it has no estimate.
                standard_error=float(error) if isinstance(error, int | float) else None,
                num_samples=None if samples is None else samples["effective"],
                num_shots=found.get("n-shot", {}).get(task),
                version=None if version is None else str(version),
                higher_is_better=found.get("higher_is_better", {}).get(task, {}).get(metric),
            )
        )
    return scores
