"""A browser without a window, on the pages of a TensorBoard."""

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
"""Set where a missing browser is a failure: in CI, which installs it."""
SCREENSHOTS = "QSPARSE_MOE_SCREENSHOTS"
"""Names the folder that keeps the pictures of the pages."""
_WAIT_S = 40.0

# TensorBoard's pages nest shadow roots, which the browser's own searches do not enter. Hidden text does not count.
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
    """Those of Debian's browser and its driver that are not on this machine."""
    return [name for name in PROGRAMS if shutil.which(name) is None]


@contextmanager
def open_browser(profile: Path) -> Iterator[webdriver.Chrome]:
    """A browser with a new profile; it is closed after."""
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
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()


class Page:
    """One page after the other of the TensorBoard at ``address``."""

    def __init__(self, driver: webdriver.Chrome, address: str, pictures: Path) -> None:
        self._driver = driver
        self._address = address
        self._pictures = pictures

    def open(self, name: str) -> None:
        """Go to a page by the word that its address ends with."""
        # Over an empty page: an address that differs in its last word alone would not load it anew.
        self._driver.get("about:blank")
        self._driver.get(f"{self._address}#{name}")

    def texts(self) -> list[str]:
        """All visible text, piece by piece."""
        return list(self._driver.execute_script(_VISIBLE_TEXTS))

    def elements(self, selector: str) -> list[Any]:
        """Everything that a CSS selector finds, in every shadow root."""
        return list(self._driver.execute_script(_ELEMENTS, selector))

    def loads_pictures(self, least: int) -> None:
        """Wait until so many pictures are loaded."""
        loaded = "return arguments[0].complete && arguments[0].naturalWidth"

        def widths() -> list[int]:
            return [width for image in self.elements("img") if (width := self._driver.execute_script(loaded, image))]

        self.wait(lambda: len(widths()) >= least, lambda: f"{least} pictures, of which {len(widths())} are loaded")

    def shows(self, *wanted: str) -> None:
        """Wait until every one of ``wanted`` stands in a visible text."""

        def lacking() -> list[str]:
            texts = self.texts()
            return [word for word in wanted if not any(word in text for text in texts)]

        self.wait(lambda: not lacking(), lambda: f"{lacking()} in {self._driver.current_url}")

    def wait(self, look: Callable[[], Any], what: Callable[[], str]) -> Any:
        """What ``look`` finds as soon as it finds something; an AssertionError tells what is there instead."""
        end = time.monotonic() + _WAIT_S
        while time.monotonic() < end:
            found = look()
            if found:
                return found
            time.sleep(0.2)
        self.keep("failed")
        raise AssertionError(f"waited {_WAIT_S:.0f} s for {what()}; the page shows {self.texts()}")

    def keep(self, name: str) -> Path:
        """Keep a picture of the page."""
        # A chart that is on the page is drawn in the next frames.
        time.sleep(1.0)
        path = self._pictures / f"{name}.png"
        self._driver.save_screenshot(str(path))
        folder = os.environ.get(SCREENSHOTS)
        if folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, folder)
        return path
