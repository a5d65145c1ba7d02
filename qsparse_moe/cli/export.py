"""``qsparse-moe export``: write a run's weights as one state dict that other programs can read."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from qsparse_moe.cli.console import print_json, result_console
from qsparse_moe.runs.find import find_run


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("export")(export)


def export(
    run: Annotated[Path, typer.Argument(help="Run folder.", show_default=False)],
    output: Annotated[Path, typer.Argument(help="Folder to create.", show_default=False)],
    format: Annotated[
        Literal["state-dict"], typer.Option(help="state-dict: safetensors under this package's own names.")
    ] = "state-dict",
    dtype: Annotated[Literal["fp32", "bf16"], typer.Option(help="Type of the weights.")] = "fp32",
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier export.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write the weights of the newest checkpoint, for any number of ranks and ZeRO stage, and the configuration."""
    # Imported once the folder is found, so that a wrong path is reported at once.
    run_dir = find_run(run)
    from qsparse_moe.interop.state_dict import export_run

    done = export_run(run_dir, output, dtype=dtype, force=force)
    if json:
        print_json({"run_dir": str(run_dir), "format": format, "dtype": dtype} | asdict(done) | {"folder": str(output)})
        return
    console = result_console()
    console.print(f"after step {done.step}: {done.tensors} tensors, {done.bytes:,} bytes in {dtype}")
    console.print(f"in {done.folder}, {done.files} file(s) of weights and config.yaml", soft_wrap=True)
