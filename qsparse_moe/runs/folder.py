"""The folder of a run: created once, never overwritten by another run, and continued only by the same run."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from qsparse_moe.config.load import config_to_yaml, load_config
from qsparse_moe.config.overrides import override_of
from qsparse_moe.config.problems import show
from qsparse_moe.config.schema import RunConfig, SourceConfig
from qsparse_moe.errors import CheckpointError, ConfigError, naming

CONFIG_FILE = "config.yaml"
MANIFEST_FILE = "manifest.json"
CHECKPOINTS = "checkpoints"
UNFINISHED = (".saving-", ".deleting-")
"""Prefixes of the names of checkpoints that are being written or removed."""
TOKENIZER = "tokenizer"
"""Folder with a copy of the run's tokenizer, if it has files."""
PLAN_FILE = "plan.json"
"""Copy of the sparsity plan in an export, whose config.yaml names the file of the training."""
METRICS_FILE = "metrics.jsonl"

MAY_CHANGE = (
    "data.cache_dir",
    # They decide which records are skipped; the loader compares the resulting texts.
    "data.max_bad_records",
    "data.max_document_bytes",
    # It decides who reads, not what is read.
    "data.reader",
    # The folder of the tokenizer and the template's file may change; the loader compares digests of their own.
    "data.tokenizer",
    "data.chat.template",
    "metrics",
    # Every backend computes the same function of the same weights.
    "model.attention_backend",
    "model.moe.backend",
    "model.sparsity.backend",
    # With these a run moves to another machine or layout, or is extended; none of them changes a sequence.
    "training.activation_checkpointing",
    "training.check_memory",
    "training.checkpoint_async",
    "training.checkpoint_interval",
    "training.checkpoint_minutes",
    "training.collective_timeout",
    "training.deepspeed",
    "training.device",
    "training.engine",
    "training.evaluation_interval",
    "training.evaluation_rows",
    "training.expert_parallel_size",
    "training.keep_last",
    "training.micro_batch_size",
    "training.name",
    "training.output_dir",
    "training.resume",
    # A run that has diverged may go on from its last checkpoint by skipping the steps that broke it.
    "training.skip_steps",
    "training.steps",
)
"""Settings and sections that may change when a run is resumed; any other change would make it a different run."""
_INIT_FROM = "training.init_from"
# Files may have been moved: the loader compares their content.
_SOURCE_PATH = re.compile(r"data\.sources\.\d+\.path")


def run_folder(config: RunConfig) -> Path:
    """Return the folder of the run of ``config``."""
    return Path(config.training.output_dir).expanduser() / config.training.name


def holds_no_step(folder: Path) -> bool:
    """Return whether a run folder contains no complete checkpoint and no logged step."""
    rows = folder / METRICS_FILE
    if newest_step(folder) is not None:
        return False
    if not rows.is_file():
        return True
    # A line without its end was being written when the process died: it is not a logged step.
    with rows.open("rb") as lines:
        return not next(lines, b"").endswith(b"\n")


def is_finished(config: RunConfig) -> bool:
    """Return whether the run folder contains a checkpoint of the last step or a later one; needs no torch.

    Raises:
        CheckpointError, ConfigError: as ``check_run_folder`` does.
    """
    if not check_run_folder(config):
        return False
    newest = newest_step(run_folder(config))
    return newest is not None and newest >= config.training.steps


def newest_step(folder: Path) -> int | None:
    """Return the step of the newest checkpoint by its name, or None without one. Needs no torch."""
    steps = (checkpoint_step(path) for path in (folder / CHECKPOINTS).glob("step-*"))
    return max((step for step in steps if step is not None), default=None)


def checkpoint_step(folder: Path) -> int | None:
    """Return the step of a checkpoint by the name of its folder; None if it is not that of a complete one."""
    # The folder is renamed to this name once it is complete, so the name alone is enough.
    number = folder.name.removeprefix("step-")
    return int(number) if number != folder.name and number.isdecimal() else None


def init_from(config: RunConfig, *, resumes: bool) -> str | None:
    """Return ``training.init_from``, or None if the run continues from a checkpoint of its own. Needs no torch.

    Args:
        config: the run.
        resumes: the result of ``check_run_folder``.
    """
    return None if resumes and newest_step(run_folder(config)) is not None else config.training.init_from


def no_checkpoint(folder: Path) -> CheckpointError:
    """Return the error of a run folder that needs a complete checkpoint and has none."""
    return CheckpointError(
        f"{folder / CHECKPOINTS}: contains no complete checkpoint, and one is needed. Train the run to its end "
        "(training.resume=true), or set training.checkpoint_interval"
    )


def check_run_folder(config: RunConfig) -> bool:
    """Return whether there is a run to resume; False if the folder is free. Writes nothing and needs no torch.

    The folder of a run that ended before it saved a step is free, also for other settings.

    Raises:
        CheckpointError: the folder is in use and ``training.resume`` is false, or it is not a run folder.
        ConfigError: the run in it has other settings; each is named with both values.
    """
    folder = run_folder(config)
    if not folder.exists() or (folder.is_dir() and _holds_nothing(folder)):
        return False
    # The config alone is not enough: it may be a file that the user wrote.
    if (folder / MANIFEST_FILE).is_file() and holds_no_step(folder):
        return False
    if not config.training.resume:
        raise CheckpointError(
            f"{folder}: exists, and a run never overwrites another one (training.resume is false). Set "
            "training.resume=true to continue it, or give this run another training.name"
        )
    stored = folder / CONFIG_FILE
    if not stored.is_file():
        raise CheckpointError(
            f"{folder}: is not a run folder (no {CONFIG_FILE} in it), so training.resume=true cannot continue it; "
            "move it away, or choose another training.name or training.output_dir"
        )
    _check_same_run(stored, config)
    return True


def check_steps(config: RunConfig) -> None:
    """Refuse to resume a run that has done more steps than ``training.steps``. Writes nothing and needs no torch.

    Raises:
        ConfigError: the newest checkpoint of the run has a later step.
    """
    folder = run_folder(config)
    done, steps = newest_step(folder), config.training.steps
    if done is not None and done > steps:
        raise ConfigError(
            f"training.steps ({steps}) must be at least the {done} steps that the run in {folder} has done; "
            f"set training.steps={done} or more, or train under another training.name"
        )


def write_config(folder: Path, config: RunConfig) -> None:
    """Write the resolved config. ``load_config`` reads it back equal, except that paths are absolute."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / CONFIG_FILE, config_to_yaml(_from_anywhere(config)))


def load_run_config(folder: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read the config of a run or of an export.

    Its tokenizer is the copy in the folder, and so is the plan of an export, unless an override names others.

    Raises:
        ConfigError: its config.yaml cannot be read, or an override is wrong.
    """
    overrides = [*_own_plan(folder, overrides), *overrides]
    saved = folder.absolute() / TOKENIZER
    # The copy is used even if the original still exists, because that one may have been changed since.
    if saved.is_dir() and not any(override.startswith("data.tokenizer=") for override in overrides):
        config = load_config(folder / CONFIG_FILE, overrides)
        # The copy holds the chat template of the run, whichever file it was read from.
        chat = config.data.chat.model_copy(update={"template": None})
        data = config.data.model_copy(update={"tokenizer": str(saved), "chat": chat})
        return config.model_copy(update={"data": data})
    return load_config(folder / CONFIG_FILE, overrides)


def _own_plan(folder: Path, overrides: Sequence[str]) -> list[str]:
    """Return the override that names the plan of an export."""
    file = folder.absolute() / PLAN_FILE
    # A user may have saved another plan under this name in the folder of a run.
    is_own = file.is_file() and any(folder.glob("model*.safetensors"))
    if not is_own or any(override.startswith("model.sparsity.plan=") for override in overrides):
        return []
    return [override_of("model.sparsity.plan", str(file))]


def _from_anywhere(config: RunConfig) -> RunConfig:
    """Return the config with absolute paths of its data and weights, so that the run can be read from any folder."""
    sources = tuple(source.model_copy(update={"path": _absolute_path(source)}) for source in config.data.sources)
    cache, tokenizer, chat = config.data.cache_dir, config.data.tokenizer, config.data.chat
    update = {
        "sources": sources,
        "cache_dir": _absolute(cache),
        # Only if it exists as a path; otherwise it is a name on the hub, or bytes.
        "tokenizer": _absolute(tokenizer) if os.path.exists(os.path.expanduser(tokenizer)) else tokenizer,
        "chat": chat.model_copy(update={"template": None if chat.template is None else _absolute(chat.template)}),
    }
    initial = config.training.init_from
    # Where not even the folder above exists, it is a name on the hub.
    is_path = initial is not None and os.path.exists(os.path.dirname(_absolute(initial)))
    training = {"init_from": _absolute(initial) if initial is not None and is_path else initial}
    return config.model_copy(
        update={
            "data": config.data.model_copy(update=update),
            "training": config.training.model_copy(update=training),
        }
    )


def _absolute_path(source: SourceConfig) -> str | tuple[str, ...] | None:
    path = source.path
    # A hub source keeps its name, unless it is a local folder with the layout of one.
    if path is None or (
        source.kind == "hub" and not (isinstance(path, str) and os.path.isdir(os.path.expanduser(path)))
    ):
        return path
    return _absolute(path) if isinstance(path, str) else tuple(map(_absolute, path))


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


def write_atomically(file: Path, text: str) -> None:
    """Replace ``file`` so that a reader sees either the old text or the new one, never a part."""
    # In the same folder, because a rename is atomic only within one file system.
    beside = _beside(file)
    with naming(file):
        with beside.open("w", encoding="utf-8") as stream:
            stream.write(text)
            # Without fsync a power cut may leave the renamed file empty.
            stream.flush()
            os.fsync(stream.fileno())
        beside.replace(file)


def _beside(file: Path) -> Path:
    return file.with_name(f".{file.name}.new")


def _holds_nothing(folder: Path) -> bool:
    """Return whether the folder is empty, apart from partial files of a process that died writing the first ones."""
    partial = {_beside(folder / MANIFEST_FILE), _beside(folder / CONFIG_FILE)}
    return partial.issuperset(folder.iterdir())


def _check_same_run(stored: Path, config: RunConfig) -> None:
    changed = changed_settings(load_config(stored), config)
    if changed:
        raise ConfigError(
            f"{stored}: was made with other settings than the run that continues it (training.resume=true): "
            + "; ".join(changed)
            + ". Restore them, or start a new run with another training.name (for the runs of a grid: another "
            "--output-dir of ablate)"
        )


def changed_settings(before: RunConfig, now: RunConfig, *, also: Collection[str] = ()) -> list[str]:
    """Return a text with both values of every setting that makes ``now`` another run than ``before``.

    Args:
        before: the settings of a run, with the size of its vocabulary.
        now: the settings to compare.
        also: settings of ``MAY_CHANGE`` that count as well.
    """
    old, new = (settings_by_path(config.model_dump(mode="json")) for config in (before, now))
    for settings in (old, new):
        # A folder, which is stored as an absolute path and may be given as a relative one.
        if settings[_INIT_FROM] is not None:
            settings[_INIT_FROM] = _absolute(settings[_INIT_FROM])
    if now.model.vocab_size is None:  # derived later from the tokenizer, which is compared as well
        new["model.vocab_size"] = old["model.vocab_size"]
    return [
        _changed(path, old.get(path), new.get(path))
        for path in sorted(old.keys() | new.keys())
        if old.get(path) != new.get(path) and (path in also or not may_change(path))
    ]


def _changed(path: str, before: Any, now: Any) -> str:
    was, is_now = show(before), show(now)
    # Two long paths may differ only in the part that is cut.
    if was == is_now:
        was, is_now = repr(before), repr(now)
    return f"{path} was {was} and is {is_now}"


def settings_by_path(value: Any, path: str = "") -> dict[str, Any]:
    """Return every setting by its dotted path; each section in a list has its own, and an empty list is one value.

    Args:
        value: a section as ``model_dump(mode="json")`` returns it, or a part of one.
        path: the dotted path of ``value``.
    """
    if isinstance(value, dict):
        items = [(str(key), below) for key, below in value.items()]
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        items = [(str(index), below) for index, below in enumerate(value)]
    else:
        return {path: value}
    return {
        leaf: found
        for key, below in items
        for leaf, found in settings_by_path(below, f"{path}.{key}" if path else key).items()
    }


def may_change(path: str) -> bool:
    """Return whether the setting, or the section that it is in, may change when a run is resumed."""
    return _SOURCE_PATH.fullmatch(path) is not None or any(
        path == free or path.startswith(f"{free}.") for free in MAY_CHANGE
    )
