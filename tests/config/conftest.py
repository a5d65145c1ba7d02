"""Load YAML text as a run file, or return the message with which it is refused."""

from __future__ import annotations

import pytest

from qsparse_moe.config.load import load_config
from qsparse_moe.errors import ConfigError


@pytest.fixture
def load(tmp_path):
    """Load YAML text, with overrides."""

    def load(text="", *overrides):
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return load_config(path, overrides)

    return load


@pytest.fixture
def error_of(load):
    """The message of the ConfigError that YAML text and overrides raise."""

    def error_of(text="", *overrides):
        with pytest.raises(ConfigError) as caught:
            load(text, *overrides)
        return str(caught.value)

    return error_of
