"""The browser of a module of tests; where the environment requires it, its tests may not be skipped."""

from __future__ import annotations

import os

import pytest

from tests.browser.page import REQUIRED, missing_programs, open_browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    missing = missing_programs()
    if missing and not os.environ.get(REQUIRED):
        pytest.skip(f"needs {' and '.join(missing)}: apt-get install chromium chromium-driver (Debian's packages)")
    assert not missing, f"{REQUIRED} is set and {missing} are not installed"
    with open_browser(tmp_path_factory.mktemp("profile")) as driver:
        yield driver
