"""The pages of an allocation, of sensitivities, and of a grid, as a browser shows them from a disk."""

from __future__ import annotations

import os
import shutil

import pytest

from qsparse_moe.ablation.allocation.page import allocation_page
from qsparse_moe.ablation.grid.report import write_results
from qsparse_moe.ablation.page.html import write_page
from qsparse_moe.ablation.sensitivity.page import sensitivity_page
from tests.ablation.page_contents import HOSTILE, grid_of, joint_content, sensitivity_content
from tests.ablation.test_joint_report import result
from tests.browser.page import SCREENSHOTS

pytestmark = [pytest.mark.browser, pytest.mark.distributed]

IMAGES = {"allocation": 14, "sensitivity": 5, "grid": 2}
SHOWN = {
    "allocation": (f"Joint plans for {HOSTILE}", "Where the loss is spent", "What to run next", "1.5000"),
    "sensitivity": ("Sensitivities of runs/x", "Cells that cost most and least", "+0.2000 (+0.1900 to +0.2200)"),
    "grid": ("Grid mini", "Unfinished runs", "exit code 1: <b>lost</b>", "2.1250 ± 0.1768"),
}
# An alert of the hostile name would be an error of every later command.
_DECODED = """
const images = [...document.images];
return Promise.all(images.map(image => image.decode())).then(() => images.map(image => image.naturalWidth));
"""
_LOADED = "return performance.getEntriesByType('resource').map(entry => entry.name).filter(n => !n.startsWith('data:'))"
_BACKGROUND = "return getComputedStyle(document.body).backgroundColor"


@pytest.fixture(scope="module")
def pages(browser, tmp_path_factory):
    folder = tmp_path_factory.mktemp("a folder & its pages")
    write_page(
        allocation_page(joint_content(run=HOSTILE, results=(result(0.5), result(0.75)))), folder / "allocation.html"
    )
    write_page(sensitivity_page(sensitivity_content()[1]), folder / "sensitivity.html")
    grid, results = grid_of(folder)
    write_results(grid, results, folder / "grid", command=["qsparse-moe", "ablate", "mini.yaml"])
    shutil.copy(folder / "grid" / "report.html", folder / "grid.html")
    return folder


def in_scheme(browser, scheme, width):
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


@pytest.mark.parametrize("name", IMAGES)
def test_a_page_opens_from_a_disk_with_its_text_and_all_its_figures(browser, pages, name):
    in_scheme(browser, "light", 1280)
    browser.get((pages / f"{name}.html").as_uri())
    widths = browser.execute_script(_DECODED)
    assert len(widths) == IMAGES[name] and all(width > 300 for width in widths), widths
    text = browser.execute_script("return document.body.innerText")
    for part in SHOWN[name]:
        assert part in text, part
    assert browser.execute_script(_LOADED) == [], "nothing is loaded from anywhere"
    assert browser.get_log("browser") == [], "nothing is wrong in the console"
    light = browser.execute_script(_BACKGROUND)
    # On a narrow screen tables and figures scroll, and the page does not.
    in_scheme(browser, "dark", 400)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 400
    assert browser.execute_script(_BACKGROUND) != light
    if folder := os.environ.get(SCREENSHOTS):
        browser.save_screenshot(f"{folder}/{name}-narrow-dark.png")


def test_values_of_a_figure_are_shown_on_request(browser, pages):
    in_scheme(browser, "light", 1280)
    browser.get((pages / "allocation.html").as_uri())
    (summary, *_) = browser.find_elements("css selector", "figure summary")
    (table, *_) = browser.find_elements("css selector", "figure table")
    assert not table.is_displayed()
    summary.click()
    assert table.is_displayed() and "bytes=0.75@batch=2" in table.text
