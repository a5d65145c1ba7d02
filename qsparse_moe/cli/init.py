"""``qsparse-moe init``: write a starting point: a configuration, a grid, or an example script."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from qsparse_moe.cli.console import print_json, result_console
from qsparse_moe.cli.option_values import check_no_effect
from qsparse_moe.config.shipped import SCHEMA, Shipped, shipped, shipped_files
from qsparse_moe.errors import ConfigError

# Lines are replaced in the text, because a YAML writer would drop the comments that explain the settings.
_SCHEMA_LINE = re.compile(r"^# yaml-language-server: \$schema=.*$", re.MULTILINE)
_BASE_LINE = re.compile(r"^base: *(\S+)", re.MULTILINE)
_NEXT = {"config": "qsparse-moe train", "grid": "qsparse-moe ablate", "example": "python"}


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("init")(init)


def init(
    name: Annotated[str, typer.Argument(help="A name from --list, such as tiny or ablations/sparsity.")] = "tiny",
    output: Annotated[
        Path | None, typer.Option(help="File to write; the default is the file's own name in this folder.")
    ] = None,
    list_names: Annotated[bool, typer.Option("--list", help="List the names and write nothing.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace files that exist.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write a configuration, a grid (with its base configuration), or an example script to start from."""
    if list_names:
        check_no_effect({"--output": output, "--force": force}, beside="--list")
        _print_list(json)
        return
    chosen = shipped(name)
    target = output or Path(chosen.path.name)
    files = _texts(chosen, target)
    # All of them before the first is written, so that an error leaves nothing behind.
    for path in files:
        _check_free(path, force)
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    if json:
        print_json({"name": chosen.name, "kind": chosen.kind, "files": [str(path) for path in files]})
        return
    console = result_console()
    for path in files:
        console.print(f"wrote {path}", soft_wrap=True)
    # A notebook is opened in an editor and not run as a command.
    if target.suffix != ".ipynb":
        console.print(f"next: {_NEXT[chosen.kind]} {target}", soft_wrap=True)


def _texts(chosen: Shipped, target: Path) -> dict[Path, str]:
    """Return what to write by file: the chosen file, and for a grid the configuration that it is based on."""
    # The schema is beside the shipped file and not beside the copy, so the copy refers to it by an absolute path.
    text = _SCHEMA_LINE.sub(f"# yaml-language-server: $schema={SCHEMA}", chosen.path.read_text(encoding="utf-8"))
    # Only a grid has a base, which must be copied with it and be named as it lies beside the copy.
    base = _BASE_LINE.search(text) if chosen.kind == "grid" else None
    if base is None:
        return {target: text}
    base_file = shipped((chosen.path.parent / base[1]).resolve().stem)
    beside = target.parent / base_file.path.name
    text = text[: base.start(1)] + beside.name + text[base.end(1) :]
    return {target: text} | _texts(base_file, beside)


def _check_free(path: Path, force: bool) -> None:
    if path.is_dir():
        raise ConfigError(f"--output ({path}) is a folder; name the file to write, such as {path / 'run.yaml'}")
    if path.exists() and not force:
        raise ConfigError(
            f"{path} exists, and init replaces no file by default; choose another --output, or add --force"
        )


def _print_list(json: bool) -> None:
    files = shipped_files()
    if json:
        print_json({"files": [{"name": f.name, "kind": f.kind, "summary": f.summary} for f in files.values()]})
        return
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("name", "kind", "what it is"):
        table.add_column(column, overflow="fold")
    for file in files.values():
        table.add_row(file.name, file.kind, file.summary)
    result_console().print(table)
