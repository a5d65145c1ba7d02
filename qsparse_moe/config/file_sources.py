"""Sources for files that are named on the command line. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from qsparse_moe.config.overrides import override_of
from qsparse_moe.config.schema import SourceConfig

_KINDS: dict[str, Literal["jsonl", "parquet"]] = {".jsonl": "jsonl", ".parquet": "parquet"}


def file_source(path: str) -> SourceConfig:
    """Return the source of a file or a glob: JSON lines or Parquet by its suffix, else text."""
    suffix = Path(path.removesuffix(".gz")).suffix
    return SourceConfig(kind=_KINDS.get(suffix, "text"), path=path)


def sources_overrides(files: Sequence[str]) -> tuple[str, ...]:
    """Return the setting that replaces the sources of a run by ``files``; none for no files."""
    if not files:
        return ()
    # Every file is a source of its own, because files of several kinds may be named together.
    return (override_of("data.sources", [file_source(file).model_dump(include={"kind", "path"}) for file in files]),)
