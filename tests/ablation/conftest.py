"""A grid file and its base beside each other in the folder of the test."""

from __future__ import annotations

import pytest

from tests.ablation.grid_files import BASE, GRID


@pytest.fixture
def write(tmp_path):
    def files(grid=GRID, base=BASE):
        (tmp_path / "base.yaml").write_text(base)
        path = tmp_path / "mini.yaml"
        path.write_text(grid)
        return path

    return files
