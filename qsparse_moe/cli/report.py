"""``qsparse-moe report``: make the page of a stored report again, without the model that was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qsparse_moe.cli.calibrate import check_output
from qsparse_moe.cli.console import print_json, result_console


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("report")(report)


def report(
    files: Annotated[
        list[Path],
        typer.Argument(
            help="JSON files of allocate or sensitivity, or folders that contain one. Several files of allocate "
            "--budget make one page of all their budgets.",
            show_default=False,
        ),
    ],
    output: Annotated[Path, typer.Option(help="HTML file to write the page to.", show_default=False)],
    force: Annotated[bool, typer.Option("--force", help="Replace the output file if there is one.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Make the page of a report again from its JSON."""
    from qsparse_moe.ablation.page.html import PAGE, write_page
    from qsparse_moe.ablation.stored_pages import stored_page

    check_output(output, force=force, example=PAGE)
    page = stored_page(files)
    write_page(page, output)
    summary = {"output": str(output), "title": page.title, "bytes": output.stat().st_size}
    if json:
        print_json(summary)
    else:
        result_console().print(f"{page.title}: {output}, {summary['bytes']:,} bytes", soft_wrap=True)
