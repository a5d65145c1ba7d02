"""``qsparse-moe export``: write a trained model in a format that other programs read."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from qsparse_moe.cli.console import is_rank_zero, print_json, result_console
from qsparse_moe.errors import ConfigError
from qsparse_moe.runs.find import find_model


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("export")(export)


def export(
    source: Annotated[Path, typer.Argument(help="Folder of a run, a checkpoint, or an export.", show_default=False)],
    folder: Annotated[Path | None, typer.Argument(help="The same as --output.", show_default=False)] = None,
    output: Annotated[Path | None, typer.Option("--output", help="Folder to create.", show_default=False)] = None,
    format: Annotated[
        Literal["auto", "hugging-face", "native", "state-dict"],
        typer.Option(
            help="hugging-face: that of a family that import reads, such as Mixtral, where S is 0; native: this "
            "package's own, with any S; auto: hugging-face if a family can express the model, or else native. "
            "state-dict is an older name of native."
        ),
    ] = "auto",
    dtype: Annotated[
        Literal["auto", "fp32", "bf16"], typer.Option(help="Type of the weights; auto: as they are stored.")
    ] = "auto",
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier export.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write the weights of the newest checkpoint, for any number of ranks and ZeRO stage, and what belongs to them.

    Runs on one process or under the deepspeed launcher, whose ranks write the weights together.
    """
    if (folder is None) == (output is None):
        raise ConfigError("the folder to create must be given once; name it with --output FOLDER")
    target = output or folder
    assert target is not None
    # Imported once the folder is found, so that a wrong path is reported at once.
    found = find_model(source).path
    from qsparse_moe.interop.export_model import export_model
    from qsparse_moe.training.distributed.ranks import open_distributed
    from qsparse_moe.training.evaluate import stored_timeout

    command = ["qsparse-moe", "export", str(source), "--output", str(target), "--format", format, "--dtype", dtype]
    with open_distributed("cpu", timeout=stored_timeout(found)) as distributed:
        done = export_model(
            found,
            target,
            format="native" if format == "state-dict" else format,
            dtype=dtype,
            force=force,
            command=shlex.join(command),
            distributed=distributed,
        )
    if not is_rank_zero():
        return
    is_native = done.model_type == "qsparse_moe"
    if json:
        report = {"run_dir": str(found), "format": "native" if is_native else "hugging-face", "dtype": dtype}
        print_json(report | asdict(done) | {"folder": str(target)})
        return
    console = result_console()
    console.print(f"after step {done.step}: {done.tensors} tensors, {done.bytes:,} bytes, model type {done.model_type}")
    config = "config.yaml, config.json" if is_native else "config.json"
    console.print(f"in {done.folder}, {done.files} file(s) of weights and {config}", soft_wrap=True)
