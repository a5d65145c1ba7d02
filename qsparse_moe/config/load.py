"""Load a RunConfig from YAML and overrides, and write it. All problems are reported at once; imports no torch."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from qsparse_moe.config.fields import (
    Node,
    missing_value,
    run_schema,
    section_fields,
    unknown_setting,
    walk,
    wrong_value,
)
from qsparse_moe.config.fields import Path as SettingPath
from qsparse_moe.config.overrides import apply_overrides
from qsparse_moe.config.problems import Problem, raise_if_any, show
from qsparse_moe.config.removed import drop_removed
from qsparse_moe.config.rules import broken_rules, check_model
from qsparse_moe.config.schema import ModelConfig, RunConfig
from qsparse_moe.config.yaml_text import dump_yaml, parse_yaml
from qsparse_moe.errors import ConfigError


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> RunConfig:
    """Return the configuration in the YAML file ``path``, changed by ``overrides`` such as ``training.steps=50``.

    Raises:
        ConfigError: the file cannot be read, or a setting is unknown, has the wrong type, or breaks a rule; each
            problem has a line with the full path, the value, the rule, and a way out.
    """
    where = os.fspath(path)
    settings, problems = parse_yaml(_read_text(Path(path)), where)
    # An empty file is a run with every default.
    if settings is None:
        settings = {}
    if not isinstance(settings, dict):
        raise ConfigError(f"{where} ({show(settings)}) must contain settings by name, such as training: {{steps: 50}}")
    # Before the overrides: only an old file may still contain a removed setting, a command line may not.
    problems += drop_removed(settings)
    problems += apply_overrides(settings, overrides)
    config, more = _build(_tidy(settings, run_schema()))
    raise_if_any([*problems, *more], where)
    # Without a configuration there is at least one problem, which has been raised.
    assert config is not None
    return config


def model_from_settings(settings: dict[str, Any], where: str) -> ModelConfig:
    """Return the model section that plain settings describe, such as those of a JSON file.

    Args:
        settings: by name, without the ``model.`` in front of it.
        where: the file, for messages.

    Raises:
        ConfigError: a setting is unknown, has the wrong type, or breaks a rule.
    """
    tree = _tidy({"model": settings}, run_schema())
    raise_if_any(drop_removed(tree), where)
    try:
        model = ModelConfig.model_validate(tree["model"])
    except ValidationError as error:
        errors = error.errors(include_url=False)
        for found in errors:
            found["loc"] = ("model", *found["loc"])
        raise_if_any(_translate(errors, tree), where)
        raise
    check_model(model)
    return model


def config_from_settings(settings: dict[str, Any], where: str) -> RunConfig:
    """Return the configuration that plain settings describe, such as those of a line of JSON.

    Args:
        settings: the sections by name; settings that are left out have their defaults.
        where: the file, for messages.

    Raises:
        ConfigError: a setting is unknown, has the wrong type, or breaks a rule.
    """
    tree = _tidy(settings, run_schema())
    problems = drop_removed(tree)
    config, more = _build(tree)
    raise_if_any([*problems, *more], where)
    # Without a configuration there is at least one problem, which has been raised.
    assert config is not None
    return config


def config_to_yaml(config: RunConfig) -> str:
    """Return all settings of ``config`` as YAML text, from which ``load_config`` restores an equal configuration."""
    return dump_yaml(config.model_dump(mode="json"))


def _read_text(path: Path) -> str:
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; name a YAML file{_nearby(path, path.name)}")
    try:
        # utf-8-sig, because editors on Windows begin a file with a byte-order mark.
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; name a YAML file{_nearby(path.parent, path.name)}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); make it readable or name another file") from None


def _nearby(folder: Path, name: str) -> str:
    """Return a hint with the nearest YAML files in the folder or in its subfolder ``configs``."""
    found = [path for pattern in ("[!.]*.yaml", "configs/*.yaml") for path in sorted(folder.glob(pattern))]
    if not found:
        return ""
    # Names are compared without folders, because the folder configs/ is easily left out.
    names = [path.name for path in found]
    nearest = difflib.get_close_matches(name, names, n=3) or names[:3]
    return f", such as {', '.join(str(found[names.index(near)]) for near in nearest)}"


def _tidy(value: Any, node: Node) -> Any:
    """Return ``value`` with text keys, and an empty mapping for an empty section (``data:`` with nothing below)."""
    fields = section_fields(node)
    if fields is None:
        return value
    if value is None:
        return {}
    if not isinstance(value, dict):
        return value
    # YAML reads a key such as 1 as a number, and the message about an unknown setting has to name it.
    return {str(key): _tidy(below, fields.get(str(key), {})) for key, below in value.items()}


def _build(settings: dict[str, Any]) -> tuple[RunConfig | None, list[Problem]]:
    """Return the configuration if each setting is valid by itself, and every broken rule that can be determined."""
    try:
        config = RunConfig.model_validate(settings)
        return config, broken_rules(config)
    except ValidationError as error:
        problems = _translate(error.errors(include_url=False), settings)
    broken = {path for problem in problems for path in problem.paths}
    try:
        # Without the invalid settings, so that the rules about the others are reported together with them.
        rest = RunConfig.model_validate(_without(settings, broken))
    except ValidationError:
        return None, problems
    # A rule that involves an invalid setting would check the default in its place.
    problems += [rule for rule in broken_rules(rest) if not any(_overlap(a, b) for a in rule.paths for b in broken)]
    return None, problems


def _translate(errors: Iterable[ErrorDetails], settings: dict[str, Any]) -> list[Problem]:
    by_path: dict[SettingPath, Problem] = {}
    for error in errors:
        path, node = walk(error["loc"])
        if error["type"] == "extra_forbidden":
            by_path[tuple(error["loc"])] = unknown_setting(tuple(error["loc"]))
        elif error["type"] == "missing":
            by_path[path] = missing_value(path, node)
        else:
            # A union reports each of its options below the setting: the setting is named once, as a whole.
            by_path[path] = wrong_value(path, node, _value_at(settings, path))
    # A list whose only item is invalid is also reported as too short: the message of the item is the useful one.
    return [problem for path, problem in by_path.items() if not any(_inside(other, path) for other in by_path)]


def _value_at(settings: Any, path: SettingPath) -> Any:
    for part in path:
        settings = settings[part]
    return settings


def _inside(path: SettingPath, outer: SettingPath) -> bool:
    return len(path) > len(outer) and path[: len(outer)] == outer


def _overlap(one: str, other: str) -> bool:
    return one == other or one.startswith(f"{other}.") or other.startswith(f"{one}.")


def _without(settings: dict[str, Any], broken: set[str]) -> dict[str, Any]:
    """Return ``settings`` without the invalid ones; a list with an invalid item is removed as a whole."""
    remaining: dict[str, Any] = {}
    for name, value in settings.items():
        if name in broken:
            continue
        # A list is dropped as a whole, because without one item the others would be reported under other indices.
        below = {path.partition(".")[2] for path in broken if path.startswith(f"{name}.")}
        if not below:
            remaining[name] = value
        elif isinstance(value, dict):
            remaining[name] = _without(value, below)
    return remaining
