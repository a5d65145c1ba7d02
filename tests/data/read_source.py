"""Read a source as training does."""

from __future__ import annotations

from typing import Any

from qsparse_moe.config.schema import SourceConfig
from qsparse_moe.data.sources import open_source


def read(**settings: Any) -> list[str]:
    return list(open_source(SourceConfig(**settings), 0).texts())
