"""Pages made again from the JSON of reports, without the model that was measured."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qsparse_moe.ablation.allocation.joint_report import FORMAT as JOINT_FORMAT
from qsparse_moe.ablation.allocation.page import allocation_page, sparsity_drawings, sparsity_page
from qsparse_moe.ablation.allocation.report import FORMAT as SPARSITY_FORMAT
from qsparse_moe.ablation.page.parts import Page
from qsparse_moe.ablation.sensitivity.page import sensitivity_page
from qsparse_moe.ablation.sensitivity.report import FORMAT as SENSITIVITY_FORMAT
from qsparse_moe.ablation.sensitivity.stored import FIRST_FORMAT
from qsparse_moe.errors import ConfigError
from qsparse_moe.sparsity.plan import SparsityPlan

NAMES = ("allocation.json", "sensitivity.json")
"""The reports that a folder may have."""
_SAME = ("run_dir", "quantity", "batch", "step", "held_out_rows", "train_steps", "dense")
"""What reports must have in common whose budgets are shown as one front."""


def stored_page(files: Sequence[Path]) -> Page:
    """Return the page of one report, or of several joint allocations whose budgets are one front.

    Args:
        files: JSON files of ``allocate`` or ``sensitivity``, or folders that have one.

    Raises:
        ConfigError: a file is no such report, or several are not of one model and one comparison.
    """
    files = [report_in(file) for file in files]
    contents = [_read(file) for file in files]
    content = contents[0] if len(files) == 1 else joined(dict(zip(files, contents, strict=True)))
    try:
        return _page(content)
    except KeyError as missing:
        listed = ", ".join(map(str, files))
        raise ConfigError(f"{listed} has no {missing}; name a report as allocate or sensitivity wrote it") from None


def report_in(path: Path) -> Path:
    """Return the report in a folder, or the path itself if it is no folder."""
    if not path.is_dir():
        return path
    found = [path / name for name in NAMES if (path / name).is_file()]
    if len(found) != 1:
        have = f"both {NAMES[0]} and {NAMES[1]}" if found else f"neither {NAMES[0]} nor {NAMES[1]}"
        raise ConfigError(f"{path} is a folder with {have}; name the JSON file of one report")
    return found[0]


def joined(contents: Mapping[Path, Mapping[str, Any]]) -> dict[str, Any]:
    """Return several joint allocations as one content: the first one with the budgets of all.

    The plans may be made from different numbers of training sequences, which every budget then has as ``rows``.

    Raises:
        ConfigError: one is no joint allocation, they do not compare one model on the same sequences, or two of them
            have the same budget.
    """
    (first_file, first), *others = contents.items()
    for file, content in contents.items():
        if content["format"] != JOINT_FORMAT:
            raise ConfigError(
                f"{file} is no report of allocate --budget; only these are put together, so name it alone"
            )
    for file, content in others:
        for name in _SAME:
            if content[name] != first[name]:
                raise ConfigError(
                    f"{file} has {name} {_text(content[name])} and {first_file} has {_text(first[name])}; one page "
                    "shows one model, compared on the same sequences, so make a page for each"
                )
    owners: dict[str, Path] = {}
    for file, content in contents.items():
        for budget in content["budgets"]:
            if budget["budget"] in owners:
                raise ConfigError(
                    f"{budget['budget']} is in {owners[budget['budget']]} and in {file}; name one of them"
                )
            owners[budget["budget"]] = file
    budgets = [budget | {"rows": content["rows"]} for content in contents.values() for budget in content["budgets"]]
    return {**first, "budgets": budgets}


def _text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict) else str(value)


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read as a report ({error}); name a file such as {NAMES[0]}") from None
    found = content.get("format") if isinstance(content, dict) else None
    known = (JOINT_FORMAT, SPARSITY_FORMAT, SENSITIVITY_FORMAT, FIRST_FORMAT)
    if found not in known:
        raise ConfigError(
            f"{file} is no report of allocate or sensitivity: its format is {found!r}, and it must be one of "
            f"{', '.join(known)}; ablate --results makes the page of a grid"
        )
    return dict(content)


def _page(content: Mapping[str, Any]) -> Page:
    if content["format"] == JOINT_FORMAT:
        return allocation_page(content)
    if content["format"] == SPARSITY_FORMAT:
        # Its plan is in a file of its own.
        return sparsity_page(content, sparsity_drawings(content, SparsityPlan.load(content["output"])))
    return sensitivity_page(content)
