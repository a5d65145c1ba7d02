"""Sources for files that are named on the command line. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from qsparse_moe.config.overrides import override_of
from qsparse_moe.config.schema import DataConfig, SourceConfig

_KINDS: dict[str, Literal["jsonl", "parquet"]] = {".jsonl": "jsonl", ".parquet": "parquet"}


def has_only_conversations(data: DataConfig) -> bool:
    """Return whether every source is one of conversations."""
    return all(source.format == "chat" for source in data.sources)


def file_sources(files: Sequence[str], data: DataConfig) -> tuple[SourceConfig, ...]:
    """Return one source per file or glob: JSON lines or Parquet by its suffix, else text.

    What a run has learned from conversations is measured on conversations: if ``data``, that of the run, has no other
    sources, then JSON lines and Parquet contain conversations too.
    """
    is_chat = has_only_conversations(data)
    # Every file is a source of its own, because files of several kinds may be named together.
    return tuple(_file_source(file, data.sources[0].column if is_chat else None) for file in files)


def _file_source(path: str, conversations: str | None) -> SourceConfig:
    suffix = Path(path.removesuffix(".gz")).suffix
    source = SourceConfig(kind=_KINDS.get(suffix, "text"), path=path)
    if conversations is None or source.kind == "text":
        return source
    return source.model_copy(update={"format": "chat", "column": conversations})


def sources_overrides(files: Sequence[str], data: DataConfig) -> tuple[str, ...]:
    """Return the setting that replaces the sources of a run by ``files``; none for no files."""
    if not files:
        return ()
    fields = {"kind", "path", "format", "column"}
    return (override_of("data.sources", [source.model_dump(include=fields) for source in file_sources(files, data)]),)
