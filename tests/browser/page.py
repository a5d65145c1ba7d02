"""A headless browser for the pages of TensorBoard and of reports."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.chrome.service import Service

PROGRAMS = ("chromium", "chromedriver")
REQUIRED = "QSPARSE_MOE_BROWSER_REQUIRED"
"""Set where a missing browser is a failure, as in CI, which installs one."""
SCREENSHOTS = "QSPARSE_MOE_SCREENSHOTS"
"""Folder that the pictures of the pages are copied to."""
_WAIT_S = 40.0

# TensorBoard's pages nest shadow roots, which the search functions of browsers do not enter. Hidden text is left out.
_VISIBLE_TEXTS = """
const found = [];
const walk = (node) => {
  for (const child of node.childNodes) {
    if (child.nodeType === Node.TEXT_NODE) {
      const owner = child.parentElement;
      if (child.data.trim() && owner && owner.tagName !== 'STYLE' && owner.getClientRects().length) {
        found.push(child.data.trim());
      }
    } else if (child.nodeType === Node.ELEMENT_NODE) {
      if (child.shadowRoot) walk(child.shadowRoot);
      walk(child);
    }
  }
};
walk(document.body);
return found;
"""
_ELEMENTS = """
const found = [];
const walk = (root) => {
  found.push(...root.querySelectorAll(arguments[0]));
  for (const element of root.querySelectorAll('*')) if (element.shadowRoot) walk(element.shadowRoot);
};
walk(document);
return found;
"""


def missing_programs() -> list[str]:
    """Return which of the browser and its driver are not installed on this machine."""
    return [name for name in PROGRAMS if shutil.which(name) is None]


@contextmanager
def open_browser(profile: Path) -> Iterator[webdriver.Chrome]:
    """Open a browser with a new profile and close it afterwards."""
    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for flag in (
        "headless",
        "no-sandbox",
        "disable-gpu",
        "disable-dev-shm-usage",
        "disable-quic",
        "no-first-run",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
        f"user-data-dir={profile}",
        "window-size=1600,1200",
    ):
        options.add_argument(f"--{flag}")
    # Messages of every level, not only warnings and errors.
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()


class Page:
    """Opens pages of the TensorBoard at ``address``, one after the other."""

    def __init__(self, driver: webdriver.Chrome, address: str, pictures: Path) -> None:
        self._driver = driver
        self._address = address
        self._pictures = pictures

    def open(self, name: str) -> None:
        """Open a page by the last word of its address."""
        # By way of an empty page: a change of the last word alone would not load the page again.
        self._driver.get("about:blank")
        self._driver.get(f"{self._address}#{name}")

    def texts(self) -> list[str]:
        """Return all visible text, one entry per text node."""
        return list(self._driver.execute_script(_VISIBLE_TEXTS))

    def elements(self, selector: str) -> list[Any]:
        """Return the elements that a CSS selector finds in all shadow roots."""
        return list(self._driver.execute_script(_ELEMENTS, selector))

    def loads_pictures(self, least: int) -> None:
        """Wait until at least ``least`` pictures are loaded."""
        loaded = "return arguments[0].complete && arguments[0].naturalWidth"

        def widths() -> list[int]:
            return [width for image in self.elements("img") if (width := self._driver.execute_script(loaded, image))]

        self.wait(lambda: len(widths()) >= least, lambda: f"{least} pictures, of which {len(widths())} are loaded")

    def shows(self, *wanted: str) -> None:
        """Wait until each of ``wanted`` is part of a visible text."""

        def lacking() -> list[str]:
            texts = self.texts()
            return [word for word in wanted if not any(word in text for text in texts)]

        self.wait(lambda: not lacking(), lambda: f"{lacking()} in {self._driver.current_url}")

    def wait(self, search: Callable[[], Any], what: Callable[[], str]) -> Any:
        """Return the result of ``search`` as soon as it is true; an AssertionError after the timeout shows the page."""
        end = time.monotonic() + _WAIT_S
        while time.monotonic() < end:
            found = search()
            if found:
                return found
            time.sleep(0.2)
        self.keep("failed")
        raise AssertionError(f"waited {_WAIT_S:.0f} s for {what()}; the page shows {self.texts()}")

    def keep(self, name: str) -> Path:
        """Save a picture of the page."""
        # A chart is drawn a few frames after its element is on the page.
        time.sleep(1.0)
        path = self._pictures / f"{name}.png"
        self._driver.save_screenshot(str(path))
        folder = os.environ.get(SCREENSHOTS)
        if folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, folder)
        return path
