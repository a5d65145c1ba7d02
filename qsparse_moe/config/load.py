"""A YAML file and overrides to a RunConfig, and back. Every broken rule is reported, all together; imports no torch."""

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
from qsparse_moe.config.rules import broken_rules
from qsparse_moe.config.schema import RunConfig
from qsparse_moe.config.yaml_text import dump_yaml, parse_yaml
from qsparse_moe.errors import ConfigError


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> RunConfig:
    """The run that the YAML file ``path`` describes, after the ``overrides`` (``training.steps=50``), frozen.

    Raises:
        ConfigError: the file cannot be read, or a setting is unknown, of the wrong type or breaks a rule; every problem
            has its line with the full path, the value, the rule and the way out.
    """
    where = os.fspath(path)
    settings, problems = parse_yaml(_read_text(Path(path)), where)
    if settings is None:
        settings = {}
    if not isinstance(settings, dict):
        raise ConfigError(f"{where} ({show(settings)}) must hold settings by name, such as training: {{steps: 50}}")
    # Before the overrides: only an old file may still contain a removed setting, a command line may not.
    problems += drop_removed(settings)
    problems += apply_overrides(settings, overrides)
    config, more = _build(_tidy(settings, run_schema()))
    raise_if_any([*problems, *more], where)
    assert config is not None
    return config


def config_to_yaml(config: RunConfig) -> str:
    """Every setting of ``config`` as YAML text; ``load_config`` reads it back equal."""
    return dump_yaml(config.model_dump(mode="json"))


def _read_text(path: Path) -> str:
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; name a YAML file{_nearby(path, path.name)}")
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; name a YAML file{_nearby(path.parent, path.name)}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); make it readable or name another file") from None


def _nearby(folder: Path, name: str) -> str:
    """What the folder, or a folder ``configs`` in it, offers instead: the nearest names first."""
    found = [path for pattern in ("[!.]*.yaml", "configs/*.yaml") for path in sorted(folder.glob(pattern))]
    if not found:
        return ""
    names = [path.name for path in found]
    nearest = difflib.get_close_matches(name, names, n=3) or names[:3]
    return f", such as {', '.join(str(found[names.index(near)]) for near in nearest)}"


def _tidy(value: Any, node: Node) -> Any:
    """``value`` with text keys and, where a section is empty (``data:`` with nothing below), a section of defaults."""
    fields = section_fields(node)
    if fields is None:
        return value
    if value is None:
        return {}
    if not isinstance(value, dict):
        return value
    return {str(key): _tidy(below, fields.get(str(key), {})) for key, below in value.items()}


def _build(settings: dict[str, Any]) -> tuple[RunConfig | None, list[Problem]]:
    """The config, where the settings alone are right; with it or without it, every broken rule that can be known."""
    try:
        config = RunConfig.model_validate(settings)
        return config, broken_rules(config)
    except ValidationError as error:
        problems = _translate(error.errors(include_url=False), settings)
    broken = {path for problem in problems for path in problem.paths}
    try:
        rest = RunConfig.model_validate(_without(settings, broken))
    except ValidationError:
        return None, problems
    # A rule that joins a broken setting would judge the default that stands in for it.
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
            # A union reports each of its options, below the setting: it is named once, as a whole.
            by_path[path] = wrong_value(path, node, _value_at(settings, path))
    # A list is reported too short when its only item is wrong: the item says it better.
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
    """``settings`` less every broken one; a list with a broken item goes as a whole."""
    kept: dict[str, Any] = {}
    for name, value in settings.items():
        if name in broken:
            continue
        below = {path.partition(".")[2] for path in broken if path.startswith(f"{name}.")}
        if not below:
            kept[name] = value
        elif isinstance(value, dict):
            kept[name] = _without(value, below)
    return kept
