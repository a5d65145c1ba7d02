"""Generate the Markdown tables of all settings: ``python -m qsparse_moe.config.settings_table FILE``."""

from __future__ import annotations

import sys
from pathlib import Path

from qsparse_moe.config.fields import Node, all_settings, takes
from qsparse_moe.config.problems import show

_USAGE = "usage: python -m qsparse_moe.config.settings_table FILE"
_HEAD = """# Settings of a run

One YAML file describes one run. Every setting below can also be given on the command line by its dotted path:
`training.steps=50`, `model.sparsity.sites.expert_hidden=0.6`, `data.sources.0.max_bytes=1000`. `N` is the index of a
list item, from 0. This page is generated from `qsparse_moe/config/schema.py` and `model_schema.py` by
`python -m qsparse_moe.config.settings_table docs/settings.md`.
"""


def settings_markdown() -> str:
    """Return the page ``docs/settings.md``: one table per section."""
    sections: dict[str, list[tuple[str, Node]]] = {}
    for path, node in all_settings():
        sections.setdefault(path.rsplit(".", 1)[0], []).append((path, node))
    return _HEAD + "".join(_table(section, settings) for section, settings in sections.items())


def _table(section: str, settings: list[tuple[str, Node]]) -> str:
    head = f"\n## {section}\n\n| Setting | Default | Values | Meaning |\n| --- | --- | --- | --- |\n"
    return head + "".join(_row(path.rsplit(".", 1)[1], node) for path, node in settings)


def _row(name: str, node: Node) -> str:
    return f"| `{name}` | {_default(node)} | {_cell(takes(node))} | {_meaning(node)} |\n"


def _default(node: Node) -> str:
    if "default" not in node:
        return "(required)"
    value = node["default"]
    text = str(value) if isinstance(value, str) else show(value)
    # The settings of a list's items have a table of their own.
    return "one item with the defaults" if isinstance(value, list) and value else f"`{_cell(text)}`"


def _meaning(node: Node) -> str:
    return _cell(" ".join(node["description"].split()))


def _cell(text: str) -> str:
    # A bar would end the cell.
    return text.replace("|", "\\|")


def main(arguments: list[str]) -> None:
    """Write the page to the file named on the command line."""
    if len(arguments) != 1:
        sys.exit(_USAGE)
    Path(arguments[0]).write_text(settings_markdown(), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
