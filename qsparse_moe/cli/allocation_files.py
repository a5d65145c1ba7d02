"""The reports of ``allocate``: JSON, Markdown, page, and figures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qsparse_moe.cli.option_values import check_folder
from qsparse_moe.errors import ConfigError

if TYPE_CHECKING:
    from qsparse_moe.ablation.allocation.joint_run import JointAllocation
    from qsparse_moe.ablation.allocation.run import Allocation
    from qsparse_moe.ablation.page.parts import Drawing

FOLDER = "allocation"
"""Folder of the reports in that of the model, and the beginning of the names of the figures in TensorBoard."""
_JSON, _PAGE = "allocation.json", ".html"


def check_no_report(report: Path | None) -> None:
    """Raise ConfigError if ``--report`` is given beside ``--budget``, whose reports are in a folder."""
    if report is not None:
        raise ConfigError(
            f"--report ({report}): with --budget the reports are written to a folder; give --folder in its place, or "
            "leave it out for RUN/allocation"
        )


def check_joint_folder(folder: Path, *, force: bool) -> None:
    """Raise ConfigError if the folder has an allocation already, which may have taken hours."""
    if (folder / _JSON).exists() and not force:
        raise ConfigError(f"--folder ({folder}) contains an {_JSON}; name another folder, or add --force")


def check_report(report: Path | None) -> None:
    """Raise ConfigError unless ``report`` can be written, and the page beside it has another name."""
    if report is None:
        return
    if report.suffix == _PAGE:
        raise ConfigError(
            f"--report ({report}) names the Markdown file, and its page has the same name with {_PAGE}; name a file "
            f"such as {report.with_suffix('.md')}"
        )
    if report.is_dir():
        raise ConfigError(f"--report ({report}) is a folder; name a file, such as {report / 'report.md'}")
    check_folder("the folder of --report", report.parent)


def write_joint_reports(found: JointAllocation, summary: Mapping[str, Any], folder: Path) -> None:
    """Write ``allocation.json``, ``report.md``, ``report.html``, and the figures of a front, and fill TensorBoard."""
    from qsparse_moe.ablation.allocation.joint_report import markdown, write_fronts
    from qsparse_moe.ablation.allocation.page import allocation_drawings, allocation_page
    from qsparse_moe.ablation.page.html import PAGE, write_page
    from qsparse_moe.runs.folder import write_atomically

    model = Path(summary["run_dir"])
    write_atomically(folder / _JSON, json.dumps(summary, indent=1) + "\n")
    drawings = allocation_drawings(summary)
    pictures = [file.name for file in write_fronts(drawings, folder)] if len(found.results) > 1 else []
    write_atomically(folder / "report.md", markdown(found, title=f"Joint plans for {model}", figures=pictures))
    write_page(allocation_page(summary, drawings), folder / PAGE)
    _write_pictures(tensorboard_of(model, folder), drawings, found.step)


def write_sparsity_reports(found: Allocation, summary: Mapping[str, Any], report: Path | None) -> None:
    """Write the Markdown file ``report`` and the page beside it if one is asked for, and fill TensorBoard."""
    from qsparse_moe.ablation.allocation.page import sparsity_drawings, sparsity_page
    from qsparse_moe.ablation.allocation.report import markdown
    from qsparse_moe.ablation.page.html import write_page
    from qsparse_moe.runs.folder import write_atomically

    model = Path(summary["run_dir"])
    drawings = sparsity_drawings(summary, found.plan)
    _write_pictures(tensorboard_of(model, None), drawings, found.step)
    if report is not None:
        report.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(report, markdown(found, title=f"Plans for {model}"))
        write_page(sparsity_page(summary, drawings), report.with_suffix(_PAGE))


def tensorboard_of(model: Path, report: Path | None) -> Path | None:
    """Return the TensorBoard folder for the figures of a report: that of the run, else one in the report's folder.

    An export has none, and may be in a folder without write permission.
    """
    from qsparse_moe.ablation.page.commands import run_of

    own = run_of(model) / "tensorboard"
    if own.is_dir():
        return own
    return None if report is None else report / "tensorboard"


def _write_pictures(tensorboard: Path | None, drawings: Mapping[str, Drawing], step: int) -> None:
    from qsparse_moe.ablation.page.images import pixels
    from qsparse_moe.metrics.tensorboard import write_pictures

    if tensorboard is not None:
        named = {f"{FOLDER}/{name}": pixels(drawing.figure) for name, drawing in drawings.items()}
        write_pictures(tensorboard, named, step)
