"""A folder with a tiny text, shared by the tests of this room."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qsparse_moe.config.schema import RunConfig
from tests.support.runs import tiny_config, write_text


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    write_text(folder / "text")
    return folder


@pytest.fixture
def make_config(text_folder: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """The tiny run on the plain engine, its run folder in this test's own folder."""

    def make(name: str = "run", **training: Any) -> RunConfig:
        return tiny_config(text_folder, name, **({"engine": "torch", "output_dir": str(tmp_path / "runs")} | training))

    return make
