"""``qsparse-moe import``: write a Hugging Face model as an export, which every other verb reads."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from qsparse_moe.cli.console import print_json, result_console
from qsparse_moe.cli.option_names import naming_options


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("import")(import_folder)


def import_folder(
    folder: Annotated[
        Path,
        typer.Argument(
            help="Folder of a Hugging Face model, or its name on the hub; docs/interop.md lists the families.",
            show_default=False,
        ),
    ],
    output: Annotated[Path, typer.Option("--output", help="Folder to create.", show_default=False)],
    tokenizer: Annotated[
        str | None,
        typer.Option(help="Tokenizer, as data.tokenizer names it; default: that of the folder.", show_default=False),
    ] = None,
    dtype: Annotated[
        Literal["auto", "fp32", "bf16"], typer.Option(help="Type of the weights; auto: as they are stored.")
    ] = "auto",
    experts: Annotated[
        int | None,
        typer.Option(help="Make this many experts of every layer of a dense model.", show_default=False),
    ] = None,
    experts_per_token: Annotated[
        int | None, typer.Option(help="Experts per token; default: 2.", show_default=False)
    ] = None,
    upcycle: Annotated[
        Literal["copies", "slices"] | None,
        typer.Option(
            help="copies (the default): an expert is the dense network; slices: it is a part of its hidden features.",
            show_default=False,
        ),
    ] = None,
    slices: Annotated[
        int | None, typer.Option(help="Slices per copy; default: the experts per token.", show_default=False)
    ] = None,
    noise: Annotated[
        float | None,
        typer.Option(
            help="Standard deviation of noise on the experts, in units of the root mean square of their weights.",
            show_default=False,
        ),
    ] = None,
    noise_share: Annotated[
        float | None, typer.Option(help="Share of the weights that receive noise; default: 0.5.", show_default=False)
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier export or import.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Read config.json and the safetensors files of a Hugging Face model, and write them as an export."""
    # Imported here, so that the help does not load torch.
    from qsparse_moe.interop.import_model import import_model
    from qsparse_moe.interop.upcycling_rules import upcycling_of

    with naming_options():
        upcycling = upcycling_of(
            experts,
            experts_per_token=experts_per_token,
            upcycle=upcycle,
            slices=slices,
            noise=noise,
            noise_share=noise_share,
        )
        done = import_model(folder, output, tokenizer=tokenizer, dtype=dtype, force=force, upcycling=upcycling)
    if json:
        print_json({"source": str(folder), "dtype": dtype} | asdict(done) | {"folder": str(output)})
        return
    console = result_console()
    console.print(f"{done.tensors} tensors, {done.bytes:,} bytes")
    console.print(f"in {done.folder}, {done.files} file(s) of weights and config.yaml", soft_wrap=True)
