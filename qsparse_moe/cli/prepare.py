"""``qsparse-moe prepare``: tokenize the text of a run before it starts, in several processes."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any, Self

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from qsparse_moe.cli.console import print_json, result_console
from qsparse_moe.config.load import load_config

if TYPE_CHECKING:
    from qsparse_moe.data.token_data import PreparedSource, TokenData

_LINE_SECONDS = 5.0


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("prepare")(prepare)


def prepare(
    config: Annotated[Path, typer.Argument(help="YAML file of the run.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings such as data.sequence_length=512.", show_default=False)
    ] = None,
    processes: Annotated[
        int | None, typer.Option(help="Number of processes; default: one per CPU core.", min=1, show_default=False)
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare the checksums of all files that were prepared before.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the summary as one JSON object.")] = False,
) -> None:
    """Tokenize the text of a run into its cache, so that training opens it at once.

    Finished shards are kept if it is interrupted, and several machines may prepare the same config at the same time.
    Damaged shards are built again.
    """
    run = load_config(config, overrides or ())
    # Imported after the check of the config: a wrong setting is reported within a second.
    from qsparse_moe.data.token_data import prepare_data

    began = time.monotonic()
    count = processes or len(os.sched_getaffinity(0))
    with PrepareProgress() as progress:
        data, sources = prepare_data(run.data, processes=count, verify=verify, progress=progress)
    summary = summarize(data, sources, processes=count, seconds=time.monotonic() - began)
    print_json(summary) if json else _print_summary(summary)


def summarize(data: TokenData, sources: list[PreparedSource], *, processes: int, seconds: float) -> dict[str, Any]:
    """Return the summary in the form of ``--json``."""
    return {
        "sources": [
            {
                "setting": source.setting,
                "folder": str(source.folder),
                "shards": source.num_shards,
                "shards_built": source.num_built,
                "repaired": source.repaired,
                "text_bytes": source.text_bytes,
                "train_tokens": source.tokens["train"],
                "validation_tokens": source.tokens["validation"],
                "seconds": source.seconds,
            }
            for source in sources
        ],
        "train_sequences": len(data.train),
        "validation_sequences": len(data.validation),
        "fingerprint": data.fingerprint,
        "processes": processes,
        "seconds": seconds,
    }


def _print_summary(summary: dict[str, Any]) -> None:
    console = result_console()
    table = Table()
    for column in ("source", "shards", "built now", "bytes of text", "tokens", "validation tokens", "seconds"):
        table.add_column(column)
    for source in summary["sources"]:
        numbers = (source[name] for name in ("text_bytes", "train_tokens", "validation_tokens"))
        built = f"{source['shards_built']} ({len(source['repaired'])} were damaged)" if source["repaired"] else None
        table.add_row(
            source["setting"],
            str(source["shards"]),
            built or str(source["shards_built"]),
            *(f"{number:,}" for number in numbers),
            f"{source['seconds']:.1f}",
        )
    console.print(table)
    for source in summary["sources"]:
        for problem in source["repaired"]:
            console.print(f"repaired: {problem}", soft_wrap=True)
    console.print(
        f"{summary['train_sequences']:,} training and {summary['validation_sequences']:,} validation sequences"
    )


class PrepareProgress:
    """One bar for the source that is being tokenized; a line every few seconds where there is no terminal."""

    def __init__(self) -> None:
        self._bar = _make_bar() if sys.stderr.isatty() else None
        self._printed_at = time.monotonic()

    def __call__(self, setting: str, done: int, total: int | None) -> None:
        """Show the bytes that are done of the source ``setting``."""
        if self._bar is None:
            self._print(setting, done, total)
            return
        # One bar: the next source takes the place of the one before.
        if not self._bar.tasks:
            self._bar.add_task(setting, total=total)
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], description=setting, completed=done, total=total)

    def _print(self, setting: str, done: int, total: int | None) -> None:
        if time.monotonic() - self._printed_at < _LINE_SECONDS:
            return
        self._printed_at = time.monotonic()
        of_all = f" of {total / 1e6:,.0f} ({100 * done / total:.0f} %)" if total else ""
        # Lines, because the updates of a bar would fill a log file with control characters.
        print(f"{setting}: {done / 1e6:,.0f}{of_all} million bytes tokenized", file=sys.stderr, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()


def _make_bar() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    # Standard output belongs to the summary, which may be JSON for another program.
    return Progress(*columns, console=Console(stderr=True))
