"""``qsparse-moe import``: write a Hugging Face model as an export, which every other verb reads."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from qsparse_moe.cli.console import print_json, result_console


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("import")(import_folder)


def import_folder(
    folder: Annotated[
        Path,
        typer.Argument(help="Folder of a Hugging Face model; docs/interop.md lists the families.", show_default=False),
    ],
    output: Annotated[Path, typer.Option("--output", help="Folder to create.", show_default=False)],
    tokenizer: Annotated[
        str | None,
        typer.Option(help="Tokenizer, as data.tokenizer names it; default: that of the folder.", show_default=False),
    ] = None,
    dtype: Annotated[
        Literal["auto", "fp32", "bf16"], typer.Option(help="Type of the weights; auto: as they are stored.")
    ] = "auto",
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier export or import.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Read config.json and the safetensors files of a Hugging Face model, and write them as an export."""
    # Imported here, so that the help does not load torch.
    from qsparse_moe.interop.import_model import import_model

    done = import_model(folder, output, tokenizer=tokenizer, dtype=dtype, force=force)
    if json:
        print_json({"source": str(folder), "dtype": dtype} | asdict(done) | {"folder": str(output)})
        return
    console = result_console()
    console.print(f"{done.tensors} tensors, {done.bytes:,} bytes")
    console.print(f"in {done.folder}, {done.files} file(s) of weights and config.yaml", soft_wrap=True)
