"""The folder of a run: made once, never taken over by another run, and continued only by the same one."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qsparse_moe.config.load import config_to_yaml, load_config
from qsparse_moe.config.problems import show
from qsparse_moe.config.schema import RunConfig, SourceConfig
from qsparse_moe.errors import CheckpointError, ConfigError, naming

CONFIG_FILE = "config.yaml"
MANIFEST_FILE = "manifest.json"
CHECKPOINTS = "checkpoints"
TOKENIZER = "tokenizer"
"""Folder of a copy of the run's tokenizer, where it has files."""
METRICS_FILE = "metrics.jsonl"

MAY_CHANGE = (
    "data.cache_dir",
    # Which records are skipped, and the texts that come of it: the loader compares the content.
    "data.max_bad_records",
    "data.max_document_bytes",
    "data.tokenizer",
    "metrics",
    # Experts own weights, backends own speed.
    "model.moe.backend",
    "model.sparsity.backend",
    "training.activation_checkpointing",
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
    "training.steps",
)
"""Settings, or whole sections, that a resumed run may have different; the others would make it another run."""
# Files may have moved: the loader compares their content.
_SOURCE_PATH = re.compile(r"data\.sources\.\d+\.path")


def run_folder(config: RunConfig) -> Path:
    """Where the run of ``config`` lives."""
    return Path(config.training.output_dir).expanduser() / config.training.name


def holds_no_step(folder: Path) -> bool:
    """Return whether a run folder holds nothing that a step made: no complete checkpoint and no logged step."""
    rows = folder / METRICS_FILE
    if newest_step(folder) is not None:
        return False
    if not rows.is_file():
        return True
    with rows.open("rb") as lines:
        return not next(lines, b"").endswith(b"\n")


def is_finished(config: RunConfig) -> bool:
    """Whether the run's folder holds a checkpoint of its last step or a later one; needs no torch.

    Raises:
        CheckpointError, ConfigError: as ``check_run_folder`` does.
    """
    if not check_run_folder(config):
        return False
    newest = newest_step(run_folder(config))
    return newest is not None and newest >= config.training.steps


def newest_step(folder: Path) -> int | None:
    """Of the newest checkpoint in the run folder, by its name; None without one. Needs no torch."""
    steps = (path.name.removeprefix("step-") for path in (folder / CHECKPOINTS).glob("step-*"))
    return max((int(step) for step in steps if step.isdecimal()), default=None)


def no_checkpoint(folder: Path) -> CheckpointError:
    """What to raise where a run folder has no complete checkpoint and one is needed."""
    return CheckpointError(
        f"{folder / CHECKPOINTS}: has no complete checkpoint; a run must have saved one. Train it to its end "
        "(training.resume=true), or set training.checkpoint_interval"
    )


def check_run_folder(config: RunConfig) -> bool:
    """Whether there is a run to resume; False where the folder is free. Writes nothing and needs no torch.

    A run that ended before it kept a step has nothing to lose: its folder is free, for other settings as well.

    Raises:
        CheckpointError: the folder is in use and the run shall not resume, or it holds something that is no run.
        ConfigError: the run in it was made with other settings; each is named with both values.
    """
    folder = run_folder(config)
    if not folder.exists() or (folder.is_dir() and _holds_nothing(folder)):
        return False
    # Not by its config alone, which may be the very file that the user wrote.
    if (folder / MANIFEST_FILE).is_file() and holds_no_step(folder):
        return False
    if not config.training.resume:
        raise CheckpointError(
            f"{folder}: exists, and a run never overwrites another (training.resume is false). Set "
            "training.resume=true to continue it, or give this run another training.name"
        )
    stored = folder / CONFIG_FILE
    if not stored.is_file():
        raise CheckpointError(
            f"{folder}: is no run folder, it has no {CONFIG_FILE}, so training.resume=true cannot continue it; "
            "move it away, or choose another training.name or training.output_dir"
        )
    _check_same_run(stored, config)
    return True


def check_steps(config: RunConfig) -> None:
    """Refuse to resume a run that has done more steps than ``training.steps``. Writes nothing and needs no torch.

    Raises:
        ConfigError: the run's newest checkpoint is of a later step; the way back to an earlier one is named.
    """
    folder = run_folder(config)
    done, steps = newest_step(folder), config.training.steps
    if done is not None and done > steps:
        raise ConfigError(
            f"training.steps ({steps}) must be at least the {done} steps that the run in {folder} has done; "
            f"set training.steps={done} or more, or train under another training.name"
        )


def write_config(folder: Path, config: RunConfig) -> None:
    """Write the resolved config, so that ``load_config`` reads it back equal, but for paths, which are absolute."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / CONFIG_FILE, config_to_yaml(_from_anywhere(config)))


def load_run_config(folder: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read the config of a run; its tokenizer is the copy that the run folder holds, unless an override names another.

    Raises:
        ConfigError: its config.yaml cannot be read, or an override is wrong.
    """
    kept = folder.absolute() / TOKENIZER
    if kept.is_dir() and not any(override.startswith("data.tokenizer=") for override in overrides):
        config = load_config(folder / CONFIG_FILE, overrides)
        return config.model_copy(update={"data": config.data.model_copy(update={"tokenizer": str(kept)})})
    return load_config(folder / CONFIG_FILE, overrides)


def _from_anywhere(config: RunConfig) -> RunConfig:
    """The config with the paths of its data from the root: a run is read from any folder."""
    sources = tuple(source.model_copy(update={"path": _absolute_path(source)}) for source in config.data.sources)
    cache, tokenizer = config.data.cache_dir, config.data.tokenizer
    update = {
        "sources": sources,
        "cache_dir": _absolute(cache),
        "tokenizer": _absolute(tokenizer) if os.path.exists(os.path.expanduser(tokenizer)) else tokenizer,
    }
    return config.model_copy(update={"data": config.data.model_copy(update=update)})


def _absolute_path(source: SourceConfig) -> str | tuple[str, ...] | None:
    path = source.path
    if path is None or (
        source.kind == "hub" and not (isinstance(path, str) and os.path.isdir(os.path.expanduser(path)))
    ):
        return path
    return _absolute(path) if isinstance(path, str) else tuple(map(_absolute, path))


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


def write_atomically(file: Path, text: str) -> None:
    """Replace ``file``: whoever reads it sees the old text or the new one, never a part."""
    beside = _beside(file)
    with naming(file):
        with beside.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        beside.replace(file)


def _beside(file: Path) -> Path:
    return file.with_name(f".{file.name}.new")


def _holds_nothing(folder: Path) -> bool:
    """Also where a process died while it wrote the very first file."""
    return all(path == _beside(folder / CONFIG_FILE) for path in folder.iterdir())


def _check_same_run(stored: Path, config: RunConfig) -> None:
    before = _leaves(load_config(stored).model_dump(mode="json"))
    now = _leaves(config.model_dump(mode="json"))
    if config.model.vocab_size is None:  # not derived yet: it will be, from the tokenizer, which is compared too
        now["model.vocab_size"] = before["model.vocab_size"]
    changed = [
        f"{path} was {show(before.get(path))} and is {show(now.get(path))}"
        for path in sorted(before.keys() | now.keys())
        if before.get(path) != now.get(path) and not _may_change(path)
    ]
    if changed:
        raise ConfigError(
            f"{stored}: was made with other settings than the run that shall continue it (training.resume=true): "
            + "; ".join(changed)
            + ". Put them back, or start a new run under another training.name; runs of a grid go to another "
            "folder with ablate's --output-dir"
        )


def _leaves(value: Any, path: str = "") -> dict[str, Any]:
    """Every setting by its dotted path; a list of sections counts each of them, an empty one itself."""
    if isinstance(value, dict):
        items = [(str(key), below) for key, below in value.items()]
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        items = [(str(index), below) for index, below in enumerate(value)]
    else:
        return {path: value}
    return {
        leaf: found for key, below in items for leaf, found in _leaves(below, f"{path}.{key}" if path else key).items()
    }


def _may_change(path: str) -> bool:
    return _SOURCE_PATH.fullmatch(path) is not None or any(
        path == free or path.startswith(f"{free}.") for free in MAY_CHANGE
    )
