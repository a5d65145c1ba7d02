"""Configs from settings by their dotted paths, and the rules that they break."""

from __future__ import annotations

from qsparse_moe.config.rules import broken_rules
from qsparse_moe.config.schema import RunConfig

BLOCK = {"model.sparsity.selection": "block", "model.sparsity.default": 0.5}


def build(settings: dict[str, object]) -> RunConfig:
    """A config from dotted paths, its single values checked and no rule."""
    tree: dict = {}
    for path, value in settings.items():
        *sections, name = path.split(".")
        holder = tree
        for section in sections:
            holder = holder.setdefault(section, {})
        holder[name] = value
    return RunConfig.model_validate(tree)


def messages(settings: dict[str, object]) -> list[str]:
    """Return one message per rule that the settings break."""
    return [problem.message for problem in broken_rules(build(settings))]
