"""A folder with a tiny text and a tiny config, shared by the tests of training."""

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
    """Return a function that makes the config of a tiny run on the plain engine, in a temporary folder."""

    def make(name: str = "run", **training: Any) -> RunConfig:
        return tiny_config(text_folder, name, **({"engine": "torch", "output_dir": str(tmp_path / "runs")} | training))

    return make
