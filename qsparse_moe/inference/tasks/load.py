"""Find and load the tasks of lm-evaluation-harness by name, and refuse those that a language model here cannot do."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qsparse_moe.data.hub_wait import log_slow_wait
from qsparse_moe.errors import ArgumentError, BackendUnavailable, ConfigError, DataError, without_fields
from qsparse_moe.inference.tasks.generation import TaskGeneration

_OUTPUT_TYPES = ("loglikelihood", "loglikelihood_rolling", "multiple_choice", "generate_until")
_FEW_SHOT_SEED = 1234  # the harness's own default


@dataclass
class LoadedTasks:
    """Tasks with their data sets, as the harness's ``TaskManager.load`` returns them."""

    tasks: dict[str, Any] = field(default_factory=dict)
    groups: dict[str, Any] = field(default_factory=dict)
    group_map: dict[str, list[str]] = field(default_factory=dict)

    @property
    def generates(self) -> bool:
        """Whether some task needs generated text, so that the engine that decodes matters."""
        return any(task.OUTPUT_TYPE == "generate_until" for task in self.tasks.values())


def load_tasks(names: Sequence[str], *, task_folder: Path | str | None = None, shots: int | None = None) -> LoadedTasks:
    """Load tasks, groups, or tags by name; ``*`` in a name matches any text.

    Args:
        names: names of the harness, or of YAML files in ``task_folder``.
        task_folder: a folder with YAML files of further tasks, which take precedence.
        shots: number of solved examples in front of every question; None is what each task sets. As in the harness, a
            task that sets 0 keeps it.

    Raises:
        BackendUnavailable: lm_eval is not installed.
        ConfigError: a name is unknown, or the task needs what a language model of this package cannot do.
        DataError: the data set of a task cannot be loaded.
    """
    if task_folder is not None and not Path(task_folder).is_dir():
        raise ArgumentError(
            f"{{task_folder}} ({without_fields(task_folder)}) must be a folder with YAML files of tasks; name one that "
            "exists"
        )
    if not names:
        raise ArgumentError("{tasks} (none) must name at least one task, such as hellaswag,arc_easy")
    manager = _manager(names, task_folder)
    loaded = LoadedTasks()
    for name in _matching(names, manager):
        found = _load(name, manager)
        loaded.tasks |= found["tasks"]
        loaded.groups |= found.get("groups", {})
        loaded.group_map |= found.get("group_map", {})
    for name, task in loaded.tasks.items():
        _check(name, task)
        _set_shots(task, shots)
    return loaded


def _manager(names: Sequence[str], task_folder: Path | str | None) -> Any:
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise BackendUnavailable(
            f"{error}; tasks need lm-evaluation-harness, which comes with pip install qsparse-moe[eval]"
        ) from error
    if task_folder is None:
        return TaskManager()
    own = TaskManager(include_path=str(task_folder), include_defaults=False)
    # The harness reads some ten thousand files to list its own tasks, which takes seconds and is not needed here. A
    # group may name tasks of the harness.
    matches = [set(own.match_tasks([name])) for name in names]
    if all(found and found <= set(own.all_subtasks) for found in matches):
        return own
    return TaskManager(include_path=str(task_folder))


def _matching(names: Sequence[str], manager: Any) -> list[str]:
    """Return the known names that ``names`` mean, each once."""
    known: list[str] = manager.all_tasks
    found: dict[str, None] = {}
    for name in names:
        matches = [name] if name in known else manager.match_tasks([name]) if "*" in name else []
        if not matches:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0)
            raise ArgumentError(
                f"{{tasks}}: {without_fields(repr(name))} is no task, group, or tag of lm-evaluation-harness or of "
                f"{{task_folder}}; the nearest names are {without_fields(', '.join(near))}"
            )
        found |= dict.fromkeys(matches)
    return list(found)


def _load(name: str, manager: Any) -> Any:
    try:
        with log_slow_wait(f"the data set of the task {name}"):
            return manager.load([name])
    # The errors of the hub, of its cache, and of missing files are OSErrors; those of a file's content ValueErrors.
    except OSError as error:
        raise DataError(
            f"task {name}: its data set or its metric cannot be loaded ({_first_line(error)}). Most tasks download "
            "theirs from the Hugging Face hub, which needs a network the first time; load it where there is one and "
            "copy the cache (HF_HOME), or define the task on local files in a --task-folder"
        ) from error
    except Exception as error:  # the harness and its tasks raise errors of any kind for a task that is wrong
        raise ConfigError(
            f"task {name} cannot be loaded ({type(error).__name__}: {_first_line(error)}); correct its YAML file, or "
            "leave it out"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _check(name: str, task: Any) -> None:
    """Raise ConfigError if the task needs what a language model of this package cannot do."""
    if getattr(task, "MULTIMODAL", False) or task.OUTPUT_TYPE not in _OUTPUT_TYPES:
        needs = "images" if getattr(task, "MULTIMODAL", False) else f"the output type {task.OUTPUT_TYPE}"
        raise ConfigError(
            f"task {name} needs {needs}, and the models of this package read and write text only "
            f"({', '.join(_OUTPUT_TYPES)}); leave it out"
        )
    if getattr(task, "UNSAFE_CODE", False):
        raise ConfigError(
            f"task {name} executes the code that the model writes, which qsparse-moe does not do; leave it out, or run "
            "it with lm_eval's own command line in a sandbox, on an export"
        )
    if task.OUTPUT_TYPE == "generate_until":
        TaskGeneration.of(task.config.generation_kwargs or {}, name)


def _set_shots(task: Any, shots: int | None) -> None:
    # As simple_evaluate of the harness does, so that the figures can be compared with published ones.
    own = task.get_config("num_fewshot")
    if shots is not None and own != 0:
        task.set_config(key="num_fewshot", value=shots)
    elif own is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=_FEW_SHOT_SEED)
