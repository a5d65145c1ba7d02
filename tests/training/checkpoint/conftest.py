"""The plain engine of a tiny model, as the tests of checkpoints use it."""

from __future__ import annotations

import pytest

from tests.training.checkpoint.small_checkpoints import make_engine


@pytest.fixture
def engine(tmp_path):
    return make_engine(tmp_path, seed=0)
