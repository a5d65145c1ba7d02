"""Generate the JSON schema for editors: ``python -m qsparse_moe.config.json_schema configs/schema.json``."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

from qsparse_moe.config.fields import run_schema

_USAGE = "usage: python -m qsparse_moe.config.json_schema FILE"


def schema_text() -> str:
    """Return the text of ``configs/schema.json``."""
    schema = _for_files(copy.deepcopy(run_schema()))
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "A run of qsparse_moe"}
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def _for_files(node: Any) -> Any:
    """Return ``node`` for files, where a section may be empty; without line breaks and redundant titles."""
    if isinstance(node, list):
        return [_for_files(item) for item in node]
    if not isinstance(node, dict):
        return " ".join(node.split()) if isinstance(node, str) else node
    # pydantic makes titles of the names of classes and fields, which say nothing new in an editor.
    node = {key: _for_files(value) for key, value in node.items() if not (key == "title" and isinstance(value, str))}
    # A section with nothing below its name is null in YAML, and load_config accepts it.
    if node.get("type") == "object" and not node.get("required"):
        node["type"] = ["object", "null"]
    return node


def main(arguments: list[str]) -> None:
    """Write the schema to the file named on the command line."""
    if len(arguments) != 1:
        sys.exit(_USAGE)
    Path(arguments[0]).write_text(schema_text(), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
