"""Two trained runs in TensorBoard, as a browser shows them."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from qsparse_moe.config.schema import MetricsConfig
from qsparse_moe.metrics.charts import chart_layout
from qsparse_moe.metrics.recorder import Recorder
from qsparse_moe.metrics.tensorboard import SUMMARY_METRICS, hyperparameters
from qsparse_moe.training.loop import train
from tests.browser.page import Page
from tests.support.runs import tiny_config, write_text

# "distributed" tests run one after the other: the browser and the server need the machine for themselves.
pytestmark = [pytest.mark.browser, pytest.mark.distributed]

STEPS = 20


@pytest.fixture(scope="module")
def configs(browser, tmp_path_factory):
    """Train two runs that differ in sparsity, the second in two parts, and return their configs."""
    folder = tmp_path_factory.mktemp("board")
    write_text(folder / "text")
    half = tiny_config(
        folder, "half", engine="torch", steps=STEPS, evaluation_interval=10, output_dir=str(folder / "runs")
    )
    half = half.model_copy(update={"metrics": MetricsConfig(interval=1, image_interval=5)})
    sparsity = half.model.sparsity.model_copy(update={"default": 0.75})
    training = half.training.model_copy(update={"name": "most", "learning_rate": 1e-3})
    most = half.model_copy(update={"model": half.model.model_copy(update={"sparsity": sparsity}), "training": training})
    first_part = training.model_copy(update={"steps": STEPS // 2})
    for config in (half, most.model_copy(update={"training": first_part})):
        train(config, [Recorder(config)])
    resumed = most.model_copy(update={"training": training.model_copy(update={"resume": True})})
    train(resumed, [Recorder(resumed)])
    return half, most


@pytest.fixture(scope="module")
def page(browser, configs, tmp_path_factory):
    runs = [f"{config.training.output_dir}/{config.training.name}" for config in configs]
    command = [sys.executable, "-m", "qsparse_moe", "tensorboard", *runs, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            said = "".join(iter_until(process.stdout, "http://"))
            (address,) = re.findall(r"http://\S+", said)
            yield Page(browser, address, tmp_path_factory.mktemp("pictures"))
        finally:
            process.terminate()


def iter_until(lines, word):
    for line in lines:
        yield line
        if word in line:
            return


@pytest.mark.parametrize("name", ["timeseries", "scalars"])
def test_curves_of_both_runs_have_the_names_of_the_runs(page, name):
    page.open(name)
    page.shows("half", "most", "train", "validation", "router")
    # The validation curves are runs of their own: TensorBoard has one colour per run.
    assert {"half", "most", "half/validation", "most/validation"} <= set(page.texts())
    page.keep(name)


def test_custom_scalars_groups_the_charts_by_question(page, configs):
    layout = chart_layout(configs[0])
    page.open("custom_scalars")
    page.shows(*layout, *(title for group in layout.values() for title in group))
    # The step axes end with the last step; a chart without a line has no axis.
    page.wait(lambda: page.texts().count(str(STEPS)) >= len(layout["Does it learn?"]), lambda: "lines in the charts")
    page.keep("custom_scalars")


def test_images_are_heat_maps_of_layers_and_experts(page):
    page.open("images")
    page.shows("experts/load", "sparsity_by_expert/expert_hidden/kept_energy", "half", "most")
    # The load is the first picture of each run, above those that are constant under exact top-K.
    tags = [text for text in page.texts() if text.startswith(("experts/", "sparsity_by_expert/"))]
    assert set(tags[:2]) == {"experts/load"}, tags
    page.loads_pictures(4)
    page.keep("images")


def test_the_router_has_histograms(page):
    page.open("histograms")
    page.shows("router/log2_probability/layer_0", "half", "most")
    page.keep("histograms")


def test_hparams_has_one_row_per_run_with_its_final_metrics(page, configs):
    page.open("hparams")
    page.shows("half", "most", *hyperparameters(configs[0]), *SUMMARY_METRICS)
    page.shows("Number of matching session groups: 2", "0.50000", "0.75000")
    page.keep("hparams")


def test_text_has_the_configuration_and_the_plan(page):
    page.open("text")
    page.shows("config", "sparsity plan", "num_experts", "expert_hidden")
    page.keep("text")
