"""``qsparse-moe doctor``: report what runs on this machine, what does not, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated

import typer
from rich.table import Table

from qsparse_moe.cli.checks import Finding, examine
from qsparse_moe.cli.console import print_json, result_console

_MARKS = {True: "yes", False: "no"}


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("doctor")(doctor)


def doctor(json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False) -> None:
    """Report what runs on this machine. The exit code is 1 if something is missing that every run needs."""
    findings = examine()
    # A missing GPU or extra package is reported, but most runs do without it.
    missing = [finding for finding in findings if finding.needed and not finding.runs]
    if json:
        print_json({"ready": not missing, "findings": [asdict(finding) for finding in findings]})
    else:
        _print_tables(findings, missing)
    raise typer.Exit(1 if missing else 0)


def _print_tables(findings: Sequence[Finding], missing: Sequence[Finding]) -> None:
    console = result_console()
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("", "runs", ""):
        # Unless it may fold, rich cuts the command that installs a missing package.
        table.add_column(column, overflow="fold")
    group = ""
    for finding in findings:
        if finding.group != group:
            group = finding.group
            table.add_row(f"\n{group}", "", "")
        table.add_row(f"  {finding.name}", _MARKS[finding.runs], finding.detail)
    console.print(table)
    if missing:
        console.print(f"\nNot ready: {', '.join(finding.name for finding in missing)} missing, and every run needs it.")
    else:
        console.print("\nReady: train, evaluate, and generate run on this machine.")
